"""The packages and their allowed imports."""

import importlib
from pathlib import Path

import pytest

from package_files import PACKAGE, imported_modules, module_name

# A package imports only packages of lower layers, and itself.
LAYERS = [
    {"utils"},
    {"toy", "config"},
    {"encoders", "text", "data", "evaluation", "visualization"},
    {"refine", "export", "results"},
    {"teacher"},
    {"modeling"},
    {"predict", "distillation"},
    {"checkpoint"},
    {"comparison"},
    {"engine"},
    {"probing"},
    {"demo", "service"},
    {"cli"},
]
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
# These register everything with Detectron2, and start scripts of others.
OUTSIDE = ("__init__", "__main__", "deprecated", "launcher", "model_zoo", "registration", "user_modules")
# Parts for users of plain PyTorch, which must not need Detectron2.
WITHOUT_DETECTRON2 = [
    "utils/content_cache.py",
    "utils/environment.py",
    "utils/errors.py",
    "utils/id_maps.py",
    "utils/images.py",
    "utils/io.py",
    "utils/label_values.py",
    "utils/yaml_files.py",
    "utils/panoptic_numbers.py",
    "utils/tables.py",
    "utils/transfer.py",
    "cli/__init__.py",
    "cli/__main__.py",
    "cli/benchmark.py",
    "cli/convert.py",
    "cli/doctor.py",
    "cli/export.py",
    "cli/install_detectron2.py",
    "cli/prepare.py",
    "cli/serve.py",
    "cli/web.py",
    "toy",
    "encoders",
    "export",
    "text",
    "refine",
    "results",
    "service",
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
    "data/image_arguments.py",
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
    "modeling/image_segmentor.py",
    "modeling/model_settings.py",
    "modeling/pixel_scores.py",
    "modeling/pixels.py",
    "modeling/postprocessing.py",
    "modeling/refinement.py",
    "modeling/words.py",
    "predict.py",
]


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


@pytest.mark.parametrize("package", sorted(module_name(path) for path in PACKAGE.rglob("__init__.py")))
def test_all_public_names_of_a_package_exist(package):
    module = importlib.import_module(package)
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []
