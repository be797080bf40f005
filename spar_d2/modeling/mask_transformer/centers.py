"""Queries that start from patches with the centers of things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import nn

from spar_d2.modeling.mask_transformer.blocks import grid_places
from spar_d2.modeling.mask_transformer.targets import Targets

# Probability of a center at the start of the training.
_PRIOR = 0.01
# Exponents of the focal loss: of probabilities, and of the weight of patches near a center.
_FOCUS, _NEAR = 2, 4
# Standard deviation of the target around a center, relative to the square root of the area, and its least value in
# patches.
_SPREAD, _LEAST_SPREAD = 1 / 6, 0.5


class Centers(NamedTuple):
    """Patches that may have the center of a thing.

    Attributes:
        logits: (B, h, w) logits of centers.
        queries: (B, Q, C) queries of the best patches.
        places: (B, Q, 2) places of these patches, see :func:`grid_places`.
    """

    logits: torch.Tensor
    queries: torch.Tensor
    places: torch.Tensor


class CenterQueries(nn.Module):
    """Finds centers of things by a heat map on the patches (CenterNet, arXiv:1904.07850), and makes queries there.

    There is one heat map for things of all classes, so that it also finds classes that were not trained. Queries from
    salient patches are the idea of FastInst (arXiv:2303.08594).

    Args:
        width: channels C of queries and patches.
        count: number of queries Q.
        test_count: number of queries Q in inference, which may be changed at any time; 0 for the same number.
    """

    def __init__(self, width: int, count: int, test_count: int = 0) -> None:
        super().__init__()
        self.count, self.test_count = count, test_count or count
        last = nn.Conv2d(width, 1, 1)
        assert last.bias is not None
        nn.init.constant_(last.bias, -math.log(1 / _PRIOR - 1))
        self.heat = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), last)
        self.content = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, patches: torch.Tensor) -> Centers:
        """Find centers: first local maxima of the heat map, then other patches; the most probable ones come first.

        Args:
            patches: (B, C, h, w). If there are fewer patches than queries, zeros in the center of the image are added.
        """
        count = self.count if self.training else self.test_count
        logits = self.heat(patches)
        # 1..2 for peaks, and 0..1 for other patches.
        scores = logits.detach().float().sigmoid()
        scores = scores + (F.max_pool2d(scores, 3, stride=1, padding=1) == scores)
        # At least Q patches: those that are added come last.
        added = (0, 0, 0, count)
        scores = F.pad(scores.flatten(1), (0, count), value=-1.0)
        tokens = F.pad(patches.flatten(2).transpose(1, 2), added)
        places = F.pad(grid_places((patches.shape[2], patches.shape[3]), patches.device), added)
        best = scores.topk(count, dim=1).indices
        chosen = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))
        return Centers(logits[:, 0], self.content(chosen), places[best])


@torch.no_grad()
def center_targets(
    targets: Sequence[Targets], things: int, grid: tuple[int, int], patch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the heat maps to learn.

    Args:
        targets: targets of B images.
        things: number of thing classes.
        grid: (h, w) of the patches.
        patch_size: side of a patch in pixels.

    Returns:
        Heat maps (B, h, w) in 0..1: 1 in patches with the center of mass of a thing, decreasing around them as a
        Gaussian that is wider for larger things. And (B, h, w) bool: whether a pixel of the patch has a label.
    """
    maps, labeled = [], []
    for target in targets:
        masks = target.masks
        area = masks.sum((1, 2)).float()
        # Rows and columns of the patches, relative to the patch of the center, for each segment: (G, h) and (G, w).
        offsets = []
        for side, other, count in ((1, 2, grid[0]), (2, 1, grid[1])):
            pixels = torch.arange(masks.shape[side], device=masks.device) + 0.5
            # Not a matrix product, which mixed precision would round, or even make infinite.
            center = (masks.sum(other).float() * pixels).sum(1) / area.clamp(min=1)
            offsets.append(torch.arange(count, device=masks.device) - (center / patch_size).floor()[:, None])
        distance = offsets[0].square()[:, :, None] + offsets[1].square()[:, None]
        spread = (_SPREAD * area.sqrt() / patch_size).clamp(min=_LEAST_SPREAD)[:, None, None]
        bumps = (-distance / (2 * spread.square())).exp()
        bumps = bumps * ((target.classes < things) & (area > 0))[:, None, None]
        maps.append(torch.cat([bumps, bumps.new_zeros(1, *grid)]).amax(0))
        height, width = (count * patch_size - side for count, side in zip(grid, target.valid.shape))
        labeled.append(F.max_pool2d(F.pad(target.valid.float(), (0, width, 0, height))[None], patch_size)[0] > 0)
    return torch.stack(maps), torch.stack(labeled)


def center_loss(logits: torch.Tensor, targets: torch.Tensor, labeled: torch.Tensor) -> torch.Tensor:
    """Compute the focal loss of CenterNet (equation 1), not yet divided by the number of centers.

    Args:
        logits: (B, h, w).
        targets, labeled: (B, h, w), see :func:`center_targets`.

    Returns:
        (): sum over all patches with a label.
    """
    logits = logits.float()
    probable = logits.sigmoid()
    center = (1 - probable) ** _FOCUS * F.softplus(-logits)
    other = (1 - targets) ** _NEAR * probable**_FOCUS * F.softplus(logits)
    return (torch.where(targets == 1, center, other) * labeled).sum()
