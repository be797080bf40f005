"""Label propagation over the patches of an image (LPOSS).

Scores of close patches with similar features are drawn to each other, as in "LPOSS: Label Propagation Over Patches and
Pixels for Open-vocabulary Semantic Segmentation" (Stojnić et al., CVPR 2025, arXiv 2503.19777).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from spar_d2.encoders.precision import full_float32
from spar_d2.refine.conjugate_gradients import solve
from spar_d2.refine.inputs import check_device, check_tensor, finite_ranges

# Weight of the graph relative to the scores, power of the similarities, and decay of weights per pixel of distance.
ALPHA = 0.95
_POWER = 3
_DECAY = 0.01
# Smallest norm to divide by, as in torch.nn.functional.normalize.
_SHORTEST = 1e-12
# Size in bytes of a block of similarities, and of the columns that are propagated at once (five copies of them exist).
_BLOCK_BYTES = {"cpu": 8 << 20, "other": 256 << 20}
_COLUMN_BYTES = 32 << 20


class PatchGraph:
    """Graph of the nearest neighbors of patches, which is built once and applied to any columns of numbers.

    Memory grows with ``patches * neighbours``; similarities of all pairs of patches exist for a block of rows only.

    Args:
        guide: (D, h, w) floating-point features that tell which patches are alike, of any norm. Patches with zero
            features have no neighbors.
        patch: side of a patch in pixels.
        neighbours: number of neighbors of each patch, itself included; at most all patches are used.
        check: check for NaN and infinite values. A GPU is waited for once.

    Attributes:
        size: (h, w) of the grid.
        device: device of the guide.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range.
    """

    @torch.no_grad()
    def __init__(self, guide: torch.Tensor, patch: float, neighbours: int = 400, *, check: bool = True) -> None:
        check_tensor("guide", guide, "(D, h, w)")
        if isinstance(patch, bool) or not isinstance(patch, (int, float)) or not 0 < patch < math.inf:
            raise ValueError(f"patch must be the side of a patch in pixels, a number above 0, got {patch!r}")
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"neighbours must be an integer of at least 1, got {neighbours!r}")
        if check:
            finite_ranges(guide=guide)
        self.size = (guide.shape[1], guide.shape[2])
        self.device = guide.device
        with full_float32(guide.device):
            self._build(*_nearest(guide.float(), float(patch), neighbours))

    def _build(self, columns: torch.Tensor, weights: torch.Tensor) -> None:
        """Store the normalized graph by rows: outgoing edges, k of each patch, and incoming edges in any number."""
        patches, neighbors = columns.shape
        # Incoming edges are sorted by their end. The order is stable, so that sums have a fixed order.
        ends, order = columns.flatten().sort(stable=True)
        steps = torch.arange(patches + 1, dtype=torch.int32, device=self.device)
        self._out = columns.flatten(), steps * neighbors
        self._in = (order // neighbors).int(), torch.searchsorted(ends, steps, out_int32=True)
        ones = torch.ones(patches, 1, device=self.device)
        flat = weights.flatten()
        degree = _gather(ones, *self._out, flat) + _gather(ones, *self._in, flat[order])
        scale = degree.masked_fill_(degree == 0, 1).rsqrt_().mul_(math.sqrt(ALPHA)).flatten()
        flat.mul_(scale[columns.flatten()]).view_as(weights).mul_(scale[:, None])
        self._out_weights, self._in_weights = flat, flat[order]

    @torch.no_grad()
    def propagate(self, columns: torch.Tensor, *, check: bool = True) -> torch.Tensor:
        """Propagate each column over the graph.

        Columns do not influence each other. They are processed in chunks, so that memory is bounded besides the result.

        Args:
            columns: (N, Q) floating-point, a value for each of the ``N = h * w`` patches in raster order.
            check: check for NaN and infinite values. A GPU is waited for once.

        Returns:
            (N, Q) float32.

        Raises:
            ValueError: ``columns`` has the wrong shape, dtype or values.
        """
        check_tensor("columns", columns, "(N, Q)")
        check_device("columns", columns, "guide", self.device)
        patches = self.size[0] * self.size[1]
        if len(columns) != patches:
            raise ValueError(
                f"columns must have {patches} rows, one for each patch of the {self.size[0]}x{self.size[1]} grid of "
                f"guide, got {len(columns)}"
            )
        if check:
            finite_ranges(columns=columns)
        at_once = max(1, _COLUMN_BYTES // (4 * patches))
        with full_float32(self.device):
            if columns.shape[1] <= at_once:
                return self._solve(columns)
            result = torch.empty(columns.shape, device=self.device)
            for part, output in zip(columns.split(at_once, 1), result.split(at_once, 1)):
                output.copy_(self._solve(part))
        return result

    def _solve(self, columns: torch.Tensor) -> torch.Tensor:
        # The solver works on rows. Values of a patch stay next to each other in memory, where they are gathered.
        targets = columns.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return solve(self._apply, targets.T).T

    def _apply(self, values: torch.Tensor, output: torch.Tensor) -> None:
        """Write (1 - 0.95 S) values to the output, both (Q, N) with the strides of a transposed tensor."""
        values, output = values.T, output.T
        torch.sub(values, _gather(values, *self._out, self._out_weights), out=output)
        output.sub_(_gather(values, *self._in, self._in_weights))


def _nearest(guide: torch.Tensor, patch: float, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the most similar patches of each patch, in blocks of rows.

    Returns:
        indices (N, k) int32 and weights (N, k) float32; a patch has a weight of 0 to itself.
    """
    width = guide.shape[2]
    # (D, h, w) -> (N, D)
    features = guide.flatten(1).T
    # Divided by the largest value first, so that the squares in the norm are neither infinite nor 0.
    largest = torch.linalg.vector_norm(features, math.inf, dim=1, keepdim=True)
    features = features / largest.masked_fill_(largest == 0, 1)
    features /= features.norm(dim=1, keepdim=True).clamp_(min=_SHORTEST)
    patches = len(features)
    place = torch.arange(patches, device=guide.device)
    y, x = (place // width).float(), (place % width).float()
    k = min(neighbours, patches)
    indices = torch.empty(patches, k, dtype=torch.int32, device=guide.device)
    weights = torch.empty(patches, k, device=guide.device)
    step = max(1, _BLOCK_BYTES.get(guide.device.type, _BLOCK_BYTES["other"]) // (4 * patches))
    for start in range(0, patches, step):
        rows = slice(start, min(start + step, patches))
        similarity, nearest = (features[rows] @ features.T).topk(k, dim=1, sorted=False)
        distance = torch.hypot(y[nearest] - y[rows, None], x[nearest] - x[rows, None])
        weight = similarity.clamp_(min=0).pow_(_POWER).mul_(distance.mul_(-_DECAY * patch).exp_())
        weights[rows] = weight.masked_fill_(nearest == place[rows, None], 0)
        indices[rows] = nearest
    return indices, weights


def _gather(values: torch.Tensor, edges: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum weighted rows of ``values`` (N, Q) over the edges of each patch: a product with a sparse matrix.

    Twice as fast as a CSR matrix on a CPU, and in a fixed order on a GPU.

    Args:
        values: (N, Q).
        edges: (E,) int32 row numbers, sorted by patch.
        starts: (N + 1,) int32, number of the first edge of each patch, and E.
        weights: (E,) weight of each edge.
    """
    return F.embedding_bag(edges, values, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def lposs(scores: torch.Tensor, guide: torch.Tensor, patch: float, neighbours: int = 400) -> torch.Tensor:
    """Refine class scores of patches by label propagation (LPOSS, arXiv 2503.19777).

    Every patch is connected to its ``neighbours`` most similar patches, with a weight of the cubed cosine similarity of
    their guides times ``exp(-0.01 * distance in pixels)``. Scores then approach those of connected patches: at most 10
    steps of conjugate gradients solve ``(1 - 0.95 S) z = scores`` for each class, with the symmetrically normalized
    weights ``S``. Computed in float32 whatever the dtypes are. A GPU is waited for once.

    Args:
        scores: (h, w, Q) floating-point scores of Q classes, without softmax or scale.
        guide: (D, h, w) floating-point features of the same patches, of any norm.
        patch: side of a patch in pixels.
        neighbours: number of neighbors of each patch, itself included; at most all patches are used.

    Returns:
        (h, w, Q) float32. Values are larger than those of ``scores`` where neighbors agree, up to 20 times.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range, or NaN or infinite values.
    """
    check_tensor("scores", scores, "(h, w, Q)")
    check_tensor("guide", guide, "(D, h, w)")
    check_device("guide", guide, "scores", scores.device)
    if guide.shape[1:] != scores.shape[:2]:
        raise ValueError(
            f"guide (D, h, w) must have the grid of scores (h, w, Q), {scores.shape[0]}x{scores.shape[1]}, got "
            f"{guide.shape[1]}x{guide.shape[2]}: resize one of them"
        )
    finite_ranges(scores=scores, guide=guide)
    graph = PatchGraph(guide, patch, neighbours, check=False)
    return graph.propagate(scores.flatten(0, 1), check=False).view(scores.shape)
