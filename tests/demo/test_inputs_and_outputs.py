"""Images that are found, and names of their results."""

import os
from pathlib import Path

import pytest
from PIL import Image

from spar_d2.demo.inputs import find_inputs
from spar_d2.demo.outputs import plan_outputs


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "more/b.jpg", "more/deep/c.jpg", ".hidden/d.jpg", "more/note.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    return tmp_path / "photos"


def names(*words):
    return [source.name for source in find_inputs(words, "output")]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**", ["a.jpg", "b.jpg", "c.jpg"]),
        ("**/*.jpg", ["a.jpg", "b.jpg", "c.jpg"]),
        ("*.jpg", ["a.jpg"]),
        ("*/*.jpg", ["b.jpg"]),
        ("mo*/[bc].jpg", ["b.jpg"]),
        (".hidden/*.jpg", ["d.jpg"]),
    ],
)
def test_patterns(photos, pattern, found, absolute):
    assert names(f"{photos if absolute else 'photos'}/{pattern}") == found


@pytest.mark.parametrize("pattern", ["photos/**", "photos/**/*.jpg", "photos"])
def test_links_to_folders_above_end(photos, pattern):
    """Two of them would be entered in every order."""
    (photos / "more" / "up").symlink_to("..")
    (photos / "more" / "top").symlink_to("../..")
    assert sorted(os.path.basename(name) for name in names(pattern)) == ["a.jpg", "b.jpg", "c.jpg"]


def test_other_files_that_match_a_pattern_are_skipped(photos, caplog):
    os.mkfifo(photos / "x.tar")
    (photos / "empty").mkdir()
    assert names("photos/[ax]*") == ["a.jpg"]
    assert names("photos/[me]*") == ["b.jpg", "deep/c.jpg"]
    assert "x.tar is not a regular file" in caplog.text and "no images" in caplog.text


def test_annotations_of_a_photo_are_not_replaced(photos):
    (photos / "a.json").write_text('{"shapes": []}')
    with pytest.raises(ValueError, match=r"--output: .*a\.json is not from an earlier run"):
        plan_outputs(find_inputs(["photos/a.jpg"], "photos"), "photos", "_segmented", records=True)
    (photos / "a.json").write_text('{"width": 8, "height": 8, "classes": []}')
    plan_outputs(find_inputs(["photos/a.jpg"], "photos"), "photos", "_segmented", records=True)


def test_pipes_are_not_read(photos):
    os.mkfifo(photos / "x.tar")
    os.mkfifo(photos / "y.jpg")
    assert names("photos") == ["a.jpg", "more/b.jpg", "more/deep/c.jpg"]
    with pytest.raises(ValueError, match=r"--input: .*x\.tar is not a regular file"):
        names("photos/x.tar")


@pytest.mark.parametrize("name", ["n" * 251 + ".jpg", "ü" * 125 + ".jpg"])
def test_results_of_long_names_can_be_written(photos, name):
    for folder in ("photos/long", "photos/long/twice"):
        Path(folder).mkdir()
        Image.new("RGB", (8, 8)).save(Path(folder) / name)
    sources = find_inputs([f"photos/long/{name}", f"photos/long/twice/{name}"], "output")
    targets = plan_outputs(sources, "output", "_segmented", masks=True, records=True)
    paths = [path for target in targets for path in target.paths]
    assert len(set(paths)) == len(paths) == 6
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_results_stay_in_their_folder(photos):
    (photos / "a.jpg").rename(photos / "...jpg")
    (target,) = plan_outputs(find_inputs(["photos/...jpg"], "output"), "output", "_segmented")
    assert target.picture.parent == Path("output")
