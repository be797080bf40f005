"""Semantic segmentation benchmarks of the paper with their evaluation protocols, and training splits.

Needs no Detectron2.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from spar_d2.data.datasets import class_names
from spar_d2.data.datasets.class_names import BACKGROUND
from spar_d2.data.datasets.colors import voc_colors

# Name of OpenCLIP's encoder family, which has its own thresholds on some data sets.
_OPEN_CLIP = "open_clip ViT"


@dataclass(frozen=True, kw_only=True)
class LabeledSet:
    """A semantic segmentation data set.

    Attributes:
        name: name of the data set in Detectron2's catalog.
        images: number of images.
        classes: official class names; label k in label maps is the k-th of them, and 255 is ignored.
        vocabulary: name of the built-in vocabulary of these classes; "" for the name of the data set.
    """

    name: str
    images: int
    classes: tuple[str, ...]
    vocabulary: str = ""

    def colors(self) -> list[list[int]]:
        """Return an RGB color, 0..255, for every class: the VOC color of its label, black for a background."""
        first = 0 if self.classes[0] == BACKGROUND else 1
        return voc_colors(first + len(self.classes))[first:].tolist()


@dataclass(frozen=True, kw_only=True)
class Benchmark(LabeledSet):
    """Validation split of a data set, with the paper's evaluation protocol.

    Attributes:
        title: column title in the paper's table.
        min_size, max_size: short side of images in pixels, unless the long side would exceed the maximum.
        logit_scale: factor on the cosine scores before the softmax.
        prob_threshold, area_threshold: see :func:`spar_d2.modeling.segment_features`; 0 disables them.
        open_clip: values of these fields that differ for OpenCLIP encoders.
        in_mean: whether the paper's mean over data sets includes it.
    """

    title: str
    min_size: int = 672
    max_size: int = 2048
    logit_scale: float = 40.0
    prob_threshold: float = 0.0
    area_threshold: float = 0.0
    open_clip: Mapping[str, float] = field(default_factory=dict, hash=False)
    in_mean: bool = True

    def settings(self, family: str) -> dict[str, int | float]:
        """Return the protocol as config keys.

        Args:
            family: name of the encoder's family, see :func:`spar_d2.encoders.registry.find_family`.
        """
        overrides = self.open_clip if family == _OPEN_CLIP else {}
        thresholds = ("logit_scale", "prob_threshold", "area_threshold")
        return {
            "INPUT.MIN_SIZE_TEST": self.min_size,
            "INPUT.MAX_SIZE_TEST": self.max_size,
            **{f"MODEL.SPAR.{key.upper()}": float(overrides.get(key, getattr(self, key))) for key in thresholds},
        }


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="voc21",
            title="VOC21",
            images=1449,
            classes=(BACKGROUND, *class_names.VOC),
            logit_scale=65.0,
            open_clip={"prob_threshold": 0.1, "area_threshold": 0.1},
        ),
        Benchmark(name="voc20", title="VOC20", images=1449, classes=class_names.VOC),
        Benchmark(name="cityscapes", title="CS", images=500, classes=class_names.CITYSCAPES, min_size=1024),
        Benchmark(name="ade20k", title="ADE", images=2000, classes=class_names.ADE20K),
        Benchmark(
            name="context60",
            title="C60",
            images=5105,
            classes=(BACKGROUND, *class_names.CONTEXT),
            logit_scale=50.0,
            prob_threshold=0.1,
        ),
        Benchmark(name="context59", title="C59", images=5105, classes=class_names.CONTEXT),
        # Not in the paper, which therefore gives no settings for it.
        Benchmark(
            name="coco_object",
            title="COCO-Obj",
            images=5000,
            classes=(BACKGROUND, *class_names.COCO_THINGS),
            in_mean=False,
        ),
    )
}


def _training_split(benchmark: str, images: int) -> LabeledSet:
    classes = BENCHMARKS[benchmark].classes
    return LabeledSet(name=f"{benchmark}_train", images=images, classes=classes, vocabulary=benchmark)


# Training splits of benchmarks, with the same classes. They are not used for evaluation.
TRAINING_SPLITS: dict[str, LabeledSet] = {
    split.name: split
    for split in (
        _training_split("voc21", 1464),
        _training_split("cityscapes", 2975),
        _training_split("ade20k", 20210),
    )
}

# All data sets, benchmarks first.
LABELED_SETS: Mapping[str, LabeledSet] = ChainMap(TRAINING_SPLITS, cast("dict[str, LabeledSet]", BENCHMARKS))
