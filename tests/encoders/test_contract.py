"""What every registered family of encoders must do; a new one is tested by being registered."""

import pytest
import torch

from spar_d2.encoders import FAMILIES, set_trainable


@pytest.fixture(params=sorted(FAMILIES))
def encoder(request):
    torch.manual_seed(0)
    return FAMILIES[request.param].example()


@pytest.mark.parametrize("size", [(1, 1), (15, 17), (1, 400), (64, 64), (70, 100), (203, 33)])
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


def test_intermediates_are_maps_in_the_order_asked_for(encoder):
    x = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        last, first, last_again = encoder.intermediates(x, [-1, 0, len(encoder.blocks) - 1])
    assert last.shape == first.shape == (1, encoder.width, *encoder.grid(40, 70))
    assert torch.equal(last, last_again)
    assert not torch.equal(first, last)


@pytest.mark.parametrize("indices", [[99], [-99], []])
def test_wrong_intermediates_are_named(encoder, indices):
    with pytest.raises(ValueError, match="indices must be block numbers"):
        encoder.intermediates(torch.randn(1, 3, 64, 64), indices)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "image"]
)
def test_what_is_no_batch_of_rgb_images_is_refused(encoder, x):
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


@pytest.mark.parametrize("spec", ["", "last_blocks:0", "last_blocks:99", "blk_99", "blk_x", "some", "all,blk_0"])
def test_wrong_words_for_what_is_trained_are_named(encoder, spec):
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TRAINABLE"):
        set_trainable(encoder, spec)


def test_the_authors_spelling_means_the_same_blocks(encoder):
    assert set_trainable(encoder, "blk_-1,blk_-2") == set_trainable(encoder, "last_blocks:2")


def test_state_dict_round_trip(encoder):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(x)
        state = {key: value.clone() for key, value in encoder.state_dict().items()}
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.load_state_dict(state)
        assert torch.equal(encoder(x), before)


def test_bfloat16_autocast_stays_close(encoder):
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder(x).float()
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=1).min() > 0.98
