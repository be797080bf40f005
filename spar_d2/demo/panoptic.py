"""Panoptic models in the demo: what they see is drawn by class, with an outline around every segment."""

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

# Class 0 is what the model left out; it is drawn as the photo.
_REST = "background"


def build_demo(
    cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
) -> Demo:
    """The demo of a config's model. Arguments and errors are those of :class:`Demo`, and of :class:`PanopticDemo`."""
    known = {OpenVocabularySegmentor.__name__: Demo, PANOPTIC_FPN: PanopticDemo}
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind not in known:
        raise ValueError(f"MODEL.META_ARCHITECTURE must be {' or '.join(known)} to be drawn, got {kind}")
    return known[kind](cfg, shown, weights, labels, alpha)


class PanopticDemo(Demo):
    """A panoptic model with the way photos go in and pictures come out.

    Classes are numbered: 0 for what the model left out, then stuff, then things, as ``names`` has them.

    Args:
        cfg: a PanopticFPN, and the data set with its classes (``DATASETS.TEST`` or ``DATASETS.TRAIN``).
        shown: ("overlay",): its features have several scales.
        weights: a checkpoint; "" for ``MODEL.WEIGHTS``.
        labels: has no effect, there are always labels.
        alpha: opacity of the classes' colors.

    Raises:
        ValueError: an argument that is not allowed, or no data set, or one that has no classes.
        FileNotFoundError, RuntimeError: weights that are not there or do not fit.
    """

    def __init__(
        self, cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
    ) -> None:
        self._set_look(cfg, shown, alpha)
        self.needs_labels = True
        if self.shown != ("overlay",):
            raise ValueError(f"--show must be overlay for {PANOPTIC_FPN}, got {' '.join(shown)}")
        names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
        if not names:
            raise ValueError("DATASETS.TEST or DATASETS.TRAIN must name the data set whose classes the model has")
        metadata = MetadataCatalog.get(names[0])
        numbers = separate_numbers(names[0], metadata.as_dict())
        stuff = _named(metadata, "stuff", numbers.stuff, numbers.own_stuff)
        things = _named(metadata, "thing", numbers.things, numbers.own_things)
        self._places = {
            **{(False, number): place for place, number in enumerate(stuff, start=1)},
            **{(True, number): place for place, number in enumerate(things, start=1 + len(stuff))},
        }
        known = [(_REST, None), *stuff.values(), *things.values()]
        self.names = [name for name, _ in known]
        own = class_colors(self.names)
        self.colors = [own[place] if color is None else color for place, (_, color) in enumerate(known)]
        self.vocabulary = None
        self.model = build_model(cfg).eval()
        if weights or cfg.MODEL.WEIGHTS:
            Checkpointer(self.model).load(weights or cfg.MODEL.WEIGHTS)

    def _run(self, x: torch.Tensor, size: tuple[int, int]) -> Prediction:
        ids, segments = self.model([{"image": x, "height": size[0], "width": size[1]}])[0]["panoptic_seg"]
        ids = ids.cpu().numpy()
        labels = np.zeros(ids.shape, dtype=np.int64)
        for segment in segments:
            labels[ids == segment["id"]] = self._places[segment["isthing"], segment["category_id"]]
        return Prediction(labels, None, size, segments=ids)


def _named(
    metadata: Metadata, kind: str, numbers: Mapping[int, int], categories: Mapping[int, int]
) -> dict[int, tuple[str, tuple[int, int, int] | None]]:
    """Name and color, if it has one, of the class of each of the model's numbers, in their order."""
    lists = {key: metadata.get(f"{kind}_{key}") or () for key in ("classes", "colors")}

    def entry(key: str, contiguous: int, place: int) -> Any:
        values = lists[key]
        if len(values) > max(numbers):
            return values[contiguous]
        return values[place] if len(values) == len(numbers) else None

    found = {}
    for place, (contiguous, number) in enumerate(sorted(numbers.items())):
        name, color = entry("classes", contiguous, place), entry("colors", contiguous, place)
        found[number] = (str(categories[number]) if name is None else name, None if color is None else tuple(color))
    return found
