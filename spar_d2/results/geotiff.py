"""Georeferenced label maps (GeoTIFF) of rasters, which may be larger than the memory. Needs rasterio."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np

from spar_d2.data.images import read_rgb
from spar_d2.utils.images import largest_image
from spar_d2.utils.io import atomic_write, write_text
from spar_d2.visualization import class_colors

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

# Others may open further files and addresses that a raster names.
_DRIVERS = ("GTiff", "JP2OpenJPEG", "PNG", "JPEG")
# Bands of red, green and blue.
_COLORS = (1, 2, 3)
_BLOCK = 256
_ROWS = 1024


def write_geotiff(labels: np.ndarray, names: Sequence[str], source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Write the label map of a raster as a GeoTIFF with the CRS and transform of the raster.

    The file has one band, uint8 or, with more than 255 classes, uint16, with the colors of the classes. Their names are
    in "PATH.aux.xml", where GDAL and QGIS read them. Pixels that are invalid in the raster have no data (the largest
    value of the type).

    Args:
        labels: (H, W) class indices.
        names: names of all classes.
        source: the raster, GeoTIFF, JPEG 2000, or PNG or JPEG with a world file.
        path: output file.

    Raises:
        FileNotFoundError: the raster does not exist.
        ValueError: the raster cannot be read, has another size, or is not georeferenced.
        RuntimeError: rasterio is not installed.
    """
    with _opened(source) as raster:
        if labels.shape != (raster.height, raster.width):
            sizes = f"{labels.shape[1]}x{labels.shape[0]}, but {source} has {raster.width}x{raster.height}"
            raise ValueError(f"source must be the raster that was segmented: the labels have {sizes} pixels")
        windows = _cells(raster, raster.width, _ROWS)
        _write(raster, names, path, ((window, labels[window.toslices()]) for window in windows))


def segment_raster(
    segment: Callable[[np.ndarray], np.ndarray],
    names: Sequence[str],
    source: str | os.PathLike,
    path: str | os.PathLike,
    bands: Sequence[int] = (1, 2, 3),
    value_range: tuple[float, float] | None = None,
    tile: int = 1024,
    overlap: int = 128,
) -> None:
    """Segment a raster in overlapping tiles, and write the labels as :func:`write_geotiff` does.

    Only one tile is in memory. The margin of a tile, except at the edges of the raster, gives context and is not
    written. Tiles without valid pixels are skipped.

    Args:
        segment: function from an RGB image (H, W, 3) uint8 to its labels (H, W).
        names: names of all classes.
        source: the raster.
        path: output file.
        bands: numbers of the red, green and blue band, from 1 on; they may be equal.
        value_range: values of the raster that become 0 and 255. None leaves uint8 as it is; other types need it.
        tile: side of a tile in pixels.
        overlap: margin on each side of a tile in pixels, less than half of it.

    Raises:
        FileNotFoundError: the raster does not exist.
        ValueError: an argument is invalid, or the raster cannot be read or is not georeferenced.
        RuntimeError: rasterio is not installed.
    """
    if tile < 1 or not 0 <= overlap < tile / 2:
        raise ValueError(f"tile must be at least 1 and overlap in 0..{max(0, (tile - 1) // 2)}, got {tile}, {overlap}")
    with _opened(source) as raster:
        _check_bands(raster, bands, value_range)

        def blocks() -> Iterator[tuple[Window, np.ndarray]]:
            for window in _cells(raster, tile - 2 * overlap, tile - 2 * overlap):
                around = _around(raster, window, tile, overlap)
                if raster.dataset_mask(window=window).any():
                    labels = segment(_pixels(raster, around, bands, value_range))
                    top, left = window.row_off - around.row_off, window.col_off - around.col_off
                    yield window, labels[top : top + window.height, left : left + window.width]

        _write(raster, names, path, blocks())


def read_colors(source: str | os.PathLike) -> np.ndarray:
    """Read a whole raster as RGB (H, W, 3) uint8: bands 1 to 3, as :func:`segment_raster` does, or gray or a palette.

    Raises:
        FileNotFoundError: the raster does not exist.
        ValueError: the raster cannot be read, is not georeferenced, is too large, or needs a range of values.
        RuntimeError: rasterio is not installed.
    """
    with _opened(source) as raster:
        advice = 'segment it with spar_d2.Predictor.segment_raster("map.tif", "labels.tif", ...)'
        if raster.width * raster.height > largest_image():
            raise ValueError(f"source: {source} has {raster.width}x{raster.height} pixels, too many at once; {advice}")
        types = {raster.dtypes[band - 1] for band in _COLORS if band <= raster.count}
        if types != {"uint8"}:
            raise ValueError(
                f"source: {source} must be uint8, got {', '.join(sorted(types))}; {advice} and value_range"
            )
        if raster.count >= len(_COLORS):
            return _pixels(raster, require_rasterio().windows.Window(0, 0, raster.width, raster.height), _COLORS, None)
    return read_rgb(source)


