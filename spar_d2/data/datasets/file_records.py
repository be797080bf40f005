"""Finds the images and labels of a data-set file. Needs no Detectron2."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

from spar_d2.data.datasets.dataset_file import STEM, DatasetFile, Split
from spar_d2.data.sources import KEY, find_photos
from spar_d2.utils.label_values import VALUES


def check_split(file: DatasetFile, split: Split) -> None:
    """Raise ``FileNotFoundError`` if a file or folder of a split does not exist."""
    kind = ("a JSON file", os.path.isfile) if file.panoptic else ("a folder of label maps", os.path.isdir)
    checks = {"labels": (split.labels, *kind), "masks": (split.masks, "a folder of masks", os.path.isdir)}
    for path in split.images:
        if not os.path.exists(path):
            raise _missing(file, split, "images", path, "a folder, list, tar file or image")
    for key, (path, what, is_there) in checks.items():
        if path and not is_there(path):
            raise _missing(file, split, key, path, what)


def _missing(file: DatasetFile, split: Split, key: str, path: str, what: str) -> FileNotFoundError:
    problem = "is not" if os.path.exists(path) else "does not exist; it must be"
    return file.not_found(f"splits.{split.name}.{key}", f"{path} {problem} {what}")


def find_images(file: DatasetFile, split: Split) -> list[dict]:
    """Find the images of a split that match the name rule.

    Returns:
        Dataset dicts of :func:`spar_d2.data.sources.find_photos`, with the additional entry "stem".

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read, or there are no images.
    """
    check_split(file, split)
    key, stem_of = f"splits.{split.name}.images", _stem_finder(file.image_name)
    records: dict[str, dict] = {}
    for source in split.images:
        try:
            found = find_photos(source)
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).removeprefix(KEY).removeprefix(":").strip()
            raise type(error)(str(file.error(key, reason))) from error
        for record in found:
            stem = stem_of(record["name"])
            if stem is not None:
                records.setdefault(record["file_name"], {**record, "stem": stem})
    if not records:
        raise file.error(key, f"no image matches image_name {file.image_name!r}")
    return [{**record, "image_id": index} for index, record in enumerate(records.values())]


def _stem_finder(rule: str) -> Callable[[str], str | None]:
    """Return a function from image names to stems by a name rule; it returns None for names that do not match."""
    if not rule:
        return lambda name: os.path.splitext(name)[0]
    before, after = (re.escape(part) for part in rule.split(STEM))
    # Folders before the name belong to the stem.
    pattern = re.compile(rf"(?P<folder>(?:.*/)?){before}(?P<stem>[^/]+){after}")

    def find(name: str) -> str | None:
        match = pattern.fullmatch(name)
        return match["folder"] + match["stem"] if match else None

    return find


def load_split(file: DatasetFile, name: str) -> list[dict]:
    """Load the dataset dicts of a split in Detectron2's format, for semantic segmentation or without labels.

    Raises:
        FileNotFoundError: a folder does not exist, or images have no label map.
        ValueError: images or labels cannot be used; the message names the file and the key.
    """
    split = file.splits[name]
    images = find_images(file, split)
    if not split.labels:
        return [_without_stem(record) for record in images]
    check_no_tar(file, split, images)
    pairs, missing = pair_labels(file, split, images)
    if missing:
        image, label = missing[0]
        problem = f"{len(missing)} of {len(images)} images have no label map, such as {image['file_name']}"
        rule = f"there is no {label} (label_name {file.label_name!r})"
        raise file.not_found(f"splits.{name}.labels", f"{problem}: {rule}")
    values = file.label_values()
    extra = {} if values is None else {VALUES: values}
    return [{**_without_stem(record), "sem_seg_file_name": label, **extra} for record, label in pairs]


def check_no_tar(file: DatasetFile, split: Split, images: Iterable[dict]) -> None:
    """Raise ``ValueError`` for images in tar files, which are supported without labels only."""
    tar = next((record["tar"] for record in images if "tar" in record), None)
    if tar is not None:
        key = f"splits.{split.name}.images"
        raise file.error(key, f"images with labels cannot be read from the tar file {tar}; unpack it, or remove labels")


def pair_labels(
    file: DatasetFile, split: Split, images: Iterable[dict]
) -> tuple[list[tuple[dict, str]], list[tuple[dict, str]]]:
    """Find the label maps of images.

    Args:
        file: data-set file.
        split: split with labels.
        images: result of :func:`find_images`.

    Returns:
        Pairs of image and label map; and images without a label map, with the path where it is expected.

    Raises:
        ValueError: two images have the same label map.
    """
    present = set(label_files(split))
    pairs, missing, owners = [], [], {}
    for record in images:
        # Labels of an image in a subfolder are in the same subfolder, or directly in the folder of labels.
        folder, stem = os.path.split(record["stem"])
        rule = file.label_name.replace(STEM, stem)
        names = dict.fromkeys((os.path.normpath(os.path.join(folder, rule)), rule))
        name = next((name for name in names if name in present), None)
        if name is None:
            missing.append((record, os.path.join(split.labels, next(iter(names)))))
            continue
        if name in owners:
            both = f"{owners[name]} and {record['file_name']} have the same label map {name}"
            raise file.error(f"splits.{split.name}.labels", both)
        owners[name] = record["file_name"]
        pairs.append((record, os.path.join(split.labels, name)))
    return pairs, missing


def label_files(split: Split) -> list[str]:
    """List all files in the folder of label maps, relative to it. Links to folders are followed once."""
    found, entered = [], set()
    for parent, folders, names in os.walk(split.labels, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        found += [os.path.relpath(os.path.join(parent, name), split.labels) for name in names]
    return sorted(found)


def _without_stem(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "stem"}


def read_panoptic_json(file: DatasetFile, split: Split) -> dict:
    """Read the panoptic JSON file of a split.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not in COCO's panoptic format.
    """
    check_split(file, split)
    try:
        content = json.loads(Path(split.labels).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise file.error(f"splits.{split.name}.labels", f"{split.labels} cannot be read as JSON: {error}") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        problem = f"{split.labels} is not in COCO's panoptic format: it must have the lists {', '.join(lists)}"
        raise file.error(f"splits.{split.name}.labels", problem)
    return content


def annotated_images(
    file: DatasetFile, split: Split, content: dict, images: Iterable[dict]
) -> tuple[list[tuple[dict, dict, str, str]], list[str]]:
    """Match the annotations of a panoptic JSON file with images and masks.

    Args:
        file: data-set file.
        split: split with panoptic labels.
        content: result of :func:`read_panoptic_json`.
        images: result of :func:`find_images`.

    Returns:
        For each complete annotation: its image entry, the annotation, and the paths of image and mask. And a line for
        each missing image or mask.

    Raises:
        ValueError: the content is not in COCO's panoptic format, or a mask is outside its folder.
    """
    key = f"splits.{split.name}.labels"
    by_name: dict[str, str] = {}
    for record in images:
        name, base = record["name"], os.path.basename(record["name"])
        for known in (name, base, record["stem"], os.path.basename(record["stem"])):
            by_name.setdefault(known, record["file_name"])
    masks = set(label_files(Split(split.name, split.images, split.masks)))
    matched, missing = [], []
    try:
        entries = {entry["id"]: entry for entry in content["images"]}
        for annotation in content["annotations"]:
            entry, mask = entries[annotation["image_id"]], annotation["file_name"]
            if PurePath(mask).is_absolute() or ".." in PurePath(mask).parts:
                raise file.error(key, f"the mask {mask} in {split.labels} must be in the folder of the masks")
            name = entry["file_name"]
            names = (name, os.path.basename(name), os.path.splitext(os.path.basename(name))[0])
            image = next((by_name[known] for known in names if known in by_name), None)
            if image is None:
                missing.append(f"the image {name} is not in {', '.join(split.images)}")
            elif os.path.normpath(mask) not in masks:
                missing.append(f"the mask {mask} is not in {split.masks}")
            else:
                matched.append((entry, annotation, image, os.path.join(split.masks, mask)))
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{split.labels} is not in COCO's panoptic format ({type(error).__name__}: {error})"
        raise file.error(key, problem) from error
    return matched, missing
