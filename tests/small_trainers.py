"""Detectron2's plain trainer on a few images, as distillation is tested with; trainings that stop, and how they end."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from spar_d2.engine.trainer import Trainer


class Recorder(SimpleTrainer):
    """Keeps the losses of every step."""

    def run_step(self):
        super().run_step()
        self.losses = [*getattr(self, "losses", []), self.storage.latest()["total_loss"][0]]


def trainer_for(cfg, images, hook, kind=Recorder, lr=2e-5):
    model = build_model(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4)
    data = [[{"image": image} for image in images]] * 50
    trainer = kind(model, data, optimizer)
    trainer.register_hooks([hook])
    return trainer


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


class Crash(HookBase):
    """Ends a training before a step, as an error would."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise ZeroDivisionError


def train(cfg, resume=False, stop_at=None):
    """Train with a config, to the end or to a crash before a step."""
    # As the tools' set-up does, for the weights of the heads.
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop_at is None:
        trainer.train()
    else:
        trainer.register_hooks([Crash(stop_at)])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    return trainer


def parameter_settings(optimizer, model):
    """Learning rate and weight decay by the name of the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


def assert_equal(first, second, path="checkpoint"):
    """Two checkpoints have the same contents, bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second)):
            assert_equal(*pair, f"{path}[{number}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path
