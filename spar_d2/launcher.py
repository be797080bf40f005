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
    args, rest = _parse_args(sys.argv[1:] if arguments is None else arguments)
    script = Path(args.script).absolute()
    if not script.is_file():
        raise SystemExit(f"error: there is no script {args.script}")
    if not args.stay:
        rest = [_seen_from(script.parent, argument) for argument in rest]
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


def _parse_args(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those of the script, word by word."""
    parser = argparse.ArgumentParser(
        prog="python -m spar_d2",
        usage="python -m spar_d2 [--stay] SCRIPT ARGS...",
        description="Run a framework's own script (a train_net.py, a demo), unmodified, from its folder, with the "
        "backbones, data sets and config keys of spar_d2 registered in Detectron2. Arguments that are paths (with a "
        '"/" or a suffix) of something seen from here, but not from there, are made absolute, and told.',
    )
    parser.add_argument("--stay", action="store_true", help="run it from this folder instead")
    parser.add_argument("script", metavar="SCRIPT", help="path to the script; its own arguments follow")
    own = next((place for place, word in enumerate(arguments) if not word.startswith("-")), len(arguments) - 1) + 1
    return parser.parse_args(arguments[:own]), list(arguments[own:])


def _seen_from(folder: Path, argument: str) -> str:
    """An argument that names something here ("path", "--flag=path", "KEY=path"), to name it from another folder."""
    flag, equals, value = argument.rpartition("=")
    is_path = "/" in value or Path(value).suffix
    if not is_path or value.startswith("-") or os.path.isabs(value) or not os.path.exists(value):
        return argument
    if (folder / value).exists():
        if not os.path.samefile(folder / value, value):
            print(f"spar_d2: {value} is here and beside the script; that one is taken (--stay: this)", file=sys.stderr)
        return argument
    print(f"spar_d2: {value} is not beside the script, {os.path.abspath(value)} is taken", file=sys.stderr)
    return f"{flag}{equals}{os.path.abspath(value)}"


if __name__ == _SPAWNED:
    globals().update(runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=_SPAWNED))
