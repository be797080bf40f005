#!/usr/bin/env python
"""Measure speed and memory. Only "loading", "evaluator" and "panoptic" need Detectron2."""

from __future__ import annotations

import argparse
import datetime
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from benchmarks import encoders, postprocess, refinement, service, teacher
from benchmarks.measure import describe_machine
from spar_d2.encoders import build_encoder, describe_encoder
from spar_d2.encoders.precision import PRECISIONS
from spar_d2.encoders.registry import find_family
from spar_d2.utils.errors import readable_errors

ENCODERS = ["ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3"]
DINOTXT = "dinov3_vitl16_dinotxt_tet1280d20h24l"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU, batches of 32 are 10 % slower than batches of 8. 0 chooses the size from the window size.
BATCH_SIZES = {"cpu": 8, "cuda": 0}
SAMPLED = Path(__file__).resolve().parents[1] / "configs" / "distill" / "openclip_vit_b_16_sampled.yaml"
PHOTOS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser(
        "encoders",
        help="single passes of encoders, compared with their libraries",
        description="Single passes of encoders with random weights on a square image, compared with the forward "
        "pass of the original library: FLOPs, time and memory, as a table.",
    )
    command.set_defaults(run=run_encoders)
    add = command.add_argument
    add("--encoders", nargs="+", metavar="NAME", help=f"models (default: {' '.join(ENCODERS)})")
    sizes = [512, 1024, 2048]
    add("--sizes", nargs="+", type=int, default=sizes, metavar="N", help="image sides in pixels (default: %(default)s)")
    add_common_flags(command)

    command = commands.add_parser(
        "teacher",
        help="the sliding-window teacher, compared with a straightforward implementation",
        description="Targets of the sliding-window teacher with random weights for one image, compared with a "
        "straightforward implementation on top of the encoder's library: windows per second and memory, as a table.",
    )
    command.set_defaults(run=run_teacher)
    add = command.add_argument
    add("--encoders", nargs="+", default=["ViT-B-16"], metavar="NAME", help="models (default: %(default)s)")
    sizes = ["1024x1024", "2048x1024"]
    add("--sizes", nargs="+", default=sizes, metavar="WxH", help="widths and heights in pixels (default: %(default)s)")
    add("--stride", type=int, default=24, metavar="N", help="stride of the windows in pixels (default: %(default)s)")
    batch_size = f"chosen from the window size on a GPU, {BATCH_SIZES['cpu']} on a CPU"
    add("--batch-size", type=int, metavar="N", help=f"batch size of our teacher (default: {batch_size})")
    baseline = "batch size of the straightforward implementation (default: %(default)s)"
    add("--baseline-batch-size", type=int, default=8, metavar="N", help=baseline)
    add("--windows", type=int, metavar="N", help="encode only the first N windows of each image (default: all)")
    add("--student", action="store_true", help="also time a single pass over the same image, and show the ratio")
    add_common_flags(command)

    command = commands.add_parser(
        "postprocess",
        help="labels from features, compared with full-resolution score maps",
        description="Post-processing of an image's features to labels, compared with a plain implementation with score "
        "maps of all classes and pixels: time and memory, as a table. Encoder and text embeddings are random.",
    )
    command.set_defaults(run=run_postprocess)
    add = command.add_argument
    add("--encoder", default="ViT-B-16", metavar="NAME", help="model (default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="image file (default: a synthetic image)")
    add("--long-side", type=int, default=2048, metavar="N", help="long side in pixels (default: %(default)s)")
    add(
        "--words", type=int, nargs="+", default=[20, 150], metavar="N", help="numbers of classes (default: %(default)s)"
    )
    room = "memory limit for full maps in GB; larger maps are skipped (default: %(default)s)"
    add("--room", type=float, default=12, metavar="GB", help=room)
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="number of runs for the median (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")

    command = commands.add_parser(
        "refinement",
        help="refinement of class scores, compared with all of an image at once",
        description="Refinement of the class scores of an image to labels, compared with plain implementations that "
        "hold all of an image at once: time and memory, as a table. Features, classes and the weights of AnyUp are "
        f"random; patches have {refinement.PATCH} pixels and features {refinement.CHANNELS} channels.",
    )
    command.set_defaults(run=run_refinement)
    add = command.add_argument
    steps = refinement.STEPS
    add("--steps", nargs="+", choices=steps, default=list(steps), help="(default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="image file (default: a synthetic image)")
    add("--long-side", type=int, default=1024, metavar="N", help="long side in pixels (default: %(default)s)")
    add("--words", type=int, nargs="+", default=[20], metavar="N", help="numbers of classes (default: %(default)s)")
    room = "memory limit for all of the image at once in GB (default: %(default)s)"
    add("--room", type=float, default=12, metavar="GB", help=room)
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="number of runs for the median (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")

    command = commands.add_parser(
        "loading",
        help="loading and augmentation of images, compared with training; needs Detectron2",
        description="Speed of image loading and augmentation, alone and in training with random weights, for several "
        "numbers of worker processes, as a table.",
    )
    command.set_defaults(run=run_loading)
    add = command.add_argument
    add("--config-file", default=str(SAMPLED), metavar="FILE", help="training config (default: %(default)s)")
    add("--images", default="", metavar="FOLDER", help="folder of images (default: synthetic JPEGs of 2250x1500)")
    add("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="worker processes (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="training steps (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")

    command = commands.add_parser(
        "evaluator",
        help="the semantic evaluator, compared with Detectron2's; needs Detectron2",
        description="Time to evaluate a label map on one core, including reading the ground truth, compared with "
        "Detectron2's evaluator, as a table.",
    )
    command.set_defaults(run=run_evaluator)
    add = command.add_argument
    add("--images", type=int, default=20, metavar="N", help="images of each size (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")

    command = commands.add_parser(
        "panoptic",
        help="the panoptic evaluator, compared with a plain implementation with PNG files; needs Detectron2",
        description="Time to evaluate a panoptic prediction of a synthetic image on one core, including reading the "
        "ground truth, compared with a plain implementation that writes and reads PNG files, as a table.",
    )
    command.set_defaults(run=run_panoptic)
    add = command.add_argument
    add("--images", type=int, default=100, metavar="N", help="images of each kind (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")

    command = service.add_command(commands)
    command.set_defaults(run=run_service)
    command.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    return parser.parse_args()


def add_common_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"], help="(default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="number of runs for the median (default: %(default)s)")
    add("--compile", action="store_true", help="compile our blocks with torch.compile")
    add("--dinov3-repo", default="", metavar="DIR", help=f"clone of the dinov3 repository, for {DINOTXT}")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")


def main() -> None:
    args = parse_args()
    with readable_errors():
        args.run(args)


def run_encoders(args: argparse.Namespace) -> None:
    names = args.encoders or (ENCODERS + [DINOTXT] if args.dinov3_repo else ENCODERS)
    check_at_least_one(args, "sizes", "repeats")
    check_common_flags(args, names)
    options = (args.sizes, args.precisions, torch.device(args.device), args.repeats, args.compile, args.dinov3_repo)
    measurements = {name: encoders.measure_encoder(name, *options) for name in names}
    total = len(measurements) * len(args.sizes) * len(args.precisions)
    encoders.TABLE.show(title(args), measurements, total, args.output)


def run_teacher(args: argparse.Namespace) -> None:
    sizes = [read_size(text) for text in args.sizes]
    check_at_least_one(args, "repeats", "batch_size", "baseline_batch_size", "windows")
    if args.batch_size is None:
        args.batch_size = BATCH_SIZES[args.device]
    check_common_flags(args, args.encoders)
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
    batches = args.batch_size or "a size chosen from the window size"
    settings = f"stride {args.stride}, batches of {batches} (straightforward: {args.baseline_batch_size})"
    total = len(measurements) * len(sizes) * len(args.precisions)
    table = teacher.WITH_STUDENT if args.student else teacher.TABLE
    table.show(f"{title(args)}; {settings}", measurements, total, args.output)


def run_postprocess(args: argparse.Namespace) -> None:
    check_at_least_one(args, "long_side", "words", "repeats")
    check_common_flags(args, [args.encoder])
    image = postprocess.picture(args.image, args.long_side)
    device = torch.device(args.device)
    encoder = build_encoder(args.encoder).to(device)
    options = (postprocess.normalized(image, encoder), args.words, args.repeats, int(args.room * 1e9))
    measurements = {args.encoder: postprocess.measure_postprocess(encoder, *options)}
    what = args.image.name if args.image else "a synthetic image"
    total = 2 * len(args.words)
    postprocess.TABLE.show(f"{title(args)}; {args.encoder}, {what}", measurements, total, args.output)


def run_refinement(args: argparse.Namespace) -> None:
    check_at_least_one(args, "long_side", "words", "repeats")
    check_common_flags(args, [])
    image = refinement.as_image(postprocess.picture(args.image, args.long_side), torch.device(args.device))
    measured = refinement.measure_refinement(image, args.steps, args.words, args.repeats, int(args.room * 1e9))
    what = args.image.name if args.image else "a synthetic image"
    total = len(args.steps) * len(args.words)
    refinement.TABLE.show(f"{title(args)}; {what}", {"refinement": measured}, total, args.output)


def run_loading(args: argparse.Namespace) -> None:
    # Imported here because the other benchmarks work without Detectron2.
    from benchmarks import data_loading as loading
    from spar_d2.engine.setup import load_config

    if args.steps < 2 or min(args.workers) < 0:
        raise ValueError(f"--steps must be at least 2 and --workers 0, got {args.steps} and {min(args.workers)}")
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["MODEL.SPAR.PRETRAINED", "", "SPAR.DATA.IMAGES", args.images or folder, "SEED", 0]
        cfg = load_config(args.config_file, [*overrides, *args.opts])
        if not args.images:
            list(tqdm(loading.draw_photos(Path(folder), PHOTOS), total=PHOTOS, desc="generating images", leave=False))
        args.device = cfg.MODEL.DEVICE
        heading = f"{title(args)}; {Path(args.config_file).name} {' '.join(args.opts)}".rstrip()
        measured = (loading.measure_loading(cfg, workers, args.steps) for workers in args.workers)
        loading.TABLE.show(heading, {"loading": measured}, len(args.workers), args.output)


def run_service(args: argparse.Namespace) -> None:
    check_at_least_one(args, "clients", "requests", "long_side")
    check_common_flags(args, [args.encoder])
    options = (args.encoder, args.pretrained, args.device, args.clients, args.requests, args.long_side)
    heading = f"{title(args)}; {Path(args.encoder).stem}, images of {args.long_side} pixels"
    service.TABLE.show(heading, {"service": service.measure_service(*options)}, len(args.clients), args.output)


def run_evaluator(args: argparse.Namespace) -> None:
    from benchmarks import semantic_evaluator as evaluator_speed

    measure_on_one_core(args, evaluator_speed, evaluator_speed.measure_evaluators)


def run_panoptic(args: argparse.Namespace) -> None:
    from benchmarks import panoptic_evaluator as panoptic_speed

    measure_on_one_core(args, panoptic_speed, panoptic_speed.measure_panoptic)


def measure_on_one_core(args: argparse.Namespace, benchmark: ModuleType, measure: Callable) -> None:
    """Show the table of a benchmark with a row for each result of ``measure(folder, images)``."""
    import cv2

    check_at_least_one(args, "images")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    args.device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        measured = {"sizes": measure(Path(folder), args.images)}
        benchmark.TABLE.show(title(args), measured, len(benchmark.CASES), args.output)


def title(args: argparse.Namespace) -> str:
    compiled = ", our blocks compiled" if getattr(args, "compile", False) else ""
    machine = describe_machine(torch.device(args.device))
    return f"{machine}; torch {torch.__version__}{compiled}; {datetime.date.today()}"


def read_size(text: str) -> tuple[int, int]:
    """Parse width and height, such as "2048x1024"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ValueError(f"--sizes must be a width and a height in pixels, such as 2048x1024; got {text}")
    return int(match[1]), int(match[2])


def check_at_least_one(args: argparse.Namespace, *options: str) -> None:
    """Raise ``ValueError`` with the flag's name if an option is below 1."""
    for option in options:
        value = getattr(args, option)
        minimum = min(value) if isinstance(value, list) else value
        if minimum is not None and minimum < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {minimum}")


def check_common_flags(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ``ValueError`` or ``RuntimeError`` with the flag's name before anything is measured."""
    if args.output and args.output.is_dir():
        raise ValueError(f"--output must be a file, {args.output} is a folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no GPU; use --device cpu")
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
