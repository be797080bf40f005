"""Compare linear probes on features of the pre-trained single pass, the sliding window, and a SPAR student.

For each row of the table, a probe is trained on a frozen encoder and evaluated. Finished rows are kept in the output
folder and reused as long as their settings do not change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import spar_d2  # noqa: F401  registers
from spar_d2.cli.flags import output_override
from spar_d2.engine.setup import clean_start, load_config, prepare
from spar_d2.model_zoo import get_config_file
from spar_d2.probing.runs import (
    ROWS,
    check_rows,
    draw_probes,
    evaluate_probes,
    probe_methods,
    probe_summary,
    probe_table,
    train_probe,
)
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import as_json, file_lock, write_text

TITLES = {"single_pass": "single pass", "sliding_window": "sliding window", "student": "SPAR student"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--config-file",
        default=get_config_file("toy/linear_probe.yaml"),
        metavar="FILE",
        help="config of encoder, data and training (default: the toy experiment)",
    )
    add("--student", default="", metavar="FILE", help="weights of a distilled student, probed in a separate row")
    add("--rows", nargs="+", choices=ROWS, help="rows of the table (default: all; the student's only if it is given)")
    add("--output", type=Path, metavar="DIR", help="output folder (default: OUTPUT_DIR)")
    add("--resume", action="store_true", help="resume an interrupted probe; otherwise, its training restarts")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys to override, after all flags and --")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    output = output_override(args.output) if args.output else []
    cfg = load_config(args.config_file, [*args.opts, *output], trains=True)
    folder = Path(cfg.OUTPUT_DIR)
    check_rows(cfg)
    methods = probe_methods(cfg, args.rows, args.student)
    with clean_start(cfg.OUTPUT_DIR):
        prepare(cfg, argparse.Namespace(config_file=args.config_file, eval_only=False), quiet=True)
    probes = {}
    try:
        with file_lock(folder):
            for row, method in methods.items():
                print(f"{method.name} (log: {folder}/log.txt) ...", flush=True)
                probes[row] = train_probe(cfg, method, folder / row, args.resume)
                print(f"  {probes[row].trained:,} parameters trained, {probes[row].frozen:,} frozen", flush=True)
            scores = evaluate_probes(cfg, list(probes.values()), folder)
            draw_probes(cfg, {TITLES[row]: probe for row, probe in probes.items()}, folder / "predictions.png")
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run the same command with --resume to continue") from None
    table = probe_table(list(probes.values()), scores)
    written = {
        "table.md": table + "\n",
        "table.json": as_json(probe_summary(list(probes.values()), scores), indent=1),
    }
    for name, text in written.items():
        write_text(text, folder / name)
    print(f"\n{printable(table)}\n\nTable, visualization and probes are in {folder}.")
