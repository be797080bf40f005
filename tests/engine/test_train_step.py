"""One step: in parts, in mixed precision, and stopped where a gradient is not finite."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from spar_d2.engine.train_step import TrainStep


class Model(nn.Module):
    """Mean over inputs of a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.dtypes, self.sizes = set(), []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        values = self.layer(torch.stack([record["x"] for record in inputs]))
        self.dtypes.add(values.dtype)
        return {"loss_a": values.float().square().mean(), "loss_b": values.float().abs().mean()}


def inputs(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "file_name": f"{i}.jpg"} for i in range(count)]


def take_steps(batch, steps=3, **options) -> tuple[Model, dict]:
    model = Model()
    step = TrainStep(model, [batch] * steps, torch.optim.AdamW(model.parameters(), lr=0.1), **options)
    with EventStorage() as storage:
        for step.iter in range(steps):
            step.run_step()
    return model, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize(("count", "parts"), [(4, 2), (4, 4), (6, 3), (5, 2)])
def test_in_parts_it_is_the_same_step(count, parts):
    whole, losses = take_steps(inputs(count))
    split, split_losses = take_steps(inputs(count), parts=parts)
    assert max(split.sizes) == -(-count // parts)
    for name in ("loss_a", "loss_b", "total_loss"):
        assert split_losses[name] == pytest.approx(losses[name], rel=1e-5)
    for one, other in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision(precision):
    exact, _ = take_steps(inputs(4))
    rough, _ = take_steps(inputs(4), precision=precision, scale=precision is torch.float16)
    assert rough.dtypes == {precision}
    for one, other in zip(exact.parameters(), rough.parameters()):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
        assert other.dtype == torch.float32


def test_the_scaler_is_part_of_the_state():
    model = Model()
    step = TrainStep(model, [inputs(2)], torch.optim.AdamW(model.parameters()), precision=torch.float16, scale=True)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 512.0})
    state = step.state_dict()
    other = TrainStep(Model(), [], torch.optim.AdamW(Model().parameters()), precision=torch.float16, scale=True)
    other.load_state_dict(state)
    assert other.scaler.get_scale() == 512.0


def test_nonfinite_gradients_name_the_images_and_change_no_weights():
    model = Model()
    before = [p.clone() for p in model.parameters()]
    model.layer.weight.register_hook(lambda gradient: gradient * float("nan"))
    step = TrainStep(model, [inputs(2)], torch.optim.AdamW(model.parameters(), lr=0.1))
    step.iter = 7
    with EventStorage(), pytest.raises(FloatingPointError, match=r"gradient.*iteration 7, for 0\.jpg, 1\.jpg"):
        step.run_step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))


def test_with_a_scaler_such_a_step_is_left_out():
    model = Model()
    before = [p.clone() for p in model.parameters()]
    model.layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    step = TrainStep(
        model, [inputs(2)], torch.optim.AdamW(model.parameters(), lr=0.1), precision=torch.float16, scale=True
    )
    factor = step.scaler.get_scale()
    with EventStorage():
        step.run_step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))
    assert step.scaler.get_scale() < factor


def test_nonfinite_losses_are_named_and_change_no_weights():
    class Broken(Model):
        def forward(self, inputs):
            losses = super().forward(inputs)
            return {**losses, "loss_b": losses["loss_b"] * float("inf")}

    model = Broken()
    before = [p.clone() for p in model.parameters()]
    step = TrainStep(model, [inputs(2)], torch.optim.AdamW(model.parameters(), lr=0.1))
    step.iter = 7
    with EventStorage(), pytest.raises(FloatingPointError, match=r"^loss_b of the losses.*iteration 7, for 0\.jpg"):
        step.run_step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))


@pytest.mark.parametrize(("returned", "named"), [({}, "an empty dict"), (None, "NoneType"), ([1.0], "list")])
def test_a_model_without_losses_is_named(returned, named):
    class Silent(Model):
        def forward(self, inputs):
            return returned

    model = Silent()
    step = TrainStep(model, [inputs(2)], torch.optim.AdamW(model.parameters()))
    with pytest.raises(RuntimeError, match=f"Silent must return a loss or a dict of losses in training, .* {named}$"):
        step.run_step()
