"""Open-vocabulary segmentation of one image in one function call."""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image

from spar_d2.data.images import read_rgb
from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.precision import AUTO, PRECISIONS, resolve_precision
from spar_d2.encoders.registry import build, check_has_text
from spar_d2.encoders.weight_files import files_of
from spar_d2.modeling.banded_upsampling import ScoreMap
from spar_d2.modeling.example_embeddings import ClassVectors, class_vectors, needs_text
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.modeling.postprocessing import segment_scores
from spar_d2.modeling.refinement import EncodedImage, Refinement, parse_refine
from spar_d2.modeling.words import text_embeddings
from spar_d2.refine import AnyUp, load_anyup
from spar_d2.text import TextEmbeddings, Vocabulary

if TYPE_CHECKING:
    from spar_d2.encoders.origin import Triple


@dataclass(frozen=True)
class Segmentation:
    """Segmentation result of one image.

    Attributes:
        labels: (H, W) int64, indices into ``names``.
        names: names of all classes.
        areas: fraction of the image (0..1) of each class found in it, by class name.
    """

    labels: np.ndarray
    names: list[str]
    areas: dict[str, float]

    def draw(self, image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """Draw the segmentation over the image, with class labels and a legend. Requires Detectron2.

        Args:
            image: the segmented image, in any form that :func:`segment` accepts.

        Returns:
            (H', W', 3) uint8 RGB image.

        Raises:
            ValueError: the image has a different size or cannot be read.
            FileNotFoundError: the image file does not exist.
        """
        from spar_d2.visualization import class_colors
        from spar_d2.visualization.overlay import draw_overlay

        return draw_overlay(_read(image), self.labels, self.names, class_colors(self.names))


def segment(
    image: str | os.PathLike | Image.Image | np.ndarray,
    vocabulary: str | Sequence[str] | Vocabulary,
    encoder: str | os.PathLike,
    pretrained: str | os.PathLike,
    templates: str = "imagenet",
    device: str = "cpu",
    dinov3_repo: str | os.PathLike = "",
    dinov3_backbone: str | os.PathLike = "",
    logit_scale: float | None = None,
    prob_threshold: float = 0.0,
    area_threshold: float | None = None,
    precision: str = AUTO,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    quick_gelu: bool | None = None,
    pretrained_part: str = "",
    refine: str = "",
    anyup: str | os.PathLike = "",
) -> Segmentation:
    """Segment an image into the classes of a vocabulary, in a single pass at its original size.

    The encoder of the last call is cached and reused if the arguments are the same. Text embeddings are cached on disk,
    as with ``MODEL.SPAR.TEXT_CACHE`` "auto".

    Args:
        image: file name, PIL image, or (H, W, 3) uint8 RGB array.
        vocabulary: a vocabulary, a list of class names, inline text ("cat, kitten; dog; sky"), the name of a built-in
            vocabulary, or a file; see :meth:`spar_d2.text.Vocabulary.of`. For classes by example, an examples file or
            the result of :meth:`spar_d2.text.Vocabulary.from_examples`.
        encoder, pretrained, dinov3_repo, dinov3_backbone, pixel_mean, pixel_std, quick_gelu, pretrained_part: see
            :func:`spar_d2.encoders.build_encoder`.
        templates: see :func:`spar_d2.text.load_templates`.
        device: "cpu", "cuda", ...
        logit_scale: see :func:`spar_d2.modeling.segment_features`; None uses the encoder's logit scale.
        prob_threshold, area_threshold: see :func:`spar_d2.modeling.segment_features`.
        precision: "float32", "bfloat16", "float16", or "auto" (bfloat16 on GPUs that support it, else float32).
        refine: refinement of the class scores, such as "lposs,lposs+"; see ``MODEL.SPAR.REFINE``.
        anyup: weights of AnyUp, if it is part of ``refine``; see :func:`spar_d2.refine.load_anyup`.

    Raises:
        ValueError: an argument is invalid, or the image cannot be read or has an unsupported shape or dtype.
        FileNotFoundError, RuntimeError: see the functions above.
    """
    vocabulary = Vocabulary.of(vocabulary)
    _check_numbers(logit_scale=logit_scale or 0, prob_threshold=prob_threshold, area_threshold=area_threshold or 0)
    templates, anyup, steps = _as_text("templates", templates), _as_text("anyup", anyup), parse_refine(refine)
    anyup = anyup if "anyup" in steps else ""
    spec = EncoderSpec(
        _as_text("encoder", encoder),
        _as_text("pretrained", pretrained),
        dinov3_repo=_as_text("dinov3_repo", dinov3_repo),
        dinov3_backbone=_as_text("dinov3_backbone", dinov3_backbone),
        # build() validates these sequences.
        pixel_mean=cast("Triple | None", pixel_mean),
        pixel_std=cast("Triple | None", pixel_std),
        quick_gelu=quick_gelu,
        pretrained_part=_as_text("pretrained_part", pretrained_part),
    )
    if needs_text(vocabulary):
        check_has_text(spec.name)
    if precision not in (*PRECISIONS, AUTO):
        raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, AUTO))}; got {precision!r}")
    device = _device(device)
    precision = resolve_precision(precision, device)
    pixels = _read(image)
    # The file signatures are part of the cache key, so that the model is reloaded after a file changes.
    files = filter(os.path.isfile, (spec.name, spec.pretrained, spec.dinov3_backbone, templates, anyup))
    stats = [part.stat() for name in files for part in files_of(name) if part.is_file()]
    signatures = tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
    loaded = _load(spec, templates, device, precision, anyup, signatures)
    refinement = Refinement(steps, anyup=loaded.anyup)
    scale = loaded.encoder.logit_scale if logit_scale is None else logit_scale
    thresholds = (scale, prob_threshold, area_threshold)
    labels = loaded.labels(pixels, vocabulary, refinement, *thresholds).cpu().numpy()
    areas = np.bincount(labels.ravel(), minlength=len(vocabulary)) / labels.size
    class_areas = {name: float(area) for name, area in zip(vocabulary.names, areas) if area > 0}
    return Segmentation(labels, vocabulary.names, class_areas)


