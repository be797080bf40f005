"""Refinement of class scores to labels, compared with implementations that hold all of an image at once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.passes import measure_pair
from benchmarks.tables import NO_PEAK, PEAK_NOTE, Table, number, ratio
from spar_d2.refine import AnyUp, PixelGraph, best_classes, imagenet_normalized, lposs
from spar_d2.refine.anyup import KEPT_BYTES
from spar_d2.refine.anyup_attention import LocalAttention
from spar_d2.refine.conjugate_gradients import solve
from spar_d2.refine.lab_colors import scaled_lab
from spar_d2.refine.patch_propagation import ALPHA

PATCH, CHANNELS, NEIGHBOURS = 16, 768, 400
STEPS = ("lposs", "lposs+", "anyup")
_MIB = 1 << 20
_REACH = 6


@dataclass(frozen=True)
class Measurement:
    """Measurement of a step.

    Attributes:
        step: step of ``MODEL.SPAR.REFINE``.
        size: (H, W) of the image and of the labels.
        words: number of classes.
        seconds, peak: time and peak memory in bytes of our implementation.
        whole_seconds, whole_peak: the same for all of the image at once; None if it does not fit into memory.
        different: fraction of patches or pixels with different labels; None if there is nothing to compare with.
    """

    step: str
    size: tuple[int, int]
    words: int
    seconds: float
    peak: int | None
    whole_seconds: float | None
    whole_peak: int | None
    different: float | None


TABLE = Table(
    columns={
        "step": lambda m: f"`{m.step}`",
        "size": lambda m: f"{m.size[1]}x{m.size[0]}",
        "classes": lambda m: str(m.words),
        "ours s": lambda m: number(m.seconds),
        "at once s": lambda m: number(m.whole_seconds),
        "time, ours / at once": lambda m: ratio(m.seconds, m.whole_seconds),
        "ours MiB": lambda m: number(m.peak, _MIB),
        "at once MiB": lambda m: number(m.whole_peak, _MIB),
        "memory, at once / ours": lambda m: ratio(m.whole_peak, m.peak),
        "other labels": lambda m: "-" if m.different is None else f"{m.different:.1e}",
    },
    always=[
        PEAK_NOTE,
        "at once: lposs with the similarities of all pairs of patches and a sparse matrix; lposs+ with a sparse matrix "
        "of all pixels, and the scores of all classes; anyup with the features of all pixels.",
        "other labels: fraction of labels that differ; their scores are so close that rounding decides.",
    ],
    sometimes={
        NO_PEAK: lambda m: m.peak is None,
        "no values at once: not enough memory.": lambda m: m.whole_seconds is None,
    },
)


def as_image(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert pixels (H, W, 3) uint8 to an image (3, H, W) float32 in 0..1."""
    return torch.tensor(pixels, device=device).permute(2, 0, 1).float().div_(255)


@torch.no_grad()
def measure_refinement(
    image: torch.Tensor, steps: list[str], words: list[int], repeats: int, room: int
) -> Iterator[Measurement]:
    """Measure steps of refinement for random features and classes of an image.

    Args:
        image: (3, H, W) RGB in 0..1, on the device to measure on.
        steps: steps to measure, of ``STEPS``.
        words: numbers of classes.
        repeats: number of calls for the median.
        room: memory limit in bytes for all of the image at once.
    """
    case = _Case(image)
    for step in steps:
        for count in words:
            yield case.measure(step, count, repeats, room)


