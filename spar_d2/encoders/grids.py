"""Feature maps on patch grids, and a cache of tensors that depend only on the grid, such as resampled positions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar, cast

import torch

_MAX_GRIDS = 8
Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class RecentGrids:
    """LRU cache of tensors on the device, keyed by patch grid.

    Images of a data set and windows of a teacher share a few grids, so these tensors need not be recomputed or copied
    to the device again. Copies of the cache are empty.
    """

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple, tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, grid: tuple, like: torch.Tensor, make: Callable[[], Tensors]) -> Tensors:
        """Return the cached tensors of a grid, or compute and cache them.

        Args:
            grid: (h, w), followed by other values that the result depends on.
            like: tensor with the device and dtype of the result.
            make: function that computes the result; it runs without gradients.
        """
        # Fake tensors, which torch.export and FLOP counters use, must not leak into other computations.
        key = (grid, like.device, like.dtype, getattr(like, "fake_mode", None))
        if key not in self._cache:
            # Tensors created in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
                self._cache[key] = make()
            if len(self._cache) > _MAX_GRIDS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return cast(Tensors, self._cache[key])

    def __deepcopy__(self, memo: dict) -> RecentGrids:
        return RecentGrids()

    def __reduce__(self) -> tuple:
        return RecentGrids, ()


def to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reshape tokens (B, h * w, C) to a feature map (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
