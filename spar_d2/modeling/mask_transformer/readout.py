"""Outputs in Detectron2's forms, from the classes and masks of queries. Pixels are processed in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances

from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.postprocessing import query_areas
from spar_d2.utils.transfer import send

# Number of mask cells that are compared at a time.
_CELLS = 2**16


@dataclass(frozen=True)
class Queries:
    """Classes and masks of the queries for one image.

    Attributes:
        probabilities: (Q, K + 1) float32; the last class stands for no object.
        masks: (Q, h, w) logits.
        covered: height and width in result pixels of the area that the masks cover.
        size: (H, W) of the result.
        things: number of thing classes, which come first.
    """

    probabilities: torch.Tensor
    masks: torch.Tensor
    covered: tuple[float, float]
    size: tuple[int, int]
    things: int

    def _upsampled(self, chosen: torch.Tensor | slice, values: int = 0) -> UpsampledScores:
        return UpsampledScores([ScoreMap(self.masks[chosen].permute(1, 2, 0), self.covered)], self.size, values)

    def panoptic(
        self, object_threshold: float, overlap_threshold: float, duplicate_threshold: float = 1.0
    ) -> tuple[torch.Tensor, list[dict]]:
        """Compute a panoptic segmentation, as MaskFormer does. The host waits twice.

        Each pixel belongs to the query with the largest product of class and mask probability. Segments of one stuff
        class are joined.

        Args:
            object_threshold: queries with a smaller class probability are ignored.
            overlap_threshold: queries are ignored if less than this share of their mask remains to them.
            duplicate_threshold: queries are ignored if the IoU of their mask with that of a query with a larger class
                probability is above it. Otherwise, such queries would divide the pixels of a segment among them, and
                could all be ignored.

        Returns:
            Segment ids (H, W) int32, 0 for none; and Detectron2's list of segments with "id", "isthing",
            "category_id" (from 0 for things, from 1 for stuff, as in PanopticFPN), "score" and "area".
        """
        scores, classes = self.probabilities.max(1)
        chosen = ((classes < self.probabilities.shape[1] - 1) & (scores >= object_threshold)).nonzero()[:, 0]
        owners = torch.full(self.size, len(chosen), dtype=torch.int64, device=self.masks.device)
        if not len(chosen):
            return owners.int(), []
        scores, classes = scores[chosen], classes[chosen]
        # Negative scores never win a pixel.
        scores = scores.masked_fill(self._duplicates(chosen, scores, duplicate_threshold), -1.0)
        whole = torch.zeros(len(chosen), dtype=torch.int64, device=self.masks.device)
        for place, logits in self._upsampled(chosen).bands():
            inside = logits.sigmoid_()
            whole += (inside >= 0.5).sum((0, 1))
            best = (inside * scores).argmax(2, keepdim=True)
            owners[place] = best.masked_fill_(inside.gather(2, best) < 0.5, len(chosen))[..., 0]
        areas = query_areas(owners, len(chosen) + 1)[:-1]
        table = torch.stack([areas.double(), whole.double(), classes.double(), scores.double()]).T.tolist()
        numbers, segments = self._segments(table, overlap_threshold)
        return send(torch.tensor(numbers, dtype=torch.int32), owners.device)[owners], segments

    def _duplicates(self, chosen: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        """Return which of the chosen queries (n,) have a mask with a larger IoU than the threshold with a better one.

        All pairs are compared at once ("fast NMS" of YOLACT, arXiv:1904.02689), so that the host does not wait.
        """
        inside = (self.masks[chosen] > 0).flatten(1)
        shared = torch.zeros(len(chosen), len(chosen), device=inside.device)
        for cells in inside.split(_CELLS, dim=1):
            shared = shared + cells.float() @ cells.float().T
        areas, order = shared.diagonal(), torch.arange(len(chosen), device=inside.device)
        better = (scores > scores[:, None]) | ((scores == scores[:, None]) & (order < order[:, None]))
        return ((shared > threshold * (areas + areas[:, None] - shared)) & better).any(1)

    def _segments(self, table: list[list[float]], overlap_threshold: float) -> tuple[list[int], list[dict]]:
        """Return the segment id of each query, with 0 for pixels of none at the end, and the segments."""
        numbers, segments, stuff = [], [], {}
        for area, whole, number, score in table:
            area, number = int(area), int(number)
            if not area or area < overlap_threshold * whole:
                numbers.append(0)
                continue
            isthing = number < self.things
            segment = None if isthing else stuff.get(number)
            if segment is None:
                category = number if isthing else number - self.things + 1
                segment = {"id": len(segments) + 1, "isthing": isthing, "category_id": category}
                segment |= {"score": score, "area": 0}
                segments.append(segment)
                if not isthing:
                    stuff[number] = segment
            segment["area"] += area
            segment["score"] = max(segment["score"], score)
            numbers.append(segment["id"])
        return [*numbers, 0], segments

    def class_scores(self) -> torch.Tensor:
        """Compute scores (K, H, W) float32 of all classes: sums over the queries of class times mask probability."""
        weights = self.probabilities[:, :-1]
        result = torch.empty(weights.shape[1], *self.size, device=self.masks.device)
        for (rows, columns), logits in self._upsampled(slice(None), weights.shape[1]).bands():
            result[:, rows, columns] = (logits.sigmoid_() @ weights).permute(2, 0, 1)
        return result

    def labels(self) -> torch.Tensor:
        """Compute the class (H, W) int64 with the largest score of :meth:`class_scores`, in bounded memory."""
        weights = self.probabilities[:, :-1]
        result = torch.empty(self.size, dtype=torch.int64, device=self.masks.device)
        for place, logits in self._upsampled(slice(None), weights.shape[1]).bands():
            result[place] = (logits.sigmoid_() @ weights).argmax(2)
        return result

    def instances(self, limit: int) -> Instances:
        """Compute the best things, with ``pred_classes``, ``scores``, ``pred_masks`` (bool) and ``pred_boxes``.

        The score is the class probability times the mean probability inside of the mask.

        Args:
            limit: maximum number of instances (``TEST.DETECTIONS_PER_IMAGE``).
        """
        pairs = self.probabilities[:, : self.things].flatten()
        scores, index = pairs.topk(min(limit, len(pairs)))
        query, classes = index // max(1, self.things), index % max(1, self.things)
        masks = torch.empty(len(query), *self.size, dtype=torch.bool, device=self.masks.device)
        sums = torch.zeros(2, len(query), device=self.masks.device)
        for (rows, columns), logits in self._upsampled(query).bands() if len(query) else ():
            inside = logits > 0
            masks[:, rows, columns] = inside.permute(2, 0, 1)
            sums += torch.stack([(logits.sigmoid() * inside).sum((0, 1)), inside.sum((0, 1))])
        result = Instances(self.size)
        result.pred_classes, result.pred_masks = classes, masks
        result.scores = scores * sums[0] / sums[1].clamp(min=1)
        result.pred_boxes = Boxes(_boxes(masks))
        return result


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the bounding boxes (n, 4) float32 of masks (n, H, W) bool, as x0, y0, x1, y1; zeros for empty masks."""
    ends = []
    for lines in (masks.any(1), masks.any(2)):
        lines = lines.to(torch.uint8)
        ends.append((lines.argmax(1), lines.shape[1] - lines.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1) * masks.flatten(1).any(1, keepdim=True).float()
