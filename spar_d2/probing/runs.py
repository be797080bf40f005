"""Linear probes of several encoders or ways to use them: each trained once, evaluated, and drawn side by side."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.env import seed_all_rng

from spar_d2.checkpoint.checkpointer import LAST
from spar_d2.comparison.evaluate import evaluate_methods
from spar_d2.comparison.methods import Method, Result, build_method, markdown_table
from spar_d2.comparison.tables import Score
from spar_d2.data.images import read_rgb
from spar_d2.data.semantic_mapper import ImageMapper
from spar_d2.encoders.trainable import parameter_counts
from spar_d2.encoders.weights import source_checksum
from spar_d2.engine.interrupt import Interrupted
from spar_d2.modeling.build import precision_from_config
from spar_d2.modeling.linear_probe import check_classes
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.probing.feature_loader import check_probing
from spar_d2.probing.feature_store import stamp
from spar_d2.probing.trainer import ProbeTrainer
from spar_d2.utils.images import read_labels
from spar_d2.utils.io import write_json
from spar_d2.visualization import draw_panels

logger = logging.getLogger(__name__)

ROWS = ("single_pass", "sliding_window", "student")
_RECORD = "probe.json"
_FINAL = "model_final.pth"


@dataclass(frozen=True)
class Probe:
    """One trained probe.

    Attributes:
        method: its row of the table, with the weights of the whole model.
        trained, frozen: numbers of parameters.
    """

    method: Method
    trained: int
    frozen: int


def probe_methods(cfg: CfgNode, rows: Sequence[str] | None, student: str) -> dict[str, Method]:
    """What is probed, by the names of rows.

    Args:
        cfg: says the stride of the sliding window.
        rows: out of ``ROWS``; None: all, the student's where there is one.
        student: file of a distilled student; "" for none.

    Raises:
        ValueError: the student's row without a student.
        FileNotFoundError: there is no such file.
    """
    if "student" in (rows or ()) and not student:
        raise ValueError("--rows student needs the student's weights: --student FILE")
    if student and not Path(student).is_file():
        raise FileNotFoundError(f"--student: there is no file {student}")
    sliding = ("MODEL.SPAR.INFERENCE", "sliding_window")
    known = {
        "single_pass": Method("pre-trained, single pass"),
        "sliding_window": Method(f"pre-trained, sliding window, stride {cfg.SPAR.TEACHER.STRIDE}", sliding),
        "student": Method("SPAR student, single pass", ("MODEL.WEIGHTS", student)),
    }
    return {row: known[row] for row in rows or ROWS if row != "student" or student}


def check_rows(cfg: CfgNode) -> None:
    """Find out before hours of work what is wrong with a config to compare probes with.

    Raises:
        ValueError: a key that is wrong.
        FileNotFoundError: a data set is not there.
    """
    model = cfg.MODEL
    conditions = {
        "MODEL.META_ARCHITECTURE": (model.META_ARCHITECTURE, ProbeSegmentor.__name__),
        "MODEL.SPAR.INFERENCE": (model.SPAR.INFERENCE, "single_pass"),
        "MODEL.WEIGHTS": (model.WEIGHTS, ""),
        "SPAR.EMA_DECAY": (cfg.SPAR.EMA_DECAY, 0.0),
    }
    for key, (value, needed) in conditions.items():
        if value != needed:
            raise ValueError(f"{key} must be {needed!r} here, got {value!r}: rows differ in what they probe alone")
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        if not names:
            raise ValueError(f"{key} must name a data set, got {names!r}")
    check_classes(cfg)
    check_probing(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)


def train_probe(cfg: CfgNode, method: Method, folder: Path, resume: bool) -> Probe:
    """Train a probe in a folder of its own, unless that is done and nothing changed.

    Args:
        cfg: of all rows.
        method: what this one differs in.
        folder: for its checkpoints.
        resume: go on from the last checkpoint, where it is of the same settings.

    Raises:
        Interrupted: the user stopped it; what there is is kept.
        ValueError, FileNotFoundError, RuntimeError: as the trainer does.
    """
    own = cfg.clone()
    own.defrost()
    own.merge_from_list([*method.overrides, "OUTPUT_DIR", str(folder)])
    # Rows are evaluated together, afterwards.
    own.DATASETS.TEST = ()
    folder.mkdir(parents=True, exist_ok=True)
    identity, before = _identity(own), _read(folder / _RECORD)
    same = before.get("identity") == identity
    trained = replace(method, weights=str(folder / _FINAL))
    if same and before.get("finished") and (folder / _FINAL).is_file():
        logger.info("%s: trained already, in %s", method.name, folder)
        return Probe(trained, before["trained"], before["frozen"])
    if resume and not same and (folder / LAST).is_file():
        logger.warning("%s: --resume finds a probe of other settings in %s, and begins anew", method.name, folder)
    # The probe's first weights must not depend on the rows before.
    seed_all_rng(own.SEED if own.SEED >= 0 else None)
    trainer = ProbeTrainer(own)
    count, total = parameter_counts(trainer.model)
    record = {"identity": identity, "trained": count, "frozen": total - count}
    trainer.resume_or_load(resume=resume and same)
    write_json(record, folder / _RECORD)
    trainer.train()
    if trainer.iter < trainer.max_iter:
        raise Interrupted(f"stopped while training {method.name}")
    write_json({**record, "finished": True}, folder / _RECORD)
    return Probe(trained, record["trained"], record["frozen"])


def evaluate_probes(cfg: CfgNode, probes: Sequence[Probe], folder: Path) -> list[Score]:
    """Scores on every data set of ``DATASETS.TEST``, see :func:`spar_d2.comparison.evaluate.evaluate_methods`.

    What was evaluated before is kept in ``folder``; an evaluation that was stopped goes on where it was.
    """
    return evaluate_methods(cfg, [probe.method for probe in probes], list(cfg.DATASETS.TEST), folder)


def probe_table(probes: Sequence[Probe], scores: Sequence[Score]) -> str:
    """The rows in Markdown, a table for each data set, and what was trained.

    Speed-ups are relative to the sliding window, or else to the first row.
    """
    by_dataset: dict[str, list[Result]] = {}
    for score in scores:
        result = Result(Method(score.method), score.scores, [score.seconds_per_image])
        by_dataset.setdefault(score.dataset, []).append(result)
    parts = []
    for dataset, results in by_dataset.items():
        sliding = next((result for result in results if "sliding window" in result.method.name), results[0])
        images = next(score.images for score in scores if score.dataset == dataset)
        parts += [f"Linear probes on {dataset} ({images} images):", markdown_table(results, sliding)]
    counts = [f"- {p.method.name}: {p.trained:,} parameters trained, {p.frozen:,} frozen" for p in probes]
    return "\n\n".join([*parts, "\n".join(counts)])


def probe_summary(probes: Sequence[Probe], scores: Sequence[Score]) -> list[dict]:
    """All numbers, for a JSON file: one record for each row and data set."""
    counts = {p.method.name: {"trained parameters": p.trained, "frozen parameters": p.frozen} for p in probes}
    return [{**score.plain(), **counts[score.method]} for score in scores]


@torch.no_grad()
def draw_probes(cfg: CfgNode, probes: Mapping[str, Probe], path: Path, count: int = 3) -> None:
    """Write a picture: images, their true classes and what every probe says, side by side.

    Args:
        cfg: its first test data set is drawn; without "stuff_colors" in its metadata there is no picture.
        probes: by their titles.
        path: file to write.
        count: images, spread evenly over the data set.
    """
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    colors = metadata.get("stuff_colors")
    if not colors:
        logger.warning("%s has no colors (stuff_colors): no picture is drawn", dataset)
        return
    # What has no class is black.
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colors)] = colors
    every = DatasetCatalog.get(dataset)
    records = every[:: -(-len(every) // count)]
    mapper = ImageMapper(cfg, is_train=False)  # pyright: ignore[reportCallIssue]  # @configurable takes a config
    columns = [
        [read_rgb(record["file_name"]) for record in records],
        [palette[read_labels(record["sem_seg_file_name"])] for record in records],
    ]
    for probe in probes.values():
        model = build_method(cfg, probe.method)
        outputs = [model([mapper(record)])[0]["sem_seg_labels"] for record in records]
        columns.append([palette[labels.cpu().numpy()] for labels in outputs])
    legend = dict(zip(metadata.stuff_classes, colors)) if len(colors) <= 28 else None
    draw_panels(list(zip(*columns)), ["image", "ground truth", *probes], path, legend)


def _identity(cfg: CfgNode) -> str:
    """Text that differs where a trained probe may."""
    own = cfg.clone()
    own.defrost()
    spar = own.MODEL.SPAR
    read = functools.cache(source_checksum)
    sources = (own.MODEL.WEIGHTS, spar.ENCODER, spar.PRETRAINED, spar.DINOV3_BACKBONE)
    weights = [read(source) for source in sources]
    spar.PRECISION = precision_from_config(own)
    # What changes no weight.
    own.MODEL.WEIGHTS = own.MODEL.DEVICE = own.OUTPUT_DIR = spar.TEXT_CACHE = own.SPAR.PROBE.CACHE_DIR = ""
    own.DATALOADER.NUM_WORKERS = own.SOLVER.CHECKPOINT_PERIOD = own.SPAR.KEEP_CHECKPOINTS = 0
    own.INPUT.MIN_SIZE_TEST = own.INPUT.MAX_SIZE_TEST = own.SPAR.TEACHER.BATCH_SIZE = 0
    if spar.INFERENCE != "sliding_window":
        own.SPAR.TEACHER.WINDOW = own.SPAR.TEACHER.STRIDE = 0
    for node in (own.TEST, own.SPAR.TEST):
        node.clear()
    filter_empty = own.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = cast("list[dict]", get_detection_dataset_dicts(own.DATASETS.TRAIN, filter_empty=filter_empty))
    files = [stamp(record[key]) for record in records for key in ("file_name", "sem_seg_file_name")]
    return hashlib.sha256("\n".join([own.dump(), *weights, *files]).encode()).hexdigest()[:16]


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s); beginning anew", path, error)
        return {}
    return record if isinstance(record, dict) else {}
