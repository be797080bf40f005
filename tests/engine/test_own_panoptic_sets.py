"""PanopticFPN on data sets that users register by Detectron2's own functions, and on some that it cannot learn from."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from PIL import Image

from reference import ROOT
from spar_d2.data.build import build_labeled_loader
from spar_d2.data.datasets.panoptic import has_panoptic_masks
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer
from spar_d2.evaluation import PanopticEvaluator
from spar_d2.utils.panoptic_numbers import separate_numbers

# Category ids of things and stuff, and their numbers where both are counted together, and apart.
THINGS, STUFF = (7, 11), (5, 20)
TOGETHER = {"thing": {7: 1, 11: 2}, "stuff": {5: 0, 20: 3}}
APART = {"thing": {7: 0, 11: 1}, "stuff": {5: 1, 20: 2}}
FROM_ZERO = {"thing": {7: 0, 11: 1}, "stuff": {5: 0, 20: 1}}


@pytest.fixture
def registered(tmp_path):
    """Registers two images of two things on two kinds of ground; some records have no "iscrowd", none has a size."""
    names = []

    def register(maps, images=2):
        name = f"own_panoptic_{len(names)}"
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": n, "name": str(n), "isthing": int(n in THINGS)} for n in (*THINGS, *STUFF)]
        for number in range(images):
            ids = np.full((96, 128), 1)
            ids[48:], ids[10:40, 20:60], ids[60:90, 70:110] = 2, 3, 4
            pixels = np.stack([ids, 0 * ids, 0 * ids], axis=-1).astype(np.uint8)
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / f"masks/{number}.png")
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(60 * pixels).save(tmp_path / f"images/{number}.jpg")
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 96, "width": 128})
            segments = [{"id": n, "category_id": c} for n, c in enumerate((*STUFF, *THINGS), start=1)]
            segments[0]["iscrowd"] = 0
            content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        (tmp_path / "panoptic.json").write_text(json.dumps(content))
        metadata = {f"{kind}_dataset_id_to_contiguous_id": numbers for kind, numbers in maps.items()}
        metadata |= {"thing_classes": ["a", "b"], "stuff_classes": ["c", "d"]}
        folders = [str(tmp_path / place) for place in ("images", "masks", "panoptic.json")]
        register_coco_panoptic(name, metadata, *folders)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(folder, name, *overrides):
    heads = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
    short = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 1, "DATALOADER.NUM_WORKERS", 0]
    sets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    path = str(ROOT / "configs/toy/panoptic.yaml")
    return load_config(path, [*heads, *short, *sets, "OUTPUT_DIR", str(folder / "run"), *overrides])


@pytest.mark.parametrize("maps", [TOGETHER, APART, FROM_ZERO], ids=["together", "apart", "from zero"])
def test_training_records_have_instances_and_labels(registered, tmp_path, maps):
    name = registered(maps)
    assert has_panoptic_masks(name)
    batch = next(iter(build_labeled_loader(config(tmp_path, name, "INPUT.RANDOM_FLIP", "none"), 0)))
    for record in batch:
        assert record["instances"].gt_classes.tolist() == [0, 1]
        assert record["instances"].gt_boxes.tensor.tolist() == [[20, 10, 60, 40], [70, 60, 110, 90]]
        assert record["sem_seg"].unique().tolist() == [0, 1, 2]
        assert (record["sem_seg"][0, 0], record["sem_seg"][15, 30], record["sem_seg"][95, 0]) == (1, 0, 2)


@pytest.mark.parametrize("maps", [TOGETHER, APART, FROM_ZERO], ids=["together", "apart", "from zero"])
def test_its_predictions_are_counted_for_the_right_categories(registered, maps):
    name = registered(maps)
    evaluator = PanopticEvaluator(name, distributed=False, separate=True)
    for record in DatasetCatalog.get(name):
        ids = torch.from_numpy(np.array(Image.open(record["pan_seg_file_name"]))[..., 0].astype(np.int32))
        kinds = [(1, False), (2, False), (0, True), (1, True)]
        segments = [{"id": n, "category_id": c, "isthing": thing} for n, (c, thing) in enumerate(kinds, start=1)]
        evaluator.process([record], [{"panoptic_seg": (ids, segments)}])
    scores = evaluator.evaluate()["panoptic_seg"]
    assert {scores[key] for key in ("PQ", "PQ_th", "PQ_st", "PQ-5", "PQ-7", "PQ-11", "PQ-20")} == {100}


@pytest.mark.slow
def test_training_and_evaluation(registered, tmp_path):
    trainer = Trainer(config(tmp_path, registered(TOGETHER)))
    trainer.train()
    assert {"PQ", "PQ-5", "PQ-20"} <= set(trainer.test(trainer.cfg, trainer.model)["panoptic_seg"])


def test_data_sets_of_detectron2_and_of_this_package():
    names = ("coco_2017_train_panoptic", "spar_scenes_panoptic_val", "cityscapes_fine_panoptic_train")
    assert all(map(has_panoptic_masks, names))
    others = ("coco_2017_val_panoptic_separated", "coco_2017_train", "spar_scenes_val", "unheard_of")
    assert not any(map(has_panoptic_masks, others))
    metadata = [MetadataCatalog.get(f"coco_2017_val_panoptic{end}").as_dict() for end in ("", "_separated")]
    ours = MetadataCatalog.get("spar_coco_panoptic_val").as_dict()
    numbers = [separate_numbers("coco", each) for each in (*metadata, ours)]
    assert numbers[0].own_things == numbers[1].own_things == numbers[2].own_things
    assert numbers[0].own_stuff == numbers[1].own_stuff == numbers[2].own_stuff
    assert (len(numbers[0].things), len(numbers[0].stuff)) == (80, 53)


@pytest.mark.parametrize("maps", [{}, {"thing": {7: 0, 11: 1}}])
@pytest.mark.parametrize("part", ["train", "test"])
def test_metadata_without_numbers_are_named(registered, tmp_path, maps, part):
    name = registered(maps)
    cfg = config(tmp_path, name)
    with pytest.raises(ValueError, match=f"{name}' has no .*stuff_dataset_id_to_contiguous_id in its metadata: regis"):
        Trainer.build_train_loader(cfg) if part == "train" else Trainer.build_test_loader(cfg, name)


def test_missing_files_are_named(registered, tmp_path):
    name = registered(TOGETHER)
    (tmp_path / "images/0.jpg").unlink()
    with pytest.raises(ValueError, match=rf"DATASETS\.TRAIN: {name} cannot be loaded, is it there\? .*images/0\.jpg"):
        Trainer.build_train_loader(config(tmp_path, name))


@pytest.mark.parametrize(
    ("model", "missing"),
    [("PanopticFPN", "annotations and no sem_seg_file_name"), ("SemanticSegmentor", "sem_seg_file_name")],
)
def test_data_sets_without_the_required_labels_are_named(registered, tmp_path, model, missing):
    name = "own_without_labels"
    DatasetCatalog.register(name, lambda: [{"file_name": "a.jpg", "height": 9, "width": 9, "image_id": 0}])
    try:
        with pytest.raises(ValueError, match=rf"{model} is trained on .*{name}.* have no {missing};"):
            Trainer.build_train_loader(config(tmp_path, name, "MODEL.META_ARCHITECTURE", model))
    finally:
        DatasetCatalog.remove(name)
