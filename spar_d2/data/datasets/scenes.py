"""The synthetic (toy) data sets and folders of images as Detectron2 data sets."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spar_d2.data.sources import find_photos
from spar_d2.toy import scenes
from spar_d2.utils.environment import datasets_root
from spar_d2.utils.id_maps import as_colors
from spar_d2.utils.io import atomic_write

# Split names with (seed, number of images). "train" is used without labels; "tune" is for hyperparameters.
SCENE_SPLITS = {"train": (101, 60), "tune": (202, 40), "val": (303, 60)}
IGNORE_LABEL = 255
# Suffix of the panoptic masks, which are in COCO's format: id = R + 256 G + 65536 B.
SEGMENTS_ENDING = "_panoptic"


def register_scenes() -> None:
    """Register ``spar_scenes_{train,tune,val}``. Images are generated on first use."""
    # Imported here because importing detectron2 calls this function, possibly while this module is being imported.
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for split in SCENE_SPLITS:
        name = f"spar_scenes_{split}"
        DatasetCatalog.register(name, functools.partial(load_scenes, split))
        MetadataCatalog.get(name).set(
            stuff_classes=list(scenes.SCENE_CLASSES),
            stuff_colors=scenes.class_colors(),
            evaluator_type="sem_seg",
            ignore_label=IGNORE_LABEL,
        )


def register_photos(sources: str) -> str:
    """Register the images of ``SPAR.DATA.IMAGES``, see :func:`find_photos`, and return the data set's name.

    The images are searched on first use.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = f"spar_photos_{hashlib.sha256(sources.encode()).hexdigest()[:12]}"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, functools.partial(find_photos, sources))
        MetadataCatalog.get(name).set(sources=sources)
    return name


def load_scenes(split: str, root: str | os.PathLike | None = None) -> list[dict]:
    """Load the dataset dicts of the synthetic data set, in Detectron2's format for semantic segmentation.

    Args:
        split: one of ``SCENE_SPLITS``.
        root: root folder. Images are stored in a subfolder named after the version of the generator, and generated
            if they do not exist. Default: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        Dataset dicts with file_name, sem_seg_file_name, image_id, height, width.
    """
    folder = scenes_root(root) / split
    folder.mkdir(parents=True, exist_ok=True)
    seed, count = SCENE_SPLITS[split]
    records = []
    for index in tqdm(range(count), desc=f"scenes {split}", disable=None, leave=False):
        image, labels, segments = (folder / f"{index:04d}{ending}.png" for ending in ("", "_labels", SEGMENTS_ENDING))
        if not all(path.is_file() for path in (image, labels, segments)):
            scene = scenes.large_scene(seed, index)
            _write_png(as_colors(scene.segments()[0]), segments)
            _write_png(scene.labels, labels)
            _write_png(scene.image, image)
        with Image.open(image) as header:
            width, height = header.size
        record = {"file_name": str(image), "sem_seg_file_name": str(labels), "image_id": index}
        records.append({**record, "height": height, "width": width})
    return records


def scenes_root(root: str | os.PathLike | None = None) -> Path:
    """Folder of the synthetic data set, named after the version of the generator; ``root`` as :func:`load_scenes`."""
    version = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:8]
    return datasets_root(root) / f"spar_scenes_{version}"


def _write_png(pixels: np.ndarray, path: Path) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary)
