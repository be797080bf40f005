import logging
from dataclasses import replace

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from spar_d2.data.datasets import class_names
from spar_d2.data.datasets import semantic as labeled
from spar_d2.data.datasets.catalog import BENCHMARKS, LABELED_SETS, TRAINING_SPLITS
from spar_d2.data.datasets.semantic import found, missing, register_benchmarks
from spar_d2.data.preparation.registry import GROUPS, PREPARATIONS
from spar_d2.encoders import registry
from spar_d2.text import Vocabulary


def test_the_papers_table():
    assert list(BENCHMARKS) == ["voc21", "voc20", "cityscapes", "ade20k", "context60", "context59", "coco_object"]
    assert [benchmark.title for benchmark in BENCHMARKS.values() if benchmark.in_mean] == [
        *("VOC21", "VOC20", "CS", "ADE", "C60", "C59")
    ]
    assert [b.images for b in BENCHMARKS.values()] == [1449, 1449, 500, 2000, 5105, 5105, 5000]
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


def test_training_splits_are_no_benchmarks():
    assert {name: split.images for name, split in TRAINING_SPLITS.items()} == {
        "voc21_train": 1464,
        "cityscapes_train": 2975,
        "ade20k_train": 20210,
    }
    for name, split in TRAINING_SPLITS.items():
        benchmark = BENCHMARKS[name.removesuffix("_train")]
        assert (split.name, split.classes, split.colors()) == (name, benchmark.classes, benchmark.colors())
    assert list(LABELED_SETS) == [*BENCHMARKS, *TRAINING_SPLITS]


def test_every_data_set_has_a_preparation():
    assert list(PREPARATIONS)[: len(LABELED_SETS)] == list(LABELED_SETS)
    assert all(name == preparation.name for name, preparation in PREPARATIONS.items())
    assert {name for group in GROUPS.values() for name in group} <= set(PREPARATIONS)
    panoptic = {name: PREPARATIONS[name].expected for name in list(PREPARATIONS)[len(LABELED_SETS) :]}
    assert panoptic == {
        "cityscapes_panoptic_train": 2975,
        "cityscapes_panoptic_val": 500,
        "ade20k_panoptic_train": 20210,
        "ade20k_panoptic_val": 2000,
    }


def test_settings_are_config_keys():
    from detectron2.config import get_cfg

    cfg = get_cfg()
    for benchmark in BENCHMARKS.values():
        cfg.merge_from_list([word for pair in benchmark.settings("SigLIP").items() for word in pair])
        assert cfg.INPUT.MIN_SIZE_TEST == (1024 if benchmark.name == "cityscapes" else 672)
        assert cfg.INPUT.MAX_SIZE_TEST == 2048
        assert cfg.MODEL.SPAR.LOGIT_SCALE == {"voc21": 65, "context60": 50}.get(benchmark.name, 40)
        assert cfg.MODEL.SPAR.PROB_THRESHOLD == (0.1 if benchmark.name == "context60" else 0)
        assert cfg.MODEL.SPAR.AREA_THRESHOLD == 0


def test_thresholds_of_openclip_are_others_on_voc21():
    family = registry.find_family("ViT-B-16").name
    different = {
        name: {key for key, value in benchmark.settings(family).items() if value != benchmark.settings("SigLIP")[key]}
        for name, benchmark in BENCHMARKS.items()
    }
    assert different.pop("voc21") == {"MODEL.SPAR.PROB_THRESHOLD", "MODEL.SPAR.AREA_THRESHOLD"}
    assert not any(different.values())
    settings = BENCHMARKS["voc21"].settings(family)
    assert settings["MODEL.SPAR.PROB_THRESHOLD"] == settings["MODEL.SPAR.AREA_THRESHOLD"] == 0.1


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_vocabulary_has_the_classes_in_their_order(benchmark):
    vocabulary = Vocabulary.load(benchmark.name)
    assert len(vocabulary) == len(benchmark.classes) == len(set(benchmark.classes))
    for official, name, words in zip(benchmark.classes, vocabulary.names, vocabulary.classes):
        assert official.replace(" ", "") in {word.replace(" ", "") for word in (name, *words)}


