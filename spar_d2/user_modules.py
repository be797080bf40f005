"""Modules and data-set files of the user that ``--import`` names; modules may register data sets, for example."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

# Environment variable that passes the modules, and the folder that they are relative to, to spawned processes.
_VARIABLE = "SPAR_D2_IMPORTS"
_imported: set[str] = set()


def import_modules(names: list[str]) -> None:
    """Import modules of the user, here and, by :func:`import_again`, in processes that this one spawns.

    Args:
        names: module names, or paths of Python files or data-set files (YAML), as seen from the current folder.

    Raises:
        SystemExit: there is no such module or file, or a data-set file is invalid.
    """
    os.environ[_VARIABLE] = json.dumps([os.getcwd(), names])
    import_again()


def import_again() -> None:
    """Import the modules of the user in a spawned process; does nothing where they are imported already."""
    folder, names = json.loads(os.environ.get(_VARIABLE, '["", []]'))
    names = [name for name in names if name not in _imported]
    if not names:
        return
    sys.path.insert(0, folder)
    try:
        for name in names:
            _imported.add(name)
            if name.endswith(".py"):
                _import_file(name, Path(folder, name))
            elif name.endswith((".yaml", ".yml")):
                _register(Path(folder, name))
            else:
                _import_named(name, folder)
    finally:
        sys.path.remove(folder)
    # Keep the folder at the end of the path for later imports: the modules of the script take precedence.
    if folder not in sys.path[1:]:
        sys.path.append(folder)


def _import_named(name: str, folder: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise SystemExit(f"error: --import must be a module name or a path that ends in .py or .yaml, got {name!r}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Missing dependencies of the module keep their own traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise SystemExit(f"error: --import: module {name} not found in {folder} or on Python's path") from error
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise SystemExit(f"error: --import: {name} is a folder without __init__.py, so nothing would be imported")


def _register(path: Path) -> None:
    # Imported here because it imports Detectron2.
    from spar_d2.data.datasets.file_registration import register_dataset_file

    try:
        register_dataset_file(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: --import: {error}") from None


def _import_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise SystemExit(f"error: --import: there is no file {name}")
    if path.stem in sys.modules:
        raise SystemExit(f"error: --import: a module with the name of {name} is already imported; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[path.stem])
