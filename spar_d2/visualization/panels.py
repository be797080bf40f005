"""Draws images in rows and columns, with titles and a legend."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from spar_d2.utils.io import atomic_write


def draw_panels(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    path: str | os.PathLike,
    legend: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write images side by side as a PNG.

    Args:
        rows: rows of images, each (H, W, 3), uint8 or float in 0..1. Sizes may differ.
        titles: title of each column.
        path: output file.
        legend: mapping from names to RGB colors in 0..255, shown below the images.

    Raises:
        ValueError: there are no rows, or a row and the titles differ in length.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"every row must have {len(titles)} images, got {[len(row) for row in rows]}")
    # Imported here, because commands that may draw later would start half a second later.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    # In inches. Columns have equal widths; the height of a row is that of its tallest image.
    width = 2.4
    heights = [max(picture.shape[0] / picture.shape[1] for picture in row) * width for row in rows]
    title_height = 0.1 + 0.2 * max(title.count("\n") + 1 for title in titles)
    legend_height = 0.32 * -(-len(legend) // 7) + 0.1 if legend else 0.0
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(width * len(titles), sum(heights) + title_height + legend_height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for number, (row, row_axes) in enumerate(zip(rows, axes)):
        for picture, axis, title in zip(row, row_axes, titles):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if number == 0:
                axis.set_title(title, fontsize=10)
    if legend:
        patches = [Patch(color=(r / 255, g / 255, b / 255), label=name) for name, (r, g, b) in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
