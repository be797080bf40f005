"""Formats of other programs, read back by their own readers."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from reference import reference_image
from spar_d2.results import Segmentation
from spar_d2.results.labelstudio import labeling_interface

NAMES = ["grass", "circle & <star>", "", "never found"]


def nested_labels(height: int = 59, width: int = 80) -> np.ndarray:
    """A ground with rings in rings, bars as high and wide as the image, and single pixels."""
    y, x = np.mgrid[:height, :width]
    labels = (np.hypot(y - 30, x - 40) // 7).astype(np.int64) % 3
    labels[:, 70:74], labels[50:53] = 1, 2
    labels[[3, 4, 30], [3, 4, 40]] = 2
    return labels


@pytest.fixture
def result():
    labels = nested_labels()
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 8, 12)).astype(np.float32)
    return Segmentation.of(labels, NAMES, scores, 8, reference_image(*labels.shape))


def test_pycocotools_reads_coco(result, tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(result.to_coco("a.png", 7)))
    coco = COCO(str(path))
    assert coco.imgs == {7: {"id": 7, "file_name": "a.png", "width": 80, "height": 59}}
    assert [(c["id"], c["name"]) for c in coco.cats.values()] == list(enumerate([*NAMES[:2], "class 2", NAMES[3]], 1))
    labels = np.full(result.size, -1)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=7)):
        mask = coco.annToMask(annotation).astype(bool)
        assert (labels[mask] == -1).all(), "masks do not overlap"
        labels[mask] = annotation["category_id"] - 1
        assert annotation["area"] == mask.sum() and -1 <= annotation["score"] <= 1
        (rows, columns), (x, y, width, height) = np.nonzero(mask), annotation["bbox"]
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (y, y + height - 1, x, x + width - 1)
    assert np.array_equal(labels, result.labels)


def test_label_studios_converter_decodes_brush_masks(result):
    brush = pytest.importorskip("label_studio_converter.brush", reason="label-studio-converter is not installed")
    result = Segmentation.of(np.ascontiguousarray(result.labels[::3, ::3]), NAMES)
    task = json.loads(json.dumps(result.to_labelstudio("/data/a.png")))
    assert task["data"] == {"image": "/data/a.png"}
    labels = np.full(result.size, -1)
    for entry in task["predictions"][0]["result"]:
        assert entry["type"] == "brushlabels" and entry["value"]["format"] == "rle"
        assert (entry["original_height"], entry["original_width"]) == result.size
        mask = brush.decode_rle(entry["value"]["rle"]).reshape(*result.size, 4)
        assert (mask == mask[..., :1]).all() and set(np.unique(mask)) <= {0, 255}
        number = [*NAMES[:2], "class 2"].index(entry["value"]["brushlabels"][0])
        labels[mask[..., 3] == 255] = number
    assert np.array_equal(labels, result.labels)


def test_brush_masks_with_long_runs():
    """Runs are longer than the format can hold in one piece."""
    labels = np.zeros((300, 400), dtype=np.int64)
    labels[150, 200] = 1
    task = Segmentation.of(labels, ["a", "b"]).to_labelstudio("")
    stream = np.unpackbits(np.array(task["predictions"][0]["result"][0]["value"]["rle"], dtype=np.uint8))

    def number(start: int, count: int) -> int:
        return int("".join(map(str, stream[start : start + count])), 2)

    # The format, read without Label Studio: see its converter for the order of the fields.
    assert number(0, 32) == 300 * 400 * 4 and number(32, 5) == 7
    sizes, position, values = [number(37 + 4 * k, 4) + 1 for k in range(4)], 53, []
    while sum(length for length, _ in values) < 300 * 400 * 4:
        assert stream[position] == 1
        bits = sizes[number(position + 1, 2)]
        values.append((number(position + 3, bits) + 1, number(position + 3 + bits, 8)))
        position += 11 + bits
    decoded = np.concatenate([np.full(length, value) for length, value in values]).reshape(300, 400, 4)
    assert np.array_equal(decoded[..., 3] == 255, labels == 0)


def filled(shapes: list[tuple[str, np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons in order; a pixel is inside if its middle is."""
    from matplotlib.path import Path

    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    labels = np.full(size, -1)
    for name, ring in shapes:
        inside = Path(np.concatenate([ring, ring[:1]])).contains_points(np.stack([x.ravel(), y.ravel()], 1))
        labels[inside.reshape(size)] = [*NAMES[:2], "class 2"].index(name)
    return labels


