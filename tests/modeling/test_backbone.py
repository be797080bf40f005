import pytest
import torch
from detectron2.modeling import build_backbone

from spar_d2.encoders import EncoderSpec, OpenCLIPEncoder
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.pixels import PixelConversion


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    tiny_cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    tiny_cfg.INPUT.FORMAT = "BGR"
    return tiny_cfg


def test_plain_backbone_declares_its_output(cfg):
    backbone = build_backbone(cfg)
    features = backbone(torch.randn(2, 3, 70, 100))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == ["dense"]
    assert features["dense"].shape == (2, shapes["dense"].channels, 5, 7)
    assert shapes["dense"].stride == 16


def test_plain_backbone_pads_like_its_encoder(cfg):
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == 16


def test_plain_backbone_under_another_name(cfg):
    cfg.MODEL.SPAR.OUT_FEATURES = ["dense", "clip_vis_dense"]
    backbone = build_backbone(cfg)
    features = backbone(torch.randn(1, 3, 32, 48))
    assert list(features) == list(backbone.output_shape()) == ["dense", "clip_vis_dense"]
    assert torch.equal(*features.values())


@pytest.mark.parametrize("names", [["p2"], ["dense", "p4"], "dense"])
def test_wrong_output_names_of_the_plain_backbone_are_an_error(cfg, names):
    cfg.MODEL.SPAR.OUT_FEATURES = names
    with pytest.raises(ValueError, match=r"OUT_FEATURES of SPARViT.*clip_vis_dense.*SPARPyramid"):
        build_backbone(cfg)


def test_a_pure_swap_sees_the_right_colors(cfg, reference_clip):
    """The encoder gets RGB in its own normalization, for any normalization of the framework."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SPARViT", "SPARPyramid"])
@pytest.mark.parametrize(("order", "blue"), [("BGR", 0), ("RGB", 2)])
def test_blue_arrives_as_blue(cfg, name, order, blue):
    cfg.MODEL.BACKBONE.NAME, cfg.INPUT.FORMAT = name, order
    backbone = build_backbone(cfg)
    image = torch.zeros(3, 20, 30)
    image[blue] = 255
    seen = []
    encoder = next(module for module in backbone.modules() if isinstance(module, OpenCLIPEncoder))
    encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    backbone(((image - torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)) / 1.0)[None])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std))
    pixels = seen[0][0] * std + mean
    expected = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 20, 30)
    torch.testing.assert_close(pixels[:, :20, :30], expected, rtol=0, atol=1e-5)
    # Padding is the encoder's zero, for any mean of the framework.
    assert not seen[0][..., 20:, :].any()
    assert not seen[0][..., 30:].any()


def test_conversion_can_be_switched_off(cfg, reference_clip):
    cfg.MODEL.SPAR.CONVERT_PIXELS = False
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build_backbone(cfg)(x)["dense"], OpenCLIPEncoder(reference_clip.visual)(x))


def test_trainable_parameters_are_chosen_when_the_model_is_built(cfg):
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


def test_the_order_of_channels_is_never_guessed(tiny_model):
    with pytest.raises(ValueError, match=r"input_format.*INPUT\.FORMAT"):
        SPARViT(EncoderSpec(*tiny_model), pixel_mean=[0, 0, 0])


def test_explicit_arguments_are_those_of_the_config(cfg, tiny_model):
    by_config = build_backbone(cfg)
    explicit = SPARViT(
        EncoderSpec(*tiny_model),
        pixel_mean=[103.53, 116.28, 123.675],
        input_format="BGR",
        trainable="last_blocks:2",
        precision="float32",
    )
    x = 100 * torch.randn(1, 3, 40, 50)
    assert torch.equal(by_config(x)["dense"], explicit(x)["dense"])
    trained = [{name for name, p in b.named_parameters() if p.requires_grad} for b in (by_config, explicit)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("name", ["SPARViT", "SPARPyramid"])
def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(cfg, name):
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SPAR.TRAINABLE = name, "none"
    backbone = build_backbone(cfg).train()
    encoder = next(module for module in backbone.modules() if isinstance(module, OpenCLIPEncoder))
    assert not any(module.training for module in encoder.modules())
    features = backbone(torch.randn(1, 3, 40, 50))
    assert not encoder(torch.randn(1, 3, 32, 32)).requires_grad
    if name == "SPARPyramid":
        sum(level.square().sum() for level in features.values()).backward()
        assert all(p.grad is not None for n, p in backbone.named_parameters() if n.startswith("simfp"))
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(cfg):
    cfg.MODEL.SPAR.TRAINABLE, cfg.MODEL.BACKBONE.NAME = "all", "SPARPyramid"
    x, gradients = torch.randn(1, 3, 40, 50), []
    state = build_backbone(cfg).state_dict()
    for checkpointing in (False, True):
        cfg.MODEL.SPAR.CHECKPOINTING = checkpointing
        backbone = build_backbone(cfg).train()
        backbone.load_state_dict(state)
        sum(level.square().mean() for level in backbone(x).values()).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)
