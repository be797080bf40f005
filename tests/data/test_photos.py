import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from reference import reference_image
from spar_d2.data.photos import PhotoDataset, seeded_numpy
from spar_d2.data.samplers import SampleIndex
from spar_d2.data.sources import find_photos

CROPS = [T.RandomCrop("absolute", (40, 40)), T.RandomFlip(0.5)]


def draw(index: int, epoch: int = 0) -> SampleIndex:
    return SampleIndex(position=100 * epoch + index, epoch=epoch, index=index)


def test_damaged_photos_give_way_to_the_next_and_are_named(photo_folder):
    whole = (photo_folder / "a.jpg").read_bytes()
    (photo_folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = PhotoDataset(find_photos(photo_folder), [], "RGB")
    for _ in range(2):
        sample = dataset[draw(0)]
        assert sample["file_name"].endswith("b.JPG")
        assert sample["image"].shape == (3, 128, 96)
        ((name, reason),) = sample["damaged"].items()
        assert name == str(photo_folder / "a.jpg")
        assert "cannot be read" in reason
    assert dataset[draw(1)]["damaged"] == {}


def test_when_no_photo_can_be_decoded_it_stops(photo_folder):
    for path in photo_folder.rglob("*.jp*g"):
        path.write_bytes(path.read_bytes()[:400])
    records = [{"file_name": str(path)} for path in photo_folder.rglob("*.jp*g")]
    with pytest.raises(RuntimeError, match=r"none of the 2 images can be decoded.*cannot be read"):
        PhotoDataset(records, [], "RGB")[draw(1)]


def test_channels_and_turned_photos(tmp_path):
    red = Image.new("RGB", (20, 10), (250, 0, 0))
    exif = red.getexif()
    exif[0x0112] = 6
    red.save(tmp_path / "a.jpg", exif=exif, quality=95)
    records = [{"file_name": str(tmp_path / "a.jpg")}]
    rgb, bgr = (PhotoDataset(records, [], order)[draw(0)]["image"] for order in ("RGB", "BGR"))
    assert rgb.shape == (3, 20, 10)
    assert rgb[0].min() > 200 > 50 > rgb[2].max()
    assert np.array_equal(rgb.flip(0), bgr)


def test_augmentation_is_fresh_in_every_epoch_and_always_the_same_for_one_draw(photo_folder):
    dataset = PhotoDataset(find_photos(photo_folder), CROPS, "RGB", seed=5)
    epochs = [dataset[draw(0, epoch)]["image"] for epoch in range(4)]
    assert len({image.numpy().tobytes() for image in epochs}) > 1
    np.random.seed(77)
    torch.manual_seed(77)
    again = PhotoDataset(find_photos(photo_folder), CROPS, "RGB", seed=5)
    assert all(torch.equal(again[draw(0, epoch)]["image"], image) for epoch, image in enumerate(epochs))
    other = PhotoDataset(find_photos(photo_folder), CROPS, "RGB", seed=6)
    assert any(not torch.equal(other[draw(0, epoch)]["image"], image) for epoch, image in enumerate(epochs))


def test_a_frozen_image_is_the_same_in_every_epoch_and_folder(photo_folder, tmp_path):
    frozen = PhotoDataset(find_photos(photo_folder), CROPS, "RGB", seed=6, frozen=True)
    first = frozen[draw(2)]["image"]
    assert all(torch.equal(frozen[draw(2, epoch)]["image"], first) for epoch in range(4))
    moved = tmp_path / "moved"
    photo_folder.rename(moved)
    Image.fromarray(reference_image(60, 60)).save(moved / "0.jpg")
    records = find_photos(moved)
    (index,) = (i for i, record in enumerate(records) if record["name"] == "more/c.jpeg")
    assert index == 3
    assert torch.equal(PhotoDataset(records, CROPS, "RGB", seed=5, frozen=True)[draw(index)]["image"], first)


def test_numpys_random_state_is_not_changed():
    np.random.seed(1)
    expected = np.random.rand(2)[1]
    np.random.seed(1)
    np.random.rand()
    with seeded_numpy(9, 9):
        np.random.rand(5)
    assert np.random.rand() == expected
