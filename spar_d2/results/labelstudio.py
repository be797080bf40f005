"""Tasks of Label Studio with predictions: brush masks or polygons."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import quoteattr

import numpy as np

from spar_d2.results.coco import MARK
from spar_d2.results.regions import Region, outermost_first, shown_names
from spar_d2.visualization import class_colors

KINDS = ("brush", "polygon")
_FROM, _TO = "label", "image"
# A brush mask is a stream of bits: the number of values (32 bits), the bits of a value minus 1 (5 bits), four sizes of
# a length in bits, each minus 1 (4 bits), and the runs. A run is 1 bit (1: a repeated value), the index of one of the
# four sizes (2 bits), its length minus 1, and the value. Here, all lengths have 16 bits.
_LENGTH_BITS, _VALUE_BITS = 16, 8
_LONGEST = 2**_LENGTH_BITS
# A pixel is four values: red, green, blue and alpha.
_CHANNELS, _INSIDE = 4, 255


def labelstudio_task(
    regions: Sequence[Region], image: str, size: tuple[int, int], kind: str = "brush", tolerance: float = 1.0
) -> dict:
    """Return a task with one prediction, for "Import" of Label Studio.

    Args:
        regions: regions of the image.
        image: address of the image as Label Studio sees it, such as "/data/local-files/?d=photos/a.jpg".
        size: (H, W) of the image.
        kind: "brush" for exact masks, or "polygon" for outer rings; the regions in a hole follow the region around it.
        tolerance: see :meth:`Region.rings <spar_d2.results.regions.Region.rings>`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    results = []
    for number, region in enumerate(outermost_first(regions)):
        if kind == "brush":
            value = {"format": "rle", "rle": brush_rle(region, size)}
        else:
            points = region.rings(tolerance)[0] * 100 / np.array(size[::-1])
            value = {"points": points.tolist(), "closed": True}
        results.append(
            {
                "id": f"region{number}",
                "type": f"{kind}labels",
                "from_name": _FROM,
                "to_name": _TO,
                "original_width": size[1],
                "original_height": size[0],
                "image_rotation": 0,
                "value": {**value, f"{kind}labels": [region.name]},
                **({} if region.score is None else {"score": region.score}),
            }
        )
    return {"predictions": [{"model_version": MARK, "result": results}], "data": {_TO: image}}


def labeling_interface(names: Sequence[str], kind: str = "brush") -> str:
    """Return the XML of a labeling interface for the tasks, with the colors of the classes."""
    tag = f"{kind.capitalize()}Labels"
    labels = [
        f'    <Label value={quoteattr(name)} background="#{bytes(color).hex()}"/>'
        for name, color in zip(shown_names(names), class_colors(names))
    ]
    image, opening = f'  <Image name="{_TO}" value="${_TO}"/>', f'  <{tag} name="{_FROM}" toName="{_TO}">'
    return "\n".join(["<View>", image, opening, *labels, f"  </{tag}>", "</View>"])


def brush_rle(region: Region, size: tuple[int, int]) -> list[int]:
    """Encode the mask of a region in an image of ``size`` (H, W) as bytes of Label Studio's brush format."""
    height, width = size
    x0, y0, x1, y1 = region.box
    # Row by row: lengths outside and inside the region, alternating, in pixels.
    edges = np.diff(np.pad(region.mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = ((rows + y0) * width + columns + x0 for rows, columns in (np.nonzero(edges == s) for s in (1, -1)))
    lengths = np.diff(np.c_[starts, ends].ravel(), prepend=0, append=height * width) * _CHANNELS
    values = np.resize([0, _INSIDE], len(lengths))
    values, lengths = values[lengths > 0], lengths[lengths > 0]
    # Longer runs are split.
    parts = -(-lengths // _LONGEST)
    split, values = np.full(parts.sum(), _LONGEST), np.repeat(values, parts)
    split[np.cumsum(parts) - 1] = lengths - (parts - 1) * _LONGEST
    header = [_bits([height * width * _CHANNELS], 32), _bits([_VALUE_BITS - 1], 5), _bits([_LENGTH_BITS - 1] * 4, 4)]
    first = _bits(np.full(len(split), 0b100), 3)
    runs = np.concatenate([first, _bits(split - 1, _LENGTH_BITS), _bits(values, _VALUE_BITS)], axis=1)
    return np.packbits(np.concatenate([part.ravel() for part in (*header, runs)])).tolist()


def _bits(values: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Return the lowest bits (n, count) uint8 of numbers, the highest bit first."""
    return (np.asarray(values, dtype=np.int64)[:, None] >> np.arange(count - 1, -1, -1) & 1).astype(np.uint8)