def test_classes_are_in_the_order_of_detectron2s_own():
    from detectron2.data.datasets.builtin_meta import (
        ADE20K_SEM_SEG_CATEGORIES,
        CITYSCAPES_CATEGORIES,
        COCO_CATEGORIES,
    )

    assert BENCHMARKS["cityscapes"].classes == tuple(category["name"] for category in CITYSCAPES_CATEGORIES)
    things = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]
    assert BENCHMARKS["coco_object"].classes == ("background", *things)
    assert list(BENCHMARKS["context59"].classes) == sorted(BENCHMARKS["context59"].classes)
    for theirs, ours in zip(ADE20K_SEM_SEG_CATEGORIES, Vocabulary.load("ade20k").classes):
        assert any(word.strip() in ours for word in theirs.split(",")) or theirs == "pool" and "swimming pool" in ours


@pytest.mark.parametrize("data", LABELED_SETS.values(), ids=LABELED_SETS)
def test_registered_without_looking_at_the_disk(data, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    assert data.name in DatasetCatalog
    metadata = MetadataCatalog.get(data.name)
    assert metadata.stuff_classes == list(data.classes)
    assert len({tuple(color) for color in metadata.stuff_colors}) == len(data.classes)
    assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 255)
    assert metadata.vocabulary == data.name.removesuffix("_train")
    assert metadata.vocabulary in Vocabulary.built_in()


def test_things_of_ade20k():
    """In the order of the instance challenge's classes, some of which are given here from its own list."""
    things = class_names.ADE20K_THINGS
    assert len(things) == len(set(things)) == 100
    official = {1: "bed", 2: "window", 4: "person", 8: "chair", 9: "car", 15: "seat", 24: "column", 36: "bookcase"}
    official |= {50: "bus", 56: "street lamp", 66: "ship", 77: "food", 91: "tray", 95: "monitor", 100: "flag"}
    assert {number: class_names.ADE20K[things[number - 1]] for number in official} == official


def test_colors_of_voc_are_its_own():
    assert BENCHMARKS["voc21"].colors()[15] == BENCHMARKS["voc20"].colors()[14] == [192, 128, 128]


@pytest.mark.parametrize("name", LABELED_SETS)
def test_missing_data_sets_are_an_error_with_instructions(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"download .* unpack .* then run spar-d2 prepare {name} "):
        DatasetCatalog.get(name)
    assert found(name) == (0, LABELED_SETS[name].images)
    part = "training" if name in TRAINING_SPLITS else "validation"
    assert missing(name).startswith(f"{name}: 0 of {LABELED_SETS[name].images} {part} images are prepared; {tmp_path}")


def test_a_name_that_is_taken_stays_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(labeled, "LABELED_SETS", {"mine": replace(BENCHMARKS["voc20"], name="mine")})
    DatasetCatalog.register("mine", lambda: [{"file_name": "a.png"}])
    try:
        with caplog.at_level(logging.WARNING):
            register_benchmarks()
        assert DatasetCatalog.get("mine") == [{"file_name": "a.png"}]
        assert MetadataCatalog.get("mine").get("stuff_classes") is None
        assert "'mine' is already registered" in caplog.text
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_metadata_that_are_set_stay_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(labeled, "LABELED_SETS", {"mine": replace(BENCHMARKS["voc20"], name="mine")})
    MetadataCatalog.get("mine").stuff_classes = ["a"]
    try:
        with caplog.at_level(logging.WARNING):
            register_benchmarks()
        assert MetadataCatalog.get("mine").stuff_classes == ["a"]
        assert "metadata of 'mine' are already set" in caplog.text
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")
