import numpy as np
import pytest
from PIL import Image

from reference import reference_image
from spar_d2.data.images import read_rgb

PIXELS = reference_image(20, 30)
GREY = PIXELS[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_lossless_files_are_read_as_they_are(tmp_path, name):
    Image.fromarray(PIXELS).save(tmp_path / name, lossless=True)
    assert np.array_equal(read_rgb(tmp_path / name), PIXELS)


def test_grey_palette_and_cmyk(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert np.array_equal(read_rgb(tmp_path / "grey.png"), np.repeat(GREY[..., None], 3, 2))
    Image.fromarray(PIXELS).quantize(16).save(tmp_path / "palette.png")
    assert np.abs(read_rgb(tmp_path / "palette.png").astype(int) - PIXELS).mean() < 40
    Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_rgb(tmp_path / "cmyk.jpg").astype(int) - PIXELS).mean() < 20


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_rgb(tmp_path / "deep.png")[..., 0], GREY)


def test_transparent_pixels_are_laid_on_white(tmp_path):
    rgba = np.dstack([PIXELS, np.full((20, 30), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    read = read_rgb(tmp_path / "clear.png")
    assert (read[:10] == 255).all()
    assert np.array_equal(read[10:], PIXELS[10:])


def test_turned_images_are_read_upright(tmp_path):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(PIXELS, -1))


def test_damaged_and_missing_files_are_named(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        read_rgb(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_rgb(tmp_path / "none.png")
