"""Deferred registration with Detectron2.

Importing ``detectron2.modeling`` is slow, so ``import spar_d2`` does not import it. Instead, import hooks register each
component right after the program imports the corresponding module of Detectron2.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_all() -> None:
    """Register config keys, models and data sets with Detectron2, now or when its modules are first imported.

    This also patches one function of Detectron2, see :mod:`spar_d2.utils.numpy2`.
    """
    when_imported("detectron2.config", _register_config)
    when_imported("detectron2.modeling", _register_modeling)
    when_imported("detectron2.data", _register_datasets)
    when_imported("detectron2.evaluation.sem_seg_evaluation", _mend_evaluator)


def _register_config() -> None:
    from detectron2.config.defaults import _C

    from spar_d2.config import add_spar_config

    add_spar_config(_C)


def _register_modeling() -> None:
    from spar_d2.modeling import backbone, linear_probe, mask_transformer, probe_segmentor, pyramid  # noqa: F401  registers
    from spar_d2.modeling import open_vocabulary as open_vocab  # noqa: F401  registers
    from spar_d2.modeling.encoder_state import teach_detectron2

    teach_detectron2()


def _register_datasets() -> None:
    from spar_d2.data.datasets.panoptic import register_panoptic
    from spar_d2.data.datasets.scenes import register_scenes
    from spar_d2.data.datasets.semantic import register_benchmarks

    register_scenes()
    register_benchmarks()
    register_panoptic()


def _mend_evaluator() -> None:
    from spar_d2.utils.numpy2 import mend_evaluator

    mend_evaluator()


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Call ``action`` right after ``module`` is imported, or immediately if it is already imported."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _ActionFinder(module, action))


class _ActionFinder(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders and wraps its loader in one that runs the action."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        # Remove this finder first: the lookup below must not recurse, and the action must run only once.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActionLoader(spec.loader, self.action)
        return spec


class _ActionLoader(importlib.abc.Loader):
    """Loads a module with its original loader, then runs the action."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str):
        # Resource and source lookups go to the original loader.
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # set by the import system
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()
