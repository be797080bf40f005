"""Registers the splits of data-set files with Detectron2."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from spar_d2.data.datasets.dataset_file import DataClass, DatasetFile, Split, read_dataset_file
from spar_d2.data.datasets.file_records import (
    annotated_images,
    check_no_tar,
    check_split,
    find_images,
    load_split,
    read_panoptic_json,
)
from spar_d2.data.datasets.panoptic import category_numbers, panoptic_metadata, renumbered_segments

# Registered data-set file and split, by name of the data set.
_REGISTERED: dict[str, tuple[DatasetFile, Split]] = {}


def register_dataset_file(path: str | os.PathLike) -> DatasetFile:
    """Register every split of a data-set file (docs/own_data.md) with Detectron2, as "NAME_SPLIT".

    Images and label maps are not accessed before a split is loaded. A file that has changed is registered again.

    Args:
        path: YAML file.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the content is invalid, or a name is already registered by something else.
    """
    file = read_dataset_file(path)
    check_names_are_free(file)
    categories = _categories(file) if file.panoptic else []
    for split in file.splits.values():
        _register(file, split, categories)
    return file


def check_names_are_free(file: DatasetFile) -> None:
    """Raise ``ValueError`` if the name of a split is already registered by something else."""
    for split in file.splits.values():
        name = file.registered_name(split.name)
        known = _REGISTERED.get(name)
        if name in DatasetCatalog and (known is None or known[0].path != file.path):
            by = known[0].path if known else "this package or another module"
            raise file.error("name", f"the data set {name!r} is already registered by {by}; choose another name")


def registered_split(name: str) -> tuple[DatasetFile, Split] | None:
    """Return the data-set file and the split of a registered data set; None for other data sets."""
    return _REGISTERED.get(name) if name in DatasetCatalog else None


def check_registered(name: str) -> None:
    """Raise an error early if a data set of a data-set file cannot be loaded; does nothing for other data sets.

    Only folders and names are checked for panoptic sets, because their JSON files may be large.
    """
    found = registered_split(name)
    if found is not None:
        file, split = found
        check_split(file, split)
        if not file.panoptic:
            load_split(file, split.name)


def _register(file: DatasetFile, split: Split, categories: Sequence[dict]) -> None:
    name = file.registered_name(split.name)
    metadata = _metadata(file, split, categories)
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).as_dict() == {"name": name, **metadata} and _REGISTERED[name] == (file, split):
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    load = _load_panoptic if file.panoptic and split.labels else load_split
    DatasetCatalog.register(name, functools.partial(load, file, split.name))
    MetadataCatalog.get(name).set(**metadata)
    _REGISTERED[name] = (file, split)


def _metadata(file: DatasetFile, split: Split, categories: Sequence[dict]) -> dict[str, Any]:
    if file.panoptic:
        paths = {"panoptic_json": split.labels, "panoptic_root": split.masks, "image_root": split.images[0]}
        synonyms = {entry.name: list(entry.synonyms) for entry in file.classes if entry.synonyms}
        form = {**panoptic_metadata(categories), "synonyms": synonyms, "dataset_file": file.path}
        return {**form, **(paths if split.labels else {})}
    names = [data_class.name for data_class in file.classes]
    classes = {
        "stuff_classes": names,
        "stuff_colors": [list(color) for color in file.colors([entry.color for entry in file.classes], names)],
        "vocabulary": [[data_class.name, *data_class.synonyms] for data_class in file.classes],
    }
    return {
        **(classes if names else {}),
        "evaluator_type": "sem_seg",
        "ignore_label": file.ignore_label,
        "dataset_file": file.path,
    }


def _categories(file: DatasetFile) -> list[dict]:
    """Return the categories, from the smallest JSON file, with the names and colors of the data-set file."""
    labeled = [split for split in file.splits.values() if split.labels and os.path.isfile(split.labels)]
    if not labeled:
        check_split(file, next(split for split in file.splits.values() if split.labels))
    split = min(labeled, key=lambda split: os.path.getsize(split.labels))
    return match_categories(file, split, read_panoptic_json(file, split))


def match_categories(file: DatasetFile, split: Split, content: dict) -> list[dict]:
    """Match the classes of a data-set file with the categories of a panoptic JSON file.

    Returns:
        Categories with "id", "name", "isthing" and "color", in the order of the classes, or of the JSON file if the
        data-set file has no classes.

    Raises:
        ValueError: a category is invalid or occurs twice, or classes and categories differ.
    """
    key = f"splits.{split.name}.labels"
    found: dict[int, dict] = {}
    for category in content["categories"]:
        if not isinstance(category, dict) or not isinstance(category.get("id"), int):
            raise file.error(key, f"categories in {split.labels} must have an integer id, got {category!r}")
        if category["id"] in found:
            raise file.error(key, f"the category {category['id']} occurs twice in {split.labels}")
        if category.get("isthing") not in (0, 1):
            raise file.error(key, f"the category {category['id']} in {split.labels} must have isthing 0 or 1")
        found[category["id"]] = category
    if not found:
        raise file.error(key, f"{split.labels} has no categories")
    by_name = {str(category.get("name", number)): number for number, category in found.items()}
    classes = file.classes or tuple(DataClass(name, value=number) for name, number in by_name.items())
    matched = []
    for index, data_class in enumerate(classes):
        number = by_name.get(data_class.name) if data_class.value is None else data_class.value
        if number not in found:
            named = data_class.name if data_class.value is None else data_class.value
            raise file.error(f"classes[{index}]", f"{split.labels} has no category {named!r}; it has {list(by_name)}")
        isthing = bool(found[number]["isthing"])
        if data_class.thing not in (None, isthing):
            kind = "a thing" if isthing else "stuff"
            raise file.error(f"classes[{index}].thing", f"{data_class.name!r} is {kind} in {split.labels}")
        color = data_class.color or _color(found[number])
        matched.append({"id": number, "name": data_class.name, "isthing": int(isthing), "color": color})
    if rest := sorted(set(found) - {category["id"] for category in matched}):
        names = [str(found[number].get("name", number)) for number in rest]
        raise file.error("classes", f"must list all categories of {split.labels}; missing: {', '.join(names)}")
    colors = file.colors([category["color"] for category in matched], [category["name"] for category in matched])
    return [{**category, "color": color} for category, color in zip(matched, colors)]


def _color(category: dict) -> tuple[int, int, int] | None:
    color = category.get("color")
    if isinstance(color, list) and len(color) == 3 and all(isinstance(part, int) and 0 <= part < 256 for part in color):
        return color[0], color[1], color[2]
    return None


def _load_panoptic(file: DatasetFile, name: str) -> list[dict]:
    """Load the dataset dicts of a panoptic split; format as :func:`spar_d2.data.datasets.panoptic.load_panoptic`."""
    split = file.splits[name]
    key = f"splits.{name}.labels"
    content = read_panoptic_json(file, split)
    metadata = MetadataCatalog.get(file.registered_name(name)).as_dict()
    numbers = category_numbers(metadata)
    categories = match_categories(file, split, content)
    things = {category["id"] for category in categories if category["isthing"]}
    if {category["id"] for category in categories} != set(numbers) or things != set(
        metadata["thing_dataset_id_to_contiguous_id"]
    ):
        raise file.error(
            key,
            f"{split.labels} has other categories, or other things (isthing), than the other splits: all must have the "
            "same",
        )
    images = find_images(file, split)
    check_no_tar(file, split, images)
    matched, missing = annotated_images(file, split, content, images)
    if missing:
        total = len(content["annotations"])
        raise file.not_found(key, f"{len(missing)} of {total} annotations are incomplete: {missing[0]}")
    if not matched:
        raise file.error(key, f"{split.labels} has no annotations")
    try:
        return [
            {
                "file_name": image,
                "image_id": entry["id"],
                "height": entry["height"],
                "width": entry["width"],
                "pan_seg_file_name": mask,
                "segments_info": renumbered_segments(annotation, numbers),
            }
            for entry, annotation, image, mask in matched
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{split.labels} is not in COCO's panoptic format ({type(error).__name__}: {error})"
        raise file.error(key, problem) from error


def head_classes(names: Sequence[str]) -> list[tuple[str, DatasetFile, dict[str, int]]]:
    """Return the numbers of classes of data sets of data-set files.

    Args:
        names: names of registered data sets; others are skipped.

    Returns:
        Name, data-set file, and {"stuff": ..., "things": ...} for panoptic sets or {"classes": ...} for others.
    """
    counts = []
    for name in dict.fromkeys(names):
        found = registered_split(name)
        if found is None:
            continue
        metadata = MetadataCatalog.get(name)
        if found[0].panoptic:
            count = {"stuff": len(metadata.stuff_classes) - 1, "things": len(metadata.thing_classes)}
        elif metadata.get("stuff_classes"):
            count = {"classes": len(metadata.stuff_classes)}
        else:  # images without labels
            continue
        counts.append((name, found[0], count))
    return counts
