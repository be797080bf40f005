"""Segmentations over their photos: colors, outlines, labels and a legend. Needs Detectron2.

Detectron2's ``Visualizer`` writes the texts, each into a piece of the picture that is just large enough. Its
``draw_binary_mask`` is not used: it sends a mask's polygons, or where the mask has holes a layer of the whole picture,
through matplotlib, which for 20 classes over 2048x1536 pixels takes 8 s; blending and outlines here take 0.1 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.utils.visualizer import Visualizer

from spar_d2.visualization.fonts import Letters
from spar_d2.visualization.legend import Legend, lay_out, list_classes
from spar_d2.visualization.placement import Box, find_regions, place_labels

_WHITE = 255
# Where outlines would cover more than this share of a picture, as in tiny or noisy ones, they would hide the classes.
_MOST_OUTLINES = 0.2
_BACKGROUND = "background"
_TEXT_COLOR = (0.1, 0.1, 0.1)


def draw_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    alpha: float = 0.55,
    legend: bool = True,
    listed: Sequence[int] | None = None,
    beside: Sequence[np.ndarray] = (),
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a segmentation over its photo.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) numbers of classes.
        names: of every class.
        colors: RGB in 0..255 of every class, such as :func:`spar_d2.visualization.class_colors` gives.
        alpha: opacity of the colors, 0..1.
        legend: add one, below the picture or beside it.
        listed: numbers of the classes in the legend; default: those found, by area.
        beside: more pictures (H, w, 3) uint8, put to the right, any w.
        segments: (H, W) numbers of parts that are outlined; default: ``labels``.

    Returns:
        (H', W', 3) uint8 RGB; without a legend and other pictures of the size of the photo.

    Raises:
        ValueError: shapes that do not go together, a number that is no class, or an alpha outside of 0..1.
    """
    _check(image, labels, names, colors, alpha, beside)
    areas = np.bincount(labels.ravel(), minlength=len(names))
    found = [int(number) for number in np.argsort(-areas, kind="stable") if areas[number]]
    pixels = font_pixels(*labels.shape)
    letters = Letters([names[number] for number in found if areas[number] >= pixels**2], pixels)
    palette, parts = np.asarray(colors, dtype=np.uint8), labels if segments is None else segments
    picture = _blend(image, palette[labels], parts, alpha, letters.pixels)
    for number in found:
        if names[number].strip().lower() == _BACKGROUND:
            # What is nothing in particular stays as it is.
            picture[labels == number] = image[labels == number]
    _draw_labels(picture, labels, {number: names[number] for number in found if areas[number] >= pixels**2}, letters)
    if beside:
        gap = np.full((picture.shape[0], math.ceil(letters.pixels / 3), 3), _WHITE, dtype=np.uint8)
        picture = np.concatenate([picture, *(part for other in beside for part in (gap, other))], axis=1)
    listed = found if listed is None else listed
    if not legend or not len(listed):
        return picture
    entries = list_classes((areas / labels.size).tolist(), names, colors, listed)
    letters = Letters([entry.name for entry in entries], letters.pixels)
    return _with_legend(picture, lay_out(entries, picture.shape[:2], letters), letters)


def font_pixels(height: int, width: int) -> int:
    """Size of the font for a picture: the same share of it, but readable."""
    return max(12, round(math.sqrt(height * width) / 45))


