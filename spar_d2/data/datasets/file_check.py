"""Checks the images and labels of a data-set file. Needs no Detectron2."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from spar_d2.data.datasets.dataset_file import DatasetFile, Split
from spar_d2.data.datasets.file_records import annotated_images, find_images, label_files, pair_labels
from spar_d2.data.images import read_photo
from spar_d2.utils.images import read_ids, read_labels

_THREADS = 4


@dataclass(frozen=True)
class Labels:
    """Labels of an image.

    Attributes:
        file: label map, or panoptic mask.
        size: (H, W) in the JSON file, for panoptic labels.
        segments: category of each segment id, for panoptic labels.
        areas: number of pixels of each segment id in the JSON file, for panoptic labels; None if it is not given.
    """

    file: str
    size: tuple[int, int] | None = None
    segments: dict[int, int] | None = None
    areas: Mapping[int, float | None] = field(default_factory=dict)


@dataclass
class SplitReport:
    """Findings in a split.

    Attributes:
        images, labeled: numbers of images, and of images with labels.
        sizes: numbers of images by (W, H).
        pixels: number of pixels by class index; -1 for ignored pixels or pixels without a segment.
        in_images: number of images by class index.
        segments: number of segments by class index, for panoptic labels.
        unknown: number of pixels by value that is neither a class nor ignored.
        problems: lines about what would stop a training.
        notes: lines about what may be wrong.
        pairs: images with usable labels.
    """

    images: int = 0
    labeled: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    in_images: Counter[int] = field(default_factory=Counter)
    segments: Counter[int] = field(default_factory=Counter)
    unknown: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[dict, Labels]] = field(default_factory=list)


class SplitCheck:
    """Checks a split, one image at a time.

    Args:
        file: data-set file.
        split: split to check.
        categories: class index of each category id, for panoptic labels.
        content: content of the panoptic JSON file, for panoptic labels.

    Raises:
        FileNotFoundError, ValueError: nothing can be checked, because a folder is missing or the labels have another
            format; the message names the file and the key.
    """

    def __init__(
        self, file: DatasetFile, split: Split, categories: dict[int, int] | None = None, content: dict | None = None
    ) -> None:
        self.file, self.split, self.report = file, split, SplitReport()
        self._categories = categories or {}
        self._wrong_areas: list[str] = []
        images = find_images(file, split)
        self.report.images = len(images)
        self._jobs: list[tuple[dict, Labels | None]] = [(record, None) for record in images]
        if content is not None:
            self._find_panoptic(images, content)
        elif split.labels:
            self._find_label_maps(images)
        if split.labels and any("tar" in record for record in images):
            self.report.problems.append(f"{split.name}: images with labels are in a tar file; unpack it")

    def _find_label_maps(self, images: list[dict]) -> None:
        pairs, missing = pair_labels(self.file, self.split, images)
        self._jobs = [(record, Labels(label)) for record, label in pairs]
        if missing:
            record, label = missing[0]
            count = f"{len(missing)} of {len(images)} images have no label map"
            line = f"{count}, such as {record['file_name']}: there is no {label}"
            self.report.problems.append(f"{self.split.name}: {line}")
        used = {label for _, label in pairs}
        paths = (os.path.join(self.split.labels, name) for name in label_files(self.split))
        spare = [path for path in paths if path not in used and os.path.splitext(path)[1].lower() in (".png", ".tif")]
        if spare:
            self.report.notes.append(f"{self.split.name}: {len(spare)} label maps have no image, such as {spare[0]}")

    def _find_panoptic(self, images: list[dict], content: dict) -> None:
        key = f"splits.{self.split.name}.labels"
        matched, missing = annotated_images(self.file, self.split, content, images)
        try:
            self._jobs = [
                (
                    {"file_name": image},
                    Labels(
                        mask,
                        (int(entry["height"]), int(entry["width"])),
                        {int(segment["id"]): segment["category_id"] for segment in annotation["segments_info"]},
                        {int(segment["id"]): segment.get("area") for segment in annotation["segments_info"]},
                    ),
                )
                for entry, annotation, image, mask in matched
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{self.split.labels} is not in COCO's panoptic format ({type(error).__name__}: {error})"
            raise self.file.error(key, problem) from error
        for _, annotation, image, _ in matched:
            if len({segment["id"] for segment in annotation["segments_info"]}) < len(annotation["segments_info"]):
                line = f"{self.split.labels} lists a segment id more than once for {image}"
                self.report.problems.append(f"{self.split.name}: {line}")
        if missing:
            count = f"{len(missing)} of {len(content['annotations'])} annotations are incomplete"
            self.report.problems.append(f"{self.split.name}: {count}: {missing[0]}")
        if not matched:
            self.report.problems.append(f"{self.split.name}: {self.split.labels} has no complete annotations")
        if spare := len(images) - len({image for _, _, image, _ in matched}):
            self.report.notes.append(f"{self.split.name}: {spare} images have no annotation and are not used")

    def __len__(self) -> int:
        return len(self._jobs)

    def run(self) -> Iterator[None]:
        """Check the images; yields after each."""
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for (record, labels), result in zip(self._jobs, pool.map(lambda job: self._read(*job), self._jobs)):
                self._add(record, labels, *result)
                yield
        finally:
            pool.shutdown(cancel_futures=True)
        if self.report.unknown:
            values = sorted(self.report.unknown.items())
            listed = ", ".join(f"{value} in {pixels}" for value, pixels in values[:8])
            more = ", ..." if len(values) > 8 else ""
            what = "segments that the JSON file does not list" if self.file.panoptic else "neither a class nor ignored"
            self.report.problems.append(f"{self.split.name}: pixel values that are {what}: {listed}{more} pixels")
        if self._wrong_areas:
            count = f"{len(self._wrong_areas)} segments have an area in {self.split.labels} that is not their pixels"
            note = f"{count}, such as {self._wrong_areas[0]}; the evaluation uses the area"
            self.report.notes.append(f"{self.split.name}: {note}")
        classes = self.report.in_images.keys() - {-1}
        if self.report.in_images.keys() == {-1} and not self.report.unknown:
            self.report.problems.append(f"{self.split.name}: all pixels of the labels are ignored")
        elif self.split.labels and self.report.labeled and len(classes) < 2:
            self.report.notes.append(f"{self.split.name}: the labels have at most one class")

    def _read(self, record: dict, labels: Labels | None) -> tuple[tuple[int, int] | None, dict[int, int], str]:
        """Return (H, W) of the image, the number of pixels by value of its labels, and a problem."""
        try:
            size = read_photo(record).shape[:2]
        except (ValueError, FileNotFoundError) as error:
            return None, {}, str(error)
        if labels is None:
            return size, {}, ""
        try:
            values = read_labels(labels.file) if labels.segments is None else read_ids(labels.file)
        except (ValueError, FileNotFoundError) as error:
            return size, {}, str(error)
        for what, other in (("label map", values.shape), ("JSON entry", labels.size or size)):
            if tuple(other) != size:
                sizes = f"{other[1]}x{other[0]} pixels, but its image {record['file_name']} has {size[1]}x{size[0]}"
                return size, {}, f"the {what} of {labels.file} has {sizes}"
        counts = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True))))
        return size, counts, ""

    def _add(
        self,
        record: dict,
        labels: Labels | None,
        size: tuple[int, int] | None,
        counts: dict[int, int],
        problem: str,
    ) -> None:
        if problem:
            self.report.problems.append(f"{self.split.name}: {problem}")
        if size is not None:
            self.report.sizes[size[1], size[0]] += 1
        if not counts or labels is None:
            return
        self.report.labeled += 1
        self._wrong_areas += _wrong_areas(labels, counts)
        self.report.pairs.append((record, labels))
        found = {}
        for value, count in counts.items():
            number = self.index_of(value, labels)
            if number is None:
                self.report.unknown[value] += count
                continue
            found[number] = found.get(number, 0) + count
            if labels.segments is not None and number >= 0:
                self.report.segments[number] += 1
        self.report.pixels.update(found)
        self.report.in_images.update(dict.fromkeys(found, 1))

    def index_of(self, value: int, labels: Labels) -> int | None:
        """Return the class index of a pixel value; -1 if it is ignored or no segment, None if it is unknown."""
        if labels.segments is not None:
            return -1 if value == 0 else self._categories.get(labels.segments.get(value, -1))
        if value in self.file.ignored:
            return -1
        return self._values.get(value)

    @property
    def _values(self) -> dict[int | None, int]:
        return {data_class.value: index for index, data_class in enumerate(self.file.classes)}

    def class_map(self, labels: Labels) -> np.ndarray:
        """Read labels (H, W) as class indices; -1 for ignored and unknown pixels."""
        values = read_labels(labels.file) if labels.segments is None else read_ids(labels.file)
        unique, inverse = np.unique(values, return_inverse=True)
        indices = [self.index_of(value, labels) for value in unique.tolist()]
        table = np.array([-1 if index is None else index for index in indices])
        return table[inverse].reshape(values.shape)


def _wrong_areas(labels: Labels, counts: Mapping[int, int]) -> list[str]:
    """Return a line for each segment whose area in the JSON file is not its number of pixels."""
    return [
        f"segment {number} of {labels.file} (area {area:g}, {counts.get(number, 0)} pixels)"
        for number, area in labels.areas.items()
        if isinstance(area, (int, float)) and area != counts.get(number, 0)
    ]


def shared_images(reports: dict[str, SplitReport]) -> list[str]:
    """Return a line for each pair of splits that share images (the same files)."""
    files = {
        name: {os.path.realpath(record["file_name"]) for record, _ in report.pairs} for name, report in reports.items()
    }
    lines, names = [], list(files)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if both := files[name] & files[other]:
                lines.append(f"{name} and {other} share {len(both)} images, such as {min(both)}")
    return lines
