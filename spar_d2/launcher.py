"""Runs another framework's own, unmodified script in a Detectron2 that knows this package.

The script runs as if it were started by itself in its folder. Processes that it spawns import its main module anew;
they find this module in its place, so that they know the package too.
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

# Tells spawned processes what the main module is.
_SCRIPT_VARIABLE = "SPAR_D2_SCRIPT"
# What multiprocessing gives the main module's name in the processes that it spawns.
_SPAWNED = "__mp_main__"


def main(arguments: list[str] | None = None) -> None:
    """Run the script that the arguments name, by default those of the command line."""
    args = _parse_args(sys.argv[1:] if arguments is None else arguments)
    script = Path(args.script).absolute()
    if not script.is_file():
        raise SystemExit(f"error: there is no script {args.script}")
    if args.stay:
        rest = args.arguments
    else:
        rest = [_seen_from(script.parent, argument) for argument in args.arguments]
        os.chdir(script.parent)
    sys.argv = [str(script), *rest]
    # What `python script.py` puts first; `python -m` put the working folder there.
    sys.path[0] = str(script.parent)
    os.environ[_SCRIPT_VARIABLE] = str(script)
    module = ModuleType("__main__")
    module.__file__ = str(script)
    module.__builtins__ = __builtins__
    # Spawned processes import the main module by the name in its spec.
    module.__spec__ = ModuleSpec(__name__, None)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)


def _parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spar_d2",
        description="Run a framework's own script (a train_net.py, a demo), unmodified, from its folder, with the "
        "backbones, data sets and config keys of spar_d2 registered in Detectron2. Arguments that name a file or "
        "folder seen from here, but not from there, are made absolute.",
    )
    parser.add_argument("--stay", action="store_true", help="run it from this folder instead")
    parser.add_argument("script", metavar="SCRIPT", help="path to the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its own arguments")
    return parser.parse_args(arguments)


def _seen_from(folder: Path, argument: str) -> str:
    """An argument that names something here, so that it names the same seen from another folder."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    if not value or value.startswith("-") or (folder / value).exists() or not os.path.exists(value):
        return argument
    return f"{flag}{equals}{os.path.abspath(value)}"


if __name__ == _SPAWNED:
    globals().update(runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=_SPAWNED))
