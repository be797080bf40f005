"""Open-vocabulary segmentation of images in Python: a warm model, and one function call."""

from __future__ import annotations

import functools
import numbers
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import torch

from spar_d2.data.image_arguments import ImageLike, read_image
from spar_d2.encoders.precision import AUTO
from spar_d2.encoders.registry import check_has_text
from spar_d2.modeling.example_embeddings import needs_text
from spar_d2.modeling.image_segmentor import Inference, Reading
from spar_d2.modeling.model_settings import ModelSettings, as_text
from spar_d2.modeling.refinement import Refinement, parse_refine
from spar_d2.results import Segmentation
from spar_d2.results.geotiff import segment_raster
from spar_d2.text import Vocabulary

__all__ = ["Predictor", "Segmentation", "segment"]

# Bounds of a batch. Larger images are encoded one at a time.
_IMAGES_AT_ONCE, _PIXELS_AT_ONCE = 8, 2**22

# Lists of one kind of images are no lists of all kinds to type checkers.
AnyImage = TypeVar("AnyImage", bound=ImageLike)
Classes = Vocabulary | str | os.PathLike | Sequence[str | Sequence[str]]


class Predictor:
    """A loaded model that segments images into the classes of any vocabulary, at their original size.

    Several threads may share it: they decode images and copy results in parallel, and take turns at the model. The
    class vectors of the last few vocabularies are kept. Text embeddings are cached on disk, as with
    ``MODEL.SPAR.TEXT_CACHE`` "auto".

    Args:
        encoder, pretrained, dinov3_repo, dinov3_backbone, pixel_mean, pixel_std, quick_gelu, pretrained_part: see
            :func:`spar_d2.encoders.build_encoder`.
        templates: see :func:`spar_d2.text.load_templates`.
        device: "cpu", "cuda", ...; None means "cuda" if there is a GPU, else "cpu".
        precision: "float32", "bfloat16", "float16", or "auto" (bfloat16 on GPUs that support it, else float32).
        anyup: weights of AnyUp, for the refinement "anyup"; see :func:`spar_d2.refine.load_anyup`.

    Raises:
        ValueError: an argument is invalid.
        FileNotFoundError, RuntimeError: see the functions above.
    """

    def __init__(
        self,
        encoder: str | os.PathLike,
        pretrained: str | os.PathLike,
        templates: str | os.PathLike = "imagenet",
        device: str | torch.device | None = None,
        dinov3_repo: str | os.PathLike = "",
        dinov3_backbone: str | os.PathLike = "",
        precision: str = AUTO,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        quick_gelu: bool | None = None,
        pretrained_part: str = "",
        anyup: str | os.PathLike = "",
    ) -> None:
        weights = (encoder, pretrained, templates, device, dinov3_repo, dinov3_backbone, precision)
        self._load(ModelSettings.of(*weights, pixel_mean, pixel_std, quick_gelu, pretrained_part, anyup))

    @classmethod
    def _of(cls, model: ModelSettings) -> Predictor:
        predictor = cls.__new__(cls)
        predictor._load(model)
        return predictor

    def _load(self, model: ModelSettings) -> None:
        self._encoder_name, self._segmentor = model.spec.name, model.load()

    @overload
    def __call__(
        self,
        images: ImageLike,
        vocabulary: Classes,
        *,
        logit_scale: float | None = ...,
        prob_threshold: float = ...,
        area_threshold: float | None = ...,
        refine: str = ...,
        inference: str = ...,
        window: int = ...,
        stride: int = ...,
        scores: bool = ...,
    ) -> Segmentation: ...

    @overload
    def __call__(
        self,
        images: list[AnyImage] | tuple[AnyImage, ...],
        vocabulary: Classes,
        *,
        logit_scale: float | None = ...,
        prob_threshold: float = ...,
        area_threshold: float | None = ...,
        refine: str = ...,
        inference: str = ...,
        window: int = ...,
        stride: int = ...,
        scores: bool = ...,
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        images: ImageLike | list[AnyImage] | tuple[AnyImage, ...],
        vocabulary: Classes,
        *,
        logit_scale: float | None = None,
        prob_threshold: float = 0.0,
        area_threshold: float | None = None,
        refine: str = "",
        inference: str = "single_pass",
        window: int = 0,
        stride: int = 24,
        scores: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or several.

        Images of the same size in a list are encoded together, at most 8, and fewer if they are large. Rounding may
        then differ from that of a single image.

        Args:
            images: an image, or a list or tuple of images. An image is a file name, a PIL image, an (H, W, 3) uint8 RGB
                array, the bytes or a binary file object of an encoded image, or an RGB tensor (3, H, W), uint8 or
                floating point in 0..1.
            vocabulary: a vocabulary, a list of class names, inline text ("cat, kitten; dog; sky"), the name of a
                built-in vocabulary, or a file; see :meth:`spar_d2.text.Vocabulary.of`. For classes by example, an
                examples file or the result of :meth:`spar_d2.text.Vocabulary.from_examples`.
            logit_scale: see :func:`spar_d2.modeling.segment_features`; None uses the encoder's logit scale.
            prob_threshold, area_threshold: see :func:`spar_d2.modeling.segment_features`.
            refine: refinement of the class scores, such as "lposs,lposs+"; see ``MODEL.SPAR.REFINE``.
            inference: "single_pass", or "sliding_window" for the features of
                :class:`spar_d2.teacher.SlidingWindowTeacher`.
            window, stride: settings of the sliding window in pixels. A window of 0 means the pre-training image size of
                the encoder.
            scores: whether results have :attr:`Segmentation.scores`.

        Returns:
            A segmentation, or a list of them for a list or tuple.

        Raises:
            ValueError: an argument is invalid, or an image cannot be read or has an unsupported shape or dtype.
            FileNotFoundError: a file does not exist.
            RuntimeError: see :func:`spar_d2.encoders.build_text_tower`.
        """
        vocabulary = Vocabulary.of(vocabulary)
        if needs_text(vocabulary):
            check_has_text(self._encoder_name)
        _check_numbers(logit_scale=logit_scale or 0, prob_threshold=prob_threshold, area_threshold=area_threshold or 0)
        model = self._segmentor
        scale = model.encoder.logit_scale if logit_scale is None else logit_scale
        reading = Reading(Refinement(parse_refine(refine), anyup=model.anyup), scale, prob_threshold, area_threshold)
        mode = model.resolve(Inference(inference, window, stride))
        several = isinstance(images, (list, tuple))
        pixels = [read_image(image) for image in (images if several else [images])]
        results: dict[int, Segmentation] = {}
        for batch in _batches(pixels):
            outputs = model.segment([pixels[index] for index in batch], vocabulary, reading, mode, scores)
            for index, output in zip(batch, outputs):
                labels, best = output.numpy()
                patch_size = model.encoder.patch_size if scores else 0
                results[index] = Segmentation.of(labels, vocabulary.names, best, patch_size, pixels[index])
        return [results[index] for index in range(len(pixels))] if several else results[0]

    def segment_raster(
        self,
        source: str | os.PathLike,
        path: str | os.PathLike,
        vocabulary: Classes,
        *,
        bands: Sequence[int] = (1, 2, 3),
        value_range: tuple[float, float] | None = None,
        tile: int = 1024,
        overlap: int = 128,
        **options: Any,
    ) -> None:
        """Segment a georeferenced raster of any size in tiles, and write its labels as a GeoTIFF.

        Args:
            source, path, bands, value_range, tile, overlap: see :func:`spar_d2.results.geotiff.segment_raster`.
            vocabulary, options: arguments of :meth:`__call__`. Thresholds of areas apply to each tile.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: see these functions.
        """
        classes, settings = Vocabulary.of(vocabulary), (bands, value_range, tile, overlap)
        segment_raster(lambda pixels: self(pixels, classes, **options).labels, classes.names, source, path, *settings)

    def cache_words(self, is_on: bool) -> None:
        """Choose whether text embeddings of new words are written to the disk; else, they are in memory only."""
        self._segmentor.embeddings.is_saving = is_on

    def features(self, image: ImageLike) -> torch.Tensor:
        """Compute the dense features of an image in a single pass.

        Args:
            image: an image, as in :meth:`__call__`.

        Returns:
            (D, ceil(H / p), ceil(W / p)) float32 on the CPU, for the patch size p.

        Raises:
            ValueError, FileNotFoundError: the image cannot be read, or has an unsupported shape or dtype.
        """
        return self._segmentor.features(read_image(image)).float().cpu()


def segment(
    image: ImageLike,
    vocabulary: Classes,
    encoder: str | os.PathLike,
    pretrained: str | os.PathLike,
    templates: str | os.PathLike = "imagenet",
    device: str | torch.device | None = None,
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

    The models of the last four sets of arguments are kept, and loaded again if a file changes. To control when a model
    is loaded and freed, use :class:`Predictor`.

    Args:
        image, vocabulary, logit_scale, prob_threshold, area_threshold, refine: see :meth:`Predictor.__call__`.
        encoder, pretrained, dinov3_repo, dinov3_backbone, pixel_mean, pixel_std, quick_gelu, pretrained_part,
            templates, device, precision, anyup: see :class:`Predictor`. ``anyup`` is only read if it is part of
            ``refine``.

    Raises:
        ValueError: an argument is invalid, or the image cannot be read or has an unsupported shape or dtype.
        FileNotFoundError, RuntimeError: see :class:`Predictor`.
    """
    vocabulary = Vocabulary.of(vocabulary)
    if "anyup" not in parse_refine(refine):
        anyup = as_text("anyup", anyup) and ""
    weights = (encoder, pretrained, templates, device, dinov3_repo, dinov3_backbone, precision)
    model = ModelSettings.of(*weights, pixel_mean, pixel_std, quick_gelu, pretrained_part, anyup)
    if needs_text(vocabulary):
        # Before the encoder is built, which may take long.
        check_has_text(model.spec.name)
    pixels = read_image(image)
    with _LOADING:
        predictor = _kept(model, model.signatures())
    return predictor(
        pixels,
        vocabulary,
        logit_scale=logit_scale,
        prob_threshold=prob_threshold,
        area_threshold=area_threshold,
        refine=refine,
    )


# Otherwise, two threads would load the same model.
_LOADING = threading.Lock()


@functools.lru_cache(maxsize=4)
def _kept(model: ModelSettings, signatures: tuple[tuple[int, ...], ...]) -> Predictor:
    # The signatures are part of the cache key, so that the model is loaded again after a file changes.
    return Predictor._of(model)


def _batches(images: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Yield the indices of images of one size that are encoded together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    for (height, width, _), group in groups.items():
        step = max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))
        yield from (group[start : start + step] for start in range(0, len(group), step))


def _check_numbers(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
