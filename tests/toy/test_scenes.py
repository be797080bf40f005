import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from spar_d2.data.datasets.scenes import SCENE_SPLITS, load_scenes
from spar_d2.toy.scenes import GROUNDS, SCENE_CLASSES, Scene, class_colors, draw_scene, large_scene, training_scene


def test_the_same_number_is_the_same_scene_and_another_another():
    one, again, other = large_scene(1, 0), large_scene(1, 0), large_scene(1, 2)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.image, other.image)


def test_sizes_types_and_labels():
    for scene, size in (
        (training_scene(1, 3), (64, 64)),
        (large_scene(1, 0), (256, 256)),
        (large_scene(1, 1), (192, 320)),
    ):
        assert scene.image.shape == (*size, 3)
        assert scene.image.dtype == scene.labels.dtype == scene.objects.dtype == np.uint8
        assert scene.labels.shape == scene.objects.shape == size
        assert scene.labels.max() < len(SCENE_CLASSES)


def test_every_class_is_drawn_somewhere():
    seen = {name for index in range(40) for name in training_scene(1, index).visible()}
    assert seen == set(SCENE_CLASSES)


def test_labels_match_the_drawn_objects():
    """Pixels of one class within a scene have one main color: their spread is below that of the whole image."""
    scene = large_scene(1, 0)
    spread = [scene.image[scene.labels == k].std(0).mean() for k in np.unique(scene.labels) if k >= len(GROUNDS)]
    assert np.median(spread) < 0.8 * scene.image.reshape(-1, 3).std(0).mean()


def test_objects_and_grounds_share_out_the_labels():
    for scene in (training_scene(1, 3), *(large_scene(1, index) for index in range(4))):
        assert np.array_equal(scene.objects > 0, scene.labels >= len(GROUNDS))
        pairs = set(zip(scene.objects.ravel().tolist(), scene.labels.ravel().tolist()))
        numbers = [number for number, _ in pairs if number]
        assert len(numbers) == len(set(numbers)), "an object has one class"
        assert set(numbers) <= set(range(1, 21))


def test_later_objects_cover_earlier_ones():
    """Without the last object, all that it does not cover is the same."""
    sizes = (96, 96, (6, 6), (9, 20), (1, 1))
    full = draw_scene(np.random.default_rng(4), *sizes)
    fewer = draw_scene(_OneFewer(4), *sizes)
    last = full.objects == 6
    assert last.any()
    assert fewer.objects.max() == 5
    assert np.array_equal(full.objects[~last], fewer.objects[~last])


class _OneFewer(np.random.Generator):
    """The same numbers, but where the number of objects is drawn it is one less."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.default_rng(seed).bit_generator)

    def integers(self, low, high=None, **kwargs):
        return super().integers(low, high, **kwargs) - (low == 6 and high == 7)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("min_pixels", [1, 4, 400])
def test_segments_are_grounds_and_objects_that_are_seen(index, min_pixels):
    scene = large_scene(2, index)
    check_segments(scene, min_pixels)


def test_remnants_are_no_segments():
    """One pixel of an object in two parts of a ground, three of another, and four of a third."""
    labels, objects = np.zeros((5, 6), dtype=np.uint8), np.zeros((5, 6), dtype=np.uint8)
    for number, (rows, columns) in enumerate([([0], [0]), ([2, 2, 4], [1, 3, 5]), ([3, 3, 4, 0], [0, 1, 0, 5])], 1):
        labels[rows, columns], objects[rows, columns] = len(GROUNDS) + number, number
    scene = Scene(np.zeros((5, 6, 3), dtype=np.uint8), labels, objects)
    segments, classes = scene.segments()
    assert (segments == 0).sum() == 4
    assert sorted(classes.values()) == [0, len(GROUNDS) + 3]
    check_segments(scene, 4)


def check_segments(scene: Scene, min_pixels: int) -> None:
    """Pixel by pixel: who belongs together belongs together in ``segments``, and the rest to none."""
    parts: dict[tuple, list] = {}
    for place in np.ndindex(scene.labels.shape):
        number, label = int(scene.objects[place]), int(scene.labels[place])
        parts.setdefault(("object", number, label) if number else ("ground", label), []).append(place)
    segments, classes = scene.segments(min_pixels)
    seen = []
    for part, places in parts.items():
        (number,) = {int(segments[place]) for place in places}
        assert (number > 0) == (len(places) >= min_pixels)
        if number:
            assert classes[number] == part[-1]
            seen.append(number)
    assert sorted(seen) == sorted(classes)


def test_colors_of_the_legend_differ():
    assert len({tuple(color) for color in class_colors()}) == len(SCENE_CLASSES)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 8, (1, 2), (3, 4), (1, 1)), "height"),
        ((8, 8, (2, 1), (3, 4), (1, 1)), "objects"),
        ((8, 8, (1, 256), (3, 4), (1, 1)), "objects.*255"),
        ((8, 8, (1, 2), (0, 4), (1, 1)), "radius"),
        ((8, 8, (1, 2), (3, 4), (0, 1)), "grounds"),
    ],
)
def test_wrong_numbers_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        draw_scene(np.random.default_rng(0), *arguments)


def test_registered_with_names_and_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(SCENE_SPLITS, "val", (303, 3))
    records = DatasetCatalog.get("spar_scenes_val")
    assert len(records) == 3
    assert MetadataCatalog.get("spar_scenes_val").stuff_classes == list(SCENE_CLASSES)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(written) == 9
    assert load_scenes("val") == records
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == written
    with Image.open(records[1]["sem_seg_file_name"]) as labels:
        assert np.array_equal(np.asarray(labels), large_scene(303, 1).labels)


def test_splits_share_no_seed():
    assert len({seed for seed, _ in SCENE_SPLITS.values()}) == len(SCENE_SPLITS)
