#!/usr/bin/env python
"""Check that computations on a GPU agree with those on a CPU, and measure their speed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu_check import parts, report
from benchmarks.gpu_check.runner import Runner
from spar_d2.utils.errors import readable_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__} Each part runs in its own process with a time limit, most important parts first.",
        epilog="Parts: " + "; ".join(f"{part.name} ({part.about})" for part in parts.PARTS) + ".",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="output folder for tables, numbers and logs")
    add("--parts", nargs="+", default=[], metavar="PART", help="parts to run (default: all)")
    minutes = "time limit of all parts together; each has its share (default: %(default).1f)"
    add("--minutes", type=float, default=parts.MINUTES, metavar="N", help=minutes)
    add("--device", choices=["cuda", "cpu"], default="cuda", help='"cpu" only tests the tool itself, with --small')
    add("--small", action="store_true", help="tiny models and images, to test the tool itself")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        chosen = parts.find(args.parts)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                "tools/gpu_check.py needs a CUDA device, and PyTorch finds none; --device cpu --small tests the "
                "tool itself on the CPU"
            )
        if args.minutes <= 0:
            raise ValueError(f"--minutes must be above 0, got {args.minutes}")
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"--output must be a folder, {args.output} is a file")
        runner = Runner(args.output, args.device, args.small, args.minutes)
        print(f"{len(chosen)} parts; tables, numbers and logs go to {args.output}", flush=True)
        outcomes = runner.run(chosen)
        is_ok = report.write_report(args.output, outcomes)
    print("", *report.summary(args.output, outcomes), sep="\n")
    print(f"Tables are in {args.output / report.MARKDOWN}, numbers in {args.output / report.JSON}.")
    if outcomes and outcomes[-1].state == "stopped":
        raise SystemExit(130)
    if not is_ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
