import numpy as np
import pytest
from PIL import Image

from reference import reference_image
from spar_d2.data.images import read_photo, read_rgb

PIXELS = reference_image(20, 30)
GRAY = PIXELS[..., 0]
DEEP = GRAY.astype(np.uint16) * 257


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_lossless_files_are_read_exactly(tmp_path, name):
    Image.fromarray(PIXELS).save(tmp_path / name, lossless=True)
    assert np.array_equal(read_rgb(tmp_path / name), PIXELS)


def test_gray_files_have_three_equal_channels(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    assert np.array_equal(read_rgb(tmp_path / "gray.png"), np.repeat(GRAY[..., None], 3, 2))
    Image.fromarray(GRAY > 100).save(tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as image:
        assert image.mode == "1"
    assert np.array_equal(read_rgb(tmp_path / "bits.png")[..., 1], np.where(GRAY > 100, 255, 0))


def test_palettes(tmp_path):
    indices = np.arange(600).reshape(20, 30) % 4
    colors = np.array([[200, 10, 20], [0, 90, 255], [7, 8, 9], [255, 255, 0]], np.uint8)
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_rgb(tmp_path / "palette.png"), colors[indices])
    image.save(tmp_path / "clear.png", transparency=2)
    colors[2] = 255
    assert np.array_equal(read_rgb(tmp_path / "clear.png"), colors[indices])


def test_cmyk_photos_keep_their_colors(tmp_path):
    red_and_blue = np.zeros((32, 32, 3), np.uint8)
    red_and_blue[:16], red_and_blue[16:] = (220, 30, 20), (10, 60, 230)
    Image.fromarray(red_and_blue).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_rgb(tmp_path / "cmyk.jpg").astype(int) - red_and_blue).max() < 12


