"""Detectron2's plain trainer on a few images, as distillation is tested with."""

from __future__ import annotations

import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model


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
