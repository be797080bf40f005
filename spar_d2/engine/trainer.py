"""The trainer: Detectron2's default one, with this project's data, optimizer, evaluator and hooks."""

from __future__ import annotations

import functools
import logging
import math
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from spar_d2.data.augmentation import build_augmentations
from spar_d2.data.photos import PhotoDataset, find_photos
from spar_d2.distillation import DistillationHook
from spar_d2.engine.checkpoint import Checkpointer
from spar_d2.engine.comparison import build_teacher_encode
from spar_d2.engine.hooks import Interrupted, ProgressBar, StopOnInterrupt, StudentWriter
from spar_d2.evaluation import FeatureEvaluator, SemanticEvaluator
from spar_d2.modeling.build import encoder_spec
from spar_d2.modeling.open_vocab import OpenVocabularySegmentor
from spar_d2.text import Vocabulary

logger = logging.getLogger(__name__)

STUDENT_FILE = "student.safetensors"
# Of torch.optim: those that take a step without a closure, on dense gradients.
OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD")


class Trainer(DefaultTrainer):
    """Trains and tests what a config describes.

    With ``SPAR.DISTILL.ENABLED`` it distils on photos (``SPAR.DATA``) and writes the student to ``OUTPUT_DIR``;
    without, it trains like Detectron2's own trainer, with this project's optimizer.
    """

    def __init__(self, cfg: CfgNode) -> None:
        for key in ("IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD"):
            if cfg.SOLVER[key] < 1:
                raise ValueError(f"SOLVER.{key} must be at least 1, got {cfg.SOLVER[key]}")
        if not 0 < cfg.SOLVER.BASE_LR < math.inf:
            raise ValueError(f"SOLVER.BASE_LR must be above 0, got {cfg.SOLVER.BASE_LR}")
        for name in cfg.DATASETS.TEST:
            # An evaluator that cannot be built should not be found out after training.
            self.build_evaluator(cfg, name)
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        # The parent's hooks write through the checkpointer they are built with, so it is exchanged first.
        cfg = self.cfg
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks = super().build_hooks()
        if cfg.SPAR.DISTILL.ENABLED:
            student = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
            # Before the evaluation at the end, which may fail.
            writer = StudentWriter(encoder_spec(cfg), student)
            hooks = [DistillationHook(cfg), writer, *hooks]
        # Last, so that all other hooks have finished the step when it stops.
        return [*hooks, ProgressBar(), StopOnInterrupt(self.checkpointer)]

    def train(self):
        """Train from where it stands; a user's Ctrl-C ends it quietly, with a checkpoint."""
        logger.info("Output goes to %s", os.path.abspath(self.cfg.OUTPUT_DIR))
        try:
            return super().train()
        except Interrupted as stop:
            logger.info("Training %s", stop)
            return None

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``SPAR.OPTIMIZER`` over the trainable parameters, with Detectron2's rules for decay and biases."""
        if cfg.SPAR.OPTIMIZER not in OPTIMIZERS:
            raise ValueError(f"SPAR.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}; got {cfg.SPAR.OPTIMIZER!r}")
        kind = getattr(torch.optim, cfg.SPAR.OPTIMIZER)
        groups = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        if not groups:
            raise ValueError(f"nothing to train: MODEL.SPAR.TRAINABLE is {cfg.MODEL.SPAR.TRAINABLE!r}")
        return maybe_add_gradient_clipping(cfg, kind)(groups, lr=cfg.SOLVER.BASE_LR)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        data = cfg.SPAR.DATA
        if not data.IMAGES and cfg.MODEL.META_ARCHITECTURE != OpenVocabularySegmentor.__name__:
            # A model with losses of its own needs labels, with or without distillation beside them.
            return super().build_train_loader(cfg)
        if data.IMAGES:
            dicts = find_photos(data.IMAGES)
        elif cfg.DATASETS.TRAIN:
            dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
        else:
            raise ValueError("nothing to distil on: set SPAR.DATA.IMAGES to a folder of photos, or DATASETS.TRAIN")
        augmentations = build_augmentations(
            data.SIDE_MULTIPLE,
            data.SHORT_SIDE,
            data.MAX_SIDE,
            data.CROP_PROB,
            data.CROP_MIN_FRACTION,
            data.CROP_MIN_SIDE,
            data.FLIP_PROB,
        )
        logger.info("Distilling on %d images", len(dicts))
        photos = PhotoDataset(dicts, augmentations, cfg.INPUT.FORMAT)
        photos.read(0)  # where not one can be decoded, say so before training starts
        return build_detection_train_loader(
            dataset=photos,
            mapper=None,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            aspect_ratio_grouping=False,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if cfg.MODEL.SPAR.OUTPUT == "features":
            return FeatureEvaluator(functools.partial(build_teacher_encode, cfg))
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind != "sem_seg":
            raise ValueError(f'DATASETS.TEST: {dataset_name!r} is of evaluator type {kind!r}, supported is "sem_seg"')
        names, words = MetadataCatalog.get(dataset_name).get("stuff_classes", []), cfg.MODEL.SPAR.VOCABULARY
        if words and (count := len(Vocabulary.load(words))) != len(names):
            raise ValueError(
                f"MODEL.SPAR.VOCABULARY has {count} classes and {dataset_name!r} {len(names)}: "
                "each class of the data set needs one of the vocabulary's, in its order"
            )
        return SemanticEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))
