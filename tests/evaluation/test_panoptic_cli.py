import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from reference import GOLDEN_PQ as GOLDEN
from spar_d2.evaluation.panoptic.__main__ import main
from spar_d2.evaluation.panoptic.coco_json import read_ground_truth, read_predictions
from spar_d2.evaluation.panoptic.coco_png import compare_folders, read_ids, write_ids

CATEGORIES = [
    {"id": 5, "name": "cat", "isthing": 1},
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 9, "name": "never", "isthing": 0},
]
TRUTH = np.array([[70000, 70000, 3, 3], [70000, 70000, 3, 0]])
GUESS = np.array([[1, 1, 1, 2], [1, 1, 2, 2]])


@pytest.fixture
def files(tmp_path):
    """Ground truth and prediction of two images; the second is void but for a crowd, and nothing is found in it."""
    truth = [{"id": 70000, "category_id": 5, "iscrowd": 0, "area": 4}, {"id": 3, "category_id": 2, "iscrowd": 0}]
    guess = [{"id": 2, "category_id": 2}, {"id": 1, "category_id": 5}]
    write_ids(TRUTH, tmp_path / "gt" / "one.png")
    write_ids(np.where(TRUTH == 3, 3, 0), tmp_path / "gt" / "two.png")
    write_ids(GUESS, tmp_path / "pred" / "sub" / "1.png")
    write_ids(np.zeros((2, 4), dtype=int), tmp_path / "pred" / "2.png")
    crowd = [{"id": 3, "category_id": 5, "iscrowd": 1, "area": 3}]
    write(tmp_path / "gt.json", [annotation("one", "one.png", truth), annotation(2, "two.png", crowd)], CATEGORIES)
    # In another order, and with an image that the ground truth does not have.
    strange = annotation(3, "none.png", [])
    write(tmp_path / "pred.json", [annotation(2, "2.png", []), strange, annotation("one", "sub/1.png", guess)])
    return tmp_path


def annotation(image_id, file_name, segments):
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments}


def write(path, annotations, categories=None):
    content = {"annotations": annotations} | ({"categories": categories} if categories else {})
    path.write_text(json.dumps(content))


def arguments(folder, gt="gt", pred="pred", output=None):
    output = output or folder / "new" / "result.json"
    return [
        "--gt-json",
        str(folder / f"{gt}.json"),
        "--pred-json",
        str(folder / f"{pred}.json"),
        "--output",
        str(output),
    ]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_reference_numbers(tmp_path, workers):
    folders = ["--gt-dir", str(GOLDEN / "gt"), "--pred-dir", str(GOLDEN / "pred"), "--workers", workers]
    main([*arguments(GOLDEN, output=tmp_path / "result.json"), *folders])
    result = json.loads((tmp_path / "result.json").read_text())
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert set(result) == set(expected) == {"All", "Things", "Stuff", "per_class"}
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], rel=0, abs=1e-12)
    assert set(result["per_class"]) == set(expected["per_class"])
    for category, values in expected["per_class"].items():
        assert result["per_class"][category] == pytest.approx(values, rel=0, abs=1e-12)


def test_scores_and_table(files, capsys):
    main(arguments(files))
    result = json.loads((files / "new" / "result.json").read_text())
    # The sky: 2 of 3 pixels, of 3 that are not on void but for one, which is none of the union.
    assert result["per_class"] == {
        "5": pytest.approx({"pq": 4 / 5, "sq": 4 / 5, "rq": 1}),
        "2": pytest.approx({"pq": 2 / 3, "sq": 2 / 3, "rq": 1}),
        "9": {"pq": 0, "sq": 0, "rq": 0},
    }
    assert result["All"] == pytest.approx({"pq": 11 / 15, "sq": 11 / 15, "rq": 1, "n": 2})
    assert result["Stuff"]["n"] == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["All", "73.33", "73.33", "100.00", "2"],
        ["Things", "80.00", "80.00", "100.00", "1"],
        ["Stuff", "66.67", "66.67", "100.00", "1"],
        ["cat", "80.00", "80.00", "100.00"],
        ["sky", "66.67", "66.67", "100.00"],
        ["never", "0.00", "0.00", "0.00"],
    ]
    assert [path.name for path in (files / "new").iterdir()] == ["result.json"]


