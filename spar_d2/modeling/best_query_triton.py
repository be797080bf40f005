"""Triton kernel for the best query of every pixel, without a pixels x queries tensor in memory.

A program labels one tile, row by row. It loops over blocks of queries and keeps, in registers, the best score so far
for every pixel of the row and every lane of the block. Lanes are compared once, at the end. The feature grid cells
around a row are loaded once for all its pixels. Scores are interpolated vertically, then horizontally.

The kernel is bound by its instruction count. With cells of 16 pixels, it needs about 10 instructions per pixel and
query, or 17 with probabilities, so an H100 needs at least 1.4 or 2.4 ms for 2048x2048 pixels and 1000 queries. Loads
take a third of that time: cells come from L2, which holds the two rows of cells around a row of tiles, and mostly from
L1 for all rows of a tile but the first. Writing the 34 MB of indices takes 0.01 ms.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from spar_d2.modeling.banded_upsampling import UpsampledScores

# Tile size in pixels. The centers of 16-pixel cells are 8, 24, 40, ...: a tile row lies between two of them.
TILE = (8, 8)
# Queries that a thread loads at once.
_TOGETHER = 2
# Queries of a block, per warp. A thread has 8 pixels and 2 queries; more do not fit into registers.
_QUERIES_OF_WARP = 64
# Score of the padding of the last query pair and block: it never wins and has no probability.
_NEVER = -1e30


@triton.jit
def _column(upper, lower, fraction, cell, stride, known, NEVER: tl.constexpr):
    """Interpolate scores (1, QUERIES) between two vertically adjacent cells of a column."""
    offset = cell * stride
    high = tl.load(upper + offset, mask=known, other=NEVER)
    low = tl.load(lower + offset, mask=known, other=NEVER)
    return high + fraction * (low - high)


@triton.jit(do_not_specialize=["height", "width", "pairs"])
def best_query_kernel(
    scores,  # float32, all maps concatenated, each (h, w, queries)
    above,  # (maps, height) int64, offset in scores of the row of cells at or above each pixel row
    below,  # (maps, height) int64, offset of the next row of cells
    down,  # (maps, height) float32 in 0..1, fraction of the distance from above to below
    across,  # (maps, width) float32, horizontal position in cells; increasing, or decreasing if mirrored
    allowed,  # (queries,) bool
    old_best,  # (height, width) int64
    old_weak,  # (height, width) bool
    best,  # (height, width) int64, output
    weak,  # (height, width) bool, output
    maps,
    height,
    width,
    pairs,  # number of query pairs
    scale,  # factor on the sum of all maps' scores, for base-2 exponentials
    threshold,
    PROBABILITIES: tl.constexpr,  # compute weak
    AGAIN: tl.constexpr,  # replace disallowed queries of old_best
    NEVER: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,  # queries of a block
):
    queries = pairs * 2
    # Products may exceed 2**31.
    wide, stride = width.to(tl.int64), pairs.to(tl.int64) * 2
    runs = tl.cdiv(width, PIXELS)
    x0 = tl.program_id(0) % runs * PIXELS
    y0 = tl.program_id(0) // runs * ROWS
    x1 = tl.minimum(x0 + PIXELS, width) - 1
    x = x0 + tl.arange(0, PIXELS)
    inside = x < width
    lanes = tl.arange(0, QUERIES)[None, :]
    for y in range(y0, tl.minimum(y0 + ROWS, height)):
        pixels = y * wide + x
        if AGAIN:
            old = tl.load(old_best + pixels, mask=inside, other=0)
            gone = tl.load(allowed + old, mask=inside, other=1) == 0
            needed = tl.max(gone.to(tl.int32), 0) != 0
        else:
            needed = True
        if needed:
            top = tl.full((PIXELS, QUERIES), float("-inf"), tl.float32)
            index = tl.zeros((PIXELS, QUERIES), tl.int32)
            highest = top
            total = tl.zeros((PIXELS, QUERIES), tl.float32)
            for start in range(0, queries, QUERIES):
                query = start + lanes
                known = query < queries
                score = tl.zeros((PIXELS, QUERIES), tl.float32)
                for number in range(maps):
                    row = number * height + y
                    fraction = tl.load(down + row)
                    # (1, QUERIES) pointers to the cells of column 0 above and below this pixel row.
                    upper = scores + tl.multiple_of(tl.load(above + row), 2) + query
                    lower = scores + tl.multiple_of(tl.load(below + row), 2) + query
                    places = across + number * width
                    place = tl.load(places + x, mask=inside, other=0.0)
                    cell_before = place.to(tl.int32)
                    remainder = (place - cell_before)[:, None]
                    one, other = tl.load(places + x0), tl.load(places + x1)
                    first, end = tl.minimum(one, other).to(tl.int32), tl.maximum(one, other)
                    last = tl.ceil(end).to(tl.int32)
                    right = _column(upper, lower, fraction, first, stride, known, NEVER)
                    upsampled = tl.zeros((PIXELS, QUERIES), tl.float32)
                    for cell in range(first, end.to(tl.int32) + 1):
                        left = right
                        right = _column(upper, lower, fraction, tl.minimum(cell + 1, last), stride, known, NEVER)
                        here = (cell_before == cell)[:, None]
                        upsampled = tl.where(here, left + remainder * (right - left), upsampled)
                    score += upsampled
                candidate = score
                if AGAIN:
                    candidate = tl.where(tl.load(allowed + query, mask=known, other=0) != 0, score, float("-inf"))
                if PROBABILITIES:
                    # Online sum of exponentials relative to the highest score so far, with one exponential per element.
                    before = highest if AGAIN else top
                    exponential = tl.exp2(-tl.abs(score - before) * scale)
                    total = tl.where(score > before, total * exponential + 1.0, total + exponential)
                    if AGAIN:
                        highest = tl.maximum(highest, score)
                # Ties go to the first query.
                better = candidate > top
                top = tl.where(better, candidate, top)
                index = tl.where(better, query, index)
            winner = tl.max(top, 1)
            # Triton's own types say tuples where these are tensors, so they are not checked.
            found = tl.min(tl.where(top == winner[:, None], index, queries), 1).to(tl.int64)  # pyright: ignore
            # 0 if no query can win: all scores are NaN, or no query is allowed.
            found = tl.where(winner > NEVER / 2, found, 0)
            if AGAIN:
                found = tl.where(gone, found, old)
            tl.store(best + pixels, found, mask=inside)
            if PROBABILITIES:
                peaks = highest if AGAIN else top
                peak = tl.max(peaks, 1)
                total = tl.sum(total * tl.exp2((peaks - peak[:, None]) * scale), 1)  # pyright: ignore
                low = tl.exp2((winner - peak) * scale) / total < threshold  # pyright: ignore
                if AGAIN:
                    low = tl.where(gone, low, tl.load(old_weak + pixels, mask=inside, other=0) != 0)
                tl.store(weak + pixels, low, mask=inside)
        elif AGAIN:
            tl.store(best + pixels, old, mask=inside)
            if PROBABILITIES:
                tl.store(weak + pixels, tl.load(old_weak + pixels, mask=inside, other=0), mask=inside)


def launch(
    upsampled: UpsampledScores,
    logit_scale: float,
    prob_threshold: float,
    allowed: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    weak: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; same results as :func:`spar_d2.modeling.best_query.best_query`. The host does not wait.

    Raises:
        Exception: any error of Triton if it cannot compile or start the kernel.
    """
    (height, width), maps = upsampled.size, len(upsampled.grids)
    extra = -upsampled.queries % _TOGETHER
    queries = upsampled.queries + extra
    scores = [F.pad(grid.scores, (0, extra), value=_NEVER) if extra else grid.scores for grid in upsampled.grids]
    scores = torch.cat([grid.flatten() for grid in scores]) if maps > 1 else scores[0].contiguous()
    above, below, begin = [], [], 0
    for grid in upsampled.grids:
        row = grid.across.cells * queries
        above.append(grid.down.before * row + begin)
        below.append(grid.down.after * row + begin)
        begin += grid.down.cells * row
    down = torch.cat([grid.down.fraction for grid in upsampled.grids])
    across = torch.cat([grid.across.position for grid in upsampled.grids])
    new_best = torch.empty(height, width, dtype=torch.int64, device=scores.device)
    probabilities = prob_threshold > 0
    new_weak = torch.empty((height, width) if probabilities else 0, dtype=torch.bool, device=scores.device)
    again = best is not None
    if allowed is None or best is None or weak is None:
        old = new_weak, new_best, new_weak  # placeholders, never read
    else:
        old = F.pad(allowed, (0, extra), value=False), best, weak
    warps = 1 if queries <= _QUERIES_OF_WARP else 2
    rows, columns = TILE
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    with torch.cuda.device_of(scores):
        best_query_kernel[(tiles,)](
            scores,
            torch.cat(above),
            torch.cat(below),
            down,
            across,
            *old,
            new_best,
            new_weak,
            maps,
            height,
            width,
            queries // _TOGETHER,
            # The kernel sums the maps instead of averaging them, and uses base-2 exponentials.
            logit_scale / maps * math.log2(math.e),
            prob_threshold,
            PROBABILITIES=probabilities,
            AGAIN=again,
            NEVER=_NEVER,
            ROWS=rows,
            PIXELS=columns,
            QUERIES=_QUERIES_OF_WARP * warps,
            num_warps=warps,  # pyright: ignore[reportCallIssue]  # an option of Triton's, which kernels do not declare
        )
    return new_best, new_weak
