"""Draws segmentations over images, with outlines, labels and a legend. Needs Detectron2.

Texts are drawn by Detectron2's ``Visualizer``, each into a small crop of the image. Its ``draw_binary_mask`` is not
used, because matplotlib draws the polygons of a mask, or a full-size layer if the mask has holes: this takes 8 s for 20
classes and 2048x1536 pixels. Blending and outlines take 0.1 s here.
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
# Outlines are omitted if they would cover more than this fraction of the image, as in tiny or noisy images.
_MAX_OUTLINES = 0.2
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
    """Draw a segmentation over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) class indices.
        names: name of every class.
        colors: RGB color in 0..255 of every class, see :func:`spar_d2.visualization.class_colors`.
        alpha: opacity of the colors, 0..1.
        legend: whether to add a legend, below or beside the image.
        listed: classes in the legend; default: the classes in the image, sorted by area.
        beside: additional images (H, w, 3) uint8 of any width, which are placed to the right.
        segments: (H, W) segment ids to outline; default: ``labels``.

    Returns:
        (H', W', 3) uint8 RGB; the size of the image if there is no legend and no additional image.

    Raises:
        ValueError: shapes do not match, a label is not a class, or alpha is outside 0..1.
    """
    _check(image, labels, names, colors, alpha, beside)
    areas = np.bincount(labels.ravel(), minlength=len(names))
    present = [int(number) for number in np.argsort(-areas, kind="stable") if areas[number]]
    pixels = font_pixels(*labels.shape)
    letters = Letters([names[number] for number in present if areas[number] >= pixels**2], pixels)
    palette, parts = np.asarray(colors, dtype=np.uint8), labels if segments is None else segments
    picture = _blend(image, palette[labels], parts, alpha, letters.pixels)
    for number in present:
        if names[number].strip().lower() == _BACKGROUND:
            # The background is drawn without color.
            picture[labels == number] = image[labels == number]
    _draw_labels(picture, labels, {number: names[number] for number in present if areas[number] >= pixels**2}, letters)
    if beside:
        gap = np.full((picture.shape[0], math.ceil(letters.pixels / 3), 3), _WHITE, dtype=np.uint8)
        picture = np.concatenate([picture, *(part for other in beside for part in (gap, other))], axis=1)
    listed = present if listed is None else listed
    if not legend or not len(listed):
        return picture
    entries = list_classes((areas / labels.size).tolist(), names, colors, listed)
    letters = Letters([entry.name for entry in entries], letters.pixels)
    return _with_legend(picture, lay_out(entries, picture.shape[:2], letters), letters)


def font_pixels(height: int, width: int) -> int:
    """Choose a font size for an image: proportional to its size, but readable."""
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
        raise ValueError(f"labels must be integers {image.shape[:2]}, got {labels.dtype} {labels.shape}")
    if len(names) != len(colors):
        raise ValueError(f"names and colors must have the same length, got {len(names)} and {len(colors)}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be in 0..{len(names) - 1}, got {labels.min()}..{labels.max()}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    if any(other.shape[0] != image.shape[0] for other in beside):
        raise ValueError(f"images beside must be {image.shape[0]} pixels high, got {[o.shape for o in beside]}")


def _blend(image: np.ndarray, colors: np.ndarray, parts: np.ndarray, alpha: float, pixels: float) -> np.ndarray:
    """Blend an image with class colors (H, W, 3), and outline segments (H, W)."""
    picture = cv2.addWeighted(image, 1 - alpha, colors, alpha, 0)
    edges = np.zeros(parts.shape, dtype=np.uint8)
    edges[1:] |= parts[1:] != parts[:-1]
    edges[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    width = max(1, round(pixels / 14))
    outlined = cv2.dilate(edges, np.ones((width, width), dtype=np.uint8)).astype(bool)
    if alpha and outlined.mean() <= _MAX_OUTLINES:
        picture[outlined] = (0.3 * picture[outlined] + 0.7 * _WHITE).astype(np.uint8)
    return picture


def _draw_labels(picture: np.ndarray, labels: np.ndarray, names: dict[int, str], letters: Letters) -> None:
    """Write class names on their regions, in place."""
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
    """Write a label into its box, in place."""
    piece = picture[box.top : box.bottom, box.left : box.right]
    visualizer = Visualizer(piece)
    height, width = piece.shape[:2]
    place = (width / 2, (height - letters.height) / 2)
    output = visualizer.draw_text(text, place, font_size=_points(visualizer, letters.pixels), color="white")
    text_artist = output.ax.texts[-1]
    text_artist.set_family(letters.families)
    # Names may contain dollar signs.
    text_artist.set_parse_math(False)
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
    canvas[top : top + legend.height, side : side + legend.width] = _draw_legend(legend, letters)
    return canvas


def _draw_legend(legend: Legend, letters: Letters) -> np.ndarray:
    """Draw a legend (height, width, 3) uint8."""
    paper = np.full((legend.height, legend.width, 3), _WHITE, dtype=np.uint8)
    inset = (legend.line - legend.patch) // 2
    for entry, (left, top) in zip(legend.entries, legend.places):
        if entry.color is not None:
            paper[top + inset : top + inset + legend.patch, left : left + legend.patch] = entry.color
    visualizer = Visualizer(paper)
    # `draw_text` of the Visualizer draws light text on black boxes.
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
