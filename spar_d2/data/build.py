"""Builds data sets and loaders of unlabeled and labeled images from a config."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader

from spar_d2.data.datasets.panoptic import has_panoptic_masks
from spar_d2.data.datasets.scenes import register_photos
from spar_d2.data.label_check import LabelCheck
from spar_d2.data.loaders import LabeledLoader, PhotoLoader
from spar_d2.data.mappers import PanopticMapper
from spar_d2.data.photos import PhotoDataset
from spar_d2.data.samplers import ResumableBatchSampler, ResumableTrainingSampler
from spar_d2.data.semantic_mapper import SemanticMapper, image_mapper
from spar_d2.data.transforms import build_augmentations
from spar_d2.utils.panoptic_numbers import separate_numbers

logger = logging.getLogger(__name__)

PANOPTIC_FPN = "PanopticFPN"
MASK_TRANSFORMER = "MaskTransformer"
# Models whose thing classes start at 0, and whose stuff classes start at 1.
PANOPTIC = (PANOPTIC_FPN, MASK_TRANSFORMER)
LINEAR_PROBE = "LinearProbe"
# Labels that Detectron2's models need in training. Without them, or with out-of-range labels, the models would fail
# with an assertion or a KeyError.
_LABELS = {
    PANOPTIC_FPN: ("annotations", "sem_seg_file_name"),
    # In panoptic segmentation, it needs those of PanopticFPN.
    MASK_TRANSFORMER: ("sem_seg_file_name",),
    "SemanticSegmentor": ("sem_seg_file_name",),
}
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
    """Build the data set of unlabeled images from ``SPAR.DATA`` or ``DATASETS.TRAIN``.

    Raises:
        ValueError, FileNotFoundError: there are no images, or a config key is invalid.
        RuntimeError: none of the images can be decoded.
    """
    data = cfg.SPAR.DATA
    if data.IMAGES:
        dicts = DatasetCatalog.get(register_photos(data.IMAGES))
    elif cfg.DATASETS.TRAIN:
        dicts = cast(list, get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False))
    else:
        raise ValueError("no images to distill on: set SPAR.DATA.IMAGES to a folder of images, or DATASETS.TRAIN")
    augmentations = build_augmentations(**{key.lower(): data[key] for key in _AUGMENTATION})
    logger.info("Distilling on %d images", len(dicts))
    # Detectron2's list serializes its dicts, so that millions fit into memory and processes share them.
    packed = cast(Sequence, DatasetFromList(dicts, copy=False))
    photos = PhotoDataset(packed, augmentations, cfg.INPUT.FORMAT, seed=seed, frozen=data.FROZEN)
    photos.read(0)  # fail before training starts if no image can be decoded
    return photos


def build_photo_loader(cfg: CfgNode, seed: int) -> PhotoLoader:
    """Build the loader of unlabeled images for this process; raises as :func:`build_photos`."""
    photos = build_photos(cfg, seed)
    sampler = ResumableBatchSampler(len(photos), cfg.SOLVER.IMS_PER_BATCH, seed, comm.get_rank(), comm.get_world_size())
    return PhotoLoader(photos, sampler, cfg.DATALOADER.NUM_WORKERS, cfg.SPAR.DATA.MAX_DAMAGED)


def build_labeled_loader(cfg: CfgNode, seed: int) -> LabeledLoader:
    """Build Detectron2's loader for ``DATASETS.TRAIN`` with this package's mappers.

    Detectron2's default sampler is replaced by one that can be resumed at any step.

    Raises:
        ValueError: there is no data set, panoptic data sets are mixed with others, or the labels that the model needs
            are missing.
        FileNotFoundError: files of a data set do not exist.
    """
    names = cfg.DATASETS.TRAIN
    kinds = {has_panoptic_masks(name) for name in names}
    if len(kinds) != 1:
        what = "only one kind of data set: those with panoptic masks, or others"
        raise ValueError(f"DATASETS.TRAIN must name at least one data set, and {what}; got {list(names)}")
    panoptic = kinds == {True}
    for name in names:
        check_panoptic(name)
    if panoptic:
        _check_task(cfg)
        _check_classes(cfg, names)
    # The decorator of Detectron2's mappers hides their signature from type checkers.
    mapper = cast(Any, PanopticMapper if panoptic else SemanticMapper)(cfg, True)
    if cfg.MODEL.SEM_SEG_HEAD.NAME == LINEAR_PROBE or (not panoptic and cfg.MODEL.META_ARCHITECTURE in _LABELS):
        mapper = LabelCheck(cfg, mapper)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return LabeledLoader(train_loader(cfg=cfg, mapper=mapper), None)
    dataset = _load(
        names,
        filter_empty=not panoptic and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if not panoptic:
        _check_records(cfg, dataset[0])
    sampler = ResumableTrainingSampler(len(dataset), cfg.SOLVER.IMS_PER_BATCH, seed)
    # Without its own generator, the loader would draw a number from the one of the step in which it is first used.
    batches = train_loader(cfg=cfg, mapper=mapper, dataset=dataset, sampler=sampler, generator=sampler.generator)
    return LabeledLoader(batches, sampler)


def train_loader(cfg: CfgNode | None = None, **options: Any) -> Iterable[list[dict]]:
    """Detectron2's ``build_detection_train_loader``, with pinned memory if there is a GPU."""
    # The decorator hides the signature from type checkers.
    build = cast(Any, build_detection_train_loader)
    args = () if cfg is None else (cfg,)
    return build(*args, **options, pin_memory=torch.cuda.is_available())


