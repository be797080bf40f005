import logging

import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image

from reference import reference_image
from spar_d2.data.augmentation import CropToMultiple, build_augmentations
from spar_d2.data.photos import PhotoDataset, find_photos


def test_finds_nested_photos_of_any_spelling(photo_folder):
    (photo_folder / "notes.txt").write_text("no photo")
    assert [r["file_name"].rsplit("/", 1)[1] for r in find_photos(photo_folder)] == ["a.jpg", "b.JPG", "c.jpeg"]


def test_files_that_are_no_images_are_left_out_and_named(photo_folder, caplog):
    (photo_folder / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    with caplog.at_level(logging.WARNING):
        assert len(find_photos(photo_folder)) == 3
    assert "1 of 4" in caplog.text
    assert "broken.jpg" in caplog.text


def test_folders_that_link_to_themselves_are_entered_once(photo_folder):
    (photo_folder / "more" / "loop").symlink_to(photo_folder)
    assert len(find_photos(photo_folder)) == 3


def test_missing_empty_and_ruined_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SPAR\.DATA\.IMAGES: there is no folder"):
        find_photos(tmp_path / "none")
    with pytest.raises(ValueError, match="has no images"):
        find_photos(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 images.*a\.jpg"):
        find_photos(tmp_path)


def test_photos_damaged_inside_give_way_to_the_next(photo_folder, caplog):
    whole = (photo_folder / "a.jpg").read_bytes()
    (photo_folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = PhotoDataset(find_photos(photo_folder), [], "RGB")
    sample = dataset[0]
    assert sample["file_name"].endswith("b.JPG")
    assert sample["image"].shape == (3, 128, 96)
    dataset[0]
    assert caplog.text.count("a.jpg") == 1, "named once"


def test_when_no_photo_can_be_decoded_it_stops(photo_folder):
    for path in photo_folder.rglob("*.jp*g"):
        path.write_bytes(path.read_bytes()[:400])
    records = [{"file_name": str(path)} for path in photo_folder.rglob("*.jp*g")]
    with pytest.raises(RuntimeError, match="none of the 2 photos can be decoded"):
        PhotoDataset(records, [], "RGB")[1]


def test_channels_and_turned_photos(tmp_path):
    red = Image.new("RGB", (20, 10), (250, 0, 0))
    exif = red.getexif()
    exif[0x0112] = 6
    red.save(tmp_path / "a.jpg", exif=exif, quality=95)
    records = [{"file_name": str(tmp_path / "a.jpg")}]
    rgb, bgr = (PhotoDataset(records, [], order)[0]["image"] for order in ("RGB", "BGR"))
    assert rgb.shape == (3, 20, 10)
    assert rgb[0].min() > 200 > 50 > rgb[2].max()
    assert np.array_equal(rgb.flip(0), bgr)


def test_grey_photos_have_three_channels(tmp_path):
    Image.fromarray(reference_image(12, 14)[..., 0]).save(tmp_path / "g.png")
    assert PhotoDataset([{"file_name": str(tmp_path / "g.png")}], [], "RGB")[0]["image"].shape == (3, 12, 14)


NUMBERS = {
    "side_multiple": 16,
    "short_side": (64, 128),
    "max_side": 200,
    "crop_prob": 0.5,
    "crop_min_fraction": 0.4,
    "crop_min_side": 48,
    "flip_prob": 0.5,
}


def test_augmented_sizes_keep_the_rules():
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(**NUMBERS))
    sizes = set()
    for index in range(300):
        sample = T.AugInput(reference_image(*((60, 90), (300, 140), (90, 90))[index % 3]))
        augmentations(sample)
        height, width = sample.image.shape[:2]
        sizes.add((height, width))
        assert height % 16 == width % 16 == 0
        assert 48 <= min(height, width) <= 128
        assert max(height, width) <= 200
    assert len(sizes) > 30


def test_crops_are_parts_of_the_image_from_all_over():
    np.random.seed(0)
    image = np.arange(100 * 80).reshape(100, 80, 1).repeat(3, 2).astype(np.float32)
    crop = CropToMultiple(8, 1.0, 0.4, 16)
    corners = set()
    for _ in range(200):
        part = crop.get_transform(image).apply_image(image)[..., 0]
        top, left = divmod(int(part[0, 0]), 80)
        corners.add((top, left))
        assert np.array_equal(part, image[top : top + part.shape[0], left : left + part.shape[1], 0])
    assert max(top for top, _ in corners) > 40
    assert max(left for _, left in corners) > 30


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 5)])
def test_very_long_images_keep_a_pixel(size):
    np.random.seed(0)
    sample = T.AugInput(np.zeros((*size, 3), dtype=np.uint8))
    T.AugmentationList(build_augmentations(**NUMBERS))(sample)
    assert min(sample.image.shape[:2]) >= 1


def test_sides_below_the_multiple_are_kept():
    image = np.zeros((5, 40, 3), dtype=np.uint8)
    assert CropToMultiple(16, 0.0, 0.4, 16).get_transform(image).apply_image(image).shape == (5, 32, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_side", (0, 5)),
        ("short_side", (-5, 5)),
        ("short_side", (9, 5)),
        ("short_side", (9,)),
        ("short_side", (64.5, 80.5)),
        ("short_side", ("a", "b")),
        ("max_side", 10),
        ("crop_prob", 1.5),
        ("flip_prob", -1),
        ("crop_min_fraction", 2),
        ("crop_min_side", -4),
        ("side_multiple", 0),
    ],
)
def test_wrong_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=rf"SPAR\.DATA\.{name.upper()}"):
        build_augmentations(**{**NUMBERS, name: value})
