"""Panoptic data sets in COCO's panoptic format, loaded as Detectron2's PanopticFPN expects them.

Detectron2's built-in data sets need preparation packages that are not on PyPI. All names begin with "spar_", because
other frameworks register the plain names.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar_d2.data.datasets.scenes import IGNORE_LABEL, SCENE_SPLITS, SEGMENTS_ENDING, load_scenes, scenes_root
from spar_d2.data.preparation import ade20k_panoptic, cityscapes_panoptic
from spar_d2.data.preparation.panoptic import areas_and_boxes
from spar_d2.toy import scenes
from spar_d2.utils.environment import datasets_root
from spar_d2.utils.images import read_ids, read_labels
from spar_d2.utils.io import write_text
from spar_d2.utils.panoptic_numbers import STUFF, THINGS

# Detectron2's encoding of segments: id = class * divisor + instance.
_LABEL_DIVISOR = 1000
_THINGS_COLOR = [82, 82, 82]


@dataclass(frozen=True)
class PanopticDataset:
    """A data set in COCO's panoptic format.

    Attributes:
        images: folder of the images.
        labels: JSON file. Masks are in a folder of the same name without the suffix, unless ``masks`` is set.
        categories: returns the categories in COCO's format: "id", "name", "isthing", "color".
        image_file: maps an image entry of the JSON file to the file name within ``images``.
        remedy: instructions for error messages if files are missing.
        masks: folder of the masks, if it differs from the default.
        prepare: called with the root folder before files are read.
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
    # The file names that Cityscapes' tools write do not exist.
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
    """Return all panoptic data sets, by name."""
    datasets, scene_folder = {}, scenes_root("").name
    for split, folder in (("train", "training"), ("val", "validation")):
        datasets[f"spar_coco_panoptic_{split}"] = PanopticDataset(
            f"coco/{split}2017",
            f"coco/annotations/panoptic_{split}2017.json",
            _coco_categories,
            _by_name,
            f"unpack {split}2017.zip and panoptic_annotations_trainval2017.zip of cocodataset.org in its folder coco, "
            f"and there panoptic_{split}2017.zip, which is part of the second",
            masks=f"coco/panoptic_{split}2017",
        )
        datasets[f"spar_cityscapes_panoptic_{split}"] = PanopticDataset(
            f"cityscapes/leftImg8bit/{split}",
            f"cityscapes/gtFine/cityscapes_panoptic_{split}.json",
            cityscapes_panoptic.categories,
            _in_city,
            "run: spar-d2 prepare cityscapes_panoptic",
        )
        datasets[f"spar_ade20k_panoptic_{split}"] = PanopticDataset(
            f"ADEChallengeData2016/images/{folder}",
            f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
            ade20k_panoptic.categories,
            _by_name,
            "run: spar-d2 prepare ade20k_panoptic",
        )
    for split in SCENE_SPLITS:
        datasets[f"spar_scenes_panoptic_{split}"] = PanopticDataset(
            f"{scene_folder}/{split}",
            f"{scene_folder}/panoptic_{split}.json",
            _scene_categories,
            _by_name,
            "delete the folder of the synthetic data set; it is generated again",
            masks=f"{scene_folder}/{split}",
            prepare=functools.partial(_prepare_scenes, split),
        )
    return datasets


def is_panoptic(name: str) -> bool:
    """Whether this is one of this package's panoptic data sets."""
    return name in panoptic_datasets()


def has_panoptic_masks(name: str) -> bool:
    """Whether a data set has panoptic masks: this package's data sets and those of ``register_coco_panoptic``."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    metadata = MetadataCatalog.get(name) if name in DatasetCatalog else None
    # Data sets of `register_coco_panoptic_separated` have polygons and stuff labels in their records instead.
    return is_panoptic(name) or bool(metadata and metadata.get("panoptic_root") and not metadata.get("sem_seg_root"))


def register_panoptic() -> None:
    """Register ``spar_{coco,cityscapes,ade20k}_panoptic_{train,val}`` and ``spar_scenes_panoptic_{train,tune,val}``."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, data in panoptic_datasets().items():
        DatasetCatalog.register(name, functools.partial(load_panoptic, name))
        MetadataCatalog.get(name).set(**panoptic_metadata(data.categories()))


def panoptic_metadata(categories: Sequence[dict]) -> dict[str, Any]:
    """Create metadata like Detectron2's "separated" sets: things from 0 on; stuff from 1 on, 0 for all things.

    Args:
        categories: dicts with "id", "name", "isthing" and "color".
    """
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
    """Load the dataset dicts of a panoptic data set, and set the paths of its files in the metadata.

    Args:
        name: registered name of the data set.
        root: root folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        Dataset dicts with file_name, image_id, height, width, pan_seg_file_name and segments_info, a list of dicts with
        id, isthing, iscrowd and category_id, which starts at 0 for things and at 1 for stuff.

    Raises:
        FileNotFoundError: files are missing; the message says what to do.
        ValueError: the name is unknown, or the files are not in COCO's panoptic format or have other categories.
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
    # Bypass the metadata's check against changes: the root folder may differ from that of an earlier call.
    paths = {"panoptic_json": labels, "panoptic_root": masks, "image_root": root / data.images}
    vars(metadata).update({key: str(path) for key, path in paths.items()})
    numbers = category_numbers(metadata.as_dict())
    try:
        content = json.loads(labels.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        records = [
            _record(images[annotation["image_id"]], annotation, root / data.images, masks, data, numbers)
            for annotation in content["annotations"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"not in COCO's panoptic format, or it has other categories ({type(error).__name__}: {error})"
        raise ValueError(f"{name}: {labels} is {problem}; {data.remedy}") from error
    # Checking all files would take minutes on a network file system.
    for record in records[:1]:
        _check_there(name, data, record["file_name"], record["pan_seg_file_name"])
    return records


def _check_there(name: str, data: PanopticDataset, *paths: str | os.PathLike) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{name}: {path} does not exist ($DETECTRON2_DATASETS is the root folder of data sets); {data.remedy}"
            )


def _record(
    image: dict,
    annotation: dict,
    images: Path,
    masks: Path,
    data: PanopticDataset,
    numbers: dict[int, tuple[int, bool]],
) -> dict:
    return {
        "file_name": str(images / data.image_file(image)),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "pan_seg_file_name": str(masks / annotation["file_name"]),
        "segments_info": renumbered_segments(annotation, numbers),
    }


def category_numbers(metadata: Mapping[str, Any]) -> dict[int, tuple[int, bool]]:
    """Return a map from the category ids of a data set to contiguous ids and whether they are things."""
    kinds = ((THINGS, True), (STUFF, False))
    return {category: (number, isthing) for key, isthing in kinds for category, number in metadata[key].items()}


def renumbered_segments(annotation: dict, numbers: Mapping[int, tuple[int, bool]]) -> list[dict]:
    """Return the "segments_info" of an annotation in COCO's format, with contiguous ids of :func:`category_numbers`."""
    segments = []
    for segment in annotation["segments_info"]:
        number, isthing = numbers[segment["category_id"]]
        crowd = int(segment.get("iscrowd", 0))
        segments.append({"id": segment["id"], "category_id": number, "isthing": isthing, "iscrowd": crowd})
    return segments


def _prepare_scenes(split: str, root: Path) -> None:
    """Generate the images of a split and its panoptic JSON file."""
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
    write_text(json.dumps(content), path)


def _scene_segments(masks: Path, labels: str) -> list[dict]:
    numbers = read_segment_ids(masks)
    classes = read_labels(labels)
    class_of = dict(zip(numbers.ravel().tolist(), classes.ravel().tolist()))
    return [
        {"id": number, "category_id": class_of[number] + 1, "iscrowd": 0, **place}
        for number, place in areas_and_boxes(numbers).items()
    ]


def read_segment_ids(path: str | os.PathLike) -> np.ndarray:
    """Read segment ids (H, W) int32 of a mask in COCO's panoptic format; see :func:`read_ids`."""
    return read_ids(path).view(np.int32)
