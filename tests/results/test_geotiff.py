"""Georeferenced label maps, read back by rasterio and GDAL."""

import sys

import numpy as np
import pytest

import spar_d2
from reference import ROOT, reference_image
from spar_d2.results import Segmentation
from spar_d2.results.geotiff import segment_raster
from spar_d2.visualization import class_colors

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
from rasterio import shutil, windows  # noqa: E402
from rasterio.transform import Affine  # noqa: E402

MODEL = (str(ROOT / "configs/toy/tiny_clip.json"), str(ROOT / "configs/toy/tiny_clip.safetensors"))
# Rotated, so that no part of the transform can be lost unnoticed.
TRANSFORM = Affine.translation(500_000, 5_000_000) @ Affine.rotation(10) @ Affine.scale(0.5, -0.25)
NAMES = ["grass & co", "star", "été"]


def write_raster(path, pixels: np.ndarray, **options):
    bands = pixels.transpose(2, 0, 1)
    profile = {"driver": "GTiff", "height": pixels.shape[0], "width": pixels.shape[1], "count": len(bands)}
    profile |= {"dtype": pixels.dtype, "crs": "EPSG:32633", "transform": TRANSFORM, **options}
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(bands)
    return path


@pytest.fixture
def source(tmp_path):
    return write_raster(tmp_path / "source.tif", reference_image(70, 110))


def brightness(pixels: np.ndarray) -> np.ndarray:
    """A segmentation that looks at single pixels only."""
    return (pixels.astype(np.int64).sum(2) // 256).clip(0, 2)


def test_labels_keep_the_georeference(source, tmp_path):
    labels = brightness(reference_image(70, 110))
    path = tmp_path / "new" / "labels.tif"
    Segmentation.of(labels, NAMES).to_geotiff(source, path)
    with rasterio.open(path) as written:
        assert written.crs == "EPSG:32633" and written.transform.almost_equals(TRANSFORM)
        assert (written.count, written.dtypes[0], written.nodata) == (1, "uint8", 255)
        assert np.array_equal(written.read(1), labels)
        colors = written.colormap(1)
        assert [colors[number] for number in range(3)] == [(*color, 255) for color in class_colors(NAMES)]
    # GDAL copies the names of categories to its text format.
    shutil.copy(path, tmp_path / "labels.vrt", driver="VRT")
    text = (tmp_path / "labels.vrt").read_text(encoding="utf-8")
    names = ["grass &amp; co", "star", "été"]
    assert [f"<Category>{name}</Category>" in text for name in names] == [True] * 3
    assert sorted(file.name for file in path.parent.iterdir()) == ["labels.tif", "labels.tif.aux.xml"]


def test_more_classes_than_a_byte_holds(source, tmp_path):
    labels = (np.arange(70 * 110) % 300).reshape(70, 110)
    Segmentation.of(labels, [f"class {number}" for number in range(300)]).to_geotiff(source, tmp_path / "labels.tif")
    with rasterio.open(tmp_path / "labels.tif") as written:
        assert (written.dtypes[0], written.nodata) == ("uint16", 65535)
        assert np.array_equal(written.read(1), labels)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (32, 8), (40, 15), (64, 16), (1024, 128), (7, 2)])
def test_tiles_cover_every_pixel_once(source, tmp_path, tile, overlap):
    sizes = []

    def segment(pixels):
        sizes.append(pixels.shape[:2])
        return brightness(pixels)

    segment_raster(segment, NAMES, source, tmp_path / "labels.tif", tile=tile, overlap=overlap)
    with rasterio.open(tmp_path / "labels.tif") as written:
        assert np.array_equal(written.read(1), brightness(reference_image(70, 110)))
    assert set(sizes) == {(min(tile, 70), min(tile, 110))}, "tiles at an edge are as large as others"


def test_the_margin_of_a_tile_is_not_used(source, tmp_path):
    def segment(pixels):
        labels = np.zeros(pixels.shape[:2], dtype=np.int64)
        labels[8:-8, 8:-8] = 1
        return labels

    segment_raster(segment, NAMES, source, tmp_path / "labels.tif", tile=40, overlap=8)
    with rasterio.open(tmp_path / "labels.tif") as written:
        labels = written.read(1)
    assert labels[8:-8, 8:-8].all(), "only the edges of the raster are in the margin of their tile"


def test_pixels_without_data_have_no_label(tmp_path):
    pixels = reference_image(64, 64).clip(1)
    pixels[:, :40] = 0
    source = write_raster(tmp_path / "source.tif", pixels, nodata=0)
    calls = []

    def segment(tile):
        calls.append(tile.shape)
        return np.ones(tile.shape[:2], dtype=np.int64)

    segment_raster(segment, NAMES, source, tmp_path / "labels.tif", tile=32, overlap=0)
    with rasterio.open(tmp_path / "labels.tif") as written:
        assert (written.read(1)[:, :40] == 255).all() and (written.read(1)[:, 40:] == 1).all()
    assert len(calls) == 2, "tiles without data are skipped"


