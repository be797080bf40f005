"""What of a data set is on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spar_d2.data.preparation.common import MissingArchive, datasets_root
from spar_d2.data.preparation.registry import find_preparation


@dataclass(frozen=True)
class Status:
    """What of a data set is on disk.

    Attributes:
        name: of the data set.
        images: images found.
        prepared: those of them with prepared labels.
        finished: there is what goes with the prepared labels, see :meth:`Preparation.index`.
        missing: archives to fetch; official labels that are prepared already are not asked for.
        reason: what the first of these is about, and where to get it; "" where none is.
    """

    name: str
    images: int
    prepared: int
    finished: bool
    missing: tuple[str, ...]
    reason: str

    @property
    def expected(self) -> int:
        """Number of images of the whole data set."""
        return find_preparation(self.name).expected

    @property
    def part(self) -> str:
        """What images these are: "validation" or "training"."""
        return find_preparation(self.name).part

    @property
    def advice(self) -> str:
        """What is to be done for a complete data set, in a few words; "" where nothing is."""
        if self.missing:
            return f"fetch {' and '.join(self.missing)}"
        steps = []
        if self.images < self.expected:
            steps.append(f"find {self.expected - self.images} missing images")
        if self.prepared < self.images or not self.finished:
            steps.append("prepare")
        return ", ".join(steps)


def survey(name: str, root: str | os.PathLike | None = None) -> Status:
    """Look what of a data set is on disk, without opening an image.

    Args:
        name: of the data set.
        root: the folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Raises:
        ValueError: no such data set, or a list of its images that is damaged.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    images, missing = {}, []
    try:
        images = {key: path for key, path in preparation.images(folder).items() if path.is_file()}
    except MissingArchive as error:
        missing.append(error)
    prepared = sum(preparation.prepared(folder, key).is_file() for key in images)
    index = preparation.index(folder)
    finished = index is None or index.is_file()
    if not images or prepared < len(images) or not finished:
        try:
            preparation.labels(folder)
        except MissingArchive as error:
            missing.append(error)
    archives = tuple(dict.fromkeys(error.archive for error in missing))
    return Status(name, len(images), prepared, finished, archives, str(missing[0]) if missing else "")


def prepared_pairs(name: str, root: str | os.PathLike | None = None) -> list[tuple[str, Path, Path]]:
    """Name, image and prepared label of every image that has both, in the order of the data set.

    Args, raises: as :func:`survey`; also :class:`MissingArchive` without any images.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    pairs = [(key, image, preparation.prepared(folder, key)) for key, image in preparation.images(folder).items()]
    return [pair for pair in pairs if pair[1].is_file() and pair[2].is_file()]
