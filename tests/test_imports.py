"""Imports of the package in a new process, in any order with Detectron2."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from package_files import PACKAGE, imported_modules, module_name
from processes import fresh_process


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs code in a process that has imported neither Detectron2 nor the package."""
    with fresh_process(tmp_path_factory.mktemp("fresh")) as run:
        yield run


def orders(parts: str) -> list[str]:
    return [f"import spar_d2, {parts}", f"import {parts}, spar_d2"]


def test_import_alone_loads_no_part_of_detectron2_and_no_encoder():
    code = "import spar_d2, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert not {"detectron2.modeling", "detectron2.config", "open_clip", "torch"} & {*result.stdout.split()}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("order", orders("detectron2.modeling, detectron2.config, detectron2.data"))
def test_registers_whether_imported_before_or_after_detectron2(run, order):
    checks = (
        "\nfrom detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY"
        "\nprint('SPARViT' in BACKBONE_REGISTRY, 'SPARPyramid' in BACKBONE_REGISTRY)"
        "\nprint('OpenVocabularySegmentor' in META_ARCH_REGISTRY)"
        "\nprint(detectron2.config.get_cfg().MODEL.SPAR.ENCODER)"
        "\nprint('spar_scenes_val' in detectron2.data.DatasetCatalog)"
    )
    assert run(order + checks).split() == ["True", "True", "True", "ViT-B-16", "True"]


def modules_that_import_detectron2() -> list[str]:
    """Modules that import Detectron2, directly or through others, of the packages that register something."""
    uses = {module_name(path): imported_modules(path) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    uses["spar_d2.config"] = imported_modules(PACKAGE / "config.py")
    reaching = {name for name, used in uses.items() if any(one.split(".")[0] == "detectron2" for one in used)}
    while more := {name for name, used in uses.items() if used & reaching} - reaching:
        reaching |= more
    return sorted(name for name in reaching if name.split(".")[1] in ("config", "data", "modeling"))


MODULES = modules_that_import_detectron2()


def test_many_modules_import_detectron2():
    assert len(MODULES) > 15


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_each_module_can_be_imported_first(run, module):
    """Importing a part of Detectron2 registers the package, in the middle of the module's own import."""
    assert run(f"import {module}") == ""


@pytest.mark.processes
@pytest.mark.slow
def test_documented_imports_by_old_names_work(run):
    code = "from spar_d2.engine.optimizer import optimizer_params"
    assert run(f"{code}; from spar_d2.data.panoptic_mapper import PanopticMapper") == ""


EVALUATION = """
import os
import numpy as np, torch
os.chdir(FOLDER)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.evaluation.sem_seg_evaluation import load_image_into_numpy_array
class Theirs(SemSegEvaluator):
    pass
DatasetCatalog.register("a", lambda: [dict(file_name="a", sem_seg_file_name="a.png")])
MetadataCatalog.get("a").set(stuff_classes=["x", "y"], ignore_label=255)
for kind in (SemSegEvaluator, Theirs):
    evaluator = kind("a", distributed=False)
    evaluator.reset()
    evaluator.process([dict(file_name="a")], [dict(sem_seg=torch.eye(2)[:, :, None].expand(2, 2, 2))])
    print(round(evaluator.evaluate()["sem_seg"]["pACC"], 6))
print(load_image_into_numpy_array("a.png").tolist(), load_image_into_numpy_array("a.png", True, float).dtype)
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("order", orders("detectron2.evaluation"))
def test_detectron2s_evaluator_and_subclasses_read_labels_with_any_numpy(run, order, tmp_path):
    Image.fromarray(np.array([[0, 1], [1, 255]], dtype=np.uint8)).save(tmp_path / "a.png")
    output = run(f"{order}{EVALUATION.replace('FOLDER', repr(str(tmp_path)))}")
    assert output.splitlines() == ["66.666667", "66.666667", "[[0, 1], [1, 255]] float64"]
