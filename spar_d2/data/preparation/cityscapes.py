"""Cityscapes, fine annotations."""

from __future__ import annotations

from pathlib import Path

from spar_d2.data.preparation.common import IGNORED, Place, label_table
from spar_d2.data.preparation.folders import Files, FolderPreparation

_SITE = "www.cityscapes-dataset.com/downloads"
_GT_FINE = "cityscapes/gtFine/val"
_IDS = 34
# Official ids of the 19 classes that are evaluated, in their order.
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class CityscapesPreparation(FolderPreparation):
    """Official ids 0 to 33, of which 19 are evaluated and the others ignored.

    The prepared labels lie beside the official ones, named as Cityscapes' own tools name them; what those tools wrote
    is used.

    Args:
        name: of the data set.
    """

    def __init__(self, name: str) -> None:
        ids = {**dict.fromkeys((*range(_IDS), IGNORED), IGNORED), **{k: n for n, k in enumerate(_EVALUATED)}}
        images = Place(("cityscapes/leftImg8bit/val",), "leftImg8bit_trainvaltest.zip", _SITE, "cityscapes")
        labels = Place((_GT_FINE,), "gtFine_trainvaltest.zip", _SITE, "cityscapes")
        super().__init__(
            name, Files(images, "_leftImg8bit.png"), Files(labels, "_gtFine_labelIds.png"), label_table(ids)
        )

    def folder(self, root: Path) -> Path:
        return root / _GT_FINE

    def prepared(self, root: Path, name: str) -> Path:
        return self.folder(root) / f"{name}_gtFine_labelTrainIds.png"
