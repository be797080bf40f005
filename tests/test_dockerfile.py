"""The Dockerfile names files, commands and flags that exist. It is not built here."""

import json
import re
import sys

import pytest

from reference import ROOT
from spar_d2.cli import install_detectron2, serve
from spar_d2.cli.__main__ import COMMANDS


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of every line."""
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def all_of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for kind, arguments in instructions if kind == name]


def test_copied_files_exist_and_are_not_ignored(instructions):
    kept = re.findall("^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    sources = [word for copied in all_of(instructions, "COPY") for word in copied.split()[:-1]]
    assert set(sources) == set(kept) and all((ROOT / name).exists() for name in sources)
    for name in re.findall(r'readme = "(.*?)"', (ROOT / "pyproject.toml").read_text()):
        assert name in sources


def test_the_default_command_is_one_that_the_service_takes(instructions, monkeypatch):
    (entry,), (command,) = all_of(instructions, "ENTRYPOINT"), all_of(instructions, "CMD")
    program, (name, *options) = json.loads(entry), json.loads(command)
    assert program == ["spar-d2"] and COMMANDS[name][0] == "serve"
    monkeypatch.setattr(sys, "argv", ["spar-d2 serve", *options])
    args = serve.parse_args(None)
    assert args.host == "0.0.0.0" and all_of(instructions, "EXPOSE") == [str(args.port)]
    (check,) = all_of(instructions, "HEALTHCHECK")
    assert f"http://127.0.0.1:{args.port}/health" in check


def test_the_installation_of_detectron2_takes_its_flags(instructions, monkeypatch):
    (flags,) = re.findall(r"spar-d2 install-detectron2 ([\w -]+)", "\n".join(all_of(instructions, "RUN")))
    monkeypatch.setattr(sys, "argv", ["spar-d2", *flags.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        install_detectron2.main()
    assert ended.value.code == 0


def test_extras_exist_and_the_user_is_not_root(instructions):
    (extra,) = re.findall(r'pip install "\.\[(\w+)\]"', "\n".join(all_of(instructions, "RUN")))
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    (user,) = all_of(instructions, "USER")
    assert f"--uid 10001 {user}" in "\n".join(all_of(instructions, "RUN"))
    last = [kind for kind, _ in instructions]
    assert last.index("USER") > max(place for place, kind in enumerate(last) if kind in ("RUN", "COPY"))
