"""Evaluate ways of inference on all benchmark data sets that are on disk, as one table like the paper's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.config import CfgNode

import spar_d2  # noqa: F401  registers
from spar_d2.comparison.evaluate import evaluate_methods
from spar_d2.comparison.methods import Method
from spar_d2.comparison.tables import paper_table, summary
from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.data.datasets.semantic import found, missing
from spar_d2.engine.setup import load_config, prepare
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import as_json, atomic_write, file_lock

ROWS = ("single_pass", "sliding_window", "student")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--config-file",
        default=get_config_file("segment/openclip_vit_b_16.yaml"),
        metavar="FILE",
        help="encoder and its pre-trained weights (default: %(default)s)",
    )
    add(
        "--student",
        default="",
        metavar="FILE",
        help="a distilled student, for a row of its own (default: MODEL.WEIGHTS)",
    )
    add("--rows", nargs="+", choices=ROWS, help="rows of the table (default: all, the student's where there is one)")
    add("--datasets", nargs="+", metavar="NAME", help="registered names (default: all benchmarks on disk)")
    add("--stride", type=int, help="step of the sliding window in pixels (default: SPAR.TEACHER.STRIDE)")
    add("--limit", type=int, metavar="N", help="only the first N images of each data set")
    add("--output", type=Path, default=Path("output/evaluate"), help="folder for table.md, table.json and what is kept")
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to override; the last flag",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, overrides(args))
    methods = rows(cfg, args)
    warn_of_protocol(cfg, args.opts)
    datasets, absent = find_datasets(args.datasets)
    prepare(cfg, argparse.Namespace(config_file=args.config_file, eval_only=True), quiet=True)
    print(f"Data sets: {', '.join(datasets)}. Everything is kept in {args.output}.", flush=True)
    try:
        with file_lock(args.output):
            scores = evaluate_methods(cfg, methods, datasets, args.output, args.limit)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; the same command goes on from what is in {args.output}") from None
    table = paper_table(scores, absent)
    written = {"table.md": table + "\n", "table.json": as_json(summary(scores, absent), indent=1)}
    for name, text in written.items():
        with atomic_write(args.output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"\n{printable(table)}\n\nWritten to {' and '.join(str(args.output / name) for name in written)}.")


def overrides(args: argparse.Namespace) -> list[str]:
    """Config keys and values that the flags stand for."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    # Quoted, as a name such as "2024" would be taken for a number.
    pairs = [*args.opts, "OUTPUT_DIR", repr(str(args.output))]
    if args.stride is not None:
        pairs += ["SPAR.TEACHER.STRIDE", str(args.stride)]
    if args.datasets:
        pairs += ["DATASETS.TEST", str(tuple(args.datasets))]
    return pairs


def warn_of_protocol(cfg: CfgNode, opts: list[str]) -> None:
    """Say where the paper's protocol takes the place of keys on the command line."""
    replaced = sorted(set(opts[::2]) & set(BENCHMARKS["voc21"].settings("")))
    if replaced and cfg.SPAR.TEST.PROTOCOL == "paper":
        keys = ", ".join(replaced)
        print(f"{keys}: the paper's on its benchmarks; SPAR.TEST.PROTOCOL config takes yours", file=sys.stderr)


def rows(cfg: CfgNode, args: argparse.Namespace) -> list[Method]:
    """The ways of inference that are asked for."""
    if "student" in (args.rows or ()) and not (args.student or cfg.MODEL.WEIGHTS):
        raise ValueError("--rows student needs the student's weights: --student FILE")
    student = args.student or cfg.MODEL.WEIGHTS
    if student and not Path(student).is_file():
        raise FileNotFoundError(f"{'--student' if args.student else 'MODEL.WEIGHTS'}: there is no file {student}")
    sliding = ["MODEL.SPAR.INFERENCE", "sliding_window"]
    known = {
        "single_pass": Method("pre-trained, single pass"),
        "sliding_window": Method(f"pre-trained, sliding window, stride {cfg.SPAR.TEACHER.STRIDE}", sliding),
        "student": Method("SPAR student, single pass", weights=student),
    }
    return [known[row] for row in args.rows or ROWS if row != "student" or student]


def find_datasets(named: list[str] | None) -> tuple[list[str], list[str]]:
    """Data sets to evaluate on, and the benchmarks that are not on disk, which are named with what they need."""
    if named:
        return named, []
    present = [name for name in BENCHMARKS if found(name)[0]]
    absent = [name for name in BENCHMARKS if name not in present]
    for name in absent:
        print(f"left out: {missing(name)}", file=sys.stderr)
    if not present:
        raise FileNotFoundError("no benchmark is on disk; docs/datasets.md says what to fetch and how to prepare it")
    return present, absent
