"""``spar-d2 COMMAND ...``, or ``python -m spar_d2.cli COMMAND ...``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from spar_d2 import __version__
from spar_d2.user_modules import import_modules

# Module of the command below spar_d2.cli, and what it does.
COMMANDS = {
    "segment": ("segment", "segment images and videos into the classes you name"),
    "train": ("train", "distill a student, or train and evaluate any Detectron2 config"),
    "evaluate": ("evaluate", "compare inference modes on the semantic segmentation benchmarks"),
    "probe": ("probe", "compare linear probes of single pass, sliding window and student"),
    "prepare": ("prepare", "prepare the labels of data sets"),
    "cache-teacher": ("cache_teacher", "compute teacher targets before training"),
    "convert": ("convert", "convert weights between libraries"),
    "toy": ("toy", "distill a student on a small synthetic data set and compare it with its teacher"),
    "benchmark": ("benchmark", "measure speed and memory (in a clone of the repository)"),
    "doctor": ("doctor", "print versions, devices and what is missing"),
    "install-detectron2": ("install_detectron2", "install Detectron2 into this environment"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command with its arguments, by default those of the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    modules, words = _split_imports(words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = words
    if name == "--version":
        print(f"spar_d2 {__version__}")
        return 0
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(COMMANDS)}"
        raise SystemExit(f"error: there is no command {name!r}; {hint}")
    if modules:
        import_modules(modules)
    # Parsers take the name that they show in their help from here.
    sys.argv = [f"spar-d2 {name}", *rest]
    code = importlib.import_module(f"spar_d2.cli.{COMMANDS[name][0]}").main()
    return code if isinstance(code, int) else 0


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
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    end = "spar-d2 COMMAND --help shows the options of a command."
    options = [
        "options before COMMAND:",
        "  --import MODULE  import a module or path/to/file.py first, for example to register data sets; repeatable",
        "  --version        print the version",
    ]
    return "\n".join(["usage: spar-d2 [--import MODULE] COMMAND ...", "", "commands:", *lines, "", *options, "", end])


if __name__ == "__main__":
    sys.exit(main())
