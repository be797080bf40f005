"""Runs another framework's own, unmodified script in a Detectron2 that knows this package.

The script runs as if it were started by itself: from its folder, where frameworks look for their configs and data
sets, or, where it lies in a folder of tools, from where the user stands. Processes that it spawns import its main
module anew. They find this module in its place, so that they know the package, and what ``--import`` names, too.
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

# Tells spawned processes what the main module is.
_SCRIPT_VARIABLE = "SPAR_D2_SCRIPT"
# What multiprocessing gives the main module's name in the processes that it spawns.
_SPAWNED = "__mp_main__"
# Folders of scripts that are started from elsewhere, as by Detectron2, detrex and ODISE.
_FOLDERS_OF_TOOLS = ("tools", "tool", "scripts")


def main(arguments: list[str] | None = None) -> None:
    """Run the script that the arguments name, by default those of the command line."""
    args, rest = _parse_args(sys.argv[1:] if arguments is None else arguments)
    script = Path(args.script).absolute()
    if not script.is_file():
        raise SystemExit(f"error: there is no script {args.script}")
    import_modules(args.imports)
    if args.stay or script.parent.name in _FOLDERS_OF_TOOLS:
        rest = [_found_from_here(script.parent, argument) for argument in rest]
    else:
        rest = [_seen_from(script.parent, argument) for argument in rest]
        os.chdir(script.parent)
    sys.argv = [str(script), *rest]
    # What `python script.py` puts first; `python -m` put the working folder there.
    sys.path[0] = str(script.parent)
    os.environ[_SCRIPT_VARIABLE] = str(script)
    module = ModuleType("__main__")
    module.__file__ = str(script)
    module.__dict__["__builtins__"] = __builtins__
    # Spawned processes import the main module by the name in its spec.
    module.__spec__ = ModuleSpec(__name__, None)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)


def _parse_args(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those of the script, word by word."""
    parser = argparse.ArgumentParser(
        prog="python -m spar_d2",
        usage="python -m spar_d2 [--stay] [--import MODULE] SCRIPT ARGS...",
        description="Run a framework's own script (a train_net.py, a demo), unmodified, with the backbones, data sets "
        "and config keys of spar_d2 registered in Detectron2. A script runs from its folder. Where that is called "
        f"{' or '.join(_FOLDERS_OF_TOOLS)}, it runs from this folder, so that datasets/ and a relative OUTPUT_DIR are "
        'here. Arguments that are paths (with a "/" or a suffix) of something that is not where the script runs, but '
        "here, or for tools beside the script or one folder above, are made absolute, and told.",
        allow_abbrev=False,
    )
    parser.add_argument("--stay", action="store_true", help="run it from this folder, wherever it lies")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module, by its name or as path/to/file.py, before the script runs, also in processes that it "
        "spawns: one that registers your own data sets, for example; several times for several",
    )
    parser.add_argument("script", metavar="SCRIPT", help="path to the script; its own arguments follow")
    own = 0
    while own < len(arguments) and arguments[own].startswith("-"):
        own += 2 if arguments[own] == "--import" else 1
    return parser.parse_args(arguments[: own + 1]), list(arguments[own + 1 :])


def _seen_from(folder: Path, argument: str) -> str:
    """An argument that names something here ("path", "--flag=path", "KEY=path"), to name it from another folder."""
    flag, equals, value = argument.rpartition("=")
    if not _is_relative_path(value) or not os.path.exists(value):
        return argument
    if (folder / value).exists():
        if not os.path.samefile(folder / value, value):
            print(f"spar_d2: {value} is here and beside the script; that one is taken (--stay: this)", file=sys.stderr)
        return argument
    print(f"spar_d2: {value} is not beside the script, {os.path.abspath(value)} is taken", file=sys.stderr)
    return f"{flag}{equals}{os.path.abspath(value)}"


def _found_from_here(folder: Path, argument: str) -> str:
    """An argument that names nothing here but a file beside the script, or one folder above, to name it from here."""
    flag, equals, value = argument.rpartition("=")
    if not _is_relative_path(value) or os.path.exists(value):
        return argument
    # Files alone: folders may be those that the script is to write.
    found = next((path / value for path in (folder, folder.parent) if (path / value).is_file()), None)
    if found is None:
        return argument
    print(f"spar_d2: {value} is not here, {found} is taken", file=sys.stderr)
    return f"{flag}{equals}{found}"


def _is_relative_path(value: str) -> bool:
    is_path = "/" in value or bool(Path(value).suffix)
    return is_path and not value.startswith("-") and not os.path.isabs(value)


if __name__ == _SPAWNED:
    import_again()
    globals().update(runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=_SPAWNED))
