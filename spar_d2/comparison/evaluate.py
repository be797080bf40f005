"""Evaluates inference modes on several data sets, and stores finished results."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.methods import Method, measure
from spar_d2.comparison.progress import Progress
from spar_d2.comparison.protocol import config_for
from spar_d2.comparison.tables import Score
from spar_d2.encoders.weights import source_checksum
from spar_d2.modeling.build import precision_from_config, teacher_from_config
from spar_d2.teacher.keys import result_key
from spar_d2.utils.content_cache import ContentCache, digest
from spar_d2.utils.io import signature, write_json
from spar_d2.utils.label_values import VALUES

logger = logging.getLogger(__name__)

FINISHED = "finished.json"


def evaluate_methods(
    cfg: CfgNode, methods: Sequence[Method], datasets: Sequence[str], folder: Path, limit: int | None = None
) -> list[Score]:
    """Evaluate every method on every data set, with the protocol of each data set.

    Results are stored in ``folder``/finished.json and reused as long as their inputs do not change. Interrupted
    evaluations are resumed.

    Args:
        cfg: config of the segmentor.
        methods: methods to compare, the rows of the table.
        datasets: names of registered data sets.
        folder: output folder.
        limit: maximum number of images per data set.

    Raises:
        ValueError, FileNotFoundError: as :func:`spar_d2.comparison.protocol.config_for` and the data sets.
    """
    configs = {name: config_for(cfg, name) for name in datasets}
    # Load all data sets first, so that missing ones are reported immediately.
    contents = {name: _content(name, DatasetCatalog.get(name)[:limit]) for name in datasets}
    # The checksums of weights are needed for every data set.
    read_once = functools.cache(source_checksum)
    finished = ContentCache(folder).load(FINISHED, lambda records: list(map(Score.from_plain, records))) or []
    stored = {score.identity: score for score in finished}
    scores = []
    for method in methods:
        model, teacher = None, _teacher(cfg, method)
        for name, config in configs.items():
            identity = _identity(config, method, contents[name] + teacher, read_once)
            if identity not in stored:
                model = model or build_segmentor(cfg, method.weights, method.overrides)
                progress = Progress(folder / f"unfinished_{identity}.safetensors", identity)
                with model.configured(config):
                    result = measure(config, name, method, model, limit, progress)
                numbers = (len(result.seconds), result.scores, result.seconds_per_image)
                stored[identity] = Score(method.name, name, identity, *numbers)
                write_json([score.plain() for score in stored.values()], folder / FINISHED)
                progress.finish()
            scores.append(stored[identity])
            logger.info("%s, %s: mIoU %.2f", method.name, name, scores[-1].scores["mIoU"])
    return scores


def _teacher(cfg: CfgNode, method: Method) -> str:
    """Key of the teacher that computes the features of a method; "" for none."""
    config = _overridden(cfg, method)
    return result_key(teacher_from_config(config)) if config.MODEL.SPAR.INFERENCE == "teacher" else ""


def _overridden(cfg: CfgNode, method: Method) -> CfgNode:
    config = cfg.clone()
    config.defrost()
    config.merge_from_list(list(method.overrides))
    return config


def _identity(cfg: CfgNode, method: Method, content: str, read: Callable[[str], str]) -> str:
    """Cache key of an evaluation: differs if its results may differ."""
    config = _overridden(cfg, method)
    spar = config.MODEL.SPAR
    spar.PRECISION = precision_from_config(config)
    # Clear settings that do not affect the results.
    spar.TEXT_CACHE = config.MODEL.DEVICE = config.MODEL.WEIGHTS = ""
    config.SPAR.TEACHER.BATCH_SIZE = 0
    nodes = [config.MODEL, config.INPUT, config.DATASETS.TEST, config.TEST.AUG]
    if spar.INFERENCE == "sliding_window":
        nodes.append(config.SPAR.TEACHER)
    files = [spar.ENCODER, spar.PRETRAINED, spar.DINOV3_BACKBONE, spar.VOCABULARY, spar.TEMPLATES, method.weights]
    if spar.REFINE:
        files += [spar.ANYUP, spar.REFINE_ENCODER, spar.REFINE_PRETRAINED]
    return digest("\n".join([*map(str, nodes), *map(read, files), content]))[:16]


def _content(name: str, records: list[dict]) -> str:
    """Checksum of a data set's classes, and of the names, sizes and times of its files."""
    unlabeled = next((record["file_name"] for record in records if "sem_seg_file_name" not in record), None)
    if unlabeled is not None:
        raise ValueError(
            f"{name}: {unlabeled} has no label map (sem_seg_file_name); inference modes are compared on semantic "
            "segmentation data sets"
        )
    files = (record[key] for record in records for key in ("file_name", "sem_seg_file_name"))
    lines = [" ".join(map(str, (file, *signature(file)))) for file in files]
    metadata = MetadataCatalog.get(name)
    classes = [str(metadata.get(key)) for key in ("stuff_classes", "vocabulary", "ignore_label")]
    values = sorted({str(record[VALUES]) for record in records if VALUES in record})
    return digest("\n".join([*lines, *classes, *values]))
