"""``DefaultTrainer`` with this project's data loaders, optimizer, train step, evaluators and hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import weakref
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.utils.data import DataLoader

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.checkpoint.periodic import Checkpoints
from spar_d2.comparison.methods import build_teacher_encode
from spar_d2.comparison.protocol import check_vocabulary, config_for, with_test_set
from spar_d2.data.build import PANOPTIC, build_labeled_loader, build_photo_loader, check_panoptic, pinned
from spar_d2.data.loaders import TrainLoader
from spar_d2.data.samplers import SampleIndex
from spar_d2.data.semantic_mapper import image_mapper
from spar_d2.distillation import DistillationHook
from spar_d2.distillation.fill_cache import check_room
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.encoders.origin import Origin
from spar_d2.engine import resumption
from spar_d2.engine.checks import check_config, check_outputs, check_sides, mixed_precision
from spar_d2.engine.ema import ModelEma
from spar_d2.engine.feature_pictures import FeaturePictures
from spar_d2.engine.hooks import (
    AfterBackward,
    DistillationPrinter,
    PatientWriter,
    ProgressBar,
    StepSeed,
    StudentWriter,
    TimeEstimate,
)
from spar_d2.engine.interrupt import Interrupted, StopOnInterrupt
from spar_d2.engine.solver import build_optimizer, count_parameters
from spar_d2.engine.train_step import TrainStep
from spar_d2.evaluation import FeatureEvaluator, PanopticEvaluator, SemanticEvaluator
from spar_d2.modeling.build import encoder_spec
from spar_d2.modeling.mask_transformer import MaskTransformer
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA
from spar_d2.utils.errors import short_tracebacks
from spar_d2.utils.io import file_lock, remove_leftovers

logger = logging.getLogger(__name__)

STUDENT_FILE = "student.safetensors"


class Trainer(DefaultTrainer):
    """Trains and evaluates the model of a config.

    With ``SPAR.DISTILL.ENABLED``, it distills on images (``SPAR.DATA``) and writes the student to ``OUTPUT_DIR``.
    Otherwise, it trains like ``DefaultTrainer``, with this project's optimizer and train step.

    A run can be stopped at any time and resumed with the same result: the random numbers and images of each step depend
    only on the seed and the iteration. With ``SEED`` -1, a random seed is chosen and stored in checkpoints.

    Raises:
        ValueError: a config value is invalid; the message contains its key.
    """

    # Properties in Detectron2.
    model: nn.Module
    data_loader: TrainLoader
    _last_eval_results: dict

    def __init__(self, cfg: CfgNode) -> None:
        check_config(cfg)
        for name in cfg.DATASETS.TEST:
            # Fail before training, not after it, if an evaluator cannot be built.
            self.build_evaluator(cfg, name)
        # Skip DefaultTrainer.__init__: it supports neither gradient accumulation nor several processes on CPUs.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        if comm.is_main_process():
            remove_leftovers(cfg.OUTPUT_DIR)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        logger.info("Parameters:\n%s", count_parameters(model))
        loader = self.build_train_loader(cfg)
        if loader.photos is not None:
            check_sides(cfg, find_encoder(model).patch_size)
        devices: dict[str, Any] = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._trainer = TrainStep(model, loader, optimizer, cfg.SPAR.ACCUMULATION_STEPS, *mixed_precision(cfg))
        self._trainer.max_iter = self.max_iter
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())
        self._trainer.register_hooks([AfterBackward(self)])
        self._check_cache()
        self._set_seed(cfg.SEED if cfg.SEED >= 0 else cast(int, comm.shared_random_seed()))

    def build_hooks(self) -> list[HookBase | None]:
        cfg, distill = self.cfg, self.cfg.SPAR.DISTILL.ENABLED
        if distill and not cfg.MODEL.SPAR.PRETRAINED:
            logger.warning(
                "MODEL.SPAR.PRETRAINED is empty: the teacher has random weights, so distillation is meaningless"
            )
        self._distillation: DistillationHook | None = cast(Any, DistillationHook)(cfg) if distill else None
        if self._distillation:
            encoder, teacher = find_encoder(self._module), self._distillation.teacher
            origin = encoder.origin or Origin()
            sliding = {name: getattr(teacher, name, None) for name in ("window", "stride")}
            kind, photos = cfg.SPAR.TEACHER.KIND, self.data_loader.photos
            images = len(photos) if photos else None
            kind = "" if kind == "sliding" else kind
            encoder.origin = dataclasses.replace(origin, **sliding, teacher=kind, images=images)
        ema = ModelEma(self._module, cfg.SPAR.EMA_DECAY) if cfg.SPAR.EMA_DECAY else None
        applied = ema.applied if ema else contextlib.nullcontext

        def evaluate() -> dict:
            with applied():
                self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        replacements = {
            EvalHook: lambda: EvalHook(cfg.TEST.EVAL_PERIOD, evaluate),
            PeriodicCheckpointer: lambda: Checkpoints(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SPAR.KEEP_CHECKPOINTS
            ),
        }
        hooks = [replacements[type(hook)]() if type(hook) in replacements else hook for hook in super().build_hooks()]
        # Write the student before the final evaluation, which may fail.
        student = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
        writer = StudentWriter(encoder_spec(cfg), student, applied) if distill else None
        # StopOnInterrupt is last, so that all other hooks finish the step before training stops.
        last_hooks = [TimeEstimate(), ProgressBar(), StopOnInterrupt(self.checkpointer)]
        return [StepSeed(self), self._distillation, ema, writer, self._pictures(), *hooks, *last_hooks]

    def _pictures(self) -> HookBase | None:
        photos, period = self.data_loader.photos, self.cfg.SPAR.PICTURE_PERIOD
        if self._distillation is None or not period or photos is None:
            return None
        folder = os.path.join(self.cfg.OUTPUT_DIR, "pictures")
        return FeaturePictures(
            cast(OpenVocabularySegmentor, self._module),
            self._distillation.target,
            lambda: photos[SampleIndex(0, 0, 0)],
            period,
            folder,
            self.cfg.INPUT.FORMAT,
        )

    def build_writers(self) -> list[EventWriter]:
        writers: list[EventWriter] = [PatientWriter(writer) for writer in super().build_writers()]
        return [*writers, DistillationPrinter()] if self.cfg.SPAR.DISTILL.ENABLED else writers

    @property
    def scores(self) -> dict:
        """Scores of the last evaluation; empty before the first one."""
        return getattr(self, "_last_eval_results", {})

    @property
    def _module(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        return getattr(self.model, "module", self.model)

    def _check_cache(self) -> None:
        cache, photos = self._distillation.cache if self._distillation else None, self.data_loader.photos
        if cache and photos is not None:
            if comm.is_main_process():
                check_room(photos, cache, find_encoder(self._module))
            if isinstance(self._module, OpenVocabularySegmentor):  # it does not modify images before encoding
                photos.look_up = cache.look_up()

    def _set_seed(self, seed: int) -> None:
        self.seed = seed
        if self._distillation:
            self._distillation.targets.seed = seed
        self.data_loader.set_seed(seed)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "seed": self.seed, "settings": resumption.settings(self.cfg)}

    def load_state_dict(self, state: dict) -> None:
        resumption.compare(state.get("settings", {}), self.cfg)
        if 0 <= self.cfg.SEED != state.get("seed", self.seed):
            logger.warning("--resume: using the seed %d of the run instead of SEED %d", state["seed"], self.cfg.SEED)
        super().load_state_dict(state)
        self._set_seed(state.get("seed", self.seed))

    def after_train(self) -> None:
        self._trainer.write_last_readings()
        super().after_train()

    def train(self):
        """Train from the start iteration. On Ctrl-C, write a checkpoint and return."""
        logger.info("Output folder: %s", os.path.abspath(self.cfg.OUTPUT_DIR))
        self.data_loader.start_at(self.start_iter)
        try:
            lock = file_lock(self.cfg.OUTPUT_DIR) if comm.is_main_process() else contextlib.nullcontext()
            with short_tracebacks("detectron2.engine.train_loop"), lock:
                if self.start_iter < self.max_iter:
                    self.data_loader = self.prepare_loader(self.data_loader)
                with self._frozen_blocks_cast():
                    return super().train()
        except Interrupted as stop:
            logger.info("Training %s", stop)
            return None

    def prepare_loader(self, loader: TrainLoader) -> TrainLoader:
        """Return the data loader for training; called after weights are loaded, before the first step.

        Subclasses may override it.
        """
        return loader

    def _frozen_blocks_cast(self) -> contextlib.AbstractContextManager:
        """Cast the frozen blocks of all encoders once, because their weights do not change in training."""
        encoders = [part for part in self._module.modules() if isinstance(part, DenseEncoder)]
        stack = contextlib.ExitStack()
        for encoder in encoders:
            stack.enter_context(encoder.frozen_blocks_cast())
        return stack

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`spar_d2.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        if not cfg.SPAR.DATA.IMAGES and cfg.MODEL.META_ARCHITECTURE != OpenVocabularySegmentor.__name__:
            # Models with their own losses need labels, with or without distillation.
            return build_labeled_loader(cfg, max(cfg.SEED, 0))
        return build_photo_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        check_panoptic(dataset_name)
        if cfg.MODEL.META_ARCHITECTURE != OpenVocabularySegmentor.__name__:
            return pinned(cast(DataLoader, super().build_test_loader(cfg, dataset_name)))
        # Detectron2's decorator hides the signature from type checkers.
        build = cast(Any, build_detection_test_loader)
        return pinned(build(cfg, dataset_name, mapper=image_mapper(cfg, is_train=False)))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if cfg.MODEL.SPAR.OUTPUT == "features":
            return FeatureEvaluator(functools.partial(build_teacher_encode, cfg))
        if cfg.MODEL.META_ARCHITECTURE != MaskTransformer.__name__:  # it is tested with the words of each data set
            check_vocabulary(cfg, dataset_name)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type") or ""
        check_outputs(cfg, dataset_name, kind)
        output = {
            "output_dir": os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
            "dump_predictions": cfg.SPAR.TEST.DUMP_PREDICTIONS,
        }
        if kind.endswith("panoptic_seg"):
            separate = cfg.MODEL.META_ARCHITECTURE in PANOPTIC
            return PanopticEvaluator(dataset_name, separate=separate, **output)
        if kind != "sem_seg":
            supported = '"sem_seg" or end in "panoptic_seg"'
            raise ValueError(f"DATASETS.TEST: the evaluator_type of {dataset_name!r} must be {supported}, got {kind!r}")
        return SemanticEvaluator(dataset_name, boundary_iou=cfg.SPAR.TEST.BOUNDARY_IOU, **output)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Evaluate like ``DefaultTrainer.test``, with the protocol of each data set and test-time augmentation.

        Returns:
            Scores of the data set, or a dict from data set names to scores if there are several.

        Raises:
            ValueError: config values are incompatible, see :func:`spar_d2.comparison.protocol.config_for`.
        """
        segmentor: Any = getattr(model, "module", model)
        if not isinstance(segmentor, (OpenVocabularySegmentor, MaskTransformer)) or evaluators is not None:
            return super().test(cfg, model, evaluators)
        results = {}
        for name in cfg.DATASETS.TEST:
            if isinstance(segmentor, MaskTransformer):
                dataset_cfg, tested, classes = with_test_set(cfg, name), model, segmentor.classes_of(name)
            else:
                dataset_cfg = config_for(cfg, name)
                tested = SegmentorWithTTA(cfg, segmentor) if cfg.TEST.AUG.ENABLED else model
                classes = segmentor.configured(dataset_cfg)
            with classes:
                results[name] = super().test(dataset_cfg, tested)
        return results if len(results) != 1 else results[cfg.DATASETS.TEST[0]]
