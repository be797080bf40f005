"""Features of labeled images on disk, which a linear probe is trained on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import ResizeShortestEdge
from safetensors import SafetensorError, safe_open

from spar_d2.data.semantic_mapper import transformed_labels
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.teacher import TargetCache
from spar_d2.teacher.keys import tensor_checksum
from spar_d2.utils.images import read_labels
from spar_d2.utils.io import atomic_write, signature

logger = logging.getLogger(__name__)

KEY = "SPAR.PROBE.CACHE_DIR"
# In dataset dicts: where an image's features are.
FILE = "features_file_name"


class FeatureSource:
    """What a probe looks at, as the cache of targets knows teachers: an encoder and the way it is used.

    Args:
        model: its encoder is frozen.
    """

    def __init__(self, model: ProbeSegmentor) -> None:
        self.encoder = model.backbone.encoder
        sliding = model.inference == "sliding_window"
        # No teacher has a window of 0.
        self.window, self.stride = model.windows[:2] if sliding else (0, 0)
        self._encode = model.dense_maps

    @torch.no_grad()
    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features (1, D, h, w) of images (3, H, W), as the encoder takes them."""
        return [self._encode(image[None]) for image in images]


class FeatureStore(TargetCache):
    """A cache of targets that also remembers which image file has which of them, so that no image is read twice.

    Args:
        folder: of the cache; made if it is not there.
        source: whose features are kept.
        reading: how image files become images, as text.

    Raises:
        ValueError: ``folder`` is a file, or cannot be made.
        RuntimeError: features cannot be written; those that were are kept.
    """

    def __init__(self, folder: str | os.PathLike, source: FeatureSource, reading: str) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{KEY} must be a folder that can be made, got {folder}: {error}") from error
        super().__init__(folder, source)
        self._index_file = self.folder / f"index_{hashlib.sha256(reading.encode()).hexdigest()[:16]}.json"
        self._index = self._read_index()

    def find(self, image_file: str) -> Path | None:
        """The file with the features of an image file as it is now; None where there is none.

        Raises:
            FileNotFoundError: there is no such image.
        """
        name = self._index.get(stamp(image_file))
        path = self.folder / name if name else None
        return path if path and path.is_file() else None

    def keep(self, image_file: str, image: torch.Tensor) -> None:
        """Encode an image and keep its features, unless they are there.

        Args:
            image_file: what the image was read from.
            image: (3, H, W), as the encoder takes it.

        Raises:
            FloatingPointError: the features are NaN or infinite.
        """
        try:
            self.target(image)
        except FloatingPointError as error:
            raise FloatingPointError(f"the features of {image_file} are NaN or infinite") from error
        self._index[stamp(image_file)] = str(self.path(image).relative_to(self.folder))

    @property
    def index(self) -> dict[str, str]:
        """Which image (by its :func:`stamp`) has which file of features in ``folder``."""
        return dict(self._index)

    def merge(self, index: Mapping[str, str]) -> None:
        """Take over what another store of the same features remembers."""
        self._index |= index

    def write_index(self) -> None:
        """Remember it beyond this process; without, images are only read again, not encoded."""
        try:
            with atomic_write(self._index_file) as temporary:
                temporary.write_text(json.dumps(self._index), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._index_file, error)

    def _read_index(self) -> dict[str, str]:
        try:
            index = json.loads(self._index_file.read_text(encoding="utf-8"))
            return {str(image): str(name) for image, name in index.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("%s is damaged (%s); images are read again", self._index_file, error)
            return {}

    def _stop_writing(self, reason: str) -> None:
        # Without its features an image cannot be trained on.
        raise RuntimeError(f"{KEY}: features cannot be written to {self.folder}: {reason}. Choose another folder")


class FeatureMapper:
    """From a dataset dict with ``FILE`` to an input of :class:`ProbeSegmentor`; for Detectron2's loaders.

    Args:
        cfg: says the training size; nothing else is done to labels.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._resize = training_size(cfg)

    def __call__(self, record: Mapping) -> dict:
        """The record with "features" (D, h, w) float16 and "sem_seg" (H, W), uint8 or where they are larger int64.

        Raises:
            FileNotFoundError, ValueError: there is no label map that can be read.
            RuntimeError: as :func:`read_features`.
        """
        labels = read_labels(record["sem_seg_file_name"])
        labels = transformed_labels(self._resize.get_transform(labels), labels)
        loaded = {"features": read_features(record[FILE]), "sem_seg": torch.from_numpy(np.array(labels))}
        return {**record, **loaded}


def training_size(cfg: CfgNode) -> ResizeShortestEdge:
    """Detectron2's resizing of training images."""
    return build_augmentation(cfg, is_train=True)[0]


def read_features(path: str | os.PathLike) -> torch.Tensor:
    """(D, h, w), as :class:`FeatureStore` wrote them.

    Raises:
        RuntimeError: the file is damaged, or gone.
    """
    try:
        with safe_open(path, "pt") as file:
            (name,) = file.keys()
            stored, checksum = file.get_tensor(name), (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError, ValueError) as error:
        raise RuntimeError(f"{_again(path)}: {error}") from error
    if tensor_checksum(stored) != checksum:
        raise RuntimeError(f"{_again(path)}: its checksum is another")
    return stored[0]


def stamp(file: str) -> str:
    """Text that changes with a file, by its size and time; raises ``FileNotFoundError`` where there is none."""
    try:
        size, changed = signature(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the data set names the file {file}, which is not there") from error
    return f"{os.path.abspath(file)} {size} {changed}"


def _again(path: str | os.PathLike) -> str:
    return f"{KEY}: {path} cannot be read; remove it and start again with --resume, then it is computed anew"