@pytest.mark.processes
@pytest.mark.slow
def test_runs_as_a_module_without_detectron2_and_without_warnings(files):
    hidden = files / "hidden" / "detectron2"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not installed')")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "spar_d2.evaluation.panoptic", *arguments(files)]
    environment = {**os.environ, "PYTHONPATH": str(files / "hidden")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[1].split() == ["All", "73.33", "73.33", "100.00", "2"]


@pytest.mark.processes
def test_counting_needs_no_detectron2_and_the_function_keeps_its_name():
    code = (
        "import spar_d2.evaluation.panoptic.__main__, spar_d2.evaluation as e, sys;"
        "from spar_d2.evaluation import panoptic_quality, confusion_matrix;"
        "assert callable(e.panoptic_quality) and callable(panoptic_quality);"
        "assert not {'detectron2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_evaluators_are_imported_on_first_use():
    from spar_d2 import evaluation
    from spar_d2.evaluation import PanopticEvaluator, panoptic

    assert evaluation.PanopticEvaluator is PanopticEvaluator is panoptic.PanopticEvaluator
    assert all(getattr(evaluation, name).__name__ == name for name in evaluation.__all__)
    for module in (evaluation, panoptic):
        with pytest.raises(AttributeError, match="has no attribute 'NoEvaluator'"):
            module.NoEvaluator  # noqa: B018


@pytest.mark.parametrize("kind", ["uint8", "int32", "uint32", "int64"])
def test_ids_go_through_a_file(tmp_path, kind):
    largest = 256**3 if kind != "uint8" else 256
    ids = np.random.default_rng(0).integers(0, largest, (7, 11)).astype(kind)
    for layout in (np.ascontiguousarray, np.asfortranarray):
        write_ids(layout(ids), tmp_path / "new" / "ids.png")
        assert np.array_equal(read_ids(tmp_path / "new" / "ids.png"), ids)
    with Image.open(tmp_path / "new" / "ids.png") as image:
        red, green, blue = image.getpixel((5, 2))
    assert red + 256 * green + 256**2 * blue == ids[2, 5]


def repainted(path, how):
    """The PNG in another form."""
    with Image.open(path) as image:
        image = image.copy()
    if how == "alpha":
        image.putalpha(Image.fromarray(np.arange(image.width * image.height, dtype=np.uint8).reshape(image.size[::-1])))
    elif how in ("palette", "transparent palette"):
        colors, numbers = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
        image = Image.fromarray(numbers.reshape(image.size[::-1]).astype(np.uint8))
        image.putpalette(colors.ravel().tolist())
    else:
        image = image.convert(how)
    image.save(path, **({"transparency": bytes([0, 9])} if how == "transparent palette" else {}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["alpha", "palette", "transparent palette"])
def test_colors_count_however_they_are_stored(files, how):
    repainted(files / "gt" / "one.png", how)
    with Image.open(files / "gt" / "one.png") as image:
        assert image.mode == {"alpha": "RGBA"}.get(how, "P")
    assert np.array_equal(read_ids(files / "gt" / "one.png"), TRUTH)


@pytest.mark.parametrize("how", ["L", "1", "I;16", "LA"])
def test_gray_is_refused(files, how):
    repainted(files / "gt" / "one.png", "L" if how == "I;16" else how)
    if how == "I;16":
        Image.fromarray(TRUTH.astype(np.uint16)).save(files / "gt" / "one.png")
    with pytest.raises(ValueError, match=r"one\.png .*RGB, with ids R \+ 256 G \+ 65536 B, but its mode is"):
        read_ids(files / "gt" / "one.png")


def failing(capsys, options):
    """The message, without the part before and after."""
    with pytest.raises(SystemExit) as stopped:
        main(options)
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", "half", "flipped", "no PNG"])
def test_damaged_pngs_are_named(files, capsys, damage):
    path = files / "pred" / "2.png"
    content = path.read_bytes()
    middle = len(content) - 20
    path.write_bytes(
        {
            "half": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "no PNG": b"GIF89a" + content,
        }.get(damage, damage)
    )
    assert failing(capsys, arguments(files)).startswith(f"the panoptic PNG {path} cannot be read: ")


def change(path, *keys, to):
    """Set the value at the given keys of a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if to is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    path.write_text(json.dumps(content))


SEGMENT = ("annotations", 0, "segments_info", 0)


@pytest.mark.parametrize(
    ("name", "keys", "to", "message"),
    [
        ("gt", ["annotations"], None, "gt.json: 'annotations' must be a list, got nothing"),
        ("gt", ["annotations", 0], 5, "gt.json: annotations[0] must be an object, got 5"),
        ("gt", ["categories"], {}, "gt.json: 'categories' must be a list, got a dict"),
        ("gt", ["categories", 1, "isthing"], None, "gt.json, categories[1]: 'isthing' must be an integer, got nothing"),
        ("gt", ["categories", 1, "id"], 5, "gt.json, categories[1]: the category 5 is listed more than once"),
        (
            "gt",
            ["annotations", 0, "image_id"],
            None,
            "gt.json, annotations[0]: 'image_id' must be a number or a string",
        ),
        ("gt", ["annotations", 1, "image_id"], "one", "gt.json, image 'one': the image is listed more than once"),
        ("pred", ["annotations", 1, "image_id"], 2, "pred.json, image 2: the image is listed more than once"),
        ("gt", ["annotations", 0, "file_name"], 7, "gt.json, image 'one': 'file_name' must be a file name, got 7"),
        ("pred", ["annotations", 0, "file_name"], "../2.png", "image 2: 'file_name' must be within the folder"),
        ("pred", ["annotations", 0, "file_name"], "/2.png", "image 2: 'file_name' must be within the folder"),
        ("gt", [*SEGMENT, "id"], "3", "gt.json, image 'one', segments_info[0]: 'id' must be an integer, got a str"),
        ("gt", [*SEGMENT, "id"], 2**24, "segments_info[0]: 'id' must be in 1..16777215 (0 is void), got 16777216"),
        ("gt", [*SEGMENT, "category_id"], 1.5, "segments_info[0]: 'category_id' must be an integer, got 1.5"),
        ("gt", [*SEGMENT, "area"], "4", "segments_info[0]: 'area' must be a number of pixels, got a str"),
        ("gt", [*SEGMENT, "area"], -1, "segments_info[0]: 'area' must be a number of pixels, got -1"),
        ("gt", [*SEGMENT, "area"], float("nan"), "segments_info[0]: 'area' must be a number of pixels, got nan"),
        ("gt", [*SEGMENT, "area"], 1, "image one (one.png): the segment 70000 has more pixels than its area 1"),
        ("gt", [*SEGMENT, "id"], 6, "ground truth of the image one (one.png): the id 70000 is in the map, but not in"),
        ("gt", [*SEGMENT, "category_id"], 6, "image one (one.png): the segment 70000 has the unknown category 6"),
        (
            "pred",
            ["annotations", 2, "segments_info", 0, "id"],
            1,
            "image 'one': the segment 1 is listed more than once",
        ),
        ("pred", ["annotations", 2, "segments_info", 0, "id"], 7, "of the image one (one.png): the id 2 is in the map"),
        (
            "pred",
            ["annotations", 0, "segments_info"],
            [{"id": 7, "category_id": 2}],
            "(two.png): the id 7 is in the list",
        ),
        ("pred", ["annotations", 0], None, "1 of 2 images of the ground truth have no prediction: 2"),
        ("pred", ["annotations", 0, "file_name"], "5.png", "there is no panoptic PNG "),
        ("pred", ["annotations", 0, "file_name"], "sub", "sub cannot be read: "),
    ],
)
def test_wrong_values_in_a_file_are_named(files, capsys, name, keys, to, message):
    change(files / f"{name}.json", *keys, to=to)
    assert message in failing(capsys, arguments(files))
    assert not (files / "new").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfd", b"[" * 100000])
def test_damaged_json_is_named(files, capsys, content):
    (files / "pred.json").write_bytes(content)
    assert failing(capsys, arguments(files)).startswith(f"{files / 'pred.json'} is not JSON: ")


def test_json_of_something_else_is_named(files, capsys):
    (files / "pred.json").write_text("[1, 2]")
    assert "pred.json must hold an object with the key 'annotations', got a list" in failing(capsys, arguments(files))


def test_sizes_that_differ_are_named(files, capsys):
    write_ids(GUESS[:1], files / "pred" / "sub" / "1.png")
    assert "the image one (one.png) differ in size: (1, 4) and (2, 4)" in failing(capsys, arguments(files))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--output", "."], "--output must be a file, . is a folder"),
        (["--gt-json", "none.json"], "the file none.json does not exist"),
        (["--pred-dir", "nowhere"], "the folder nowhere with the PNGs of "),
    ],
)
def test_wrong_options_are_one_line(files, capsys, options, message):
    assert failing(capsys, [*arguments(files), *options]).startswith(message)


@pytest.mark.slow
def test_an_error_stops_all_threads(files):
    """The first of many images is damaged: the others are not waited for."""
    truth, (folder, predictions) = read_ground_truth(files / "gt.json"), read_predictions(files / "pred.json")
    (folder / "sub" / "1.png").write_bytes(b"")
    read = []

    class Watched(dict):
        def __getitem__(self, image_id):
            read.append(image_id)
            return super().__getitem__(image_id)

    images = {"one": truth.images["one"]} | dict.fromkeys(range(5000), truth.images[2])
    many = type(truth)(truth.folder, truth.names, truth.things, images)
    found = Watched({"one": predictions["one"]} | dict.fromkeys(range(5000), predictions[2]))
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        compare_folders(many, folder, found, 2)
    assert len(read) < 4000


@pytest.mark.parametrize("name", ["gt.json", "pred.json", "gt/one.png", "pred/sub/1.png", "link.json"])
def test_the_output_overwrites_no_input(files, capsys, name):
    (files / "link.json").symlink_to("gt.json")
    before = (files / name).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(arguments(files, output=files / name))
    assert stopped.value.code == 1
    assert "--output must not overwrite" in capsys.readouterr().err
    assert (files / name).read_bytes() == before


def test_the_output_may_be_beside_the_input(files):
    main(arguments(files, output=files / "gt" / "result.json"))
    assert (files / "gt" / "result.json").is_file()
