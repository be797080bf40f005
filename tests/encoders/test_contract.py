"""The contract of all registered families of encoders; a new one is tested by being registered."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reference import example_encoder
from spar_d2.encoders import FAMILIES, describe_encoder, set_trainable
from spar_d2.encoders.convert import as_format, formats_of
from spar_d2.encoders.registry import find_family, nearest_family


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def encoder(family):
    torch.manual_seed(0)
    return example_encoder(family.name)


@pytest.mark.parametrize("size", [(1, 1), (15, 17), (1, 4000), (64, 64), (70, 100), (203, 33)])
def test_any_size_gives_one_feature_per_patch(encoder, size):
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, *size))
    patch = encoder.patch_size
    assert features.shape == (2, encoder.embed_dim, -(-size[0] // patch), -(-size[1] // patch))
    assert features.isfinite().all()


def test_padding_is_zeros_on_the_right_and_bottom(encoder):
    x = torch.randn(1, 3, 70, 100)
    p = encoder.patch_size
    padded = torch.zeros(1, 3, -(-70 // p) * p, -(-100 // p) * p)
    padded[..., :70, :100] = x
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder(padded), rtol=0, atol=0)


def test_same_input_same_output_and_no_mixing_between_images(encoder):
    x = torch.randn(3, 3, 96, 64)
    with torch.no_grad():
        together, again = encoder(x), encoder(x)
        alone = torch.cat([encoder(image[None]) for image in x])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_intermediates_are_maps_in_the_requested_order(encoder):
    x = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        last, first, last_again = encoder.intermediates(x, [-1, 0, len(encoder.blocks) - 1])
    assert last.shape == first.shape == (1, encoder.width, *encoder.grid(40, 70))
    assert torch.equal(last, last_again)
    assert not torch.equal(first, last)


@pytest.mark.parametrize("indices", [[99], [-99], []])
def test_wrong_intermediates_are_named(encoder, indices):
    with pytest.raises(ValueError, match="indices"):
        encoder.intermediates(torch.randn(1, 3, 64, 64), indices)


@pytest.mark.parametrize("size", [(1, 1), (70, 100), (64, 64)])
@pytest.mark.parametrize("indices", [[], [0], [1, 0, 1]])
def test_dense_features_beside_intermediates_are_those_of_a_forward_pass(encoder, size, indices):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        *blocks, dense = encoder.intermediates(x, indices, dense=True)
        assert torch.equal(dense, encoder(x))
        assert len(blocks) == len(indices)
        if indices:
            for found, expected in zip(blocks, encoder.intermediates(x, indices), strict=True):
                assert torch.equal(found, expected)


def test_dense_features_beside_intermediates_come_from_one_pass_and_have_the_same_gradients(encoder, monkeypatch):
    names, x, gradients, passes = set_trainable(encoder, "last_blocks:2"), torch.randn(1, 3, 64, 96), [], []
    embed = encoder._embed
    monkeypatch.setattr(encoder, "_embed", lambda images: passes.append(len(images)) or embed(images))
    for precision in ("float32", "bfloat16"):
        encoder.accelerate(precision)
        for compute in (encoder, lambda images: encoder.intermediates(images, [0], dense=True)[-1]):
            encoder.zero_grad(set_to_none=True)
            features = compute(x)
            features.square().mean().backward()
            gradients.append([features.detach(), *(encoder.get_parameter(name).grad for name in names)])
        for found, expected in zip(gradients[-1], gradients[-2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert passes == [1] * 4


@pytest.mark.parametrize("indices", [[-1], [99], ["last"]])
def test_the_last_block_is_not_available_beside_dense_features(encoder, indices):
    numbers = [len(encoder.blocks) - 1 if index == "last" else index for index in indices]
    with pytest.raises(ValueError, match=r"indices must be block numbers .* but the last one"):
        encoder.intermediates(torch.randn(1, 3, 64, 64), numbers, dense=True)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "image"]
)
def test_inputs_that_are_no_batch_of_rgb_images_are_an_error(encoder, x):
    with pytest.raises(ValueError, match="RGB tensor"):
        encoder(x)


def test_an_image_without_pixels_is_refused(encoder):
    with pytest.raises(ValueError, match="at least one pixel"):
        encoder(torch.zeros(1, 3, 0, 64))


def test_every_trainable_parameter_gets_a_gradient_and_no_other(encoder):
    names = set_trainable(encoder, "last_blocks:2")
    encoder(torch.randn(1, 3, 64, 96)).square().mean().backward()
    with_gradient = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient <= set(names)
    assert with_gradient, "nothing is trained"
    for index, block in enumerate(encoder.blocks):
        has_gradient = any(p.grad is not None for p in block.parameters())
        assert has_gradient == (index >= len(encoder.blocks) - 2)


def test_all_trains_every_parameter_that_features_pass_through(encoder):
    encoder(torch.randn(1, 3, 64, 96)).square().mean().backward()
    passed = [name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert set_trainable(encoder, "all") == passed


def test_a_frozen_encoder_stays_in_eval_mode(encoder):
    assert set_trainable(encoder, "none") == []
    assert not encoder.train().training
    set_trainable(encoder, "last_blocks:1")
    assert encoder.train().training


@pytest.mark.parametrize(
    "spec",
    ["", "last_blocks:0", "last_blocks:99", "blk_99", "blk_x", "qkv_99", "mlp_", "blk", "some", "all,blk_0", "qkv"],
)
def test_wrong_names_of_trainable_parts_are_an_error(encoder, spec):
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TRAINABLE"):
        set_trainable(encoder, spec)


def test_the_authors_spelling_means_the_same_blocks(encoder):
    assert set_trainable(encoder, "blk_-1,blk_-2") == set_trainable(encoder, "last_blocks:2")


# Parameters of a block that each name stands for, as prefixes of the library's names.
IN_BLOCK = {"qkv": {"attn.in_proj_", "attn.qkv", "attn.q_", "attn.k_", "attn.v_"}, "mlp": {"mlp."}}


@pytest.mark.parametrize("word", sorted(IN_BLOCK))
@pytest.mark.parametrize("index", [0, -1])
def test_names_for_parts_of_a_block(encoder, word, index):
    names = set_trainable(encoder, f"{word}_{index}")
    inner = {name for name, p in encoder.blocks[index].named_parameters() if p.requires_grad}
    assert len(names) == len(inner) > 0
    used = {id(encoder.get_parameter(name)) for name in set_trainable(encoder, "all")}
    set_trainable(encoder, f"{word}_{index}")
    block = encoder.blocks[index].named_parameters()
    assert inner == {name for name, p in block if name.startswith(tuple(IN_BLOCK[word])) and id(p) in used}
    learns(encoder, names)


def test_names_for_parts_outside_of_blocks(encoder):
    parts = {word: set_trainable(encoder, word) for word in encoder.parts if word not in IN_BLOCK}
    assert "patchembed" in parts
    for word, names in parts.items():
        assert names, word
        set_trainable(encoder, word)
        learns(encoder, names)
        encoder.zero_grad(set_to_none=True)
    together = set_trainable(encoder, ", ".join(["blk_0", *parts]))
    assert set(together) == {name for names in parts.values() for name in names} | set(set_trainable(encoder, "blk_0"))


def learns(encoder, names):
    """Exactly the named parameters get a gradient."""
    encoder(torch.randn(1, 3, 64, 96)).square().mean().backward()
    got = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == set(names)


@pytest.mark.parametrize("word", ["posembed", "patchembed", "attn_pool_kv"])
def test_errors_for_missing_parts_list_the_parts_of_the_family(encoder, word):
    if word in encoder.parts:
        assert set_trainable(encoder, word)
        return
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TRAINABLE.*patchembed.*got") as error:
        set_trainable(encoder, f"blk_-1,{word}")
    assert word not in str(error.value).split("got")[0]


@pytest.mark.slow
def test_the_description_of_a_model_matches_the_built_model(family):
    name = family.names()[0]
    assert find_family(name) is family
    info = describe_encoder(name)
    assert info.family == family.name
    assert info.native_size % info.patch_size == 0
    assert len(info.pixel_mean) == len(info.pixel_std) == 3
    assert info.logit_scale == 40


def test_files_of_the_library_lead_back_to_the_family(encoder, family):
    state = encoder.state_dict()
    for name in formats_of(family):
        if name != "authors":  # their prefix goes when a file is read
            file = as_format(state, family, name)
            assert family.from_file(file).keys() == state.keys()
            # Trunks of timm may belong to any family of timm's ViTs.
            assert nearest_family(file) in (family, *[FAMILIES["timm ViT"]] * (name == "timm"))


def test_state_dict_round_trip(encoder):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(x)
        state = {key: value.clone() for key, value in encoder.state_dict().items()}
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.load_state_dict(state)
        assert torch.equal(encoder(x), before)


@pytest.mark.parametrize("own", [True, False], ids=["by the encoder", "by the surroundings"])
def test_bfloat16_stays_close_and_gives_float32(encoder, own):
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        exact = encoder(x)
        encoder.accelerate("bfloat16" if own else "float32")
        with torch.autocast("cpu", torch.bfloat16, enabled=not own):
            rough, block = encoder(x), encoder.intermediates(x, [-1])[0]
    assert rough.dtype == block.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=1).min() > 0.98


def test_weights_and_images_in_bfloat16(encoder):
    x = torch.randn(1, 3, 70, 96)
    with torch.no_grad():
        exact = encoder(x)
        rough = encoder.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=1).min() > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_another_type_than_the_weights(encoder, dtype):
    x = torch.randn(1, 3, 40, 64, dtype=dtype)
    with torch.no_grad():
        features, block = encoder(x), encoder.intermediates(x, [0])[0]
        torch.testing.assert_close(features, encoder(x.float()).to(dtype))
    assert block.dtype == dtype


def test_a_copy_computes_alike(encoder):
    """The teacher is a copy of its student."""
    x = torch.randn(1, 3, 64, 64)
    encoder.accelerate("bfloat16")
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(encoder)(x), encoder(x))


def test_wrong_precision_is_named(encoder):
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.PRECISION\) .*float32, bfloat16, float16"):
        encoder.accelerate("half")


def test_checkpointing_gives_the_same_gradients_with_fewer_saved_tensors(encoder):
    names = set_trainable(encoder, "last_blocks:2")
    x = torch.randn(1, 3, 96, 96)
    results = []
    for checkpointing in (False, True):
        encoder.accelerate(checkpointing=checkpointing).zero_grad(set_to_none=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = encoder(x).square().mean()
        loss.backward()
        results.append((sum(saved), {name: encoder.get_parameter(name).grad.clone() for name in names}))
    (plain, expected), (less, gradients) = results
    assert less < 0.7 * plain
    for name in names:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-7)


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["DINOv3", "open_clip ViT"])
def test_compiled_blocks_give_the_same_at_every_size(family):
    encoder = example_encoder(family)
    for size in ((64, 64), (70, 100)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = encoder.accelerate()(x)
            torch.testing.assert_close(encoder.accelerate(compile=True)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_learn_the_same():
    encoder = example_encoder(sorted(FAMILIES)[0])
    names = set_trainable(encoder, "last_blocks:1")
    x = torch.randn(1, 3, 64, 96)
    gradients = []
    for compiled in (False, True):
        encoder.accelerate(compile=compiled).zero_grad()
        encoder(x).square().mean().backward()
        gradients.append([encoder.get_parameter(name).grad.clone() for name in names])
    for plain, other in zip(*gradients):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


def test_attention_is_fused_in_every_block(encoder, monkeypatch):
    """Fused attention never has its N x N matrix in memory; nothing else may hold one either."""
    tokens = []

    def fused(query, key, value, *args, **kwargs):
        tokens.append(query.shape[-2])
        return original(query, key, value, *args, **kwargs)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in (result if isinstance(result, tuple) else (result,)) if hasattr(t, "numel")]
            self.size = max([self.size, *sizes])
            return result

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    side = 40
    with torch.no_grad(), Largest() as largest:
        encoder(torch.randn(1, 3, side * encoder.patch_size, side * encoder.patch_size))
    assert len(encoder.blocks) - 1 <= len(tokens) <= len(encoder.blocks)
    assert min(tokens) >= side * side
    assert largest.size < side**4
