"""Panoptic data sets in one form: that of Detectron2's PanopticFPN, read from COCO's panoptic files.

Detectron2's own need packages for their preparation that are on no registry. All names begin with "spar_", as other
frameworks register the plain ones.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar_d2.data.datasets.scenes import IGNORE_LABEL, SCENE_SPLITS, SEGMENTS_ENDING, load_scenes, scenes_root
from spar_d2.data.preparation import ade20k_panoptic, cityscapes_panoptic
from spar_d2.data.preparation.common import datasets_root
from spar_d2.data.preparation.panoptic import areas_and_boxes
from spar_d2.toy import scenes
from spar_d2.utils.images import read_ids, read_labels
from spar_d2.utils.io import atomic_write

# Detectron2's number of instances that a class may have in an image, where a segment's number tells its class.
_LABEL_DIVISOR = 1000
_THINGS_COLOR = [82, 82, 82]


@dataclass(frozen=True)
class PanopticDataset:
    """A data set in COCO's panoptic form.

    Attributes:
        images: folder of the images.
        labels: JSON file; the masks are in a folder of the same name without its suffix, unless ``masks`` says where.
        categories: gives its classes, as in COCO: "id", "name", "isthing", "color".
        image_file: name of an image's file within ``images``, from its entry in the JSON file.
        remedy: what to do where files are missing.
        masks: see ``labels``.
        prepare: called with the root folder before anything is read.
    """

    images: str
    labels: str
    categories: Callable[[], Sequence[dict]]
    image_file: Callable[[dict], str]
    remedy: str
    masks: str = ""
    prepare: Callable[[Path], None] = lambda root: None


def _by_name(image: dict) -> str:
    return image["file_name"]


def _in_city(image: dict) -> str:
    # The names in the file that Cityscapes' tool writes are those of no file.
    return f"{image['id'].split('_')[0]}/{image['id']}_leftImg8bit.png"


def _coco_categories() -> list[dict]:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    return COCO_CATEGORIES


def _scene_categories() -> list[dict]:
    classes = zip(scenes.SCENE_CLASSES, scenes.class_colors())
    return [
        {"id": number, "name": name, "isthing": int(name in scenes.OBJECTS), "color": color}
        for number, (name, color) in enumerate(classes, start=1)
    ]


@functools.cache
def panoptic_datasets() -> dict[str, PanopticDataset]:
    """All of them, by the names that they are registered under."""
    found, scene_folder = {}, scenes_root("").name
    for split, folder in (("train", "training"), ("val", "validation")):
        found[f"spar_coco_panoptic_{split}"] = PanopticDataset(
            f"coco/{split}2017",
            f"coco/annotations/panoptic_{split}2017.json",
            _coco_categories,
            _by_name,
            f"unpack {split}2017.zip and panoptic_annotations_trainval2017.zip of cocodataset.org in its folder coco, "
            f"and there the panoptic_{split}2017.zip that is in the second",
            masks=f"coco/panoptic_{split}2017",
        )
        found[f"spar_cityscapes_panoptic_{split}"] = PanopticDataset(
            f"cityscapes/leftImg8bit/{split}",
            f"cityscapes/gtFine/cityscapes_panoptic_{split}.json",
            cityscapes_panoptic.categories,
            _in_city,
            "run: python tools/prepare_datasets.py cityscapes_panoptic",
        )
        found[f"spar_ade20k_panoptic_{split}"] = PanopticDataset(
            f"ADEChallengeData2016/images/{folder}",
            f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
            ade20k_panoptic.categories,
            _by_name,
            "run: python tools/prepare_datasets.py ade20k_panoptic",
        )
    for split in SCENE_SPLITS:
        found[f"spar_scenes_panoptic_{split}"] = PanopticDataset(
            f"{scene_folder}/{split}",
            f"{scene_folder}/panoptic_{split}.json",
            _scene_categories,
            _by_name,
            "delete what is there of the scenes; they are drawn anew",
            masks=f"{scene_folder}/{split}",
            prepare=functools.partial(_prepare_scenes, split),
        )
    return found


def is_panoptic(name: str) -> bool:
    """Whether a data set is one of these."""
    return name in panoptic_datasets()


def has_panoptic_masks(name: str) -> bool:
    """Whether the records of a data set have panoptic masks: one of these, or one of ``register_coco_panoptic``."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    metadata = MetadataCatalog.get(name) if name in DatasetCatalog else None
    # Sets of `register_coco_panoptic_separated` have polygons and labels of stuff in their records instead.
    return is_panoptic(name) or bool(metadata and metadata.get("panoptic_root") and not metadata.get("sem_seg_root"))


