"""Reading image files of any kind as 8-bit RGB. Needs no Detectron2."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, ImageOps

from spar_d2.utils.images import DAMAGE, open_image, reason

# Of an image in a tar file, which is read as a whole; a hole in a file may pretend to be of any size.
_MOST_BYTES = 2**30


def read_rgb(source: str | os.PathLike | Image.Image) -> np.ndarray:
    """Read an image upright.

    EXIF rotation is applied, deep images are scaled to 8 bits, transparent ones are laid on white.

    Args:
        source: a file or a PIL image; gray, RGB, RGBA, palette, CMYK, 16 or 32 bits, floats.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read or decoded.
    """
    if isinstance(source, Image.Image):
        try:
            return _to_rgb(source)
        except DAMAGE as error:
            raise ValueError(f"image: {source} cannot be read: {error}") from error
    if not os.path.isfile(source):
        raise FileNotFoundError(f"image: there is no file {source}")
    return _decode(source, source)


def read_photo(record: dict) -> np.ndarray:
    """Read the photo of a dataset dict, from its file or from within a tar file.

    Args:
        record: has "file_name"; for a photo in a tar file also "tar", its path, and "offset" and "size", the place of
            the photo in it, in bytes.

    Returns:
        (H, W, 3) uint8 RGB, as :func:`read_rgb`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read or decoded.
    """
    name = record["file_name"]
    if "tar" not in record:
        return read_rgb(name)
    if not os.path.isfile(record["tar"]):
        raise FileNotFoundError(f"image: there is no file {record['tar']}, which should hold {name}")
    if record["size"] > _MOST_BYTES:
        raise ValueError(f"image: {name} cannot be read: it has {record['size']} bytes, at most {_MOST_BYTES} are read")
    try:
        with open(record["tar"], "rb") as tar:
            tar.seek(record["offset"])
            content = tar.read(record["size"])
    except OSError as error:
        raise ValueError(f"image: {name} cannot be read: {error}") from error
    if len(content) < record["size"]:
        raise ValueError(f"image: {name} cannot be read: the tar file ends within it")
    return _decode(io.BytesIO(content), name)


def _decode(file: str | os.PathLike | io.BytesIO, name: str | os.PathLike) -> np.ndarray:
    try:
        with open_image(file) as image:
            return _to_rgb(image)
    except DAMAGE as error:
        raise ValueError(f"image: {name} cannot be read: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF raises all kinds of errors; the pixels themselves are whole
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _shallow(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _shallow(image: Image.Image) -> Image.Image:
    """Gray pixels of more than 8 bits, which Pillow would clip, scaled to 8.

    Whole numbers span 16 bits, or 31 where they are larger. Floats span 0..1, or 0..255 or 16 bits likewise.
    """
    values = np.asarray(image).astype(np.float64)
    largest = values.max()
    spans = (1, 255, 65535) if image.mode == "F" else (65535, 2**31 - 1)
    span = next((span for span in spans if largest <= span), None)
    if span is None or not np.isfinite(values).all():
        raise ValueError(f"its pixels must be numbers up to {spans[-1]}, got {largest}")
    scaled = (values.clip(0) * (255 / span)).round().astype(np.uint8)
    clear = image.info.get("transparency")
    if clear is not None:
        scaled[values == clear] = 255
    return Image.fromarray(scaled)
