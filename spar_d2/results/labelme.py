"""JSON of labelme, with a polygon for each region."""

from __future__ import annotations

import os
from collections.abc import Iterable

from spar_d2.results.regions import Region, outermost_first

_VERSION = "5.0.0"


def labelme_content(regions: Iterable[Region], file_name: str, size: tuple[int, int], tolerance: float) -> dict:
    """Return the content of a labelme file.

    Polygons of labelme have no holes, so that only outer rings are written. The regions in a hole follow the region
    around it. Programs that fill polygons in order by pixel centers therefore get the label map back at ``tolerance``
    0, except where two regions cross at the corner of a pixel. labelme's own ``shapes_to_label`` also fills pixels that
    an outline only touches: 97 to 99.9 % of the pixels of its label map are the same.

    Args:
        regions: regions of the image.
        file_name: path of the image, relative to the labelme file.
        size: (H, W) of the image.
        tolerance: see :meth:`Region.rings <spar_d2.results.regions.Region.rings>`.
    """
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": [_shape(region, tolerance) for region in outermost_first(regions)],
        "imagePath": file_name.replace(os.sep, "/"),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def _shape(region: Region, tolerance: float) -> dict:
    score = "" if region.score is None else f"score {region.score:.3f}"
    return {
        "label": region.name,
        "points": region.rings(tolerance)[0].tolist(),
        "group_id": None,
        "description": score,
        "shape_type": "polygon",
        "flags": {},
    }
