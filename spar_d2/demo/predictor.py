"""Segments an image and visualizes the result."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.data.transforms import resize_shortest_edge
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA
from spar_d2.text import Vocabulary
from spar_d2.visualization import class_colors, fit_pca_colors
from spar_d2.visualization.overlay import draw_overlay

SHOWN = ("overlay", "pca")
EXAMPLE = '--vocabulary "cat, kitten; dog; sky"'
Coloring = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ClassArea:
    """A class in an image; ``area`` is its fraction of the image, 0..1."""

    number: int
    name: str
    pixels: int
    area: float


@dataclass(frozen=True)
class Prediction:
    """Result of the model for an image.

    Attributes:
        labels: (H, W) class indices at the size of the image; None if not requested.
        features: (D, h, w), on the CPU; None if not requested.
        covered: (H, W) in image pixels of the area that the feature grid covers, at least the image.
        seconds: run time of the model.
        segments: (H, W) segment ids, which are outlined; None to outline classes.
    """

    labels: np.ndarray | None
    features: torch.Tensor | None
    covered: tuple[int, int]
    seconds: float = 0.0
    segments: np.ndarray | None = None

    def needed_labels(self) -> np.ndarray:
        """Return ``labels``.

        Raises:
            ValueError: labels were not requested.
        """
        if self.labels is None:
            raise ValueError("labels must be True for masks and records: the demo was built for features only")
        return self.labels


class Demo:
    """Demo of a segmentor: preprocesses images, runs the model, and visualizes results.

    Args:
        cfg: config of the model and of the preprocessing.
        shown: one or both of ``SHOWN``. With both, features are drawn to the right of the overlay.
        weights: weights of a student; "" for ``MODEL.WEIGHTS``, or the pre-trained encoder if that is empty.
        labels: compute labels even if they are not shown.
        alpha: opacity of the class colors.

    Raises:
        ValueError: there is no vocabulary, or an argument has an invalid value.
        FileNotFoundError, RuntimeError: the weights do not exist or do not fit the model.
    """

    def __init__(
        self, cfg: CfgNode, shown: Sequence[str], weights: str = "", labels: bool = False, alpha: float = 0.55
    ) -> None:
        self._set_look(cfg, shown, alpha)
        self.needs_labels = labels or "overlay" in shown
        if self.needs_labels and not (cfg.MODEL.SPAR.VOCABULARY or cfg.DATASETS.TEST):
            raise ValueError(f"no classes to segment; name them, for example {EXAMPLE}")
        output = ["MODEL.SPAR.OUTPUT", "labels" if self.needs_labels else "features"]
        self.model: OpenVocabularySegmentor = build_segmentor(cfg, weights or cfg.MODEL.WEIGHTS, output)
        augmented = self.needs_labels and cfg.TEST.AUG.ENABLED
        self._segmentor = SegmentorWithTTA(cfg, self.model) if augmented else self.model
        self.vocabulary: Vocabulary | None = self.model.vocabulary
        self.names: list[str] = []
        if self.needs_labels:
            if self.vocabulary is None:
                raise ValueError(f"the test data set has no class names; name the classes, for example {EXAMPLE}")
            self.names = self.vocabulary.names
            # Compute the class vectors now, so that the first image is not slower.
            self.model.class_vectors(self.vocabulary)
        self.colors = self._class_colors()

    def _set_look(self, cfg: CfgNode, shown: Sequence[str], alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha}")
        self.cfg, self.shown, self.alpha = cfg, tuple(shown), alpha

    @property
    def words(self) -> list[list[str]]:
        """Prompts of every class, or its name for models without prompts."""
        return [list(words) for words in self.vocabulary.classes] if self.vocabulary else [[n] for n in self.names]

    def _class_colors(self) -> list[tuple[int, int, int]]:
        """Return the colors of the data set if its classes are used, or default colors."""
        if not self.cfg.MODEL.SPAR.VOCABULARY and self.names:
            dataset_colors = MetadataCatalog.get(self.cfg.DATASETS.TEST[0]).get("stuff_colors") or ()
            if len(dataset_colors) == len(self.names):
                return [tuple(color) for color in dataset_colors]
        return class_colors(self.names)

    @torch.no_grad()
    def see(self, image: np.ndarray) -> Prediction:
        """Run the model on an image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            ValueError: the image is too large for the GPU's memory.
        """
        height, width = image.shape[:2]
        x = self._input(image)
        started = time.perf_counter()
        try:
            seen = self._run(x, (height, width))
        except torch.cuda.OutOfMemoryError as error:
            size = f"{x.shape[2]}x{x.shape[1]}"
            remedy = f"use smaller images: --opts INPUT.MIN_SIZE_TEST {min(x.shape[1:]) // 2}"
            raise ValueError(f"the GPU has too little memory for an image of {size} pixels; {remedy}") from error
        return dataclasses.replace(seen, seconds=time.perf_counter() - started)

    def _run(self, x: torch.Tensor, size: tuple[int, int]) -> Prediction:
        labels = features = None
        if self.needs_labels:
            output = self._segmentor([{"image": x, "height": size[0], "width": size[1]}])[0]
            labels = output["sem_seg_labels"].cpu().numpy()
        if "pca" in self.shown:
            features = self.model.encode(x).float().cpu()
        return Prediction(labels, features, self._covered(features, x, size))

    def _input(self, image: np.ndarray) -> torch.Tensor:
        """Resize an image as in Detectron2's tests, and convert it to (3, H, W) uint8 in the config's channel order."""
        image = resize_shortest_edge(image, self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def _covered(self, features: torch.Tensor | None, x: torch.Tensor, size: tuple[int, int]) -> tuple[int, int]:
        if features is None:
            return size
        patch = self.model.backbone.encoder.patch_size
        sides = zip(features.shape[1:], x.shape[1:], size)
        height, width = (max(math.ceil(cells * patch * side / input_side), side) for cells, input_side, side in sides)
        return height, width

    def find(self, labels: np.ndarray) -> list[ClassArea]:
        """Return the classes in an image, sorted by area."""
        areas = np.bincount(labels.ravel(), minlength=len(self.names))
        found = sorted(np.flatnonzero(areas).tolist(), key=lambda number: -areas[number])
        return [ClassArea(k, self.names[k], int(areas[k]), float(areas[k] / labels.size)) for k in found]

    def record(self, labels: np.ndarray) -> dict:
        """Summarize the classes in an image for a JSON file."""
        classes = [
            {"number": f.number, "name": f.name, "area": f.area, "pixels": f.pixels, "color": self.colors[f.number]}
            for f in self.find(labels)
        ]
        height, width = labels.shape
        return {"width": width, "height": height, "classes": classes, "vocabulary": self.words}

    def draw(
        self, image: np.ndarray, seen: Prediction, coloring: Coloring | None = None, listed: Sequence[int] | None = None
    ) -> np.ndarray:
        """Visualize a prediction.

        Args:
            image: (H, W, 3) uint8 RGB.
            seen: result of :meth:`see` for the image.
            coloring: function from features to colors; default: fitted to these features.
            listed: classes in the legend; default: the classes in the image.

        Returns:
            (H', W', 3) uint8 RGB.
        """
        parts = []
        if seen.features is not None:
            colors = (coloring or fit_pca_colors([seen.features]))(seen.features)
            parts.append(self._enlarged(colors.numpy(), seen.covered, image.shape[:2]))
        if "overlay" not in self.shown:
            return parts[0]
        legend = listed is None or len(listed) > 0
        look = (self.names, self.colors, self.alpha, legend, listed, parts, seen.segments)
        return draw_overlay(image, seen.needed_labels(), *look)

    @staticmethod
    def _enlarged(colors: np.ndarray, covered: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Upsample colors (h, w, 3) in 0..1 to (H, W, 3) uint8."""
        pixels = (colors * 255).round().astype(np.uint8)
        height, width = size
        large = cv2.resize(pixels, (covered[1], covered[0]), interpolation=cv2.INTER_NEAREST)
        return np.ascontiguousarray(large[:height, :width])
