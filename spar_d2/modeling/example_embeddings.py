"""Class vectors of vocabularies: text embeddings, or means of dense features inside the regions of examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from spar_d2.data.images import read_rgb
from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.weights import source_checksum
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.teacher.keys import encoder_key
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.text.examples import Example, ExampleVocabulary
from spar_d2.utils.content_cache import digest
from spar_d2.utils.images import read_labels

# A cell of the feature grid belongs to an example if the region covers at least this fraction of it. If the region
# covers no cell that far, the cells that it covers most are used.
_COVERED = 0.5
_ITERATIONS = 50
# Tensors in a cache file.
_STORED = ("vectors", "classes", "center")

Encode = Callable[[np.ndarray], tuple[torch.Tensor, tuple[float, float]]]


class ClassVectors:
    """The vectors with which dense features are compared to find their class.

    Attributes:
        vectors: (Q, D) float32, of unit length; one or several for each class.
        query_class: (Q,) int64 class index of each vector, in ascending order.
        center: (D,) mean feature, which is subtracted from normalized dense features; None if they are not centered.
    """

    def __init__(self, vectors: torch.Tensor, query_class: torch.Tensor, center: torch.Tensor | None = None) -> None:
        self.vectors, self.query_class, self.center = vectors, query_class, center

    def to(self, device: torch.device | str) -> ClassVectors:
        """Return a copy on a device."""
        center = None if self.center is None else self.center.to(device)
        return ClassVectors(self.vectors.to(device), self.query_class.to(device), center)

    def centered(self, features: torch.Tensor) -> torch.Tensor:
        """Normalize features (D, h, w) and subtract the center. Without a center, features are returned unchanged."""
        return features if self.center is None else _centered(features, self.center)


def class_vectors(
    vocabulary: Vocabulary, text: TextEmbeddings, encode: Encode, encoder: DenseEncoder, settings: Sequence = ()
) -> ClassVectors:
    """Compute the vectors of all classes of a vocabulary. Vectors of examples are cached on disk beside those of words.

    Args:
        vocabulary: classes, defined by words or by examples.
        text: text embeddings; not used if all classes are defined only by examples.
        encode: function that encodes an RGB image (H, W, 3) uint8. It returns features (D, h, w), and the size (H', W')
            in image pixels of the area that the feature grid covers.
        encoder: encoder that ``encode`` uses.
        settings: other settings that the features depend on, which become part of the cache key.

    Raises:
        ValueError: an example cannot be read, a mask and its image differ in size, a point is outside of its image, or
            a region is empty.
    """
    if not isinstance(vocabulary, ExampleVocabulary) or not vocabulary.files:
        return ClassVectors(*text(vocabulary))
    found = name = None
    # In training, the vectors change with the weights, and every evaluation would add a file.
    if text.cache and not any(parameter.requires_grad for parameter in encoder.parameters()):
        files = [source_checksum(file) for examples in vocabulary.examples for e in examples for file in e.files]
        regions = [[(e.value, e.boxes, e.points) for e in examples] for examples in vocabulary.examples]
        content = [files, regions, vocabulary.clusters, vocabulary.center, encoder_key(encoder, *settings)]
        name = f"examples_{digest(json.dumps(content))[:32]}.safetensors"
        found = text.cache.load(name, lambda tensors: [tensors[key] for key in _STORED])
    if found is None:
        found = _from_examples(vocabulary, encode)
        if name and text.cache:
            text.cache.try_save(name, dict(zip(_STORED, found)))
    vectors, classes, center = found
    if any(vocabulary.words):
        text_vectors, text_classes = text(Vocabulary(vocabulary.words, names=vocabulary.names))
        # Both are sorted by class. Within a class, words come first.
        classes, order = torch.cat([text_classes, classes]).sort(stable=True)
        vectors = torch.cat([text_vectors, vectors])[order]
    return ClassVectors(vectors, classes, center if vocabulary.center else None)


def _from_examples(vocabulary: ExampleVocabulary, encode: Encode) -> list[torch.Tensor]:
    """Return vectors (Q, D) and class indices (Q,) of all examples, and the mean feature (D,), on the CPU."""
    maps = {file: _encoded(file, encode) for file in vocabulary.files}
    center = torch.cat([F.normalize(features.flatten(1), dim=0) for features, *_ in maps.values()], dim=1).mean(1)
    vectors, classes = [], []
    for number, examples in enumerate(vocabulary.examples):
        if examples:
            cells = [_cells(e, *maps[e.image], center if vocabulary.center else None) for e in examples]
            vectors.append(cluster_means(torch.cat(cells), vocabulary.clusters[number]).cpu())
            classes += [number] * len(vectors[-1])
    return [torch.cat(vectors), torch.tensor(classes), center.cpu()]


def needs_text(vocabulary: Vocabulary | None) -> bool:
    """Return whether a vocabulary needs a text tower."""
    if isinstance(vocabulary, ExampleVocabulary):
        return any(vocabulary.words)
    return vocabulary is not None


def encoder_pixels(encoder: DenseEncoder, pixels: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Convert an RGB image (H, W, 3) uint8 to encoder input (1, 3, H, W) on a device."""
    image = torch.tensor(pixels).to(device).permute(2, 0, 1)[None].float()
    return PixelConversion((0, 0, 0), (1, 1, 1), "RGB", encoder.pixel_mean, encoder.pixel_std).to(device)(image)


