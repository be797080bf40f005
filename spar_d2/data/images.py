"""Reading image files of any kind as 8-bit RGB. Needs no Detectron2."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises on damaged files, depending on the format and on where the damage is.
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_rgb(source: str | os.PathLike | Image.Image) -> np.ndarray:
    """Read an image upright.

    EXIF rotation is applied, 16-bit images are scaled to 8 bits, transparent ones are laid on white.

    Args:
        source: a file or a PIL image; grey, RGB, RGBA, palette, CMYK, 16-bit.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded.
    """
    if not isinstance(source, Image.Image) and not os.path.isfile(source):
        raise FileNotFoundError(f"image: there is no file {source}")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(source) as image:
            return _to_rgb(image)
    except DAMAGE as error:
        raise ValueError(f"image: {source} cannot be read: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # "I;16" and its kin: 16 bits, which convert("RGB") would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
