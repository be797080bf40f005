"""FC-CLIP's requirements of a backbone, compared with open_clip."""

import copy
import math
import pickle
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model

from spar_d2.encoders import EncoderSpec
from spar_d2.modeling.backbone import SPARViT

TEXTS = ["a photo of a cat.", "This is a photo of a small dog.", "sky"]


@pytest.fixture(params=["SPARViT", "SPARPyramid"])
def backbone(request, tiny_cfg):
    tiny_cfg.MODEL.BACKBONE.NAME = request.param
    tiny_cfg.MODEL.SPAR.OUT_FEATURES = ["clip_vis_dense"]
    return build_backbone(tiny_cfg)


def test_vectors_are_the_models_own(backbone, reference_clip):
    vectors = backbone.get_text_classifier(TEXTS, "cpu")
    with torch.no_grad():
        expected = reference_clip.encode_text(open_clip.get_tokenizer("ViT-B-16")(TEXTS))
    assert vectors.shape == (3, backbone.dim_latent)
    assert not vectors.requires_grad
    torch.testing.assert_close(vectors, expected)
    assert not torch.allclose(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("texts", ["cat", [], [3]])
def test_texts_are_a_list(backbone, texts):
    with pytest.raises(ValueError, match="text_list"):
        backbone.get_text_classifier(texts, "cpu")


@pytest.mark.slow
def test_logit_scale_is_the_models_own(backbone, reference_clip):
    torch.testing.assert_close(backbone.clip_model.logit_scale, reference_clip.logit_scale.detach())


@pytest.mark.slow
def test_the_text_tower_is_none_of_the_backbones(backbone):
    names = set(backbone.state_dict())
    count = sum(1 for _ in backbone.parameters())
    backbone.get_text_classifier(TEXTS, "cpu")
    assert set(backbone.state_dict()) == names
    assert sum(1 for _ in backbone.parameters()) == count


@pytest.mark.slow
def test_masks_are_pooled_as_fc_clip_asks(backbone):
    """By its two ways: it pools over the map itself and asks for the rest, or hands over map and masks."""
    assert "convnext" in backbone.model_name.lower()
    dense = backbone(torch.randn(1, 3, 64, 96))["clip_vis_dense"]
    masks = torch.randn(1, 5, *dense.shape[2:])
    masks[0, 4] = -1
    inside = (masks > 0).float()
    pooled = torch.stack([(dense[0] * mask).sum((1, 2)) / mask.sum().clamp(min=1) for mask in inside[0]])[None]
    assert torch.equal(backbone.visual_prediction_forward(pooled), pooled)
    torch.testing.assert_close(backbone.visual_prediction_forward(dense, masks), pooled)
    vectors = F.normalize(backbone.get_text_classifier(TEXTS, "cpu"), dim=-1)
    logits = backbone.clip_model.logit_scale.exp() * F.normalize(pooled, dim=-1) @ vectors.T
    assert logits.shape == (1, 5, 3)
    assert logits.isfinite().all()


def test_without_text_side():
    backbone = SPARViT(EncoderSpec("vit_nano_patch8_dinov3"))
    assert backbone.dim_latent == backbone.encoder.embed_dim
    with pytest.raises(ValueError, match="no text tower"):
        backbone.get_text_classifier(TEXTS, "cpu")
    with pytest.raises(ValueError, match="EncoderSpec"):
        SPARViT(backbone.encoder).get_text_classifier(TEXTS, "cpu")
    assert math.isfinite(backbone.dim_latent)
    for one in (backbone, SPARViT(backbone.encoder)):
        # Introspection may ask for missing attributes; real use is an error with a reason.
        assert not hasattr(one, "clip_model")
        with pytest.raises(AttributeError, match="no text tower|EncoderSpec"):
            one.clip_model  # noqa: B018


def test_asking_whether_there_is_a_clip_model_builds_no_text_tower(backbone):
    assert hasattr(backbone, "clip_model")
    assert backbone.text_side._tower is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (70, 100)], ids=str)
@pytest.mark.parametrize("spec", [EncoderSpec("vit_nano_patch8_dinov3"), None])
def test_a_backbone_can_be_traced(spec, size, tiny_model):
    backbone = SPARViT(spec or EncoderSpec(*tiny_model)).eval()
    x = torch.randn(1, 3, *size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(backbone, x, strict=False)
        torch.testing.assert_close(traced(x)["dense"], backbone(x)["dense"])


def test_a_segmentor_with_its_text_side_can_be_pickled_and_copied(tiny_cfg):
    tiny_cfg.MODEL.SPAR.VOCABULARY = "cat; dog"
    model = build_model(tiny_cfg).eval()
    record = [{"image": torch.zeros(3, 40, 50, dtype=torch.uint8), "height": 40, "width": 50}]
    model.backbone.get_text_classifier(TEXTS, "cpu")
    with torch.no_grad():
        expected = model(record)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert str(again(record)) == str(expected)
            assert again.backbone.text_side.encoder is again.backbone.encoder
            assert again.backbone.get_text_classifier(TEXTS, "cpu").shape == (3, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SPARViT", "SPARPyramid"])
def test_fc_clips_width_must_be_the_encoders(tiny_cfg, name):
    tiny_cfg.MODEL.BACKBONE.NAME = name
    tiny_cfg.MODEL.SPAR.OUT_FEATURES = ["clip_vis_dense"]
    tiny_cfg.MODEL.FC_CLIP = CfgNode({"EMBED_DIM": 768})
    with pytest.raises(ValueError, match=r"MODEL\.FC_CLIP\.EMBED_DIM .*64.*got 768"):
        build_backbone(tiny_cfg)
    tiny_cfg.MODEL.FC_CLIP.EMBED_DIM = 64
    with pytest.raises(ValueError, match=r"64 channels of .*got 768; MODEL\.FC_CLIP\.EMBED_DIM .*64"):
        build_backbone(tiny_cfg).visual_prediction_forward(torch.zeros(1, 5, 768))
