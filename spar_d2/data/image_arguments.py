"""Images as arguments of functions: files, encoded bytes, PIL images, arrays and tensors. Needs no Detectron2."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from spar_d2.data.images import decode_rgb, read_rgb

ImageLike = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor
# Size limit in bytes of an encoded image that is read from a file object.
_MAX_BYTES = 2**30


def read_image(image: ImageLike) -> np.ndarray:
    """Convert an image to 8-bit RGB.

    Args:
        image: file name, PIL image, (H, W, 3) uint8 RGB array, encoded image as bytes or binary file object, or RGB
            tensor (3, H, W), uint8 or floating point in 0..1. See :func:`spar_d2.data.images.read_rgb` for files, bytes
            and PIL images.

    Returns:
        (H, W, 3) uint8 RGB, contiguous. An array or tensor may be returned as it is, without a copy.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the image cannot be read, or has another type, shape, dtype or range.
    """
    if isinstance(image, torch.Tensor):
        pixels = _of_tensor(image)
    elif isinstance(image, np.ndarray):
        pixels = np.asarray(image)
    elif isinstance(image, (str, os.PathLike, Image.Image)):
        pixels = read_rgb(image)
    elif isinstance(image, (bytes, bytearray, memoryview)) or hasattr(image, "read"):
        pixels = _of_bytes(image)
    else:
        raise ValueError(
            "image must be a file, a PIL image or an array (H, W, 3) uint8 RGB, the bytes of an encoded image, a "
            f"binary file object or a tensor (3, H, W), got {type(image).__name__}"
        )
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 RGB, got {pixels.dtype} {pixels.shape}")
    # Tensors do not support negative strides, as in image[:, :, ::-1].
    return np.ascontiguousarray(pixels)


def _of_bytes(image: bytes | bytearray | memoryview | BinaryIO) -> np.ndarray:
    kind = type(image).__name__
    content = image if isinstance(image, (bytes, bytearray, memoryview)) else image.read(_MAX_BYTES + 1)
    if isinstance(content, str):
        raise ValueError(f'image must be a binary file object, as of open(path, "rb"), got {kind} of text')
    if not len(content):
        at_end = ", or it was read to its end: call seek(0) first" if hasattr(image, "seek") else ""
        raise ValueError(
            f"image must be an encoded image, such as a JPEG or PNG file, got {kind} without bytes{at_end}"
        )
    if len(content) > _MAX_BYTES:
        raise ValueError(f"image must have at most {_MAX_BYTES} bytes, got {kind} of more")
    try:
        return decode_rgb(io.BytesIO(content), kind)
    except ValueError as error:
        raise ValueError(f"image must be an encoded image, such as a JPEG or PNG file, got {kind}: {error}") from error


def _of_tensor(image: torch.Tensor) -> np.ndarray:
    floating = image.is_floating_point()
    if image.ndim != 3 or image.shape[0] != 3 or not (floating or image.dtype == torch.uint8):
        raise ValueError(
            "image must be RGB (3, H, W), uint8 or floating point in 0..1, if it is a tensor; got Tensor "
            f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        )
    image = image.detach().cpu()
    if floating and image.numel():
        # NaN fails the comparison.
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"image must be in 0..1 if it is a tensor of floating point, got Tensor with {image.min():g}.."
                f"{image.max():g}; divide 8-bit values by 255, and undo a normalization"
            )
        image = (image.float() * 255).round_().byte()
    return image.permute(1, 2, 0).numpy()