def register_panoptic() -> None:
    """Register ``spar_{coco,cityscapes,ade20k}_panoptic_{train,val}`` and ``spar_scenes_panoptic_{train,tune,val}``."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, data in panoptic_datasets().items():
        DatasetCatalog.register(name, functools.partial(load_panoptic, name))
        MetadataCatalog.get(name).set(**_metadata(data.categories()))


def _metadata(categories: Sequence[dict]) -> dict[str, Any]:
    """As Detectron2's "separated" metadata: things from 0 on; stuff from 1 on, where 0 stands for all things."""
    things = [category for category in categories if category["isthing"]]
    stuff = [category for category in categories if not category["isthing"]]
    return {
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [list(category["color"]) for category in things],
        "stuff_classes": ["things", *(category["name"] for category in stuff)],
        "stuff_colors": [_THINGS_COLOR, *(list(category["color"]) for category in stuff)],
        "thing_dataset_id_to_contiguous_id": {category["id"]: number for number, category in enumerate(things)},
        "stuff_dataset_id_to_contiguous_id": {c["id"]: number for number, c in enumerate(stuff, start=1)},
        "ignore_label": IGNORE_LABEL,
        "label_divisor": _LABEL_DIVISOR,
        "evaluator_type": "coco_panoptic_seg",
    }


def load_panoptic(name: str, root: str | os.PathLike | None = None) -> list[dict]:
    """Dataset dicts of a panoptic data set; its metadata then says where its files are.

    Args:
        name: as registered.
        root: folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        For each image file_name, image_id, height, width, pan_seg_file_name and segments_info, a list of dicts with
        id, isthing, iscrowd and category_id, which counts things from 0 and stuff from 1 on.

    Raises:
        FileNotFoundError: its files are not there; says what to do.
        ValueError: no such name, or its files are not in COCO's panoptic form, or have other classes.
    """
    from detectron2.data import MetadataCatalog

    if not is_panoptic(name):
        raise ValueError(f"name must be one of {', '.join(panoptic_datasets())}, got {name!r}")
    data = panoptic_datasets()[name]
    root = datasets_root(root)
    data.prepare(root)
    labels = root / data.labels
    masks = root / data.masks if data.masks else labels.with_suffix("")
    _check_there(name, data, labels, masks, root / data.images)
    metadata = MetadataCatalog.get(name)
    # Set past its check that nothing changes: the root may be another one than before.
    places = {"panoptic_json": labels, "panoptic_root": masks, "image_root": root / data.images}
    vars(metadata).update({key: str(path) for key, path in places.items()})
    numbers = {
        **{category: (number, True) for category, number in metadata.thing_dataset_id_to_contiguous_id.items()},
        **{category: (number, False) for category, number in metadata.stuff_dataset_id_to_contiguous_id.items()},
    }
    try:
        content = json.loads(labels.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        records = [
            _record(images[annotation["image_id"]], annotation, root / data.images, masks, data, numbers)
            for annotation in content["annotations"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"it is not in COCO's panoptic form, or has other classes ({type(error).__name__}: {error})"
        raise ValueError(f"{name}: {labels} is of no use: {problem}; {data.remedy}") from error
    # To look for all of them would take minutes on a file server.
    for record in records[:1]:
        _check_there(name, data, record["file_name"], record["pan_seg_file_name"])
    return records


def _check_there(name: str, data: PanopticDataset, *paths: str | os.PathLike) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{name}: there is no {path} ($DETECTRON2_DATASETS says where data sets are); {data.remedy}"
            )


def _record(
    image: dict,
    annotation: dict,
    images: Path,
    masks: Path,
    data: PanopticDataset,
    numbers: dict[int, tuple[int, bool]],
) -> dict:
    segments = []
    for segment in annotation["segments_info"]:
        number, isthing = numbers[segment["category_id"]]
        crowd = int(segment.get("iscrowd", 0))
        segments.append({"id": segment["id"], "category_id": number, "isthing": isthing, "iscrowd": crowd})
    return {
        "file_name": str(images / data.image_file(image)),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "pan_seg_file_name": str(masks / annotation["file_name"]),
        "segments_info": segments,
    }


def _prepare_scenes(split: str, root: Path) -> None:
    """Draw the scenes of a split, and write their panoptic JSON file from what was drawn."""
    records = load_scenes(split, root)
    path = scenes_root(root) / f"panoptic_{split}.json"
    if path.is_file():
        return
    images, annotations = [], []
    for record in records:
        image = Path(record["file_name"])
        masks = f"{image.stem}{SEGMENTS_ENDING}.png"
        name = {"file_name": image.name, "height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], **name})
        segments = _scene_segments(image.with_name(masks), record["sem_seg_file_name"])
        annotations.append({"image_id": record["image_id"], "file_name": masks, "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": _scene_categories()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content))


def _scene_segments(masks: Path, labels: str) -> list[dict]:
    numbers = read_segment_ids(masks)
    classes = read_labels(labels)
    class_of = dict(zip(numbers.ravel().tolist(), classes.ravel().tolist()))
    return [
        {"id": number, "category_id": class_of[number] + 1, "iscrowd": 0, **place}
        for number, place in areas_and_boxes(numbers).items()
    ]


def read_segment_ids(path: str | os.PathLike) -> np.ndarray:
    """Numbers of the segments in a mask in COCO's panoptic form, (H, W) int32; see :func:`read_ids`."""
    return read_ids(path).view(np.int32)
