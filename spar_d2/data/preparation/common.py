"""Common parts of all preparations: official archives, label tables, and base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spar_d2.data.datasets.catalog import LABELED_SETS
from spar_d2.utils.images import DAMAGE, open_image

IGNORED = 255
PARTS = {"val": "validation", "train": "training"}
# Table entry of official values that must not occur.
NO_LABEL = 254


class MissingArchive(FileNotFoundError):
    """Official files are missing.

    Args:
        message: what is missing, where to download it and where to unpack it.
        archive: file name of the archive to download.
    """

    def __init__(self, message: str, archive: str) -> None:
        super().__init__(message)
        self.archive = archive


@dataclass(frozen=True)
class ArchiveSpec:
    """Location of the files of an official archive.

    Attributes:
        folders: possible folders, relative to the root; the first existing one is used.
        archive: file name of the archive.
        site: website of the archive.
        unpacked_in: folder to unpack the archive in, relative to the root.
    """

    folders: tuple[str, ...]
    archive: str
    site: str
    unpacked_in: str = "."

    def find(self, root: Path, inside: str = "") -> Path:
        """Return the path of a file or folder ``inside`` the archive.

        Raises:
            MissingArchive: it does not exist; the message says what to do.
        """
        for folder in self.folders:
            if (root / folder / inside).exists():
                return root / folder / inside
        message = f"{root / self.folders[0] / inside} does not exist"
        raise MissingArchive(
            f"{message}: download {self.archive} from {self.site} and unpack it in {root / self.unpacked_in}",
            self.archive,
        )


def read_values(path: Path) -> np.ndarray:
    """Read the values of an official label image: gray values or palette indices.

    Returns:
        (H, W) integers.

    Raises:
        ValueError: the image cannot be read, or has another mode.
    """
    mode, values = read_pixels(path)
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise ValueError(f"the label image {path} must be gray or have a palette, its mode is {mode}")
    return values


def read_pixels(path: Path) -> tuple[str, np.ndarray]:
    """Read the mode and the stored pixels of an image.

    Raises:
        ValueError: the image cannot be read.
    """
    try:
        with open_image(path) as image:
            return image.mode, np.asarray(image)
    except DAMAGE as error:
        raise ValueError(f"the label image {path} cannot be read: {error}") from error


def label_table(labels: dict[int, int], size: int = 256) -> np.ndarray:
    """Create a lookup table (size,) uint8 from official values to classes; missing values get :data:`NO_LABEL`."""
    table = np.full(size, NO_LABEL, dtype=np.uint8)
    table[list(labels)] = list(labels.values())
    return table


def without_background(classes: int) -> np.ndarray:
    """Create the table of a data set whose value 0 is ignored: values 1, 2, ... become classes 0, 1, ..."""
    return label_table({0: IGNORED, **{k + 1: k for k in range(classes)}, IGNORED: IGNORED})


def with_background(classes: int) -> np.ndarray:
    """Create the table of a data set whose values are the classes, including 0 for the background."""
    return label_table({**{k: k for k in range(classes)}, IGNORED: IGNORED})


def relabel(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map official values to classes.

    Args:
        values: (H, W) integers.
        table: (n,) uint8, the class of each value, see :func:`label_table`.

    Returns:
        (H, W) uint8, classes, and 255 for ignored pixels.

    Raises:
        ValueError: a value is not in the table.
    """
    inside = (values >= 0) & (values < len(table))
    labels = table[np.where(inside, values, 0)]
    labels[~inside] = NO_LABEL
    wrong = np.unique(values[labels == NO_LABEL])
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5].tolist())) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(f"values that are no labels of this data set: {shown}")
    return labels


def classes_in(path: Path, values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Call :func:`relabel` for the values of a file; errors name the file."""
    try:
        return relabel(values, table)
    except ValueError as error:
        raise ValueError(f"the label file {path} has {error}") from error


class Labels(ABC):
    """Official labels of a data set, and their conversion."""

    @abstractmethod
    def files(self, name: str) -> tuple[Path, ...]:
        """Return the official label files of an image name. The files may not exist."""

    @abstractmethod
    def convert(self, name: str) -> tuple[np.ndarray, Any]:
        """Convert the labels of an image.

        Returns:
            Pixels to write, (H, W) or (H, W, 3) uint8, and the image's entry for :meth:`Preparation.finish`.

        Raises:
            ValueError: a file is corrupt, or its values do not belong to the data set.
        """


@dataclass(frozen=True)
class ClassLabels(Labels):
    """Semantic labels: one class per pixel.

    Attributes:
        file: maps an image name to its official label file, which may not exist.
        table: class of each official value, see :func:`label_table`.
        read: reads a label file as (H, W) integers, or raises ``ValueError``.
    """

    file: Callable[[str], Path]
    table: np.ndarray
    read: Callable[[Path], np.ndarray] = read_values

    def files(self, name: str) -> tuple[Path, ...]:
        return (self.file(name),)

    def convert(self, name: str) -> tuple[np.ndarray, None]:
        path = self.file(name)
        return classes_in(path, self.read(path), self.table), None


class Preparation(ABC):
    """Locations of the official and converted files of a split.

    Args:
        name: name of the data set.
        split: "val" or "train".
        images_of: data set of :data:`~spar_d2.data.datasets.catalog.LABELED_SETS` with the same images;
            default: ``name``.
    """

    def __init__(self, name: str, split: str = "val", images_of: str = "") -> None:
        self.name, self.split, self.images_of = name, split, images_of or name

    @property
    def part(self) -> str:
        """Name of the split in messages."""
        return PARTS[self.split]

    @property
    def expected(self) -> int:
        """Number of images of the complete data set."""
        return LABELED_SETS[self.images_of].images

    @abstractmethod
    def images(self, root: Path) -> dict[str, Path]:
        """Return the image files by image name, including known but missing ones.

        Raises:
            MissingArchive: there are no images.
        """

    @abstractmethod
    def labels(self, root: Path) -> Labels:
        """Return the official labels.

        Raises:
            MissingArchive: there are no labels.
        """

    def folder(self, root: Path) -> Path:
        """Return the folder of the converted labels."""
        return root / "spar_labels" / self.name

    def prepared(self, root: Path, name: str) -> Path:
        """Return the converted label file of an image name.

        Raises:
            ValueError: the name leads out of the folder.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise ValueError(f"{self.name}: the image name {name!r} leads out of its folder; correct the list")
        return self.folder(root) / f"{name}.png"

    def index(self, root: Path) -> Path | None:
        """Return the index file of the converted labels, which is required to use them; None if there is none."""
        return None

    def finish(self, root: Path, entries: dict[str, Any]) -> None:
        """Write the index file, after all labels.

        Args:
            root: root folder of all data sets.
            entries: entries that :meth:`Labels.convert` returned, by image name, in the order of the data set.
        """
        return None


def names_in_list(path: Path) -> list[str]:
    """Return the first column of a list of images.

    Raises:
        ValueError: it is not a text file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the list {path} is not a UTF-8 text file: {error}") from error
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
