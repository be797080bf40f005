"""Levels of the pyramid for every patch that allows one."""

import json

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

import spar_d2  # noqa: F401  registers
from reference import ROOT


def pyramid(encoder):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SPAR.ENCODER = "cpu", "SPARPyramid", str(encoder)
    cfg.MODEL.SPAR.PYRAMID_CHANNELS = 8
    return build_backbone(cfg).eval()


@pytest.mark.parametrize(
    ("patch", "names"),
    [(8, ["p1", "p2", "p3", "p4", "p5"]), (16, ["p2", "p3", "p4", "p5", "p6"]), (32, ["p3", "p4", "p5", "p6", "p7"])],
)
def test_every_level_is_half_of_the_one_before(patch, names, tmp_path):
    config = json.loads((ROOT / "configs/demo/tiny_clip.json").read_text())
    config["vision_cfg"] |= {"patch_size": patch, "image_size": 2 * patch, "layers": 2}
    path = tmp_path / f"patch-{patch}.json"
    path.write_text(json.dumps(config))
    backbone = pyramid(path)
    levels = backbone(torch.randn(1, 3, 70, 101))
    assert list(levels) == names
    strides = [backbone.output_shape()[name].stride for name in names]
    assert strides == [patch // 4 * 2**level for level in range(5)]
    multiple = backbone.size_divisibility
    padded = [-(-side // multiple) * multiple for side in (70, 101)]
    for name, stride in zip(names, strides):
        assert levels[name].shape == (1, 8, *(-(-side // stride) for side in padded)), name
    assert torch.equal(levels[names[-1]], levels[names[-2]][:, :, ::2, ::2])


@pytest.mark.parametrize("encoder", [ROOT / "configs/demo/tiny_pooled.json", "vit_nano_patch8_dinov3"])
def test_other_families(encoder):
    assert list(pyramid(encoder)(torch.randn(1, 3, 64, 40))) == ["p1", "p2", "p3", "p4", "p5"]