class _Case:
    """Image with random features, smooth over the image as those of an encoder."""

    def __init__(self, image: torch.Tensor) -> None:
        self.grid = [-(-side // PATCH) for side in image.shape[1:]]
        padding = [cells * PATCH - side for cells, side in zip(self.grid, image.shape[1:])]
        # (3, h * p, w * p)
        self.image = F.pad(image, (0, padding[1], 0, padding[0]))
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, CHANNELS, 8, 8, generator=generator)
        noise = torch.randn(1, CHANNELS, *self.grid, generator=generator)
        features = F.interpolate(coarse, size=self.grid, mode="bicubic") + 0.5 * noise
        self.features = F.normalize(features[0], dim=0).to(image.device)
        self.texts = F.normalize(torch.randn(1000, CHANNELS, generator=generator), dim=1).to(image.device)
        self.anyup = AnyUp().eval().to(image.device)

    def measure(self, step: str, words: int, repeats: int, room: int) -> Measurement:
        text = self.texts[:words]
        # (h, w, Q)
        scores = torch.einsum("dhw,qd->hwq", self.features, text)
        pixels, patches = self.image.shape[1] * self.image.shape[2], self.grid[0] * self.grid[1]
        calls: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], int]] = {
            # Similarities, and their sorted values and positions.
            "lposs": (self._lposs, self._lposs_at_once, 5 * 4 * patches**2),
            # Values and positions of neighbors while the matrix is sorted, and scores and four tensors of the solver.
            "lposs+": (self._lposs_plus, self._lposs_plus_at_once, pixels * (50 * 168 + 6 * 4 * words)),
            # Features, and attention weights in a tile of all pixels.
            "anyup": (self._anyup, self._anyup_at_once, 3 * 4 * pixels * CHANNELS),
        }
        ours, whole = (functools.partial(call, scores, text) for call in calls[step][:2])
        pair = measure_pair(ours, whole, calls[step][2] <= room, repeats, self.image.device)
        different = None if pair.other is None else (pair.ours != pair.other).double().mean().item()
        return Measurement(step, (self.image.shape[1], self.image.shape[2]), words, *pair[2:], different)

    def _lposs(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return lposs(scores, self.features, PATCH, NEIGHBOURS).argmax(2)

    def _lposs_at_once(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        height, width = self.grid
        unit = F.normalize(self.features.flatten(1), dim=0)
        place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(unit)
        similarity, nearest = (unit.T @ unit).topk(min(NEIGHBOURS, height * width), dim=1)
        weights = similarity.clamp(min=0) ** 3 * torch.exp(
            -0.01 * PATCH * (place[nearest] - place[:, None]).norm(dim=2)
        )
        start = torch.arange(height * width, device=unit.device)[:, None].expand_as(nearest)
        weights = weights.masked_fill(start == nearest, 0)
        matrix = _normalized(start.flatten(), nearest.flatten(), weights.flatten(), height * width)
        return _propagate(matrix, scores.flatten(0, 1).T).T.reshape(scores.shape).argmax(2)

    def _lposs_plus(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        graph = PixelGraph(self.image)
        parts = scores.permute(2, 0, 1).split(graph.classes_at_once)
        return best_classes(graph.propagate(self._upsampled(part)) for part in parts)[0]

    def _lposs_plus_at_once(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        colors = scaled_lab(self.image)
        height, width = colors.shape[1:]
        index = torch.arange(height * width, device=colors.device).view(height, width)
        offsets = [(y, x) for y in range(_REACH + 1) for x in range(-_REACH, _REACH + 1) if y or x > 0]
        starts, ends, weights = [], [], []
        for y, x in offsets:
            left, right = max(0, -x), min(width, width - x)
            here = (slice(0, height - y), slice(left, right))
            there = (slice(y, height), slice(left + x, right + x))
            starts.append(index[here].flatten())
            ends.append(index[there].flatten())
            difference = colors[:, here[0], here[1]] - colors[:, there[0], there[1]]
            weights.append(torch.exp(-100 * difference.norm(dim=0)).flatten())
        matrix = _normalized(torch.cat(starts), torch.cat(ends), torch.cat(weights), height * width)
        upsampled = self._upsampled(scores.permute(2, 0, 1))
        return _propagate(matrix, upsampled.flatten(1)).argmax(0).view(height, width)

    def _anyup(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        attention = self._attention()
        values = scores.permute(2, 0, 1)[None]
        return torch.cat([attention.rows(values, rows)[0].argmax(0) for rows in attention.bands()])

    def _anyup_at_once(self, scores: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        upsampled = self._attention(kept=1 << 60).rows(self.features[None], slice(0, self.image.shape[1]))[0]
        return torch.einsum("qd,dhw->qhw", text, upsampled).argmax(0)

    def _attention(self, kept: int = KEPT_BYTES) -> LocalAttention:
        guide = imagenet_normalized(self.image)[None]
        size = (self.image.shape[1], self.image.shape[2])
        return self.anyup.prepare(guide, self.features[None], size, kept)

    def _upsampled(self, scores: torch.Tensor) -> torch.Tensor:
        return F.interpolate(scores[None], size=self.image.shape[1:], mode="bilinear")[0]


def _normalized(starts: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Sparse matrix (count, count) of a graph and its transpose, normalized by the degrees of both ends."""
    indices = torch.stack([torch.cat([starts, ends]), torch.cat([ends, starts])])
    degree = torch.zeros(count, device=weights.device).index_add_(0, indices[0], weights.repeat(2))
    scale = degree.clamp(min=1e-30).rsqrt()
    values = weights.repeat(2) * scale[indices[0]] * scale[indices[1]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_coo_tensor(indices, values, (count, count), check_invariants=False).to_sparse_csr()


def _propagate(matrix: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Propagate the scores (Q, N) of all classes at once."""

    def operator(values: torch.Tensor, output: torch.Tensor) -> None:
        output.copy_(values - ALPHA * (matrix @ values.T).T)

    return solve(operator, targets.clone())
