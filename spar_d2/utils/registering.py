"""Registering classes with Detectron2 so that their types stay known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from fvcore.common.registry import Registry

C = TypeVar("C", bound=type)


def registered(registry: Registry) -> Callable[[C], C]:
    """``registry.register()``, which returns the class that it decorates, though it declares to return anything."""
    return cast("Callable[[C], C]", registry.register())
