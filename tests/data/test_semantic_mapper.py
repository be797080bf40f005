"""Labels that are trained on are the numbers that the evaluator reads."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MapDataset, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from reference import reference_image
from spar_d2.data.build import build_labeled_loader
from spar_d2.data.semantic_mapper import ImageMapper, SemanticMapper
from spar_d2.evaluation import SemanticEvaluator

SIZE = (24, 40)


@pytest.fixture(params=["gray", "palette", "16 bits"])
def record(request, tmp_path):
    Image.fromarray(reference_image(*SIZE)).save(tmp_path / "image.png")
    labels = np.random.default_rng(0).integers(0, 4, SIZE).astype(np.uint8)
    if request.param == "16 bits":
        labels = np.array([0, 2, 300, 4000], dtype=np.uint16)[labels]
    image = Image.fromarray(labels)
    if request.param == "palette":
        image = image.convert("P")
        image.putdata(labels.ravel().tolist())
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(tmp_path / "labels.png")
    return {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}, labels


def mapper(*augmentations):
    return SemanticMapper(is_train=True, augmentations=list(augmentations), image_format="BGR")


def test_labels_are_the_numbers_in_the_file(record):
    record, labels = record
    mapped = mapper()(record)
    assert mapped["sem_seg"].dtype == torch.int64
    assert np.array_equal(mapped["sem_seg"].numpy(), labels)
    assert mapped["image"].shape == (3, *SIZE)


def test_labels_move_with_their_image(record):
    record, labels = record
    crop = T.CropTransform(5, 3, 20, 16)
    augmentations = [T.ResizeTransform(*SIZE, 48, 80), T.HFlipTransform(80), crop]
    mapped = mapper(*augmentations)(record)
    expected = labels.repeat(2, 0).repeat(2, 1)[:, ::-1][3:19, 5:25]
    assert np.array_equal(mapped["sem_seg"].numpy(), expected)


def test_added_pixels_are_ignored(record):
    record, labels = record
    mapped = mapper(T.PadTransform(0, 0, 3, 2, SIZE[1], SIZE[0], seg_pad_value=255))(record)
    assert np.array_equal(mapped["sem_seg"][: SIZE[0], : SIZE[1]].numpy(), labels)
    assert (mapped["sem_seg"][SIZE[0] :] == 255).all() and (mapped["sem_seg"][:, SIZE[1] :] == 255).all()


def test_colors_and_wrong_images_are_refused(tmp_path):
    Image.fromarray(reference_image(*SIZE)).save(tmp_path / "image.png")
    record = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "image.png")}
    with pytest.raises(ValueError, match=r"image\.png .*one number per pixel"):
        mapper()(record)
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    for read in (mapper(), ImageMapper(is_train=False, augmentations=[], image_format="BGR")):
        with pytest.raises(ValueError, match=r"photo\.jpg .*not an image"):
            read({"file_name": str(tmp_path / "photo.jpg")})


@pytest.fixture
def dataset(record, request):
    record, labels = record
    name = f"semantic_{request.node.name}"
    count = int(labels.max()) + 1
    DatasetCatalog.register(name, lambda: [{**record, "image_id": 0}])
    MetadataCatalog.get(name).set(stuff_classes=[str(number) for number in range(count)], ignore_label=65000)
    yield name, count
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_the_loader_and_the_evaluator_agree(dataset):
    """A model that predicts its training labels is always right."""
    name, count = dataset
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (name,), (SIZE[0],), "none"
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "SemanticSegmentor", count
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    (mapped,) = next(iter(build_labeled_loader(cfg, 0)))
    evaluator = SemanticEvaluator(name, distributed=False)
    evaluator.process([{"file_name": mapped["file_name"]}], [{"sem_seg_labels": mapped["sem_seg"]}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100


def test_labels_that_are_no_class_stop_the_training_of_detectron2s_heads(dataset):
    name, count = dataset
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), False
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "SemanticSegmentor", count - 1
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    with pytest.raises(ValueError, match=r"labels of .*labels\.png .*0\.\."):
        next(iter(build_labeled_loader(cfg, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("last", "told"), [(255, 1), (1, 0)])
def test_masks_of_0_and_255_are_one_warning(tmp_path, workers, last, told):
    """Beside one whose other images have a second class."""
    Image.fromarray(reference_image(*SIZE)).save(tmp_path / "image.png")
    records = []
    for number in range(20):
        mask = np.zeros(SIZE, dtype=np.uint8)
        mask[:, 20:] = 255 if number < 4 else last
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        records.append({"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / f"{number}.png")})
    loader = torch.utils.data.DataLoader(MapDataset(records, mapper()), num_workers=workers, collate_fn=list)
    # Loading processes share it.
    handler = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger("spar_d2").addHandler(handler)
    assert len(list(loader)) == 20
    logging.getLogger("spar_d2").removeHandler(handler)
    assert (tmp_path / "log.txt").read_text().count("of class 0 or ignored (255)") == told
