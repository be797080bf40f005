"""The packages and what each may import."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from processes import run_fresh

PACKAGE = Path(__file__).resolve().parents[1] / "spar_d2"
# A package imports only packages of lower layers, and itself.
LAYERS = [
    {"utils"},
    {"toy", "config"},
    {"encoders", "text", "data", "evaluation", "visualization"},
    {"teacher"},
    {"modeling"},
    {"predict", "distillation"},
    {"checkpoint"},
    {"comparison"},
    {"engine"},
    {"probing"},
    {"demo"},
    {"cli"},
]
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
# They register all of it with Detectron2, and start scripts that know nothing of it.
OUTSIDE = ("__init__", "__main__", "deprecated", "launcher", "model_zoo", "registration", "user_modules")
# What plain PyTorch users rely on must not need Detectron2.
WITHOUT_DETECTRON2 = [
    "utils/environment.py",
    "utils/errors.py",
    "utils/id_maps.py",
    "utils/images.py",
    "utils/io.py",
    "utils/label_values.py",
    "utils/yaml_files.py",
    "utils/panoptic_numbers.py",
    "utils/transfer.py",
    "cli/__init__.py",
    "cli/__main__.py",
    "cli/benchmark.py",
    "cli/convert.py",
    "cli/doctor.py",
    "cli/install_detectron2.py",
    "cli/prepare.py",
    "toy",
    "encoders",
    "text",
    "teacher",
    "visualization/__init__.py",
    "visualization/fonts.py",
    "visualization/legend.py",
    "visualization/palette.py",
    "visualization/panels.py",
    "visualization/pca.py",
    "visualization/placement.py",
    "data/datasets/catalog.py",
    "data/datasets/class_names.py",
    "data/datasets/colors.py",
    "data/datasets/dataset_file.py",
    "data/datasets/file_check.py",
    "data/datasets/file_records.py",
    "data/images.py",
    "data/preparation",
    "data/sources.py",
    "evaluation/__init__.py",
    "evaluation/confusion_matrix.py",
    "evaluation/panoptic/__init__.py",
    "evaluation/panoptic/__main__.py",
    "evaluation/panoptic/coco_json.py",
    "evaluation/panoptic/coco_png.py",
    "evaluation/panoptic/outputs.py",
    "evaluation/panoptic/quality.py",
    "evaluation/panoptic/scores.py",
    "modeling/banded_upsampling.py",
    "modeling/best_query.py",
    "modeling/best_query_triton.py",
    "modeling/pixels.py",
    "modeling/postprocessing.py",
    "modeling/words.py",
    "predict.py",
]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if package_of(path) not in OUTSIDE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    package = package_of(path)
    for module in imported_modules(path):
        if module.startswith("spar_d2."):
            used = module.split(".")[1]
            if used in OUTSIDE:
                continue
            assert used == package or LAYER_OF[used] < LAYER_OF[package], f"{path} imports {module}"


@pytest.mark.parametrize("place", WITHOUT_DETECTRON2)
def test_plain_parts_do_not_import_detectron2(place):
    target = PACKAGE / place
    for path in [target] if target.is_file() else target.glob("*.py"):
        assert not any(module.split(".")[0] == "detectron2" for module in imported_modules(path)), path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_alone_loads_no_part_of_detectron2_and_no_encoder():
    loaded = run("import spar_d2, sys; print(*sys.modules)").split()
    assert not {"detectron2.modeling", "detectron2.config", "open_clip", "torch"} & set(loaded)


@pytest.mark.processes
@pytest.mark.slow
def test_registers_whether_imported_before_or_after_detectron2(tmp_path):
    checks = (
        "\nfrom detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY"
        "\nprint('SPARViT' in BACKBONE_REGISTRY, 'SPARPyramid' in BACKBONE_REGISTRY)"
        "\nprint('OpenVocabularySegmentor' in META_ARCH_REGISTRY)"
        "\nprint(detectron2.config.get_cfg().MODEL.SPAR.ENCODER)"
        "\nprint('spar_scenes_val' in detectron2.data.DatasetCatalog)"
    )
    parts = "detectron2.modeling, detectron2.config, detectron2.data"
    codes = [f"import {order}{checks}" for order in (f"spar_d2, {parts}", f"{parts}, spar_d2")]
    for output in run_fresh(codes, tmp_path):
        assert output.split() == ["True", "True", "True", "ViT-B-16", "True"]


def modules_that_import_detectron2() -> list[str]:
    """Of the parts that register: those that import it, or a module of ours that does, and so on."""
    uses = {name_of(path): imported_modules(path) for path in FILES}
    reaching = {name for name, used in uses.items() if any(one.split(".")[0] == "detectron2" for one in used)}
    while more := {name for name, used in uses.items() if used & reaching} - reaching:
        reaching |= more
    return sorted(name for name in reaching if name.split(".")[1] in ("config", "data", "modeling"))


def name_of(path: Path) -> str:
    return ".".join(("spar_d2", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.processes
@pytest.mark.slow
def test_what_registers_can_be_imported_first(tmp_path):
    """Importing a part of Detectron2 registers, in the middle of whatever imports it."""
    modules = modules_that_import_detectron2()
    assert len(modules) > 15
    outputs = run_fresh([f"import {module}" for module in modules], tmp_path)
    assert dict(zip(modules, outputs)) == dict.fromkeys(modules, "")


@pytest.mark.parametrize("package", sorted(name_of(path) for path in PACKAGE.rglob("__init__.py")))
def test_all_that_a_package_names_is_there(package):
    module = importlib.import_module(package.removesuffix(".__init__"))
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []
