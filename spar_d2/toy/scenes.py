"""Procedural images with exact labels: a synthetic data set for trying everything without downloads.

Grounds are textures, objects are filled shapes. Every class has its own hue with some variation, so that both color
and shape carry information. Larger images show more objects, not bigger ones.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np

GROUNDS = ("grass", "sand", "water", "brick", "snow")
OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
SCENE_CLASSES = GROUNDS + OBJECTS

# Thirteen evenly spaced hues. Grounds get natural hues, objects share the rest.
_HUE_SLOTS = {
    "brick": 0, "star": 1, "sand": 2, "moon": 3, "grass": 4, "triangle": 5, "circle": 6,
    "snow": 7, "water": 8, "square": 9, "cross": 10, "ring": 11, "heart": 12,
}  # fmt: skip
_HUE_SPREAD = 0.045
_SUBPIXEL_BITS = 4
_MAX_OVERLAP = 0.35
_PLACEMENT_TRIES = 12


@dataclass(frozen=True)
class Scene:
    """A synthetic image with labels.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8, indices into ``SCENE_CLASSES``.
        objects: (H, W) uint8, 1-based index of the visible object; 0 for the ground.
    """

    image: np.ndarray
    labels: np.ndarray
    objects: np.ndarray

    def visible(self, min_pixels: int = 24) -> list[str]:
        """Return the names of the classes that cover at least ``min_pixels`` pixels, in class order."""
        counts = np.bincount(self.labels.ravel(), minlength=len(SCENE_CLASSES))
        return [name for name, count in zip(SCENE_CLASSES, counts) if count >= min_pixels]

    def segments(self, min_pixels: int = 4) -> tuple[np.ndarray, dict[int, int]]:
        """Return the panoptic segments: grounds and objects with at least ``min_pixels`` visible pixels.

        Returns:
            (H, W) int32 segment ids, 0 for segments with too few pixels, and the class of each id, an index into
            ``SCENE_CLASSES``.
        """
        grounds = self.labels.astype(np.int32) + 1
        segments = np.where(self.objects > 0, self.objects + np.int32(len(SCENE_CLASSES)), grounds)
        numbers, first, counts = np.unique(segments, return_index=True, return_counts=True)
        segments[np.isin(segments, numbers[counts < min_pixels])] = 0
        seen = counts >= min_pixels
        return segments, dict(zip(numbers[seen].tolist(), self.labels.ravel()[first[seen]].tolist()))


def draw_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    objects: tuple[int, int],
    radius: tuple[float, float],
    grounds: tuple[int, int],
) -> Scene:
    """Generate an image.

    Args:
        rng: random number generator; the same state gives the same image.
        height, width: size in pixels.
        objects: minimum and maximum number of objects.
        radius: minimum and maximum object radius in pixels.
        grounds: minimum and maximum number of ground regions.

    Raises:
        ValueError: a size, count or radius is not positive, or a range is not ascending.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height}x{width}")
    if objects[1] > 255:
        raise ValueError(f"objects must be at most 255, got ({objects[0]}, {objects[1]})")
    for name, (low, high), least in (("objects", objects, 0), ("radius", radius, 1), ("grounds", grounds, 1)):
        if low < least or high < low:
            raise ValueError(f"{name} must be a range (low, high) with {least} <= low <= high, got ({low}, {high})")
    image, labels = _draw_grounds(rng, height, width, int(rng.integers(grounds[0], grounds[1] + 1)))
    owner = np.zeros((height, width), dtype=np.uint8)
    for number in range(1, int(rng.integers(objects[0], objects[1] + 1)) + 1):
        _draw_object(rng, image, labels, owner, number, radius)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), labels, owner)


def training_scene(seed: int, index: int, size: int = 64) -> Scene:
    """Generate small image ``index`` for contrastive pre-training, with 1 to 3 objects on 1 or 2 grounds."""
    return draw_scene(np.random.default_rng([seed, index]), size, size, (1, 3), (9, 26), (1, 2))


