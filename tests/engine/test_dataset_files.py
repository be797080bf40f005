"""Data-set files in configs: class counts, epochs, training and evaluation, and sets of imported modules."""

import functools
import json
import math

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from own_sets import CATEGORIES, SIZE, forget, labels, panoptic_set, semantic_set
from reference import ROOT
from spar_d2.cli.__main__ import main
from spar_d2.comparison.evaluate import _content
from spar_d2.data.datasets.file_registration import register_dataset_file
from spar_d2.engine.derived_keys import given_keys
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer
from spar_d2.probing.trainer import ProbeTrainer

PROBE = str(ROOT / "configs/linear_probe/own_data.yaml")
PANOPTIC = str(ROOT / "configs/panoptic/own_data.yaml")
TOY = str(ROOT / "configs/toy/panoptic.yaml")
BEACH = ["DATASETS.TRAIN", "beach_train", "DATASETS.TEST", "beach_val"]
BOATS = ["DATASETS.TRAIN", "boats_train", "DATASETS.TEST", "boats_val"]


@pytest.fixture(autouse=True)
def catalogs_as_they_were():
    yield
    forget()


@pytest.fixture
def tiny(tiny_model, tmp_path):
    """Overrides for a short training of the tiny CLIP on the CPU."""
    model = ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "DATALOADER.NUM_WORKERS", "0"]
    return [*model, *sizes, "MODEL.SPAR.PRECISION", "float32", "OUTPUT_DIR", str(tmp_path / "run"), "SEED", "1"]


def registering(file, *overrides):
    return ["SPAR.DATA.REGISTER", str(file), *overrides]


def test_class_counts_are_those_of_the_file(tmp_path):
    (tmp_path / "a").mkdir()
    cfg = load_config(PROBE, registering(semantic_set(tmp_path), *BEACH))
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3 and cfg.DATASETS.TRAIN == ("beach_train",)
    cfg = load_config(PANOPTIC, registering(panoptic_set(tmp_path / "a"), *BOATS))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (1, 3)


def test_a_count_that_is_given_is_checked(tmp_path):
    file = semantic_set(tmp_path)
    key = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    assert load_config(PROBE, registering(file, *BEACH, key, "3")).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    # 54 is also Detectron2's default.
    with pytest.raises(ValueError, match=rf"{key} must be 3, .*'beach_train' .*, got 54 in the command line"):
        load_config(PROBE, registering(file, *BEACH, key, "54"))
    with pytest.raises(ValueError, match=rf"{key} must be 3, .*got 13 in .*toy/linear_probe\.yaml"):
        load_config(str(ROOT / "configs/toy/linear_probe.yaml"), registering(file, *BEACH))


def test_counts_of_a_panoptic_config_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES must be 1, .*got 8 in .*Base-panoptic\.yaml"):
        load_config(TOY, registering(panoptic_set(tmp_path), *BOATS))


