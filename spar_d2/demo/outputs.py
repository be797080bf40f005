"""Plans the demo's output files and writes them."""

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
from spar_d2.utils.io import as_json, atomic_write, shortened, write_text

FLAG = "--output"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO = ".mp4"
_QUALITY = 92
# Maximum length in bytes, without suffixes and numbers. File systems allow 255.
_MAX_NAME_BYTES = 200
_WRITTEN_OF = "spar_d2 demo of"
# Masks with more classes than a palette has entries are written in 16 bits.
PALETTE_SIZE = 256


@dataclass(frozen=True)
class Target:
    """Output paths of an image or video.

    Attributes:
        picture: visualization, an image or a video.
        masks: mask file of an image or mask folder of a video; None if not requested.
        record: JSON file; None if not requested.
        labelme: labelme file of an image; None if not requested.
        geotiff: georeferenced label map of an image; None if not requested.
    """

    picture: Path
    masks: Path | None = None
    record: Path | None = None
    labelme: Path | None = None
    geotiff: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [
            path for path in (self.picture, self.masks, self.record, self.labelme, self.geotiff) if path is not None
        ]


def is_file_name(output: str | os.PathLike) -> bool:
    """Whether ``--output`` is a file rather than a folder."""
    if os.path.isdir(output):
        return False
    return Path(output).suffix.lower() in (*VIDEOS, *Image.registered_extensions())


def plan_outputs(
    sources: Sequence[Source],
    output: str,
    ending: str = "",
    masks: bool = False,
    records: bool = False,
    exports: Collection[str] = (),
) -> list[Target]:
    """Determine all output paths before anything is computed.

    Args:
        sources: inputs.
        output: a folder, or a file if there is a single input.
        ending: suffix of the names of visualizations in a folder.
        masks, records: whether masks and JSON files are requested.
        exports: requested formats, of which "labelme" and "geotiff" have a file for each image.

    Returns:
        Output paths for each input. Names are made unique with a number.

    Raises:
        ValueError: the format of a file is not supported, a file is given for several inputs, or a path is one of the
            inputs or is occupied by a file where a folder is needed.
    """
    if is_file_name(output):
        _check_file(sources, output)
        targets = [_target(Path(output), Path(output).with_suffix(""), sources[0].is_video, masks, records, exports)]
    else:
        targets, used = [], set()
        for source in sources:
            # Names such as "...jpg" have no stem.
            stem = Path(output) / (stem_of(source.name).strip(".") or "_")
            stem = stem.with_name(shortened(stem.name, _MAX_NAME_BYTES))
            suffix = VIDEO if source.is_video else PICTURES[0]
            number = 1
            while True:
                numbered = stem if number == 1 else stem.with_name(f"{stem.name}_{number}")
                picture = numbered.with_name(f"{numbered.name}{ending}{suffix}")
                target = _target(picture, numbered, source.is_video, masks, records, exports)
                # Some file systems are case-insensitive.
                keys = {str(path).lower() for path in target.paths}
                if not keys & used:
                    break
                number += 1
            used |= keys
            targets.append(target)
    inputs = {os.path.realpath(source.record.get("tar", source.path)) for source in sources}
    for source, target in zip(sources, targets):
        _check_paths(target, inputs)
        if source.is_video and target.masks:
            _check_masks(target.masks, source.path)
    return targets


def _target(picture: Path, stem: Path, is_video: bool, masks: bool, records: bool, exports: Collection[str]) -> Target:
    masks_name = f"{stem.name}_masks" if is_video else f"{stem.name}_mask.png"
    return Target(
        picture,
        stem.with_name(masks_name) if masks else None,
        stem.with_name(f"{stem.name}.json") if records else None,
        stem.with_name(f"{stem.name}.json") if "labelme" in exports else None,
        stem.with_name(f"{stem.name}.tif") if "geotiff" in exports else None,
    )


def _check_file(sources: Sequence[Source], output: str) -> None:
    if len(sources) > 1:
        raise ValueError(f"{FLAG} {output} is a file, and there are {len(sources)} inputs: name a folder")
    allowed = (VIDEO,) if sources[0].is_video else PICTURES
    if Path(output).suffix.lower() not in allowed:
        kind = "a video" if sources[0].is_video else "an image"
        raise ValueError(f"{FLAG} for {kind} must end in {', '.join(allowed)}, or be a folder; got {output}")


def _check_paths(target: Target, inputs: Collection[str]) -> None:
    for path in target.paths:
        if os.path.realpath(path) in inputs:
            raise ValueError(f"{FLAG}: {path} is one of the inputs, which are never overwritten; name another folder")
        above = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
        if not above.is_dir():
            raise ValueError(f"{FLAG}: {above} is a file, but {path} needs a folder there")
        if not os.access(above, os.W_OK):
            raise ValueError(f"{FLAG}: {above} is not writable")
        if path == target.record and path.is_file() and not _is_record(path):
            raise ValueError(f"{FLAG}: {path} is not from an earlier run and would be replaced; name another folder")
        if path == target.labelme and path.is_file():
            raise ValueError(f"{FLAG}: {path} may have been edited in labelme; delete it, or name another folder")
        is_folder = path == target.masks and path.suffix != ".png"
        if path.exists() and path.is_dir() != is_folder:
            raise ValueError(f"{FLAG}: {path} is a {'file' if is_folder else 'folder'} and cannot be replaced")


def frame_masks(folder: Path) -> dict[int, Path]:
    """Return the files with names of frame masks, by frame number."""
    return {int(path.stem): path for path in folder.glob("[0-9]" * 6 + ".png")}


def _check_masks(folder: Path, video: str) -> None:
    others = [path for path in frame_masks(folder).values() if not is_mask_of(path, video)]
    if others:
        raise ValueError(
            f"{FLAG}: {min(others)} is not from an earlier run on {video} and would be replaced or deleted; name "
            f"another folder, or delete {folder}"
        )


def is_mask_of(path: Path, source: str) -> bool:
    """Whether a file was written by :func:`write_mask` for this source."""
    try:
        with open_image(path, ["PNG"]) as image:
            return image.info.get(_WRITTEN_OF) == _name(source)
    except DAMAGE:
        return False


def _name(source: str) -> str:
    # File names may contain invalid UTF-8.
    return ascii(os.path.basename(source))


def _is_record(path: Path) -> bool:
    """Whether a file was written by :func:`write_record`, and is not, for example, an annotation file of the user."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"width", "height", "classes"} <= content.keys()


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3) uint8 RGB in the format of the file name.

    Raises:
        ValueError: the image is too large for the format, for example JPEG or WebP.
    """
    options: dict[str, Any] = {"compress_level": 4} if path.suffix.lower() == ".png" else {"quality": _QUALITY}
    with atomic_write(path) as temporary:
        try:
            Image.fromarray(pixels).save(temporary, **options)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # a full disk
            height, width = pixels.shape[:2]
            raise ValueError(f"{FLAG}: {path} cannot be written with {width}x{height} pixels: {error}") from error


def write_mask(labels: np.ndarray, colors: Sequence[tuple[int, int, int]], path: Path, source: str) -> None:
    """Write class indices (H, W) as a PNG, with the colors of up to 256 classes as palette, or else in 16 bits.

    The name of the source file is stored in the PNG, see :func:`is_mask_of`.
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
    """Write a JSON file in UTF-8."""
    write_text(as_json(content, ensure_ascii=False, indent=1) + "\n", path)
