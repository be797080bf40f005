"""Inference modes, their scores and their run times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.progress import Progress
from spar_d2.data.build import test_loader
from spar_d2.evaluation import SemanticEvaluator
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA
from spar_d2.utils.tables import format_table


@dataclass(frozen=True)
class Method:
    """A row of a comparison.

    Attributes:
        name: name in the table.
        overrides: alternating config keys and values, as on a command line.
        weights: encoder weights to load instead of the pre-trained ones; "" for none.
    """

    name: str
    overrides: Sequence = ()
    weights: str = ""


@dataclass
class Result:
    """Result of a method.

    Attributes:
        method: the method.
        scores: scores of the evaluator, in percent.
        seconds: run time of the model for each image.
    """

    method: Method
    scores: dict[str, float]
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_image(self) -> float:
        """Median run time per image, which is robust to outliers on a busy machine."""
        return statistics.median_high(self.seconds)


def build_teacher_encode(cfg: CfgNode) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build a function from images (3, H, W), 0..255, to the teacher's features (D, h, w), with pre-trained weights."""
    spar = {"INFERENCE": "teacher", "OUTPUT": "features", "TRAINABLE": "none"}
    overrides = [part for key, value in spar.items() for part in (f"MODEL.SPAR.{key}", value)]
    return build_segmentor(cfg, overrides=overrides).encode


@torch.no_grad()
def measure(
    cfg: CfgNode,
    dataset: str,
    method: Method,
    model: OpenVocabularySegmentor | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    boundary_iou: bool = False,
) -> Result:
    """Evaluate and time a method on a data set.

    Args:
        cfg: config that defines how images are loaded, and whether test-time augmentation is used
            (``TEST.AUG.ENABLED``).
        dataset: name of a registered data set.
        method: method to evaluate.
        model: model of the method; built if not given.
        limit: maximum number of images.
        progress: stores intermediate results, so that an interrupted evaluation can be resumed.
        boundary_iou: also compute the boundary IoU.
    """
    records = DatasetCatalog.get(dataset)[:limit]
    if model is None:
        model = build_segmentor(cfg, method.weights, method.overrides)
    inference_model = SegmentorWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model
    evaluator = SemanticEvaluator(dataset, distributed=False, boundary_iou=boundary_iou)
    result = Result(method, {})
    if progress:
        result.seconds += progress.restore(evaluator)
    done = len(result.seconds)
    loader = test_loader(cfg, records[done:])
    bar = tqdm(loader, desc=f"{method.name}, {dataset}", unit="image", initial=done, total=len(records))
    consistent = True
    try:
        for index, inputs in enumerate(bar):
            if index == 0:
                inference_model(inputs)  # warm up and compute the text embeddings
            _synchronize(model)
            started = time.perf_counter()
            outputs = inference_model(inputs)
            _synchronize(model)
            seconds = time.perf_counter() - started
            consistent = False
            evaluator.process(inputs, outputs)
            result.seconds.append(seconds)
            consistent = True
            if progress:
                progress.keep(evaluator, result.seconds)
    except KeyboardInterrupt:
        # Do not store progress if the evaluator was interrupted within an image.
        if progress and consistent:
            progress.keep(evaluator, result.seconds, now=True)
        raise
    scores = evaluator.evaluate()
    assert scores is not None  # None only in other processes
    result.scores = scores["sem_seg"]
    return result


def _synchronize(model: OpenVocabularySegmentor) -> None:
    if model.pixel_mean.is_cuda:
        torch.cuda.synchronize(model.pixel_mean.device)


def markdown_table(results: Sequence[Result], baseline: Result) -> str:
    """Format scores and run times as a Markdown table. Speed-ups are relative to ``baseline``."""
    rows = []
    for result in results:
        scores, seconds = [f"{result.scores[name]:.1f}" for name in ("mIoU", "pACC")], result.seconds_per_image
        rows.append([result.method.name, *scores, f"{seconds:.3f}", f"{baseline.seconds_per_image / seconds:.1f}x"])
    return format_table(["method", "mIoU", "pixel accuracy", "seconds per image", "speed-up"], rows)
