"""LazyConfigs: the same model as by yaml, and their training."""

import argparse

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model

from reference import ROOT
from small_trainers import parameter_settings
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine import lazy
from spar_d2.engine.setup import load_config
from spar_d2.engine.solver import build_optimizer

YAML = ROOT / "configs/panoptic/coco_panoptic_fpn_1x.yaml"
LAZY = YAML.with_suffix(".py")
# Smaller heads and batches, on the drawn scenes.
SMALL = [
    "model.roi_heads.num_classes=8",
    "model.sem_seg_head.num_classes=6",
    "model.sem_seg_head.conv_dims=32",
    "model.backbone.out_channels=32",
    "model.proposal_generator.head.in_channels=32",
    "model.roi_heads.box_head.input_shape.channels=32",
    "model.roi_heads.box_head.fc_dims=[32,32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
    "model.roi_heads.mask_head.input_shape.channels=32",
    "model.roi_heads.mask_head.conv_dims=[32,32]",
    "model.proposal_generator.post_nms_topk=[50,10]",
    "+model.roi_heads.box_predictor.test_topk_per_image=3",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "dataloader.train.dataset.names=spar_scenes_panoptic_train",
    "dataloader.test.dataset.names=spar_scenes_panoptic_tune",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[128]",
    "train.amp.enabled=False",
    "train.log_period=1",
    "train.checkpointer.period=2",
    "train.eval_period=0",
]


@pytest.fixture
def few_scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 6))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 3))


def overrides(tiny_model, *more: str) -> list[str]:
    name, weights = tiny_model
    encoder = "model.backbone.net.encoder"
    return [f"{encoder}.name={name}", f"{encoder}.pretrained={weights}", "train.device=cpu", *more]


@pytest.fixture
def yaml_cfg(tiny_model):
    name, weights = tiny_model
    return load_config(str(YAML), ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", name, "MODEL.SPAR.PRETRAINED", weights])


@pytest.mark.slow
def test_lazy_config_and_yaml_give_the_same_model(tiny_model, yaml_cfg):
    by_yaml = build_model(yaml_cfg).eval()
    by_lazy = instantiate(lazy.load_lazy_config(str(LAZY), overrides(tiny_model)).model).eval()
    state = by_yaml.state_dict()
    assert list(by_lazy.state_dict()) == list(state)
    by_lazy.load_state_dict(state)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (by_yaml, by_lazy)]
    assert trained[0] == trained[1]
    image = {"image": torch.randint(0, 256, (3, 203, 331), dtype=torch.uint8), "height": 203, "width": 331}
    with torch.no_grad():
        first, second = (model([image])[0] for model in (by_yaml, by_lazy))
        features = [model.backbone(torch.ones(1, 3, 70, 90)) for model in (by_yaml, by_lazy)]
    assert torch.equal(first["sem_seg"], second["sem_seg"])
    assert torch.equal(first["panoptic_seg"][0], second["panoptic_seg"][0])
    assert torch.equal(first["instances"].scores, second["instances"].scores)
    assert all(torch.equal(features[0][name], features[1][name]) for name in features[0])


def test_lazy_config_and_yaml_give_the_same_optimizer_and_schedule(tiny_model, yaml_cfg):
    model = build_model(yaml_cfg)
    cfg = lazy.load_lazy_config(str(LAZY), overrides(tiny_model))
    cfg.optimizer.params.model = model
    first, second = build_optimizer(yaml_cfg, model), instantiate(cfg.optimizer)
    assert type(first).__mro__[-3:] == type(second).__mro__[-3:]

    assert parameter_settings(first, model) == parameter_settings(second, model)
    assert cfg.train.max_iter == yaml_cfg.SOLVER.MAX_ITER
    assert cfg.dataloader.train.total_batch_size == yaml_cfg.SOLVER.IMS_PER_BATCH
    assert cfg.dataloader.train.dataset.names == yaml_cfg.DATASETS.TRAIN[0]
    assert cfg.dataloader.test.dataset.names == yaml_cfg.DATASETS.TEST[0]
    edges = cfg.dataloader.train.mapper.augmentations[0].short_edge_length
    assert tuple(edges) == tuple(yaml_cfg.INPUT.MIN_SIZE_TRAIN)


@pytest.mark.slow
@pytest.mark.usefixtures("few_scenes")
def test_training_stops_resumes_and_is_tested(tiny_model, tmp_path):
    def run(**flags) -> dict | None:
        opts = overrides(tiny_model, *SMALL, f"train.output_dir={tmp_path}", f"train.max_iter={flags.pop('steps')}")
        args = argparse.Namespace(config_file=str(LAZY), opts=opts, eval_only=False, resume=False, num_gpus=1)
        for name, value in flags.items():
            setattr(args, name, value)
        return lazy.run(args)

    run(steps=2)
    first = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    run(steps=4, resume=True)
    second = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert second["iteration"] == 3
    changed = {name for name in first["model"] if not torch.equal(first["model"][name], second["model"][name])}
    assert any("resblocks.2." in name for name in changed)
    assert not any("resblocks.0." in name for name in changed)
    scores = run(steps=4, resume=True, eval_only=True)
    assert set(scores) == {"panoptic_seg"}


@pytest.mark.slow
@pytest.mark.usefixtures("few_scenes")
def test_ctrl_c_writes_a_checkpoint(tiny_model, tmp_path, monkeypatch):
    asked = iter([False, True])
    by_user = property(lambda self: next(asked), lambda self, value: None)
    monkeypatch.setattr(lazy.StopOnInterrupt, "requested", by_user, raising=False)
    opts = overrides(tiny_model, *SMALL, f"train.output_dir={tmp_path}", "train.max_iter=9", "train.amp.enabled=True")
    lazy.run(argparse.Namespace(config_file=str(LAZY), opts=opts, eval_only=False, resume=False, num_gpus=1))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert torch.load(tmp_path / "model_0000001.pth", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("model = {}\n", [], r"missing: dataloader"),
        (None, ["train.max_iter", "3"], r"got 'train.max_iter'"),
    ],
)
def test_wrong_use(tmp_path, text, opts, message):
    path = tmp_path / "c.py"
    path.write_text(text or LAZY.read_text())
    with pytest.raises(ValueError, match=message):
        lazy.load_lazy_config(str(path), opts)
    with pytest.raises(FileNotFoundError, match="no file"):
        lazy.load_lazy_config(str(tmp_path / "none.py"), [])
