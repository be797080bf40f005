"""Old module names, which keep working for one version with a ``DeprecationWarning``."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "spar_d2.data.panoptic_mapper": "spar_d2.data.mappers",
    "spar_d2.engine.checkpoint": "spar_d2.checkpoint.checkpointer",
    "spar_d2.engine.optimizer": "spar_d2.engine.solver",
    "spar_d2.modeling.open_vocab": "spar_d2.modeling.open_vocabulary",
    "spar_d2.modeling.scores": "spar_d2.modeling.postprocessing",
    "spar_d2.modeling.segment": "spar_d2.predict",
}


def support_old_names() -> None:
    """Make modules importable by their old names."""
    sys.meta_path.append(_OldNames())


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name only after all other finders did not."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old name will be removed", DeprecationWarning, stacklevel=2)
        module, moved = ModuleType(spec.name), importlib.import_module(new)
        module.__getattr__ = lambda name: getattr(moved, name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass
