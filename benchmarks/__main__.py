#!/usr/bin/env python
"""Measure how fast the package is, and its memory; only "loading", "evaluator" and "panoptic" need Detectron2."""

from __future__ import annotations

import argparse
import datetime
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import encoders, postprocess, teacher
from benchmarks.measure import describe_machine
from benchmarks.tables import write_lines
from spar_d2.encoders import build_encoder, describe_encoder
from spar_d2.encoders.precision import PRECISIONS
from spar_d2.encoders.registry import find_family
from spar_d2.utils.errors import readable_errors

ENCODERS = ["ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3"]
DINOTXT = "dinov3_vitl16_dinotxt_tet1280d20h24l"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A processor is a tenth slower with 32 than with 8; 0 chooses by the window.
BATCH_SIZES = {"cpu": 8, "cuda": 0}
SAMPLED = Path(__file__).resolve().parents[1] / "configs" / "distill" / "openclip_vit_b_16_sampled.yaml"
PHOTOS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser(
        "encoders",
        help="a single pass of encoders beside their libraries' own forwards",
        description="A single pass of encoders with random weights over one square image, beside the forward of the "
        "library that each comes from: operations, time and memory, as a table.",
    )
    command.set_defaults(run=run_encoders)
    add = command.add_argument
    add("--encoders", nargs="+", metavar="NAME", help=f"models (default: {' '.join(ENCODERS)})")
    sizes = [512, 1024, 2048]
    add("--sizes", nargs="+", type=int, default=sizes, metavar="N", help="sides in pixels (default: %(default)s)")
    add_shared(command)

    command = commands.add_parser(
        "teacher",
        help="the sliding-window teacher beside the straightforward way",
        description="The target of one image by the sliding-window teacher with random weights, beside the same target "
        "by plain code over the encoder's library: windows per second and memory, as a table.",
    )
    command.set_defaults(run=run_teacher)
    add = command.add_argument
    add("--encoders", nargs="+", default=["ViT-B-16"], metavar="NAME", help="models (default: %(default)s)")
    sizes = ["1024x1024", "2048x1024"]
    add("--sizes", nargs="+", default=sizes, metavar="WxH", help="widths and heights in pixels (default: %(default)s)")
    add("--stride", type=int, default=24, metavar="N", help="pixels between windows (default: %(default)s)")
    batch_size = f"chosen by the window on a GPU, {BATCH_SIZES['cpu']} on a CPU"
    add("--batch-size", type=int, metavar="N", help=f"windows that ours encodes at once (default: {batch_size})")
    baseline = "windows that the straightforward way encodes at once (default: %(default)s)"
    add("--baseline-batch-size", type=int, default=8, metavar="N", help=baseline)
    add("--windows", type=int, metavar="N", help="encode only the first N of each image (default: all)")
    add("--student", action="store_true", help="time a single pass over the same image, too, and the ratio")
    add_shared(command)

    command = commands.add_parser(
        "postprocess",
        help="features to labels beside the same with full maps of all words",
        description="The step from the features of one image to its labels, beside the same by plain code on full maps "
        "of all words and pixels: time and memory, as a table. Encoder and words are random.",
    )
    command.set_defaults(run=run_postprocess)
    add = command.add_argument
    add("--encoder", default="ViT-B-16", metavar="NAME", help="model (default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="photo (default: a drawn scene)")
    add("--long-side", type=int, default=2048, metavar="N", help="pixels of its long side (default: %(default)s)")
    add("--words", type=int, nargs="+", default=[20, 150], metavar="N", help="numbers of them (default: %(default)s)")
    room = "memory that full maps may take in GB; larger ones are left out (default: %(default)s)"
    add("--room", type=float, default=12, metavar="GB", help=room)
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="runs whose median time is taken (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")

    command = commands.add_parser(
        "loading",
        help="reading and augmenting photos beside training on them; needs Detectron2",
        description="How fast photos are read and augmented, without a model and in a training (random weights), for "
        "several numbers of loading processes, as a table.",
    )
    command.set_defaults(run=run_loading)
    add = command.add_argument
    add("--config-file", default=str(SAMPLED), metavar="FILE", help="the training (default: %(default)s)")
    add("--images", default="", metavar="FOLDER", help="photos (default: JPEGs of 2250x1500, drawn for the occasion)")
    add("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="processes (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="of training (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")

    command = commands.add_parser(
        "evaluator",
        help="the semantic evaluator beside Detectron2's; needs Detectron2",
        description="Time for evaluating a label map, reading the ground truth included, on one core, beside "
        "Detectron2's own evaluator, as a table.",
    )
    command.set_defaults(run=run_evaluator)
    add = command.add_argument
    add("--images", type=int, default=20, metavar="N", help="of each size, for a median (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")

    command = commands.add_parser(
        "panoptic",
        help="the panoptic evaluator beside a straightforward way through PNG files; needs Detectron2",
        description="Time for evaluating a panoptic prediction of a drawn image, reading the ground truth included, on "
        "one core, beside writing it to a PNG, reading both and counting plainly, as a table.",
    )
    command.set_defaults(run=run_panoptic)
    add = command.add_argument
    add("--images", type=int, default=100, metavar="N", help="of each kind (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")
    return parser.parse_args()


def add_shared(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"], help="(default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="runs whose median time is taken (default: %(default)s)")
    add("--compile", action="store_true", help="compile our blocks with torch.compile")
    add("--dinov3-repo", default="", metavar="DIR", help=f"a clone of the dinov3 repository, for {DINOTXT}")
    add("--output", type=Path, metavar="FILE.md", help="a file for the table, beside stdout")


def main() -> None:
    args = parse_args()
    with readable_errors():
        args.run(args)


def run_encoders(args: argparse.Namespace) -> None:
    names = args.encoders or (ENCODERS + [DINOTXT] if args.dinov3_repo else ENCODERS)
    check_at_least_one(args, "sizes", "repeats")
    check_shared(args, names)
    options = (args.sizes, args.precisions, torch.device(args.device), args.repeats, args.compile, args.dinov3_repo)
    measurements = {name: encoders.measure_encoder(name, *options) for name in names}
    total = len(measurements) * len(args.sizes) * len(args.precisions)
    encoders.TABLE.show(title(args), measurements, total, args.output)


def run_teacher(args: argparse.Namespace) -> None:
    sizes = [read_size(text) for text in args.sizes]
    check_at_least_one(args, "repeats", "batch_size", "baseline_batch_size", "windows")
    if args.batch_size is None:
        args.batch_size = BATCH_SIZES[args.device]
    check_shared(args, args.encoders)
    for name in args.encoders:
        window = describe_encoder(name).native_size
        if not 1 <= args.stride <= window:
            raise ValueError(f"--stride must be in 1..{window} (the window of {name}), got {args.stride}")
    windows = (args.stride, args.batch_size, args.baseline_batch_size, args.windows)
    options = (
        sizes,
        args.precisions,
        torch.device(args.device),
        *windows,
        args.repeats,
        args.compile,
        args.dinov3_repo,
        args.student,
    )
    measurements = {name: teacher.measure_teacher(name, *options) for name in args.encoders}
    batches = args.batch_size or "a size chosen by the window"
    settings = f"stride {args.stride}, batches of {batches} (straightforward: {args.baseline_batch_size})"
    total = len(measurements) * len(sizes) * len(args.precisions)
    table = teacher.WITH_STUDENT if args.student else teacher.TABLE
    table.show(f"{title(args)}; {settings}", measurements, total, args.output)


def run_postprocess(args: argparse.Namespace) -> None:
    check_at_least_one(args, "long_side", "words", "repeats")
    check_shared(args, [args.encoder])
    image = postprocess.picture(args.image, args.long_side)
    device = torch.device(args.device)
    encoder = build_encoder(args.encoder).to(device)
    options = (postprocess.normalized(image, encoder), args.words, args.repeats, int(args.room * 1e9))
    measurements = {args.encoder: postprocess.measure_postprocess(encoder, *options)}
    what = args.image.name if args.image else "a drawn scene"
    total = 2 * len(args.words)
    postprocess.TABLE.show(f"{title(args)}; {args.encoder}, {what}", measurements, total, args.output)


def run_loading(args: argparse.Namespace) -> None:
    # The other parts work without Detectron2.
    from benchmarks import data_loading as loading
    from spar_d2.engine.setup import load_config

    if args.steps < 2 or min(args.workers) < 0:
        raise ValueError(f"--steps must be at least 2 and --workers 0, got {args.steps} and {min(args.workers)}")
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["MODEL.SPAR.PRETRAINED", "", "SPAR.DATA.IMAGES", args.images or folder, "SEED", 0]
        cfg = load_config(args.config_file, [*overrides, *args.opts])
        if not args.images:
            list(tqdm(loading.draw_photos(Path(folder), PHOTOS), total=PHOTOS, desc="drawing photos", leave=False))
        args.device = cfg.MODEL.DEVICE
        lines = [f"{title(args)}; {Path(args.config_file).name} {' '.join(args.opts)}".rstrip(), "", *loading.HEAD]
        print("\n".join(lines), flush=True)
        for workers in args.workers:
            lines.append(loading.measure_loading(cfg, workers, args.steps).row())
            print(lines[-1], flush=True)
    if args.output:
        write_lines(args.output, lines)


def run_evaluator(args: argparse.Namespace) -> None:
    from benchmarks import semantic_evaluator as evaluator_speed

    measure_on_one_core(args, evaluator_speed.HEAD, evaluator_speed.measure_evaluators)


def run_panoptic(args: argparse.Namespace) -> None:
    from benchmarks import panoptic_evaluator as panoptic_speed

    measure_on_one_core(args, panoptic_speed.HEAD, panoptic_speed.measure_panoptic)


def measure_on_one_core(args: argparse.Namespace, head: Sequence[str], measure: Callable) -> None:
    """Print, and write, a row for each of what ``measure(folder, images)`` gives."""
    import cv2

    check_at_least_one(args, "images")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    args.device = "cpu"
    lines = [title(args), "", *head]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for evaluation in measure(Path(folder), args.images):
            lines.append(evaluation.row())
            print(lines[-1], flush=True)
    if args.output:
        write_lines(args.output, lines)


def title(args: argparse.Namespace) -> str:
    compiled = ", our blocks compiled" if getattr(args, "compile", False) else ""
    machine = describe_machine(torch.device(args.device))
    return f"{machine}; torch {torch.__version__}{compiled}; {datetime.date.today()}"


def read_size(text: str) -> tuple[int, int]:
    """Width and height of "2048x1024"."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"--sizes must be a width and a height in pixels, such as 2048x1024; got {text}")
    return int(found[1]), int(found[2])


def check_at_least_one(args: argparse.Namespace, *options: str) -> None:
    """Raise ``ValueError``, naming the flag, where a number that was given is below 1."""
    for option in options:
        value = getattr(args, option)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and smallest < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {smallest}")


def check_shared(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ``ValueError`` or ``RuntimeError``, naming the flag, before anything is measured."""
    if args.output and args.output.is_dir():
        raise ValueError(f"--output must be a file, {args.output} is a folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no GPU here; --device cpu measures the processor")
    for name in names:
        try:
            family = find_family(name)
        except (ValueError, OSError) as error:
            flag = "--encoders" if hasattr(args, "encoders") else "--encoder"
            raise ValueError(f"{flag}: {str(error).removeprefix('MODEL.SPAR.ENCODER: ')}") from error
        if family.name == "DINOv3.txt" and not (args.dinov3_repo and (Path(args.dinov3_repo) / "hubconf.py").is_file()):
            raise ValueError(
                f"--dinov3-repo: {name} needs a clone of the dinov3 repository, got {args.dinov3_repo or 'none'}"
            )


if __name__ == "__main__":
    main()
