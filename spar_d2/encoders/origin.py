"""Metadata of weight files: origin of the weights, and the pixel statistics and activation they expect."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from spar_d2.utils.io import signature

logger = logging.getLogger(__name__)

# Metadata key in safetensors files, and name of the record in torch.save archives.
ENTRY = "spar_d2"
RECORD = f"{ENTRY}.json"
_LARGEST = 1 << 20
# Larger pixel statistics are meant for pixels in 0..255, not 0..1.
_LARGEST_PIXEL = 2

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Conventions:
    """Input normalization and activation of a model, which its tensors do not determine.

    Attributes:
        pixel_mean, pixel_std: pixel mean and standard deviation (RGB, pixels in 0..1), three floats each.
        quick_gelu: whether the activation is QuickGELU; None if the family has a fixed activation.
    """

    pixel_mean: Triple
    pixel_std: Triple
    quick_gelu: bool | None = None


@dataclass(frozen=True)
class Origin:
    """Metadata of a weight file; unknown values are None or "".

    Attributes:
        encoder: model name.
        pretrained: tag or file name of the initial weights.
        pixel_mean, pixel_std, quick_gelu: see :class:`Conventions`.
        window, stride: sliding window and stride of the teacher in pixels.
        teacher: kind of the teacher; "" for the sliding window.
        images, steps: number of training images and of training steps of a student.
        version: version of spar_d2 that wrote the file.
        date: date of the file in ISO format ("2026-11-28").
    """

    encoder: str = ""
    pretrained: str = ""
    pixel_mean: Triple | None = None
    pixel_std: Triple | None = None
    quick_gelu: bool | None = None
    window: int | None = None
    stride: int | None = None
    teacher: str = ""
    images: int | None = None
    steps: int | None = None
    version: str = ""
    date: str = ""

    def text(self) -> str:
        """Serialize to JSON, with the current version and date."""
        from spar_d2 import __version__

        fields = dataclasses.asdict(self) | {"version": __version__, "date": datetime.date.today().isoformat()}
        return json.dumps({name: value for name, value in fields.items() if value not in (None, "")})


def check_triple(value: Sequence[float], what: str, above: float = -math.inf) -> Triple:
    """Validate pixel statistics: three finite numbers (RGB) for pixels in 0..1.

    Args:
        value: sequence of three numbers.
        what: name of the setting, for error messages.
        above: exclusive lower bound of each number.

    Raises:
        ValueError: the value is invalid.
    """
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool) and above < v < math.inf]
    if len(numbers) != 3 or len(listed) != 3 or max(map(abs, numbers)) > _LARGEST_PIXEL:
        kind = "three numbers above 0" if above == 0 else "three numbers"
        raise ValueError(f"{what} must be {kind}, for red, green and blue of pixels in 0..1; got {value!r}")
    red, green, blue = map(float, numbers)
    return red, green, blue


def check_flag(value: object, what: str) -> bool:
    """Return ``value`` if it is a bool; raise ``ValueError`` otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be True or False, got {value!r}")
    return value


def parse_origin(text: Any, path: str | os.PathLike) -> Origin | None:
    """Parse the metadata of a weight file, ignoring unknown fields.

    Invalid metadata causes a warning, and None is returned.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        checks = {
            "pixel_mean": check_triple,
            "pixel_std": functools.partial(check_triple, above=0),
            "quick_gelu": check_flag,
            **dict.fromkeys(("window", "stride", "images", "steps"), _check_count),
            **dict.fromkeys(("encoder", "pretrained", "teacher", "version", "date"), _check_name),
        }
        return Origin(**{name: check(fields[name], name) for name, check in checks.items() if name in fields})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        logger.warning("%s: its metadata %r is corrupt and ignored (%s)", path, ENTRY, str(error)[:200])
        return None


def read_origin(path: str | os.PathLike) -> Origin | None:
    """Read the metadata of a weight file without its weights. Returns None if there is no file or no metadata."""
    if not path or not os.path.isfile(path):
        return None
    return _read_origin(str(path), *signature(path))


@functools.lru_cache(maxsize=64)
def _read_origin(path: str, *_: int) -> Origin | None:
    try:
        text = _text_in(Path(path))
    except Exception:  # reading the weights reports the error
        return None
    return None if text is None else parse_origin(text, path)


def _text_in(path: Path) -> Any:
    if path.name.endswith(".index.json"):
        metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata")
        return metadata.get(ENTRY) if isinstance(metadata, Mapping) else None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(ENTRY)
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        record = next((info for info in archive.infolist() if info.filename.split("/")[1:] == [RECORD]), None)
        return archive.read(record) if record and record.file_size < _LARGEST else None


def add_origin(path: str | os.PathLike, origin: Origin | None) -> None:
    """Add metadata to a ``torch.save`` file as a separate record, which ``torch.load`` ignores."""
    if origin is not None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{archive.namelist()[0].split('/')[0]}/{RECORD}", origin.text())


def _check_count(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} must be a whole number of at least 0, got {value!r}")
    return value


def _check_name(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError(f"{what} must be a short printable string, got {str(value)[:100]!r}")
    return value
