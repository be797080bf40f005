"""Registration of classes with Detectron2 that preserves their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from fvcore.common.registry import Registry

C = TypeVar("C", bound=type)


def registered(registry: Registry) -> Callable[[C], C]:
    """Return ``registry.register()`` with a precise type: the decorator returns the class it decorates."""
    return cast("Callable[[C], C]", registry.register())
