"""Ways of inference side by side: how well they segment, and how long they take."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.modeling import build_model
from torch.utils.data import DataLoader
from tqdm import tqdm

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.comparison.progress import Progress
from spar_d2.data.build import pinned
from spar_d2.data.semantic_mapper import ImageMapper
from spar_d2.evaluation import SemanticEvaluator
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: shown in the table.
        overrides: config keys and values in turn, as on a command line.
        weights: encoder weights to load in place of the pre-trained ones; "" for none.
    """

    name: str
    overrides: Sequence = ()
    weights: str = ""


@dataclass
class Result:
    """What was measured for a method.

    Attributes:
        scores: of the evaluator, in percent.
        seconds: of the model alone, per image, in order.
    """

    method: Method
    scores: dict[str, float]
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_image(self) -> float:
        """Median: a busy machine stretches single images."""
        return statistics.median_high(self.seconds)


def build_method(cfg: CfgNode, method: Method) -> OpenVocabularySegmentor:
    """The segmentor of a config under a method's overrides and weights, for inference alone: its encoder is frozen."""
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.merge_from_list(list(method.overrides))
    model = build_model(cfg).eval()
    if method.weights:
        Checkpointer(model).load(method.weights)
    model.backbone.encoder.freeze()
    return model


def build_teacher_encode(cfg: CfgNode) -> Callable[[torch.Tensor], torch.Tensor]:
    """From an image (3, H, W), 0..255, to the teacher's dense features (D, h, w), by a config's pre-trained model."""
    teacher = [
        "MODEL.SPAR.INFERENCE",
        "sliding_window",
        "MODEL.SPAR.OUTPUT",
        "features",
        "MODEL.SPAR.TRAINABLE",
        "none",
    ]
    return build_method(cfg, Method("teacher", teacher)).encode


@torch.no_grad()
def measure(
    cfg: CfgNode,
    dataset: str,
    method: Method,
    model: OpenVocabularySegmentor | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Evaluate a method on a data set, and time it.

    Args:
        cfg: says how images are read and tested; with ``TEST.AUG.ENABLED`` in several views.
        dataset: a registered name.
        method: a row of a comparison.
        model: what :func:`build_method` gave for it; built if not given.
        limit: only so many images, the first ones.
        progress: keeps what was done, so that a run that is stopped goes on from there.
    """
    records = DatasetCatalog.get(dataset)[:limit]
    if model is None:
        model = build_method(cfg, method)
    tested = SegmentorWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model
    evaluator = SemanticEvaluator(dataset, distributed=False)
    result = Result(method, {})
    if progress:
        result.seconds += progress.restore(evaluator)
    done = len(result.seconds)
    mapper = ImageMapper(cfg, is_train=False)  # pyright: ignore[reportCallIssue]  # @configurable takes a config
    # @configurable hides its arguments and what it returns.
    build_loader = cast("Callable[..., DataLoader]", build_detection_test_loader)
    loader = build_loader(dataset=records[done:], mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
    bar = tqdm(pinned(loader), desc=f"{method.name}, {dataset}", unit="image", initial=done, total=len(records))
    whole = True
    try:
        for index, inputs in enumerate(bar):
            if index == 0:
                tested(inputs)  # computes the vectors of the words and warms up
            _wait(model)
            started = time.perf_counter()
            outputs = tested(inputs)
            _wait(model)
            seconds = time.perf_counter() - started
            whole = False
            evaluator.process(inputs, outputs)
            result.seconds.append(seconds)
            whole = True
            if progress:
                progress.keep(evaluator, result.seconds)
    except KeyboardInterrupt:
        # Half an image must not be gone on from.
        if progress and whole:
            progress.keep(evaluator, result.seconds, now=True)
        raise
    scores = evaluator.evaluate()
    assert scores is not None  # only in other processes
    result.scores = scores["sem_seg"]
    return result


def _wait(model: OpenVocabularySegmentor) -> None:
    if model.pixel_mean.is_cuda:
        torch.cuda.synchronize(model.pixel_mean.device)


def markdown_table(results: Sequence[Result], baseline: Result) -> str:
    """A table of scores and times; speed-ups are relative to ``baseline``."""
    lines = ["| method | mIoU | pixel accuracy | seconds per image | speed-up |", "|---|---:|---:|---:|---:|"]
    for result in results:
        ratio = baseline.seconds_per_image / result.seconds_per_image
        lines.append(
            f"| {result.method.name} | {result.scores['mIoU']:.1f} | {result.scores['pACC']:.1f} "
            f"| {result.seconds_per_image:.3f} | {ratio:.1f}x |"
        )
    return "\n".join(lines)
