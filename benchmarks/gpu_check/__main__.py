"""Run one part of the check in this process: ``python -m benchmarks.gpu_check PART --output DIR``."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.gpu_check.parts import find
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings, small


def run_part(name: str, output: Path, settings: Settings) -> Record:
    """Run a part and write its record to ``output/NAME.json``; raises the exceptions of the part."""
    (part,) = find([name])
    record = Record(output / f"{name}.json", name, settings.device)
    part.load()(record, settings)
    record.finish()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    # On SIGTERM, exit through an exception, so that child processes are terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by the time limit"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(args.device)
    run_part(args.part, args.output, small(device) if args.small else Settings(device))


if __name__ == "__main__":
    main()