def large_scene(seed: int, index: int) -> Scene:
    """Generate large image ``index``, with 13 to 20 objects; sizes alternate between 256x256 and 192x320."""
    height, width = ((256, 256), (192, 320))[index % 2]
    return draw_scene(np.random.default_rng([seed, index]), height, width, (13, 20), (9, 44), (2, 5))


def class_colors() -> list[list[int]]:
    """Return the mean RGB color, 0..255, of every class, for legends and label images."""
    hues = [_HUE_SLOTS[name] / len(SCENE_CLASSES) for name in SCENE_CLASSES]
    # Pale grounds and saturated objects, so that they are easy to distinguish.
    tones = [(0.35, 0.75)] * len(GROUNDS) + [(0.9, 0.9)] * len(OBJECTS)
    return [[round(255 * part) for part in colorsys.hsv_to_rgb(hue, *tone)] for hue, tone in zip(hues, tones)]


def _color(rng: np.random.Generator, name: str) -> np.ndarray:
    """Draw a random color (3,) float32 in 0..255 of a class."""
    hue = _HUE_SLOTS[name] / len(SCENE_CLASSES) + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    saturation, value = rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.95)
    return np.asarray(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32) * 255


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Generate noise (height, width) float32 of about zero mean and unit variance, with blobs of ``cell`` pixels."""
    coarse = rng.standard_normal((math.ceil(height / cell) + 2, math.ceil(width / cell) + 2)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _ground_texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """Generate the texture of a ground, (height, width) float32 offsets in gray levels."""
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    if name == "grass":  # short upright blades
        return 26 * cv2.resize(rng.standard_normal((height // 5 + 2, width)).astype(np.float32), (width, height))
    if name == "sand":  # fine grain
        return 22 * rng.standard_normal((height, width)).astype(np.float32)
    if name == "water":  # wavy horizontal lines
        period = rng.uniform(7, 11)
        return 30 * np.sin(2 * np.pi * (ys + 2.5 * np.sin(xs / 7)) / period + rng.uniform(0, 6.28)).astype(np.float32)
    if name == "brick":  # dark joints, every second row shifted
        row_height, length = int(rng.integers(7, 10)), int(rng.integers(14, 20))
        shift = (ys // row_height % 2) * (length / 2)
        joints = (ys % row_height < 1.5) | ((xs + shift) % length < 1.5)
        return np.where(joints, -70, 0).astype(np.float32) + 6 * _smooth_noise(rng, height, width, 8)
    return 26 * _smooth_noise(rng, height, width, 12)  # snow: soft drifts


def _draw_grounds(rng: np.random.Generator, height: int, width: int, regions: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the image into regions around random points, with curved borders, and fill each with a ground."""
    names = rng.permutation(GROUNDS)[:regions]
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    ys = ys + 5 * _smooth_noise(rng, height, width, 24)
    xs = xs + 5 * _smooth_noise(rng, height, width, 24)
    points = rng.uniform((0, 0), (height, width), size=(len(names), 2)).astype(np.float32)
    distance = np.stack([(ys - y) ** 2 + (xs - x) ** 2 for y, x in points])
    owner = distance.argmin(0)
    image = np.empty((height, width, 3), dtype=np.float32)
    labels = np.empty((height, width), dtype=np.uint8)
    for region, name in enumerate(names):
        inside = owner == region
        filled = _color(rng, name) + _ground_texture(rng, name, height, width)[..., None]
        image[inside] = filled[inside]
        labels[inside] = SCENE_CLASSES.index(name)
    return image, labels


def _polar(radii: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Convert radii and angles (in turns, clockwise from the top) to points (n, 2)."""
    angles = 2 * np.pi * turns
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _outline(name: str) -> list[np.ndarray]:
    """Return the polygons (n, 2) of a shape in the unit disc; a second polygon is a hole."""
    fine = np.arange(48) / 48
    circle = _polar(np.ones(48), fine)
    if name == "circle":
        return [circle]
    if name == "square":
        return [_polar(np.ones(4), np.arange(4) / 4 + 1 / 8)]
    if name == "triangle":
        return [_polar(np.ones(3), np.arange(3) / 3)]
    if name == "star":
        return [_polar(np.where(np.arange(10) % 2 == 0, 1.0, 0.42), np.arange(10) / 10)]
    if name == "cross":
        w = 0.3
        quarter = np.array([[-w, -0.95], [w, -0.95], [w, -w]])
        turn = np.array([[0, 1], [-1, 0]])
        return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]
    if name == "ring":
        return [circle, 0.55 * circle]
    if name == "heart":
        t = 2 * np.pi * fine
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return [np.stack([x, y], axis=1) / 17]
    # Moon: the unit circle without a circle of radius 0.8 around (0.5, 0). They intersect at x = 0.61.
    meeting, inner_meeting = math.acos(0.61), math.acos((0.61 - 0.5) / 0.8)
    outer = np.linspace(meeting, 2 * np.pi - meeting, 40)
    inner = np.linspace(2 * np.pi - inner_meeting, inner_meeting, 32)[1:-1]
    arcs = [np.stack([np.cos(outer), np.sin(outer)], 1), 0.8 * np.stack([np.cos(inner), np.sin(inner)], 1) + (0.5, 0)]
    return [np.concatenate(arcs) + (0.15, 0)]


def _object_pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Generate a random pattern, (height, width) float32 brightness offsets, independent of the class."""
    kind = rng.integers(4)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    if kind == 0:
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 10)
        return 24 * np.sin(2 * np.pi * (np.cos(angle) * xs + np.sin(angle) * ys) / period).astype(np.float32)
    if kind == 1:
        period = rng.uniform(6, 10)
        dots = np.hypot(xs % period - period / 2, ys % period - period / 2) < period / 4
        return np.where(dots, 34, 0).astype(np.float32)
    if kind == 2:
        return 16 * rng.standard_normal((height, width)).astype(np.float32)
    return np.zeros((height, width), dtype=np.float32)


def _draw_object(
    rng: np.random.Generator,
    image: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    number: int,
    radius_range: tuple[float, float],
) -> None:
    """Draw an object into ``image``, ``labels`` and ``owner``; skipped if no free place is found."""
    height, width = labels.shape
    name = OBJECTS[rng.integers(len(OBJECTS))]
    radius, aspect, angle = rng.uniform(*radius_range), rng.uniform(0.85, 1.15), rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shape = [polygon * (aspect**0.5, aspect**-0.5) * radius @ rotation for polygon in _outline(name)]
    for _ in range(_PLACEMENT_TRIES):
        center = rng.uniform((0, 0), (width, height))
        alpha = _coverage([polygon + center for polygon in shape], height, width)
        inside = alpha >= 0.5
        if inside.any() and (owner[inside] > 0).mean() <= _MAX_OVERLAP:
            break
    else:
        return
    y0, y1, x0, x1 = _bounding_box(alpha > 0)
    alpha = alpha[y0:y1, x0:x1, None]
    filled = _color(rng, name) + _object_pattern(rng, y1 - y0, x1 - x0)[..., None]
    image[y0:y1, x0:x1] = alpha * filled + (1 - alpha) * image[y0:y1, x0:x1]
    labels[inside] = SCENE_CLASSES.index(name)
    owner[inside] = number


def _coverage(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Compute the fraction (height, width) float32 of each pixel inside the first and outside the second polygon."""
    alpha = np.zeros((height, width), dtype=np.uint8)
    for polygon, value in zip(polygons, (255, 0)):
        points = np.round(polygon * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(alpha, [points], value, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
    return alpha.astype(np.float32) / 255


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1
