"""Levels of the pyramid, for every patch and any subset."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import SimpleFeaturePyramid, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver.build import get_default_optimizer_params

import spar_d2  # noqa: F401  registers
from reference import ROOT
from spar_d2.encoders import FAMILIES
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.pyramid import SPARPyramid

SIZES = [(203, 331), (1, 1), (64, 64), (65, 33), (31, 200)]
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128, "res2": 4, "res3": 8, "res4": 16, "res5": 32}


def model_file(folder, patch):
    config = json.loads((ROOT / "configs/toy/tiny_clip.json").read_text())
    config["vision_cfg"] |= {"patch_size": patch, "image_size": 2 * patch, "layers": 2}
    path = folder / f"patch-{patch}.json"
    path.write_text(json.dumps(config))
    return path


def pyramid(encoder, **keys):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SPAR.ENCODER = "cpu", "SPARPyramid", str(encoder)
    for key, value in {"OUT_CHANNELS": 8, **keys}.items():
        cfg.MODEL.SPAR[key] = value
    return build_backbone(cfg).eval()


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_levels_have_their_strides_at_any_size(patch, tmp_path):
    backbone = pyramid(model_file(tmp_path, patch))
    names = ["p2", "p3", "p4", "p5", "p6"]
    shapes = backbone.output_shape()
    assert list(shapes) == names
    assert [shapes[name].stride for name in names] == [4, 8, 16, 32, 64]
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == 64
    for height, width in SIZES:
        with torch.no_grad():
            levels = backbone(torch.randn(1, 3, height, width))
        assert list(levels) == names
        for name, level in levels.items():
            stride = STRIDES[name]
            assert level.shape == (1, 8, math.ceil(height / stride), math.ceil(width / stride)), name


@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 14, 16])
def test_p7_has_a_stride_of_128(patch, tmp_path):
    file = model_file(tmp_path, patch)
    backbone = pyramid(file, OUT_FEATURES=["p3", "p4", "p5", "p6", "p7"])
    assert backbone.output_shape()["p7"].stride == backbone.size_divisibility == 128
    own = pyramid(file, OUT_FEATURES=["p6", "p7"], OUT_CHANNELS=[8, 16])
    for height, width in SIZES:
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            levels, others = backbone(x), own(x)
        side = math.ceil(height / 128), math.ceil(width / 128)
        assert torch.equal(levels["p7"], levels["p6"][:, :, ::2, ::2][..., : side[0], : side[1]])
        assert others["p7"].shape == (1, 16, *side)


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_neighboring_levels_differ_by_exactly_two_where_frameworks_pad(patch, tmp_path):
    backbone = pyramid(model_file(tmp_path, patch))
    with torch.no_grad():
        levels = list(backbone(torch.randn(1, 3, 128, 192)).values())
    for finer, coarser in zip(levels, levels[1:]):
        assert finer.shape[2:] == tuple(2 * side for side in coarser.shape[2:])
    assert torch.equal(levels[-1], levels[-2][:, :, ::2, ::2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "channels"),
    [
        (["res2", "res3", "res4", "res5"], 16),
        (["res2", "res3", "res4", "res5"], [8, 16, 24, 32]),
        (["p3", "p5"], [8, 16]),
        (["p6"], 8),
        (["p7"], 8),
        (["p3", "p4", "p5", "p6", "p7"], [8]),
        (["p7", "p5", "p6"], [8, 16, 8]),
        (["p6", "p7"], [8, 16]),
        (["p2", "p3", "p4", "p5", "p6"], [8, 8, 16, 16, 24]),
        (["p2"], 8),
        (["clip_vis_dense", "res4", "p4", "dense"], [16, 16]),
        (["dense"], 8),
    ],
)
def test_any_subset_in_any_order(names, channels, tmp_path):
    backbone = pyramid(model_file(tmp_path, 16), OUT_FEATURES=names, OUT_CHANNELS=channels)
    shapes = backbone.output_shape()
    levels = [name for name in names if name in STRIDES]
    expected = dict(zip(levels, channels * 9 if isinstance(channels, list) else [channels] * 9))
    width = backbone.net.encoder.embed_dim
    for size in SIZES:
        features = backbone(torch.randn(1, 3, *size))
        assert list(features) == list(shapes) == names
        for name, feature in features.items():
            stride = STRIDES.get(name, 16)
            assert shapes[name].stride == stride
            assert shapes[name].channels == expected.get(name, width)
            assert feature.shape == (1, expected.get(name, width), *(math.ceil(side / stride) for side in size))
    # Nothing is there that no output needs: several processes would wait for its gradients.
    sum(feature.square().sum() for feature in features.values()).backward()
    assert all(p.grad is not None for name, p in backbone.named_parameters() if name.startswith("simfp"))


def test_stages_are_those_of_detectron2(tmp_path):
    ours = pyramid(model_file(tmp_path, 16), OUT_CHANNELS=32)
    top = LastLevelMaxPool()
    theirs = SimpleFeaturePyramid(SPARViT(ours.net.encoder), "dense", 32, (4.0, 2.0, 1.0, 0.5), top_block=top).eval()
    theirs.load_state_dict({key.replace("net.pixels", "pixels"): value for key, value in ours.state_dict().items()})
    own = 100 * torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        expected = theirs(ours.net.pixels(own))
        levels = ours(own)
    assert list(levels) == list(expected)
    for name in levels:
        torch.testing.assert_close(levels[name], expected[name], rtol=1e-4, atol=1e-5)


def test_optimizer_builders_know_its_norms(tmp_path):
    backbone = pyramid(model_file(tmp_path, 16))
    groups = get_default_optimizer_params(backbone, weight_decay=0.1, weight_decay_norm=0.0)
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    norms = {name for name, p in backbone.named_parameters() if name.startswith("simfp") and id(p) in free}
    assert len(norms) == 18  # two in each of four stages, one more in the first, each a weight and a bias
    assert not any(p.ndim > 1 for name, p in backbone.named_parameters() if name in norms)


@pytest.mark.parametrize("patch", [14, 32])
def test_cells_of_other_patches_keep_their_places(patch, tmp_path):
    """A map that is the place of its cells in pixels still is, at a stride of 16."""
    backbone = pyramid(model_file(tmp_path, patch), OUT_FEATURES=["clip_vis_dense"])
    cells = math.ceil(320 / patch)
    centers = (torch.arange(cells) + 0.5) * patch
    dense = torch.stack(torch.meshgrid(centers, centers, indexing="ij"))[None]
    resampled = backbone._resampled(dense, [320, 320])
    expected = (torch.arange(20) + 0.5) * 16
    inner = slice(1, -1)  # at the border there is nothing to interpolate with
    torch.testing.assert_close(resampled[0, 0, inner, 3], expected[inner])
    torch.testing.assert_close(resampled[0, 1, 3, inner], expected[inner])
    assert backbone.output_shape()["clip_vis_dense"].stride == 16


def test_explicit_padding_equals_internal_padding(tmp_path):
    backbone = pyramid(model_file(tmp_path, 16), CONVERT_PIXELS=False)
    x = torch.randn(1, 3, 70, 100)
    with torch.no_grad():
        whole = backbone(F.pad(x, (0, 28, 0, 58)))
        for name, level in backbone(x).items():
            assert torch.equal(level, whole[name][..., : level.shape[2], : level.shape[3]]), name


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.example()], ids=lambda f: f.name)
def test_every_family(family):
    encoder = family.example()
    backbone = SPARPyramid(SPARViT(encoder), ["res2", "p6", "dense"], 8).eval()
    features = backbone(torch.randn(1, 3, 70, 45))
    assert features["res2"].shape == (1, 8, 18, 12)
    assert features["p6"].shape == (1, 8, 2, 1)
    assert features["dense"].shape == (1, encoder.embed_dim, *encoder.grid(70, 45))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OUT_FEATURES": ["p1"]}, r"OUT_FEATURES.*p2, p3.*res5, dense, clip_vis_dense; got \['p1'\]"),
        ({"OUT_FEATURES": "p2"}, r"OUT_FEATURES.*must be a list"),
        ({"OUT_FEATURES": ["p2", "p2"]}, r"OUT_FEATURES.*every level once"),
        ({"OUT_CHANNELS": 0}, r"OUT_CHANNELS.*at least 1, got 0"),
        ({"OUT_CHANNELS": [8, 8]}, r"OUT_CHANNELS.*one for each level \(p2, p3, p4, p5, p6\); got \[8, 8\]"),
        ({"OUT_CHANNELS": 3.5}, r"OUT_CHANNELS.*one number, or one for each level; got 3.5"),
        ({"OUT_CHANNELS": True}, r"OUT_CHANNELS.*got True"),
        ({"OUT_FEATURES": ["p2", "res2"], "OUT_CHANNELS": [8, 9]}, r"OUT_CHANNELS.*res2 occurs twice"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        pyramid("vit_nano_patch8_dinov3", **keys)
