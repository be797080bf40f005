"""Opening image files of others, and reading maps of labels and of segments. Needs no Detectron2."""

from __future__ import annotations

import functools
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageFile

# What Pillow raises on damaged files, depending on the format and on where the damage is.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Pillow knows more, some of which other programs read (Ghostscript: EPS) or few people use.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "TGA")
# Those that keep numbers as they are: writers of GIF number a palette anew, readers of PGM stretch numbers to 8 bits.
LABEL_FORMATS = ("PNG", "TIFF", "BMP")
# Names the largest image that is opened, in pixels.
LIMIT_VARIABLE = "SPAR_MAX_PIXELS"
# Pixels that images may be resized to on their short side.
LONGEST_SIDE = 2**14
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_LARGEST_LABEL = 2**16 - 1


def open_image(file: str | os.PathLike | IO[bytes], formats: Sequence[str] = FORMATS) -> ImageFile.ImageFile:
    """Open an image file of one of the formats; its pixels are read later.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has more pixels than are allowed.
        OSError, SyntaxError, ...: of :data:`DAMAGE`, where it is no image or its header is damaged.
    """
    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("it is no file")  # a pipe might never end
    try:
        return Image.open(file, formats=_known(tuple(formats)))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; {LIMIT_VARIABLE} in the environment names a higher limit, in pixels") from error


@functools.cache
def _known(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    if limit := os.environ.get(LIMIT_VARIABLE):
        if not limit.isascii() or not limit.isdigit() or not int(limit):
            raise RuntimeError(f"{LIMIT_VARIABLE} in the environment must be a number of pixels, got {limit!r}")
        # Pillow warns at this number of pixels, and stops at twice as many.
        Image.MAX_IMAGE_PIXELS = -(-int(limit) // 2)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return tuple(name for name in formats if name in Image.OPEN)


def check_image_file(path: str | os.PathLike) -> None:
    """Raise what :func:`open_image` raises, as ``ValueError`` or ``FileNotFoundError``, if a file is no image."""
    try:
        open_image(path).close()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image: there is no file {path}") from error
    except DAMAGE as error:
        raise ValueError(f"image: {path} cannot be read: {reason(error)}") from error


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Read a label map as its numbers stand in the file: those of a palette are not turned into colors.

    Args:
        path: a PNG, TIFF or BMP file with one number for each pixel: gray of 8 or 16 bits, or a palette.

    Returns:
        (H, W) uint8, or uint16 where numbers are larger.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or has not one number of 0 to 65535 for each pixel.
    """
    try:
        with open_image(path, LABEL_FORMATS) as image:
            stored = str(image.tile[0].args[0] if isinstance(image.tile[0].args, tuple) else image.tile[0].args)
            mode, labels = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"label map: there is no file {path}") from error
    except DAMAGE as error:
        allowed = f"it must be {', '.join(LABEL_FORMATS[:-1])} or {LABEL_FORMATS[-1]}"
        raise ValueError(f"label map: {path} cannot be read: {reason(error)}; {allowed}") from error
    if mode not in _LABEL_MODES:
        raise ValueError(
            f"label map: {path} must have one number per pixel (gray, or a palette), its mode is {mode}; convert "
            "its colors to numbers of classes"
        )
    if stored.startswith(("L;", "1;I")):  # Pillow stretches the numbers to 8 bits, or turns them around
        raise ValueError(
            f"label map: {path} must be gray of 8 or 16 bits, or have a palette; its gray is stored as {stored}"
        )
    largest = int(labels.max())
    if labels.min() < 0 or largest > _LARGEST_LABEL:
        raise ValueError(
            f"label map: {path} must have numbers of 0 to {_LARGEST_LABEL}, it has {labels.min()} to {largest}"
        )
    return labels.astype(np.uint8 if largest < 256 else np.uint16, copy=False)


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Read a panoptic PNG.

    Args:
        path: RGB; RGBA and palettes count by their colors.

    Returns:
        (H, W) uint32, R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or no PNG, or gray.
    """
    try:
        with open_image(path, ["PNG"]) as image:
            mode = image.mode
            if mode in ("RGBA", "P"):
                # By way of RGBA, for a palette may have transparent colors.
                image = image.convert("RGBA").convert("RGB")
            ids = _ids_in(image) if image.mode == "RGB" else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no panoptic PNG {path}") from error
    except DAMAGE as error:
        raise ValueError(f"the panoptic PNG {path} cannot be read: {error}") from error
    if ids is None:
        raise ValueError(f"the panoptic PNG {path} must be RGB, with ids R + 256 G + 65536 B, its mode is {mode}")
    return ids


def _ids_in(picture: Image.Image) -> np.ndarray:
    """The ids that the colors of an RGB picture are: (H, W) uint32."""
    # Pillow has four bytes to a pixel, too: the quickest way out.
    packed = picture.tobytes("raw", "RGBX")
    return np.frombuffer(packed, "<u4").reshape(picture.size[::-1]) & np.uint32(0xFFFFFF)


def of_one_class(classes: Iterable[int], ignored: int) -> str:
    """What to say of label maps in which there is nothing but ignored pixels and one class, or none."""
    return (
        f"all pixels of its label maps are {''.join(f'of class {number} or ' for number in classes)}ignored "
        f"({ignored}). Where {ignored} marks a second class, as in masks of 0 and 255, write it as 1 instead"
    )


def check_sides(key: str, sides: object) -> None:
    """Raise ``ValueError``, naming the config key, for a side, or one of several, that is negative or absurdly long."""
    for side in sides if isinstance(sides, (tuple, list)) else (sides,):
        if isinstance(side, (int, float)) and not 0 <= side <= LONGEST_SIDE:
            raise ValueError(f"{key} must be in 0..{LONGEST_SIDE} pixels, got {side}")


def reason(error: BaseException) -> str:
    """What is wrong with a file, from one of :data:`DAMAGE`: Pillow names the object it read from, not the file."""
    return "it is no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
