"""ADE20K, as in the scene parsing challenge of 2016."""

from __future__ import annotations

from pathlib import Path

from spar_d2.data.datasets import class_names
from spar_d2.data.preparation.common import PARTS, ArchiveSpec, without_background
from spar_d2.data.preparation.folders import FilePattern, FolderPreparation

FOLDER = "ADEChallengeData2016"
_ARCHIVE = ("ADEChallengeData2016.zip", "data.csail.mit.edu/places/ADEchallenge")


class Ade20kPreparation(FolderPreparation):
    """Official labels 1 to 150, and 0 (other), which is ignored. Written where Detectron2's data set reads them.

    Args:
        name: name of the data set.
        split: "val" or "train".
    """

    def __init__(self, name: str, split: str = "val") -> None:
        super().__init__(name, split, *photos_and_classes(split), without_background(len(class_names.ADE20K)))

    def folder(self, root: Path) -> Path:
        return root / FOLDER / "annotations_detectron2" / self.part


def photos_and_classes(split: str) -> tuple[FilePattern, FilePattern]:
    """Return file patterns of the images and official semantic labels of a split."""
    images, labels = (f"{FOLDER}/{folder}/{PARTS[split]}" for folder in ("images", "annotations"))
    return FilePattern(ArchiveSpec((images,), *_ARCHIVE), ".jpg"), FilePattern(
        ArchiveSpec((labels,), *_ARCHIVE), ".png"
    )
