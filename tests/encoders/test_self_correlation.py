"""The read-out in which patches attend to patches with similar attention outputs, compared with plain formulae."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference import ROOT
from spar_d2.encoders import FAMILIES, build_encoder
from spar_d2.encoders.self_correlation import attend_to_similar

TOYS = {name: family.toy for name, family in FAMILIES.items() if family.toy}
# With timm's other kind of rotary attention, and attention pooling behind it.
MODELS = {**TOYS, "PE": "PE-Core-T-16-384"}


def built(family: str, readout: str = "self_correlation"):
    name = MODELS[family]
    torch.manual_seed(0)
    encoder = build_encoder(str(ROOT / "configs" / name) if name.endswith(".json") else name, readout=readout)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        attn = encoder.blocks[-1].attn
        # The attention of untrained weights hardly matters.
        getattr(attn, "proj", getattr(attn, "out_proj", None)).weight.mul_(20)
    return encoder


def average(attended, value):
    """The whole N x N matrix, in float64, one head at a time."""
    heads = []
    for output, values in zip(attended.double().flatten(0, 1), value.double().flatten(0, 1)):
        unit = output / output.norm(dim=1, keepdim=True)
        cosine = unit @ unit.T
        weight = torch.where(cosine < 0, 0.0, (10 * cosine).exp())
        heads.append(weight / weight.sum(1, keepdim=True) @ values)
    return torch.stack(heads).view_as(value)


@pytest.mark.parametrize("rows", [None, 1, 7, 30, 99])
def test_blocks_of_rows_give_the_whole_matrix(rows):
    query, key, value = torch.randn(3, 2, 3, 33, 8).double().requires_grad_()
    found = attend_to_similar(query, key, value, 3, rows)
    attended = ((query[:, :, 3:] @ key.transpose(-2, -1)) / 8**0.5).softmax(-1) @ value
    expected = average(attended, value[:, :, 3:])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((part * weights).sum(), (value, query, key)) for part in (found, expected)]
    for ours, plain in zip(*gradients):
        torch.testing.assert_close(ours, plain)


def test_opposite_patches_have_no_share():
    """Two groups of patches with opposite attention outputs keep their own values."""
    key = torch.eye(2).view(1, 1, 2, 2) * 99
    value = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    query = torch.eye(2)[[0, 1, 0, 1]].view(1, 1, 4, 2) * 99
    tokens = [torch.cat([part, part], dim=2) for part in (key, value)]
    torch.testing.assert_close(attend_to_similar(query, *tokens, 0), tokens[1])


def features_by_hand(encoder, x):
    """Features at the native size from the library's own modules and the plain formula, in float64."""
    encoder = copy.deepcopy(encoder).double()
    trunk = getattr(encoder, "trunk", encoder.visual)
    block, prefix = encoder.blocks[-1], encoder.prefix_tokens
    inputs = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args[0], kwargs)), with_kwargs=True)
    if hasattr(trunk, "forward_features"):
        trunk.forward_features(x.double())
    else:
        trunk(x.double())
    handle.remove()
    (tokens, kwargs), attn = inputs[0], block.attn
    if isinstance(attn, nn.MultiheadAttention):
        normed = block.ln_1(tokens)
        _, weights = attn(normed, normed, normed, average_attn_weights=False)
        width = tokens.shape[-1]
        value = normed @ attn.in_proj_weight[2 * width :].T + attn.in_proj_bias[2 * width :]
        value = value.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        mixed = average((weights @ value)[:, :, prefix:], value[:, :, prefix:])
        tokens = tokens[:, prefix:] + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return trunk.ln_post(tokens + block.mlp(block.ln_2(tokens))) @ trunk.proj
    seen = {}
    last = attn.norm if getattr(attn, "norm", None) is not None else attn.proj
    handle = last.register_forward_pre_hook(lambda _, args: seen.setdefault("attended", args[0]))
    block(tokens, **{name: value for name, value in kwargs.items() if value is not None})
    handle.remove()
    normed = block.norm1(tokens)
    if attn.qkv is None:
        value = attn.v_proj(normed)
    else:
        value = normed @ attn.qkv.weight[-attn.proj.in_features :].T
        bias = getattr(attn, "v_bias", attn.qkv.bias)
        value = value if bias is None else value + bias[-attn.proj.in_features :]
    attended, value = (
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)[:, :, prefix:] for part in (seen["attended"], value)
    )
    mixed = average(attended, value).transpose(1, 2).flatten(2)
    mixed = attn.proj(attn.norm(mixed) if getattr(attn, "norm", None) is not None else mixed)
    scales = [block.ls1, block.ls2] if hasattr(block, "ls1") else [getattr(block, f"gamma_{i}") for i in (1, 2)]
    first, second = (s if isinstance(s, nn.Module) else lambda t, s=s: t if s is None else t * s for s in scales)
    tokens = tokens[:, prefix:] + first(mixed)
    tokens = trunk.norm(tokens + second(block.mlp(block.norm2(tokens))))
    if (pool := getattr(trunk, "attn_pool", None)) is not None:
        tokens = torch.stack([pool(token[:, None]) for token in tokens])
    return encoder.visual.head(trunk.head(trunk.fc_norm(tokens))) if hasattr(encoder.visual, "head") else tokens


@pytest.mark.parametrize("family", sorted(MODELS))
def test_features_equal_the_plain_formula(family):
    encoder = built(family)
    x = torch.randn(2, 3, encoder.native_size, encoder.native_size)
    with torch.no_grad():
        found = encoder(x).flatten(2).transpose(1, 2)
        expected = features_by_hand(encoder, x).float()
        default = built(family, "")(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (default - found).abs().max() > 5e-3


@pytest.mark.parametrize("family", sorted(TOYS))
def test_the_read_out_learns_and_runs_in_bfloat16(family):
    encoder = built(family)
    x = torch.randn(1, 3, 5 * encoder.patch_size - 1, 7 * encoder.patch_size)
    exact = encoder(x)
    exact.square().mean().backward()
    assert all(p.grad is not None for p in encoder.blocks[-1].mlp.parameters())
    encoder.zero_grad()
    for block in list(encoder.blocks)[:-1]:
        block.requires_grad_(False)
    encoder.accelerate("bfloat16")
    with encoder.frozen_blocks_cast():
        rough = encoder(x)
    for block in encoder.blocks:
        block.requires_grad_(False)
    with encoder.frozen_blocks_cast(), torch.no_grad():
        cast = encoder(x)
    for features in (rough, cast, encoder.freeze()(x)):
        assert torch.nn.functional.cosine_similarity(exact, features, dim=1).min() > 0.97


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple) else (result,)
        self.size = max([self.size, *(part.numel() for part in parts if isinstance(part, torch.Tensor))])
        return result


@pytest.mark.parametrize("training", [False, True])
def test_no_matrix_of_all_patches_is_in_memory(training):
    side = 48
    query, key, value = torch.randn(3, 1, 2, side**2, 8).requires_grad_(training)
    saved = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        result = attend_to_similar(query, key, value, 0)
        if training:
            result.sum().backward()
    assert largest.size < side**4 / 2
    # Rows are computed again in the backward pass, and not kept for it.
    assert max(saved, default=0) < side**4 / 2 and bool(saved) == training


def test_encoders_without_the_read_out_are_named():
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*dinotxt"):
        build_encoder("dinov3_vitl16_dinotxt_tet1280d20h24l", readout="self_correlation")
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*self_correlation.*ViT-B-32"):
        build_encoder("ViT-B-32", readout="value")
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.READOUT.*last block"):
        build_encoder("vit_base_patch16_xp_224", readout="self_correlation")
