"""Distill and evaluate with every family, from nothing but a config."""

import logging
import math
import os

import numpy as np
import open_clip
import pytest
import timm
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from reference import ROOT, STAND_IN, reference_image
from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.encoders import FAMILIES
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import STUDENT_FILE, Trainer

# Further keys, by family.
KEYS = {
    "open_clip ViT": ("MODEL.SPAR.PRETRAINED", str(ROOT / "configs/toy/tiny_clip.safetensors")),
    "DINOv3.txt": ("MODEL.SPAR.DINOV3_REPO", str(STAND_IN)),
}


@pytest.fixture
def labeled(tmp_path):
    """Two photos with labels, as a registered data set."""
    records = []
    for index in range(2):
        image, labels = tmp_path / f"test{index}.png", tmp_path / f"labels{index}.png"
        Image.fromarray(reference_image(70, 100, index)).save(image)
        Image.fromarray(np.random.default_rng(index).integers(0, 2, (70, 100)).astype(np.uint8)).save(labels)
        records.append({"file_name": str(image), "sem_seg_file_name": str(labels), "height": 70, "width": 100})
    name = f"labeled_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=["cat", "dog"], ignore_label=255, evaluator_type="sem_seg")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def config(family, tmp_path, photos, test, *more):
    model = FAMILIES[family].toy or FAMILIES[family].names()[0]
    encoder = str(ROOT / "configs" / model) if model.endswith(".json") else model
    output = "labels" if FAMILIES[family].has_text else "features"
    overrides = ["MODEL.SPAR.PRETRAINED", "", "MODEL.SPAR.ENCODER", encoder, *KEYS.get(family, ())]
    overrides += ["MODEL.SPAR.OUTPUT", output, "SPAR.DATA.IMAGES", str(photos)]
    overrides += ["OUTPUT_DIR", str(tmp_path / "output"), "DATASETS.TEST", (test,), "SOLVER.MAX_ITER", 3]
    overrides += ["SPAR.TEACHER.WINDOW", 64, "SPAR.DATA.SIDE_MULTIPLE", 16]
    cfg = load_config(str(ROOT / "configs/toy/distill.yaml"), [*overrides, *more])
    os.makedirs(cfg.OUTPUT_DIR)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_distill_then_evaluate(family, tmp_path, photo_folder, labeled):
    cfg = config(family, tmp_path, photo_folder, labeled)
    trainer = Trainer(cfg)
    trainer.train()
    ((task, values),) = trainer._last_eval_results.items()
    assert task == ("features" if not FAMILIES[family].has_text else "sem_seg")
    assert all(math.isfinite(value) for name, value in values.items() if name in ("mIoU", "cosine", "mse"))
    student = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
    # The student goes into a new model both ways, and evaluates to the same.
    weights, pretrained = build_model(cfg).eval(), cfg.clone()
    Checkpointer(weights).load(student)
    assert Trainer.test(cfg, weights)[task] == pytest.approx(values, nan_ok=True)
    pretrained.MODEL.SPAR.PRETRAINED = student
    for key, tensor in build_model(pretrained).state_dict().items():
        assert torch.equal(tensor, weights.state_dict()[key]), key


@pytest.mark.slow
def test_students_are_files_of_their_libraries(tmp_path, photo_folder, labeled):
    siglip = config("SigLIP", tmp_path / "a", photo_folder, labeled, "DATASETS.TEST", ())
    dinov3 = config("DINOv3", tmp_path / "b", photo_folder, labeled, "DATASETS.TEST", ())
    for cfg in (siglip, dinov3):
        Trainer(cfg).train()
    open_clip.add_model_config(siglip.MODEL.SPAR.ENCODER)
    open_clip.create_model("tiny_pooled", pretrained=os.path.join(siglip.OUTPUT_DIR, STUDENT_FILE))
    path = os.path.join(dinov3.OUTPUT_DIR, STUDENT_FILE)
    timm.create_model(dinov3.MODEL.SPAR.ENCODER, num_classes=0, checkpoint_path=path)


def test_class_names_without_a_text_tower_are_an_error(tmp_path, photo_folder, labeled):
    cfg = config("DINOv3", tmp_path, photo_folder, labeled, "MODEL.SPAR.OUTPUT", "labels")
    with pytest.raises(ValueError, match=r"no text tower, so it cannot segment by class names; .*SigLIP"):
        build_model(cfg)
    cfg.DATASETS.TEST = ()
    model = build_model(cfg).eval()
    with pytest.raises(RuntimeError, match="no classes to segment"):
        model([{"image": torch.zeros(3, 64, 64)}])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["PRECISION", "COMPILE", "CHECKPOINTING"])
def test_settings_of_computation_reach_student_and_teacher(key, tmp_path, photo_folder, labeled):
    from spar_d2.distillation import DistillationHook
    from spar_d2.encoders import find_encoder

    value = "bfloat16" if key == "PRECISION" else True
    cfg = config("open_clip ViT", tmp_path, photo_folder, labeled, f"MODEL.SPAR.{key}", value)
    encoders = [find_encoder(build_model(cfg))]
    if key != "CHECKPOINTING":  # a teacher keeps nothing for a gradient
        encoders.append(DistillationHook(cfg).teacher.encoder)
    for encoder in encoders:
        wanted = {"PRECISION": torch.bfloat16}.get(key, True)
        assert {"PRECISION": encoder._precision, "COMPILE": encoder._compile, "CHECKPOINTING": encoder._checkpointing}[
            key
        ] == wanted


def test_the_teachers_precision_can_differ(tmp_path, photo_folder, labeled):
    from spar_d2.modeling.build import teacher_from_config

    cfg = config("open_clip ViT", tmp_path, photo_folder, labeled)
    assert teacher_from_config(cfg).encoder._precision is None
    cfg.SOLVER.AMP.ENABLED = True
    assert teacher_from_config(cfg).encoder._precision is torch.float16
    cfg.SPAR.TEACHER.PRECISION = "bfloat16"
    assert teacher_from_config(cfg).encoder._precision is torch.bfloat16
    cfg.SPAR.TEACHER.PRECISION = "half"
    with pytest.raises(ValueError, match=r'SPAR\.TEACHER\.PRECISION .*"" or one of float32.*half'):
        teacher_from_config(cfg)


@pytest.mark.slow
def test_trainable_tensors_are_listed_once(tmp_path, photo_folder, labeled, caplog):
    cfg = config("SigLIP", tmp_path, photo_folder, labeled, "MODEL.SPAR.TRAINABLE", "attn_pool_kv,qkv_-1")
    with caplog.at_level(logging.INFO, "spar_d2"):
        Trainer(cfg).train()
    assert caplog.text.count("visual.trunk.attn_pool.kv.weight") == 1
    assert caplog.text.count("visual.trunk.blocks.4.attn.qkv.weight") == 1
