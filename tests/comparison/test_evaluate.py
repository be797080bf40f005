"""Evaluation on small copies of all benchmarks, from official files to the table."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

from label_trees import make_tree
from spar_d2.comparison import evaluate as benchmarks
from spar_d2.comparison.evaluate import FINISHED, evaluate_methods
from spar_d2.comparison.methods import Method
from spar_d2.comparison.protocol import config_for
from spar_d2.comparison.tables import Score, paper_table, summary
from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.data.preparation import prepare
from spar_d2.engine.trainer import Trainer
from spar_d2.teacher import TEACHER_REGISTRY, FunctionTeacher

# Short side, long side at most, logit scale, probability, area: the paper's, with those of OpenCLIP's family on VOC21.
PROTOCOL = {
    "voc21": (672, 2048, 65, 0.1, 0.1),
    "cityscapes": (1024, 2048, 40, 0, 0),
    "context60": (672, 2048, 50, 0.1, 0),
}
OTHERS = (672, 2048, 40, 0, 0)
SINGLE = Method("single pass")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def resized(file, short, longest):
    with Image.open(file) as image:
        image = image.convert("RGB")
        scale = min(short / min(image.size), longest / max(image.size))
        size = [int(side * scale + 0.5) for side in image.size]
        return torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1), image.size


def mean_iou(pairs, classes):
    ious = []
    for number in range(classes):
        union = sum(int((((guess == number) & (truth != 255)) | (truth == number)).sum()) for guess, truth in pairs)
        both = sum(int(((guess == number) & (truth == number)).sum()) for guess, truth in pairs)
        if any((truth == number).any() for _, truth in pairs):
            ious.append(both / union)
    return 100 * float(np.mean(ious))


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_from_official_files_to_the_score(name, root, tiny_cfg, tmp_path):
    expected = make_tree(name, root, np.random.default_rng(0))
    prepare(name, root, partial=True)
    (score,) = evaluate_methods(tiny_cfg, [SINGLE], [name], tmp_path / "out")

    short, longest, scale, probability, area = PROTOCOL.get(name, OTHERS)
    spar = tiny_cfg.MODEL.SPAR
    spar.VOCABULARY, spar.LOGIT_SCALE = name, float(scale)
    spar.PROB_THRESHOLD, spar.AREA_THRESHOLD = float(probability), float(area)
    model = build_model(tiny_cfg).eval()
    pairs = []
    for record in DatasetCatalog.get(name):
        image, (width, height) = resized(record["file_name"], short, longest)
        labels = model([{"image": image, "height": height, "width": width}])[0]["sem_seg_labels"].numpy()
        pairs.append((labels, expected[record["image_id"]]))
    assert len(pairs) == score.images == len(expected)
    assert len({label for labels, _ in pairs for label in np.unique(labels)}) > 1
    assert score.scores["mIoU"] == pytest.approx(mean_iou(pairs, len(BENCHMARKS[name].classes)), abs=1e-9)


@pytest.mark.slow
def test_finished_results_are_reused_unless_settings_change(root, tiny_cfg, tmp_path, monkeypatch):
    make_tree("voc20", root, np.random.default_rng(0))
    prepare("voc20", root, partial=True)
    built = []
    build = benchmarks.build_segmentor
    monkeypatch.setattr(benchmarks, "build_segmentor", lambda *arguments: built.append(1) or build(*arguments))

    def evaluate(limit=None, **keys):
        for key, value in keys.items():
            tiny_cfg.MODEL.SPAR[key] = value
        return evaluate_methods(tiny_cfg, [SINGLE], ["voc20"], tmp_path, limit)[0]

    first = evaluate()
    assert evaluate() == first and len(built) == 1
    assert evaluate(limit=1).images == 1 and len(built) == 2
    evaluate(VOCABULARY="voc20")
    assert len(built) == 3
    assert evaluate(VOCABULARY="") == first and len(built) == 3
    tiny_cfg.SPAR.TEACHER.STRIDE = 32
    assert evaluate() == first, "a single pass has no stride"
    (tmp_path / FINISHED).write_text("damaged")
    assert evaluate().scores == pytest.approx(first.scores, nan_ok=True) and len(built) == 4
    label = DatasetCatalog.get("voc20")[0]["sem_seg_file_name"]
    with Image.open(label) as image:
        changed = np.array(image)[::-1]
    Image.fromarray(np.ascontiguousarray(changed)).save(label)
    assert evaluate().scores["mIoU"] != first.scores["mIoU"] and len(built) == 5
    assert [path.name for path in tmp_path.glob("unfinished*")] == []


@pytest.mark.slow
def test_results_of_a_teacher_are_reused_only_with_its_identity(root, tiny_cfg, tmp_path, monkeypatch):
    make_tree("voc20", root, np.random.default_rng(0))
    prepare("voc20", root, partial=True)
    encoded, counts = [], []

    def features(image):
        encoded.append(image)
        return torch.randn(64, *(-(-side // 8) for side in image.shape[1:]))

    tiny_cfg.SPAR.TEACHER.KIND = "own"
    method = Method("own", ["MODEL.SPAR.INFERENCE", "teacher"])
    for identity in ("version 1", "version 1", "version 2", "", ""):
        teacher = FunctionTeacher(features, identity)
        monkeypatch.setitem(TEACHER_REGISTRY._obj_map, "own", lambda cfg, teacher=teacher: teacher)
        evaluate_methods(tiny_cfg, [method], ["voc20"], tmp_path, 1)
        counts.append(len(encoded))
    assert counts == [2, 2, 4, 6, 8], "each image is encoded once, and the first one also to warm up"


def test_missing_data_sets_are_an_error_before_evaluation(root, tiny_cfg, tmp_path, monkeypatch):
    make_tree("voc20", root, np.random.default_rng(0))
    prepare("voc20", root, partial=True)
    monkeypatch.setattr(benchmarks, "build_segmentor", None)
    with pytest.raises(FileNotFoundError, match="ade20k"):
        evaluate_methods(tiny_cfg, [SINGLE], ["voc20", "ade20k"], tmp_path)


@pytest.mark.slow
def test_the_trainer_tests_each_data_set_by_its_own_protocol(root, tiny_cfg):
    expected = {}
    for name in ("voc21", "cityscapes"):
        expected[name] = make_tree(name, root, np.random.default_rng(0))
        prepare(name, root, partial=True)
    tiny_cfg.DATASETS.TEST = tuple(expected)
    model = build_model(tiny_cfg).eval()
    seen = []
    model.register_forward_hook(lambda model, inputs, _: seen.append((model.logit_scale, inputs[0][0]["image"].shape)))
    results = Trainer.test(tiny_cfg, model)
    assert list(results) == ["voc21", "cityscapes"]
    assert "IoU-aeroplane" in results["voc21"]["sem_seg"] and "IoU-rider" in results["cityscapes"]["sem_seg"]
    assert [(scale, min(shape[1:])) for scale, shape in seen] == [(65.0, 672)] * 3 + [(40.0, 1024)] * 3
    assert model.logit_scale == 40.0

    tiny_cfg.SPAR.TEST.PROTOCOL = "config"
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.DATASETS.TEST = 64, ("voc21",)
    tiny_cfg.TEST.AUG.ENABLED, tiny_cfg.TEST.AUG.MIN_SIZES, tiny_cfg.TEST.AUG.FLIP = True, (48,), False
    sizes = []
    model.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(min(inputs[0].shape[2:])))
    scores = Trainer.test(tiny_cfg, model)["sem_seg"]
    assert sizes == [48] * 3
    assert not any("Boundary" in key for key in scores)


def test_optional_files_are_written_on_request(root, tiny_cfg):
    make_tree("voc20", root, np.random.default_rng(0))
    prepare("voc20", root, partial=True)
    test = tiny_cfg.SPAR.TEST
    tiny_cfg.DATASETS.TEST = ("voc20",)
    test.PROTOCOL, test.BOUNDARY_IOU, test.DUMP_PREDICTIONS = "config", True, True
    scores = Trainer.test(tiny_cfg, build_model(tiny_cfg).eval())["sem_seg"]
    assert "BoundaryIoU-cat" in scores
    with open(f"{tiny_cfg.OUTPUT_DIR}/inference/voc20/sem_seg_predictions.json") as file:
        assert len({mask["file_name"] for mask in json.load(file)}) == 3


def test_settings_of_other_families(tiny_cfg):
    tiny_cfg.MODEL.SPAR.ENCODER = "ViT-B-16-SigLIP2-512"
    spar = config_for(tiny_cfg, "voc21").MODEL.SPAR
    assert (spar.LOGIT_SCALE, spar.PROB_THRESHOLD, spar.AREA_THRESHOLD) == (65, 0, 0)


def test_wrong_keys_are_named(tiny_cfg):
    tiny_cfg.SPAR.TEST.PROTOCOL = "papers"
    with pytest.raises(ValueError, match=r"SPAR\.TEST\.PROTOCOL .*paper, config; got 'papers'"):
        config_for(tiny_cfg, "voc21")
    tiny_cfg.SPAR.TEST.PROTOCOL = "paper"
    tiny_cfg.MODEL.SPAR.VOCABULARY = "voc20"
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.VOCABULARY .*20 .*'voc21' .*21"):
        config_for(tiny_cfg, "voc21")


def score(method, dataset, miou, seconds=1.0, images=None):
    images = BENCHMARKS[dataset].images if images is None else images
    return Score(method, dataset, f"{method}{dataset}", images, {"mIoU": miou, "IoU-x": float("nan")}, seconds)


def test_the_table_is_the_papers():
    six = ("voc21", "voc20", "cityscapes", "ade20k", "context60", "context59")
    scores = [score("a", name, 10.0 * number, 0.1) for number, name in enumerate(six, 1)]
    scores += [score("b", name, 50.0) for name in (*six[:2], "coco_object")]
    lines = paper_table(scores, missing=["ade20k"]).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["mIoU", "VOC21", "VOC20", "CS", "ADE", "C60", "C59", "Mean", "COCO-Obj"]
    assert rows[2] == ["a", "10.0", "20.0", "30.0", "40.0", "50.0", "60.0", "35.0", "-"]
    assert rows[3] == ["b", "50.0", "50.0", "-", "-", "-", "-", "-", "50.0"]
    assert rows[7] == ["a", *["0.100"] * 7, "-"]
    assert lines[-1] == "- Not found on disk: ade20k."
    assert summary(scores, [])["mean mIoU"] == {"a": pytest.approx(35.0), "b": None}


def test_data_sets_in_part_are_named_and_json_is_json():
    part = score("a", "voc21", 1.0, images=7)
    assert "- VOC21: 7 of 1449 images." in paper_table([part])
    text = json.dumps(summary([part], ["ade20k"]), allow_nan=False)
    assert json.loads(text)["not found"] == ["ade20k"]
    again = Score.from_plain(json.loads(text)["scores"][0])
    assert np.isnan(again.scores.pop("IoU-x")) and again.scores == {"mIoU": 1.0}
