"""MaskTransformer on own data sets by one YAML file: panoptic or semantic, also without things or without stuff."""

import json

import pytest
import yaml

from own_sets import CATEGORIES, forget, panoptic_set, semantic_set
from reference import ROOT
from spar_d2.data.build import build_labeled_loader
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer
from spar_d2.modeling.mask_transformer.vocabulary_classes import dataset_vocabulary

OWN = str(ROOT / "configs/panoptic/own_data_mask_transformer.yaml")
NODE = "MODEL.MASK_TRANSFORMER"


@pytest.fixture(autouse=True)
def catalogs_as_they_were():
    yield
    forget()


def load(file, *overrides, trains=False):
    name = file.stem
    sets = ["SPAR.DATA.REGISTER", str(file), "DATASETS.TRAIN", f"{name}_train", "DATASETS.TEST", f"{name}_val"]
    return load_config(OWN, ["MODEL.DEVICE", "cpu", *sets, *overrides], trains=trains)


def of_kind(folder, isthing):
    """A panoptic set whose classes are all things, or all stuff."""
    file = panoptic_set(folder)
    for path in folder.glob("panoptic_*.json"):
        content = json.loads(path.read_text())
        content["categories"] = [{**category, "isthing": isthing} for category in CATEGORIES]
        path.write_text(json.dumps(content))
    return file


def values(cfg):
    return cfg.MODEL.MASK_TRANSFORMER.TASK, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES


def test_task_and_classes_are_those_of_the_file(tmp_path):
    for name, isthing, expected in (("a", None, (1, 3)), ("b", 0, (0, 4)), ("c", 1, (3, 1))):
        (tmp_path / name).mkdir()
        file = panoptic_set(tmp_path / name) if isthing is None else of_kind(tmp_path / name, isthing)
        assert values(load(file)) == ("panoptic", *expected)
        forget()
    cfg = load(semantic_set(tmp_path))
    assert (cfg.MODEL.MASK_TRANSFORMER.TASK, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == ("semantic", 3)


def test_synonyms_of_the_file_are_words(tmp_path):
    file = panoptic_set(tmp_path)
    content = yaml.safe_load(file.read_text())
    name = CATEGORIES[0]["name"]
    content["classes"] = [{"name": c["name"]} for c in CATEGORIES]
    content["classes"][0]["synonyms"] = ["vessel", "ship"]
    file.write_text(yaml.safe_dump(content))
    load(file)
    words = dataset_vocabulary(f"{file.stem}_val", True).vocabulary.classes
    assert (name, "vessel", "ship") in words and len(words) == len(CATEGORIES)


def test_a_task_that_does_not_fit_is_named(tmp_path):
    message = r"TRANSFORMER\.TASK must be semantic, the task for the label maps of 'beach_train' .*got panoptic"
    with pytest.raises(ValueError, match=message):
        load(semantic_set(tmp_path), f"{NODE}.TASK", "panoptic")
    (tmp_path / "b").mkdir()
    file = panoptic_set(tmp_path / "b")
    mixed = ["DATASETS.TEST", "boats_val,beach_val", "SPAR.DATA.REGISTER", f"{file},{tmp_path / 'beach.yaml'}"]
    with pytest.raises(ValueError, match=r"TASK must be semantic, .* 'beach_val' .*got panoptic for 'boats_train'"):
        load(file, *mixed)


def test_words_may_be_tested_on_other_classes(tmp_path):
    """Only the training data fix the numbers of classes."""
    file = panoptic_set(tmp_path)
    (tmp_path / "b").mkdir()
    other = of_kind(tmp_path / "b", 1)
    other = other.rename(other.with_name("others.yaml"))
    sets = ["SPAR.DATA.REGISTER", f"{file},{other}", "DATASETS.TEST", "others_val"]
    assert values(load(file, *sets, f"{NODE}.CLASSIFIER", "text")) == ("panoptic", 1, 3)
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES must be 3, .*'others_val'"):
        load(file, *sets)


def test_the_task_is_checked_for_all_data_sets():
    """Also for sets that have no data-set file."""
    cfg = load_config(OWN, ["DATASETS.TRAIN", "spar_scenes_panoptic_train", f"{NODE}.TASK", "semantic"])
    with pytest.raises(ValueError, match=r"TASK must be panoptic for \['spar_scenes_panoptic_train'\]"):
        build_labeled_loader(cfg, 0)
    cfg = load_config(OWN, ["DATASETS.TRAIN", "spar_scenes_train"])
    with pytest.raises(
        ValueError, match=r"\['spar_scenes_train'\] have no annotations.*set MODEL\.MASK_TRANSFORMER\.TASK semantic"
    ):
        build_labeled_loader(cfg, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["panoptic", "no things", "no stuff", "semantic", "words"])
def test_training_and_evaluation(kind, tmp_path, tiny_model):
    if kind == "semantic":
        file = semantic_set(tmp_path)
    else:
        isthing = {"no things": 0, "no stuff": 1}.get(kind)
        file = panoptic_set(tmp_path) if isthing is None else of_kind(tmp_path, isthing)
    small = {"QUERIES": 8, "WIDTH": 32, "BLOCKS": 1, "HEADS": 2, "POINTS": 64, "OBJECT_THRESHOLD": 0.0}
    small["CLASSIFIER"] = "text" if kind == "words" else "learned"
    short = ["SOLVER.IMS_PER_BATCH", 2, "SPAR.DATA.EPOCHS", 1, "SOLVER.WARMUP_ITERS", 1, "SOLVER.AMP.ENABLED", False]
    short += ["INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", 48, "DATALOADER.NUM_WORKERS", 0]
    model = ["MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
    model += ["MODEL.SPAR.TEMPLATES", "simple", "OUTPUT_DIR", str(tmp_path / "run")]
    head = [part for key, value in small.items() for part in (f"{NODE}.{key}", value)]
    (tmp_path / "run").mkdir()
    cfg = load(file, *short, *model, *head, trains=True)
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.iter == 2
    if kind == "semantic":
        assert {"mIoU", "IoU-sand", "IoU-boat"} <= trainer.scores["sem_seg"].keys()
    else:
        assert {"PQ", "PQ-sand", "PQ-sea", "PQ-boat"} <= trainer.scores["panoptic_seg"].keys()