def test_mistakes_are_found_before_training(tmp_path):
    file = semantic_set(tmp_path)
    (tmp_path / "labels/val/1_gt.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"beach\.yaml: splits\.val\.labels: 1 of 2 images have no label map"):
        load_config(PROBE, registering(file, *BEACH))
    assert load_config(PROBE, registering(file, *BEACH[:2])).DATASETS.TEST == ()
    with pytest.raises(FileNotFoundError, match=r"SPAR\.DATA\.REGISTER: there is no file none\.yaml"):
        load_config(PROBE, registering("none.yaml"))
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: 'beach_tain' is not registered; did you mean beach_train"):
        load_config(PROBE, registering(file, "DATASETS.TRAIN", "beach_tain"))


def test_files_are_found_beside_the_config(tmp_path, monkeypatch):
    semantic_set(tmp_path)
    (tmp_path / "c.yaml").write_text("SPAR:\n  DATA:\n    REGISTER: ['beach.yaml']\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cfg = load_config(str(tmp_path / "c.yaml"), BEACH)
    assert cfg.SPAR.DATA.REGISTER == (str(tmp_path / "beach.yaml"),)


def epochs(tmp_path, file_keys, *overrides, base=None):
    content = {"SPAR": {"DATA": {}}, "SOLVER": {}} if base is None else {"_BASE_": base}
    for key, value in file_keys.items():
        node = content
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return load_config(str(tmp_path / "config.yaml"), [*BEACH, *overrides], trains=True)


def test_steps_follow_from_epochs_and_schedules_are_scaled(tmp_path):
    keys = {"SPAR.DATA.REGISTER": [str(semantic_set(tmp_path))], "SPAR.DATA.EPOCHS": 10, "SOLVER.IMS_PER_BATCH": 2}
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: 200, STEPS: [100, 150], WARMUP_ITERS: 20}\n")
    cfg = epochs(tmp_path, keys, base="base.yaml")
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (20, (10, 15), 2)
    assert epochs(tmp_path, keys, "SOLVER.WARMUP_ITERS", "7", base="base.yaml").SOLVER.WARMUP_ITERS == 7
    assert epochs(tmp_path, keys, "SPAR.DATA.EPOCHS", "3", base="base.yaml").SOLVER.MAX_ITER == 6
    # More specific than the epochs.
    assert epochs(tmp_path, keys, "SOLVER.MAX_ITER", "9", base="base.yaml").SOLVER.MAX_ITER == 9
    # The stored config of a run has both.
    assert load_config(str(tmp_path / "config.yaml"), BEACH).SOLVER.MAX_ITER == 200


def test_epochs_and_steps_that_disagree_are_refused(tmp_path):
    keys = {"SPAR.DATA.REGISTER": [str(semantic_set(tmp_path))], "SPAR.DATA.EPOCHS": 10, "SOLVER.IMS_PER_BATCH": 2}
    assert epochs(tmp_path, {**keys, "SOLVER.MAX_ITER": 20}).SOLVER.MAX_ITER == 20
    with pytest.raises(ValueError, match=r"SPAR\.DATA\.EPOCHS and SOLVER\.MAX_ITER .* 20 steps, but .* is 21"):
        epochs(tmp_path, {**keys, "SOLVER.MAX_ITER": 21})
    with pytest.raises(ValueError, match=r"set in the command line and disagree"):
        epochs(tmp_path, keys, "SPAR.DATA.EPOCHS", "1", "SOLVER.MAX_ITER", "5")
    with pytest.raises(ValueError, match=r"SPAR\.DATA\.EPOCHS must be 0 \(off\) or more, got -1"):
        epochs(tmp_path, keys, "SPAR.DATA.EPOCHS", "-1")


def test_epochs_count_the_images_of_a_folder(photo_folder, tmp_path):
    images = ["SPAR.DATA.IMAGES", str(photo_folder), "SPAR.DATA.EPOCHS", "100", "SOLVER.IMS_PER_BATCH", "7"]
    cfg = load_config("distill/openclip_vit_b_16_sampled.yaml", [*images, "MODEL.DEVICE", "cpu"], trains=True)
    assert cfg.SOLVER.MAX_ITER == math.ceil(300 / 7)


def test_the_most_specific_place_of_a_key_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 3}\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nSOLVER: {MAX_ITER: 4, BASE_LR: 1.0}\n")
    given = given_keys(str(tmp_path / "b.yaml"), ["SOLVER.BASE_LR", 2.0])
    levels = {key: origin.level for key, origin in given.items()}
    assert levels == {"SOLVER.BASE_LR": 0, "SOLVER.MAX_ITER": 1, "SEED": 2}


