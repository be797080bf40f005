"""Bodies of responses: JSON records, label maps and pictures."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image

from spar_d2.results import Segmentation
from spar_d2.service.limits import Refusal
from spar_d2.service.model import Answer
from spar_d2.text import Vocabulary
from spar_d2.visualization import class_colors, fit_pca_colors

_FAST = 1


def as_record(answer: Answer, result: Segmentation, vocabulary: Vocabulary) -> dict:
    """Return the content of a JSON response.

    Classes have the keys of ``spar-d2 segment --json``, and are sorted by area. "labels", and "scores" if the result
    has them, are maps (H, W) as in :func:`packed`. Scores are numbers 0..255, which stand for "low".."high".
    """
    height, width = result.labels.shape
    pixels, colors = np.bincount(result.labels.ravel(), minlength=len(vocabulary)), class_colors(result.names)
    found = sorted(np.flatnonzero(pixels).tolist(), key=lambda number: -pixels[number])
    record = {
        "width": width,
        "height": height,
        "classes": [
            {
                "number": number,
                "name": result.names[number],
                "area": float(pixels[number] / result.labels.size),
                "pixels": int(pixels[number]),
                "color": colors[number],
            }
            for number in found
        ],
        "vocabulary": [list(words) for words in vocabulary.classes],
        "labels": packed(as_label_map(result)),
        "seconds": answer.seconds,
        "word_seconds": answer.word_seconds,
        "images": answer.images,
    }
    if result.scores is not None:
        record["scores"] = _packed_scores(result)
    return record


def as_label_map(result: Segmentation) -> np.ndarray:
    """Return the labels (H, W) as uint8, or as uint16 if there are more than 256 classes."""
    return result.labels.astype(np.uint8 if len(result.names) <= 256 else np.uint16)


def packed(array: np.ndarray) -> dict:
    """Pack an array for JSON: zlib and base64 of its little-endian values, row by row."""
    content = zlib.compress(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(), _FAST)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "zlib_base64": base64.b64encode(content).decode()}


def _packed_scores(result: Segmentation) -> dict:
    """Pack the score of the class of each pixel, from the patch that covers the pixel."""
    assert result.scores is not None
    rows, columns = (np.arange(side) // result.patch_size for side in result.labels.shape)
    scores = result.scores[result.labels, rows[:, None], columns]
    low, high = float(scores.min()), float(scores.max())
    values = np.rint((scores - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return {**packed(values), "low": low, "high": high}


def as_png(pixels: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 RGB, or a label map (H, W) uint8 or uint16, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=_FAST)
    return file.getvalue()


def draw_overlay(result: Segmentation) -> np.ndarray:
    """Draw a result over its image, (H', W', 3) uint8 RGB. Raises :class:`Refusal` without Detectron2."""
    try:
        return result.draw()
    except ImportError as error:
        sentence = "format=overlay needs Detectron2, which is not installed on the server; use format=json or png."
        raise Refusal(501, sentence) from error


def draw_features(features: torch.Tensor, patch_size: int, size: Sequence[int]) -> np.ndarray:
    """Draw features (D, h, w) by their principal components, (H, W, 3) uint8 RGB for an image of (H, W) pixels."""
    colors = (fit_pca_colors([features])(features).numpy() * 255).round().astype(np.uint8)
    covered = (features.shape[2] * patch_size, features.shape[1] * patch_size)
    return np.ascontiguousarray(cv2.resize(colors, covered, interpolation=cv2.INTER_NEAREST)[: size[0], : size[1]])
