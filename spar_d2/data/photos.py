"""Data set of unlabeled, augmented images."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from detectron2.data import transforms
from torch.utils.data import Dataset

from spar_d2.data.images import read_photo
from spar_d2.data.samplers import SampleIndex


class PhotoDataset(Dataset):
    """Reads and augments images. Each result depends only on the arguments and the sample index.

    Args:
        dicts: dataset dicts with "file_name", and optionally "name", a name that is independent of the file's location.
        augmentations: augmentations, applied in order.
        format: channel order, "RGB" or "BGR".
        seed: random seed of the augmentations.
        frozen: augment an image in the same way in every epoch, independent of the seed.

    Attributes:
        look_up: function that maps an augmented RGB image (3, H, W) uint8 to additional entries of its dict. Set it
            before images are read.
    """

    def __init__(
        self,
        dicts: Sequence[dict],
        augmentations: list[transforms.Augmentation],
        format: str,
        seed: int = 0,
        frozen: bool = False,
    ) -> None:
        self.dicts = dicts
        self.augmentations = transforms.AugmentationList(augmentations)
        self.format = format
        self.seed = seed
        self.frozen = frozen
        self.look_up: Callable[[torch.Tensor], dict] | None = None
        self._damaged: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, sample_index: SampleIndex) -> dict:
        """Return the image at an index, or the next one that can be decoded.

        Returns:
            The dataset dict with "image", the augmented image (3, H, W) uint8; "position", the position of the sample;
            "damaged", the reason for each skipped image, by file name; and the entries that ``look_up`` returns.

        Raises:
            RuntimeError: none of the images can be decoded.
        """
        record, image, damaged = self.read(sample_index.index)
        sample = transforms.AugInput(image)
        name = record.get("name", os.path.basename(record["file_name"]))
        # Seeded by the image itself, so that workers and other images do not affect its augmentation.
        epoch_seed = (0, 0) if self.frozen else (self.seed, 1 + sample_index.epoch)
        with seeded_numpy(*epoch_seed, zlib.crc32(os.fsencode(name))):
            self.augmentations(sample)
        assert sample.image is not None
        # (H, W, 3) -> (3, H, W)
        image = torch.from_numpy(np.ascontiguousarray(cast(np.ndarray, sample.image).transpose(2, 0, 1)))
        extra = self.look_up(image.flip(0) if self.format == "BGR" else image) if self.look_up else {}
        return {**record, "image": image, "position": sample_index.position, "damaged": damaged, **extra}

    def read(self, index: int) -> tuple[dict, np.ndarray, dict[str, str]]:
        """Read an image, or the next one that can be decoded.

        Returns:
            The dataset dict, the pixels (H, W, 3) uint8, and the reason for each skipped image, by file name.

        Raises:
            RuntimeError: none of the images can be decoded.
        """
        damaged = {}
        for step in range(len(self)):
            position = (index + step) % len(self)
            record = self.dicts[position]
            if position not in self._damaged:
                try:
                    image = read_photo(record)
                except (ValueError, FileNotFoundError) as error:
                    self._damaged[position] = str(error)
                else:
                    return record, np.ascontiguousarray(image[..., ::-1] if self.format == "BGR" else image), damaged
            damaged[record["file_name"]] = self._damaged[position]
        raise RuntimeError(
            f"SPAR.DATA.IMAGES: none of the {len(self)} images can be decoded; {next(iter(damaged.values()))}"
        )


@contextlib.contextmanager
def seeded_numpy(*seed: int) -> Iterator[None]:
    """Temporarily seed NumPy's global generator, which Detectron2's augmentations use."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
