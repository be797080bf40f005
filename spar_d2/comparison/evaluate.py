"""Ways of inference on several data sets, kept as they are finished."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from spar_d2.comparison.methods import Method, build_method, measure
from spar_d2.comparison.progress import Progress
from spar_d2.comparison.protocol import config_for
from spar_d2.comparison.tables import Score
from spar_d2.encoders.weights import source_checksum
from spar_d2.modeling.build import precision_from_config
from spar_d2.utils.io import signature, write_json

logger = logging.getLogger(__name__)

FINISHED = "finished.json"


def evaluate_methods(
    cfg: CfgNode, methods: Sequence[Method], datasets: Sequence[str], folder: Path, limit: int | None = None
) -> list[Score]:
    """Evaluate every method on every data set, by each one's protocol.

    What is finished is kept in ``folder``/finished.json and is not done again, as long as it would come out the same;
    within a data set an evaluation that was stopped goes on where it was.

    Args:
        cfg: of the segmentor.
        methods: the rows of a table.
        datasets: registered names.
        folder: for everything written.
        limit: only so many images of each data set, the first ones.

    Raises:
        ValueError, FileNotFoundError: as :func:`spar_d2.comparison.protocol.config_for` and the data sets do.
    """
    configs = {name: config_for(cfg, name) for name in datasets}
    # One that is not there should not be found out after hours.
    contents = {name: _content(DatasetCatalog.get(name)[:limit]) for name in datasets}
    # The same weights are asked for again with every data set.
    read_once = functools.cache(source_checksum)
    kept = {score.identity: score for score in _read(folder / FINISHED)}
    scores = []
    for method in methods:
        model = None
        for name, own in configs.items():
            identity = _identity(own, method, contents[name], read_once)
            if identity not in kept:
                model = model or build_method(cfg, method)
                progress = Progress(folder / f"unfinished_{identity}.safetensors", identity)
                with model.configured(own):
                    result = measure(own, name, method, model, limit, progress)
                numbers = (len(result.seconds), result.scores, result.seconds_per_image)
                kept[identity] = Score(method.name, name, identity, *numbers)
                write_json([score.plain() for score in kept.values()], folder / FINISHED)
                progress.finish()
            scores.append(kept[identity])
            logger.info("%s, %s: mIoU %.2f", method.name, name, scores[-1].scores["mIoU"])
    return scores


def _read(path: Path) -> list[Score]:
    try:
        return [Score.from_plain(record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is damaged (%s); beginning anew", path, error)
        return []


def _identity(cfg: CfgNode, method: Method, content: str, read: Callable[[str], str]) -> str:
    """Text that differs where the numbers of an evaluation may."""
    own = cfg.clone()
    own.defrost()
    own.merge_from_list(list(method.overrides))
    spar = own.MODEL.SPAR
    spar.PRECISION = precision_from_config(own)
    # What changes no number.
    spar.TEXT_CACHE = own.MODEL.DEVICE = own.MODEL.WEIGHTS = ""
    own.SPAR.TEACHER.BATCH_SIZE = 0
    nodes = [own.MODEL, own.INPUT, own.DATASETS.TEST, own.TEST.AUG]
    if spar.INFERENCE == "sliding_window":
        nodes.append(own.SPAR.TEACHER)
    files = (spar.ENCODER, spar.PRETRAINED, spar.DINOV3_BACKBONE, spar.VOCABULARY, spar.TEMPLATES, method.weights)
    text = "\n".join([*map(str, nodes), *map(read, files), content])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(records: list[dict]) -> str:
    """Text that changes with the files of a data set."""
    files = (record[key] for record in records for key in ("file_name", "sem_seg_file_name"))
    lines = (" ".join(map(str, (file, *signature(file)))) for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
