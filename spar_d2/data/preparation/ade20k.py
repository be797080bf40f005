"""ADE20K's scene parsing challenge of 2016."""

from __future__ import annotations

from pathlib import Path

from spar_d2.data import class_names
from spar_d2.data.preparation.common import Place, without_background
from spar_d2.data.preparation.folders import Files, FolderPreparation

_ARCHIVE = ("ADEChallengeData2016.zip", "data.csail.mit.edu/places/ADEchallenge")


class Ade20kPreparation(FolderPreparation):
    """Labels 1 to 150, and 0 (other), which is ignored. They are written to where Detectron2's own data set reads them.

    Args:
        name: of the data set.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            name,
            Files(Place(("ADEChallengeData2016/images/validation",), *_ARCHIVE), ".jpg"),
            Files(Place(("ADEChallengeData2016/annotations/validation",), *_ARCHIVE), ".png"),
            without_background(len(class_names.ADE20K)),
        )

    def folder(self, root: Path) -> Path:
        return root / "ADEChallengeData2016/annotations_detectron2/validation"
