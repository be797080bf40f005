"""Selection of items from a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")


def evenly_spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Return up to ``count`` items, evenly distributed over a sequence."""
    return [items[index] for index in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]
