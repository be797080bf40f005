"""``python -m spar_d2 SCRIPT``: a framework's own script, unmodified, that knows nothing of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spar_d2

SCRIPT = """
import multiprocessing
import os
import sys

from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY

from framework import NAME


def tell(who, path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    print(who, NAME, __name__, cfg.MODEL.SPAR.TRAINABLE, "SPARPyramid" in BACKBONE_REGISTRY, os.getcwd(), flush=True)


if __name__ == "__main__":
    print("arguments", *sys.argv[1:])
    tell("main", sys.argv[2])
    child = multiprocessing.get_context("spawn").Process(target=tell, args=("child", sys.argv[2]))
    child.start()
    child.join()
    sys.exit(child.exitcode + 3)
"""
# Quick, as it imports no part of Detectron2.
QUICK_SCRIPT = """
import os
import sys
from pathlib import Path

from framework import NAME

print("arguments", *sys.argv[1:])
print(NAME, Path(sys.argv[2]).read_text().split()[-1], os.getcwd())
"""


@pytest.fixture
def framework(tmp_path) -> Path:
    folder = tmp_path / "somewhere" / "framework"
    (folder / "framework").mkdir(parents=True)
    (folder / "framework/__init__.py").write_text("NAME = 'its_own_package'\n")
    (folder / "configs").mkdir()
    (folder / "configs/a.yaml").write_text("VERSION: 2\nMODEL:\n  SPAR:\n    TRAINABLE: none\n")
    (folder / "train_net.py").write_text(SCRIPT)
    (folder / "demo.py").write_text(QUICK_SCRIPT)
    return folder


def launch(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    root = Path(spar_d2.__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-m", "spar_d2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_it_runs_from_its_folder_and_so_do_processes_that_it_spawns(framework, tmp_path):
    result = launch(["somewhere/framework/train_net.py", "--config-file", "configs/a.yaml"], tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == [
        "arguments --config-file configs/a.yaml",
        f"main its_own_package __main__ none True {framework}",
        f"child its_own_package __mp_main__ none True {framework}",
    ]


def test_files_seen_from_here_are_found_from_there(framework, tmp_path):
    (tmp_path / "mine.yaml").write_text("VERSION: 2\nMODEL:\n  SPAR:\n    TRAINABLE: all\n")
    script = str(framework / "demo.py")
    result = launch([script, "--config-file", "mine.yaml", "--weights=mine.yaml", "KEY", "none"], tmp_path)
    mine = tmp_path / "mine.yaml"
    expected = f"arguments --config-file {mine} --weights={mine} KEY none"
    assert result.stdout.splitlines() == [expected, f"its_own_package all {framework}"]


def test_what_it_does_with_arguments(framework, tmp_path):
    """Words that are no paths stay, whatever folders are called; paths in both places are the script's, and told."""
    (tmp_path / "train").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.yaml").write_text("VERSION: 2\nMODEL:\n  SPAR:\n    TRAINABLE: all\n")
    (tmp_path / "w.pth").touch()
    words = ["--", "configs/a.yaml", "--mode", "train", "train.init=w.pth", ".", "--a=b=c"]
    result = launch([str(framework / "demo.py"), *words], tmp_path)
    weights = tmp_path / "w.pth"
    expected = f"arguments -- configs/a.yaml --mode train train.init={weights} . --a=b=c"
    assert result.stdout.splitlines() == [expected, f"its_own_package none {framework}"]
    assert "configs/a.yaml is here and beside the script" in result.stderr
    assert f"{weights} is taken" in result.stderr


def test_it_can_stay(framework, tmp_path):
    result = launch(["--stay", str(framework / "demo.py"), "--config-file", f"{framework}/configs/a.yaml"], tmp_path)
    assert f"its_own_package none {tmp_path}" in result.stdout


def test_wrong_use(tmp_path):
    result = launch(["no_such.py"], tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: there is no script no_such.py"
    assert "SCRIPT" in launch(["--help"], tmp_path).stdout
