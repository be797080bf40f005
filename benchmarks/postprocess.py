"""Post-processing of features to labels, compared with full-resolution score maps of all classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.passes import measure_pair
from benchmarks.tables import NO_PEAK, PEAK_NOTE, Table, number, ratio
from spar_d2.data.images import read_rgb
from spar_d2.encoders import DenseEncoder
from spar_d2.modeling.postprocessing import segment_features
from spar_d2.toy.scenes import large_scene

_MIB = 1 << 20
# Number of the largest tensors in the full computation: upsampled scores and probabilities.
_FULL_MAPS = 3


@dataclass(frozen=True)
class Measurement:
    """Measurement for a number of classes.

    Attributes:
        words: number of text embeddings.
        size: (H, W) of the image and of the labels.
        thresholds: whether a probability threshold is used.
        different: number of pixels with different labels; None if full maps do not fit into memory.
        seconds, peak: time and peak memory in bytes of our implementation.
        full_seconds, full_peak: time and peak memory in bytes of full maps.
    """

    words: int
    size: tuple[int, int]
    thresholds: bool
    different: int | None
    seconds: float
    peak: int | None
    full_seconds: float | None
    full_peak: int | None


TABLE = Table(
    columns={
        "words": lambda m: str(m.words),
        "threshold": lambda m: "probability" if m.thresholds else "none",
        "size": lambda m: f"{m.size[1]}x{m.size[0]}",
        "ours s": lambda m: number(m.seconds),
        "full maps s": lambda m: number(m.full_seconds),
        "time, ours / full": lambda m: ratio(m.seconds, m.full_seconds),
        "ours MiB": lambda m: number(m.peak, _MIB),
        "full maps MiB": lambda m: number(m.full_peak, _MIB),
        "memory, full / ours": lambda m: ratio(m.full_peak, m.peak),
        "other labels": lambda m: "-" if m.different is None else f"{m.different / (m.size[0] * m.size[1]):.1e}",
    },
    always=[
        PEAK_NOTE,
        "full maps: cosines upsampled by torch's interpolate to classes x height x width, softmax if there is a "
        "threshold, argmax.",
        "other labels: fraction of pixels with different labels; their scores are so close that rounding decides.",
    ],
    sometimes={
        NO_PEAK: lambda m: m.peak is None,
        "no values for full maps: not enough memory.": lambda m: m.full_seconds is None,
    },
)


def picture(path: Path | None, long_side: int) -> np.ndarray:
    """Read or generate an image (H, W, 3) uint8 RGB, and resize its long side; raises as ``read_rgb``."""
    pixels = large_scene(0, 0).image if path is None else read_rgb(path)
    factor = long_side / max(pixels.shape[:2])
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def normalized(pixels: np.ndarray, encoder: DenseEncoder) -> torch.Tensor:
    """Convert an image (H, W, 3) uint8 RGB to encoder input (1, 3, H, W), on the encoder's device."""
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(next(encoder.parameters()).device)
    mean, std = (
        torch.tensor(values, device=x.device).view(3, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std)
    )
    return ((x / 255 - mean) / std)[None]


@torch.no_grad()
def measure_postprocess(
    encoder: DenseEncoder, image: torch.Tensor, words: list[int], repeats: int, room: int
) -> Iterator[Measurement]:
    """Measure the post-processing of an encoder's features of an image.

    Args:
        encoder: encoder, on the device to measure on.
        image: encoder input (1, 3, H, W), on that device.
        words: numbers of random text embeddings.
        repeats: number of calls for the median.
        room: memory limit for full maps in bytes; larger maps are skipped.

    Yields:
        Measurements for each number of text embeddings, without and with a threshold.
    """
    features = encoder(image)[0]
    size = tuple(image.shape[-2:])
    padded = tuple(side * encoder.patch_size for side in features.shape[1:])
    generator = torch.Generator().manual_seed(0)
    for count in words:
        noise = torch.randn(count, len(features), generator=generator).to(features)
        text = F.normalize(noise, dim=1)
        classes = torch.arange(count, device=features.device)
        for threshold in (0.0, 0.1):
            yield _measure(features, text, classes, size, padded, threshold, repeats, room)


def _measure(
    features: torch.Tensor,
    text: torch.Tensor,
    classes: torch.Tensor,
    size: tuple[int, int],
    padded: tuple[int, int],
    threshold: float,
    repeats: int,
    room: int,
) -> Measurement:
    def ours() -> torch.Tensor:
        return segment_features(features, text, classes, size, padded, prob_threshold=threshold)

    def full() -> torch.Tensor:
        return _label_full_maps(features, text, size, padded, threshold)

    full_fits = _FULL_MAPS * len(text) * padded[0] * padded[1] * 4 <= room
    pair = measure_pair(ours, full, full_fits, repeats, features.device)
    different = None if pair.other is None else int((pair.ours != pair.other).sum())
    return Measurement(len(text), size, threshold > 0, different, *pair[2:])


def _label_full_maps(
    features: torch.Tensor, text: torch.Tensor, size: tuple[int, int], padded: tuple[int, int], threshold: float
) -> torch.Tensor:
    """Compute the same labels with full tensors of all classes and pixels."""
    low = torch.einsum("dhw,qd->qhw", F.normalize(features.float(), dim=0), text)
    scores = F.interpolate(low[None], size=padded, mode="bilinear")[0, :, : size[0], : size[1]]
    if not threshold:
        return scores.argmax(0)
    best, labels = (40.0 * scores).softmax(0).max(0)
    return labels.masked_fill_(best < threshold, 0)
