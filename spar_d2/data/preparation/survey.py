"""What of a benchmark is on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spar_d2.data.benchmarks import BENCHMARKS
from spar_d2.data.preparation.common import MissingArchive, datasets_root
from spar_d2.data.preparation.registry import find_preparation


@dataclass(frozen=True)
class Survey:
    """What of a benchmark is on disk.

    Attributes:
        name: of the benchmark.
        images: validation images found.
        prepared: those of them with prepared labels.
        missing: archives to fetch; official labels that are prepared already are not asked for.
        reason: what the first of these is about, and where to get it; "" where none is.
    """

    name: str
    images: int
    prepared: int
    missing: tuple[str, ...]
    reason: str

    @property
    def expected(self) -> int:
        """Number of validation images of the whole data set."""
        return BENCHMARKS[self.name].images

    @property
    def advice(self) -> str:
        """What is to be done for a complete data set, in a few words; "" where nothing is."""
        if self.missing:
            return f"fetch {' and '.join(self.missing)}"
        steps = []
        if self.images < self.expected:
            steps.append(f"find {self.expected - self.images} missing images")
        if self.prepared < self.images:
            steps.append("prepare")
        return ", ".join(steps)


def survey(name: str, root: str | os.PathLike | None = None) -> Survey:
    """Look what of a benchmark is on disk, without opening an image.

    Args:
        name: of the benchmark.
        root: the folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Raises:
        ValueError: no such benchmark, or a list of its images that is damaged.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    images, missing = {}, []
    try:
        images = {key: path for key, path in preparation.images(folder).items() if path.is_file()}
    except MissingArchive as error:
        missing.append(error)
    prepared = sum(preparation.prepared(folder, key).is_file() for key in images)
    if not images or prepared < len(images):
        try:
            preparation.labels(folder)
        except MissingArchive as error:
            missing.append(error)
    archives = tuple(dict.fromkeys(error.archive for error in missing))
    return Survey(name, len(images), prepared, archives, str(missing[0]) if missing else "")


def prepared_pairs(name: str, root: str | os.PathLike | None = None) -> list[tuple[str, Path, Path]]:
    """Name, image and prepared label of every validation image that has both, in the order of the data set.

    Args, raises: as :func:`survey`; also :class:`MissingArchive` without any images.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    pairs = [(key, image, preparation.prepared(folder, key)) for key, image in preparation.images(folder).items()]
    return [pair for pair in pairs if pair[1].is_file() and pair[2].is_file()]
