"""Class scores at the pixels of an image, from AnyUp and label propagation, converted to labels in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from spar_d2.encoders.precision import full_float32
from spar_d2.modeling.banded_upsampling import Resampling
from spar_d2.modeling.postprocessing import SHORTEST, check_thresholds, large_enough, query_areas
from spar_d2.refine import PixelGraph, best_classes
from spar_d2.refine.anyup_attention import LocalAttention

# Bytes of a band of upsampled features or scores, and smallest number of channels: other tensors do not have fewer.
_BAND_BYTES = 128 << 20
_FEWEST_CHANNELS = 512
# Bytes of the classes that are upsampled together by AnyUp, where all pixels of a class are needed.
_GROUP_BYTES = 160 << 20

# Rows of a result, and scores (C, rows, W) of consecutive queries, which together are all queries.
Band = tuple[slice, Iterable[torch.Tensor]]


class BilinearScores:
    """Scores of patches, upsampled bilinearly to the pixels that the patches cover, and cropped.

    Args:
        scores: (h, w, Q) float32.
        patch: side of a patch in pixels.
        size: (H, W) of the image, at most (h * patch, w * patch).
    """

    def __init__(self, scores: torch.Tensor, patch: int, size: tuple[int, int]) -> None:
        self.size, self._scores = size, scores.permute(2, 0, 1)
        self._covered = [cells * patch for cells in scores.shape[:2]]

    def chunks(self, at_once: int) -> Iterator[torch.Tensor]:
        """Yield scores (C, H, W) float32 of consecutive queries, at most ``at_once``."""
        height, width = self.size
        for part in self._scores.split(at_once):
            yield F.interpolate(part[None], size=self._covered, mode="bilinear")[0, :, :height, :width]


class AttendedScores:
    """Scores upsampled by AnyUp, and cropped.

    Args:
        attention: attention to the patches from the pixels that they cover.
        values: (V, h, w) float32: scores, or features if there are ``vectors``.
        size: (H, W) of the image, at most the size of the attention.
        vectors: (Q, V) unit vectors; scores are their cosine similarities with the upsampled features.
    """

    def __init__(
        self,
        attention: LocalAttention,
        values: torch.Tensor,
        size: tuple[int, int],
        vectors: torch.Tensor | None = None,
    ) -> None:
        self.size = size
        self._attention, self._values, self._vectors = attention, values, vectors

    def chunks(self, at_once: int) -> Iterator[torch.Tensor]:
        """Yield scores (C, H, W) float32 of consecutive queries, at most ``at_once``."""
        height, width = self.size
        values, lengths = self._values, None
        if self._vectors is not None:
            # The attention is linear: products can be upsampled, a few queries at a time. Only lengths need features.
            lengths = values.new_empty(self.size)
            for rows in self._rows(len(values)):
                lengths[rows] = self._upsample(values, rows).norm(dim=-1)[:, :width].clamp_(min=SHORTEST)
            values = torch.einsum("qd,dhw->qhw", self._vectors, values)
        # The attention is computed again for each group.
        for group in values.split(max(at_once, _GROUP_BYTES // (4 * height * width))):
            upsampled = values.new_empty(len(group), height, width)
            for rows in self._rows(len(group)):
                upsampled[:, rows] = self._upsample(group, rows)[:, :width].permute(2, 0, 1)
            if lengths is not None:
                upsampled.div_(lengths)
            yield from upsampled.split(at_once)

    def bands(self, size: tuple[int, int]) -> Iterator[Band]:
        """Yield bands of a result, to whose size scores are resampled bilinearly if it is not that of the image."""
        if size == self.size:
            for rows in self._rows(len(self._values)):
                yield rows, [self._read(rows)]
            return
        down, across = (
            Resampling(cells, wanted, wanted, False, self._values.device) for cells, wanted in zip(self.size, size)
        )
        # About as many rows of the image.
        step = max(1, self._step(len(self._values)) * size[0] // self.size[0])
        for rows in _slices(size[0], step):
            first, last = down.around(rows)
            band = self._read(slice(first, last + 1))
            before, after = down.before[rows] - first, down.after[rows] - first
            band = torch.lerp(band[:, before], band[:, after], down.fraction[rows, None])
            yield rows, [torch.lerp(band[..., across.before], band[..., across.after], across.fraction)]

    def _read(self, rows: slice) -> torch.Tensor:
        """Return scores (Q, rows, W)."""
        upsampled, width = self._upsample(self._values, rows), self.size[1]
        if self._vectors is None:
            return upsampled[:, :width].permute(2, 0, 1).contiguous()
        features = upsampled.flatten(0, 1)
        scores = (self._vectors @ features.T).div_(features.norm(dim=1).clamp_(min=SHORTEST))
        return scores.unflatten(1, upsampled.shape[:2])[..., :width]

    def _upsample(self, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return (rows, width of the attention, V), contiguous."""
        return self._attention.rows(values[None], rows)[0].permute(1, 2, 0)

    def _rows(self, channels: int) -> Iterator[slice]:
        return _slices(self.size[0], self._step(channels))

    def _step(self, channels: int) -> int:
        return max(1, _BAND_BYTES // (4 * max(channels, _FEWEST_CHANNELS) * self._attention.size[1]))


def propagated_band(
    source: BilinearScores | AttendedScores, graph: PixelGraph, size: tuple[int, int], normalized: bool
) -> Iterator[Band]:
    """Propagate scores over the pixels of the image, a few queries at a time, and yield them as a single band.

    Args:
        source: scores at the pixels of the image.
        graph: graph of these pixels.
        size: (H, W) of the result, to which scores are resampled bilinearly if it is not that of the image.
        normalized: divide scores by propagated ones, for probabilities. The best class is the same.
    """

    def propagate(scores: torch.Tensor) -> torch.Tensor:
        scores = graph.propagate(scores, check=False)
        return scores if scores.shape[1:] == size else F.interpolate(scores[None], size=size, mode="bilinear")[0]

    def parts() -> Iterator[torch.Tensor]:
        factor = propagate(torch.ones(1, *graph.size, device=graph.device)) if normalized else None
        for part in source.chunks(graph.classes_at_once):
            scores = propagate(part)
            yield scores if factor is None else scores.div_(factor)

    yield slice(0, size[0]), parts()


class PixelScores:
    """Scores of all queries at the pixels of a result, which exist in parts only.

    Args:
        bands: function that computes the bands of the result, from top to bottom.
        size: (H, W) of the result.
        query_class: (Q,) int64, the class of each query, on the device of the scores.
    """

    def __init__(self, bands: Callable[[], Iterator[Band]], size: tuple[int, int], query_class: torch.Tensor) -> None:
        self._bands, self._size, self._query_class = bands, size, query_class
        self._device = query_class.device

    @torch.no_grad()
    def labels(self, logit_scale: float, prob_threshold: float, area_threshold: float | None) -> torch.Tensor:
        """Label every pixel (H, W) int64, with the rules of :func:`spar_d2.modeling.segment_features`.

        On a GPU, the host waits for areas. If a class is removed by its area, scores are computed a second time.
        """
        check_thresholds(logit_scale, prob_threshold, area_threshold)
        query_class = self._query_class
        with full_float32(self._device):
            best, weak = self._best(logit_scale, prob_threshold)
            if area_threshold is not None:
                areas = query_areas(best, len(query_class))
                kept = large_enough(areas, query_class, area_threshold)
                if areas.masked_fill(kept, 0).any():
                    best, weak = self._best(logit_scale, prob_threshold, kept)
                query_class = query_class.masked_fill(~kept, 0)
            labels = query_class.index_select(0, best.flatten()).view_as(best)
            return labels.masked_fill_(weak, 0) if prob_threshold > 0 else labels

    def _best(
        self, logit_scale: float, prob_threshold: float, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best = torch.empty(self._size, dtype=torch.int64, device=self._device)
        weak = torch.empty(self._size if prob_threshold > 0 else 0, dtype=torch.bool, device=self._device)
        for rows, parts in self._bands():
            best[rows], weak[rows] = best_classes(parts, logit_scale, prob_threshold, allowed)
        return best, weak

    @torch.no_grad()
    def probabilities(self, logit_scale: float, classes: int) -> torch.Tensor:
        """Compute (classes, H, W) float32, see :func:`spar_d2.modeling.class_probabilities`."""
        output = torch.full((classes, *self._size), -torch.inf, device=self._device)
        with full_float32(self._device):
            for rows, parts in self._bands():
                total, first = output.new_full(output[0, rows].shape, -torch.inf), 0
                for scores in parts:
                    logits = scores * logit_scale
                    index = self._query_class[first : first + len(logits), None, None].expand_as(logits)
                    output[:, rows].scatter_reduce_(0, index, logits, "amax")
                    total, first = torch.logaddexp(total, logits.logsumexp(0)), first + len(logits)
                output[:, rows].sub_(total).exp_()
        return output


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
