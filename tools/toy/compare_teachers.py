#!/usr/bin/env python
"""Compare teachers on the toy data set: sliding windows, random subsets of them, self-correlation, ensembles, ...

Every teacher is evaluated, and a student is distilled and evaluated for every teacher, learning rate and seed. The
learning rate is selected on separate images ("tune"), and scores are reported on the evaluation images ("val").
Finished runs are stored in the output folder, so that the comparison can be interrupted and resumed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

from tqdm import tqdm

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.comparison.methods import Method, measure
from spar_d2.distillation import DistillationHook
from spar_d2.engine.hooks import StepTimer
from spar_d2.engine.setup import load_config, prepare
from spar_d2.engine.trainer import STUDENT_FILE, Trainer
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_json, write_text
from spar_d2.utils.tables import format_table

RESULT = "result.json"
TUNE, VAL = "spar_scenes_tune", "spar_scenes_val"
TEACHERS = ["all", "cached", "16", "8", "4"]
# Other teachers: overrides of SPAR.TEACHER. They use all windows of frozen images, as "cached" does.
OTHERS = {
    "self_correlation": {"KIND": "self_correlation"},
    "self_correlation_single_pass": {"KIND": "self_correlation", "SINGLE_PASS": True},
    "strides": {"KIND": "ensemble", "ENSEMBLE": ("sliding", "stride:20")},
    "mirror": {"KIND": "ensemble", "ENSEMBLE": ("sliding", "mirror")},
    "scales": {"KIND": "ensemble", "ENSEMBLE": ("scale:0.75", "sliding", "scale:1.5")},
    "enlarged": {"KIND": "ensemble", "ENSEMBLE": ("scale:1.5",)},
    "mixed": {"KIND": "ensemble", "ENSEMBLE": ("sliding", "self_correlation", "mirror", "scale:1.5")},
    **{f"smoothed_{count}": {"KIND": "smoothed", "NEIGHBOURS": count} for count in (5, 10, 20, 50)},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=get_config_file("toy/distill.yaml"))
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=TEACHERS,
        metavar="TEACHER",
        help='"all" windows, "cached" (all windows of frozen images, each encoded once), a number of windows, or '
        f"{', '.join(OTHERS)} (default: {' '.join(TEACHERS)})",
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[8e-3, 1.6e-2, 3.2e-2], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("output/compare_teachers"), help="output folder")
    return parser.parse_args()


def teacher_overrides(teacher: str, folder: Path) -> list:
    """Return the config keys and values of a teacher.

    Raises:
        ValueError: the teacher is invalid.
    """
    if teacher == "cached" or teacher in OTHERS:
        keys = {"WINDOWS_PER_IMAGE": 0, "CACHE_DIR": str(folder), **OTHERS.get(teacher, {})}
        return ["SPAR.DATA.FROZEN", True, *(part for key in keys for part in (f"SPAR.TEACHER.{key}", keys[key]))]
    if teacher != "all" and not (teacher.isdecimal() and int(teacher)):
        allowed = f'"all", "cached", {", ".join(OTHERS)} or numbers of windows'
        raise ValueError(f"--teachers must be {allowed}; got {teacher!r}")
    return ["SPAR.TEACHER.WINDOWS_PER_IMAGE", 0 if teacher == "all" else int(teacher)]


def read(record: Path) -> dict[str, float]:
    # JSON has no nan: the scores of absent classes are null.
    return {name: math.nan if value is None else value for name, value in json.loads(record.read_text()).items()}


def evaluate(config_file: str, folder: Path, teacher: str) -> dict[str, float]:
    """Evaluate a teacher with all of its windows, or read the result if it is finished."""
    record = folder / RESULT
    if record.is_file():
        return read(record)
    cfg = load_config(config_file, [*teacher_overrides(teacher, folder / "cache"), "OUTPUT_DIR", str(folder)])
    prepare(cfg, argparse.Namespace(config_file=config_file, eval_only=True), quiet=True)
    own = Method(f"teacher {teacher}", ["MODEL.SPAR.INFERENCE", "teacher"])
    results = {dataset: measure(cfg, dataset, own) for dataset in (TUNE, VAL)}
    result = {dataset: result.scores["mIoU"] for dataset, result in results.items()}
    result["seconds"] = results[VAL].seconds_per_image
    write_json(result, record)
    return result


def distill(config_file: str, folder: Path, teacher: str, rate: float, seed: int) -> dict[str, float]:
    """Distill and evaluate a student, or read the result if the run is finished."""
    record = folder / RESULT
    if record.is_file():
        return read(record)
    overrides = [*teacher_overrides(teacher, folder / "cache"), "SOLVER.BASE_LR", rate, "SEED", seed]
    cfg = load_config(config_file, [*overrides, "OUTPUT_DIR", str(folder), "DATASETS.TEST", ()])
    prepare(cfg, argparse.Namespace(config_file=config_file, eval_only=False), quiet=True)
    trainer, timer = Trainer(cfg), StepTimer()
    trainer.register_hooks([timer])
    trainer.train()
    if trainer.iter < trainer.max_iter:
        raise SystemExit(f"stopped; finished runs are in {folder.parent}")
    hook = next(hook for hook in trainer._hooks if isinstance(hook, DistillationHook))
    result = {"windows": hook.windows_encoded, "seconds": timer.seconds}
    cfg.defrost()
    cfg.DATASETS.TEST = (VAL,)
    student = Method("student", weights=str(folder / STUDENT_FILE))
    for dataset in (TUNE, VAL):
        result[dataset] = measure(cfg, dataset, student).scores["mIoU"]
    write_json(result, record)
    return result


def markdown(
    results: dict[tuple[str, float, int], dict[str, float]], own: dict[str, dict[str, float]], args: argparse.Namespace
) -> str:
    """Format the results of the students and of the teachers; the best learning rate on the tuning images is bold."""
    seeds = f"mIoU (val), seeds {', '.join(map(str, args.seeds))}"
    columns = ["teacher", "its mIoU (val)", "its seconds per image"]
    columns += ["learning rate", "mIoU (tune)", seeds, "mean mIoU"]
    rows = []
    for teacher in args.teachers:

        def tuned(rate: float, teacher: str = teacher) -> float:
            return statistics.mean(results[teacher, rate, seed][TUNE] for seed in args.seeds)

        best = max(args.rates, key=tuned)
        for rate in args.rates:
            runs = [results[teacher, rate, seed] for seed in args.seeds]
            scores = [run[VAL] for run in runs]
            mark = "**" if rate == best else ""
            cells = [teacher, f"{own[teacher][VAL]:.1f}", f"{own[teacher]['seconds']:.3f}"]
            cells += [f"{mark}{rate:g}{mark}", f"{tuned(rate):.1f}"]
            cells += [" / ".join(f"{score:.1f}" for score in scores), f"{mark}{statistics.mean(scores):.1f}{mark}"]
            cells.append(f"{statistics.mean(run['windows'] for run in runs):,.0f}")
            rows.append([*cells, f"{statistics.median(run['seconds'] for run in runs):.0f}"])
    return format_table([*columns, "teacher windows per run", "seconds per run"], rows, left=0)


def main() -> None:
    args = parse_args()
    with readable_errors():
        for teacher in args.teachers:
            teacher_overrides(teacher, args.output)
        combinations = list(itertools.product(args.seeds, args.rates, args.teachers))
        own = {}
        for teacher in args.teachers:
            # A subset of the windows estimates the teacher with all windows.
            name = teacher if teacher in OTHERS else "all"
            own[teacher] = evaluate(args.config_file, args.output / f"teacher_{name}", name)
        results = {}
        for seed, rate, teacher in tqdm(combinations, desc="runs", unit="run"):
            folder = args.output / f"{teacher}_rate{rate:g}_seed{seed}"
            results[teacher, rate, seed] = distill(args.config_file, folder, teacher, rate, seed)
        text = markdown(results, own, args)
        write_text(text + "\n", args.output / "table.md")
    print(f"\n{text}\n\nBold: best learning rate on the tuning images. Results are in {args.output}.")


if __name__ == "__main__":
    main()
