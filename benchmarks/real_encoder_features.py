"""Stored features of frames and photographs for the evidence on a real encoder."""

from __future__ import annotations

import functools
import statistics
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spar_d2.encoders import DenseEncoder, build_encoder
from spar_d2.modeling.banded_upsampling import covered_size
from spar_d2.modeling.example_embeddings import encoder_pixels
from spar_d2.teacher import SlidingWindowTeacher
from spar_d2.teacher.keys import encoder_key
from spar_d2.utils.content_cache import ContentCache
from spar_d2.utils.selection import evenly_spread

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree"]
CLASSES += ["sign symbol", "fence", "car", "pedestrian", "bicyclist"]
ENCODER = "vit_small_patch14_dinov2"
WINDOW, STRIDE = 518, 224


def frames(camvid: Path, split: str, count: int) -> list[Path]:
    """Return evenly spread frames of a split of CamVid."""
    return photographs(camvid / "images" / split, count)


def photographs(folder: Path, count: int) -> list[Path]:
    """Return evenly spread photographs of a folder."""
    return evenly_spread(sorted(folder.iterdir()), count)


@functools.cache
def encoder(weights: Path) -> DenseEncoder:
    """Build DINOv2 with the read-out of the recipe."""
    return build_encoder(ENCODER, str(weights), readout="value").freeze()


@functools.cache
def _key(weights: Path, *settings: object) -> str:
    return encoder_key(encoder(weights), *settings)[:12]


class Features:
    """Features of images at one size, by one method; stored in float16.

    Args:
        folder: folder of the stored features.
        weights: weight file of the encoder.
        side: short side to which images are resized, in pixels.
        stride: stride of a sliding window in pixels; 0 for a single pass.
    """

    def __init__(self, folder: Path, weights: Path, side: int, stride: int = 0) -> None:
        self.side, self.stride, self._folder, self._weights = side, stride, folder, weights

    @property
    def encoder(self) -> DenseEncoder:
        return encoder(self._weights)

    @cached_property
    def _files(self) -> ContentCache:
        settings = ("sliding", WINDOW, self.stride) if self.stride else ("single",)
        folder = self._folder / f"{_key(self._weights, *settings)}_{self.side}"
        folder.mkdir(parents=True, exist_ok=True)
        return ContentCache(folder, "--output", 1 << 30)

    def __call__(self, file: Path) -> torch.Tensor:
        """Return the features (D, h, w) float32 of an image file."""
        return self._stored(file)[0].float()

    def seconds(self, files: list[Path]) -> float:
        """Return the median seconds in which images were encoded."""
        return statistics.median(float(self._stored(file)[1]) for file in files)

    def _stored(self, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        name = f"{file.parent.name}_{file.stem}.safetensors"
        stored = self._files.load(name, lambda tensors: (tensors["features"], tensors["seconds"]))
        if stored is None:
            x = self.pixels(file)
            started = time.perf_counter()
            with torch.inference_mode():
                if self.stride:
                    features = SlidingWindowTeacher(self.encoder, WINDOW, self.stride).targets([x[0]])[0][0]
                else:
                    features = self.encoder(x)[0]
            stored = features.half().contiguous(), torch.tensor(time.perf_counter() - started)
            self._files.try_save(name, dict(zip(("features", "seconds"), stored)))
        return stored

    def pixels(self, file: Path) -> torch.Tensor:
        """Read an image at this size, as encoder input (1, 3, H, W)."""
        height, width = self.size(file)
        image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return encoder_pixels(self.encoder, np.asarray(image), "cpu")

    def size(self, file: Path) -> tuple[int, int]:
        """Return (H, W) to which an image is resized."""
        with Image.open(file) as image:
            scale = self.side / min(image.size)
            return round(image.height * scale), round(image.width * scale)

    def covered(self, file: Path, size: tuple[int, int]) -> tuple[float, float]:
        """Return the height and width of the area that the features cover, in pixels of an image of ``size``."""
        given = self.size(file)
        return covered_size(self.encoder.grid(*given), self.encoder.patch_size, given, size)
