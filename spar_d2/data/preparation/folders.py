"""Data sets that consist of all images in a folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spar_d2.data.preparation.common import ArchiveSpec, ClassLabels, Labels, MissingArchive, Preparation


@dataclass(frozen=True)
class FilePattern:
    """All files in a folder, with subfolders, that end in ``suffix``. Names are relative paths without the suffix."""

    place: ArchiveSpec
    suffix: str

    def names(self, root: Path) -> list[str]:
        """Return the names of the existing files.

        Raises:
            MissingArchive: the folder does not exist.
        """
        folder = self.place.find(root)
        found = (path for path in folder.rglob(f"*{self.suffix}") if not path.name.startswith("."))
        return [path.relative_to(folder).as_posix().removesuffix(self.suffix) for path in found]

    def file(self, root: Path, name: str) -> Path:
        """Return the path of the file of a name, which may not exist."""
        return self.place.find(root) / f"{name}{self.suffix}"


class FolderPreparation(Preparation):
    """A data set with a folder of images and a folder of labels.

    Args:
        name, split, images_of: see :class:`Preparation`.
        photos: image files.
        official: official label files.
        table: class of each official value, see :func:`~spar_d2.data.preparation.common.label_table`.
    """

    def __init__(
        self, name: str, split: str, photos: FilePattern, official: FilePattern, table: np.ndarray, images_of: str = ""
    ) -> None:
        super().__init__(name, split, images_of)
        self.photos, self.official, self.table = photos, official, table

    def images(self, root: Path) -> dict[str, Path]:
        names = set(self.photos.names(root))
        # Labels reveal images that were not copied.
        with contextlib.suppress(MissingArchive):
            names.update(self.official.names(root))
        return {name: self.photos.file(root, name) for name in sorted(names)}

    def labels(self, root: Path) -> Labels:
        self.official.place.find(root)
        return ClassLabels(lambda name: self.official.file(root, name), self.table)
