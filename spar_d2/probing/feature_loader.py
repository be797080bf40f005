"""Precomputes the features of training images for linear probes, if the config allows it."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.data.transforms import Augmentation
from detectron2.utils import comm
from torch.utils.data import DataLoader
from tqdm import tqdm

from spar_d2.data.build import train_loader
from spar_d2.data.label_check import LabelCheck
from spar_d2.data.loaders import LabeledLoader
from spar_d2.data.semantic_mapper import image_mapper
from spar_d2.encoders import find_encoder
from spar_d2.engine.interrupt import Interrupted
from spar_d2.modeling.linear_probe import LinearProbe
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.probing.feature_store import FILE, KEY, FeatureMapper, FeatureSource, FeatureStore, training_size
from spar_d2.teacher.cache import RESERVE
from spar_d2.utils.images import open_image
from spar_d2.utils.processes import all_gather_when_done, wait_for_all

logger = logging.getLogger(__name__)

_SAMPLED = 32


class _Condition(NamedTuple):
    met: bool
    must: str
    got: object


def is_probe(cfg: CfgNode) -> bool:
    """Whether a config trains a linear probe."""
    model = cfg.MODEL
    return model.META_ARCHITECTURE == ProbeSegmentor.__name__ or (
        model.META_ARCHITECTURE == "SemanticSegmentor" and model.SEM_SEG_HEAD.NAME == LinearProbe.__name__
    )


def obstacles(cfg: CfgNode) -> list[str]:
    """Return the reasons why features cannot be precomputed with a config; empty if they can."""
    inputs, sizes = cfg.INPUT, tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    conditions = (
        _Condition(
            cfg.MODEL.META_ARCHITECTURE == ProbeSegmentor.__name__,
            "MODEL.META_ARCHITECTURE must be ProbeSegmentor",
            cfg.MODEL.META_ARCHITECTURE,
        ),
        _Condition(cfg.MODEL.SPAR.TRAINABLE == "none", 'MODEL.SPAR.TRAINABLE must be "none"', cfg.MODEL.SPAR.TRAINABLE),
        _Condition(not cfg.SPAR.DISTILL.ENABLED, "SPAR.DISTILL.ENABLED must be False", True),
        _Condition(not inputs.CROP.ENABLED, "INPUT.CROP.ENABLED must be False", True),
        _Condition(inputs.RANDOM_FLIP == "none", 'INPUT.RANDOM_FLIP must be "none"', inputs.RANDOM_FLIP),
        _Condition(len(set(sizes)) == 1, "INPUT.MIN_SIZE_TRAIN must be one size", sizes),
        _Condition(
            cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler",
            "DATALOADER.SAMPLER_TRAIN must be TrainingSampler",
            cfg.DATALOADER.SAMPLER_TRAIN,
        ),
    )
    return [f"{condition.must}, got {condition.got!r}" for condition in conditions if not condition.met]


def check_probing(cfg: CfgNode) -> None:
    """Raise ``ValueError`` if a config sets a cache folder, but features cannot be precomputed."""
    if cfg.SPAR.PROBE.CACHE_DIR not in ("", "auto") and (reasons := obstacles(cfg)):
        raise ValueError(
            f'{KEY} {cfg.SPAR.PROBE.CACHE_DIR!r}: to precompute features, {"; ".join(reasons)}. "" turns it off'
        )


def feature_loader(cfg: CfgNode, model: ProbeSegmentor, loader: LabeledLoader) -> LabeledLoader:
    """Return a loader of precomputed features, computing them first, or ``loader`` if that is not possible.

    Both load whole images in the same order.

    Args:
        cfg: training config.
        model: model with its initial weights.
        loader: loader of images and labels, see :func:`spar_d2.data.build.build_labeled_loader`.

    Raises:
        Interrupted: the user stopped the computation.
        RuntimeError: there is not enough disk space, or features cannot be written.
        FileNotFoundError: an image does not exist.
    """
    folder = cfg.SPAR.PROBE.CACHE_DIR
    reasons = obstacles(cfg) if folder else [f'{KEY} is ""']
    if reasons:
        logger.info("The encoder runs in every step, features are not precomputed (%s)", "; ".join(reasons))
        return loader
    folder = os.path.join(cfg.OUTPUT_DIR, "features") if folder == "auto" else folder
    # Same records and order as those of the loader.
    records = cast(
        list, get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    )
    batches = train_loader(
        dataset=keep_features(cfg, model, records, folder),
        mapper=LabelCheck(cfg, FeatureMapper(cfg), find_encoder(model).patch_size),
        sampler=loader.sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return LabeledLoader(batches, loader.sampler)


def keep_features(cfg: CfgNode, model: ProbeSegmentor, records: Sequence[dict], folder: str) -> list[dict]:
    """Compute and store missing features of images, distributed over processes.

    The computation can be interrupted and resumed.

    Args:
        cfg: config that defines how images are read and resized.
        model: model with a frozen encoder.
        records: dataset dicts.
        folder: cache folder, which may be shared between encoders and image sizes.

    Returns:
        The records, with the paths of their feature files.

    Raises:
        As :func:`feature_loader`; FloatingPointError: features are NaN or infinite.
    """
    inputs = cfg.INPUT
    input_settings = f"{inputs.FORMAT} {tuple(inputs.MIN_SIZE_TRAIN)} {inputs.MAX_SIZE_TRAIN}"
    store = FeatureStore(folder, FeatureSource(model), input_settings)
    missing = [record for record in records if store.find(record["file_name"]) is None]
    # All processes must look for features before the first one writes.
    wait_for_all()
    if missing:
        if comm.is_main_process():
            _check_room(cfg, store, missing, len(records))
        _encode(cfg, model, store, missing[comm.get_rank() :: comm.get_world_size()])
        for index in all_gather_when_done(store.index):
            store.merge(index)
        if comm.is_main_process():
            store.write_index()
    else:
        logger.info("The features of all %d images are already in %s", len(records), store.folder)
    return [{**record, FILE: str(store.find(record["file_name"]))} for record in records]


def _encode(cfg: CfgNode, model: ProbeSegmentor, store: FeatureStore, records: Sequence[dict]) -> None:
    images = DataLoader(
        MapDataset(DatasetFromList(list(records), copy=False), image_mapper(cfg, is_train=True)),
        batch_size=None,
        collate_fn=trivial_batch_collator,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.cuda.is_available(),
    )
    bar = tqdm(images, desc="features", unit="image", dynamic_ncols=True, disable=not comm.is_main_process())
    try:
        for record in bar:
            store.keep(record["file_name"], model.encoder_input(record["image"])[0])
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; features so far are in {store.folder}; run the same command to resume") from stop
    finally:
        store.write_index()


def _check_room(cfg: CfgNode, store: FeatureStore, missing: Sequence[dict], total: int) -> None:
    """Estimate and log the disk space of the features; raise ``RuntimeError`` if there is not enough."""
    resize = training_size(cfg)
    sample = missing[:: max(1, len(missing) // _SAMPLED)]
    needed = math.ceil(sum(_bytes(record, resize, store) for record in sample) / len(sample) * len(missing))
    free = shutil.disk_usage(store.folder).free
    logger.info(
        "Computing the features of %d of %d images, which take about %.2f GiB in %s (%.1f GiB are free)",
        len(missing), total, needed / 2**30, store.folder, free / 2**30,
    )  # fmt: skip
    if needed + RESERVE > free:
        raise RuntimeError(
            f"{KEY}: features need {needed / 2**30:.1f} GiB in {store.folder}, and {RESERVE / 2**30:.0f} GiB stay "
            f'free, but only {free / 2**30:.1f} GiB are available. Choose another folder, or "" to keep no features'
        )


def _bytes(record: dict, resize: Augmentation, store: FeatureStore) -> int:
    with open_image(record["file_name"]) as header:
        width, height = header.size
    transform = resize.get_transform(np.broadcast_to(np.uint8(0), (height, width)))
    size = (getattr(transform, "new_h", height), getattr(transform, "new_w", width))
    encoder = store.source.encoder
    return 2 * encoder.embed_dim * math.prod(encoder.grid(*size))