def require_rasterio() -> ModuleType:
    """Import rasterio. Raises ``RuntimeError`` if it is not installed."""
    try:
        import rasterio.windows
    except ImportError as error:
        raise RuntimeError('georeferenced results require rasterio; run: pip install "spar_d2[geo]"') from error
    return rasterio


@contextlib.contextmanager
def _opened(source: str | os.PathLike) -> Iterator[DatasetReader]:
    rasterio = require_rasterio()
    if not os.path.isfile(source):
        raise FileNotFoundError(f"source: there is no raster {source}")
    raster = None
    for driver in _DRIVERS:
        with contextlib.suppress(rasterio.errors.RasterioIOError), warnings.catch_warnings():
            # Reported as an error below.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            raster = rasterio.open(source, driver=driver)
            break
    if raster is None:
        raise ValueError(
            f"source: {source} cannot be read as a raster: it is corrupt, or none of {', '.join(_DRIVERS)}"
        )
    with raster:
        if raster.crs is None or raster.transform.is_identity:
            raise ValueError(f"source: {source} must have a CRS and a transform, got a raster without georeference")
        try:
            yield raster
        except rasterio.errors.RasterioIOError as error:
            raise ValueError(f"source: {source} cannot be read as a raster: {error}") from error


def _check_bands(raster: DatasetReader, bands: Sequence[int], value_range: tuple[float, float] | None) -> None:
    if len(bands) != 3 or not all(band in raster.indexes for band in bands):
        raise ValueError(f"bands must be three numbers in 1..{raster.count}, red, green and blue; got {tuple(bands)}")
    types = {raster.dtypes[band - 1] for band in bands}
    if value_range is None and types != {"uint8"}:
        raise ValueError(
            f"value_range must be the values (low, high) that become 0 and 255, because the raster is "
            f"{', '.join(sorted(types))}; got None"
        )
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")


def _cells(raster: DatasetReader, width: int, height: int) -> Iterator[Window]:
    """Yield windows that cover a raster without overlap, at most (height, width)."""
    windows = require_rasterio().windows
    for top in range(0, raster.height, height):
        for left in range(0, raster.width, width):
            yield windows.Window(left, top, min(width, raster.width - left), min(height, raster.height - top))


def _around(raster: DatasetReader, window: Window, tile: int, overlap: int) -> Window:
    """Return the tile around a window, which is as large as others where it is moved away from an edge."""
    width, height = min(tile, raster.width), min(tile, raster.height)
    left = min(max(window.col_off - overlap, 0), raster.width - width)
    top = min(max(window.row_off - overlap, 0), raster.height - height)
    return require_rasterio().windows.Window(left, top, width, height)


def _pixels(
    raster: DatasetReader, window: Window, bands: Sequence[int], value_range: tuple[float, float] | None
) -> np.ndarray:
    """Read an RGB image (H, W, 3) uint8."""
    values = raster.read(list(bands), window=window)
    if value_range is not None:
        low, high = value_range
        values = (values.astype(np.float32) - low) * (255 / (high - low))
        values = np.nan_to_num(values, nan=0.0).clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def _write(
    raster: DatasetReader,
    names: Sequence[str],
    path: str | os.PathLike,
    blocks: Iterable[tuple[Window, np.ndarray]],
) -> None:
    """Write blocks of labels; other pixels have no data."""
    rasterio, dtype = require_rasterio(), np.uint8 if len(names) < 256 else np.uint16
    nodata = int(np.iinfo(dtype).max)
    if len(names) > nodata:
        raise ValueError(f"a GeoTIFF of labels holds at most {nodata} classes, got {len(names)}")
    options = {"driver": "GTiff", "count": 1, "width": raster.width, "height": raster.height, "crs": raster.crs}
    options |= {"transform": raster.transform, "dtype": dtype, "nodata": nodata, "compress": "deflate"}
    options |= {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "BIGTIFF": "IF_SAFER"}
    with atomic_write(path) as temporary, rasterio.open(temporary, "w", **options) as output:
        output.write_colormap(1, {index: (*color, 255) for index, color in enumerate(class_colors(names))})
        for window, labels in blocks:
            valid = raster.dataset_mask(window=window) > 0
            output.write(np.where(valid, labels, nodata).astype(dtype), 1, window=window)
    listed = "".join(f"      <Category>{escape(name)}</Category>\n" for name in names)
    band = f'  <PAMRasterBand band="1">\n    <CategoryNames>\n{listed}    </CategoryNames>\n  </PAMRasterBand>\n'
    write_text(f"<PAMDataset>\n{band}</PAMDataset>\n", f"{os.fspath(path)}.aux.xml")
