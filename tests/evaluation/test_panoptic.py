import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from processes import run_in_two_processes
from reference import GOLDEN_PQ as GOLDEN
from spar_d2.evaluation import PanopticEvaluator, panoptic_quality
from spar_d2.evaluation.panoptic.__main__ import main
from spar_d2.evaluation.panoptic.coco_json import read_ground_truth, read_predictions
from spar_d2.evaluation.panoptic.coco_png import read_ids, write_ids
from spar_d2.evaluation.panoptic.scores import PanopticCounts
from spar_d2.utils.io import write_json

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 40, "name": "sky", "isthing": 0},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 90, "name": "grass", "isthing": 0},
    {"id": 91, "name": "never", "isthing": 0},
]
THINGS, STUFF = [3, 7], [40, 90, 91]
DIVISOR = 1000
# For the data set's category of every contiguous one: a space for all, or things and stuff each with its own.
SPACES = {
    "one": ({3: 0, 7: 2}, {40: 1, 90: 3, 91: 4}),
    "two": ({3: 0, 7: 1}, {0: 0, 40: 1, 90: 2, 91: 3}),
}


def draw(rng, ids):
    """(H, W) regions of five ids."""
    height, width = rng.integers(9, 40, 2)
    return ids[rng.integers(0, 5, (height // 4 + 1, width // 4 + 1)).repeat(4, 0).repeat(4, 1)[:height, :width]]


def write_truth(folder, count):
    """A ground truth in COCO's form, with void, crowds and two segments of a category; images are named by strings."""
    rng = np.random.default_rng(count)
    annotations = []
    for index in rng.permutation(count).tolist():
        ids = rng.choice(2**24 - 1, 5, replace=False) + 1
        ids[0] = 0
        truth = draw(rng, ids)
        segments = [
            {"id": int(number), "category_id": category, "iscrowd": crowd, "area": int((truth == number).sum())}
            for number, category, crowd in zip(ids[1:], rng.permutation([3, 3, 7, 40, 90])[:4].tolist(), (0, 0, 1, 0))
            if number in truth
        ]
        write_ids(truth, folder / "truth" / f"{index}.png")
        annotations.append({"image_id": f"town_{index}", "file_name": f"{index}.png", "segments_info": segments})
    write_json({"categories": CATEGORIES, "annotations": annotations}, folder / "truth.json")


def register(name, path, space="one", **more):
    MetadataCatalog.pop(name, None)
    things, stuff = SPACES[space] if isinstance(space, str) else space
    MetadataCatalog.get(name).set(
        panoptic_json=str(path),
        panoptic_root=str(path.with_suffix("")),
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id=stuff,
        **more,
    )
    return name


@pytest.fixture
def dataset(tmp_path):
    """A registered data set of eight images; the category "never" is in none of them."""
    write_truth(tmp_path, 8)
    yield register(f"panoptic_{tmp_path.name}", tmp_path / "truth.json", label_divisor=DIVISOR)
    MetadataCatalog.remove(f"panoptic_{tmp_path.name}")


@pytest.fixture
def golden_set(request):
    """The reference's ground truth, with contiguous categories of one space or of two."""
    truth = read_ground_truth(GOLDEN / "gt.json", GOLDEN / "gt")
    things = [number for number in truth.names if number in truth.things]
    stuff = [number for number in truth.names if number not in truth.things]
    if request.param == "one":
        place = {number: index for index, number in enumerate(truth.names)}
        space = {number: place[number] for number in things}, {number: place[number] for number in stuff}
    else:
        stuff_places = {0: 0} | {number: index for index, number in enumerate(stuff, start=1)}
        space = {number: index for index, number in enumerate(things)}, stuff_places
    yield register("panoptic_golden", GOLDEN / "gt.json", space, label_divisor=DIVISOR)
    MetadataCatalog.remove("panoptic_golden")


def guesses(path):
    """(image id, ids, {id: category}) for every image of a ground truth: partly right, partly void."""
    truth = read_ground_truth(path)
    rng = np.random.default_rng(5)
    for image_id, image in truth.images.items():
        ids = read_ids(truth.folder / image.file_name)
        numbers = np.unique(ids).tolist()
        moved = np.where(rng.random(ids.shape) < 0.2, rng.choice(numbers, ids.shape), ids)
        renamed = np.searchsorted(numbers, moved).astype(np.int32)
        category = {segment.id: segment.category for segment in image.segments}
        # Void pixels of the ground truth have a segment here, and one segment is void.
        renamed = np.where(renamed == len(numbers) - 1, 0, renamed + 1)
        found = {number: category.get(numbers[number - 1], 40) for number in np.unique(renamed).tolist() if number}
        wrong = rng.choice(list(found))
        found[wrong] = int(rng.choice([3, 7, 40, 90]))
        yield image_id, renamed, found


def contiguous(name, category):
    """A contiguous category and whether it is a thing."""
    metadata = MetadataCatalog.get(name)
    things = metadata.thing_dataset_id_to_contiguous_id
    stuff = metadata.stuff_dataset_id_to_contiguous_id
    return (things[category], True) if category in things else (stuff[category], False)


def as_segments(name, ids, found, kind=torch.int32):
    segments = [
        {"id": number, "category_id": place, "isthing": thing, "area": 3, "score": 0.5}
        for number, (place, thing) in ((n, contiguous(name, c)) for n, c in found.items())
    ]
    return torch.as_tensor(ids.astype(np.int64)).to(kind), segments


def as_own_categories(name, ids, found):
    return torch.as_tensor(ids.astype(np.int64)), [{"id": n, "category_id": c} for n, c in found.items()]


def as_labels(name, ids, found):
    labels = np.full(ids.shape, -1)
    for index, (number, category) in enumerate(found.items()):
        labels[ids == number] = contiguous(name, category)[0] * DIVISOR + index
    return torch.as_tensor(labels), None


def evaluate(evaluator, form, cases):
    for image_id, ids, found in cases:
        record = {"image_id": image_id, "file_name": f"somewhere/{image_id}.jpg"}
        evaluator.process([record], [{"panoptic_seg": form(evaluator.dataset_name, ids, found)}])
    return evaluator.evaluate()


def plain_scores(path, cases):
    """By the plain function."""
    truth = read_ground_truth(path)
    total = PanopticCounts.zeros(truth.names)
    for image_id, ids, found in cases:
        image = truth.images[image_id]
        true = read_ids(truth.folder / image.file_name)
        total += panoptic_quality(ids, found, true, image.segments, tuple(truth.names))
    return total.scores(truth.things)


def golden_cases():
    folder, predictions = read_predictions(GOLDEN / "pred.json")
    return [(key, read_ids(folder / image.file_name), image.categories) for key, image in predictions.items()]


FORMS = {
    "segments": as_segments,
    "segments64": lambda *case: as_segments(*case, torch.int64),
    "own categories": as_own_categories,
    "labels": as_labels,
}


# Labels cannot tell a thing from stuff of the same number.
GOLDEN_FORMS = [(space, form) for space in SPACES for form in FORMS if (space, form) != ("two", "labels")]


@pytest.mark.parametrize(("golden_set", "form"), GOLDEN_FORMS, indirect=["golden_set"])
def test_reference_numbers(golden_set, form):
    scores = evaluate(PanopticEvaluator(golden_set, distributed=False), FORMS[form], golden_cases())["panoptic_seg"]
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            assert scores[f"{key.upper()}{suffix}"] == pytest.approx(100 * expected[group][key], abs=1e-10)
    names = read_ground_truth(GOLDEN / "gt.json", GOLDEN / "gt").names
    for number, values in expected["per_class"].items():
        assert scores[f"PQ-{names[int(number)]}"] == pytest.approx(100 * values["pq"], abs=1e-10)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_scores_of_the_plain_function(dataset, tmp_path, form):
    cases = list(guesses(tmp_path / "truth.json"))
    expected = plain_scores(tmp_path / "truth.json", cases)
    assert 0.1 < expected["All"]["pq"] < 0.9
    evaluator = PanopticEvaluator(dataset, tmp_path / "output", distributed=False)
    scores = evaluate(evaluator, form, reversed(cases))["panoptic_seg"]
    assert scores["PQ_st"] == pytest.approx(100 * expected["Stuff"]["pq"], abs=1e-10)
    assert scores["RQ"] == pytest.approx(100 * expected["All"]["rq"], abs=1e-10)
    assert scores["PQ-dog"] == pytest.approx(100 * expected["per_class"][7]["pq"], abs=1e-10)
    assert scores["PQ-never"] == 0
    assert len(scores) == 9 + len(CATEGORIES)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["panoptic_seg_scores.json"]
    written = json.loads((tmp_path / "output" / "panoptic_seg_scores.json").read_text())
    assert written["per_class"]["3"] == pytest.approx(expected["per_class"][3], abs=1e-12)
    assert written["Things"]["n"] == expected["Things"]["n"] == 2


def test_outputs_are_not_modified(dataset, tmp_path):
    evaluator = PanopticEvaluator(dataset, distributed=False)
    image_id, ids, found = next(guesses(tmp_path / "truth.json"))
    labels, segments = as_labels(dataset, ids, found)[0], as_segments(dataset, ids, found)
    before = labels.clone(), json.dumps(segments[1])
    for output in ((labels, None), segments):
        evaluator.reset()
        evaluator.process([{"image_id": image_id}], [{"panoptic_seg": output}])
    assert torch.equal(labels, before[0]) and json.dumps(segments[1]) == before[1]


def test_two_spaces_of_categories(dataset, tmp_path):
    expected = plain_scores(tmp_path / "truth.json", guesses(tmp_path / "truth.json"))
    register(dataset, tmp_path / "truth.json", "two")
    evaluator = PanopticEvaluator(dataset, distributed=False)
    scores = evaluate(evaluator, as_segments, guesses(tmp_path / "truth.json"))["panoptic_seg"]
    assert scores["PQ"] == pytest.approx(100 * expected["All"]["pq"], abs=1e-10)


def test_dumped_predictions_evaluate_to_the_same(dataset, tmp_path, capsys):
    output = tmp_path / "output"
    evaluator = PanopticEvaluator(dataset, output, distributed=False, dump_predictions=True)
    evaluate(evaluator, as_labels, guesses(tmp_path / "truth.json"))
    files = ["--gt-json", str(tmp_path / "truth.json"), "--pred-json", str(output / "panoptic_seg_predictions.json")]
    main([*files, "--output", str(tmp_path / "again.json"), "--workers", "2"])
    first, again = (
        json.loads(path.read_text()) for path in (output / "panoptic_seg_scores.json", tmp_path / "again.json")
    )
    assert first["All"]["n"] == again["All"]["n"] == 4
    for group in ("All", "Things", "Stuff"):
        assert again[group] == pytest.approx(first[group], abs=1e-12)
    assert {key: pytest.approx(values, abs=1e-12) for key, values in first["per_class"].items()} == again["per_class"]


def test_numbers_without_a_color_are_not_written(dataset, tmp_path):
    image_id, ids, found = next(guesses(tmp_path / "truth.json"))
    evaluator = PanopticEvaluator(dataset, tmp_path / "output", distributed=False, dump_predictions=True)
    large = {number + 2**24: category for number, category in found.items()}
    case = (image_id, np.where(ids == 0, 0, ids.astype(np.int64) + 2**24), large)
    with pytest.raises(ValueError, match=r"ids .*0\.\.16777215 to be encoded in .*got 0\.\.1677721"):
        evaluator.process([{"image_id": image_id}], [{"panoptic_seg": as_segments(dataset, *case[1:], torch.int64)}])
    assert not list((tmp_path / "output").rglob("*.png"))


def test_an_image_counts_once_and_strange_ones_do_not(dataset, tmp_path):
    cases = list(guesses(tmp_path / "truth.json"))
    expected = evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, cases)
    strange = [("elsewhere", *cases[0][1:])]
    again = evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, cases + strange + cases[:3])
    assert again == expected


def test_numbers_that_loaders_make_of_names(tmp_path):
    write_truth(tmp_path, 3)
    content = json.loads((tmp_path / "truth.json").read_text())
    for index, annotation in enumerate(content["annotations"]):
        annotation["image_id"] = f"{index:012d}"
    write_json(content, tmp_path / "truth.json")
    name = register("panoptic_numbers", tmp_path / "truth.json")
    cases = list(guesses(tmp_path / "truth.json"))
    scores = evaluate(PanopticEvaluator(name, distributed=False), as_segments, cases)
    numbered = [(int(image_id), *rest) for image_id, *rest in cases]
    assert evaluate(PanopticEvaluator(name, distributed=False), as_segments, numbered) == scores
    MetadataCatalog.remove(name)


def test_the_data_set_is_loaded_where_its_files_are_not_there_yet(tmp_path):
    name = f"panoptic_late_{tmp_path.name}"

    def load():
        write_truth(tmp_path, 4)
        register(name, tmp_path / "truth.json")
        return []

    DatasetCatalog.register(name, load)
    evaluator = PanopticEvaluator(name, distributed=False)
    evaluator.process([{"image_id": "elsewhere"}], [{"panoptic_seg": (torch.zeros(1, 1).int(), [])}])
    assert evaluate(evaluator, as_segments, guesses(tmp_path / "truth.json"))["panoptic_seg"]["PQ"] > 0
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_an_evaluation_resumes_from_saved_counts(dataset, tmp_path):
    cases = list(guesses(tmp_path / "truth.json"))
    whole = evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, cases)
    first, second = (PanopticEvaluator(dataset, distributed=False) for _ in range(2))
    assert {name: len(values) for name, values in first.state_dict().items()}["images"] == 0
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="5 of 8 images"):
        evaluate(first, as_segments, cases[:3])
    second.load_state_dict(first.state_dict())
    assert evaluate(second, as_segments, cases[3:]) == whole
    state = first.state_dict()
    for changes in (
        {"categories": state["categories"][1:]},
        {"images": state["images"] + 8},
        {"sizes": state["sizes"][1:]},
    ):
        with pytest.raises(ValueError, match="do not match the categories and images"):
            second.load_state_dict({**state, **changes})


