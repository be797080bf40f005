import pytest
import torch
from torch import nn

from spar_d2.engine.ema import ModelEma


def test_trainable_weights_are_averaged_and_restored():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = ModelEma(model, 0.75)
    average.before_train()
    expected, bias = model.weight.detach().clone(), model.bias.clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.after_step()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, own)
    resumed = ModelEma(model, 0.75)
    resumed.load_state_dict(average.state_dict())
    resumed.before_train()
    with resumed.applied():
        torch.testing.assert_close(model.weight.detach(), expected)


def test_the_model_is_given_back_after_an_error():
    model = nn.Linear(3, 2)
    average = ModelEma(model, 0.5)
    average.before_train()
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(model.weight, own)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_wrong_decay_is_named(decay):
    with pytest.raises(ValueError, match=r"SPAR\.EMA_DECAY"):
        ModelEma(nn.Linear(1, 1), decay)
