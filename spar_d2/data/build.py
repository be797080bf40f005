"""From a config to the photos that are distilled on, to labeled images, and to the images of tests."""

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
from spar_d2.data.semantic_mapper import SemanticMapper
from spar_d2.data.transforms import build_augmentations
from spar_d2.utils.panoptic_numbers import separate_numbers

logger = logging.getLogger(__name__)

PANOPTIC_FPN = "PanopticFPN"
LINEAR_PROBE = "LinearProbe"
# What these models of Detectron2's are trained on; without it, or with labels that are no class, they end in an
# assertion or a missing key.
_LABELS = {PANOPTIC_FPN: ("annotations", "sem_seg_file_name"), "SemanticSegmentor": ("sem_seg_file_name",)}
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
        dicts = cast(list, get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False))
    else:
        raise ValueError("nothing to distill on: set SPAR.DATA.IMAGES to a folder of photos, or DATASETS.TRAIN")
    augmentations = build_augmentations(**{key.lower(): data[key] for key in _AUGMENTATION})
    logger.info("Distilling on %d images", len(dicts))
    # Detectron2's list keeps its dicts packed: processes share them, and millions fit.
    packed = cast(Sequence, DatasetFromList(dicts, copy=False))
    photos = PhotoDataset(packed, augmentations, cfg.INPUT.FORMAT, seed=seed, frozen=data.FROZEN)
    photos.read(0)  # where not one can be decoded, say so before training starts
    return photos


def build_photo_loader(cfg: CfgNode, seed: int) -> PhotoLoader:
    """Batches of the photos for this process; raises as :func:`build_photos`."""
    photos = build_photos(cfg, seed)
    sampler = ResumableBatchSampler(len(photos), cfg.SOLVER.IMS_PER_BATCH, seed, comm.get_rank(), comm.get_world_size())
    return PhotoLoader(photos, sampler, cfg.DATALOADER.NUM_WORKERS, cfg.SPAR.DATA.MAX_DAMAGED)


def build_labeled_loader(cfg: CfgNode, seed: int) -> LabeledLoader:
    """Detectron2's loader of ``DATASETS.TRAIN``, with this project's mappers.

    Detectron2's default sampler is replaced by one that can be resumed at any step.

    Raises:
        ValueError: no data set, panoptic ones beside others, or one without what the model is trained on.
        FileNotFoundError: the files of one are not there.
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
        _check_classes(cfg, names)
    # The decorator of Detectron2's mappers hides their arguments from type checkers.
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
    # Without its own generator, the loader takes a number from the one of the step in which it is first used.
    batches = train_loader(cfg=cfg, mapper=mapper, dataset=dataset, sampler=sampler, generator=sampler.generator)
    return LabeledLoader(batches, sampler)


def train_loader(cfg: CfgNode | None = None, **options: Any) -> Iterable[list[dict]]:
    """Detectron2's ``build_detection_train_loader``, into pinned memory where there is a GPU."""
    # Its decorator hides its arguments from type checkers.
    build = cast(Any, build_detection_train_loader)
    given = () if cfg is None else (cfg,)
    return build(*given, **options, pin_memory=torch.cuda.is_available())


def check_panoptic(name: str) -> None:
    """Raise ``ValueError`` for a data set with panoptic masks whose metadata do not say what its categories are."""
    if has_panoptic_masks(name):
        separate_numbers(name, MetadataCatalog.get(name).as_dict())


def _load(names: Iterable[str], **options: Any) -> list[dict]:
    """As Detectron2's function, which gives no reason for files that are missing but their names."""
    try:
        return cast(list, get_detection_dataset_dicts(names, **options))
    except AssertionError as error:
        raise ValueError(f"DATASETS.TRAIN: {', '.join(names)} cannot be loaded, is it there? {error}") from error


def _check_records(cfg: CfgNode, record: dict) -> None:
    """Raise ``ValueError`` where a model's labels are in no record."""
    model = cfg.MODEL.META_ARCHITECTURE
    missing = [key for key in _LABELS.get(model, ()) if key not in record]
    if missing:
        raise ValueError(
            f"DATASETS.TRAIN: {model} is trained on {' and '.join(_LABELS[model])}, and {list(cfg.DATASETS.TRAIN)} has "
            f"no {' and no '.join(missing)} in its records; it has {', '.join(sorted(record))}"
        )


def _check_classes(cfg: CfgNode, names: Iterable[str]) -> None:
    """Raise ``ValueError`` where a PanopticFPN has not the classes of its panoptic data sets."""
    if cfg.MODEL.META_ARCHITECTURE != PANOPTIC_FPN:
        return
    for name in names:
        numbers = separate_numbers(name, MetadataCatalog.get(name).as_dict())
        counts = {"ROI_HEADS": len(numbers.things), "SEM_SEG_HEAD": 1 + len(numbers.stuff)}
        for head, count in counts.items():
            if cfg.MODEL[head].NUM_CLASSES != count:
                what = "things" if head == "ROI_HEADS" else "kinds of stuff, with one for all things"
                raise ValueError(
                    f"MODEL.{head}.NUM_CLASSES must be {count}, as {name!r} has so many {what}; "
                    f"got {cfg.MODEL[head].NUM_CLASSES}"
                )


def pinned(loader: DataLoader) -> DataLoader:
    """A loader of Detectron2's, which then gives images in memory that a GPU, if there is one, copies by itself."""
    loader.pin_memory = torch.cuda.is_available()
    return loader
