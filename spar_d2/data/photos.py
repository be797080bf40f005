"""Unlabeled images, read and augmented."""

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
    """Reads and augments photos; the result depends on its arguments and the sample index alone.

    Args:
        dicts: dataset dicts with "file_name", and "name" where a photo has one that outlives a move of the files.
        augmentations: applied in order.
        format: order of the channels, "RGB" or "BGR".
        seed: of the augmentation.
        frozen: augment a photo the same way every time, with any seed, instead of anew in every epoch.

    Attributes:
        look_up: what else belongs to an augmented image (3, H, W) uint8 in RGB, as entries of its dict; may be set
            until images are read.
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
        """The photo of that index, or the next one that can be decoded.

        Returns:
            Its dataset dict with "image", (3, H, W) uint8, augmented; "position", that of the sample; "damaged", the
            reason for each photo that was skipped, by its file name; and the entries that ``look_up`` adds.

        Raises:
            RuntimeError: no photo at all can be decoded.
        """
        record, image, damaged = self.read(sample_index.index)
        sample = transforms.AugInput(image)
        name = record.get("name", os.path.basename(record["file_name"]))
        # Of the photo alone, so that neither workers nor other photos change what becomes of it.
        place = (0, 0) if self.frozen else (self.seed, 1 + sample_index.epoch)
        with seeded_numpy(*place, zlib.crc32(os.fsencode(name))):
            self.augmentations(sample)
        assert sample.image is not None
        # (H, W, 3) -> (3, H, W)
        image = torch.from_numpy(np.ascontiguousarray(cast(np.ndarray, sample.image).transpose(2, 0, 1)))
        found = self.look_up(image.flip(0) if self.format == "BGR" else image) if self.look_up else {}
        return {**record, "image": image, "position": sample_index.position, "damaged": damaged, **found}

    def read(self, index: int) -> tuple[dict, np.ndarray, dict[str, str]]:
        """Dataset dict and pixels (H, W, 3) uint8 of a photo, or of the next that can be decoded, and what is wrong
        with those passed over; raises as :meth:`__getitem__`."""
        damaged = {}
        for step in range(len(self)):
            number = (index + step) % len(self)
            record = self.dicts[number]
            if number not in self._damaged:
                try:
                    image = read_photo(record)
                except (ValueError, FileNotFoundError) as error:
                    self._damaged[number] = str(error)
                else:
                    return record, np.ascontiguousarray(image[..., ::-1] if self.format == "BGR" else image), damaged
            damaged[record["file_name"]] = self._damaged[number]
        raise RuntimeError(
            f"SPAR.DATA.IMAGES: none of the {len(self)} photos can be decoded; {next(iter(damaged.values()))}"
        )


@contextlib.contextmanager
def seeded_numpy(*seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which Detectron2's augmentations draw from, and put it back afterwards."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
