"""The paper's table: ways of inference on the benchmark data sets, kept as they are finished."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from detectron2.config import CfgNode

from spar_d2.data.benchmarks import BENCHMARKS
from spar_d2.encoders.weights import fingerprint
from spar_d2.engine.comparison import Method, build_method, measure
from spar_d2.engine.progress import Progress
from spar_d2.engine.protocol import config_for
from spar_d2.files import replacing

logger = logging.getLogger(__name__)

RESULTS = "results.json"


@dataclass(frozen=True)
class Score:
    """One cell of the table.

    Attributes:
        identity: of everything that the numbers follow from.
        images: how many were tested on.
        scores: of the evaluator, in percent.
        seconds_per_image: median, of the model alone.
    """

    method: str
    dataset: str
    identity: str
    images: int
    scores: dict[str, float]
    seconds_per_image: float


def evaluate_methods(
    cfg: CfgNode, methods: Sequence[Method], datasets: Sequence[str], folder: Path, limit: int | None = None
) -> list[Score]:
    """Evaluate every method on every data set, by each one's protocol.

    What is finished is in ``folder``/results.json and is not done again, as long as it would come out the same; within
    a data set an evaluation that was stopped goes on where it was.

    Args:
        cfg: of the segmentor.
        methods: the rows of the table.
        datasets: registered names.
        folder: for everything written.
        limit: only so many images of each data set, the first ones.

    Raises:
        ValueError, FileNotFoundError: as :func:`spar_d2.engine.protocol.config_for` and the data sets do.
    """
    configs = {name: config_for(cfg, name) for name in datasets}
    kept = {score.identity: score for score in read_results(folder / RESULTS)}
    scores = []
    for method in methods:
        model = None
        for name, own in configs.items():
            identity = _identity(own, method, limit)
            if identity not in kept:
                model = model or build_method(cfg, method)
                progress = Progress(folder / f"unfinished_{identity}.safetensors", identity)
                with model.configured(own):
                    result = measure(own, name, method, model, limit, progress)
                seconds = statistics.median(result.seconds)
                images = len(result.seconds)
                kept[identity] = Score(method.name, name, identity, images, result.scores, seconds)
                _write_json(folder / RESULTS, [asdict(score) for score in kept.values()])
                progress.finish()
            scores.append(kept[identity])
            logger.info("%s, %s: mIoU %.2f", method.name, name, scores[-1].scores["mIoU"])
    return scores


def read_results(path: Path) -> list[Score]:
    """What :func:`evaluate_methods` wrote; nothing where it is not there or damaged."""
    try:
        return [Score(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s); beginning anew", path, error)
        return []


def _identity(cfg: CfgNode, method: Method, limit: int | None) -> str:
    spar = cfg.MODEL.SPAR
    own = cfg.clone()
    own.defrost()
    # What changes no number.
    own.MODEL.SPAR.TEXT_CACHE = own.MODEL.DEVICE = ""
    own.SPAR.TEACHER.BATCH_SIZE = 0
    nodes = [own.MODEL, own.INPUT, own.DATASETS.TEST, own.TEST.AUG, own.SPAR.TEACHER, method.overrides, limit]
    files = (spar.ENCODER, spar.PRETRAINED, spar.DINOV3_BACKBONE, spar.VOCABULARY, spar.TEMPLATES, method.weights)
    content = "\n".join([*map(str, nodes), *map(fingerprint, files)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write_json(path: Path, content: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def paper_table(scores: Sequence[Score], missing: Sequence[str] = ()) -> str:
    """The scores as in the paper, in Markdown: mIoU of every method on every data set and their mean, and the times.

    Args:
        scores: what :func:`evaluate_methods` gave.
        missing: data sets that were not found; their columns are empty, and without one of the paper's there is no
            mean.
    """
    cells = {(score.method, score.dataset): score for score in scores}
    methods = list(dict.fromkeys(score.method for score in scores))
    known = [name for name in BENCHMARKS if name in missing or any(name == score.dataset for score in scores)]
    inside = [name for name in BENCHMARKS if BENCHMARKS[name].in_mean]
    outside = [name for name in known if name not in inside]
    others = [name for name in dict.fromkeys(score.dataset for score in scores) if name not in BENCHMARKS]
    columns = [*inside, *outside, *others]
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else name for name in columns]
    titles.insert(len(inside), "Mean")
    lines = []
    for what in ("mIoU", "seconds per image"):
        lines += [f"| {what} | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
        for method in methods:
            row = [cells.get((method, name)) for name in columns]
            values = [None if cell is None else _value(cell, what) for cell in row]
            first = values[: len(inside)]
            values.insert(len(inside), None if None in first else statistics.mean(first))
            digits = 1 if what == "mIoU" else 3
            shown = ["-" if value is None else f"{value:.{digits}f}" for value in values]
            lines.append(f"| {method} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join([*lines, *_notes(scores, missing)]).strip()


def _value(score: Score, what: str) -> float:
    return score.scores["mIoU"] if what == "mIoU" else score.seconds_per_image


def _notes(scores: Sequence[Score], missing: Sequence[str]) -> list[str]:
    notes = ["mIoU in percent, over the classes in the ground truth. Seconds: median, of the model alone."]
    images = {score.dataset: score.images for score in scores}
    for name, count in images.items():
        if name in BENCHMARKS and count < BENCHMARKS[name].images:
            notes.append(f"{BENCHMARKS[name].title}: {count} of {BENCHMARKS[name].images} images.")
    if missing:
        notes.append(f"Not found on disk: {', '.join(missing)}.")
    return [f"- {note}" for note in notes]
