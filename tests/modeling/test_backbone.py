import pytest
import torch
from detectron2.modeling import build_backbone

from spar_d2.encoders import OpenCLIPEncoder
from spar_d2.modeling.pixels import PixelConversion


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    tiny_cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    tiny_cfg.INPUT.FORMAT = "BGR"
    return tiny_cfg


def test_plain_backbone_declares_what_it_gives(cfg):
    backbone = build_backbone(cfg)
    features = backbone(torch.randn(2, 3, 70, 100))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == ["dense"]
    assert features["dense"].shape == (2, shapes["dense"].channels, 5, 7)
    assert shapes["dense"].stride == 16


@pytest.mark.parametrize("size", [(203, 331), (1, 1), (64, 64), (65, 33), (31, 500)])
def test_pyramid_levels_differ_by_exactly_two(cfg, size):
    cfg.MODEL.BACKBONE.NAME = "SPARPyramid"
    cfg.MODEL.SPAR.PYRAMID_CHANNELS = 32
    backbone = build_backbone(cfg).eval()
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == 32
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in features.items():
        assert feature.shape[1] == shapes[name].channels == 32
    for finer, coarser in (("p2", "p3"), ("p3", "p4"), ("p4", "p5")):
        assert features[finer].shape[2:] == tuple(2 * side for side in features[coarser].shape[2:])
        assert shapes[coarser].stride == 2 * shapes[finer].stride
    assert features["p2"].shape[2] == -(-size[0] // 32) * 8


def test_a_pure_swap_sees_the_right_colours(cfg, reference_clip):
    """The encoder gets its own normalisation and RGB, whatever the framework's is."""
    encoder = OpenCLIPEncoder(reference_clip.visual)
    image = torch.randint(0, 256, (3, 64, 64)).float()  # RGB
    own = (image / 255 - torch.tensor(encoder.pixel_mean).view(3, 1, 1)) / torch.tensor(encoder.pixel_std).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder(own[None])
    for order, mean, std in (
        ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
        ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("RGB", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
    ):
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = order, mean, std
        given = image.flip(0) if order == "BGR" else image
        given = (given - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            features = build_backbone(cfg)(given[None])["dense"]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_conversion_can_be_switched_off(cfg, reference_clip):
    cfg.MODEL.SPAR.CONVERT_PIXELS = False
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build_backbone(cfg)(x)["dense"], OpenCLIPEncoder(reference_clip.visual)(x))


def test_what_is_trainable_is_decided_when_the_model_is_built(cfg):
    cfg.MODEL.SPAR.TRAINABLE = "last_blocks:1"
    backbone = build_backbone(cfg)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained
    assert all(".resblocks.2." in name for name in trained)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (([0, 0, 0], [1, 1, 1], "YUV"), r"INPUT\.FORMAT"),
        (([0], [1], "RGB"), r"MODEL\.PIXEL_MEAN"),
        (([0, 0, 0], [1, 1, 0], "RGB"), r"MODEL\.PIXEL_STD"),
    ],
)
def test_wrong_pixels_are_named(arguments, key):
    with pytest.raises(ValueError, match=key):
        PixelConversion(*arguments, (0.5,) * 3, (0.5,) * 3)


def test_a_patch_that_is_no_power_of_two_has_no_pyramid(cfg, tmp_path):
    import json

    vision = {"image_size": 56, "layers": 1, "width": 32, "patch_size": 14, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path / "patch14.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED = str(path), ""
    cfg.MODEL.SPAR.TRAINABLE = "none"
    cfg.MODEL.BACKBONE.NAME = "SPARPyramid"
    with pytest.raises(ValueError, match=r"power of two.*got 14"):
        build_backbone(cfg)
