"""Demo of models that were trained on labels: panoptic models, whose segments are outlined, and semantic ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.data.build import MASK_TRANSFORMER, PANOPTIC_FPN, dataset_of_classes
from spar_d2.demo.predictor import Demo, Prediction
from spar_d2.modeling.mask_transformer import MaskTransformer
from spar_d2.modeling.mask_transformer.settings import CLASSIFIERS, TASKS
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.text import PanopticVocabulary
from spar_d2.utils.panoptic_numbers import class_values, separate_numbers
from spar_d2.visualization import class_colors

# Name of class 0, which stands for pixels without a segment. They are drawn without color.
_NO_SEGMENT = "background"
# Semantic segmentation models with the classes of a data set.
SEMANTIC = ("ProbeSegmentor", "SemanticSegmentor")


def build_demo(
    cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
) -> Demo:
    """Build the demo of a config; arguments and exceptions as :class:`Demo` and :class:`TrainedDemo`."""
    known = {OpenVocabularySegmentor.__name__: Demo, PANOPTIC_FPN: PanopticDemo}
    known[MASK_TRANSFORMER] = PanopticDemo if is_panoptic(cfg) else SemanticDemo
    known |= dict.fromkeys(SEMANTIC, SemanticDemo)
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind not in known:
        raise ValueError(f"MODEL.META_ARCHITECTURE must be {' or '.join(known)} in the demo, got {kind}")
    return known[kind](cfg, shown, weights, labels, alpha)


def is_panoptic(cfg: CfgNode) -> bool:
    """Return whether the model of a config gives panoptic segmentations."""
    kind = cfg.MODEL.META_ARCHITECTURE
    return kind == PANOPTIC_FPN or (kind == MASK_TRANSFORMER and cfg.MODEL.MASK_TRANSFORMER.TASK != TASKS[1])


def has_text_classifier(cfg: CfgNode) -> bool:
    """Return whether the model of a config is a MaskTransformer whose classes are words."""
    return cfg.MODEL.META_ARCHITECTURE == MASK_TRANSFORMER and cfg.MODEL.MASK_TRANSFORMER.CLASSIFIER == CLASSIFIERS[1]


def check_new_classes(cfg: CfgNode, flag: str) -> None:
    """Raise ``ValueError`` if a flag gives classes to a trained model whose classes are fixed."""
    if not has_text_classifier(cfg):
        kind = cfg.MODEL.META_ARCHITECTURE
        other = "; only MODEL.MASK_TRANSFORMER.CLASSIFIER text takes other classes" if kind == MASK_TRANSFORMER else ""
        raise ValueError(f"{flag}: this {kind} model has a fixed set of classes; remove {flag}{other}")


class TrainedDemo(Demo):
    """Demo of a model that was trained on labels.

    Args:
        cfg: config of the model, whose ``DATASETS.TEST`` or ``DATASETS.TRAIN`` defines the classes, or
            ``MODEL.SPAR.VOCABULARY`` if the classes are words.
        shown: must be ("overlay",).
        weights: checkpoint; "" for ``MODEL.WEIGHTS``.
        labels: ignored, labels are always computed.
        alpha: opacity of the class colors.

    Raises:
        ValueError: an argument has an invalid value, there is no data set with classes, or its classes are not those of
            the model.
        FileNotFoundError, RuntimeError: the weights do not exist or do not fit the model.
    """

    def __init__(
        self, cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
    ) -> None:
        self._set_look(cfg, shown, alpha)
        self.needs_labels = True
        if self.shown != ("overlay",):
            raise ValueError(f"--show must be overlay for {cfg.MODEL.META_ARCHITECTURE}, got {' '.join(shown)}")
        self.vocabulary = None
        self._synonyms: list[list[str]] = []
        name = ""
        if has_text_classifier(cfg) and cfg.MODEL.SPAR.VOCABULARY:
            self._set_words(PanopticVocabulary.of(cfg.MODEL.SPAR.VOCABULARY, is_panoptic(cfg)))
        else:
            name = dataset_of_classes(cfg)
            self._set_classes(name, MetadataCatalog.get(name))
        self.model = build_model(_of_one_output(cfg)).eval()
        if isinstance(self.model, MaskTransformer):
            self.model.check_classes(name, *self._counts())
        if weights or cfg.MODEL.WEIGHTS:
            Checkpointer(self.model).load(weights or cfg.MODEL.WEIGHTS)

    @property
    def words(self) -> list[list[str]]:
        return self._synonyms or super().words

    def _set_classes(self, dataset: str, metadata: Metadata) -> None:
        """Set the names and colors of the classes."""
        raise NotImplementedError

    def _set_words(self, words: PanopticVocabulary) -> None:
        """Set the names, synonyms and colors of classes that are words."""
        raise NotImplementedError

    def _counts(self) -> tuple[int, int]:
        """Return the numbers of thing and stuff classes."""
        raise NotImplementedError


def _of_one_output(cfg: CfgNode) -> CfgNode:
    """Return the config of a model that only computes what is drawn."""
    if cfg.MODEL.META_ARCHITECTURE != MASK_TRANSFORMER:
        return cfg
    result = cfg.clone()
    result.defrost()
    result.MODEL.MASK_TRANSFORMER.OUTPUTS, result.MODEL.SPAR.OUTPUT = (), "labels"
    return result


class SemanticDemo(TrainedDemo):
    """Demo of a semantic segmentation model, such as a linear probe."""

    def _set_classes(self, dataset: str, metadata: Metadata) -> None:
        self.names = list(metadata.get("stuff_classes") or ())
        if not self.names:
            raise ValueError(f"the data set {dataset!r} has no stuff_classes in its metadata, so classes have no names")
        colors = metadata.get("stuff_colors") or ()
        known = len(colors) == len(self.names)
        self.colors = [tuple(color) for color in colors] if known else class_colors(self.names)

    def _set_words(self, words: PanopticVocabulary) -> None:
        self.names = words.vocabulary.names
        self.colors = class_colors(self.names)
        self._synonyms = [list(synonyms) for synonyms in words.vocabulary.classes]

    def _counts(self) -> tuple[int, int]:
        return 0, len(self.names)

    def _run(self, x: torch.Tensor, size: tuple[int, int]) -> Prediction:
        output = self.model([{"image": x, "height": size[0], "width": size[1]}])[0]
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        return Prediction(labels.cpu().numpy(), None, size)


class PanopticDemo(TrainedDemo):
    """Demo of a panoptic model.

    The classes in ``names`` are: 0 for pixels without a segment, then stuff, then things.

    Attributes:
        category_index: class index of each category id of the data set; empty if the classes are those of a
            vocabulary.
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

    def _set_words(self, words: PanopticVocabulary) -> None:
        order = [*range(words.things, len(words)), *range(words.things)]
        self._class_index = {
            (number < words.things, number if number < words.things else number - words.things + 1): index
            for index, number in enumerate(order, start=1)
        }
        self.names = [_NO_SEGMENT, *(words.vocabulary.names[number] for number in order)]
        self.colors = class_colors(self.names)
        self._synonyms = [[_NO_SEGMENT], *(list(words.vocabulary.classes[number]) for number in order)]
        self.category_index = {}

    def _counts(self) -> tuple[int, int]:
        things = sum(isthing for isthing, _ in self._class_index)
        return things, len(self._class_index) - things

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
    names, colors = (class_values(metadata.get(f"{kind}_{key}") or (), numbers) for key in ("classes", "colors"))
    return {
        number: (str(categories[number]) if name is None else name, None if color is None else tuple(color))
        for number, name, color in zip(sorted(numbers.values()), names, colors)
    }
