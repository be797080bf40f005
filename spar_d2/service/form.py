"""Reads requests: multipart forms with an image, words and options."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from spar_d2.data.images import decode_rgb
from spar_d2.encoders.base import DenseEncoder
from spar_d2.modeling.image_segmentor import INFERENCES
from spar_d2.modeling.postprocessing import check_thresholds
from spar_d2.modeling.refinement import parse_refine
from spar_d2.service.limits import Limits, Refusal
from spar_d2.service.model import Options, Task
from spar_d2.text import Vocabulary
from spar_d2.utils.images import DAMAGE, open_image, reason

FORMATS = ("json", "png", "overlay")
# Fields of a form, and their descriptions.
FIELDS = {
    "words": 'classes: "cat, kitten; dog; sky" (synonyms after commas), or the name of a built-in vocabulary',
    "format": f"{', '.join(FORMATS)} (default: json)",
    "logit_scale": "scale of the scores before the softmax (default: that of the encoder)",
    "prob_threshold": "pixels with a lower probability get class 0 (default: 0)",
    "area_threshold": "classes with a smaller share of the pixels of classes >= 1 are dropped (default: none)",
    "refine": "refinement, such as lposs,lposs+ (default: none)",
    "inference": f"{' or '.join(INFERENCES)} (default: {INFERENCES[0]})",
    "stride": "stride of the sliding window in pixels (default: 24)",
    "scores": "true: also the score of the class at every pixel, in the JSON (default: false)",
}
_BOOLEANS = {"": False, "false": False, "true": True}
_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True)
class Form:
    """Content of a form: the bytes of the image file, and the other fields."""

    image: bytes
    fields: dict[str, str]


async def read_form(request: Request, limits: Limits) -> Form:
    """Receive a form.

    Raises:
        Refusal: it is not a form of one image and known fields.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(415, 'The request must be a form (multipart/form-data) with the file "image".')
    field_bytes = _BYTES_PER_CHARACTER * limits.max_text
    try:
        async with request.form(max_files=1, max_fields=2 * len(FIELDS), max_part_size=field_bytes) as form:
            images = form.getlist("image")
            if len(images) != 1 or not isinstance(images[0], UploadFile):
                raise Refusal(422, 'The form must have one file "image".')
            given = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
            content = await images[0].read()
    except HTTPException as error:
        raise Refusal(
            422,
            f"The form cannot be read: {error.detail} It may have one file and {2 * len(FIELDS)} fields of "
            f"{field_bytes:,} bytes.",
        ) from error
    fields = dict(given)
    if unknown := sorted(fields.keys() - FIELDS.keys()):
        raise Refusal(422, f"The form has an unknown field {unknown[0][:50]!r}; known fields: {', '.join(FIELDS)}.")
    if len(fields) < len(given):
        repeated = next(name for name, count in Counter(name for name, _ in given).items() if count > 1)
        raise Refusal(422, f"The form has the field {repeated!r} more than once; leave out the others.")
    return Form(content, fields)


def read_format(form: Form) -> str:
    """Return the format of the response. Raises ``ValueError`` if it is unknown."""
    name = form.fields.get("format") or FORMATS[0]
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {name[:50]!r}")
    return name


def read_task(form: Form, limits: Limits, default: Vocabulary | None) -> Task:
    """Read vocabulary and options.

    Args:
        form: content of the form.
        limits: limits of the words.
        default: vocabulary of forms without words.

    Raises:
        ValueError: a field is invalid.
    """
    fields = form.fields
    scale, stride = _number(fields, "logit_scale"), _number(fields, "stride")
    area, prob = _number(fields, "area_threshold"), _number(fields, "prob_threshold") or 0.0
    check_thresholds(DenseEncoder.logit_scale if scale is None else scale, prob, area)
    inference = fields.get("inference") or INFERENCES[0]
    if inference not in INFERENCES:
        raise ValueError(f"inference must be one of {', '.join(INFERENCES)}; got {inference[:50]!r}")
    scores = fields.get("scores", "")
    if scores not in _BOOLEANS:
        raise ValueError(f"scores must be true or false, got {scores[:50]!r}")
    refine = ",".join(parse_refine(fields.get("refine", "")[:100]))
    words = fields.get("words", "").strip()
    vocabulary = read_words(words, limits) if words else default
    if vocabulary is None:
        raise ValueError('words must name at least one class, such as "cat, kitten; dog; sky"; got none')
    if stride is not None and not stride.is_integer():
        raise ValueError(f"stride must be an integer, got {stride:g}")
    steps = Options.stride if stride is None else int(stride)
    return Task(vocabulary, Options(scale, prob, area, refine, inference, steps, _BOOLEANS[scores]))


def read_words(text: str, limits: Limits) -> Vocabulary | None:
    """Read a vocabulary from the text of a client, which is never taken as the path of a file.

    Returns:
        The vocabulary; None if there are no words.

    Raises:
        ValueError: there are too many classes, synonyms or characters.
    """
    text = text.strip()
    if text in Vocabulary.built_in():
        return Vocabulary.load(text)
    if len(text) > limits.max_text:
        raise ValueError(f"words must have at most {limits.max_text:,} characters, got {len(text):,}")
    classes = Vocabulary.split(text)
    if len(classes) > limits.max_classes:
        raise ValueError(f"words must have at most {limits.max_classes} classes, got {len(classes)}")
    words = [name.strip() for names in classes for name in names if name.strip()]
    if len(words) > limits.max_words:
        raise ValueError(
            f"words must have at most {limits.max_words} class names and synonyms in all, got {len(words)}"
        )
    for name in words:
        if len(name) > limits.max_name:
            raise ValueError(f"a class name must have at most {limits.max_name} characters, got {name[:20]!r} ...")
    return Vocabulary(classes) if classes else None


def read_pixels(content: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image, whose size is checked before its pixels are read.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        Refusal: it is too large, or not an image.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            width, height = image.size
    except DAMAGE as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise Refusal(413, f"The image has too many pixels; at most {max_pixels:,} are allowed.") from error
        raise Refusal(415, f"The image cannot be read: {reason(error)}.") from error
    if width * height > max_pixels:
        raise Refusal(
            413, f"The image has {width} x {height} pixels; at most {max_pixels:,} are allowed. Make it smaller."
        )
    try:
        return decode_rgb(io.BytesIO(content), "the file")
    except ValueError as error:
        raise Refusal(415, f"The {error}.") from error


def _number(fields: dict[str, str], name: str) -> float | None:
    text = fields.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text[:50])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {text[:50]!r}")
    return value
