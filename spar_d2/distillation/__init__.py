"""Distillation of a sliding-window teacher into a single-pass student, for Detectron2 trainers."""

from spar_d2.distillation.hook import DistillationHook
from spar_d2.distillation.loss import distillation_loss, sampled_distillation_loss

__all__ = ["DistillationHook", "distillation_loss", "sampled_distillation_loss"]
