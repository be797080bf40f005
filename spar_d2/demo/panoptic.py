"""Demo of models with the classes of a data set: panoptic models, whose segments are outlined, and linear probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.data.build import PANOPTIC_FPN
from spar_d2.demo.predictor import Demo, Prediction
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.utils.panoptic_numbers import separate_numbers
from spar_d2.visualization import class_colors

# Name of class 0, which stands for pixels without a segment. They are drawn without color.
_NO_SEGMENT = "background"
# Semantic segmentation models with the classes of a data set.
SEMANTIC = ("ProbeSegmentor", "SemanticSegmentor")


def build_demo(
    cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
) -> Demo:
    """Build the demo of a config; arguments and exceptions as :class:`Demo` and :class:`FixedClassesDemo`."""
    known = {OpenVocabularySegmentor.__name__: Demo, PANOPTIC_FPN: PanopticDemo}
    known |= dict.fromkeys(SEMANTIC, SemanticDemo)
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind not in known:
        raise ValueError(f"MODEL.META_ARCHITECTURE must be {' or '.join(known)} in the demo, got {kind}")
    return known[kind](cfg, shown, weights, labels, alpha)


class FixedClassesDemo(Demo):
    """Demo of a model that was trained on the classes of a data set.

    Args:
        cfg: config of the model, whose ``DATASETS.TEST`` or ``DATASETS.TRAIN`` defines the classes.
        shown: must be ("overlay",).
        weights: checkpoint; "" for ``MODEL.WEIGHTS``.
        labels: ignored, labels are always computed.
        alpha: opacity of the class colors.

    Raises:
        ValueError: an argument has an invalid value, or there is no data set with classes.
        FileNotFoundError, RuntimeError: the weights do not exist or do not fit the model.
    """

    def __init__(
        self, cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
    ) -> None:
        self._set_look(cfg, shown, alpha)
        self.needs_labels = True
        if self.shown != ("overlay",):
            raise ValueError(f"--show must be overlay for {cfg.MODEL.META_ARCHITECTURE}, got {' '.join(shown)}")
        names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
        if not names:
            raise ValueError("DATASETS.TEST or DATASETS.TRAIN must name the data set with the model's classes")
        self._set_classes(names[0], MetadataCatalog.get(names[0]))
        self.vocabulary = None
        self.model = build_model(cfg).eval()
        if weights or cfg.MODEL.WEIGHTS:
            Checkpointer(self.model).load(weights or cfg.MODEL.WEIGHTS)

    def _set_classes(self, dataset: str, metadata: Metadata) -> None:
        """Set the names and colors of the classes."""
        raise NotImplementedError


class SemanticDemo(FixedClassesDemo):
    """Demo of a semantic segmentation model with fixed classes, such as a linear probe."""

    def _set_classes(self, dataset: str, metadata: Metadata) -> None:
        self.names = list(metadata.get("stuff_classes") or ())
        if not self.names:
            raise ValueError(f"the data set {dataset!r} has no stuff_classes in its metadata, so classes have no names")
        self.colors = self._class_colors()

    def _run(self, x: torch.Tensor, size: tuple[int, int]) -> Prediction:
        output = self.model([{"image": x, "height": size[0], "width": size[1]}])[0]
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        return Prediction(labels.cpu().numpy(), None, size)


class PanopticDemo(FixedClassesDemo):
    """Demo of a panoptic model.

    The classes in ``names`` are: 0 for pixels without a segment, then stuff, then things.

    Attributes:
        category_index: class index of each category id of the data set.
    """

    def _set_classes(self, dataset: str, metadata: Metadata) -> None:
        numbers = separate_numbers(dataset, metadata.as_dict())
        stuff = _named(metadata, "stuff", numbers.stuff, numbers.own_stuff)
        things = _named(metadata, "thing", numbers.things, numbers.own_things)
        self._class_index = {
            **{(False, number): index for index, number in enumerate(stuff, start=1)},
            **{(True, number): index for index, number in enumerate(things, start=1 + len(stuff))},
        }
        known = [(_NO_SEGMENT, None), *stuff.values(), *things.values()]
        self.names = [name for name, _ in known]
        default_colors = class_colors(self.names)
        self.colors = [default_colors[index] if color is None else color for index, (_, color) in enumerate(known)]
        self.category_index = {
            **{numbers.own_stuff[number]: self._class_index[False, number] for number in stuff},
            **{numbers.own_things[number]: self._class_index[True, number] for number in things},
        }

    def _run(self, x: torch.Tensor, size: tuple[int, int]) -> Prediction:
        ids, segments = self.model([{"image": x, "height": size[0], "width": size[1]}])[0]["panoptic_seg"]
        ids = ids.cpu().numpy()
        labels = np.zeros(ids.shape, dtype=np.int64)
        for segment in segments:
            labels[ids == segment["id"]] = self._class_index[segment["isthing"], segment["category_id"]]
        return Prediction(labels, None, size, segments=ids)


def _named(
    metadata: Metadata, kind: str, numbers: Mapping[int, int], categories: Mapping[int, int]
) -> dict[int, tuple[str, tuple[int, int, int] | None]]:
    """Return the name and, if available, the color of each of the model's classes, in order."""
    lists = {key: metadata.get(f"{kind}_{key}") or () for key in ("classes", "colors")}

    def entry(key: str, contiguous: int, index: int) -> Any:
        values = lists[key]
        if len(values) > max(numbers):
            return values[contiguous]
        return values[index] if len(values) == len(numbers) else None

    result = {}
    for index, (contiguous, number) in enumerate(sorted(numbers.items())):
        name, color = entry("classes", contiguous, index), entry("colors", contiguous, index)
        result[number] = (str(categories[number]) if name is None else name, None if color is None else tuple(color))
    return result