def cluster_means(cells: torch.Tensor, clusters: int) -> torch.Tensor:
    """Cluster unit vectors by spherical k-means, and return the normalized means.

    Args:
        cells: (n, D) vectors of unit length.
        clusters: number of clusters; fewer are returned if there are fewer distinct vectors.

    Returns:
        (k, D) means of unit length, k <= clusters.
    """
    # Deterministic start: the vector closest to the mean, then always the vector farthest from those already chosen.
    chosen = [int((cells @ cells.mean(0)).argmax())]
    nearest = cells @ cells[chosen[0]]
    while len(chosen) < min(clusters, len(cells)) and nearest.min() < 1 - 1e-6:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, cells @ cells[chosen[-1]])
    means, owners = cells[chosen], None
    for _ in range(_ITERATIONS):
        previous, owners = owners, (cells @ means.T).argmax(1)
        if previous is not None and torch.equal(previous, owners):
            break
        sums = torch.zeros_like(means).index_add_(0, owners, cells)
        # Keep the mean of a cluster that lost all its vectors.
        means = F.normalize(torch.where(sums.any(1, keepdim=True), sums, means), dim=1)
    return means


def _encoded(file: str, encode: Encode) -> tuple[torch.Tensor, tuple[float, float], tuple[int, int]]:
    """Return the features (D, h, w) of an image file, the size of the area that they cover, and the image size."""
    pixels = read_rgb(file)
    features, covered = encode(pixels)
    return features.float(), covered, (pixels.shape[0], pixels.shape[1])


def _cells(
    example: Example,
    features: torch.Tensor,
    covered: tuple[float, float],
    size: tuple[int, int],
    center: torch.Tensor | None,
) -> torch.Tensor:
    """Return the unit vectors (n, D) of the grid cells in the region of an example."""
    coverage = _coverage(example, features.shape[-2:], covered, size).to(features.device)
    chosen = coverage >= min(_COVERED, float(coverage.max()))
    features = F.normalize(features, dim=0) if center is None else _centered(features, center)
    return F.normalize(features[:, chosen].T, dim=1)


def _coverage(example: Example, grid: torch.Size, covered: tuple[float, float], size: tuple[int, int]) -> torch.Tensor:
    """Return the fraction (h, w) of each grid cell that the region of an example covers."""
    region = np.zeros(size, dtype=bool)
    if example.mask:
        values = read_labels(example.mask)
        if values.shape != size:
            shapes = "x".join(map(str, values.shape[::-1])), "x".join(map(str, size[::-1]))
            raise ValueError(f"examples: the mask {example.mask} is {shapes[0]}, but its image is {shapes[1]} pixels")
        region |= values != 0 if example.value is None else values == example.value
    for x0, y0, x1, y1 in example.boxes:
        region[max(round(y0), 0) : max(round(y1), 0), max(round(x0), 0) : max(round(x1), 0)] = True
    cell = covered[0] / grid[0], covered[1] / grid[1]
    coverage = _cell_means(torch.from_numpy(region).float(), grid, cell)
    for x, y in example.points:
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise ValueError(f"examples: the point ({x:g}, {y:g}) is outside of {example.image}, {size[1]}x{size[0]}")
        coverage[min(int(y / cell[0]), grid[0] - 1), min(int(x / cell[1]), grid[1] - 1)] = 1
    if not coverage.any():
        value = "all values except 0" if example.value is None else f"value {example.value}"
        region_name = f"{value} in {example.mask}" if example.mask else "boxes"
        raise ValueError(f"examples: the region of {example.image} is empty ({region_name})")
    return coverage


def _cell_means(region: torch.Tensor, grid: torch.Size, cell: tuple[float, float]) -> torch.Tensor:
    """Average a map (H, W) over grid cells, whose sides need not be whole pixels. Outside, the map counts as 0."""
    for axis, (cells, side) in enumerate(zip(grid, cell)):
        # Integral along the axis, sampled at the borders of the cells by linear interpolation.
        integral = F.pad(region.transpose(0, axis).cumsum(0, dtype=torch.float64), (0, 0, 1, 0))
        borders = (torch.arange(cells + 1, dtype=torch.float64) * side).clamp(max=len(integral) - 1)
        below = borders.long().clamp(max=len(integral) - 2)
        at = integral[below] + (borders - below)[:, None] * (integral[below + 1] - integral[below])
        region = ((at[1:] - at[:-1]) / side).transpose(0, axis)
    return region.float()


def _centered(features: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=0) - center.to(features.device)[:, None, None]
