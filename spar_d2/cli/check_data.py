"""Check an own data set by its data-set file (docs/own_data.md): images, labels, and what would stop a training.

All images and labels are read. The command prints counts, sizes and the pixels of each class, draws some images with
their labels, and exits with code 1 if something would stop a training.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

import spar_d2  # noqa: F401  registers
from spar_d2.data.datasets.dataset_file import DatasetFile, read_dataset_file
from spar_d2.data.datasets.file_check import Labels, SplitCheck, SplitReport, shared_images
from spar_d2.data.datasets.file_records import read_panoptic_json
from spar_d2.data.datasets.file_registration import check_names_are_free, match_categories
from spar_d2.data.images import read_photo
from spar_d2.evaluation.panoptic.coco_json import read_ground_truth
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.images import read_ids
from spar_d2.utils.io import atomic_write
from spar_d2.utils.selection import evenly_spread
from spar_d2.visualization.overlay import draw_overlay
from spar_d2.visualization.palette import IGNORED, IGNORED_COLOR

# Maximum number of printed problems of a split.
_LISTED = 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="data-set file (YAML)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the pictures (default: output/check_data/NAME)"
    )
    parser.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="number of pictures (default: %(default)s)"
    )
    parser.add_argument("--splits", nargs="+", metavar="NAME", help="splits to check (default: all)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with readable_errors():
        if args.pictures < 0:
            raise ValueError(f"--pictures must be 0 or more, got {args.pictures}")
        file = read_dataset_file(args.file)
        check_names_are_free(file)
        unknown = [name for name in args.splits or () if name not in file.splits]
        if unknown:
            raise ValueError(f"--splits must be of {', '.join(file.splits)}, got {unknown[0]}")
        problems = run(file, args.splits or list(file.splits), args.output, args.pictures)
    return 1 if problems else 0


def run(file: DatasetFile, splits: list[str], output: Path | None, pictures: int) -> int:
    """Check splits, print the findings, draw pictures, and return the number of problems."""
    checks, names, colors = build_checks(file, splits)
    total = sum(map(len, checks.values()))
    with tqdm(total=total, desc="checking", unit="image", leave=False) as bar:
        for check in checks.values():
            for _ in check.run():
                bar.update()
    reports = {name: check.report for name, check in checks.items()}
    print(printable(summary(file, reports)))
    if names and any(report.labeled for report in reports.values()):
        print(printable(f"\n{class_table(names, reports, file.panoptic)}"))
    notes = [note for report in reports.values() for note in report.notes] + shared_images(reports)
    for note in notes:
        print(printable(f"note: {note}"))
    for report in reports.values():
        for problem in report.problems[:_LISTED]:
            print(printable(f"problem: {problem}"))
        if len(report.problems) > _LISTED:
            print(f"problem: {len(report.problems) - _LISTED} more")
    folder = output or Path("output/check_data") / file.name
    drawn = draw(checks, names, colors, folder, pictures)
    if drawn:
        print(f"{drawn} pictures are in {folder}.")
    count = sum(len(report.problems) for report in reports.values())
    registered = ", ".join(file.registered_name(name) for name in splits)
    print(f"{count} problems would stop a training." if count else f"No problems. Data sets: {registered}.")
    return count


def build_checks(
    file: DatasetFile, splits: list[str]
) -> tuple[dict[str, SplitCheck], list[str], list[tuple[int, int, int]]]:
    """Return the check of each split, and the names and colors of the classes."""
    if not file.panoptic:
        names = [data_class.name for data_class in file.classes]
        colors = file.colors([data_class.color for data_class in file.classes], names)
        return {name: SplitCheck(file, file.splits[name]) for name in splits}, names, colors
    checks, first = {}, None
    for name in splits:
        split = file.splits[name]
        content = read_panoptic_json(file, split) if split.labels else None
        numbers: dict[int, int] = {}
        if content is not None:
            _check_readable(file, name)
            categories = match_categories(file, split, content)
            first = first or categories
            if _kinds(categories) != _kinds(first):
                raise file.error(
                    f"splits.{name}.labels",
                    f"{split.labels} has other categories, or other things (isthing), than the other splits",
                )
            numbers = {category["id"]: index for index, category in enumerate(first)}
        checks[name] = SplitCheck(file, split, numbers, content)
    classes = first or []
    names = [f"{category['name']}{'' if category['isthing'] else ' (stuff)'}" for category in classes]
    return checks, names, [category["color"] for category in classes]


def _kinds(categories: list[dict]) -> set[tuple[int, int]]:
    return {(category["id"], category["isthing"]) for category in categories}


def _check_readable(file: DatasetFile, name: str) -> None:
    """Raise ``ValueError`` if the evaluator would refuse a panoptic JSON file, for example for a segment of id 0."""
    split = file.splits[name]
    try:
        read_ground_truth(split.labels, split.masks)
    except ValueError as error:
        raise file.error(f"splits.{name}.labels", str(error)) from error


def summary(file: DatasetFile, reports: dict[str, SplitReport]) -> str:
    """Return a table with a row for each split."""
    rows = []
    for name, report in reports.items():
        sizes = report.sizes.most_common()
        largest = max(sizes, key=lambda item: item[0][0] * item[0][1], default=((0, 0), 0))[0]
        smallest = min(sizes, key=lambda item: item[0][0] * item[0][1], default=((0, 0), 0))[0]
        shown = [f"{width}x{height}" for width, height in dict.fromkeys((smallest, largest))]
        labeled = str(report.labeled) if file.splits[name].labels else "-"
        rows.append((name, report.images, labeled, " to ".join(shown), len(report.problems)))
    kind = "panoptic" if file.panoptic else "semantic"
    headers = ("split", "images", "with labels", "sizes", "problems")
    return f"{file.path} ({kind} labels)\n\n{tabulate(rows, headers, disable_numparse=True)}"


def class_table(names: list[str], reports: dict[str, SplitReport], panoptic: bool) -> str:
    """Return a table with a row for each class: share of pixels, images and segments in each split."""
    labeled = {name: report for name, report in reports.items() if report.labeled}
    headers = ["class"]
    for name in labeled:
        headers += [f"{name}: pixels", "images", *(["segments"] if panoptic else [])]
    rows = []
    for index in [*range(len(names)), -1]:
        row = [names[index] if index >= 0 else ("(no segment)" if panoptic else IGNORED)]
        for report in labeled.values():
            share = report.pixels[index] / max(1, sum(report.pixels.values()))
            row += [f"{share:.2%}", str(report.in_images[index])]
            row += [str(report.segments[index]) if index >= 0 else ""] if panoptic else []
        rows.append(row)
    return tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def draw(
    checks: dict[str, SplitCheck],
    names: list[str],
    colors: list[tuple[int, int, int]],
    folder: Path,
    count: int,
) -> int:
    """Draw images with their labels, spread over all splits, and return their number."""
    pairs = [(name, *pair) for name, check in checks.items() for pair in check.report.pairs]
    chosen = evenly_spread(pairs, count)
    uses: Counter[str] = Counter()
    for name, record, labels in tqdm(chosen, desc="drawing", unit="picture", leave=False, disable=not chosen):
        uses[name] += 1
        picture = overlay(checks[name], record, labels, names, colors)
        with atomic_write(folder / f"{name}_{uses[name]}_{Path(record['file_name']).stem}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
    return len(chosen)


def overlay(
    check: SplitCheck, record: dict, labels: Labels, names: list[str], colors: list[tuple[int, int, int]]
) -> np.ndarray:
    """Draw labels over an image; ignored pixels are light gray. Returns (H', W', 3) uint8."""
    classes = check.class_map(labels)
    classes[classes < 0] = len(names)
    segments = None if labels.segments is None else read_ids(labels.file).astype(np.int64)
    image = read_photo(record)
    return draw_overlay(image, classes, [*names, IGNORED], [*colors, IGNORED_COLOR], segments=segments)
