"""Trains, evaluates and visualizes linear probes of several encoders or inference modes."""

from __future__ import annotations

import functools
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
from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.evaluate import evaluate_methods
from spar_d2.comparison.methods import Method, Result, markdown_table
from spar_d2.comparison.tables import Score
from spar_d2.data.images import read_rgb
from spar_d2.data.semantic_mapper import image_mapper
from spar_d2.encoders.trainable import parameter_counts
from spar_d2.encoders.weights import source_checksum
from spar_d2.engine.interrupt import Interrupted
from spar_d2.modeling.build import precision_from_config
from spar_d2.modeling.linear_probe import check_classes
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.probing.feature_loader import check_probing
from spar_d2.probing.feature_store import stamp
from spar_d2.probing.trainer import ProbeTrainer
from spar_d2.utils.content_cache import ContentCache, digest
from spar_d2.utils.io import write_json
from spar_d2.utils.label_values import VALUES, read_label_map
from spar_d2.visualization import draw_panels

logger = logging.getLogger(__name__)

ROWS = ("single_pass", "sliding_window", "student")
_RECORD = "probe.json"
_FINAL = "model_final.pth"


@dataclass(frozen=True)
class Probe:
    """A trained probe.

    Attributes:
        method: row of the table, with the weights of the whole model.
        trained, frozen: numbers of trained and frozen parameters.
    """

    method: Method
    trained: int
    frozen: int


def probe_methods(cfg: CfgNode, rows: Sequence[str] | None, student: str) -> dict[str, Method]:
    """Return the methods to probe, by row name.

    Args:
        cfg: config that defines the stride of the sliding window.
        rows: names out of ``ROWS``; None for all, with the student if one is given.
        student: weight file of a distilled student; "" for none.

    Raises:
        ValueError: the student's row is requested without a student.
        FileNotFoundError: the file does not exist.
    """
    if "student" in (rows or ()) and not student:
        raise ValueError("--rows student needs the student's weights: --student FILE")
    if student and not Path(student).is_file():
        raise FileNotFoundError(f"--student: {student} does not exist")
    sliding = ("MODEL.SPAR.INFERENCE", "sliding_window")
    methods = {
        "single_pass": Method("pre-trained, single pass"),
        "sliding_window": Method(f"pre-trained, sliding window, stride {cfg.SPAR.TEACHER.STRIDE}", sliding),
        "student": Method("SPAR student, single pass", ("MODEL.WEIGHTS", student)),
    }
    return {row: methods[row] for row in rows or ROWS if row != "student" or student}


def check_rows(cfg: CfgNode) -> None:
    """Validate a config before probes are trained.

    Raises:
        ValueError: a config key is invalid.
        FileNotFoundError: a data set does not exist.
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
            raise ValueError(f"{key} must be {needed!r} here, got {value!r}: rows may only differ in what they probe")
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        if not names:
            raise ValueError(f"{key} must name a data set, got {names!r}")
    check_classes(cfg)
    check_probing(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)


def train_probe(cfg: CfgNode, method: Method, folder: Path, resume: bool) -> Probe:
    """Train a probe in its own folder, unless it is already trained with the same settings.

    Args:
        cfg: config shared by all rows.
        method: overrides of this row.
        folder: folder of its checkpoints.
        resume: resume from the last checkpoint, if its settings are the same.

    Raises:
        Interrupted: the user stopped the training; checkpoints are kept.
        ValueError, FileNotFoundError, RuntimeError: as the trainer.
    """
    config = cfg.clone()
    config.defrost()
    config.merge_from_list([*method.overrides, "OUTPUT_DIR", str(folder)])
    # All rows are evaluated together after training.
    config.DATASETS.TEST = ()
    folder.mkdir(parents=True, exist_ok=True)
    identity, previous = _identity(config), ContentCache(folder).load(_RECORD, dict) or {}
    same = previous.get("identity") == identity
    trained = replace(method, weights=str(folder / _FINAL))
    if same and previous.get("finished") and (folder / _FINAL).is_file():
        logger.info("%s: already trained, in %s", method.name, folder)
        return Probe(trained, previous["trained"], previous["frozen"])
    if resume and not same and (folder / LAST).is_file():
        logger.warning("%s: %s has a probe with other settings; --resume starts over", method.name, folder)
    # The initial weights must not depend on previous rows.
    seed_all_rng(config.SEED if config.SEED >= 0 else None)
    trainer = ProbeTrainer(config)
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
    """Evaluate probes on all data sets of ``DATASETS.TEST``, see :func:`spar_d2.comparison.evaluate.evaluate_methods`.

    Results are stored in ``folder`` and reused; interrupted evaluations are resumed.
    """
    return evaluate_methods(cfg, [probe.method for probe in probes], list(cfg.DATASETS.TEST), folder)


def probe_table(probes: Sequence[Probe], scores: Sequence[Score]) -> str:
    """Format the results as Markdown, with one table per data set, and the numbers of parameters.

    Speed-ups are relative to the sliding window, or to the first row if there is none.
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
    """Collect all numbers for a JSON file: one record for each row and data set."""
    counts = {p.method.name: {"trained parameters": p.trained, "frozen parameters": p.frozen} for p in probes}
    return [{**score.plain(), **counts[score.method]} for score in scores]


