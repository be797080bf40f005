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


@pytest.mark.processes
@pytest.mark.slow
def test_a_script_and_its_spawned_processes_run_from_its_folder(framework, tmp_path):
    result = launch(["somewhere/framework/train_net.py", "--config-file", "configs/a.yaml"], tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == [
        "arguments --config-file configs/a.yaml",
        f"main its_own_package __main__ none True {framework}",
        f"child its_own_package __mp_main__ none True {framework}",
    ]


@pytest.mark.processes
def test_relative_paths_are_resolved_in_the_current_folder(framework, tmp_path):
    (tmp_path / "mine.yaml").write_text("VERSION: 2\nMODEL:\n  SPAR:\n    TRAINABLE: all\n")
    script = str(framework / "demo.py")
    result = launch([script, "--config-file", "mine.yaml", "--weights=mine.yaml", "KEY", "none"], tmp_path)
    mine = tmp_path / "mine.yaml"
    expected = f"arguments --config-file {mine} --weights={mine} KEY none"
    assert result.stdout.splitlines() == [expected, f"its_own_package all {framework}"]


@pytest.mark.processes
def test_paths_in_arguments_are_resolved(framework, tmp_path):
    """Other values are kept, even if a folder has that name; ambiguous paths are the script's, with a message."""
    (tmp_path / "train").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.yaml").write_text("VERSION: 2\nMODEL:\n  SPAR:\n    TRAINABLE: all\n")
    (tmp_path / "w.pth").touch()
    words = ["--", "configs/a.yaml", "--mode", "train", "train.init=w.pth", ".", "--a=b=c"]
    result = launch([str(framework / "demo.py"), *words], tmp_path)
    weights = tmp_path / "w.pth"
    expected = f"arguments -- configs/a.yaml --mode train train.init={weights} . --a=b=c"
    assert result.stdout.splitlines() == [expected, f"its_own_package none {framework}"]
    assert "configs/a.yaml exists here and beside the script" in result.stderr
    assert f"using {weights}" in result.stderr


@pytest.mark.processes
def test_the_current_folder_can_be_kept(framework, tmp_path):
    result = launch(["--stay", str(framework / "demo.py"), "--config-file", f"{framework}/configs/a.yaml"], tmp_path)
    assert f"its_own_package none {tmp_path}" in result.stdout


TOOL = """
import os
import sys
from pathlib import Path

import helper

print("arguments", *sys.argv[1:])
os.makedirs(sys.argv[2], exist_ok=True)
print(helper.NAME, os.getcwd(), Path("datasets/a.txt").read_text(), Path(sys.argv[1]).read_text())
"""


@pytest.mark.processes
@pytest.mark.parametrize("folder", ["tools", "scripts"])
def test_tools_run_from_where_the_user_stands(tmp_path, folder):
    """Data sets and outputs are here, though the clone has such folders, too; configs are the clone's."""
    clone, here = tmp_path / "clone", tmp_path / "here"
    (clone / folder).mkdir(parents=True)
    (clone / folder / "train_net.py").write_text(TOOL)
    (clone / folder / "helper.py").write_text("NAME = 'its_own_module'")
    for place, content in ((clone, "theirs"), (here, "mine")):
        (place / "datasets").mkdir(parents=True)
        (place / "datasets/a.txt").write_text(content)
    (clone / "configs").mkdir()
    (clone / "configs/a.yaml").write_text("its_config")
    (clone / "output").mkdir()
    result = launch([str(clone / folder / "train_net.py"), "configs/a.yaml", "./output"], here)
    assert result.stdout.splitlines() == [
        f"arguments {clone}/configs/a.yaml ./output",
        f"its_own_module {here} mine its_config",
    ], result.stderr
    assert f"configs/a.yaml does not exist here; using {clone}/configs/a.yaml" in result.stderr
    assert (here / "output").is_dir()


@pytest.mark.processes
def test_modules_are_imported_first_and_in_spawned_processes(framework, tmp_path):
    here = tmp_path / "here"
    (here / "sets").mkdir(parents=True)
    (here / "my_sets.py").write_text("print('my_sets', flush=True)\nVALUE = 'by name'")
    (here / "sets/more_sets.py").write_text("print('more_sets', flush=True)\nVALUE = 'by path'")
    script = framework / "spawns.py"
    script.write_text(
        "import multiprocessing, os, sys\nfrom framework import NAME\n\n"
        "def tell(value):\n"
        "    import my_sets\n"
        "    print(NAME, value, my_sets.VALUE, sys.modules['more_sets'].VALUE, os.getcwd(), flush=True)\n\n"
        "if __name__ == '__main__':\n"
        "    tell('main')\n"
        "    child = multiprocessing.get_context('spawn').Process(target=tell, args=('child',))\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    result = launch(["--import", "my_sets", "--import=sets/more_sets.py", str(script)], here)
    told = [f"its_own_package {who} by name by path {framework}" for who in ("main", "child")]
    assert result.stdout.splitlines() == ["my_sets", "more_sets", told[0], "my_sets", "more_sets", told[1]], (
        result.stderr
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--import", "no_such_sets"], "error: --import: module no_such_sets not found"),
        (["--import", "no_such.sets"], "error: --import: module no_such.sets not found"),
        (["--import", "none.py"], "error: --import: there is no file none.py"),
        *((["--import", name], "error: --import must be a module name") for name in ("", " ", "..a", "a..b", "./a")),
        (["--import", "a"], "error: --import: a is a folder without __init__.py"),
        (["--import", "b.py"], "error: --import: there is no file b.py"),
        (["--import", "a/json.py"], "error: --import: a module with the name of a/json.py is already imported"),
    ],
)
def test_failed_imports_are_named(framework, tmp_path, arguments, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.py").mkdir()
    (tmp_path / "a/json.py").touch()
    result = launch([*arguments, str(framework / "demo.py")], tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.processes
def test_errors_within_a_module_are_its_own(framework, tmp_path):
    (tmp_path / "my_sets.py").write_text("import no_such_package")
    result = launch(["--import", "my_sets", str(framework / "demo.py")], tmp_path)
    assert "ModuleNotFoundError: No module named 'no_such_package'" in result.stderr


@pytest.mark.processes
def test_wrong_use(tmp_path):
    result = launch(["no_such.py"], tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: there is no script no_such.py"
    assert "SCRIPT" in launch(["--help"], tmp_path).stdout
