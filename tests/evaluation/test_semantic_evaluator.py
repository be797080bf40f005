import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from processes import run_in_two_processes
from spar_d2.evaluation import SemanticEvaluator, confusion_matrix, segmentation_scores

NAMES = ["sky", "grass", "cat", "dog", "never"]


def register_labels(folder, count, classes=4):
    """Label maps in blocks, with ignored pixels, registered; returns the data set's name."""
    rng = np.random.default_rng(count)
    records = []
    for index in range(count):
        height, width = rng.integers(5, 60, 2)
        labels = rng.integers(0, classes, (height // 4 + 1, width // 4 + 1)).astype(np.uint8)
        labels = labels.repeat(4, 0).repeat(4, 1)[:height, :width]
        labels[rng.random(labels.shape) < 0.1] = 255
        path = folder / f"{index}.png"
        Image.fromarray(labels).save(path)
        records.append({"file_name": f"{index}.jpg", "sem_seg_file_name": str(path)})
    name = f"labels_{folder.name}_{count}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=NAMES, ignore_label=255)
    return name


@pytest.fixture(params=[8])
def dataset(request, tmp_path):
    """Label maps; the class "never" is in none of them."""
    name = register_labels(tmp_path, request.param)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def predictions(name):
    rng = np.random.default_rng(1)
    for record in DatasetCatalog.get(name):
        truth = np.asarray(Image.open(record["sem_seg_file_name"]))
        guess = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape))
        yield record, np.where(guess == 255, 0, guess)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [200], indirect=True)
@pytest.mark.parametrize("boundary_iou", [False, True])
def test_same_scores_as_detectron2(dataset, boundary_iou):
    def load(file, dtype=int):
        # Its own way of reading needs an older numpy.
        return np.array(Image.open(file), dtype=dtype)

    ours = SemanticEvaluator(dataset, distributed=False, boundary_iou=boundary_iou)
    theirs = SemSegEvaluator(dataset, distributed=False, sem_seg_loading_fn=load)
    theirs.reset()
    for record, guess in predictions(dataset):
        scores = torch.nn.functional.one_hot(torch.from_numpy(guess), 5).permute(2, 0, 1).float()
        ours.process([{"file_name": record["file_name"]}], [{"sem_seg_labels": torch.from_numpy(guess)}])
        theirs.process([record], [{"sem_seg": scores}])
    our, their = ours.evaluate()["sem_seg"], theirs.evaluate()["sem_seg"]
    assert {"mIoU", "fwIoU", "mACC", "pACC", "IoU-sky", "ACC-dog", "BoundaryIoU-cat"} <= set(their)
    assert boundary_iou == any("oundary" in key for key in our)
    for key, value in their.items():
        if boundary_iou or not ("B-I" in key or "Boundary" in key):
            assert our[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key
    assert set(our) - set(their) == {"mIoU-all"}


@pytest.mark.parametrize("classes", [2, 200, 256, 847])
@pytest.mark.parametrize("kinds", [("int64", "uint8"), ("uint8", "int32"), ("int64", "uint16")])
def test_counts_of_any_number_of_classes(classes, kinds):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, min(classes + 20, 256 if kinds[1] == "uint8" else 1000), (30, 40)).astype(kinds[1])
    guess = rng.integers(0, min(classes + 20, 256 if kinds[0] == "uint8" else 1000), (30, 40)).astype(kinds[0])
    expected = np.zeros((classes, classes + 1), dtype=int)
    for true, given in zip(truth.ravel().tolist(), guess.ravel().tolist()):
        if true != 7 and true < classes:
            expected[true, min(given, classes)] += 1
    assert (confusion_matrix(guess, truth, classes, ignore_label=7) == expected).all()


def test_boundaries_of_too_many_classes_are_refused(dataset):
    MetadataCatalog.pop(dataset)
    MetadataCatalog.get(dataset).set(stuff_classes=[str(index) for index in range(300)])
    with pytest.raises(ValueError, match="boundary_iou"):
        SemanticEvaluator(dataset, boundary_iou=True)


