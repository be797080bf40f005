"""Where the demo's results go, and how they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spar_d2.demo.inputs import VIDEOS, Source, stem_of
from spar_d2.utils.images import DAMAGE, open_image
from spar_d2.utils.io import as_json, atomic_write, shortened

FLAG = "--output"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO = ".mp4"
_QUALITY = 92
# Bytes, without endings and numbers; file systems allow 255.
_LONGEST_NAME = 200
_WRITTEN_OF = "spar_d2 demo of"
# Masks of more classes than a palette holds are 16-bit pictures.
PALETTE_SIZE = 256


@dataclass(frozen=True)
class Target:
    """Where the results of one photo or video go.

    Attributes:
        picture: of the photo, or the video.
        masks: class numbers: a file for a photo, a folder for a video; None if they are not asked for.
        record: a JSON file; None if it is not asked for.
    """

    picture: Path
    masks: Path | None = None
    record: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.picture, self.masks, self.record) if path is not None]


def is_file_name(output: str | os.PathLike) -> bool:
    """Whether ``--output`` names a file, rather than a folder."""
    if os.path.isdir(output):
        return False
    return Path(output).suffix.lower() in (*VIDEOS, *Image.registered_extensions())


def plan_outputs(
    sources: Sequence[Source], output: str, ending: str = "", masks: bool = False, records: bool = False
) -> list[Target]:
    """Decide on all names, before anything is computed.

    Args:
        sources: what results are made of.
        output: a folder, or for a single source a file.
        ending: added to names of pictures and videos in a folder.
        masks, records: whether there are such files.

    Returns:
        For each source where its results go, no two to the same file: a number is added to names that were taken.

    Raises:
        ValueError: a file of a kind that cannot be written, or for more than one source; a place that is taken by one
            of the inputs or, where a folder is needed, by a file.
    """
    if is_file_name(output):
        _check_file(sources, output)
        targets = [_target(Path(output), Path(output).with_suffix(""), sources[0].is_video, masks, records)]
    else:
        targets, taken = [], set()
        for source in sources:
            # Of a name such as "...jpg" nothing is left.
            stem = Path(output) / (stem_of(source.name).strip(".") or "_")
            stem = stem.with_name(shortened(stem.name, _LONGEST_NAME))
            suffix = VIDEO if source.is_video else PICTURES[0]
            number = 1
            while True:
                numbered = stem if number == 1 else stem.with_name(f"{stem.name}_{number}")
                picture = numbered.with_name(f"{numbered.name}{ending}{suffix}")
                target = _target(picture, numbered, source.is_video, masks, records)
                # Some file systems take a.png and A.png for the same.
                keys = {str(path).lower() for path in target.paths}
                if not keys & taken:
                    break
                number += 1
            taken |= keys
            targets.append(target)
    inputs = {os.path.realpath(source.record.get("tar", source.path)) for source in sources}
    for source, target in zip(sources, targets):
        _check_places(target, inputs)
        if source.is_video and target.masks:
            _check_masks(target.masks, source.path)
    return targets


def _target(picture: Path, stem: Path, is_video: bool, masks: bool, records: bool) -> Target:
    masks_name = f"{stem.name}_masks" if is_video else f"{stem.name}_mask.png"
    return Target(
        picture,
        stem.with_name(masks_name) if masks else None,
        stem.with_name(f"{stem.name}.json") if records else None,
    )


def _check_file(sources: Sequence[Source], output: str) -> None:
    if len(sources) > 1:
        raise ValueError(f"{FLAG} {output} is a file, and there are {len(sources)} inputs: name a folder")
    allowed = (VIDEO,) if sources[0].is_video else PICTURES
    if Path(output).suffix.lower() not in allowed:
        kind = "a video" if sources[0].is_video else "a photo"
        raise ValueError(f"{FLAG} for {kind} must end in {', '.join(allowed)}, or be a folder; got {output}")


def _check_places(target: Target, inputs: Collection[str]) -> None:
    for path in target.paths:
        if os.path.realpath(path) in inputs:
            raise ValueError(f"{FLAG}: {path} is one of the inputs, which are never written to; name another folder")
        above = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
        if not above.is_dir():
            raise ValueError(f"{FLAG}: {above} is a file, and {path} needs a folder there")
        if not os.access(above, os.W_OK):
            raise ValueError(f"{FLAG}: {above} cannot be written to")
        if path == target.record and path.is_file() and not _is_record(path):
            raise ValueError(f"{FLAG}: {path} is not of an earlier demo, and would be replaced; name another folder")
        is_folder = path == target.masks and path.suffix != ".png"
        if path.exists() and path.is_dir() != is_folder:
            raise ValueError(f"{FLAG}: {path} is a {'file' if is_folder else 'folder'}, and cannot be replaced")


def frame_masks(folder: Path) -> dict[int, Path]:
    """Files that are called as masks of a video's frames, by the numbers of these."""
    return {int(path.stem): path for path in folder.glob("[0-9]" * 6 + ".png")}


def _check_masks(folder: Path, video: str) -> None:
    others = [path for path in frame_masks(folder).values() if not is_mask_of(path, video)]
    if others:
        raise ValueError(
            f"{FLAG}: {min(others)} is not of an earlier demo of {video}, and would be replaced or removed; name "
            f"another folder, or remove {folder}"
        )


def is_mask_of(path: Path, source: str) -> bool:
    """Whether it is what :func:`write_mask` wrote of that source."""
    try:
        with open_image(path, ["PNG"]) as image:
            return image.info.get(_WRITTEN_OF) == _name(source)
    except DAMAGE:
        return False


def _name(source: str) -> str:
    # Names of files may hold bytes that are no text.
    return ascii(os.path.basename(source))


def _is_record(path: Path) -> bool:
    """Whether it is what :func:`write_record` wrote, and no annotations of somebody's photo."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"width", "height", "classes"} <= content.keys()


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 RGB in the format that the name ends in.

    Raises:
        ValueError: the format cannot hold it, as JPEG and WebP cannot hold very large pictures.
    """
    options: dict[str, Any] = {"compress_level": 4} if path.suffix.lower() == ".png" else {"quality": _QUALITY}
    with atomic_write(path) as temporary:
        try:
            Image.fromarray(pixels).save(temporary, **options)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # a full disk
            height, width = pixels.shape[:2]
            raise ValueError(f"{FLAG}: {path} of {width}x{height} pixels cannot be written: {error}") from error


def write_mask(labels: np.ndarray, colors: Sequence[tuple[int, int, int]], path: Path, source: str) -> None:
    """Write (H, W) class numbers as a PNG: with the colors of up to 256 classes as its palette, or else in 16 bits.

    The name of the file that they are of stands in it, see :func:`is_mask_of`.
    """
    if len(colors) <= PALETTE_SIZE:
        mask = Image.fromarray(labels.astype(np.uint8))
        mask.putpalette([int(value) for color in colors for value in color])
    else:
        mask = Image.fromarray(labels.astype(np.uint16))
    text = PngInfo()
    text.add_text(_WRITTEN_OF, _name(source))
    with atomic_write(path) as temporary:
        mask.save(temporary, pnginfo=text)


def write_record(content: dict, path: Path) -> None:
    """Write JSON in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(as_json(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
