"""`spar-d2`: its list of commands, and the same kind of mistake in each of them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reference import ROOT
from spar_d2 import model_zoo
from spar_d2.cli.__main__ import COMMANDS, main

MISTAKES = {
    "segment": ["--input", "none.jpg", "--vocabulary", "cat"],
    "train": ["--config-file", "none.yaml"],
    "evaluate": ["--config-file", "none.yaml"],
    "probe": ["--config-file", "none.yaml"],
    "visualize": ["--config-file", "none.yaml"],
    "check-data": ["none.yaml"],
    "prepare": ["no_such_set"],
    "cache-teacher": ["--config-file", "none.yaml"],
    "convert": ["--encoder", "ViT-B-16", "--input", "none.pth", "--output", "a.safetensors"],
    "serve": ["--encoder", "ViT-B-61", "--pretrained", "", "--port", "0"],
    "web": ["--encoder", "ViT-B-16", "--pretrained", "", "--max-pixels", "0"],
    "toy": ["--config-file", "none.yaml"],
    "benchmark": ["encoders", "--repeats", "0"],
    "install-detectron2": ["--source", "wheel", "--wheel-file", "none.whl", "--force"],
}


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and about in text for name, (_, about) in COMMANDS.items())


def test_every_command_has_a_help_text(monkeypatch, capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: spar-d2 {name} " in capsys.readouterr().out


# The installer looks for Detectron2 in a new process.
SLOW = {"install-detectron2": (pytest.mark.processes, pytest.mark.slow)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_1(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([name, *MISTAKES[name]])
    except SystemExit as ended:
        code = ended.code
    output = capsys.readouterr()
    lines = [line for line in (output.out + output.err).splitlines() if "SPAR_TRACEBACK" not in line]
    assert code == 1 and len(lines) == 1
    assert "Traceback" not in lines[0]
    assert not list(tmp_path.iterdir())


def test_unknown_commands_are_named():
    with pytest.raises(SystemExit, match="unknown command 'segmnt'; did you mean segment"):
        main(["segmnt"])
    with pytest.raises(SystemExit, match="available commands: segment, train"):
        main(["xyz"])


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_are_doors_to_commands(tool):
    source = tool.read_text()
    assert len(source.splitlines()) < 20
    assert source.startswith("#!/usr/bin/env python\n")
    assert f"`{tool.name}`" in (ROOT / "tools" / "README.md").read_text()


def test_modules_are_imported_before_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_registration.py").write_text("print('imported')\n")
    monkeypatch.chdir(tmp_path)
    # It is for processes that a command starts, not for those of other tests.
    monkeypatch.setenv("SPAR_D2_IMPORTS", '["", []]')
    with pytest.raises(SystemExit):
        main(["--import", "my_registration.py", "--import=json", "prepare", "--help"])
    assert capsys.readouterr().out.startswith("imported\nusage: spar-d2 prepare")
    with pytest.raises(SystemExit, match="--import: there is no file none.py"):
        main(["--import", "none.py", "prepare"])


def test_doctor_reports_versions_and_missing_packages(monkeypatch, capsys):
    doctor = importlib.import_module("spar_d2.cli.doctor")
    monkeypatch.setattr(sys, "argv", ["spar-d2 doctor"])
    doctor.main()
    text = capsys.readouterr().out
    assert "installed" in text.splitlines()[-1]
    for name in ("torch", "detectron2", "CPU", "GPU", "cache"):
        assert any(line.startswith(f"{name} ") for line in text.splitlines()), name
    monkeypatch.setitem(doctor._REQUIRED, "no_such_module", "no-such-module")
    with pytest.raises(SystemExit):
        doctor.main()
    assert "no-such-module: pip install no-such-module" in capsys.readouterr().out


def test_doctor_names_packages_that_cannot_be_imported(tmp_path):
    broken = tmp_path / "torchvision/__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "spar_d2.cli", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("torchvision "))
    assert "cannot be imported: RuntimeError: operator torchvision::nms does not exist" in line
    assert "torchvision: pip install --upgrade torch torchvision" in result.stdout


def test_configs_are_found_by_name():
    assert Path(model_zoo.get_config_file("segment/openclip_vit_b_16.yaml")).is_file()
    assert model_zoo.get_config("segment/openclip_vit_b_16.yaml").MODEL.SPAR.ENCODER == "ViT-B-16"
    with pytest.raises(FileNotFoundError, match="did you mean segment/openclip_vit_b_16.yaml"):
        model_zoo.get_config_file("segment/openclip_vit_b.yaml")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, unpacked as pip does, outside the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build writes into its source.
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(source)], check=True)
    # pip builds a wheel from the folder, and installs it.
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_works_outside_the_clone(site, tmp_path):
    assert (site / "spar_d2" / "py.typed").is_file() and (site / "bin" / "spar-d2").is_file()
    assert (site / "spar_d2" / "service" / "page" / "index.html").is_file()
    assert not (site / "benchmarks").exists() and not (site / "tests").exists()
    code = (
        "import json, spar_d2; from spar_d2 import model_zoo; from spar_d2.text import Vocabulary;"
        "cfg = model_zoo.get_config('toy/distill.yaml');"
        "print(json.dumps([spar_d2.__file__, model_zoo.config_folder().as_posix(), len(Vocabulary.load('voc20'))]))"
    )
    # Not the clone that the environment was installed from.
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = [sys.executable, "-W", "ignore", "-P", "-c"]
    done = subprocess.run([*run, code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file, configs, count = json.loads(done.stdout)
    assert Path(file).is_relative_to(site) and Path(configs).is_relative_to(site) and count == 20
