"""The SigLIP family against timm and open_clip."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from reference import ROOT, reference_encoder
from spar_d2.encoders import SigLIPEncoder, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.weights import write_safetensors

TINY = str(ROOT / "configs/toy/tiny_pooled.json")


@pytest.fixture(scope="module")
def encoder():
    return reference_encoder("siglip-tiny")


def test_all_blocks_equal_the_librarys_at_native_size(encoder):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = encoder.intermediates(x, [0, 1, 2])
        theirs = encoder.visual.trunk.forward_intermediates(x, intermediates_only=True)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_value_path_is_the_librarys_pooling_of_each_patch_alone(encoder):
    """Over a single token the pooling's attention is the identity, so that the library itself gives the value path."""
    x = torch.randn(2, 3, 64, 64)
    trunk = encoder.visual.trunk
    with torch.no_grad():
        tokens = trunk.forward_features(x)
        alone = trunk.attn_pool(tokens.reshape(-1, 1, 96)).reshape(2, 4, 4, 96).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(x), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 7), (2, 8), (1, 1)])
def test_other_grids_equal_the_library_with_positions_resampled_by_size(encoder, grid):
    x = torch.randn(1, 3, grid[0] * 16, grid[1] * 16)
    trunk = VisionTransformer(
        img_size=x.shape[-2:],
        patch_size=16,
        embed_dim=96,
        depth=3,
        num_heads=3,
        class_token=False,
        global_pool="map",
        num_classes=0,
    ).eval()
    state = dict(encoder.visual.trunk.state_dict())
    table = state["pos_embed"].reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
    state["pos_embed"] = torch.nn.functional.interpolate(table, grid, mode="bicubic").flatten(2).transpose(1, 2)
    trunk.load_state_dict(state)
    with torch.no_grad():
        expected = trunk.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        torch.testing.assert_close(encoder.intermediates(x, [-1])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_full_size_model_is_built_by_open_clip():
    encoder = build_encoder("ViT-B-16-SigLIP2-512")
    info = describe_encoder("ViT-B-16-SigLIP2-512")
    assert (info.family, info.native_size, info.patch_size, info.pixel_mean) == ("SigLIP", 512, 16, (0.5, 0.5, 0.5))
    assert (encoder.native_size, encoder.patch_size, encoder.embed_dim) == (512, 16, 768)
    assert encoder.pixel_mean == info.pixel_mean
    assert "visual.trunk.blocks.11.attn.qkv.weight" in encoder.state_dict()
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 33, 64)).shape == (1, 768, 3, 4)


@pytest.mark.slow
def test_the_native_size_is_a_multiple_of_the_patch_size():
    """384 pixels are 27.4 patches of 14: the model was trained on 27."""
    assert describe_encoder("ViT-SO400M-14-SigLIP-384").native_size == 378


@pytest.mark.slow
def test_text_tower_is_open_clips_and_canonicalises():
    tower = build_text_tower(TINY)
    open_clip.add_model_config(TINY)
    tokenize = open_clip.get_tokenizer("tiny_pooled")
    assert torch.equal(tower.tokenize(["A Cat, on_GRASS!"]), tokenize(["a cat on grass"]))
    with torch.no_grad():
        expected = tower.model.encode_text(tokenize(["a cat on grass"]))
    torch.testing.assert_close(tower.encode(["A Cat, on_GRASS!"]), expected)


def test_a_tokenizer_in_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="SigLIP's tokenizers are transformers'")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "a", "cat", "grass"])}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    config = json.loads(Path(TINY).read_text())
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "tokenizer")
    (tmp_path / "local-tokenizer.json").write_text(json.dumps(config))
    tower = build_text_tower(str(tmp_path / "local-tokenizer.json"))
    assert tower.tokenize(["A CAT."])[0, :3].tolist() == [2, 3, 0]


@pytest.mark.slow
def test_a_failed_download_of_a_tokenizer_is_named(tmp_path):
    config = json.loads(Path(TINY).read_text())
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "nowhere")
    (tmp_path / "no-tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="tokenizer of no-tokenizer failed to download.*hf_tokenizer_name"):
        build_text_tower(str(tmp_path / "no-tokenizer.json")).encode(["a cat"])


@pytest.mark.slow
def test_image_and_text_come_from_one_file(tmp_path):
    encoder, tower = build_encoder(TINY), build_text_tower(TINY)
    state = {key: tensor + 1 for key, tensor in {**tower.model.state_dict(), **encoder.state_dict()}.items()}
    path = str(tmp_path / "both.safetensors")
    write_safetensors(state, path)
    for key, tensor in build_encoder(TINY, path).state_dict().items():
        assert torch.equal(tensor, state[key])
    for key, tensor in build_text_tower(TINY, path).model.state_dict().items():
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"global_pool": "avg"}, "attention pooling"),
        ({"class_token": True, "global_pool": "map"}, "prefix tokens"),
        ({"class_token": False, "global_pool": "map", "pos_embed": "none"}, "no position embedding"),
    ],
)
def test_other_towers_are_refused(options, reason):
    visual = torch.nn.Module()
    visual.trunk = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, **options)
    with pytest.raises(ValueError, match=reason):
        SigLIPEncoder(visual)


def test_a_bare_trunk_is_refused():
    with pytest.raises(ValueError, match=r"model\.visual of open_clip"):
        SigLIPEncoder(timm.create_model("vit_nano_patch8_siglip_64"))
