"""The 80 things of COCO 2017, and a background class."""

from __future__ import annotations

from spar_d2.data.preparation.common import IGNORED, ArchiveSpec, label_table
from spar_d2.data.preparation.folders import FilePattern, FolderPreparation

# COCO's category ids: 1..90 are things, some of which were never used; stuff follows.
_THINGS, _LAST = 90, 182
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


class CocoObjectPreparation(FolderPreparation):
    """The label maps of COCO-Stuff, whose values are category ids minus 1.

    The 80 things become classes 1 to 80, ordered by id. Everything else, including stuff, becomes the background class
    0. Unlabeled pixels (255) are ignored, because they may show things.

    Args:
        name: name of the data set.
    """

    def __init__(self, name: str) -> None:
        things = [number for number in range(1, _THINGS + 1) if number not in _UNUSED]
        values = {**dict.fromkeys(range(_LAST), 0), **{k - 1: n for n, k in enumerate(things, 1)}, IGNORED: IGNORED}
        images = ArchiveSpec(("coco/val2017",), "val2017.zip", "cocodataset.org", "coco")
        labels = ArchiveSpec(
            ("coco/stuffthingmaps/val2017", "coco/stuffthingmaps_trainval2017/val2017"),
            "stuffthingmaps_trainval2017.zip",
            "github.com/nightrome/cocostuff",
            "coco/stuffthingmaps",
        )
        super().__init__(name, "val", FilePattern(images, ".jpg"), FilePattern(labels, ".png"), label_table(values))
