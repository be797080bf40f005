"""timm's ViTs, alone and as image towers of open_clip, compared with timm's own forward."""

import pytest
import timm
import torch

from reference import ROOT
from spar_d2.encoders import FAMILIES, OpenCLIPTimmEncoder, TimmViTEncoder, build_encoder, describe_encoder
from spar_d2.encoders.registry import find_family, nearest_family

NANO = "vit_nano_patch8_dinov2"
# One model per kind: register tokens, distillation token, no class token, rotary and learned positions, no final norm.
KINDS = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_radio_v3",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch16_rope_ape_224",
    "vit_wee_patch16_reg1_gap_256",
    "eva02_tiny_patch14_224",
]


def moved(encoder, scale=0.02):
    """Move the weights away from initial zeros and tiny layer scales, which would hide differences."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return encoder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_features_equal_those_of_timm_at_the_native_size_and_at_others(name):
    encoder = moved(TimmViTEncoder(timm.create_model(name, num_classes=0, depth=2)))
    side, patch = encoder.native_size, encoder.patch_size
    assert find_family(name).name == "timm ViT"
    info = describe_encoder(name)
    assert (info.native_size, info.patch_size, info.pixel_mean) == (side, patch, encoder.pixel_mean)
    dynamic = timm.create_model(name, num_classes=0, depth=2, dynamic_img_size=True).eval()
    dynamic.load_state_dict(encoder.trunk.state_dict())
    for trunk, size in ((encoder.trunk, (side, side)), (dynamic, (5 * patch, 9 * patch))):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = trunk.forward_features(x)[:, trunk.num_prefix_tokens :]
            found = encoder(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "toy/tiny_eva02.json", NANO])
def test_each_patch_is_read_out_as_if_the_pooling_saw_it_alone(name):
    """timm's own modules give the same, with an attention mask or with sequences of one token."""
    path = str(ROOT / "configs" / name) if name.endswith(".json") else name
    encoder = moved(build_encoder(path, readout="value" if name == NANO else ""))
    trunk, side = encoder.trunk, encoder.native_size
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        found = encoder(x).flatten(2).transpose(1, 2)
        embedded = trunk._pos_embed(trunk.patch_embed(x))
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        rotary = {} if rope is None else {"rope": rope}
        tokens = trunk.norm_pre(tokens)
        for block in trunk.blocks[:-1]:
            tokens = block(tokens, **rotary)
        alone = {} if trunk.global_pool == "map" else {"attn_mask": torch.eye(tokens.shape[1], dtype=torch.bool)}
        tokens = trunk.norm(trunk.blocks[-1](tokens, **rotary, **alone))[:, trunk.num_prefix_tokens :]
        if trunk.global_pool == "map":
            tokens = trunk.attn_pool(tokens.transpose(0, 1))[None]
        if name != NANO:
            tokens = trunk.head(trunk.fc_norm(tokens))
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)
    assert encoder.embed_dim == tokens.shape[-1]


def test_tags_determine_size_and_pixel_statistics():
    assert describe_encoder("vit_base_patch14_dinov2", "lvd142m").native_size == 518
    openai, half = describe_encoder("EVA02-B-16").pixel_mean, describe_encoder("PE-Core-B-16").pixel_mean
    assert openai == pytest.approx((0.481, 0.458, 0.408), abs=1e-3) and half == (0.5, 0.5, 0.5)


def as_meta_stores_it(trunk):
    """Weights of a timm model under the keys of Meta's DINOv2 files."""
    state = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in trunk.state_dict().items()}
    # Meta's files have the position embedding of the class token, which timm adds to the token.
    state["cls_token"] = state["cls_token"] - 0.25
    state["pos_embed"] = torch.cat([torch.full((1, 1, trunk.embed_dim), 0.25), state["pos_embed"]], dim=1)
    return {**state, "mask_token": torch.zeros(1, trunk.embed_dim)}


@pytest.mark.slow
def test_files_of_meta_are_read_as_by_timm(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    trunk = timm.create_model(name, num_classes=0)
    torch.save(as_meta_stores_it(trunk), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    encoder = build_encoder(name, str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    for key, tensor in trunk.state_dict().items():
        torch.testing.assert_close(encoder.trunk.state_dict()[key], tensor, msg=key)


@pytest.mark.parametrize("missing", ["blocks.4.mlp.fc2.bias", "pos_embed", "norm.weight"])
def test_files_with_missing_weights_are_refused(tmp_path, missing):
    state = timm.create_model(NANO, num_classes=0).state_dict()
    del state[missing]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=rf"1 missing keys \(visual\.{missing}\)"):
        build_encoder(NANO, str(tmp_path / "weights.pt"))


@pytest.mark.slow
def test_files_of_other_patches_are_refused_and_not_resampled(tmp_path):
    state = as_meta_stores_it(timm.create_model("vit_small_patch14_dinov2", num_classes=0))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match="does not fit the model"):
        build_encoder("vit_small_patch16_224", str(tmp_path / "weights.pt"))


def test_trunks_of_siglip_and_plain_vits_are_told_apart():
    siglip = timm.create_model("vit_nano_patch8_siglip_64", num_classes=0).state_dict()
    assert nearest_family(siglip).name == "SigLIP"
    assert nearest_family(timm.create_model(NANO, num_classes=0).state_dict()).name == "timm ViT"
    assert nearest_family(timm.create_model("vit_nano_patch8_dinov3", num_classes=0).state_dict()).name == "DINOv3"


def test_the_readout_is_checked():
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*tokens, value.*'pool'"):
        build_encoder(NANO, readout="pool")
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*ViT-B-32"):
        build_encoder("ViT-B-32", readout="value")
    gated = timm.create_model("vit_base_patch16_xp_224", num_classes=0, depth=2)
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*last block"):
        TimmViTEncoder(gated, readout="value")


@pytest.mark.parametrize(
    "trunk", [torch.nn.Identity(), timm.create_model("test_vit", global_pool=""), timm.create_model("test_resnet")]
)
def test_towers_without_known_pooling_are_refused(trunk):
    visual = torch.nn.Module()
    visual.trunk, visual.head = trunk, torch.nn.Identity()
    with pytest.raises(ValueError, match=r"global_pool|VisionTransformer"):
        OpenCLIPTimmEncoder(visual)


def test_every_name_of_the_families_is_claimed_by_its_family():
    for name in ("open_clip timm ViT", "timm ViT"):
        names = FAMILIES[name].names()
        assert len(names) > 10 and all(find_family(model).name == name for model in names[::7])
