"""Status of a data set on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spar_d2.data.preparation.common import MissingArchive
from spar_d2.data.preparation.registry import find_preparation
from spar_d2.utils.environment import datasets_root


@dataclass(frozen=True)
class Status:
    """Status of a data set on disk.

    Attributes:
        name: name of the data set.
        images: number of existing images.
        prepared: number of existing images with converted labels.
        finished: whether the index file exists or is not needed, see :meth:`Preparation.index`.
        missing: archives to download, without those of labels that are already converted.
        reason: message about the first missing archive and its website; "" if none is missing.
    """

    name: str
    images: int
    prepared: int
    finished: bool
    missing: tuple[str, ...]
    reason: str

    @property
    def expected(self) -> int:
        """Number of images of the complete data set."""
        return find_preparation(self.name).expected

    @property
    def part(self) -> str:
        """Name of the split: "validation" or "training"."""
        return find_preparation(self.name).part

    @property
    def advice(self) -> str:
        """Short instructions to complete the data set; "" if it is complete."""
        if self.missing:
            return f"download {' and '.join(self.missing)}"
        steps = []
        if self.images < self.expected:
            steps.append(f"find {self.expected - self.images} missing images")
        if self.prepared < self.images or not self.finished:
            steps.append("prepare")
        return ", ".join(steps)


def survey(name: str, root: str | os.PathLike | None = None) -> Status:
    """Determine the status of a data set, without opening images.

    Args:
        name: name of the data set.
        root: root folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Raises:
        ValueError: the data set is unknown, or a list of its images is corrupt.
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
    """Return (name, image, converted label) of all images that have both files, in the order of the data set.

    Arguments and exceptions as in :func:`survey`; also raises :class:`MissingArchive` if there are no images.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    pairs = [(key, image, preparation.prepared(folder, key)) for key, image in preparation.images(folder).items()]
    return [pair for pair in pairs if pair[1].is_file() and pair[2].is_file()]
