"""Compare inference modes on all benchmark data sets on disk, in one table like the paper's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.config import CfgNode

import spar_d2  # noqa: F401  registers
from spar_d2.cli.flags import add_opts, output_override
from spar_d2.comparison.evaluate import evaluate_methods
from spar_d2.comparison.methods import Method
from spar_d2.comparison.tables import paper_table, summary
from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.data.datasets.semantic import found, missing
from spar_d2.engine.setup import load_config, prepare
from spar_d2.model_zoo import get_config_file
from spar_d2.modeling.refinement import parse_refine
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import as_json, file_lock, write_text

ROWS = ("single_pass", "sliding_window", "teacher", "student")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--config-file",
        default=get_config_file("segment/openclip_vit_b_16.yaml"),
        metavar="FILE",
        help="config of the encoder and its pre-trained weights (default: %(default)s)",
    )
    add(
        "--student",
        default="",
        metavar="FILE",
        help="weights of a distilled student, evaluated in a separate row (default: MODEL.WEIGHTS)",
    )
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        help="rows of the table; teacher: that of SPAR.TEACHER "
        "(default: all; the student's only if it is given, the teacher's only if it is not the sliding window)",
    )
    add(
        "--refine",
        nargs="+",
        default=[],
        metavar="STEPS",
        help='values of MODEL.SPAR.REFINE ("lposs", "lposs,lposs+", ...); each refines the student, or the single pass '
        "if there is no student, in a separate row",
    )
    add("--datasets", nargs="+", metavar="NAME", help="names of registered data sets (default: all benchmarks on disk)")
    add("--stride", type=int, help="stride of the sliding window in pixels (default: SPAR.TEACHER.STRIDE)")
    add("--limit", type=int, metavar="N", help="evaluate only the first N images of each data set")
    add(
        "--output",
        type=Path,
        default=Path("output/evaluate"),
        help="folder for table.md, table.json and intermediate results (default: %(default)s)",
    )
    add_opts(parser)
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
    print(f"Data sets: {', '.join(datasets)}. Results are saved in {args.output}.", flush=True)
    try:
        with file_lock(args.output):
            scores = evaluate_methods(cfg, methods, datasets, args.output, args.limit)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; run the same command again to continue from {args.output}") from None
    table = paper_table(scores, absent)
    written = {"table.md": table + "\n", "table.json": as_json(summary(scores, absent), indent=1)}
    for name, text in written.items():
        write_text(text, args.output / name)
    print(f"\n{printable(table)}\n\nWritten to {' and '.join(str(args.output / name) for name in written)}.")


def overrides(args: argparse.Namespace) -> list[str]:
    """Convert the flags to config overrides, a flat list of keys and values."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    pairs = [*args.opts, *output_override(args.output)]
    if args.stride is not None:
        pairs += ["SPAR.TEACHER.STRIDE", str(args.stride)]
    if args.datasets:
        pairs += ["DATASETS.TEST", str(tuple(args.datasets))]
    return pairs


def warn_of_protocol(cfg: CfgNode, opts: list[str]) -> None:
    """Warn if the paper's protocol replaces config keys given on the command line."""
    replaced = sorted(set(opts[::2]) & set(BENCHMARKS["voc21"].settings("")))
    if replaced and cfg.SPAR.TEST.PROTOCOL == "paper":
        keys = ", ".join(replaced)
        print(
            f"{keys}: the benchmarks use the paper's values; set SPAR.TEST.PROTOCOL config to use yours",
            file=sys.stderr,
        )


def rows(cfg: CfgNode, args: argparse.Namespace) -> list[Method]:
    """Return the requested inference modes."""
    if "student" in (args.rows or ()) and not (args.student or cfg.MODEL.WEIGHTS):
        raise ValueError("--rows student requires the weights of the student: --student FILE")
    student = args.student or cfg.MODEL.WEIGHTS
    if student and not Path(student).is_file():
        raise FileNotFoundError(f"{'--student' if args.student else 'MODEL.WEIGHTS'}: there is no file {student}")
    teacher, sliding = cfg.SPAR.TEACHER, ["MODEL.SPAR.INFERENCE", "sliding_window"]
    methods = {
        "single_pass": Method("pre-trained, single pass"),
        "sliding_window": Method(f"pre-trained, sliding window, stride {teacher.STRIDE}", sliding),
        "teacher": Method(f"teacher, {teacher.KIND}", ["MODEL.SPAR.INFERENCE", "teacher"]),
        "student": Method("SPAR student, single pass", weights=student),
    }
    is_sliding = teacher.KIND == "sliding" and not teacher.SINGLE_PASS
    absent = {"student": not student, "teacher": is_sliding and not args.rows}
    chosen = [row for row in args.rows or ROWS if not absent.get(row)]
    return [*(methods[row] for row in chosen), *refined_rows(cfg, args, methods, chosen)]


def refined_rows(cfg: CfgNode, args: argparse.Namespace, methods: dict[str, Method], chosen: list[str]) -> list[Method]:
    """Return a row for each value of --refine."""
    if not args.refine:
        return []
    base = next((methods[row] for row in ("student", "single_pass") if row in chosen), None)
    if base is None:
        raise ValueError("--refine requires the row student or single_pass: add one of them to --rows")
    if cfg.MODEL.SPAR.REFINE:
        raise ValueError(
            "MODEL.SPAR.REFINE must be empty with --refine, which names the refined rows; "
            f"got {cfg.MODEL.SPAR.REFINE!r}"
        )
    for value in args.refine:
        steps = parse_refine(value)
        if not steps:
            raise ValueError('--refine: the rows without refinement are those of --rows; remove ""')
        if "anyup" in steps and not cfg.MODEL.SPAR.ANYUP:
            raise ValueError(f"--refine {value} requires the weights of AnyUp: --opts MODEL.SPAR.ANYUP FILE")
        if "anyup" in steps and not Path(cfg.MODEL.SPAR.ANYUP).is_file():
            raise FileNotFoundError(f"MODEL.SPAR.ANYUP: there is no weight file {cfg.MODEL.SPAR.ANYUP}")
    return [
        Method(f"{base.name} + {value}", [*base.overrides, "MODEL.SPAR.REFINE", value], base.weights)
        for value in args.refine
    ]


def find_datasets(names: list[str] | None) -> tuple[list[str], list[str]]:
    """Find the data sets to evaluate on, and print which files the other benchmarks need.

    Args:
        names: requested data sets; None selects all benchmarks on disk.

    Returns:
        Names of the data sets to evaluate on, and names of the benchmarks that are not on disk.
    """
    if names:
        return names, []
    present = [name for name in BENCHMARKS if found(name)[0]]
    absent = [name for name in BENCHMARKS if name not in present]
    for name in absent:
        print(f"skipped: {missing(name)}", file=sys.stderr)
    if not present:
        raise FileNotFoundError("no benchmark is on disk; see docs/datasets.md for downloads and preparation")
    return present, absent
