"""Segmentation of one image in one call."""

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
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.modeling.postprocessing import segment_features
from spar_d2.modeling.words import text_embeddings
from spar_d2.text import TextEmbeddings, Vocabulary

if TYPE_CHECKING:
    from spar_d2.encoders.origin import Triple


@dataclass(frozen=True)
class Segmentation:
    """Labels of one image.

    Attributes:
        labels: (H, W) int64, index into ``names``.
        names: name of every class.
        areas: share of the image, 0..1, for every class that was found, by name; no two of them have the same one.
    """

    labels: np.ndarray
    names: list[str]
    areas: dict[str, float]

    def draw(self, image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """The segmentation over its photo, with labels and a legend; needs Detectron2.

        Args:
            image: the photo, as :func:`segment` takes it.

        Returns:
            (H', W', 3) uint8 RGB.

        Raises:
            ValueError: a photo of another size, or one that cannot be read.
            FileNotFoundError: no such file.
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
) -> Segmentation:
    """Segment an image into the classes of a vocabulary, in a single pass at its own size.

    The encoder is kept from the last call, for the next with the same arguments; vectors of words are kept on disk, as
    ``MODEL.SPAR.TEXT_CACHE`` "auto" says.

    Args:
        image: a file, a PIL image, or (H, W, 3) uint8 RGB.
        vocabulary: ready, a list of names, inline text ("cat, kitten; dog; sky"), a built-in name or a file; see
            :meth:`spar_d2.text.Vocabulary.of`.
        encoder, pretrained, dinov3_repo, dinov3_backbone, pixel_mean, pixel_std, quick_gelu, pretrained_part: see
            :func:`spar_d2.encoders.build_encoder`.
        templates: see :func:`spar_d2.text.load_templates`.
        device: "cpu", "cuda", ...
        logit_scale: see :func:`spar_d2.modeling.segment_features`; None is the encoder's own.
        prob_threshold, area_threshold: see there.
        precision: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU that computes in it, else float32.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as the functions named above; ValueError for an image that cannot
            be read or has another form.
    """
    vocabulary = Vocabulary.of(vocabulary)
    _check_numbers(logit_scale=logit_scale or 0, prob_threshold=prob_threshold, area_threshold=area_threshold or 0)
    templates = _as_text("templates", templates)
    spec = EncoderSpec(
        _as_text("encoder", encoder),
        _as_text("pretrained", pretrained),
        dinov3_repo=_as_text("dinov3_repo", dinov3_repo),
        dinov3_backbone=_as_text("dinov3_backbone", dinov3_backbone),
        # Any sequence; building checks them.
        pixel_mean=cast("Triple | None", pixel_mean),
        pixel_std=cast("Triple | None", pixel_std),
        quick_gelu=quick_gelu,
        pretrained_part=_as_text("pretrained_part", pretrained_part),
    )
    check_has_text(spec.name)
    if precision not in (*PRECISIONS, AUTO):
        raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, AUTO))}; got {precision!r}")
    device = _device(device)
    precision = resolve_precision(precision, device)
    pixels = torch.tensor(_read(image)).to(device).permute(2, 0, 1)
    # A file that was written anew, also one of several with the weights, is loaded anew.
    files = filter(os.path.isfile, (spec.name, spec.pretrained, spec.dinov3_backbone, templates))
    states = [part.stat() for name in files for part in files_of(name) if part.is_file()]
    changed = tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)
    loaded = _load(spec, templates, device, precision, changed)
    model = loaded.encoder
    text, query_class = loaded.text(vocabulary)
    # In the precision asked for, whatever surrounds the call.
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        features = model(loaded.pixels(pixels[None].float()))[0]
    padded = (features.shape[1] * model.patch_size, features.shape[2] * model.patch_size)
    scale = model.logit_scale if logit_scale is None else logit_scale
    size = (pixels.shape[1], pixels.shape[2])
    arguments = (features, text, query_class, size, padded, scale, prob_threshold, area_threshold)
    labels = segment_features(*arguments).cpu().numpy()
    areas = np.bincount(labels.ravel(), minlength=len(vocabulary)) / labels.size
    found = {name: float(area) for name, area in zip(vocabulary.names, areas) if area > 0}
    return Segmentation(labels, vocabulary.names, found)


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
    # Views such as image[:, :, ::-1] have strides that tensors do not.
    return np.ascontiguousarray(pixels)


class _Loaded:
    """A model on a device, and the vectors of the last vocabulary there."""

    def __init__(self, encoder: DenseEncoder, embeddings: TextEmbeddings, device: str) -> None:
        self.encoder = encoder
        own = (encoder.pixel_mean, encoder.pixel_std)
        self.pixels = PixelConversion((0, 0, 0), (1, 1, 1), "RGB", *own).to(device)
        self._embeddings, self._device = embeddings, device
        self._vocabulary: Vocabulary | None = None

    def text(self, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (Q, D) and classes (Q,)."""
        if vocabulary != self._vocabulary:
            text, query_class = self._embeddings(vocabulary)
            self._text = text.to(self._device), query_class.to(self._device)
            self._vocabulary = vocabulary
        return self._text


@functools.lru_cache(maxsize=1)
def _load(
    spec: EncoderSpec, templates: str, device: str, precision: str, changed: tuple[tuple[int, ...], ...]
) -> _Loaded:
    encoder = build(spec).to(device).accelerate(precision).freeze()
    return _Loaded(encoder, text_embeddings(spec, templates, "auto", device), device)
