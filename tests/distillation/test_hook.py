"""The hook in Detectron2's own trainers."""

import copy
from math import inf, nan

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from processes import run_in_two_processes
from reference import ROOT, example_encoder, reference_image
from small_trainers import as_tensor, trainer_for
from spar_d2.distillation import DistillationHook
from spar_d2.encoders import FAMILIES, find_encoder
from spar_d2.teacher import SlidingWindowTeacher

# Losses of the authors' recipe on the reference model: before the first step, and after each.
REFERENCE_LOSSES = [0.485915, 0.479970, 0.474122, 0.468373, 0.462722, 0.457169]


def test_losses_of_the_reference(tiny_cfg):
    tiny_cfg.MODEL.SPAR.TRAINABLE = "blk_-1,blk_-2"
    tiny_cfg.MODEL.SPAR.REFERENCE_COMPAT = True
    trainer = trainer_for(tiny_cfg, [as_tensor(reference_image(128, 128))], DistillationHook(tiny_cfg))
    assert sum(p.requires_grad for p in trainer.model.parameters()) == 24
    trainer.train(0, len(REFERENCE_LOSSES))
    assert trainer.losses == pytest.approx(REFERENCE_LOSSES, rel=2e-5)


@pytest.mark.slow
def test_images_of_several_sizes_each_count_once(tiny_cfg):
    images = [as_tensor(reference_image(h, w)) for h, w in ((64, 96), (100, 70), (64, 96))]
    alone = []
    for image in images:
        trainer = trainer_for(tiny_cfg, [image], DistillationHook(tiny_cfg))
        trainer.train(0, 1)
        alone += trainer.losses
    together = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    together.train(0, 1)
    assert together.losses[0] == pytest.approx(sum(alone) / 3, rel=1e-5)


@pytest.mark.parametrize("unused", [False, True])
def test_a_fully_frozen_encoder_needs_no_teacher(tiny_cfg, unused):
    if unused:
        tiny_cfg.MODEL.SPAR.ENCODER, tiny_cfg.MODEL.SPAR.PRETRAINED = str(ROOT / "configs/toy/tiny_pooled.json"), ""
    trainer = trainer_for(tiny_cfg, [as_tensor(reference_image(64, 64))], DistillationHook(tiny_cfg))
    encoder = find_encoder(trainer.model).requires_grad_(False)
    if unused:  # by dense features
        encoder.visual.trunk.attn_pool.latent.requires_grad_(True)
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TRAINABLE"):
        trainer.train(0, 1)


@pytest.mark.slow
def test_sampled_windows_lower_the_full_loss(tiny_cfg):
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 3
    images = [as_tensor(reference_image(128, 128))]
    hook = DistillationHook(tiny_cfg)
    trainer = trainer_for(tiny_cfg, images, hook, lr=1e-3)
    x = trainer.model._normalize(images[0])[None]
    x = trainer.model.backbone.pixels(x)
    target = hook.teacher(x)

    def full_loss():
        with torch.no_grad():
            return (trainer.model.backbone.encoder(x) - target).square().mean().item()

    before = full_loss()
    trainer.train(0, 30)
    assert full_loss() < 0.7 * before
    assert hook.windows_encoded == 90


@pytest.mark.slow
def test_a_resumed_run_draws_the_windows_it_would_have_drawn(tiny_cfg):
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 2
    images = [as_tensor(reference_image(128, 128))]
    through = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    through.train(0, 6)
    first = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    first.train(0, 3)
    second = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(3, 6)
    assert second.losses == pytest.approx(through.losses[3:], rel=1e-5)


def test_the_model_is_restored_after_training(tiny_cfg):
    images = [as_tensor(reference_image(64, 96))]
    trainer = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    keys = list(trainer.model.state_dict())
    frozen = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainable = [p.requires_grad for p in trainer.model.parameters()]
    trainer.train(0, 2)
    assert list(trainer.model.state_dict()) == keys
    assert [p.requires_grad for p in trainer.model.parameters()] == trainable
    assert not any(module._forward_hooks for module in trainer.model.modules())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, frozen[name]) == (not parameter.requires_grad), name


