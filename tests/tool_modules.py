"""Tools as modules, which are outside the package."""

import importlib.util
from types import ModuleType

from reference import ROOT


def load_tool(name: str) -> ModuleType:
    """``tools/name.py``, imported without running its main."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
