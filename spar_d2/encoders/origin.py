"""Where weights come from and what they expect, as it travels in their file."""

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

# The entry among the metadata of safetensors; in archives of torch.save's, the name of a record.
ENTRY = "spar_d2"
RECORD = f"{ENTRY}.json"
_LARGEST = 1 << 20
# Of pixels in 0..1; what is larger was meant for 0..255.
_LARGEST_PIXEL = 2

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Conventions:
    """What a model expects that its weights do not tell.

    Attributes:
        pixel_mean, pixel_std: three floats each, RGB, for pixels in 0..1.
        quick_gelu: whether the activation is QuickGELU; None where the family has no choice.
    """

    pixel_mean: Triple
    pixel_std: Triple
    quick_gelu: bool | None = None


@dataclass(frozen=True)
class Origin:
    """What a weight file says of itself; None and "" where it says nothing.

    Attributes:
        encoder: name of the model.
        pretrained: tag or name of the weights that it started from.
        pixel_mean, pixel_std, quick_gelu: as of :class:`Conventions`.
        window, stride: of the teacher, in pixels.
        version: of this package.
        date: of the file, as "2026-11-28".
    """

    encoder: str = ""
    pretrained: str = ""
    pixel_mean: Triple | None = None
    pixel_std: Triple | None = None
    quick_gelu: bool | None = None
    window: int | None = None
    stride: int | None = None
    version: str = ""
    date: str = ""

    def text(self) -> str:
        """As JSON, with the date of today."""
        from spar_d2 import __version__

        said = dataclasses.asdict(self) | {"version": __version__, "date": datetime.date.today().isoformat()}
        return json.dumps({name: value for name, value in said.items() if value not in (None, "")})


def check_triple(value: Sequence[float], what: str, above: float = -math.inf) -> Triple:
    """Three finite floats for the colors of pixels in 0..1.

    Args:
        value: the numbers.
        what: names the setting, for error messages.
        above: each is more than this.

    Raises:
        ValueError: anything else.
    """
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool) and above < v < math.inf]
    if len(numbers) != 3 or len(listed) != 3 or max(map(abs, numbers)) > _LARGEST_PIXEL:
        kind = "three numbers above 0" if above == 0 else "three numbers"
        raise ValueError(f"{what} must be {kind}, for red, green and blue of pixels in 0..1; got {value!r}")
    red, green, blue = map(float, numbers)
    return red, green, blue


def check_flag(value: object, what: str) -> bool:
    """``value``, which is True or False; raises ``ValueError`` for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be True or False, got {value!r}")
    return value


def parse_origin(text: Any, path: str | os.PathLike) -> Origin | None:
    """The origin in a file's metadata; None, and a warning, where it makes no sense. Unknown fields are left out."""
    try:
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError("it is no JSON object")
        checks = {
            "pixel_mean": check_triple,
            "pixel_std": functools.partial(check_triple, above=0),
            "quick_gelu": check_flag,
            **dict.fromkeys(("window", "stride"), _check_pixels),
            **dict.fromkeys(("encoder", "pretrained", "version", "date"), _check_name),
        }
        return Origin(**{name: check(said[name], name) for name, check in checks.items() if name in said})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        logger.warning("%s: what its metadata %r says is damaged and left out (%s)", path, ENTRY, str(error)[:200])
        return None


def read_origin(path: str | os.PathLike) -> Origin | None:
    """What a weight file says of itself; None where it is no file or says nothing. Reads no weights."""
    if not path or not os.path.isfile(path):
        return None
    return _read_origin(str(path), *signature(path))


@functools.lru_cache(maxsize=64)
def _read_origin(path: str, *_: int) -> Origin | None:
    try:
        text = _text_in(Path(path))
    except Exception:  # whoever reads the weights says what is wrong with them
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
    """Put an origin into a file that ``torch.save`` wrote, beside what it holds, so that others read it as before."""
    if origin is not None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{archive.namelist()[0].split('/')[0]}/{RECORD}", origin.text())


def _check_pixels(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} must be a number of pixels, got {value!r}")
    return value


def _check_name(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError(f"{what} must be a short text, got {str(value)[:100]!r}")
    return value
