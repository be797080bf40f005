#!/usr/bin/env python
"""Measure how fast the package is and how much memory it takes; needs no Detectron2."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from spar_d2.benchmark.encoders import TABLE_HEAD, measure_encoder, table_notes, table_row
from spar_d2.benchmark.measure import describe_machine
from spar_d2.encoders.base import PRECISIONS
from spar_d2.encoders.registry import find_family
from spar_d2.errors import readable_errors
from spar_d2.files import replacing

ENCODERS = ["ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3"]
DINOTXT = "dinov3_vitl16_dinotxt_tet1280d20h24l"
SIZES = [512, 1024, 2048]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    encoders = commands.add_parser(
        "encoders",
        help="a single pass of encoders beside their libraries' own forwards",
        description="A single pass of encoders with random weights over one square image, beside the forward of the "
        "library that each comes from: operations, time and memory, as a table.",
    )
    encoders.set_defaults(run=run_encoders)
    add = encoders.add_argument
    add("--encoders", nargs="+", metavar="NAME", help=f"models (default: {' '.join(ENCODERS)})")
    add("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="sides in pixels (default: %(default)s)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"], help="(default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="passes whose median time is taken (default: %(default)s)")
    add("--compile", action="store_true", help="compile our blocks with torch.compile")
    add("--dinov3-repo", default="", metavar="DIR", help=f"a clone of the dinov3 repository, for {DINOTXT}")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        args.run(args)


def run_encoders(args: argparse.Namespace) -> None:
    """Print the table row by row, and keep in the file what there is of it."""
    names = args.encoders or (ENCODERS + [DINOTXT] if args.dinov3_repo else ENCODERS)
    check_encoders(args, names)
    device = torch.device(args.device)
    compiled = ", our blocks compiled" if args.compile else ""
    title = f"{describe_machine(device)}; torch {torch.__version__}{compiled}; {datetime.date.today()}"
    lines, measurements = [title, "", *TABLE_HEAD], []
    print("\n".join(lines), flush=True)
    with tqdm(total=len(names) * len(args.sizes) * len(args.precisions), unit="case", leave=False) as progress:
        for name in names:
            progress.set_description(name)
            for measurement in measure_encoder(
                name, args.sizes, args.precisions, device, args.repeats, args.compile, args.dinov3_repo
            ):
                measurements.append(measurement)
                lines.append(table_row(measurement))
                with tqdm.external_write_mode():
                    print(lines[-1], flush=True)
                if args.output:
                    write(args.output, [*lines, "", *table_notes(measurements)])
                progress.update()
    print("", *table_notes(measurements), sep="\n")


def write(path: Path, lines: Sequence[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_encoders(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ``ValueError`` or ``RuntimeError``, naming the flag, before anything is measured."""
    for flag, numbers in (("--sizes", args.sizes), ("--repeats", [args.repeats])):
        if min(numbers) < 1:
            raise ValueError(f"{flag} must be at least 1, got {min(numbers)}")
    if args.output and args.output.is_dir():
        raise ValueError(f"--output must be a file, {args.output} is a folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no GPU here; --device cpu measures the processor")
    for name in names:
        try:
            family = find_family(name)
        except (ValueError, OSError) as error:
            raise ValueError(f"--encoders: {str(error).removeprefix('MODEL.SPAR.ENCODER: ')}") from error
        if family.name == "DINOv3.txt" and not (args.dinov3_repo and (Path(args.dinov3_repo) / "hubconf.py").is_file()):
            raise ValueError(
                f"--dinov3-repo: {name} needs a clone of the dinov3 repository, got {args.dinov3_repo or 'none'}"
            )


if __name__ == "__main__":
    main()
