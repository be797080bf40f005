"""Runs the unmodified script of another framework with this package registered in Detectron2.

The script runs in its own folder, where frameworks look for their configs and data sets. Scripts in a folder such as
``tools`` run in the current folder. Spawned processes re-import the main module; this module takes its place, so that
spar_d2 and the modules of ``--import`` are imported in these processes, too.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import spar_d2  # noqa: F401  registers
from spar_d2.user_modules import import_again, import_modules

# Environment variable that passes the script to spawned processes.
_SCRIPT_VARIABLE = "SPAR_D2_SCRIPT"
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
    import_modules(args.imports)
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
        "a module that registers your data sets; or path/to/my_set.yaml, a data-set file to register; may be repeated",
    )
    parser.add_argument("script", metavar="SCRIPT", help="path to the script, followed by its arguments")
    script_index = 0
    while script_index < len(arguments) and arguments[script_index].startswith("-"):
        script_index += 2 if arguments[script_index] == "--import" else 1
    return parser.parse_args(arguments[: script_index + 1]), list(arguments[script_index + 1 :])


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
    import_again()
    globals().update(runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=_SPAWNED))
