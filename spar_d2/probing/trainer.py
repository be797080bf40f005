"""Trainer of linear probes, which uses precomputed features if possible."""

from __future__ import annotations

from typing import cast

from detectron2.config import CfgNode
from torch import nn

from spar_d2.data.loaders import LabeledLoader, TrainLoader
from spar_d2.engine.trainer import Trainer
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.probing.feature_loader import check_probing, feature_loader, is_probe


class ProbeTrainer(Trainer):
    """Trains a linear probe; see :class:`~spar_d2.engine.trainer.Trainer` and ``SPAR.PROBE.CACHE_DIR``.

    Raises:
        ValueError: as :class:`~spar_d2.engine.trainer.Trainer`, or a cache folder is set, but features cannot be
            precomputed.
    """

    # Detectron2 assigns the model in a way that type checkers do not see.
    model: nn.Module

    def __init__(self, cfg: CfgNode) -> None:
        check_probing(cfg)
        super().__init__(cfg)

    def prepare_loader(self, loader: TrainLoader) -> TrainLoader:
        return feature_loader(self.cfg, cast(ProbeSegmentor, self._module), cast(LabeledLoader, loader))


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """Return the trainer class for a config."""
    return ProbeTrainer if is_probe(cfg) else Trainer