def test_labels_come_from_the_file_and_not_from_the_mapper(dataset):
    record = DatasetCatalog.get(dataset)[0]
    with Image.open(record["sem_seg_file_name"]) as image:
        truth = torch.from_numpy(np.array(image)).long()
    evaluator = SemanticEvaluator(dataset, False)
    resized = torch.zeros(999, 999)
    evaluator.process([{"file_name": record["file_name"], "sem_seg": resized}], [{"sem_seg_labels": truth}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100
    # For an image that the data set does not have, there is only that.
    evaluator.process([{"file_name": "new", "sem_seg": truth}], [{"sem_seg_labels": truth}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100


def test_ground_truth_in_colors_is_named(dataset):
    record = DatasetCatalog.get(dataset)[0]
    with Image.open(record["sem_seg_file_name"]) as image:
        image.convert("RGB").save(record["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"0\.png .*one number per pixel"):
        SemanticEvaluator(dataset, False).process([record], [{"sem_seg_labels": torch.zeros(image.size[::-1])}])


def test_scores_and_labels_are_the_same_to_it(dataset):
    by_labels, by_scores = SemanticEvaluator(dataset, False), SemanticEvaluator(dataset, False)
    for record, guess in predictions(dataset):
        labels = torch.from_numpy(guess)
        by_labels.process([record], [{"sem_seg_labels": labels}])
        by_scores.process([record], [{"sem_seg": torch.nn.functional.one_hot(labels, 5).permute(2, 0, 1)}])
    assert json.dumps(by_labels.evaluate()) == json.dumps(by_scores.evaluate())


def test_two_averages():
    """Class 2 is not in the truth: Detectron2's average leaves it out, the other counts its false pixels."""
    truth, guess = np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 2]])
    scores = segmentation_scores(confusion_matrix(guess, truth, 4), list("abcd"))
    assert scores["mIoU"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    assert scores["mIoU-all"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert scores["pACC"] == 75
    assert scores["fwIoU"] == pytest.approx(75)
    assert np.isnan(scores["IoU-d"])


def test_ignored_pixels_and_labels_that_are_no_class():
    truth, guess = np.array([0, 0, 255, 9]), np.array([0, 7, 0, 0])
    assert confusion_matrix(guess, truth, 2).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_sums_over_images_equal_one_large_image():
    rng = np.random.default_rng(2)
    truth, guess = rng.integers(0, 6, (40, 50)), rng.integers(0, 6, (40, 50))
    parts = confusion_matrix(guess[:13], truth[:13], 6) + confusion_matrix(guess[13:], truth[13:], 6)
    assert np.array_equal(parts, confusion_matrix(guess, truth, 6))


def test_scores_without_images_are_nan(dataset):
    assert np.isnan(SemanticEvaluator(dataset, False).evaluate()["sem_seg"]["mIoU"])


def test_masks_are_written_only_on_request(dataset, tmp_path):
    from pycocotools import mask as coco_mask

    plain = SemanticEvaluator(dataset, False, tmp_path / "plain")
    dumping = SemanticEvaluator(dataset, False, tmp_path / "dump", dump_predictions=True)
    for record, guess in predictions(dataset):
        for evaluator in (plain, dumping):
            evaluator.process([record], [{"sem_seg_labels": torch.from_numpy(guess)}])
    plain.evaluate(), dumping.evaluate()
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["sem_seg_scores.json"]
    masks = json.loads((tmp_path / "dump" / "sem_seg_predictions.json").read_text())
    record, guess = next(predictions(dataset))
    rebuilt = sum(
        m["category_id"] * coco_mask.decode(m["segmentation"]).astype(int)
        for m in masks
        if m["file_name"] == record["file_name"]
    )
    assert np.array_equal(rebuilt, guess)


def test_missing_parts_are_named(dataset):
    evaluator = SemanticEvaluator(dataset, False)
    with pytest.raises(ValueError, match=r"no ground truth for the image none\.jpg"):
        evaluator.process([{"file_name": "none.jpg"}], [{"sem_seg_labels": torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match=r"0\.jpg differ in size"):
        evaluator.process([{"file_name": "0.jpg"}], [{"sem_seg_labels": torch.zeros(1, 1)}])
    with pytest.raises(ValueError, match="sem_seg_labels"):
        evaluator.process([{"file_name": "0.jpg"}], [{"instances": 1}])
    with pytest.raises(ValueError, match="no stuff_classes"):
        SemanticEvaluator("unheard_of")
    with pytest.raises(ValueError, match="output_dir"):
        SemanticEvaluator(dataset, dump_predictions=True)


def _count_own_image(rank, folder):
    """One of two processes: counts its own image, and writes down the scores it gets."""
    MetadataCatalog.get("halves").set(stuff_classes=["a", "b"])
    evaluator = SemanticEvaluator("halves")
    truth = torch.tensor([[0, 0, 1, 1]])
    guess = truth if rank == 0 else torch.tensor([[0, 1, 1, 1]])
    evaluator.process([{"sem_seg": truth}], [{"sem_seg_labels": guess}])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_add_up(tmp_path):
    run_in_two_processes(_count_own_image, tmp_path)
    assert json.loads((tmp_path / "1.json").read_text()) is None
    assert json.loads((tmp_path / "0.json").read_text())["sem_seg"]["pACC"] == pytest.approx(100 * 7 / 8)


def test_classes_with_the_same_name_have_separate_scores():
    scores = segmentation_scores(np.array([[4, 0, 0, 0], [0, 0, 2, 0], [0, 0, 1, 1]]), ["tree", "tree", "sky"])
    assert {name for name in scores if name.startswith("IoU")} == {"IoU-tree (0)", "IoU-tree (1)", "IoU-sky"}
    assert (scores["IoU-tree (0)"], scores["IoU-tree (1)"], scores["IoU-sky"]) == (100, 0, 25)


def test_unknown_labels_are_one_warning(dataset, caplog):
    evaluator = SemanticEvaluator(dataset, False)
    truth = np.full((4, 5), 255)
    truth[0], truth[1, 0], truth[2] = 7, 5, 0
    for _ in range(2):
        evaluator.process([{"file_name": "x", "sem_seg": truth}], [{"sem_seg_labels": torch.zeros(4, 5).long()}])
    # The counts continue in another evaluator.
    again = SemanticEvaluator(dataset, False)
    again.load_state_dict(evaluator.state_dict())
    scores = again.evaluate()["sem_seg"]
    assert scores["pACC"] == 100
    assert again.evaluate()["sem_seg"]["pACC"] == 100
    told = [record.getMessage() for record in caplog.records]
    assert sum("neither a class (0..4) nor ignored (255)" in text for text in told) == 1
    assert "5 in 2, 7 in 10 pixels" in next(text for text in told if "neither" in text)
    (absent,) = (text for text in told if "have no IoU" in text)
    assert f"{dataset}: 4 of the 5 classes" in absent


def test_valid_labels_give_no_warning(dataset, caplog):
    evaluator = SemanticEvaluator(dataset, False)
    truth = np.arange(20).reshape(4, 5) % 5
    truth[0, 0] = 255
    evaluator.process([{"file_name": "x", "sem_seg": truth}], [{"sem_seg_labels": torch.from_numpy(truth)}])
    evaluator.evaluate()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(("values", "said"), [((0, 255), "of class 0 or ignored (255)"), ((255, 255), "are ignored")])
def test_masks_of_0_and_255_are_a_warning(dataset, caplog, values, said):
    """Also by an evaluator that was loaded with the counts of another one."""
    evaluator = SemanticEvaluator(dataset, False)
    truth = np.array([values, values], dtype=np.uint8)
    evaluator.process([{"file_name": "x", "sem_seg": truth}], [{"sem_seg_labels": torch.zeros(2, 2).long()}])
    again = SemanticEvaluator(dataset, False)
    again.load_state_dict(evaluator.state_dict())
    again.evaluate()
    (told,) = (text for text in caplog.messages if "second class" in text)
    assert said in told and told.startswith(f"{dataset}: ") and "write it as 1" in told


def test_score_files_are_json(dataset, tmp_path):
    """Also where classes have no score."""
    evaluator = SemanticEvaluator(dataset, False, tmp_path)
    truth = np.zeros((2, 2), dtype=np.uint8)
    evaluator.process([{"file_name": "x", "sem_seg": truth}], [{"sem_seg_labels": torch.zeros(2, 2).long()}])
    scores = evaluator.evaluate()["sem_seg"]
    text = (tmp_path / "sem_seg_scores.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert None in read.values()
    assert {name: np.nan if value is None else value for name, value in read.items()} == pytest.approx(
        scores, nan_ok=True
    )
