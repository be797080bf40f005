"""An encoder on its device that segments RGB images of one size at a time. Does not need Detectron2."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.encoders import DenseEncoder
from spar_d2.modeling.banded_upsampling import ScoreMap
from spar_d2.modeling.example_embeddings import ClassVectors, class_vectors
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.modeling.postprocessing import cosine_scores, segment_scores
from spar_d2.modeling.refinement import EncodedImage, Refinement
from spar_d2.refine import AnyUp
from spar_d2.teacher.sliding import check_window, sliding_window_features
from spar_d2.text import TextEmbeddings, Vocabulary

INFERENCES = ("single_pass", "sliding_window")
_VOCABULARIES_KEPT = 8


@dataclass(frozen=True)
class Inference:
    """Inference mode.

    Attributes:
        kind: one of ``INFERENCES``.
        window, stride: settings of the sliding window in pixels; a window of 0 means the pre-training image size of the
            encoder.
    """

    kind: str = INFERENCES[0]
    window: int = 0
    stride: int = 24


@dataclass(frozen=True)
class Reading:
    """How labels are read from class scores; see :func:`spar_d2.modeling.segment_features`."""

    refinement: Refinement
    logit_scale: float
    prob_threshold: float = 0.0
    area_threshold: float | None = None


@dataclass(frozen=True)
class Output:
    """Labels (H, W) int64 of an image and, if requested, class scores (classes, h, w) float32, on the device."""

    labels: torch.Tensor
    scores: torch.Tensor | None

    def numpy(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return both as arrays."""
        return self.labels.cpu().numpy(), None if self.scores is None else self.scores.cpu().numpy()


class ImageSegmentor:
    """Segments images with an encoder, and keeps the class vectors of the last few vocabularies.

    Methods may be called from several threads. A lock makes them run one after another.

    Args:
        encoder: encoder on the device.
        embeddings: computes the text embeddings of a vocabulary.
        device: device of the encoder.
        anyup: upsampling model for the refinement "anyup".
    """

    def __init__(self, encoder: DenseEncoder, embeddings: TextEmbeddings, device: str, anyup: AnyUp | None) -> None:
        self.encoder, self.anyup = encoder, anyup
        encoder_stats = (encoder.pixel_mean, encoder.pixel_std)
        self._pixels = PixelConversion((0, 0, 0), (1, 1, 1), "RGB", *encoder_stats).to(device)
        self.embeddings, self._device = embeddings, device
        self._classes: dict[tuple[Vocabulary, Inference], ClassVectors] = {}
        self._lock = threading.Lock()

    def resolve(self, inference: Inference) -> Inference:
        """Validate an inference mode, and return it with the default window.

        Raises:
            ValueError: the mode, the window or the stride is invalid.
        """
        if inference.kind not in INFERENCES:
            raise ValueError(f"inference must be one of {', '.join(INFERENCES)}; got {inference.kind!r}")
        if inference.kind == INFERENCES[0]:
            return Inference()
        for name, value in (("window", inference.window), ("stride", inference.stride)):
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        window, stride, _ = check_window(self.encoder, inference.window, inference.stride, 0)
        return Inference(inference.kind, window, stride)

    def segment(
        self,
        images: Sequence[np.ndarray],
        vocabulary: Vocabulary,
        reading: Reading,
        inference: Inference,
        scores: bool = False,
    ) -> list[Output]:
        """Segment images of one size.

        Args:
            images: RGB images (H, W, 3) uint8, which are encoded as one batch.
            vocabulary: classes.
            reading: how labels are read from class scores.
            inference: result of :meth:`resolve`.
            scores: whether scores are returned.

        Returns:
            An output for each image. The score of a class is the largest cosine similarity of a patch and its vectors,
            in -1..1, before refinement; -1 for a class without vectors.
        """
        with self._lock:
            classes = self._class_vectors(vocabulary, inference)
            encoded = self._encoded(images, inference)
            return [
                Output(
                    self._labels(image, classes, reading),
                    _class_scores(image, classes, len(vocabulary)) if scores else None,
                )
                for image in encoded
            ]

    def features(self, pixels: np.ndarray) -> torch.Tensor:
        """Encode an RGB image (H, W, 3) uint8 in a single pass to features (D, h, w), on the device."""
        with self._lock:
            return self._encoded([pixels], Inference())[0].features

    def _class_vectors(self, vocabulary: Vocabulary, inference: Inference) -> ClassVectors:
        key = (vocabulary, inference)
        if key not in self._classes:
            while len(self._classes) >= _VOCABULARIES_KEPT:
                self._classes.pop(next(iter(self._classes)))
            encode = functools.partial(self._encode_example, inference=inference)
            sliding = inference.kind != INFERENCES[0]
            settings = [inference.kind, inference.window, inference.stride] if sliding else ()
            vectors = class_vectors(vocabulary, self.embeddings, encode, self.encoder, settings)
            self._classes[key] = vectors.to(self._device)
        return self._classes[key]

    def _encode_example(self, pixels: np.ndarray, inference: Inference) -> tuple[torch.Tensor, tuple[float, float]]:
        features = self._encoded([pixels], inference)[0].features
        return features, self._covered(features)

    def _labels(self, image: EncodedImage, classes: ClassVectors, reading: Reading) -> torch.Tensor:
        refinement, normalized = reading.refinement, reading.prob_threshold > 0
        thresholds = (reading.logit_scale, reading.prob_threshold, reading.area_threshold)
        if refinement.at_pixels:
            return refinement.pixel_scores(image, classes, image.size, normalized).labels(*thresholds)
        grid = ScoreMap(refinement.patch_scores(image, classes, normalized), self._covered(image.features))
        return segment_scores([grid], classes.query_class, image.size, *thresholds)

    def _covered(self, features: torch.Tensor) -> tuple[float, float]:
        return features.shape[1] * self.encoder.patch_size, features.shape[2] * self.encoder.patch_size

    @torch.no_grad()
    def _encoded(self, images: Sequence[np.ndarray], inference: Inference) -> list[EncodedImage]:
        x = torch.stack([torch.tensor(pixels) for pixels in images]).to(self._device).permute(0, 3, 1, 2).float()
        # An autocast context of the caller must not change the precision.
        with torch.autocast(x.device.type, enabled=False):
            x = self._pixels(x)
            if inference.kind == INFERENCES[0]:
                features = self.encoder(x)
            else:
                features = sliding_window_features(self.encoder, x, inference.window, inference.stride)
        reads = (functools.partial(torch.unsqueeze, one, 0) for one in x)
        return [EncodedImage(self.encoder, *pair) for pair in zip(reads, features)]


@torch.no_grad()
def _class_scores(image: EncodedImage, classes: ClassVectors, count: int) -> torch.Tensor:
    """Return the largest cosine similarity (count, h, w) float32 of the vectors of each class."""
    scores = cosine_scores(classes.centered(image.features), classes.vectors).permute(2, 0, 1)
    index = classes.query_class[:, None, None].expand_as(scores)
    # Rounding may exceed 1.
    return scores.new_full((count, *scores.shape[1:]), -1.0).scatter_reduce_(0, index, scores, "amax").clamp_(-1, 1)
