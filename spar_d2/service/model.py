"""What the service computes: segmentations and features of batches of images, with their times."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.encoders import describe_encoder
from spar_d2.predict import Predictor
from spar_d2.results import Segmentation
from spar_d2.teacher.windows import window_starts
from spar_d2.text import Vocabulary

# The smallest image: the class vectors of new words are computed with it.
_DOT = np.zeros((1, 1, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Options:
    """Options of a segmentation; see :meth:`spar_d2.predict.Predictor.__call__`."""

    logit_scale: float | None = None
    prob_threshold: float = 0.0
    area_threshold: float | None = None
    refine: str = ""
    inference: str = "single_pass"
    stride: int = 24
    scores: bool = False


@dataclass(frozen=True)
class Task:
    """Vocabulary and options of a segmentation. Images with equal tasks are segmented together."""

    vocabulary: Vocabulary
    options: Options


@dataclass(frozen=True)
class Answer:
    """Result for an image.

    Attributes:
        result: a segmentation, or features (D, h, w) float32.
        seconds: time of the model for all images of the batch.
        word_seconds: time of the text tower before that, 0 for known words.
        images: number of images in the batch.
    """

    result: Segmentation | torch.Tensor
    seconds: float
    word_seconds: float
    images: int


class Model:
    """A predictor with the sizes of its encoder.

    Args:
        predictor: loaded model.
        encoder, pretrained: its arguments.
        anyup: whether it has the weights of AnyUp.
        vocabulary: classes of requests without words.

    Attributes:
        patch_size: side of a patch in pixels.
    """

    def __init__(
        self,
        predictor: Predictor,
        encoder: str,
        pretrained: str = "",
        anyup: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._predictor, self.anyup = predictor, anyup
        # The words of clients, which have no end, must not fill the disk.
        self._on_disk = {vocabulary, *map(Vocabulary.load, Vocabulary.built_in())}
        info = describe_encoder(encoder, pretrained)
        self.patch_size, self._window = info.patch_size, info.native_size
        self._known: Vocabulary | None = None

    def patches(self, size: tuple[int, int]) -> int:
        """Return the number of patches in an image of (H, W) pixels."""
        return math.prod(math.ceil(side / self.patch_size) for side in size)

    def windows(self, size: tuple[int, int], stride: int) -> int:
        """Return the number of windows that a sliding window has in an image of (H, W) pixels."""
        padded = (math.ceil(side / self.patch_size) * self.patch_size for side in size)
        return math.prod(len(window_starts(max(side, self._window), self._window, stride)) for side in padded)

    def check(self, task: Task) -> None:
        """Raise ``ValueError`` if the model does not support a task."""
        if "anyup" in task.options.refine and not self.anyup:
            raise ValueError("refine: anyup is not available; the service was started without --anyup FILE")
        stride = task.options.stride
        if not 1 <= stride <= self._window:
            raise ValueError(f"stride must be in 1..{self._window} (the window), got {stride}")

    def run(self, task: Task | None, images: Sequence[np.ndarray]) -> list[Answer]:
        """Segment images (H, W, 3) uint8 RGB of one size, or compute their features without a task."""
        if task is None:
            return [self._features(image) for image in images]
        words, start = self._learn(task.vocabulary), time.perf_counter()
        results = self._predictor(list(images), task.vocabulary, **vars(task.options))
        seconds = time.perf_counter() - start
        return [Answer(result, seconds, words, len(images)) for result in results]

    def _learn(self, vocabulary: Vocabulary) -> float:
        """Compute the class vectors of new words, and return the seconds. They are no part of an image's time."""
        if vocabulary == self._known:
            return 0.0
        start = time.perf_counter()
        self._predictor.cache_words(vocabulary in self._on_disk)
        self._predictor(_DOT, vocabulary)
        self._known = vocabulary
        return time.perf_counter() - start

    def _features(self, image: np.ndarray) -> Answer:
        start = time.perf_counter()
        features = self._predictor.features(image)
        return Answer(features, time.perf_counter() - start, 0.0, 1)
