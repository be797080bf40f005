"""Tools as modules, which are outside the package; and commands by their exit codes."""

import importlib.util
import sys
from types import ModuleType

from reference import ROOT


def load_tool(name: str) -> ModuleType:
    """``tools/name.py``, imported without running its main."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exit_code(command: ModuleType, monkeypatch, *arguments: object) -> int | str:
    """Run the main of a command with arguments, and return its exit code, or its last message."""
    monkeypatch.setattr(sys, "argv", [command.__name__.rpartition(".")[2], *map(str, arguments)])
    try:
        command.main()
    except SystemExit as stop:
        return stop.code
    return 0