def test_values_of_other_types_are_scaled(tmp_path):
    source = write_raster(tmp_path / "deep.tif", np.linspace(0, 4000, 32 * 32 * 4).reshape(32, 32, 4).astype(np.uint16))
    with rasterio.open(source) as raster:
        values = raster.read([3, 2, 1]).transpose(1, 2, 0).astype(float)
    seen = []

    def segment(pixels):
        seen.append(pixels)
        return brightness(pixels)

    with pytest.raises(ValueError, match=r"value_range must be .* the raster is uint16; got None"):
        segment_raster(segment, NAMES, source, tmp_path / "labels.tif")
    segment_raster(segment, NAMES, source, tmp_path / "labels.tif", bands=(3, 2, 1), value_range=(1000, 3000))
    assert np.abs(seen[0] - ((values - 1000) / 2000 * 255).clip(0, 255)).max() <= 0.501
    assert not list(tmp_path.glob(".*")), "nothing half-written remains"


def test_a_predictor_segments_a_raster_like_its_image(tmp_path):
    image = reference_image(96, 160)
    source = write_raster(tmp_path / "source.tif", image)
    predictor = spar_d2.Predictor(*MODEL, templates="simple", device="cpu")
    words = "grass; star; water"
    predictor.segment_raster(source, tmp_path / "whole.tif", words)
    predictor.segment_raster(source, tmp_path / "tiles.tif", words, tile=96, overlap=24)
    expected = predictor(image, words).labels
    with rasterio.open(tmp_path / "whole.tif") as whole, rasterio.open(tmp_path / "tiles.tif") as tiles:
        assert np.array_equal(whole.read(1), expected)
        assert (tiles.read(1) == expected).mean() > 0.8
    with pytest.raises(ValueError, match="inference must be one of"):
        predictor.segment_raster(source, tmp_path / "bad.tif", words, inference="none")
    assert not (tmp_path / "bad.tif").exists()


def test_rasters_larger_than_memory_are_read_in_windows(tmp_path):
    """A raster of 0.3 GB that takes a few kilobytes on disk."""
    options = {"width": 12_000, "height": 8_000, "count": 3, "dtype": "uint8", "sparse_ok": True, "tiled": True}
    path = tmp_path / "large.tif"
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", transform=TRANSFORM, nodata=0, **options) as raster:
        window = windows.Window(8_000, 5_000, 512, 512)
        raster.write(np.full((3, 512, 512), 200, dtype=np.uint8), window=window)
    calls = []

    def segment(tile):
        calls.append(tile.shape)
        return np.ones(tile.shape[:2], dtype=np.int64)

    segment_raster(segment, NAMES, path, tmp_path / "labels.tif", tile=2304, overlap=128)
    with rasterio.open(tmp_path / "labels.tif") as written:
        assert (written.read(1, window=window) == 1).all()
        assert (written.read(1, window=windows.Window(7_900, 5_000, 100, 100)) == 255).all()
    assert len(calls) < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 10, "overlap": 5}, "overlap in 0..4, got 10, 5"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"bands": (1, 2, 4)}, r"bands must be three numbers in 1..3, .* got \(1, 2, 4\)"),
        ({"bands": (1,)}, "bands must be three numbers"),
        ({"value_range": (2, 1)}, "low < high, got"),
    ],
)
def test_wrong_arguments_are_named(source, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        segment_raster(brightness, NAMES, source, tmp_path / "labels.tif", **change)
    assert not (tmp_path / "labels.tif").exists()


def test_other_sources_are_refused(source, tmp_path):
    result = Segmentation.of(np.zeros((8, 9), dtype=np.int64), NAMES)
    with pytest.raises(ValueError, match="the labels have 9x8, but .*source.tif has 110x70 pixels"):
        result.to_geotiff(source, tmp_path / "labels.tif")
    with pytest.raises(FileNotFoundError, match="source: there is no raster"):
        result.to_geotiff(tmp_path / "none.tif", tmp_path / "labels.tif")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ValueError, match=r"text\.tif cannot be read as a raster"):
        result.to_geotiff(tmp_path / "text.tif", tmp_path / "labels.tif")
    plain = write_raster(tmp_path / "plain.tif", reference_image(8, 9), crs=None, transform=None)
    with pytest.raises(ValueError, match=r"plain\.tif must have a CRS and a transform"):
        result.to_geotiff(plain, tmp_path / "labels.tif")
    # A virtual raster names other files.
    shutil.copy(source, tmp_path / "virtual.vrt", driver="VRT")
    with pytest.raises(ValueError, match=r"virtual\.vrt cannot be read as a raster"):
        result.to_geotiff(tmp_path / "virtual.vrt", tmp_path / "labels.tif")


def test_a_missing_rasterio_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio.windows", None)
    with pytest.raises(RuntimeError, match=r'pip install "spar_d2\[geo\]"'):
        Segmentation.of(np.zeros((70, 110), dtype=np.int64), NAMES).to_geotiff(source, tmp_path / "labels.tif")
