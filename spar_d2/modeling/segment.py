"""Segmentation of one image in one call."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from spar_d2.encoders import DenseEncoder, TextTower, build_encoder, build_text_tower
from spar_d2.modeling.scores import segment_features
from spar_d2.text import TextEmbeddings, Vocabulary, load_templates


@dataclass(frozen=True)
class Segmentation:
    """Labels of one image.

    Attributes:
        labels: (H, W) int64, index into ``names``.
        names: name of every class.
        areas: share of the image, 0..1, for every class that was found, by name.
    """

    labels: np.ndarray
    names: list[str]
    areas: dict[str, float]


def segment(
    image: str | os.PathLike | Image.Image | np.ndarray,
    vocabulary: str | Vocabulary,
    encoder: str,
    pretrained: str,
    templates: str = "imagenet",
    device: str = "cpu",
) -> Segmentation:
    """Segment an image into the classes of a vocabulary, in a single pass at its own size.

    Encoder and word vectors are kept from the last call, for the next with the same arguments.

    Args:
        image: a file, a PIL image, or (H, W, 3) uint8 RGB.
        vocabulary: ready, inline text ("cat, kitten; dog; sky"), or a file; see :meth:`Vocabulary.load`.
        encoder, pretrained: see :func:`spar_d2.encoders.build_encoder`.
        templates: see :func:`spar_d2.text.load_templates`.
        device: "cpu", "cuda", ...

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as the functions named above; ValueError for an image that cannot
            be read or has another form.
    """
    vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary)
    pixels = torch.tensor(_read(image), device=device).permute(2, 0, 1).float() / 255
    # A file that was written anew is loaded anew.
    changed = tuple(os.stat(name).st_mtime_ns if os.path.isfile(name) else 0 for name in (encoder, pretrained))
    model, embeddings = _load(encoder, pretrained, templates, device, changed)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (model.pixel_mean, model.pixel_std))
    text, query_class = embeddings(vocabulary)
    with torch.no_grad():
        features = model(((pixels - mean) / std)[None])[0]
    padded = (features.shape[1] * model.patch_size, features.shape[2] * model.patch_size)
    labels = segment_features(features, text, query_class, pixels.shape[1:], padded).cpu().numpy()
    areas = np.bincount(labels.ravel(), minlength=len(vocabulary)) / labels.size
    found = {name: float(area) for name, area in zip(vocabulary.names, areas) if area > 0}
    return Segmentation(labels, vocabulary.names, found)


def _read(image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"image: there is no file {image}")
        try:
            with Image.open(image) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image: {image} cannot be read: {error}") from error
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 RGB, got {pixels.dtype} {pixels.shape}")
    return pixels


@functools.lru_cache(maxsize=1)
def _load(
    encoder: str, pretrained: str, templates: str, device: str, changed: tuple[int, ...]
) -> tuple[DenseEncoder, TextEmbeddings]:
    def build_tower() -> TextTower:
        return build_text_tower(encoder, pretrained)

    return (
        build_encoder(encoder, pretrained).to(device),
        TextEmbeddings(build_tower, f"{encoder} {pretrained}", load_templates(templates)),
    )
