"""Computes cached teacher targets before training."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data.build import trivial_batch_collator
from detectron2.modeling import build_model
from torch.utils.data import DataLoader
from tqdm import tqdm

from spar_d2.data.build import build_photos
from spar_d2.data.loaders import CorruptImages
from spar_d2.data.photos import PhotoDataset
from spar_d2.data.samplers import SampleIndex
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.modeling.build import target_cache, teacher_from_config
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.teacher import TargetCache
from spar_d2.teacher.cache import RESERVE, TargetLookUp

logger = logging.getLogger(__name__)

_SAMPLED = 32


@dataclass
class Filled:
    """Counts of processed images.

    Attributes:
        computed: number of targets that were computed and stored.
        found: number of targets that were already in the cache.
        damaged: number of corrupt images, which have no target.
    """

    computed: int = 0
    found: int = 0
    damaged: int = 0


def check_caching(cfg: CfgNode) -> None:
    """Raise ``ValueError`` if the config does not support a cache."""
    if not cfg.SPAR.TEACHER.CACHE_DIR:
        raise ValueError("SPAR.TEACHER.CACHE_DIR must be set to the cache folder")
    if not cfg.SPAR.DATA.FROZEN:
        raise ValueError(
            "SPAR.DATA.FROZEN must be True, because cached targets are valid only if the augmentation of each image "
            "never changes"
        )
    if cfg.MODEL.META_ARCHITECTURE != OpenVocabularySegmentor.__name__:
        raise ValueError(
            "MODEL.META_ARCHITECTURE must be OpenVocabularySegmentor to fill a cache, "
            f"got {cfg.MODEL.META_ARCHITECTURE}"
        )


def fill_cache(cfg: CfgNode, share: int = 0, shares: int = 1, show: bool = True) -> Filled:
    """Compute and store the missing teacher targets of a share of the training images.

    The function can be stopped and restarted at any time.

    Args:
        cfg: training config with ``SPAR.TEACHER.CACHE_DIR`` and ``SPAR.DATA.FROZEN``.
        share: index of this share, starting from 0.
        shares: number of shares that the images are split into.
        show: whether to show a progress bar.

    Raises:
        ValueError: the config is invalid or does not support a cache.
        RuntimeError: the disk space is insufficient, the folder is not writable, or too many images are corrupt.
    """
    check_caching(cfg)
    photos = build_photos(cfg, seed=0)
    model = build_model(cfg).eval()
    cache = target_cache(cfg, teacher_from_config(cfg))
    _check_writable(cache)
    check_room(photos, cache, find_encoder(model), stop=True)
    photos.look_up = cache.look_up()
    filled, corrupt = Filled(), CorruptImages(cfg.SPAR.DATA.MAX_DAMAGED)
    samples = [SampleIndex(index, 0, index) for index in range(share, len(photos), shares)]
    # Workers load images while the teacher encodes.
    records = DataLoader(
        photos,
        sampler=samples,
        batch_size=None,
        collate_fn=trivial_batch_collator,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.cuda.is_available(),
    )
    for record in tqdm(records, desc="teacher", unit="image", disable=not show, dynamic_ncols=True):
        if record["damaged"]:
            filled.damaged += 1
            # Count only this image: the data set also reports corrupt images that follow it.
            name = photos.dicts[record["position"]]["file_name"]
            corrupt.add({name: record["damaged"][name]})
            continue
        image = model.encoder_input(record["image"])[0]
        hits = cache.hits
        try:
            cache.target(image, record[TargetLookUp.NAME])
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} for {record['file_name']}; its target was not stored") from error
        _check_writable(cache)
        filled.found += cache.hits - hits
        filled.computed += hits == cache.hits
    return filled


def _check_writable(cache: TargetCache) -> None:
    if not cache.writable:
        raise RuntimeError(f"SPAR.TEACHER.CACHE_DIR: {cache.folder} is not writable, see the warning above")


def check_room(photos: PhotoDataset, cache: TargetCache, student: DenseEncoder, stop: bool = False) -> None:
    """Log the estimated disk space for caching the targets of all images, and compare it with the free space.

    Args:
        photos: training images; the space is estimated from a subset.
        cache: cache to fill; its existing targets are subtracted.
        student: encoder of the student, which gives the size of the targets of teachers without an ``encoder``.
        stop: whether to raise ``RuntimeError`` instead of logging a warning if the space is insufficient.
    """
    if not cache.writable:
        return
    step = max(1, len(photos) // _SAMPLED)
    numbers = range(0, len(photos), step)
    encoder = getattr(cache.teacher, "encoder", student)
    sizes = [_entry_bytes(photos[SampleIndex(n, 0, n)]["image"].shape[-2:], encoder) for n in numbers]
    present = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors"))
    needed = max(0, math.ceil(sum(sizes) / len(sizes) * len(photos)) - present)
    free = shutil.disk_usage(cache.folder).free
    logger.info(
        "Targets of %d images need about %.1f GiB more in %s (%.1f GiB cached, %.1f GiB free)",
        len(photos), needed / 2**30, cache.folder, present / 2**30, free / 2**30,
    )  # fmt: skip
    if needed + RESERVE > free:
        message = (
            f"SPAR.TEACHER.CACHE_DIR: about {needed / 2**30:.1f} GiB are needed in {cache.folder} and "
            f"{RESERVE / 2**30:.0f} GiB are reserved, but only {free / 2**30:.1f} GiB are free"
        )
        if stop:
            raise RuntimeError(f"{message}. Choose another folder, or distill with SPAR.TEACHER.WINDOWS_PER_IMAGE 16")
        logger.warning("%s: images that do not fit will be encoded in every epoch", message)


def _entry_bytes(size: tuple[int, int], encoder: DenseEncoder) -> int:
    rows, columns = encoder.grid(*size)
    return 2 * encoder.embed_dim * rows * columns