def test_classes_of_one_name_keep_their_numbers_apart(tmp_path):
    write_truth(tmp_path, 4)
    content = json.loads((tmp_path / "truth.json").read_text())
    content["categories"][2]["name"] = "cat"
    write_json(content, tmp_path / "truth.json")
    name = register("panoptic_names", tmp_path / "truth.json")
    scores = evaluate(PanopticEvaluator(name, distributed=False), as_segments, guesses(tmp_path / "truth.json"))
    assert {"PQ-cat (3)", "PQ-cat (7)", "PQ-sky"} <= set(scores["panoptic_seg"])
    MetadataCatalog.remove(name)


def test_a_small_table_is_logged(dataset, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "spar_d2.evaluation.panoptic.evaluator"):
        scores = evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, guesses(tmp_path / "truth.json"))
    lines = caplog.records[-1].getMessage().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["All", "Things", "Stuff"]
    assert lines[2].split()[1] == f"{scores['panoptic_seg']['PQ']:.2f}"


ZEROS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("record", "output", "message"),
    [
        ({"file_name": "a"}, {"panoptic_seg": (ZEROS, [])}, r'needs "image_id", got \[.file_name.\]'),
        ({}, {"sem_seg": ZEROS}, r'needs "panoptic_seg", got \[.sem_seg.\]'),
        ({}, {"panoptic_seg": (ZEROS, [])}, r"image town_0 \(0.png\) differ in size: \(2, 2\)"),
        ({}, {"panoptic_seg": (ZEROS + 1, [])}, r"differ in size"),
        ({}, {"panoptic_seg": (ZEROS.float(), [])}, r"image town_0 must be \(H, W\) integers, got \(2, 2\) float32"),
        ({}, {"panoptic_seg": (ZEROS, [{"id": 1}])}, 'a segment needs "id" and "category_id"'),
        ({}, {"panoptic_seg": (ZEROS, [{"id": 1, "category_id": 1}] * 2)}, "segment 1 is listed more than once"),
        (
            {},
            {"panoptic_seg": (ZEROS, [{"id": 1, "category_id": 1, "isthing": True}])},
            r"the data set has no thing category 1, it has \[0, 2\]",
        ),
        ({}, {"panoptic_seg": (ZEROS + 9000, None)}, r"has no stuff category 9, it has \[1, 3, 4\]"),
        ({}, {"panoptic_seg": (ZEROS - 2, None)}, r"labels must be -1 \(void\) or more, got -2"),
    ],
)
def test_wrong_outputs_are_named(dataset, record, output, message):
    record = record or {"image_id": "town_0"}
    with pytest.raises(ValueError, match=message):
        PanopticEvaluator(dataset, distributed=False).process([record], [output])