def test_loader(cfg: CfgNode, records: Sequence[dict]) -> DataLoader:
    """Detectron2's ``build_detection_test_loader`` for images without labels, with pinned memory if there is a GPU."""
    # The decorator hides the signature from type checkers.
    build = cast(Any, build_detection_test_loader)
    mapper = image_mapper(cfg, is_train=False)
    return pinned(build(dataset=records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS))


def dataset_of_classes(cfg: CfgNode) -> str:
    """Return the name of the data set that names the classes of a trained model, the first one of the config.

    Raises:
        ValueError: the config has no data set.
    """
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not names:
        raise ValueError("DATASETS.TEST or DATASETS.TRAIN must name the data set with the model's classes")
    return names[0]


def check_panoptic(name: str) -> None:
    """Raise ``ValueError`` if a data set with panoptic masks lacks category mappings in its metadata."""
    if has_panoptic_masks(name):
        separate_numbers(name, MetadataCatalog.get(name).as_dict())


def _load(names: Iterable[str], **options: Any) -> list[dict]:
    """Load dataset dicts; the error names the data sets, unlike Detectron2's."""
    try:
        return cast(list, get_detection_dataset_dicts(names, **options))
    except AssertionError as error:
        raise ValueError(f"DATASETS.TRAIN: {', '.join(names)} cannot be loaded, is it there? {error}") from error


def _check_records(cfg: CfgNode, record: dict) -> None:
    """Raise ``ValueError`` if the records lack labels that the model needs."""
    model = cfg.MODEL.META_ARCHITECTURE
    is_panoptic = model == MASK_TRANSFORMER and cfg.MODEL.MASK_TRANSFORMER.TASK == "panoptic"
    needed = _LABELS.get(PANOPTIC_FPN if is_panoptic else model, ())
    missing = [key for key in needed if key not in record]
    if missing:
        remedy = "; for label maps, set MODEL.MASK_TRANSFORMER.TASK semantic" if is_panoptic else ""
        raise ValueError(
            f"DATASETS.TRAIN: {model} is trained on {' and '.join(needed)}, but the records of "
            f"{list(cfg.DATASETS.TRAIN)} have no {' and no '.join(missing)}; they have {', '.join(sorted(record))}"
            f"{remedy}"
        )


def _check_task(cfg: CfgNode) -> None:
    """Raise ``ValueError`` if panoptic masks are training data of a MaskTransformer with another task."""
    task = cfg.MODEL.MASK_TRANSFORMER.TASK
    if cfg.MODEL.META_ARCHITECTURE == MASK_TRANSFORMER and task != "panoptic":
        raise ValueError(
            f"MODEL.MASK_TRANSFORMER.TASK must be panoptic for {list(cfg.DATASETS.TRAIN)}, which have panoptic masks; "
            f"got {task}"
        )


def _check_classes(cfg: CfgNode, names: Iterable[str]) -> None:
    """Raise ``ValueError`` if the number of classes of a panoptic model differs from that of its data sets."""
    if cfg.MODEL.META_ARCHITECTURE not in PANOPTIC:
        return
    for name in names:
        numbers = separate_numbers(name, MetadataCatalog.get(name).as_dict())
        counts = {"ROI_HEADS": len(numbers.things), "SEM_SEG_HEAD": 1 + len(numbers.stuff)}
        for head, count in counts.items():
            if cfg.MODEL[head].NUM_CLASSES != count:
                what = "things" if head == "ROI_HEADS" else "stuff classes, plus one for all things"
                raise ValueError(
                    f"MODEL.{head}.NUM_CLASSES must be {count}, the number of {what} of {name!r}; "
                    f"got {cfg.MODEL[head].NUM_CLASSES}"
                )


def pinned(loader: DataLoader) -> DataLoader:
    """Make a Detectron2 loader pin its memory if there is a GPU, for asynchronous copies."""
    loader.pin_memory = torch.cuda.is_available()
    return loader
