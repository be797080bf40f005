"""Filling the teacher's cache ahead of training."""

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
from spar_d2.encoders import DenseEncoder
from spar_d2.modeling.build import teacher_from_config
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.teacher import TargetCache
from spar_d2.teacher.cache import RESERVE, TargetLookUp

logger = logging.getLogger(__name__)

_SAMPLED = 32


@dataclass
class Filled:
    """What became of the photos of a share.

    Attributes:
        computed: targets that were computed and kept.
        found: those that were there.
        damaged: photos that cannot be decoded, and have none.
    """

    computed: int = 0
    found: int = 0
    damaged: int = 0


def check_caching(cfg: CfgNode) -> None:
    """Raise ``ValueError`` where a config has no cache that could be filled."""
    if not cfg.SPAR.TEACHER.CACHE_DIR:
        raise ValueError("SPAR.TEACHER.CACHE_DIR must name the folder to fill")
    if not cfg.SPAR.DATA.FROZEN:
        raise ValueError("SPAR.DATA.FROZEN must be True: images augmented anew in every epoch are never found again")
    if cfg.MODEL.META_ARCHITECTURE != OpenVocabularySegmentor.__name__:
        raise ValueError(
            "MODEL.META_ARCHITECTURE must be OpenVocabularySegmentor to fill a cache, "
            f"got {cfg.MODEL.META_ARCHITECTURE}"
        )


def fill_cache(cfg: CfgNode, share: int = 0, shares: int = 1, show: bool = True) -> Filled:
    """Compute and keep the targets of a share of the photos that a config distills on, those that are missing.

    It can be stopped at any time, and started again.

    Args:
        cfg: with ``SPAR.TEACHER.CACHE_DIR`` and ``SPAR.DATA.FROZEN``; training with it finds the targets.
        share, shares: number of this share, from 0, and of all: every photo is in one of them.
        show: show progress.

    Raises:
        ValueError: the config has no cache to fill, or as training with it would.
        RuntimeError: there is too little room, the folder cannot be written to, or too many photos are damaged.
    """
    check_caching(cfg)
    photos = build_photos(cfg, seed=0)
    model = build_model(cfg).eval()
    cache = TargetCache(cfg.SPAR.TEACHER.CACHE_DIR, teacher_from_config(cfg))
    _check_writable(cache)
    check_room(photos, cache, stop=True)
    photos.look_up = cache.look_up()
    filled, corrupt = Filled(), CorruptImages(cfg.SPAR.DATA.MAX_DAMAGED)
    samples = [SampleIndex(index, 0, index) for index in range(share, len(photos), shares)]
    # Read ahead, while the teacher encodes.
    records = DataLoader(
        photos,
        sampler=samples,
        batch_size=None,
        collate_fn=trivial_batch_collator,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.cuda.is_available(),
    )
    for record in tqdm(records, desc="teacher", unit="photo", disable=not show, dynamic_ncols=True):
        if record["damaged"]:
            filled.damaged += 1
            # The photo itself; those after it have their own turn.
            name = photos.dicts[record["position"]]["file_name"]
            corrupt.add({name: record["damaged"][name]})
            continue
        image = model.encoder_input(record["image"])[0]
        hits = cache.hits
        try:
            cache.target(image, record[TargetLookUp.NAME])
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} for {record['file_name']}; nothing was kept of it") from error
        _check_writable(cache)
        filled.found += cache.hits - hits
        filled.computed += hits == cache.hits
    return filled


def _check_writable(cache: TargetCache) -> None:
    if not cache.writable:
        raise RuntimeError(f"SPAR.TEACHER.CACHE_DIR: {cache.folder} cannot be written to, see the warning above")


def check_room(photos: PhotoDataset, cache: TargetCache, stop: bool = False) -> None:
    """Say how much room a cache of all photos takes, estimated from some of them, and how much there is.

    What the cache holds already is not counted as room to be taken.

    Args:
        stop: where there is too little, raise ``RuntimeError`` instead of warning.
    """
    if not cache.writable:
        return
    step = max(1, len(photos) // _SAMPLED)
    numbers = range(0, len(photos), step)
    sizes = [_entry_bytes(photos[SampleIndex(n, 0, n)]["image"].shape[-2:], cache.teacher.encoder) for n in numbers]
    present = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors"))
    needed = max(0, math.ceil(sum(sizes) / len(sizes) * len(photos)) - present)
    free = shutil.disk_usage(cache.folder).free
    logger.info(
        "Targets of %d photos take about %.1f GiB more in %s (%.1f GiB are there, %.1f GiB are free)",
        len(photos), needed / 2**30, cache.folder, present / 2**30, free / 2**30,
    )  # fmt: skip
    if needed + RESERVE > free:
        message = (
            f"SPAR.TEACHER.CACHE_DIR: about {needed / 2**30:.1f} GiB are needed in {cache.folder} and "
            f"{RESERVE / 2**30:.0f} GiB are left free, but there are {free / 2**30:.1f} GiB"
        )
        if stop:
            raise RuntimeError(f"{message}. Choose another folder, or distill with SPAR.TEACHER.WINDOWS_PER_IMAGE 16")
        logger.warning("%s: images that do not fit will be encoded in every epoch", message)


def _entry_bytes(size: tuple[int, int], encoder: DenseEncoder) -> int:
    rows, columns = encoder.grid(*size)
    return 2 * encoder.embed_dim * rows * columns
