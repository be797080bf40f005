"""The DINOv3 family against timm."""

import pytest
import timm
import torch

from spar_d2.encoders import DINOv3Encoder, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.weights import write_safetensors

NANO = "vit_nano_patch8_dinov3"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb", NANO])
def test_equals_the_library_at_any_size(name):
    encoder = build_encoder(name)
    p = encoder.patch_size
    with torch.no_grad():
        for parameter in encoder.parameters():
            # Away from the initial zeros and the tiny layer scale, which would hide differences.
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for size in ((2 * p, 3 * p), (64, 64)):
            x = torch.randn(2, 3, *size)
            tokens = encoder.visual.forward_features(x)[:, encoder.visual.num_prefix_tokens :]
            expected = tokens.transpose(1, 2).reshape(2, -1, size[0] // p, size[1] // p)
            torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
            blocks = encoder.visual.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
            for our, their in zip(encoder.intermediates(x, [0, 2]), blocks):
                torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", NANO])
def test_the_description_of_a_model_matches_the_built_model(name):
    info, encoder = describe_encoder(name), build_encoder(name)
    for field in ("native_size", "patch_size", "pixel_mean", "pixel_std", "logit_scale"):
        assert getattr(info, field) == getattr(encoder, field), field


@pytest.mark.slow
def test_satellite_weights_have_their_own_pixel_statistics():
    web = describe_encoder("vit_large_patch16_dinov3", "lvd1689m")
    satellite = describe_encoder("vit_large_patch16_dinov3", "sat493m")
    assert web.pixel_mean == (0.485, 0.456, 0.406) != satellite.pixel_mean


def test_positions_are_not_shifted_in_training():
    encoder = build_encoder(NANO)
    encoder.visual.rope.rescale_coords, encoder.visual.rope.aug_active = 2.0, True
    x = torch.randn(1, 3, 64, 64)
    encoder.train()
    assert encoder.training
    with torch.no_grad():
        assert torch.equal(encoder(x), encoder(x))


def test_no_text_side():
    with pytest.raises(ValueError, match=r"no text tower(?=.*open_clip ViT)(?=.*SigLIP)"):
        build_text_tower(NANO)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_files_of_timm(tmp_path, suffix):
    trunk = timm.create_model(NANO, num_classes=10)
    path = str(tmp_path / f"trunk{suffix or '.pth'}")
    if suffix:
        write_safetensors(trunk.state_dict(), path)
    else:
        torch.save(trunk.state_dict(), path)
    assert torch.equal(build_encoder(NANO, path).visual.blocks[2].mlp.fc1.weight, trunk.blocks[2].mlp.fc1.weight)


def as_meta_stores_it(trunk, biased):
    """Weights of a timm model under the names that Meta's files have."""
    state = {}
    for name, tensor in trunk.state_dict().items():
        name = name.replace("reg_token", "storage_tokens")
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if "_bias" not in name:
            state[name] = tensor
    for index, block in enumerate(trunk.blocks):
        width = block.attn.qkv.in_features
        query, value = torch.full((width,), 0.5 * biased), torch.full((width,), 0.25 * biased)
        state[f"blocks.{index}.attn.qkv.bias"] = torch.cat([query, torch.zeros(width), value])
        state[f"blocks.{index}.attn.qkv.bias_mask"] = torch.ones(3 * width)
    return {**state, "mask_token": torch.zeros(1, trunk.embed_dim), "rope_embed.periods": torch.ones(8)}


@pytest.mark.slow
def test_files_of_meta(tmp_path, capfd):
    plain = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    path = str(tmp_path / "meta.pth")
    torch.save(as_meta_stores_it(plain, biased=False), path)
    encoder = build_encoder("vit_small_patch16_dinov3", path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(encoder.visual.state_dict()[name], tensor), name
    assert not capfd.readouterr().out


@pytest.mark.slow
def test_biases_of_a_file_are_never_dropped(tmp_path):
    path = str(tmp_path / "biased.pth")
    torch.save(as_meta_stores_it(timm.create_model("vit_small_patch16_dinov3", num_classes=0), biased=True), path)
    with pytest.raises(RuntimeError, match="biases.*vit_small_patch16_dinov3_qkvb"):
        build_encoder("vit_small_patch16_dinov3", path)
    block = build_encoder("vit_small_patch16_dinov3_qkvb", path).blocks[3]
    assert block.attn.q_bias.unique().item() == 0.5
    assert block.attn.v_bias.unique().item() == 0.25


@pytest.mark.slow
def test_wrong_tags_and_downloads_that_fail_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a weight file nor a known tag.*lvd1689m"):
        build_encoder("vit_base_patch16_dinov3", "lvd168m")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(RuntimeError, match=r"MODEL\.SPAR\.PRETRAINED: the weights 'lvd1689m'.*no route to host"):
        build_encoder("vit_base_patch16_dinov3", "lvd1689m")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("vit_tiny_patch16_224", "vit_.*_patch16_dinov3"), ("eva02_tiny_patch14_224", "learned position embeddings")],
)
def test_other_models_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        DINOv3Encoder(timm.create_model(name))
