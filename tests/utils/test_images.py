import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spar_d2.data.images import read_rgb
from spar_d2.utils import images as image_files
from spar_d2.utils.images import check_image_file, open_image, read_labels

LABELS = np.array([[0, 1, 2], [3, 200, 255]], dtype=np.uint8)
WIDE = np.array([[0, 1, 300], [65535, 200, 255]], dtype=np.uint16)


def with_palette(labels):
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([color for value in range(256) for color in ((value * 7) % 256, 255 - value, 50)])
    return image


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_numbers_of_a_palette_stay(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    with_palette(LABELS).save(path)
    labels = read_labels(path)
    assert labels.dtype == np.uint8 and np.array_equal(labels, LABELS)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_gray_labels(tmp_path, suffix):
    Image.fromarray(LABELS).save(tmp_path / f"labels{suffix}")
    assert np.array_equal(read_labels(tmp_path / f"labels{suffix}"), LABELS)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_stay(tmp_path, suffix):
    Image.fromarray(WIDE).save(tmp_path / f"labels{suffix}")
    labels = read_labels(tmp_path / f"labels{suffix}")
    assert labels.dtype == np.uint16 and np.array_equal(labels, WIDE)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_of_few_bits_is_refused(tmp_path, bits):
    """As it is read, 1 would be 85 or 17."""
    row = bytes([0, 0b00011011])
    with open(tmp_path / "labels.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        size = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
        for kind, content in ((b"IHDR", size), (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))
    with pytest.raises(ValueError, match=r"labels\.png .*8-bit or 16-bit gray, or have a palette"):
        read_labels(tmp_path / "labels.png")


def test_black_and_white_is_0_and_1(tmp_path):
    Image.fromarray(LABELS > 1).save(tmp_path / "labels.png")
    assert read_labels(tmp_path / "labels.png").tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
def test_more_than_one_number_per_pixel_is_refused(tmp_path, mode):
    Image.fromarray(LABELS).convert(mode).save(tmp_path / "labels.tif")
    with pytest.raises(ValueError, match=rf"labels\.tif must have one number per pixel .* mode is {mode}"):
        read_labels(tmp_path / "labels.tif")


@pytest.mark.parametrize("value", [-1, 65536])
def test_numbers_out_of_range_are_refused(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, dtype=np.int32)).save(tmp_path / "labels.tif")
    with pytest.raises(ValueError, match=r"must be in 0\.\.65535"):
        read_labels(tmp_path / "labels.tif")


def test_conversions_that_change_values_are_an_error(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "labels.jpg")
    with pytest.raises(ValueError, match=r"labels\.jpg .*not an image; it .*PNG"):
        read_labels(tmp_path / "labels.jpg")


def test_missing_and_damaged_label_maps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"label map: there is no file .*none\.png"):
        read_labels(tmp_path / "none.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        read_labels(tmp_path / "cut.png")


@pytest.mark.processes
@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(hello) print\n", b"%PDF-1.4", b"8BPS"]
)
def test_no_other_program_is_started_to_read_an_image(tmp_path, content, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for read in (read_rgb, check_image_file, read_labels):
        with pytest.raises(ValueError, match=r"photo\.jpg .*not an image"):
            read(path)


@pytest.mark.parametrize("limit", ["1e9", "0", "-5", "many"])
def test_a_limit_that_is_no_number_is_named(tmp_path, monkeypatch, limit):
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    monkeypatch.setenv("SPAR_MAX_PIXELS", limit)
    image_files._known.cache_clear()
    with pytest.raises(RuntimeError, match="SPAR_MAX_PIXELS must be a number of pixels"):
        read_rgb(tmp_path / "a.png")
    image_files._known.cache_clear()


def bomb(path, side):
    """A PNG whose header promises more pixels than there are."""
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    header = bytes(content[12:29])
    content[29:33] = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(content)


def test_too_many_pixels_name_the_file_and_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    bomb(path, 20_000)
    with pytest.raises(ValueError, match=r"large\.png cannot be read: .*exceeds limit.*SPAR_MAX_PIXELS"):
        read_rgb(path)
    monkeypatch.setenv("SPAR_MAX_PIXELS", str(20_000**2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    image_files._known.cache_clear()
    try:
        with open_image(path) as image:
            assert image.size == (20_000, 20_000)
    finally:
        image_files._known.cache_clear()
