"""Command line tool for the panoptic quality of a folder of predictions. Needs no Detectron2."""

from __future__ import annotations

import argparse
from pathlib import Path

from spar_d2.evaluation.panoptic.coco_json import read_ground_truth, read_predictions
from spar_d2.evaluation.panoptic.coco_png import compare_folders
from spar_d2.evaluation.panoptic.scores import score_table
from spar_d2.utils.environment import cpu_count
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import check_not_read, write_json


def main(arguments: list[str] | None = None) -> None:
    """Compare predictions with ground truth, write the scores and print a table."""
    args = _parse_args(arguments)
    with readable_errors():
        if args.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {args.workers}")
        if args.output.is_dir():
            raise ValueError(f"--output must be a file, {args.output} is a folder")
        read = {"--gt-json": args.gt_json, "--pred-json": args.pred_json}
        folders = {"--gt-dir": args.gt_dir, "--pred-dir": args.pred_dir}
        named = {flag: folder or path.with_suffix("") for (flag, folder), path in zip(folders.items(), read.values())}
        check_not_read(args.output, {**read, **named})
        truth = read_ground_truth(args.gt_json, args.gt_dir)
        folder, predictions = read_predictions(args.pred_json, args.pred_dir)
        scores = compare_folders(truth, folder, predictions, args.workers).scores(truth.things)
        write_json(scores, args.output)
        print(printable(score_table(scores, truth.names)))


def _parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spar_d2.evaluation.panoptic",
        description="Panoptic, segmentation and recognition quality of predictions in COCO's panoptic format, by "
        "COCO's rules: for all categories, things, stuff, and each category.",
    )
    add = parser.add_argument
    add("--gt-json", type=Path, required=True, metavar="FILE", help="ground truth JSON")
    add("--gt-dir", type=Path, metavar="DIR", help="folder of its PNGs (default: the JSON's name without .json)")
    add("--pred-json", type=Path, required=True, metavar="FILE", help="prediction JSON")
    add("--pred-dir", type=Path, metavar="DIR", help="folder of its PNGs (default: the JSON's name without .json)")
    add("--output", type=Path, required=True, metavar="FILE", help="JSON file for the scores, in 0..1")
    workers = cpu_count()
    add("--workers", type=int, default=workers, metavar="N", help="number of threads (default: number of CPUs)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
