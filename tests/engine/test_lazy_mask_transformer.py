"""The LazyConfig of a MaskTransformer: the same model, optimizer and schedule as by yaml, and its training."""

import argparse

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from reference import ROOT
from small_trainers import parameter_settings
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine import lazy
from spar_d2.engine.setup import load_config
from spar_d2.engine.solver import build_optimizer

YAML = ROOT / "configs/panoptic/coco_mask_transformer_12ep.yaml"
LAZY = YAML.with_suffix(".py")
LATERALS = "[0,1]"


@pytest.fixture
def yaml_cfg(tiny_model):
    name, weights = tiny_model
    model = ["MODEL.SPAR.ENCODER", name, "MODEL.SPAR.PRETRAINED", weights]
    return load_config(str(YAML), ["MODEL.DEVICE", "cpu", *model, "MODEL.MASK_TRANSFORMER.LATERAL_BLOCKS", LATERALS])


@pytest.fixture
def overrides(tiny_model, yaml_cfg):
    """The tiny encoder in the LazyConfig, with its widths."""
    encoder = build_model(yaml_cfg).backbone.encoder
    net = "model.backbone"
    name, weights = tiny_model
    widths = [encoder.width, encoder.width, encoder.embed_dim]
    head = [f"model.head.widths={widths}", f"model.head.patch_size={encoder.patch_size}", f"model.laterals={LATERALS}"]
    return [f"{net}.encoder.name={name}", f"{net}.encoder.pretrained={weights}", f"{net}.precision=float32", *head]


@pytest.mark.slow
def test_lazy_config_and_yaml_give_the_same_model(overrides, yaml_cfg):
    by_yaml = build_model(yaml_cfg).eval()
    by_lazy = instantiate(lazy.load_lazy_config(str(LAZY), [*overrides, "train.device=cpu"]).model).eval()
    state = by_yaml.state_dict()
    assert list(by_lazy.state_dict()) == list(state)
    by_lazy.load_state_dict(state)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (by_yaml, by_lazy)]
    assert trained[0] == trained[1] and not any("encoder" in name for name in trained[0])
    assert by_yaml.criterion == by_lazy.criterion
    plain = ("things", "stuff", "task", "laterals", "masked_attention", "max_iter", "ignore_label", "outputs")
    for name in (*plain, "object_threshold", "overlap_threshold", "detections", "inference", "windows"):
        assert getattr(by_yaml, name) == getattr(by_lazy, name), name
    for model in (by_yaml, by_lazy):
        model.object_threshold = model.overlap_threshold = 0.0
    image = {"image": torch.randint(0, 256, (3, 71, 103), dtype=torch.uint8), "height": 71, "width": 103}
    with torch.no_grad():
        first, second = (model([image])[0]["panoptic_seg"] for model in (by_yaml, by_lazy))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_lazy_config_and_yaml_give_the_same_optimizer_and_schedule(overrides, yaml_cfg):
    model = build_model(yaml_cfg)
    cfg = lazy.load_lazy_config(str(LAZY), [*overrides, "train.device=cpu"])
    cfg.optimizer.params.model = model
    first, second = build_optimizer(yaml_cfg, model), instantiate(cfg.optimizer)
    assert type(first).__mro__[-3:] == type(second).__mro__[-3:]

    assert parameter_settings(first, model) == parameter_settings(second, model)
    assert cfg.train.max_iter == yaml_cfg.SOLVER.MAX_ITER
    multiplier, scheduler = instantiate(cfg.lr_multiplier), build_lr_scheduler(yaml_cfg, first)
    for step in (0, 1, 700, 1500, 40000, 89999):
        assert multiplier(step / 90000) == pytest.approx(scheduler._multiplier(step / 90000), abs=1e-9)
    train = cfg.dataloader.train
    assert (train.total_batch_size, train.num_workers) == (yaml_cfg.SOLVER.IMS_PER_BATCH, 8)
    assert train.num_workers == yaml_cfg.DATALOADER.NUM_WORKERS
    assert (train.dataset.names, cfg.dataloader.test.dataset.names) == (
        yaml_cfg.DATASETS.TRAIN[0],
        yaml_cfg.DATASETS.TEST[0],
    )
    crop, resize, _ = train.mapper.augmentations
    assert list(crop.crop_size) == list(yaml_cfg.INPUT.CROP.SIZE) and crop.crop_type == yaml_cfg.INPUT.CROP.TYPE
    assert tuple(resize.short_edge_length) == tuple(yaml_cfg.INPUT.MIN_SIZE_TRAIN)
    (tested,) = cfg.dataloader.test.mapper.augmentations
    assert (tested.short_edge_length, tested.max_size) == (yaml_cfg.INPUT.MIN_SIZE_TEST, yaml_cfg.INPUT.MAX_SIZE_TEST)


@pytest.mark.slow
def test_it_is_trained_and_tested(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 6))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 3))
    small = ["model.things=8", "model.stuff=5", "model.classifier.classes=13", "model.head.queries=12"]
    data = ["train.dataset.names=spar_scenes_panoptic_train", "test.dataset.names=spar_scenes_panoptic_tune"]
    data += ["train.total_batch_size=2", "train.num_workers=0", "test.num_workers=0"]
    data += ["train.mapper.augmentations.0.crop_size=[96,96]", "train.mapper.augmentations.1.short_edge_length=[96]"]
    run = ["train.amp.enabled=False", "train.eval_period=0", "train.max_iter=2", "train.device=cpu"]
    opts = [*overrides, *small, *(f"dataloader.{text}" for text in data), *run, f"train.output_dir={tmp_path}"]
    args = argparse.Namespace(config_file=str(LAZY), opts=opts, eval_only=False, resume=False, num_gpus=1)
    lazy.run(args)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1
    args.eval_only = args.resume = True
    assert set(lazy.run(args)) == {"panoptic_seg"}