def _check(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    alpha: float,
    beside: Sequence[np.ndarray],
) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 RGB, got {image.dtype} {image.shape}")
    if labels.shape != image.shape[:2] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers {image.shape[:2]}, got {labels.dtype} {labels.shape}")
    if len(names) != len(colors):
        raise ValueError(f"names and colors must be of the same number, got {len(names)} and {len(colors)}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be in 0..{len(names) - 1}, got {labels.min()}..{labels.max()}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    if any(other.shape[0] != image.shape[0] for other in beside):
        raise ValueError(f"pictures beside must be {image.shape[0]} high, got {[o.shape for o in beside]}")


def _blend(image: np.ndarray, colors: np.ndarray, parts: np.ndarray, alpha: float, pixels: float) -> np.ndarray:
    """The photo under the colors (H, W, 3) of its classes, with outlines of its parts (H, W)."""
    picture = cv2.addWeighted(image, 1 - alpha, colors, alpha, 0)
    edges = np.zeros(parts.shape, dtype=np.uint8)
    edges[1:] |= parts[1:] != parts[:-1]
    edges[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    width = max(1, round(pixels / 14))
    outlined = cv2.dilate(edges, np.ones((width, width), dtype=np.uint8)).astype(bool)
    if alpha and outlined.mean() <= _MOST_OUTLINES:
        picture[outlined] = (0.3 * picture[outlined] + 0.7 * _WHITE).astype(np.uint8)
    return picture


def _draw_labels(picture: np.ndarray, labels: np.ndarray, names: dict[int, str], letters: Letters) -> None:
    """Write names on the regions of their classes, in place."""
    padding = math.ceil(0.25 * letters.pixels)
    texts = {number: letters.shortened(letters.readable(name), 14 * letters.pixels) for number, name in names.items()}
    height = math.ceil(letters.height) + 2 * padding
    sizes = {number: (math.ceil(letters.width(text)) + 2 * padding, height) for number, text in texts.items()}
    if not sizes:
        return
    smallest = min(width * height for width, height in sizes.values())
    boxes = place_labels(find_regions(labels, smallest), sizes, labels.shape)
    for number, box in boxes.items():
        _write(picture, box, texts[number], letters)


def _write(picture: np.ndarray, box: Box, text: str, letters: Letters) -> None:
    """Write a label, in place."""
    piece = picture[box.top : box.bottom, box.left : box.right]
    visualizer = Visualizer(piece)
    height, width = piece.shape[:2]
    place = (width / 2, (height - letters.height) / 2)
    output = visualizer.draw_text(text, place, font_size=_points(visualizer, letters.pixels), color="white")
    written = output.ax.texts[-1]
    written.set_family(letters.families)
    # A name may hold dollar signs.
    written.set_parse_math(False)
    piece[:] = output.get_image()


def _points(visualizer: Visualizer, pixels: float) -> float:
    return pixels * 72 / visualizer.output.dpi


def _with_legend(picture: np.ndarray, legend: Legend, letters: Letters) -> np.ndarray:
    height, width = picture.shape[:2]
    if legend.beside:
        size, corner = (max(height, legend.height), width + legend.width), (0, width)
        left = 0
    else:
        size, corner = (height + legend.height, max(width, legend.width)), (height, 0)
        left = (size[1] - width) // 2
    canvas = np.full((*size, 3), _WHITE, dtype=np.uint8)
    canvas[:height, left : left + width] = picture
    top, side = corner
    canvas[top : top + legend.height, side : side + legend.width] = _drawn(legend, letters)
    return canvas


def _drawn(legend: Legend, letters: Letters) -> np.ndarray:
    """(height, width, 3) uint8."""
    paper = np.full((legend.height, legend.width, 3), _WHITE, dtype=np.uint8)
    inset = (legend.line - legend.patch) // 2
    for entry, (left, top) in zip(legend.entries, legend.places):
        if entry.color is not None:
            paper[top + inset : top + inset + legend.patch, left : left + legend.patch] = entry.color
    visualizer = Visualizer(paper)
    # The Visualizer's own `draw_text` writes in light colors on black.
    style = {
        "size": _points(visualizer, letters.pixels),
        "family": letters.families,
        "color": _TEXT_COLOR,
        "verticalalignment": "center_baseline",
        "parse_math": False,
    }
    write = visualizer.output.ax.text
    for entry, (left, top) in zip(legend.entries, legend.places):
        middle = top + legend.line / 2
        write(left + legend.name_at, middle, entry.name, **style)
        write(left + legend.share_ends_at, middle, entry.share, horizontalalignment="right", **style)
    return visualizer.output.get_image()
