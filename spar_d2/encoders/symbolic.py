"""Sizes that are symbols while a model is exported for images of any size."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_symbolic(sizes: Iterable[int]) -> bool:
    """Return whether some sizes have no value, as in ``torch.export``. A comparison with a number would fix them."""
    return any(isinstance(size, torch.SymInt) for size in sizes)
