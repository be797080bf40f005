"""The preparation of every benchmark."""

from __future__ import annotations

from spar_d2.data.benchmarks import BENCHMARKS
from spar_d2.data.preparation.ade20k import Ade20kPreparation
from spar_d2.data.preparation.cityscapes import CityscapesPreparation
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
    )
}


def find_preparation(name: str) -> Preparation:
    """The preparation of a benchmark.

    Raises:
        ValueError: there is no such benchmark.
    """
    if name not in PREPARATIONS:
        raise ValueError(f"a data set must be one of {', '.join(BENCHMARKS)}; got {name!r}")
    return PREPARATIONS[name]
