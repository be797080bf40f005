"""Tensors that depend on the grid of patches alone, kept for the last few grids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar, cast

import torch

_KEPT = 8
Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class RecentGrids:
    """Keeps what was computed for the last few grids, on the device where it is needed.

    Images of a data set, and all windows of a teacher, come back to the same grids: then nothing is computed or copied
    to the device again. Copies of an encoder begin with none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, grid: tuple, like: torch.Tensor, make: Callable[[], Tensors]) -> Tensors:
        """What is kept for a grid, or else what ``make`` gives.

        Args:
            grid: (h, w), with whatever else the result depends on.
            like: of the type and device that the result is for.
            make: has no gradient.
        """
        # Tensors that only pretend, as those that PyTorch exports or counts with, must not reach other computations.
        key = (grid, like.device, like.dtype, getattr(like, "fake_mode", None))
        if key not in self._kept:
            # Not as tensors of inference mode, which no later training could use.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
                self._kept[key] = make()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return cast(Tensors, self._kept[key])

    def __deepcopy__(self, memo: dict) -> RecentGrids:
        return RecentGrids()

    def __reduce__(self) -> tuple:
        return RecentGrids, ()
