"""Detections of supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spar_d2.results.regions import Region

if TYPE_CHECKING:
    import supervision


def supervision_detections(regions: Sequence[Region], size: tuple[int, int]) -> supervision.Detections:
    """Convert regions of an image of ``size`` (H, W) to detections with masks (n, H, W), class ids and names.

    Raises:
        RuntimeError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise RuntimeError("to_supervision requires supervision; run: pip install supervision") from error
    masks = np.zeros((len(regions), *size), dtype=bool)
    for mask, region in zip(masks, regions):
        x0, y0, x1, y1 = region.box
        mask[y0:y1, x0:x1] = region.mask
    scored = bool(regions) and regions[0].score is not None
    return supervision.Detections(
        xyxy=np.array([region.box for region in regions], dtype=np.float32).reshape(-1, 4),
        mask=masks,
        confidence=np.array([region.score for region in regions], dtype=np.float32) if scored else None,
        class_id=np.array([region.number for region in regions], dtype=int),
        data={"class_name": np.array([region.name for region in regions], dtype=str)},
    )
