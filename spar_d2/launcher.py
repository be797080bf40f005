"""Runs the unmodified script of another framework with this package registered in Detectron2.

The script runs in its own folder, where frameworks look for their configs and data sets. Scripts in a folder such as
``tools`` run in the current folder. Spawned processes re-import the main module; this module takes its place, so that
spar_d2 and the modules of ``--import`` are imported in these processes, too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import spar_d2  # noqa: F401  registers

# Environment variables that pass the script and the --import modules (with their folder) to spawned processes.
_SCRIPT_VARIABLE = "SPAR_D2_SCRIPT"
_IMPORTS_VARIABLE = "SPAR_D2_IMPORTS"
# Name that multiprocessing gives to the main module in spawned processes.
_SPAWNED = "__mp_main__"
# Scripts in these folders expect to be started from the repository root (Detectron2, detrex, ODISE).
_FOLDERS_OF_TOOLS = ("tools", "tool", "scripts")


def main(arguments: list[str] | None = None) -> None:
    """Run the script given by the arguments (default: those of the command line)."""
    args, rest = _parse_args(sys.argv[1:] if arguments is None else arguments)
    script = Path(args.script).absolute()
    if not script.is_file():
        raise SystemExit(f"error: there is no script {args.script}")
    os.environ[_IMPORTS_VARIABLE] = json.dumps([os.getcwd(), args.imports])
    _import_modules()
    if args.stay or script.parent.name in _FOLDERS_OF_TOOLS:
        rest = [_resolve_beside_script(script.parent, argument) for argument in rest]
    else:
        rest = [_resolve_in_cwd(script.parent, argument) for argument in rest]
        os.chdir(script.parent)
    sys.argv = [str(script), *rest]
    # As with `python script.py`; `python -m` put the current folder there.
    sys.path[0] = str(script.parent)
    os.environ[_SCRIPT_VARIABLE] = str(script)
    module = ModuleType("__main__")
    module.__file__ = str(script)
    module.__dict__["__builtins__"] = __builtins__
    # Spawned processes import the main module by the name in its spec: this module.
    module.__spec__ = ModuleSpec(__name__, None)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)


def _parse_args(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed arguments of the launcher and the raw arguments of the script."""
    parser = argparse.ArgumentParser(
        prog="python -m spar_d2",
        usage="python -m spar_d2 [--stay] [--import MODULE] SCRIPT ARGS...",
        description="Run an unmodified script of a framework (train_net.py, a demo) with the backbones, data sets and "
        "config keys of spar_d2 registered in Detectron2. The script runs in its own folder. If that folder is named "
        f"{' or '.join(_FOLDERS_OF_TOOLS)}, it runs in the current folder, so that datasets/ and a relative OUTPUT_DIR "
        'are here. Path arguments (with a "/" or a suffix) that do not exist where the script runs are replaced by '
        "absolute paths if they exist in the current folder or, for scripts that run in the current folder, beside the "
        "script or one folder above. Each replacement is reported.",
        allow_abbrev=False,
    )
    parser.add_argument("--stay", action="store_true", help="run the script in the current folder")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="module name or path/to/file.py to import before the script runs, also in spawned processes; for example, "
        "a module that registers your data sets; may be repeated",
    )
    parser.add_argument("script", metavar="SCRIPT", help="path to the script, followed by its arguments")
    script_index = 0
    while script_index < len(arguments) and arguments[script_index].startswith("-"):
        script_index += 2 if arguments[script_index] == "--import" else 1
    return parser.parse_args(arguments[: script_index + 1]), list(arguments[script_index + 1 :])


def _import_modules() -> None:
    """Import the modules of ``--import``, relative to the folder in which the command was started."""
    folder, names = json.loads(os.environ.get(_IMPORTS_VARIABLE, '["", []]'))
    if not names:
        return
    sys.path.insert(0, folder)
    try:
        for name in names:
            if name.endswith(".py"):
                _import_file(name, Path(folder, name))
            else:
                _import_named(name, folder)
    finally:
        sys.path.remove(folder)
    # Keep the folder at the end of the path for later imports: the modules of the script take precedence.
    if folder not in sys.path[1:]:
        sys.path.append(folder)


def _import_named(name: str, folder: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise SystemExit(f"error: --import must be a module name or a path that ends in .py, got {name!r}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Missing dependencies of the module keep their own traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise SystemExit(f"error: --import: module {name} not found in {folder} or on Python's path") from error
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise SystemExit(f"error: --import: {name} is a folder without __init__.py, so nothing would be imported")


def _import_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise SystemExit(f"error: --import: there is no file {name}")
    if path.stem in sys.modules:
        raise SystemExit(f"error: --import: a module with the name of {name} is already imported; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[path.stem])


def _resolve_in_cwd(folder: Path, argument: str) -> str:
    """Make a path argument ("path", "--flag=path", "KEY=path") absolute if it exists here but not in ``folder``."""
    flag, equals, value = argument.rpartition("=")
    if not _is_relative_path(value) or not os.path.exists(value):
        return argument
    if (folder / value).exists():
        if not os.path.samefile(folder / value, value):
            print(
                f"spar_d2: {value} exists here and beside the script; using the one beside the script "
                "(--stay uses the one here)",
                file=sys.stderr,
            )
        return argument
    print(f"spar_d2: {value} does not exist beside the script; using {os.path.abspath(value)}", file=sys.stderr)
    return f"{flag}{equals}{os.path.abspath(value)}"


def _resolve_beside_script(folder: Path, argument: str) -> str:
    """Make a path argument absolute if it does not exist here, but is a file in ``folder`` or its parent."""
    flag, equals, value = argument.rpartition("=")
    if not _is_relative_path(value) or os.path.exists(value):
        return argument
    # Folders are not replaced: they may be output folders of the script.
    found = next((path / value for path in (folder, folder.parent) if (path / value).is_file()), None)
    if found is None:
        return argument
    print(f"spar_d2: {value} does not exist here; using {found}", file=sys.stderr)
    return f"{flag}{equals}{found}"


def _is_relative_path(value: str) -> bool:
    is_path = "/" in value or bool(Path(value).suffix)
    return is_path and not value.startswith("-") and not os.path.isabs(value)


if __name__ == _SPAWNED:
    _import_modules()
    globals().update(runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=_SPAWNED))