class LabeledModel(nn.Module):
    """A model of another framework around an encoder, with another loss."""

    def __init__(self, encoder):
        super().__init__()
        self.deep = nn.ModuleList([nn.Sequential(encoder)])
        self.head = nn.Conv2d(encoder.embed_dim, 2, 1)

    def forward(self, data):
        scores = self.head(self.deep[0](torch.stack([d["image"] for d in data])))
        return {"loss_head": scores.square().mean()}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("windows", [0, 2])
def test_beside_losses_of_another_model(family, windows):
    torch.manual_seed(0)
    encoder = example_encoder(family)
    model = LabeledModel(copy.deepcopy(encoder))
    data = [[{"image": torch.randn(3, 70, 90)}, {"image": torch.randn(3, 70, 90)}]] * 3
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1))
    hook = DistillationHook(SlidingWindowTeacher(encoder, stride=24), weight=0.5, windows_per_image=windows)
    trainer.register_hooks([hook])
    trainer.train(0, 2)
    latest = trainer.storage.latest()
    assert latest["loss_distill"][0] > 0
    assert latest["total_loss"][0] == pytest.approx(latest["loss_distill"][0] + latest["loss_head"][0])
    with EventStorage():
        assert set(model.train()(data[0])) == {"loss_head"}


class Bfloat16Trainer(AMPTrainer):
    """Detectron2's mixed-precision trainer as it would run on a GPU, on the CPU."""

    def __init__(self, model, data, optimizer):
        SimpleTrainer.__init__(self, model, data, optimizer)

    def run_step(self):
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.model(next(self._data_loader_iter))
        self.dtype = losses["loss_distill"].dtype
        self.losses = [losses["loss_distill"].item()]
        losses["loss_distill"].backward()


def test_under_autocast_the_loss_is_float32_and_close(tiny_cfg):
    images = [as_tensor(reference_image(64, 96))]
    rough = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg), Bfloat16Trainer)
    exact = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    rough.train(0, 1)
    exact.train(0, 1)
    assert rough.dtype == torch.float32
    assert rough.losses[0] == pytest.approx(exact.losses[0], rel=0.05)


def _one_step(rank, folder, cfg):
    """One of two processes: one step on its own image, weights written down."""
    model = nn.parallel.DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    data = [[{"image": as_tensor(reference_image(64, 96, rank))}]] * 2
    trainer = SimpleTrainer(model, data, torch.optim.SGD(trained, lr=0.1))
    trainer.register_hooks([DistillationHook(cfg)])
    trainer.train(0, 1)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pth")


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_make_the_step_of_one_with_both_images(tiny_cfg, tmp_path):
    run_in_two_processes(_one_step, tmp_path, tiny_cfg)
    model = build_model(tiny_cfg)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    data = [[{"image": as_tensor(reference_image(64, 96, index))} for index in range(2)]]
    trainer = SimpleTrainer(model, data, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    trainer.register_hooks([DistillationHook(tiny_cfg)])
    trainer.train(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[name], value) for name, value in first.items())


def test_evaluation_between_steps_has_no_effect(tiny_cfg):
    images = [as_tensor(reference_image(64, 96))]
    trainer = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))

    class Evaluate(HookBase):
        def after_step(self):
            self.trainer.model.eval()
            with torch.no_grad():
                self.trainer.model.backbone(torch.zeros(1, 3, 64, 64))
            self.trainer.model.train()

    trainer.register_hooks([Evaluate()])
    trainer.train(0, 2)
    assert len(trainer.losses) == 2


def test_a_model_without_encoder_or_with_two_is_named():
    hook = DistillationHook(SlidingWindowTeacher(example_encoder(sorted(FAMILIES)[0])))
    model = nn.Linear(2, 2)
    trainer = SimpleTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([hook])
    with pytest.raises(RuntimeError, match=r"MODEL\.BACKBONE\.NAME"):
        trainer.train(0, 1)


@pytest.mark.parametrize(
    ("key", "arguments"),
    [("WINDOWS", {"windows_per_image": -1}), *(("WEIGHT", {"weight": number}) for number in (-1, 0, nan, inf))],
)
def test_wrong_arguments_are_named(key, arguments):
    teacher = SlidingWindowTeacher(example_encoder(sorted(FAMILIES)[0]))
    with pytest.raises(ValueError, match=key):
        DistillationHook(teacher, **arguments)
