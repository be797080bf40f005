"""The open_clip family against open_clip itself."""

import copy

import open_clip
import pytest
import torch

from spar_d2.encoders import OpenCLIPEncoder


def test_all_blocks_equal_the_librarys_at_native_size(reference_clip):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = OpenCLIPEncoder(reference_clip.visual).intermediates(x, [0, 1, 2])
        theirs = reference_clip.visual.forward_intermediates(x, intermediates_only=True)["image_intermediates"]
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_value_path_is_attention_of_each_patch_to_itself(reference_clip):
    """With queries and keys that make attention the identity, the library's last block equals ours."""
    visual = copy.deepcopy(reference_clip.visual)
    x = torch.randn(1, 3, 64, 64)
    block = visual.transformer.resblocks[-1]
    block.attn.forward = lambda q, k, v, **kwargs: (
        block.attn.out_proj(v @ block.attn.in_proj_weight[-96:].T + block.attn.in_proj_bias[-96:]),
        None,
    )
    with torch.no_grad():
        tokens = visual.ln_post(visual.transformer(visual._embeds(x)))[:, 1:] @ visual.proj
        ours = OpenCLIPEncoder(reference_clip.visual)(x)
    torch.testing.assert_close(ours, tokens.transpose(1, 2).reshape(1, -1, 4, 4), rtol=1e-5, atol=1e-5)


def test_state_dict_has_the_librarys_keys(reference_clip):
    ours = OpenCLIPEncoder(reference_clip.visual).state_dict()
    theirs = {key for key in reference_clip.state_dict() if key.startswith("visual.")}
    assert set(ours) == theirs


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_layer_scale_is_applied(layer_scale):
    vision = {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 32,
        "ls_init_value": layer_scale,
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours = OpenCLIPEncoder(visual).intermediates(x, [1])[0]
        theirs = visual.forward_intermediates(x, intermediates_only=True)["image_intermediates"][-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_reference_compat_cuts_to_whole_patches_and_needs_one(reference_clip):
    encoder = OpenCLIPEncoder(reference_clip.visual, reference_compat=True)
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 81, 63)).shape[-2:] == (5, 3)
    with pytest.raises(ValueError, match="reference_compat"):
        encoder(torch.randn(1, 3, 15, 64))


def test_other_towers_are_refused():
    with pytest.raises(ValueError, match="VisionTransformer"):
        OpenCLIPEncoder(torch.nn.Linear(2, 2))
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "attentional_pool": True}
    with pytest.raises(ValueError, match="attentional pooling"):
        OpenCLIPEncoder(open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual)
