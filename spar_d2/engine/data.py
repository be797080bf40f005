"""From a config to the photos that are distilled on, and to the images of tests."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.utils import comm

from spar_d2.data.augmentation import build_augmentations
from spar_d2.data.datasets import register_photos
from spar_d2.data.loader import PhotoLoader
from spar_d2.data.photos import PhotoDataset
from spar_d2.data.sampler import DrawSampler

logger = logging.getLogger(__name__)

_AUGMENTATION = (
    "SCALE_BOX",
    "SCALE_RANGE",
    "MIN_SHORT_SIDE",
    "CROP_PROB",
    "CROP_MIN_FRACTION",
    "CROP_MIN_SIDE",
    "SIDE_MULTIPLE",
    "FLIP_PROB",
)


def build_photos(cfg: CfgNode, seed: int) -> PhotoDataset:
    """The photos of ``SPAR.DATA`` or ``DATASETS.TRAIN``, augmented as the config says.

    Raises:
        ValueError, FileNotFoundError: there are none, or a key is wrong.
        RuntimeError: not one can be decoded.
    """
    data = cfg.SPAR.DATA
    if data.IMAGES:
        dicts = DatasetCatalog.get(register_photos(data.IMAGES))
    elif cfg.DATASETS.TRAIN:
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    else:
        raise ValueError("nothing to distil on: set SPAR.DATA.IMAGES to a folder of photos, or DATASETS.TRAIN")
    augmentations = build_augmentations(**{key.lower(): data[key] for key in _AUGMENTATION})
    logger.info("Distilling on %d images", len(dicts))
    # Detectron2's list keeps its dicts packed: processes share them, and millions fit.
    photos = PhotoDataset(
        DatasetFromList(dicts, copy=False), augmentations, cfg.INPUT.FORMAT, seed=seed, frozen=data.FROZEN
    )
    photos.read(0)  # where not one can be decoded, say so before training starts
    return photos


def build_photo_loader(cfg: CfgNode, seed: int) -> PhotoLoader:
    """Batches of the photos for this process; raises as :func:`build_photos`."""
    photos = build_photos(cfg, seed)
    sampler = DrawSampler(len(photos), cfg.SOLVER.IMS_PER_BATCH, seed, comm.get_rank(), comm.get_world_size())
    return PhotoLoader(photos, sampler, cfg.DATALOADER.NUM_WORKERS, cfg.SPAR.DATA.MAX_DAMAGED)


class ImageMapper(DatasetMapper):
    """Detectron2's mapper for testing, without the true labels: the evaluator reads them, at their own size."""

    def __call__(self, dataset_dict: dict) -> dict:
        return super().__call__({key: value for key, value in dataset_dict.items() if key != "sem_seg_file_name"})
