import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from spar_d2.data.datasets import SCENE_SPLITS, load_scenes
from spar_d2.data.scenes import GROUNDS, SCENE_CLASSES, class_colours, draw_scene, large_scene, training_scene


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
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert scene.labels.shape == size
        assert scene.labels.max() < len(SCENE_CLASSES)


def test_every_class_is_drawn_somewhere():
    seen = {name for index in range(40) for name in training_scene(1, index).visible()}
    assert seen == set(SCENE_CLASSES)


def test_labels_lie_where_objects_are():
    """Pixels of one class within a scene have one main colour: their spread is below that of the whole image."""
    scene = large_scene(1, 0)
    spread = [scene.image[scene.labels == k].std(0).mean() for k in np.unique(scene.labels) if k >= len(GROUNDS)]
    assert np.median(spread) < 0.8 * scene.image.reshape(-1, 3).std(0).mean()


def test_colours_of_the_legend_differ():
    assert len({tuple(colour) for colour in class_colours()}) == len(SCENE_CLASSES)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 8, (1, 2), (3, 4), (1, 1)), "height"),
        ((8, 8, (2, 1), (3, 4), (1, 1)), "objects"),
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
    assert len(written) == 6
    assert load_scenes("val") == records
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == written
    with Image.open(records[1]["sem_seg_file_name"]) as labels:
        assert np.array_equal(np.asarray(labels), large_scene(303, 1).labels)


def test_splits_share_no_seed():
    assert len({seed for seed, _ in SCENE_SPLITS.values()}) == len(SCENE_SPLITS)