@pytest.mark.slow
def test_a_probe_is_trained_and_evaluated(tmp_path, tiny):
    file = semantic_set(tmp_path)
    short = ["SPAR.DATA.EPOCHS", "60", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.1", "SOLVER.WARMUP_ITERS", "1"]
    cfg = load_config(PROBE, registering(file, *BEACH, *tiny, *short), trains=True)
    (tmp_path / "run").mkdir()
    trainer = ProbeTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    scores = trainer.scores["sem_seg"]
    assert {"IoU-sand", "IoU-sea", "IoU-boat"} <= scores.keys()
    # The first row is ignored, and the ground is a matter of position and color, which is the same in all images.
    assert scores["pACC"] > 60


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_another_size_are_named(tmp_path, tiny, workers, capfd):
    file = semantic_set(tmp_path)
    for number in range(4):
        Image.fromarray(labels(number)[:40] + 1).save(tmp_path / f"labels/train/{number}_gt.png")
    overrides = registering(file, *BEACH, *tiny, "DATALOADER.NUM_WORKERS", str(workers), "SPAR.PROBE.CACHE_DIR", "")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config-file", PROBE, *overrides])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1 and len(lines) == 1
    assert "label map: " in lines[0] and "_gt.png has 64x40 pixels, but its image has 64x48" in lines[0]


@pytest.mark.slow
def test_a_panoptic_model_is_trained_and_evaluated(tmp_path, tiny):
    small = ["SOLVER.IMS_PER_BATCH", 2, "SPAR.DATA.EPOCHS", 1, "SOLVER.WARMUP_ITERS", 1, "SOLVER.AMP.ENABLED", False]
    heads = ["MODEL.SPAR.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
    cfg = load_config(PANOPTIC, registering(panoptic_set(tmp_path), *BOATS, *tiny, *small, *heads), trains=True)
    (tmp_path / "run").mkdir()
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.iter == 2
    assert {"PQ", "PQ-sand", "PQ-sea", "PQ-boat"} <= trainer.scores["panoptic_seg"].keys()


MODULE = """
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic, register_coco_panoptic_separated
root = {root!r}
things, stuff = {{30: 0}}, {{10: 1, 20: 2}}
maps = {{"thing_dataset_id_to_contiguous_id": things, "stuff_dataset_id_to_contiguous_id": stuff}}
names = {{"thing_classes": ["boat"], "stuff_classes": ["things", "sand", "sea"]}}
files = (root + "/train", root + "/panoptic_train", root + "/panoptic_train.json")
register_coco_panoptic("imported_panoptic", {{**maps, **names}}, *files)
register_coco_panoptic_separated("imported", {{**maps, **names}}, *files, root + "/stuff", root + "/instances.json")
DatasetCatalog.register("imported_semantic", lambda: [
    {{"file_name": f"{{root}}/train/{{n}}.jpg", "sem_seg_file_name": f"{{root}}/stuff/{{n}}.png", "image_id": n}}
    for n in range(4)
])
MetadataCatalog.get("imported_semantic").set(stuff_classes=names["stuff_classes"], evaluator_type="sem_seg")
"""


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports a module that registers a set by each of Detectron2's ways, as `--import` does."""
    panoptic_set(tmp_path)
    (tmp_path / "stuff").mkdir()
    content = {"images": [], "annotations": [], "categories": [CATEGORIES[2]]}
    for number in range(4):
        stuff = np.array([1, 2, 0], dtype=np.uint8)[labels(number)]
        Image.fromarray(stuff).save(tmp_path / f"stuff/{number}.png")
        x, y = 8 + number, 20
        polygon = [x, y, x + 20, y, x + 20, y + 16, x, y + 16]
        size = {"height": SIZE[0], "width": SIZE[1]}
        content["images"].append({"id": number, "file_name": f"{number}.jpg", **size})
        thing = {"id": number + 1, "image_id": number, "category_id": 30, "iscrowd": 0, "area": 320}
        content["annotations"].append({**thing, "bbox": [x, y, 20, 16], "segmentation": [polygon]})
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "my_sets_of_a_test.py").write_text(MODULE.format(root=str(tmp_path)))
    monkeypatch.setenv("SPAR_D2_IMPORTS", '["", []]')
    monkeypatch.chdir(tmp_path)
    names = ("imported_panoptic", "imported_separated", "imported_stuffonly", "imported_semantic")
    yield functools.partial(main, ["--import", "my_sets_of_a_test.py", "doctor"])
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.slow
def test_sets_of_an_imported_module_are_trained_on(imported, tiny, tmp_path, monkeypatch):
    imported()
    small = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1, "SOLVER.AMP.ENABLED", False]
    heads = ["MODEL.SPAR.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
    counts = ["MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
    (tmp_path / "run").mkdir()
    for name in ("imported_panoptic", "imported_separated"):
        sets = ["DATASETS.TRAIN", name, "DATASETS.TEST", name]
        trainer = Trainer(load_config(PANOPTIC, [*tiny, *small, *heads, *counts, *sets]))
        trainer.train()
        assert {"PQ", "PQ-boat", "PQ-sea"} <= trainer.scores["panoptic_seg"].keys()
    sets = ["DATASETS.TRAIN", "imported_semantic", "DATASETS.TEST", "imported_semantic"]
    probe = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 1]
    cfg = load_config(PROBE, [*tiny, *probe, *sets, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3])
    trainer = ProbeTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert {"IoU-sand", "IoU-sea"} <= trainer.scores["sem_seg"].keys()


def test_a_data_set_file_can_be_imported(tmp_path, monkeypatch, capsys):
    semantic_set(tmp_path)
    monkeypatch.setenv("SPAR_D2_IMPORTS", '["", []]')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["--import", "beach.yaml", "prepare", "--help"])
    assert len(DatasetCatalog.get("beach_val")) == 2
    (tmp_path / "bad.yaml").write_text("a: 1\n")
    with pytest.raises(SystemExit, match=r"--import: .*bad\.yaml: a: unknown key"):
        main(["--import", "bad.yaml", "prepare", "--help"])


def test_images_of_all_sets_are_distilled_on(tmp_path, tiny):
    """Labels are not needed."""
    (tmp_path / "a").mkdir()
    files = f"{semantic_set(tmp_path)},{panoptic_set(tmp_path / 'a')}"
    sizes = ["SPAR.DATA.SCALE_BOX", "(64, 48)", "SPAR.DATA.MIN_SHORT_SIDE", 32, "SPAR.DATA.CROP_MIN_SIDE", 32]
    sets = ["SPAR.DATA.REGISTER", files, "DATASETS.TRAIN", "beach_train,boats_train"]
    cfg = load_config(str(ROOT / "configs/distill/Base-distill.yaml"), [*tiny, *sizes, *sets])
    assert len(Trainer.build_train_loader(cfg).photos) == 8


def test_results_of_other_words_or_values_are_not_reused(tmp_path):
    file = semantic_set(tmp_path)
    text, checksums = file.read_text(), set()
    for before, after in (("", ""), ("water", "ocean"), ("value: 1", "value: 7")):
        file.write_text(text.replace(before, after) if before else text)
        register_dataset_file(file)
        checksums.add(_content("beach_val", DatasetCatalog.get("beach_val")))
    assert len(checksums) == 3
