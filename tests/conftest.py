"""Shared fixtures: the model of the reference numbers, a config for it, and photos."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Models are so small that threads wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Imported where it is used: the process that only hands out tests to others reads this file, too.
if TYPE_CHECKING:
    import open_clip


@pytest.fixture(scope="session", autouse=True)
def separate_cache(tmp_path_factory) -> None:
    """Tests, and processes that they start, neither read nor change the user's cache."""
    os.environ["SPAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Remove log handlers of commands, whose streams end with the test."""
    loggers = [logging.getLogger(name) for name in ("spar_d2", "detectron2", "fvcore")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def repeated_warnings() -> None:
    """Warnings that are given once per process are given again in every test."""
    for name in ("spar_d2.text.vocabulary", "spar_d2.evaluation.semantic_evaluator"):
        if name in sys.modules:
            sys.modules[name]._WARNED.clear()


@pytest.fixture(scope="session")
def reference_clip() -> open_clip.CLIP:
    """The tiny CLIP of the reference numbers; tests must not change it."""
    import open_clip

    from reference import TINY_CONFIG, fill_with_reference

    model = open_clip.CLIP(**TINY_CONFIG).eval()
    return fill_with_reference(model)


@pytest.fixture(scope="session")
def reference_weights(reference_clip, tmp_path_factory) -> Path:
    """The tiny CLIP's weights as a file; tests must not change it."""
    from spar_d2.encoders.weights import write_safetensors

    path = tmp_path_factory.mktemp("reference") / "weights.safetensors"
    write_safetensors(reference_clip.state_dict(), path)
    return path


@pytest.fixture
def tiny_model(tmp_path, reference_weights) -> tuple[str, str]:
    """The tiny CLIP as files: (model config, weights)."""
    from reference import TINY_CONFIG

    config = tmp_path / "reference-tiny.json"
    config.write_text(json.dumps(TINY_CONFIG))
    return str(config), shutil.copy(reference_weights, tmp_path)


@pytest.fixture
def tiny_cfg(tiny_model, tmp_path):
    """Config of a segmentor with the tiny CLIP on the CPU, for distillation at small sizes."""
    from reference import ROOT
    from spar_d2.engine.setup import load_config

    cfg = load_config(str(ROOT / "configs/distill/Base-distill.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED = tiny_model
    cfg.MODEL.SPAR.TEMPLATES = "simple"
    cfg.SPAR.DATA.SCALE_BOX = (192, 96)
    cfg.SPAR.DATA.MIN_SHORT_SIDE = 64
    cfg.SPAR.DATA.CROP_MIN_SIDE = 48
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.fixture
def photo_folder(tmp_path) -> Path:
    """Three JPEGs of different sizes, one in a sub-folder."""
    from PIL import Image

    from reference import reference_image

    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, (name, height, width) in enumerate((("a.jpg", 70, 100), ("b.JPG", 128, 96), ("more/c.jpeg", 90, 90))):
        Image.fromarray(reference_image(height, width, index)).save(folder / name)
    return folder


@pytest.fixture
def photo_cfg(tiny_cfg, photo_folder):
    """Config of a short distillation on those photos, two a step and two windows of each."""
    tiny_cfg.SPAR.DATA.IMAGES = str(photo_folder)
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 2
    tiny_cfg.SOLVER.MAX_ITER = 4
    tiny_cfg.SOLVER.IMS_PER_BATCH = 2
    tiny_cfg.SOLVER.BASE_LR = 1e-3
    Path(tiny_cfg.OUTPUT_DIR).mkdir()
    return tiny_cfg


@pytest.fixture
def panoptic_cfg(tiny_model):
    """Detectron2's own PanopticFPN over the tiny CLIP, on the CPU."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"))
    cfg.MODEL.BACKBONE.NAME = "SPARPyramid"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED = tiny_model
    return cfg
