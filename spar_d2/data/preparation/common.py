"""What the preparations of all data sets share: places of official files, values of official labels."""

from __future__ import annotations

import os
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
# In tables: an official value that must not occur.
NO_LABEL = 254


class MissingArchive(FileNotFoundError):
    """Official files are not there.

    Args:
        message: what is missing, where to fetch it and where to unpack it.
        archive: what has to be fetched.
    """

    def __init__(self, message: str, archive: str) -> None:
        super().__init__(message)
        self.archive = archive


@dataclass(frozen=True)
class ArchiveSpec:
    """Where the files of an official archive lie.

    Attributes:
        folders: relative to the root; the first that is there is used.
        archive: its file name.
        site: where it is to be had.
        unpacked_in: the folder it is unpacked in, relative to the root.
    """

    folders: tuple[str, ...]
    archive: str
    site: str
    unpacked_in: str = "."

    def find(self, root: Path, inside: str = "") -> Path:
        """A file or folder ``inside`` of it.

        Raises:
            MissingArchive: it is not there; says what to do.
        """
        for folder in self.folders:
            if (root / folder / inside).exists():
                return root / folder / inside
        message = f"there is no {root / self.folders[0] / inside}"
        raise MissingArchive(
            f"{message}: fetch {self.archive} from {self.site} and unpack it in {root / self.unpacked_in}", self.archive
        )


def read_values(path: Path) -> np.ndarray:
    """The values of an official label image: its grays, or its indices into a palette.

    Returns:
        (H, W) integers.

    Raises:
        ValueError: it cannot be read, or is of another kind.
    """
    mode, values = read_pixels(path)
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise ValueError(f"the label image {path} must be gray or have a palette, its mode is {mode}")
    return values


def read_pixels(path: Path) -> tuple[str, np.ndarray]:
    """Mode and pixels of an image as they are stored.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open_image(path) as image:
            return image.mode, np.asarray(image)
    except DAMAGE as error:
        raise ValueError(f"the label image {path} cannot be read: {error}") from error


def label_table(labels: dict[int, int], size: int = 256) -> np.ndarray:
    """The class of every official value below ``size``: those of ``labels``, and :data:`NO_LABEL`; (size,) uint8."""
    table = np.full(size, NO_LABEL, dtype=np.uint8)
    table[list(labels)] = list(labels.values())
    return table


def without_background(classes: int) -> np.ndarray:
    """The table of a data set whose value 0 is ignored: 1, 2, ... are 0, 1, ..."""
    return label_table({0: IGNORED, **{k + 1: k for k in range(classes)}, IGNORED: IGNORED})


def with_background(classes: int) -> np.ndarray:
    """The table of a data set whose values are the classes, the background's 0 included."""
    return label_table({**{k: k for k in range(classes)}, IGNORED: IGNORED})


def relabel(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Official values to classes.

    Args:
        values: (H, W) integers.
        table: (n,) uint8, the class of every value, see :func:`label_table`.

    Returns:
        (H, W) uint8, classes and 255, which is ignored.

    Raises:
        ValueError: a value that is not in the table.
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
    """:func:`relabel` of what was read from a file, which its errors name."""
    try:
        return relabel(values, table)
    except ValueError as error:
        raise ValueError(f"the label file {path} has {error}") from error


class Labels(ABC):
    """The official labels of a data set, and what becomes of them."""

    @abstractmethod
    def files(self, name: str) -> tuple[Path, ...]:
        """The official label files of an image, given the image's name; they need not be there."""

    @abstractmethod
    def convert(self, name: str) -> tuple[np.ndarray, Any]:
        """The prepared labels of an image.

        Returns:
            Pixels to write, (H, W) or (H, W, 3) uint8, and what :meth:`Preparation.finish` has to know of them.

        Raises:
            ValueError: a file is damaged, or has other values than the data set.
        """


@dataclass(frozen=True)
class ClassLabels(Labels):
    """One class for every pixel.

    Attributes:
        file: the official label file of an image, given the image's name; it need not be there.
        table: class of every official value, see :func:`label_table`.
        read: reads such a file as (H, W) integers, or raises ``ValueError``.
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
    """Where one split of a data set lies, official and prepared.

    Args:
        name: of the data set.
        split: "val" or "train".
        images_of: the one of :data:`~spar_d2.data.datasets.catalog.LABELED_SETS` with the same images;
            default: ``name``.
    """

    def __init__(self, name: str, split: str = "val", images_of: str = "") -> None:
        self.name, self.split, self.images_of = name, split, images_of or name

    @property
    def part(self) -> str:
        """The split, as it is called in texts."""
        return PARTS[self.split]

    @property
    def expected(self) -> int:
        """Number of images of the whole data set."""
        return LABELED_SETS[self.images_of].images

    @abstractmethod
    def images(self, root: Path) -> dict[str, Path]:
        """The images by name; those known of that are missing too.

        Raises:
            MissingArchive: none are there.
        """

    @abstractmethod
    def labels(self, root: Path) -> Labels:
        """The official labels.

        Raises:
            MissingArchive: none are there.
        """

    def folder(self, root: Path) -> Path:
        """Where prepared labels go."""
        return root / "spar_labels" / self.name

    def prepared(self, root: Path, name: str) -> Path:
        """The prepared label file of an image, given the image's name.

        Raises:
            ValueError: the name leads out of the folder.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise ValueError(f"{self.name}: the name {name!r} of an image leads out of its folder; correct the list")
        return self.folder(root) / f"{name}.png"

    def index(self, root: Path) -> Path | None:
        """A file about all prepared labels, without which they are of no use; None where none is needed."""
        return None

    def finish(self, root: Path, entries: dict[str, Any]) -> None:
        """Write the index, once all labels are.

        Args:
            root: the folder of all data sets.
            entries: what :meth:`Labels.convert` told of every image, by name, in the order of the data set.
        """
        return None


def names_in_list(path: Path) -> list[str]:
    """The first word of every line of a list of images.

    Raises:
        ValueError: it is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the list {path} is no text file: {error}") from error
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def datasets_root(root: str | os.PathLike | None = None) -> Path:
    """The folder of all data sets: the one given, or ``$DETECTRON2_DATASETS``, or "datasets"."""
    return Path(root or os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
