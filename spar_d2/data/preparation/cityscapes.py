"""Cityscapes, fine annotations."""

from __future__ import annotations

from pathlib import Path

from spar_d2.data.preparation.common import IGNORED, ArchiveSpec, label_table
from spar_d2.data.preparation.folders import FilePattern, FolderPreparation

GT_FINE = "cityscapes/gtFine"
# Number of official ids, and the ids of the 19 evaluated classes in order.
IDS = 34
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_SITE = "www.cityscapes-dataset.com/downloads"


class CityscapesPreparation(FolderPreparation):
    """Official ids 0 to 33, of which 19 are evaluated and the others are ignored.

    Converted labels are stored next to the official ones, with the same names as those of Cityscapes' tools. Files that
    these tools wrote are reused.

    Args:
        name: name of the data set.
        split: "val" or "train".
    """

    def __init__(self, name: str, split: str = "val") -> None:
        ids = {**dict.fromkeys((*range(IDS), IGNORED), IGNORED), **{k: n for n, k in enumerate(EVALUATED)}}
        super().__init__(name, split, *photos_and_labels(split, "_gtFine_labelIds.png"), label_table(ids))

    def folder(self, root: Path) -> Path:
        return root / GT_FINE / self.split

    def prepared(self, root: Path, name: str) -> Path:
        return self.folder(root) / f"{name}_gtFine_labelTrainIds.png"


def photos_and_labels(split: str, suffix: str) -> tuple[FilePattern, FilePattern]:
    """Return file patterns of the images of a split, and of the official labels with the given suffix."""
    images = ArchiveSpec((f"cityscapes/leftImg8bit/{split}",), "leftImg8bit_trainvaltest.zip", _SITE, "cityscapes")
    labels = ArchiveSpec((f"{GT_FINE}/{split}",), "gtFine_trainvaltest.zip", _SITE, "cityscapes")
    return FilePattern(images, "_leftImg8bit.png"), FilePattern(labels, suffix)