def test_missing_parts_are_named(dataset, tmp_path):
    cases = list(guesses(tmp_path / "truth.json"))
    with pytest.raises(ValueError, match=rf"1 of 8 images .* have no prediction: '{cases[0][0]}'$"):
        evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, cases[1:])
    strange = [("elsewhere", *cases[0][1:])]
    with pytest.raises(ValueError, match=r"8 of 8 images .*, \.\.\.; 1 images are not in it.*'elsewhere'"):
        evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, strange)
    register(dataset, tmp_path / "truth.json")
    with pytest.raises(ValueError, match='no list of segments, and the data set has no "label_divisor"'):
        evaluate(PanopticEvaluator(dataset, distributed=False), as_labels, cases)
    register(dataset, tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, cases)
    register(dataset, tmp_path / "truth.json", ({}, {}))
    with pytest.raises(ValueError, match="has no thing_dataset_id_to_contiguous_id or stuff_dataset_id"):
        evaluate(PanopticEvaluator(dataset, distributed=False), as_own_categories, cases)
    with pytest.raises(ValueError, match="'unheard_of' has no panoptic_json and no panoptic_root"):
        evaluate(PanopticEvaluator("unheard_of", distributed=False), as_own_categories, cases)
    with pytest.raises(ValueError, match="output_dir"):
        PanopticEvaluator(dataset, dump_predictions=True)


def _count_part(rank, folder):
    """One of two processes: counts its part, one image of which both have, and writes down the scores it gets."""
    name = register("panoptic_parts", folder / "truth.json")
    cases = list(guesses(folder / "truth.json"))
    part = cases[:5] if rank == 0 else cases[4:]
    scores = evaluate(PanopticEvaluator(name, folder / "output", dump_predictions=True), as_segments, part)
    (folder / f"{rank}.json").write_text(json.dumps(scores))


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_add_up(dataset, tmp_path):
    expected = evaluate(PanopticEvaluator(dataset, distributed=False), as_segments, guesses(tmp_path / "truth.json"))
    run_in_two_processes(_count_part, tmp_path)
    assert json.loads((tmp_path / "1.json").read_text()) is None
    assert json.loads((tmp_path / "0.json").read_text())["panoptic_seg"] == pytest.approx(
        expected["panoptic_seg"], abs=1e-10
    )
    assert len(read_predictions(tmp_path / "output" / "panoptic_seg_predictions.json")[1]) == 8
