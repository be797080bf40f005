"""Reads images of any format as 8-bit RGB. Needs no Detectron2."""

from __future__ import annotations

import io
import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from spar_d2.utils.images import DAMAGE, open_image, reason

# Size limit of an image in a tar file, which is read as a whole: the header of a sparse member may claim any size.
_MAX_BYTES = 2**30


def read_rgb(source: str | os.PathLike | Image.Image) -> np.ndarray:
    """Read an image upright as 8-bit RGB.

    EXIF rotation is applied. Images of more than 8 bits are scaled to 8 bits. Transparent images are composited on
    white.

    Args:
        source: file or PIL image; gray, RGB, RGBA, palette, CMYK, 16-bit, 32-bit or float.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: the file does not exist, or is a folder.
        ValueError: the image cannot be read or decoded.
    """
    if isinstance(source, Image.Image):
        try:
            return _to_rgb(source)
        except DAMAGE as error:
            raise ValueError(f"image: {source} cannot be read: {error}") from error
    if os.path.isdir(source):
        raise FileNotFoundError(f"image: {source} is a folder; name an image file in it")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"image: {source} does not exist")
    return decode_rgb(source, source)


def read_photo(record: dict) -> np.ndarray:
    """Read the image of a dataset dict, from a file or a tar archive.

    Args:
        record: dataset dict with "file_name". For images in a tar file, also "tar", the path of the tar file, and
            "offset" and "size", the position of the image in bytes.

    Returns:
        (H, W, 3) uint8 RGB, see :func:`read_rgb`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the image cannot be read or decoded.
    """
    name = record["file_name"]
    if "tar" not in record:
        return read_rgb(name)
    if not os.path.isfile(record["tar"]):
        raise FileNotFoundError(f"image: the tar file {record['tar']} of {name} does not exist")
    if record["size"] > _MAX_BYTES:
        raise ValueError(f"image: {name} cannot be read: it has {record['size']} bytes, the limit is {_MAX_BYTES}")
    try:
        with open(record["tar"], "rb") as tar:
            tar.seek(record["offset"])
            content = tar.read(record["size"])
    except OSError as error:
        raise ValueError(f"image: {name} cannot be read: {error}") from error
    if len(content) < record["size"]:
        raise ValueError(f"image: {name} cannot be read: the tar file is truncated")
    return decode_rgb(io.BytesIO(content), name)


def decode_rgb(file: str | os.PathLike | IO[bytes], name: str | os.PathLike) -> np.ndarray:
    """Decode an image file as :func:`read_rgb` does. ``name`` is its name in error messages."""
    try:
        with open_image(file) as image:
            return _to_rgb(image)
    except DAMAGE as error:
        raise ValueError(f"image: {name} cannot be read: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # corrupt EXIF data raises many kinds of errors, but the pixels are intact
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray pixels of more than 8 bits to 8 bits. Pillow would clip them.

    The value range is 16 bits for integers, or 31 bits if any value is larger; 0..1 for floats, or 0..255 or 16 bits if
    any value is larger.
    """
    values = np.asarray(image).astype(np.float64)
    largest = values.max()
    spans = (1, 255, 65535) if image.mode == "F" else (65535, 2**31 - 1)
    span = next((span for span in spans if largest <= span), None)
    if span is None or not np.isfinite(values).all():
        raise ValueError(f"its pixel values must be finite and at most {spans[-1]}, got {largest}")
    scaled = (values.clip(0) * (255 / span)).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)
