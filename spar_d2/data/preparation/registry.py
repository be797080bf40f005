"""Registry of all preparations."""

from __future__ import annotations

from spar_d2.data.preparation.ade20k import Ade20kPreparation
from spar_d2.data.preparation.ade20k_panoptic import Ade20kPanopticPreparation
from spar_d2.data.preparation.cityscapes import CityscapesPreparation
from spar_d2.data.preparation.cityscapes_panoptic import CityscapesPanopticPreparation
from spar_d2.data.preparation.coco_object import CocoObjectPreparation
from spar_d2.data.preparation.common import Preparation
from spar_d2.data.preparation.context import ContextPreparation
from spar_d2.data.preparation.voc import VocPreparation

PREPARATIONS: dict[str, Preparation] = {
    preparation.name: preparation
    for preparation in (
        VocPreparation("voc21", background=True),
        VocPreparation("voc20", background=False),
        CityscapesPreparation("cityscapes"),
        Ade20kPreparation("ade20k"),
        ContextPreparation("context60", background=True),
        ContextPreparation("context59", background=False),
        CocoObjectPreparation("coco_object"),
        VocPreparation("voc21_train", background=True, split="train"),
        CityscapesPreparation("cityscapes_train", "train"),
        Ade20kPreparation("ade20k_train", "train"),
        CityscapesPanopticPreparation("cityscapes_panoptic_train", "train"),
        CityscapesPanopticPreparation("cityscapes_panoptic_val", "val"),
        Ade20kPanopticPreparation("ade20k_panoptic_train", "train"),
        Ade20kPanopticPreparation("ade20k_panoptic_val", "val"),
    )
}

# Names of groups of data sets. Cityscapes' panoptic evaluation also needs the semantic labels.
GROUPS: dict[str, tuple[str, ...]] = {
    "cityscapes_panoptic": (
        *("cityscapes_train", "cityscapes_panoptic_train"),
        *("cityscapes", "cityscapes_panoptic_val"),
    ),
    "ade20k_panoptic": ("ade20k_panoptic_train", "ade20k_panoptic_val"),
}


def find_preparation(name: str) -> Preparation:
    """Return the preparation of a data set.

    Raises:
        ValueError: the data set is unknown.
    """
    if name not in PREPARATIONS:
        raise ValueError(f"data set must be one of {', '.join(PREPARATIONS)}; got {name!r}")
    return PREPARATIONS[name]
