import itertools
import logging
import os

import pytest
import torch
from detectron2.data import transforms as T

from spar_d2.data.loaders import PhotoLoader
from spar_d2.data.photos import PhotoDataset
from spar_d2.data.samplers import ResumableBatchSampler
from spar_d2.data.sources import find_photos


def loader(folder, workers=0, batch=2, **options) -> PhotoLoader:
    crops = [T.RandomCrop("relative_range", (0.5, 0.5)), T.RandomFlip(0.5)]
    photos = PhotoDataset(find_photos(folder), crops, "RGB", seed=4)
    return PhotoLoader(photos, ResumableBatchSampler(len(photos), batch, seed=4), workers, **options)


def take(photos: PhotoLoader, batches: int) -> list[dict]:
    return [record for batch in itertools.islice(photos, batches) for record in batch]


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a["position"] == b["position"] and torch.equal(a["image"], b["image"]) for a, b in zip(first, second)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(photo_folder, workers):
    assert same(take(loader(photo_folder), 7), take(loader(photo_folder, workers), 7))


def test_a_resumed_loader_gives_the_same_batches(photo_folder):
    through = take(loader(photo_folder), 8)
    resumed = loader(photo_folder, workers=1)
    resumed.start_at(5)
    assert same(take(resumed, 3), through[10:])


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_photos_are_named_once_and_counted(photo_folder, workers, caplog):
    (photo_folder / "ruined.jpg").write_bytes(b"\xff\xd8 not a photo")
    (photo_folder / "text.png").write_text("not a photo either")
    photos = loader(photo_folder, workers)
    with caplog.at_level(logging.WARNING):
        records = take(photos, 10)
    assert {record["file_name"].rsplit("/", 1)[1] for record in records} == {"a.jpg", "b.JPG", "c.jpeg"}
    assert {name.rsplit("/", 1)[1] for name in photos.corrupt.names} == {"ruined.jpg", "text.png"}
    assert caplog.text.count("ruined.jpg") == caplog.text.count("text.png") == 1
    assert "2 so far" in caplog.text


def test_names_that_are_no_text_are_logged_on_one_line(photo_folder, caplog):
    path = os.fsencode(photo_folder) + b"/b\xff\nx.jpg"
    with open(path, "wb") as file:
        file.write(b"ruined")
    with caplog.at_level(logging.WARNING):
        take(loader(photo_folder), 4)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in message
    message.encode()


def test_too_many_damaged_photos_stop_it(photo_folder):
    for name in ("1.jpg", "2.jpg"):
        (photo_folder / name).write_bytes(b"ruined")
    with pytest.raises(RuntimeError, match=r"more than 1 .*SPAR\.DATA\.MAX_DAMAGED"):
        take(loader(photo_folder, max_damaged=1), 10)