def test_jpegs_are_read_approximately(tmp_path):
    smooth = np.asarray(Image.fromarray(PIXELS).resize((90, 60)))
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95, progressive=True)
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - smooth).mean() < 6


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    assert np.array_equal(read_rgb(tmp_path / "deep.png")[..., 0], GRAY)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_files_are_scaled_and_not_clipped(tmp_path, suffix):
    deep = np.array([[0, 127, 128, 257, 32768, 65278, 65279, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    assert read_rgb(tmp_path / f"deep.{suffix}")[0, :, 2].tolist() == [0, 0, 0, 1, 128, 254, 254, 255]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        # Older versions of Pillow read 16-bit PNG as this mode.
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([-5, 65536, 2**31 - 1], np.int32, [0, 0, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([-1, 100.4, 255], np.float32, [0, 100, 255]),
        ([0, 2570, 65535], np.float32, [0, 10, 255]),
    ],
)
def test_the_bit_depth_is_derived_from_the_values(tmp_path, values, kind, expected):
    image = Image.fromarray(np.array([values], kind))
    assert image.mode in ("I", "F")
    image.save(tmp_path / "deep.tif")
    for source in (image, tmp_path / "deep.tif"):
        assert read_rgb(source)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("value", [1e9, np.inf, np.nan])
def test_floats_that_are_no_colors_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=r"odd\.tif cannot be read: its pixel values .* at most 65535"):
        read_rgb(tmp_path / "odd.tif")


@pytest.mark.parametrize("name", ["clear.png", "clear.webp"])
def test_transparent_pixels_are_laid_on_white(tmp_path, name):
    rgba = np.dstack([PIXELS, np.full((20, 30), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / name, lossless=True)
    read = read_rgb(tmp_path / name)
    assert (read[:10] == 255).all()
    assert np.array_equal(read[10:], PIXELS[10:])


def test_half_transparent_gray_is_mixed_with_white(tmp_path):
    gray = np.dstack([np.full((4, 4), 55, np.uint8), np.full((4, 4), 102, np.uint8)])
    Image.fromarray(gray).save(tmp_path / "half.png")
    assert np.abs(read_rgb(tmp_path / "half.png").astype(int) - (0.4 * 55 + 0.6 * 255)).max() <= 1


@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
def test_a_transparent_color_is_white(tmp_path, kind):
    pixels = {"RGB": PIXELS, "L": GRAY, "I;16": DEEP}[kind]
    clear = tuple(pixels[3, 4].tolist()) if kind == "RGB" else int(pixels[3, 4])
    Image.fromarray(pixels).save(tmp_path / "clear.png", transparency=clear)
    expected = PIXELS.copy() if kind == "RGB" else np.repeat(GRAY[..., None], 3, 2)
    expected[(expected == expected[3, 4]).all(-1)] = 255
    assert np.array_equal(read_rgb(tmp_path / "clear.png"), expected)


@pytest.mark.parametrize("kind", ["RGB", "I;16", "RGBA"])
def test_turned_images_are_read_upright(tmp_path, kind):
    image = Image.fromarray(DEEP) if kind == "I;16" else Image.fromarray(PIXELS).convert(kind)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.repeat(GRAY[..., None], 3, 2) if kind == "I;16" else PIXELS
    assert np.array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(expected, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_photo(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - upright).max() < 10


def test_corrupt_exif_data_is_ignored(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0XX*\0\x08\0\0\0\x05")
    assert np.array_equal(read_rgb(tmp_path / "a.webp"), PIXELS)


def test_pil_images_are_not_changed():
    image = Image.fromarray(PIXELS)
    image.getexif()[0x0112] = 6
    assert np.array_equal(read_rgb(image), np.rot90(PIXELS, -1))
    assert np.array_equal(np.asarray(image), PIXELS)
    assert image.getexif()[0x0112] == 6


def test_damaged_and_missing_files_are_named(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        read_rgb(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_rgb(tmp_path / "none.png")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("options", [("a.jpg", {}), ("a.jpg", {"progressive": True}), ("a.webp", {}), ("a.png", {})])
def test_truncated_files_are_an_error(tmp_path, options, share):
    name, settings = options
    path = tmp_path / name
    Image.fromarray(reference_image(90, 120)).save(path, **settings)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"image: .*{name} cannot be read"):
        read_rgb(path)


@pytest.mark.parametrize("content", [b"", b"this is no photo\n" * 50, b"\xff\xd8\xff\xe0", b"<html>not found</html>"])
def test_files_that_are_no_images_are_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg .*not an image"):
        read_rgb(tmp_path / "a.jpg")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name an image file in it"):
        read_rgb(tmp_path)


@pytest.fixture
def packed(tmp_path) -> dict:
    """Dataset dict of a photo in the middle of a file."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "t.tar").write_bytes(b"x" * 700 + content + b"y" * 100)
    tar = str(tmp_path / "t.tar")
    return {"file_name": f"{tar}/a.png", "tar": tar, "offset": 700, "size": len(content)}


def test_photos_of_dataset_dicts(tmp_path, packed):
    assert np.array_equal(read_photo(packed), PIXELS)
    assert np.array_equal(read_photo({"file_name": str(tmp_path / "a.png")}), PIXELS)


def test_photos_of_dataset_dicts_that_cannot_be_read_are_named(packed):
    with pytest.raises(ValueError, match=r"t\.tar/a\.png .*not an image"):
        read_photo({**packed, "offset": 0})
    with pytest.raises(ValueError, match=r"t\.tar/a\.png .*truncated"):
        read_photo({**packed, "offset": 900})
    with pytest.raises(FileNotFoundError, match=r"gone\.tar of .*t\.tar/a\.png does not exist"):
        read_photo({**packed, "tar": "gone.tar"})
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        read_photo({"file_name": "gone.png"})


def test_files_that_may_not_be_read_are_named(packed, tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    for record in (packed, {"file_name": str(tmp_path / "a.png")}):
        with pytest.raises(ValueError, match=r"a\.png .*Permission denied"):
            read_photo(record)
