"""Writes the results of a run in the formats of annotation programs and geographic information systems."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from spar_d2.demo.inputs import Source
from spar_d2.demo.outputs import FLAG, Target, is_file_name, write_record
from spar_d2.results.coco import MARK, coco_annotations, coco_categories, coco_image
from spar_d2.results.geotiff import require_rasterio, write_geotiff
from spar_d2.results.labelme import labelme_content
from spar_d2.results.labelstudio import labeling_interface, labelstudio_task
from spar_d2.results.regions import find_regions
from spar_d2.utils.io import as_json, write_json, write_text

# In one file for all images.
SHARED = ("coco", "labelstudio")
FORMATS = (*SHARED, "labelme", "masks", "geotiff")
# Polygons deviate by at most this number of pixels from the outline.
_TOLERANCE = 1.0
# Bytes at the start of a file that has the mark of this package.
_START = 400
# Address of an image below the folder that Label Studio serves local files from.
_LOCAL_FILES = "/data/local-files/?d="


class Exports:
    """Collects the results of a run, and writes files.

    Args:
        formats: some of ``FORMATS``; masks are written elsewhere.
        sources: inputs.
        targets: output paths of each input.
        output: ``--output``, a folder or file.
        names: names of all classes.
        min_area: smallest area of a region in pixels.

    Raises:
        ValueError: an argument is invalid, or a file of the user would be replaced.
        RuntimeError: rasterio is not installed and is needed.
    """

    def __init__(
        self,
        formats: Collection[str],
        sources: Sequence[Source],
        targets: Sequence[Target],
        output: str,
        names: Sequence[str],
        min_area: int = 0,
    ) -> None:
        if min_area < 0:
            raise ValueError(f"--min-area must be at least 0 pixels, got {min_area}")
        if "geotiff" in formats:
            require_rasterio()
        self._formats, self._names, self._min_area = set(formats), names, min_area
        prefix = Path(output).with_suffix("") if is_file_name(output) else None
        self.shared = {
            form: prefix.with_name(f"{prefix.name}_{form}.json") if prefix else Path(output) / f"{form}.json"
            for form in SHARED
            if form in formats
        }
        used = {str(path).lower() for target in targets for path in target.paths}
        for path in self.shared.values():
            _check_shared(path, used)
        count = Counter(source.name for source in sources)
        # Images of several folders may have the same name.
        self._listed = {source.path: source.name if count[source.name] == 1 else source.path for source in sources}
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._tasks: list[str] = []

    def add(self, source: Source, target: Target, labels: np.ndarray) -> None:
        """Add the labels (H, W) of an image, and write its own files.

        Raises:
            ValueError, RuntimeError: see :func:`spar_d2.results.geotiff.write_geotiff`.
        """
        size, listed = (labels.shape[0], labels.shape[1]), self._listed[source.path]
        if target.geotiff:
            write_geotiff(labels, self._names, source.path, target.geotiff)
        if not self._formats & {"labelme", *SHARED}:
            return
        regions = find_regions(labels, self._names, self._min_area)
        if target.labelme:
            image = os.path.relpath(source.path, target.labelme.parent)
            write_record(labelme_content(regions, image, size, _TOLERANCE), target.labelme)
        if "coco" in self.shared:
            self._images.append(coco_image(len(self._images) + 1, listed, size))
            self._annotations += coco_annotations(regions, len(self._images), len(self._annotations) + 1)
        if "labelstudio" in self.shared:
            # As text, which takes less memory.
            self._tasks.append(as_json(labelstudio_task(regions, _LOCAL_FILES + quote(listed), size)))

    def write(self) -> list[Path]:
        """Write the files of all images added so far, and return their paths."""
        written = []
        if self._images:
            content = {"info": {"description": MARK}, "images": self._images, "annotations": self._annotations}
            write_json({**content, "categories": coco_categories(self._names)}, self.shared["coco"], ensure_ascii=False)
            written.append(self.shared["coco"])
        if self._tasks:
            path = self.shared["labelstudio"]
            write_text(f"[{','.join(self._tasks)}]\n", path)
            write_text(f"{labeling_interface(self._names)}\n", path.with_suffix(".xml"))
            written += [path, path.with_suffix(".xml")]
        return written


def check_formats(formats: Collection[str], sources: Sequence[Source], records: bool) -> None:
    """Raise ``ValueError`` if inputs or options do not go with the formats; ``records``: whether ``--json`` is set."""
    if records and "labelme" in formats:
        raise ValueError("--export labelme and --json both write NAME.json: leave out one of them")
    for source in sources:
        if source.is_video and set(formats) - {"masks"}:
            raise ValueError(
                f"--export {' '.join(formats)}: {source.path} is a video, for which only masks of frames are written: "
                "use --export masks, or leave out the video"
            )
        if "tar" in source.record and {"labelme", "geotiff"} & set(formats):
            raise ValueError(
                f"--export {' '.join(formats)}: labelme and geotiff need image files, but {source.name} is in a tar "
                "file: unpack it"
            )


def _check_shared(path: Path, used: Collection[str]) -> None:
    if str(path).lower() in used:
        raise ValueError(f"{FLAG}: {path} would be written twice, for an image and for --export; rename the image")
    interface = path.with_suffix(".xml")
    if path.stem.endswith("labelstudio") and interface.exists() and not path.exists():
        raise ValueError(f"{FLAG}: {interface} is not from an earlier run; delete it, or name another folder")
    if path.is_dir():
        raise ValueError(f"{FLAG}: {path} is a folder and cannot be replaced")
    if path.is_file():
        with open(path, "rb") as file:
            if f'"{MARK}'.encode() not in file.read(_START):
                raise ValueError(
                    f"{FLAG}: {path} is not from an earlier run and would be replaced; name another folder"
                )
