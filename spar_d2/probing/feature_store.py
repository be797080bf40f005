"""On-disk features of labeled images, for training linear probes."""

from __future__ import annotations

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

from spar_d2.data.semantic_mapper import transformed_labels
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.teacher import DenseTeacher, TargetCache
from spar_d2.teacher.cache import target_file
from spar_d2.teacher.keys import encoder_key
from spar_d2.utils.content_cache import digest, read_tensors
from spar_d2.utils.io import signature, write_text
from spar_d2.utils.label_values import read_label_map

logger = logging.getLogger(__name__)

KEY = "SPAR.PROBE.CACHE_DIR"
# Key in dataset dicts: path of the image's features.
FILE = "features_file_name"


class FeatureSource(DenseTeacher):
    """The feature extractor of a probe, with the interface of a teacher, so that the target cache stores its features.

    Args:
        model: model with a frozen encoder.
    """

    def __init__(self, model: ProbeSegmentor) -> None:
        self.encoder = model.backbone.encoder
        sliding = model.inference == "sliding_window"
        # A window of 0 distinguishes single-pass features from those of any teacher.
        self.window, self.stride = model.windows[:2] if sliding else (0, 0)
        self._encode = model.dense_maps

    def identity(self) -> str:
        return encoder_key(self.encoder, self.window, self.stride)

    @torch.no_grad()
    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute features (1, D, h, w) of encoder inputs (3, H, W)."""
        return [self._encode(image[None]) for image in images]


class FeatureStore(TargetCache):
    """Target cache with an index from image files to feature files, so that images need not be read again.

    Args:
        folder: cache folder; created if it does not exist.
        source: feature extractor.
        reading: description of the image preprocessing.

    Raises:
        ValueError: ``folder`` is a file or cannot be created.
        RuntimeError: features cannot be written; existing ones are kept.
    """

    KEY = KEY

    def __init__(self, folder: str | os.PathLike, source: FeatureSource, reading: str) -> None:
        super().__init__(folder, source)
        self.source = source
        self._index_name = f"index_{digest(reading)[:16]}.json"
        self._index = self.load(self._index_name, lambda index: {str(k): str(v) for k, v in index.items()}) or {}

    def find(self, image_file: str) -> Path | None:
        """Return the feature file of an image in its current version, or None if there is none.

        Raises:
            FileNotFoundError: the image does not exist.
        """
        name = self._index.get(stamp(image_file))
        path = self.folder / name if name else None
        return path if path and path.is_file() else None

    def keep(self, image_file: str, image: torch.Tensor) -> None:
        """Encode an image and store its features, unless they exist.

        Args:
            image_file: file that the image was read from.
            image: encoder input (3, H, W).

        Raises:
            FloatingPointError: the features are NaN or infinite.
        """
        entry = self.entry(image)
        try:
            self.target(image, entry)
        except FloatingPointError as error:
            raise FloatingPointError(f"the features of {image_file} are NaN or infinite") from error
        self._index[stamp(image_file)] = target_file(entry.key)

    @property
    def index(self) -> dict[str, str]:
        """Mapping from image signatures (:func:`stamp`) to feature files in ``folder``."""
        return dict(self._index)

    def merge(self, index: Mapping[str, str]) -> None:
        """Add the index of another store of the same features."""
        self._index |= index

    def write_index(self) -> None:
        """Write the index to disk. Without it, images are read again, but not encoded again."""
        try:
            write_text(json.dumps(self._index), self.folder / self._index_name)
        except OSError as error:
            logger.warning("%s: the index cannot be written: %s", KEY, error)

    def stop_writing(self, reason: str) -> None:
        # Training requires the features of all images.
        raise RuntimeError(f"{KEY}: features cannot be written to {self.folder}: {reason}. Choose another folder")


class FeatureMapper:
    """Dataset mapper that maps a dataset dict with ``FILE`` to an input of :class:`ProbeSegmentor`.

    Args:
        cfg: config that defines the training size, which labels are resized to.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._resize = training_size(cfg)

    def __call__(self, record: Mapping) -> dict:
        """Return the record with "features" (D, h, w) float16 and "sem_seg" (H, W), uint8, or int64 for 16-bit labels.

        Raises:
            FileNotFoundError, ValueError: the label map does not exist or cannot be read.
            RuntimeError: as :func:`read_features`.
        """
        labels = read_label_map(record)
        labels = transformed_labels(self._resize.get_transform(labels), labels)
        loaded = {"features": read_features(record[FILE]), "sem_seg": torch.from_numpy(np.array(labels))}
        return {**record, **loaded}


def training_size(cfg: CfgNode) -> ResizeShortestEdge:
    """Return Detectron2's resizing of training images."""
    return build_augmentation(cfg, is_train=True)[0]


def read_features(path: str | os.PathLike) -> torch.Tensor:
    """Read features (D, h, w) that :class:`FeatureStore` wrote.

    Raises:
        RuntimeError: the file is corrupt or does not exist.
    """
    try:
        (stored,) = read_tensors(path).values()
    except (OSError, ValueError) as error:
        remedy = "delete it and restart with --resume to compute it again"
        raise RuntimeError(f"{KEY}: {path} cannot be read; {remedy}: {error}") from error
    return stored[0]


def stamp(file: str) -> str:
    """Return a file signature of path, size and modification time; raises ``FileNotFoundError`` if missing."""
    try:
        size, changed = signature(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the file {file} of the data set does not exist") from error
    return f"{os.path.abspath(file)} {size} {changed}"