def _check_numbers(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}")


def _as_text(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be a name or a path, got {value!r}")
    return os.fspath(value)


def _device(name: str | torch.device) -> str:
    try:
        return str(torch.device(name))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be "cpu", "cuda", ...; got {name!r}') from error


def _read(image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
    if not isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
        raise ValueError(
            f"image must be a file, a PIL image or an array (H, W, 3) uint8 RGB, got {type(image).__name__}"
        )
    pixels = np.asarray(image) if isinstance(image, np.ndarray) else read_rgb(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 RGB, got {pixels.dtype} {pixels.shape}")
    # Tensors do not support negative strides, as in image[:, :, ::-1].
    return np.ascontiguousarray(pixels)


class _Loaded:
    """A model on its device, with the class vectors of the last vocabulary."""

    def __init__(self, encoder: DenseEncoder, embeddings: TextEmbeddings, device: str, anyup: AnyUp | None) -> None:
        self.encoder, self.anyup = encoder, anyup
        encoder_stats = (encoder.pixel_mean, encoder.pixel_std)
        self.pixels = PixelConversion((0, 0, 0), (1, 1, 1), "RGB", *encoder_stats).to(device)
        self._embeddings, self._device = embeddings, device
        self._vocabulary: Vocabulary | None = None

    def class_vectors(self, vocabulary: Vocabulary) -> ClassVectors:
        """Return the vectors of all classes, on the device."""
        if vocabulary != self._vocabulary:
            self._classes = class_vectors(vocabulary, self._embeddings, self.encode, self.encoder).to(self._device)
            self._vocabulary = vocabulary
        return self._classes

    def labels(
        self,
        pixels: np.ndarray,
        vocabulary: Vocabulary,
        refinement: Refinement,
        logit_scale: float,
        prob_threshold: float,
        area_threshold: float | None,
    ) -> torch.Tensor:
        """Label the pixels of an RGB image (H, W, 3) uint8, (H, W) int64 on the device."""
        thresholds = (logit_scale, prob_threshold, area_threshold)
        classes, image, normalized = self.class_vectors(vocabulary), self._encoded(pixels), prob_threshold > 0
        size = pixels.shape[0], pixels.shape[1]
        if refinement.at_pixels:
            return refinement.pixel_scores(image, classes, size, normalized).labels(*thresholds)
        grid = ScoreMap(refinement.patch_scores(image, classes, normalized), self._covered(image.features))
        return segment_scores([grid], classes.query_class, size, *thresholds)

    def encode(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[float, float]]:
        """Encode an RGB image (H, W, 3) uint8 to features (D, h, w), and return them with the size that they cover."""
        features = self._encoded(pixels).features
        return features, self._covered(features)

    def _covered(self, features: torch.Tensor) -> tuple[float, float]:
        return features.shape[1] * self.encoder.patch_size, features.shape[2] * self.encoder.patch_size

    @torch.no_grad()
    def _encoded(self, pixels: np.ndarray) -> EncodedImage:
        x = torch.tensor(pixels).to(self._device).permute(2, 0, 1)[None].float()
        # An autocast context of the caller must not change the precision.
        with torch.autocast(x.device.type, enabled=False):
            x = self.pixels(x)
            return EncodedImage(self.encoder, lambda: x, self.encoder(x)[0])


@functools.lru_cache(maxsize=1)
def _load(
    spec: EncoderSpec, templates: str, device: str, precision: str, anyup: str, signatures: tuple[tuple[int, ...], ...]
) -> _Loaded:
    upsampling = load_anyup(anyup, "anyup") if anyup else None
    encoder = build(spec).to(device).accelerate(precision).freeze()
    return _Loaded(encoder, text_embeddings(spec, templates, "auto", device), device, upsampling)