@torch.no_grad()
def draw_probes(cfg: CfgNode, probes: Mapping[str, Probe], path: Path, count: int = 3) -> None:
    """Draw images, ground truth and the predictions of all probes side by side.

    Args:
        cfg: config whose first test data set is drawn, which must have "stuff_colors" in its metadata.
        probes: probes by title.
        path: output file.
        count: number of images, evenly distributed over the data set.
    """
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    colors = metadata.get("stuff_colors")
    if not colors:
        logger.warning("%s has no colors (stuff_colors): no figure is drawn", dataset)
        return
    # Ignored pixels are black.
    palette = np.zeros((2**16, 3), dtype=np.uint8)
    palette[: len(colors)] = colors
    all_records = DatasetCatalog.get(dataset)
    records = all_records[:: -(-len(all_records) // count)]
    mapper = image_mapper(cfg, is_train=False)
    columns = [
        [read_rgb(record["file_name"]) for record in records],
        [palette[read_label_map(record)] for record in records],
    ]
    for probe in probes.values():
        model = build_segmentor(cfg, probe.method.weights, probe.method.overrides)
        outputs = [model([mapper(record)])[0]["sem_seg_labels"] for record in records]
        columns.append([palette[labels.cpu().numpy()] for labels in outputs])
    legend = dict(zip(metadata.stuff_classes, colors)) if len(colors) <= 28 else None
    draw_panels(list(zip(*columns)), ["image", "ground truth", *probes], path, legend)


def _identity(cfg: CfgNode) -> str:
    """Cache key of a trained probe: differs if its weights may differ."""
    config = cfg.clone()
    config.defrost()
    spar = config.MODEL.SPAR
    read = functools.cache(source_checksum)
    sources = (config.MODEL.WEIGHTS, spar.ENCODER, spar.PRETRAINED, spar.DINOV3_BACKBONE)
    weights = [read(source) for source in sources]
    spar.PRECISION = precision_from_config(config)
    # Clear settings that do not affect the weights.
    config.MODEL.WEIGHTS = config.MODEL.DEVICE = config.OUTPUT_DIR = spar.TEXT_CACHE = config.SPAR.PROBE.CACHE_DIR = ""
    config.DATALOADER.NUM_WORKERS = config.SOLVER.CHECKPOINT_PERIOD = config.SPAR.KEEP_CHECKPOINTS = 0
    config.INPUT.MIN_SIZE_TEST = config.INPUT.MAX_SIZE_TEST = config.SPAR.TEACHER.BATCH_SIZE = 0
    if spar.INFERENCE != "sliding_window":
        config.SPAR.TEACHER.WINDOW = config.SPAR.TEACHER.STRIDE = 0
    for node in (config.TEST, config.SPAR.TEST):
        node.clear()
    # They only name data sets and set other keys.
    config.SPAR.DATA.REGISTER, config.SPAR.DATA.EPOCHS = (), 0
    filter_empty = config.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = cast("list[dict]", get_detection_dataset_dicts(config.DATASETS.TRAIN, filter_empty=filter_empty))
    files = [stamp(record[key]) for record in records for key in ("file_name", "sem_seg_file_name")]
    # Label values of data-set files, which are the same in all records of a data set.
    values = sorted({str(record[VALUES]) for record in records if VALUES in record})
    return digest("\n".join([config.dump(), *weights, *files, *values]))[:16]
