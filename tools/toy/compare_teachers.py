#!/usr/bin/env python
"""Compare teachers on the toy data set: all windows, all windows with a cache, and random subsets of windows.

A student is distilled and evaluated for every teacher, learning rate and seed. The learning rate is selected on
separate images ("tune"), and scores are reported on the evaluation images ("val"). Finished runs are stored in the
output folder, so that the comparison can be interrupted and resumed.
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

TUNE, VAL = "spar_scenes_tune", "spar_scenes_val"
TEACHERS = ["all", "cached", "16", "8", "4"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=get_config_file("toy/distill.yaml"))
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=TEACHERS,
        metavar="TEACHER",
        help='"all" windows, "cached" (all windows of frozen images, each encoded once), or a number of windows '
        f"(default: {' '.join(TEACHERS)})",
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
    if teacher == "cached":
        return ["SPAR.TEACHER.WINDOWS_PER_IMAGE", 0, "SPAR.DATA.FROZEN", True, "SPAR.TEACHER.CACHE_DIR", str(folder)]
    if teacher != "all" and not (teacher.isdecimal() and int(teacher)):
        raise ValueError(f'--teachers must be "all", "cached" or numbers of windows, got {teacher!r}')
    return ["SPAR.TEACHER.WINDOWS_PER_IMAGE", 0 if teacher == "all" else int(teacher)]


def distill(config_file: str, folder: Path, teacher: str, rate: float, seed: int) -> dict[str, float]:
    """Distill and evaluate a student, or read the result if the run is finished."""
    record = folder / "result.json"
    if record.is_file():
        # JSON has no nan: the scores of absent classes are null.
        stored = json.loads(record.read_text())
        return {name: math.nan if value is None else value for name, value in stored.items()}
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


def markdown(results: dict[tuple[str, float, int], dict], args: argparse.Namespace) -> str:
    """Format the results; the best learning rate on the tuning images is bold."""
    seeds = f"mIoU (val), seeds {', '.join(map(str, args.seeds))}"
    columns = ["windows per image", "learning rate", "mIoU (tune)", seeds, "mean mIoU"]
    rows = []
    for teacher in args.teachers:

        def tuned(rate: float, teacher: str = teacher) -> float:
            return statistics.mean(results[teacher, rate, seed][TUNE] for seed in args.seeds)

        best = max(args.rates, key=tuned)
        for rate in args.rates:
            runs = [results[teacher, rate, seed] for seed in args.seeds]
            scores = [run[VAL] for run in runs]
            mark = "**" if rate == best else ""
            cells = [teacher, f"{mark}{rate:g}{mark}", f"{tuned(rate):.1f}"]
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
        results = {}
        for seed, rate, teacher in tqdm(combinations, desc="runs", unit="run"):
            folder = args.output / f"{teacher}_rate{rate:g}_seed{seed}"
            results[teacher, rate, seed] = distill(args.config_file, folder, teacher, rate, seed)
        text = markdown(results, args)
        write_text(text + "\n", args.output / "table.md")
    print(f"\n{text}\n\nBold: best learning rate on the tuning images. Results are in {args.output}.")


if __name__ == "__main__":
    main()
