"""Entry point of ``spar-d2 COMMAND ...`` and ``python -m spar_d2.cli COMMAND ...``."""

from __future__ import annotations

import difflib
import gc
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from spar_d2 import __version__
from spar_d2.user_modules import import_modules

# Command name -> module below spar_d2.cli, and help text.
COMMANDS = {
    "segment": ("segment", "segment images and videos into given classes"),
    "train": ("train", "distill a student, or train and evaluate any Detectron2 config"),
    "evaluate": ("evaluate", "compare inference modes on the semantic segmentation benchmarks"),
    "probe": ("probe", "compare linear probes on single-pass, sliding-window and student features"),
    "visualize": ("visualize", "draw the predictions of a model beside the ground truth of a data set"),
    "check-data": ("check_data", "check the images and labels of an own data set"),
    "prepare": ("prepare", "convert the labels of data sets"),
    "cache-teacher": ("cache_teacher", "compute teacher targets before training"),
    "convert": ("convert", "convert weights between libraries"),
    "export": ("export", "export an encoder to ONNX"),
    "serve": ("serve", "serve an encoder over HTTP"),
    "web": ("web", "open a page for segmenting images in a browser"),
    "toy": ("toy", "distill a student on a small synthetic data set and compare it with its teacher"),
    "benchmark": ("benchmark", "measure speed and memory (in a clone of the repository)"),
    "doctor": ("doctor", "print versions, devices and missing dependencies"),
    "install-detectron2": ("install_detectron2", "install Detectron2 into this environment"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand with its arguments (default: those of the command line) and return the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    modules, argv = _split_imports(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = argv
    if name == "--version":
        print(f"spar_d2 {__version__}")
        return 0
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"available commands: {', '.join(COMMANDS)}"
        raise SystemExit(f"error: unknown command {name!r}; {hint}")
    if modules:
        import_modules(modules)
    # argparse takes the program name in help texts from sys.argv[0].
    sys.argv = [f"spar-d2 {name}", *rest]
    code = _import_command(COMMANDS[name][0]).main()
    return code if isinstance(code, int) else 0


def _import_command(module: str) -> ModuleType:
    # Imported objects live until the exit. To look for garbage among them takes a third of the time of short commands.
    gc.disable()
    try:
        return importlib.import_module(f"spar_d2.cli.{module}")
    finally:
        gc.freeze()
        gc.enable()


def _split_imports(words: list[str]) -> tuple[list[str], list[str]]:
    """Values of ``--import`` before the command, and the other words."""
    modules = []
    while words and words[0].partition("=")[0] == "--import":
        flag, equals, value = words[0].partition("=")
        if not equals and len(words) < 2:
            raise SystemExit("error: --import needs the name of a module or the path of a Python file")
        modules.append(value if equals else words[1])
        words = words[1 if equals else 2 :]
    return modules, words


def usage() -> str:
    """Return the help text with the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    footer = "Run spar-d2 COMMAND --help for the options of a command."
    options = [
        "options before COMMAND:",
        "  --import MODULE  import a module or path/to/file.py first, or register a data-set file; repeatable",
        "  --version        print the version",
    ]
    return "\n".join(
        ["usage: spar-d2 [--import MODULE] COMMAND ...", "", "commands:", *lines, "", *options, "", footer]
    )


if __name__ == "__main__":
    sys.exit(main())