def test_polygons_filled_in_order_give_the_labels(result):
    content = json.loads(json.dumps(result.to_labelme("a.png", tolerance=0)))
    shapes = [(shape["label"], np.array(shape["points"])) for shape in content["shapes"]]
    assert np.array_equal(filled(shapes, result.size), result.labels)
    task = json.loads(json.dumps(result.to_labelstudio("a.png", "polygon", tolerance=0)))
    percent = np.array(result.size[::-1]) / 100
    entries = [entry["value"] for entry in task["predictions"][0]["result"]]
    shapes = [(value["polygonlabels"][0], (np.array(value["points"]) * percent).round(6)) for value in entries]
    assert np.array_equal(filled(shapes, result.size), result.labels)
    shapes = [(shape["label"], np.array(shape["points"])) for shape in result.to_labelme("a.png")["shapes"]]
    assert (filled(shapes, result.size) == result.labels).mean() > 0.9, "simplified"


def test_labelme_content_follows_its_schema(result):
    content = result.to_labelme("photos/a.png", min_area=5)
    assert {key: type(value).__name__ for key, value in content.items()} == {
        **{"version": "str", "flags": "dict", "shapes": "list", "imagePath": "str", "imageData": "NoneType"},
        **{"imageHeight": "int", "imageWidth": "int"},
    }
    assert len(content["shapes"]) == len(result.regions(5))
    for shape in content["shapes"]:
        assert {"label", "points", "group_id", "description", "shape_type", "flags"} == shape.keys()
        assert shape["shape_type"] == "polygon" and len(shape["points"]) >= 3 and shape["group_id"] is None
        assert all(len(point) == 2 and all(type(value) is float for value in point) for point in shape["points"])


def test_labelme_reads_its_file(result, tmp_path, monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    try:
        from labelme._label_file import LabelFile
        from labelme.utils.shape import shapes_to_label
    except ImportError as error:
        pytest.skip(f"labelme cannot be imported: {error}")
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "photos").mkdir()
    Image.fromarray(result.image).save(tmp_path / "photos" / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(result.to_labelme("photos/a.png", tolerance=0)))
    file = LabelFile(str(tmp_path / "a.json"))
    assert file.image_path == "photos/a.png" and len(file.shapes) == len(result.regions())
    names = {name: number for number, name in enumerate([*NAMES[:2], "class 2"])}
    labels, _ = shapes_to_label(result.size, file.shapes, names)
    # labelme fills the pixels that an outline touches, one more at the right and at the bottom.
    shifted = [labels[:-1, :-1], labels[1:, :-1], labels[:-1, 1:], labels[1:, 1:]]
    assert (np.stack(shifted) == result.labels[:-1, :-1]).any(0).mean() > 0.97
    Image.MAX_IMAGE_PIXELS = limit


def test_supervision_takes_detections(result):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    detections = result.to_supervision(min_area=4)
    regions = result.regions(4)
    assert isinstance(detections, supervision.Detections) and len(detections) == len(regions)
    assert np.array_equal(detections.area, [region.area for region in regions])
    assert np.array_equal(supervision.mask_to_xyxy(detections.mask) + [0, 0, 1, 1], detections.xyxy)
    assert np.allclose(detections.confidence, [region.score for region in regions])
    assert list(detections["class_name"]) == [region.name for region in regions]
    for number in range(3):
        masks = result.to_supervision()[result.to_supervision().class_id == number].mask
        assert np.array_equal(masks.any(0), result.labels == number)
    picture = supervision.MaskAnnotator().annotate(result.image.copy(), detections)
    assert picture.shape == result.image.shape and (picture != result.image).any()
    empty = result.to_supervision(min_area=10**6)
    assert len(empty) == 0 and empty.confidence is None


def test_a_missing_supervision_is_named(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(RuntimeError, match="pip install supervision"):
        result.to_supervision()


def test_the_labeling_interface_has_all_classes():
    from xml.etree import ElementTree

    tree = ElementTree.fromstring(labeling_interface(NAMES))
    labels = [(label.get("value"), label.get("background")) for label in tree.iter("Label")]
    assert [name for name, _ in labels] == [*NAMES[:2], "class 2", NAMES[3]]
    assert len({color for _, color in labels}) == 4 and all(len(color) == 7 for _, color in labels)
    assert tree.find("BrushLabels").get("toName") == tree.find("Image").get("name") == "image"


def test_an_unknown_kind_is_named(result):
    with pytest.raises(ValueError, match="kind must be brush or polygon, got 'box'"):
        result.to_labelstudio("", "box")


def test_notebooks_show_the_picture(result):
    import io

    shown = np.asarray(Image.open(io.BytesIO(result._repr_png_())))
    assert np.array_equal(shown, result.draw())
    large = Segmentation.of(np.zeros((600, 3000), dtype=np.int64), ["a"], image=np.zeros((600, 3000, 3), np.uint8))
    assert Image.open(io.BytesIO(large._repr_png_())).width == 1024
    without = Segmentation.of(result.labels, NAMES)
    assert without._repr_png_() is None
    with pytest.raises(ValueError, match="does not keep it"):
        without.draw()
