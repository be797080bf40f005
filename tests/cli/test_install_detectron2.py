"""The installer, with a small wheel in place of the real one."""

import hashlib
import subprocess
import sys
import zipfile
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from reference import ROOT

TOOL = ROOT / "tools" / "install_detectron2.py"

# The function of Detectron2 0.6 that does not work with NumPy 2, in its own words where they matter.
READS_PIXELS = """
import numpy as np
from PIL import Image

def load(filename, copy=False, dtype=None):
    with open(filename, "rb") as f:
        return np.array(Image.open(f), copy=copy, dtype=dtype)
"""


@pytest.fixture
def installer():
    return import_module("spar_d2.cli.install_detectron2")


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/detectron2/__init__.py", "from LabGym.detectron2.a import X\n__version__ = '0.6'\n")
        archive.writestr("LabGym/detectron2/a.py", "X = 1\n")
        archive.writestr("LabGym/detectron2/model_zoo/configs/c.yaml", "A: 1\n")
        archive.writestr("LabGym/detectron2/evaluation/sem_seg_evaluation.py", READS_PIXELS)
        archive.writestr("LabGym/other.py", "raise SystemExit\n")
        archive.writestr("labgym-3.1.2.dist-info/METADATA", "Name: LabGym\n")
    return path


@pytest.mark.processes
@pytest.mark.slow
def test_an_installed_detectron2_is_kept():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=True)
    assert "nothing to do" in done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_repacked_wheel_installs_shows_and_uninstalls(installer, wheel, tmp_path):
    packed = installer.repack(wheel, tmp_path)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, packed], check=True)
    names = {path.name for path in site.iterdir()}
    assert names == {"detectron2", f"detectron2-{installer.VERSION}.dist-info"}
    assert (site / "detectron2" / "__init__.py").read_text().startswith("from detectron2.a import X")
    assert (site / "detectron2" / "model_zoo" / "configs" / "c.yaml").is_file()
    notice = (site / f"detectron2-{installer.VERSION}.dist-info" / "NOTICE").read_text()
    assert "Apache License, Version 2.0" in notice
    listed = subprocess.run([*pip, "list", "--path", site], capture_output=True, text=True, check=True).stdout
    assert f"detectron2 {installer.VERSION}" in " ".join(listed.split())


def test_another_file_under_the_wheels_name_is_refused(installer, wheel, capsys):
    assert not installer.install_from_wheel(wheel)
    output = capsys.readouterr().out
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in output
    assert installer.WHEEL_SHA256 in output


def test_a_missing_wheel_file_is_named(installer, tmp_path, capsys):
    assert not installer.install_from_wheel(tmp_path / "none.whl")
    assert "there is no file" in capsys.readouterr().out


def test_its_evaluator_reads_labels_with_any_numpy(installer, wheel, tmp_path):
    with zipfile.ZipFile(installer.repack(wheel, tmp_path)) as archive:
        names = {}
        exec(archive.read("detectron2/evaluation/sem_seg_evaluation.py"), names)
        notice = archive.read(f"detectron2-{installer.VERSION}.dist-info/NOTICE").decode()
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "a.png")
    for copy in (False, True):
        assert np.array_equal(names["load"](tmp_path / "a.png", copy=copy, dtype=int), labels)
    assert "copy=copy or None" in notice


def test_prebuilt_wheels_are_chosen_by_pytorch_and_python(installer):
    tag = installer._PYTHON_TAG
    page = "".join(
        f'<a href="https://example.org/detectron2-0.6%2B{commit}{build}-{python}-{python}-linux_x86_64.whl">wheel</a>'
        for commit, build, python in (
            ("2a420ed", "pt2.3.0cpu", tag),
            ("fd27788", "pt2.3.0cpu", tag),
            ("fd27788", "pt2.3.0cu121", tag),
            ("fd27788", "pt2.4.0cpu", "cp27"),
        )
    )
    assert installer.prebuilt_version(page, "pt2.3.0cpu") == "0.6+fd27788pt2.3.0cpu"
    assert installer.prebuilt_version(page, "pt2.3.0cu121") == "0.6+fd27788pt2.3.0cu121"
    assert installer.prebuilt_version(page, "pt2.4.0cpu") == ""
