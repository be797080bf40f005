"""Unlabelled photos: finding them in a folder, reading and augmenting them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.data import transforms
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from spar_d2.data.images import DAMAGE, read_rgb

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def find_photos(folder: str | os.PathLike) -> list[dict]:
    """Dataset dicts of all images below a folder, sorted by path.

    Every file's header is read; files that are no images are left out and named in the log.

    Args:
        folder: searched through all its sub-folders for jpg, png and webp files.

    Returns:
        One {"file_name": str, "image_id": int} for each image.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image, or none that can be read.
    """
    key = "SPAR.DATA.IMAGES"
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{key}: there is no folder {folder}")
    paths = sorted(_walk(folder))
    if not paths:
        raise ValueError(f"{key}: the folder {folder} has no images ({', '.join(EXTENSIONS)})")
    readable = [path for path in tqdm(paths, desc="checking photos", disable=None, leave=False) if _is_image(path)]
    if len(readable) < len(paths):
        damaged = sorted(set(paths) - set(readable))
        shown = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        if not readable:
            raise ValueError(f"{key}: none of the {len(paths)} images in {folder} can be read ({shown})")
        logger.warning("Left out %d of %d images that cannot be read: %s", len(damaged), len(paths), shown)
    return [{"file_name": path, "image_id": index} for index, path in enumerate(readable)]


def _walk(folder: str | os.PathLike) -> Iterator[str]:
    """Paths of image files below a folder; links are followed, but no folder is entered twice."""
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (os.path.join(parent, name) for name in names if name.lower().endswith(EXTENSIONS))


def _is_image(path: str) -> bool:
    try:
        with Image.open(path):
            return True
    except DAMAGE:
        return False


class PhotoDataset(Dataset):
    """Reads and augments photos.

    A photo that turns out to be damaged when it is decoded is named in the log, and the next one takes its place.

    Args:
        dicts: dataset dicts with "file_name".
        augmentations: applied in order, drawn anew every time.
        format: order of the channels, "RGB" or "BGR".
    """

    def __init__(self, dicts: list[dict], augmentations: list[transforms.Augmentation], format: str) -> None:
        self.dicts = dicts
        self.augmentations = transforms.AugmentationList(augmentations)
        self.format = format
        self._skipped: set[str] = set()

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> dict:
        """The dataset dict with "image", (3, H, W) uint8, augmented; raises as :meth:`read`."""
        record, image = self.read(index)
        sample = transforms.AugInput(image)
        self.augmentations(sample)
        # (H, W, 3) -> (3, H, W)
        return {**record, "image": torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))}

    def read(self, index: int) -> tuple[dict, np.ndarray]:
        """Dataset dict and pixels (H, W, 3) uint8 of a photo, or of the next that can be decoded.

        Raises:
            RuntimeError: no photo at all can be decoded.
        """
        for step in range(len(self)):
            record = self.dicts[(index + step) % len(self)]
            try:
                image = read_rgb(record["file_name"])
            except (ValueError, FileNotFoundError) as error:
                if record["file_name"] not in self._skipped:
                    logger.warning("Skipped: %s", error)
                    self._skipped.add(record["file_name"])
                continue
            return record, np.ascontiguousarray(image[..., ::-1] if self.format == "BGR" else image)
        raise RuntimeError(f"SPAR.DATA.IMAGES: none of the {len(self)} photos can be decoded, see the warnings above")
