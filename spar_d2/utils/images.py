"""Safe reading of image files, label maps and panoptic PNGs, independent of Detectron2."""

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

# Exceptions that Pillow raises for corrupt files, depending on the format.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Allowed formats. Pillow supports more, but some require external programs (EPS: Ghostscript) or are rarely used.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "TGA")
# Formats that preserve pixel values: GIF writers reorder palettes, and PGM readers rescale values to 8 bits.
LABEL_FORMATS = ("PNG", "TIFF", "BMP")
# Environment variable with the maximum number of pixels of an image.
LIMIT_VARIABLE = "SPAR_MAX_PIXELS"
# Maximum side in pixels to which images may be resized.
LONGEST_SIDE = 2**14
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_LARGEST_LABEL = 2**16 - 1


def open_image(file: str | os.PathLike | IO[bytes], formats: Sequence[str] = FORMATS) -> ImageFile.ImageFile:
    """Open an image file in one of the given formats. Pixels are read lazily.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the image has too many pixels.
        OSError, SyntaxError, ...: one of :data:`DAMAGE`; the file is not an image, or its header is corrupt.
    """
    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError(
            "it is a folder" if os.path.isdir(file) else "it is not a regular file"
        )  # reading from a pipe might never end
    try:
        return Image.open(file, formats=_known(tuple(formats)))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; set the environment variable {LIMIT_VARIABLE} to a higher limit") from error


@functools.cache
def _known(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Return the formats that the installed Pillow supports."""
    Image.init()
    if limit := os.environ.get(LIMIT_VARIABLE):
        if not limit.isascii() or not limit.isdigit() or not int(limit):
            raise RuntimeError(f"the environment variable {LIMIT_VARIABLE} must be a number of pixels, got {limit!r}")
        # Pillow warns at MAX_IMAGE_PIXELS, and raises an error at twice as many.
        Image.MAX_IMAGE_PIXELS = -(-int(limit) // 2)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return tuple(name for name in formats if name in Image.OPEN)


def largest_image() -> int:
    """Return the largest number of pixels of an image."""
    _known(FORMATS)
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**62)


def check_image_file(path: str | os.PathLike) -> None:
    """Raise ``ValueError`` or ``FileNotFoundError`` if a file is not a readable image."""
    try:
        open_image(path).close()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image: there is no file {path}") from error
    except DAMAGE as error:
        raise ValueError(f"image: {path} cannot be read: {reason(error)}") from error


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Read the raw values of a label map; palette indices are not converted to colors.

    Args:
        path: PNG, TIFF or BMP file with one value per pixel (8-bit or 16-bit gray, or palette).

    Returns:
        (H, W) uint8, or uint16 for larger values.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or does not have one value in 0..65535 per pixel.
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
            f"label map: {path} must have one number per pixel (gray, or a palette), but its mode is {mode}; convert "
            "its colors to class indices"
        )
    if stored.startswith(("L;", "1;I")):  # Pillow would rescale or invert the values
        raise ValueError(
            f"label map: {path} must be 8-bit or 16-bit gray, or have a palette; its gray values are stored as {stored}"
        )
    largest = int(labels.max())
    if labels.min() < 0 or largest > _LARGEST_LABEL:
        raise ValueError(f"label map: values in {path} must be in 0..{_LARGEST_LABEL}, got {labels.min()}..{largest}")
    return labels.astype(np.uint8 if largest < 256 else np.uint16, copy=False)


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Read a panoptic PNG.

    Args:
        path: RGB PNG file; RGBA and palette images are converted to RGB.

    Returns:
        Segment ids (H, W) uint32, R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is corrupt, not a PNG, or a gray image.
    """
    try:
        with open_image(path, ["PNG"]) as image:
            mode = image.mode
            if mode in ("RGBA", "P"):
                # Convert to RGBA first, because a palette may have transparent colors.
                image = image.convert("RGBA").convert("RGB")
            ids = _ids_in(image) if image.mode == "RGB" else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no panoptic PNG {path}") from error
    except DAMAGE as error:
        raise ValueError(f"the panoptic PNG {path} cannot be read: {error}") from error
    if ids is None:
        raise ValueError(f"the panoptic PNG {path} must be RGB, with ids R + 256 G + 65536 B, but its mode is {mode}")
    return ids


def _ids_in(picture: Image.Image) -> np.ndarray:
    """Decode the segment ids (H, W) uint32 of an RGB image."""
    # Pillow stores four bytes per pixel internally, so RGBX is the fastest export.
    packed = picture.tobytes("raw", "RGBX")
    return np.frombuffer(packed, "<u4").reshape(picture.size[::-1]) & np.uint32(0xFFFFFF)


def of_one_class(classes: Iterable[int], ignored: int) -> str:
    """Return a message about label maps that contain at most one class, besides ignored pixels."""
    return (
        f"all pixels of its label maps are {''.join(f'of class {number} or ' for number in classes)}ignored "
        f"({ignored}). If {ignored} is a second class, as in masks of 0 and 255, write it as 1 instead"
    )


def check_sides(key: str, sides: object) -> None:
    """Raise ``ValueError`` with the config key if one of the sides is negative or too large."""
    for side in sides if isinstance(sides, (tuple, list)) else (sides,):
        if isinstance(side, (int, float)) and not 0 <= side <= LONGEST_SIDE:
            raise ValueError(f"{key} must be in 0..{LONGEST_SIDE} pixels, got {side}")


def reason(error: BaseException) -> str:
    """Return the message of an exception of :data:`DAMAGE`, without Pillow's reference to the file object."""
    return "it is not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
