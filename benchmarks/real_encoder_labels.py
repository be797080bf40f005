"""Labels of CamVid frames by linear probes or by examples, from stored features, and their scores."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import yaml
from detectron2.layers import ShapeSpec
from PIL import Image

from benchmarks.real_encoder_features import CLASSES, Features
from spar_d2.data.images import read_rgb
from spar_d2.evaluation.confusion_matrix import boundary_confusion_matrix, confusion_matrix, segmentation_scores
from spar_d2.modeling.banded_upsampling import ScoreMap
from spar_d2.modeling.example_embeddings import class_vectors
from spar_d2.modeling.linear_probe import LinearProbe
from spar_d2.modeling.postprocessing import segment_scores
from spar_d2.modeling.refinement import EncodedImage, Refinement
from spar_d2.text import Vocabulary
from spar_d2.utils.content_cache import digest
from spar_d2.utils.io import write_text

STEPS, BATCH, RATE, WEIGHT_DECAY = 150, 4, 3e-2, 1e-4
EXAMPLES, CLUSTERS, LEAST_PIXELS = 5, 3, 200


class Scores:
    """Sums of the confusion matrices of labeled frames."""

    def __init__(self) -> None:
        shape = (len(CLASSES), len(CLASSES) + 1)
        self._confusion, self._boundary = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    @staticmethod
    def truth(file: Path) -> np.ndarray:
        """Read the label map (360, 480) of a frame."""
        return np.asarray(Image.open(_label_file(file)))

    def add(self, file: Path, labels: torch.Tensor) -> None:
        """Count the labels (360, 480) of a frame."""
        arguments = (labels.numpy(), self.truth(file), len(CLASSES))
        self._confusion += confusion_matrix(*arguments)
        self._boundary += boundary_confusion_matrix(*arguments)

    def of_all(self) -> tuple[float, float]:
        """Return mIoU and mean boundary IoU over the classes, in percent."""
        scores = segmentation_scores(self._confusion, CLASSES, self._boundary)
        return scores["mIoU"], float(np.nanmean([scores[f"BoundaryIoU-{name}"] for name in CLASSES]))


def train_and_label(
    features: Features, train: list[Path], test: list[Path], seed: int
) -> Iterator[tuple[Path, torch.Tensor]]:
    """Train a linear probe on the features of labeled frames; yield test frames with their labels (360, 480)."""
    torch.manual_seed(seed)
    maps, labels = [features(file) for file in train], [_resized(features, file) for file in train]
    shape = {"dense": ShapeSpec(len(maps[0]), stride=features.encoder.patch_size)}
    probe = cast(Any, LinearProbe)(input_shape=shape, num_classes=len(CLASSES), in_feature="dense", norm="BN").train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randperm(len(maps))[:BATCH].tolist()
        loss = probe.losses(probe.classify([maps[i] for i in batch]), [labels[i] for i in batch])["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    probe.eval()
    for file in test:
        with torch.inference_mode():
            logits = probe.classify([features(file)])[0].permute(1, 2, 0)
        yield file, _labels(features, file, logits)


def _label_file(file: Path) -> Path:
    return file.parents[2] / "labels" / file.parent.name / f"{file.stem}.png"


def _resized(features: Features, file: Path) -> torch.Tensor:
    height, width = features.size(file)
    return torch.tensor(np.asarray(Image.fromarray(Scores.truth(file)).resize((width, height), 0))).long()


def _labels(features: Features, file: Path, logits: torch.Tensor) -> torch.Tensor:
    size = Scores.truth(file).shape
    maps = [ScoreMap(logits.contiguous(), features.covered(file, size))]
    return segment_scores(maps, torch.arange(len(CLASSES)), size)


def label_by_examples(
    features: Features, train: list[Path], test: list[Path], path: Path, refinements: dict[str, Refinement]
) -> Iterator[tuple[str, Path, torch.Tensor]]:
    """Compute class vectors from a few labeled frames of each class; yield test frames with their labels.

    Args:
        features: features of the frames.
        train, test: frames.
        path: output file for the examples.
        refinements: refinements by name. Each gives labels of every test frame.
    """
    examples: list[list[dict]] = [[] for _ in CLASSES]
    for file in train:
        counts = np.bincount(Scores.truth(file).ravel(), minlength=256)
        for number, listed in enumerate(examples):
            if counts[number] >= LEAST_PIXELS and len(listed) < EXAMPLES:
                listed.append({"image": str(file.resolve()), "mask": str(_label_file(file).resolve()), "value": number})
    if missing := [name for name, listed in zip(CLASSES, examples) if not listed]:
        raise ValueError(f"--train-frames must be larger: no frame has {LEAST_PIXELS} pixels of {', '.join(missing)}")
    classes = [{"name": name, "examples": listed} for name, listed in zip(CLASSES, examples)]
    write_text(yaml.safe_dump({"classes": classes, "center": True, "clusters": CLUSTERS}, sort_keys=False), path)
    files = {digest(torch.from_numpy(read_rgb(file))): file for file in train}

    def encode(pixels: np.ndarray) -> tuple[torch.Tensor, tuple[float, float]]:
        file = files[digest(torch.from_numpy(pixels))]
        return features(file), features.covered(file, pixels.shape[:2])

    no_cache = cast(Any, SimpleNamespace(cache=None))  # all classes are defined by examples
    vectors = class_vectors(Vocabulary.load(str(path)), no_cache, encode, features.encoder)
    for file in test:
        size = Scores.truth(file).shape
        image = EncodedImage(features.encoder, functools.partial(features.pixels, file), features(file))
        for name, refinement in refinements.items():
            if refinement.at_pixels:
                yield name, file, refinement.pixel_scores(image, vectors, size, False).labels(1.0, 0.0, None)
                continue
            scores = ScoreMap(refinement.patch_scores(image, vectors, False), features.covered(file, size))
            yield name, file, segment_scores([scores], vectors.query_class, size)
