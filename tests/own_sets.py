"""Small own data sets with a data-set file: two grounds and a thing, semantic or panoptic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from reference import reference_image
from spar_d2.data.datasets import file_registration

SIZE = (48, 64)
CLASSES = ["sand", {"name": "sea", "synonyms": ["water"], "color": [0, 0, 200]}, {"name": "boat", "thing": True}]
CATEGORIES = [{"id": 10, "name": "sand", "isthing": 0}, {"id": 20, "name": "sea", "isthing": 0}]
CATEGORIES += [{"id": 30, "name": "boat", "isthing": 1}]


def labels(number: int) -> np.ndarray:
    """Class indices of an image: sand above sea, with a boat whose place depends on the number."""
    classes = np.zeros(SIZE, dtype=np.uint8)
    classes[24:] = 1
    classes[20:36, 8 + number : 28 + number] = 2
    return classes


def semantic_set(folder: Path, counts: dict[str, int] | None = None, **changes) -> Path:
    """Write a semantic set and its file, with pixel values 1 to 3 and 0 for ignored pixels; return the file."""
    splits = {}
    for split, count in (counts or {"train": 4, "val": 2}).items():
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(reference_image(*SIZE, number)).save(folder / f"images/{split}/{number}.jpg")
            values = labels(number) + 1
            values[0] = 0
            Image.fromarray(values).save(folder / f"labels/{split}/{number}_gt.png")
        splits[split] = {"images": f"images/{split}", "labels": f"labels/{split}"}
    classes = [{"name": CLASSES[0], "value": 1}, *CLASSES[1:]]
    content = {"classes": classes, "ignore": 0, "label_name": "{stem}_gt.png", "splits": splits, **changes}
    return write(folder / "beach.yaml", content)


def panoptic_set(folder: Path, counts: dict[str, int] | None = None, **changes) -> Path:
    """Write a panoptic set in COCO's format and its file; return the file."""
    splits = {}
    for split, count in (counts or {"train": 4, "val": 2}).items():
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        (folder / split).mkdir(parents=True)
        (folder / f"panoptic_{split}").mkdir()
        for number in range(count):
            Image.fromarray(reference_image(*SIZE, number)).save(folder / f"{split}/{number}.jpg")
            ids = labels(number).astype(int) + 1
            Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(
                folder / f"panoptic_{split}/{number}.png"
            )
            segments = [
                {"id": n, "category_id": 10 * n, "area": int((ids == n).sum()), "iscrowd": 0} for n in (1, 2, 3)
            ]
            size = {"height": SIZE[0], "width": SIZE[1]}
            content["images"].append({"id": number, "file_name": f"{number}.jpg", **size})
            content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        (folder / f"panoptic_{split}.json").write_text(json.dumps(content))
        splits[split] = {"images": split, "labels": f"panoptic_{split}.json"}
    return write(folder / "boats.yaml", {"splits": splits, **changes})


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def forget() -> None:
    """Remove all data sets of data-set files from Detectron2's catalogs."""
    for name in list(file_registration._REGISTERED):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        file_registration._REGISTERED.pop(name)
