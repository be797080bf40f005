"""Configs of MaskTransformer: each gives a model with the classes of its data sets, and images of one size."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import AugInput, AugmentationList, RandomCrop
from detectron2.modeling import build_model

from reference import ROOT, reference_image
from spar_d2.engine.setup import load_config
from spar_d2.engine.solver import build_optimizer
from spar_d2.modeling.mask_transformer import MaskTransformer
from spar_d2.utils.panoptic_numbers import separate_numbers

YAMLS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if not path.name.startswith("Base-")]


def is_mask_transformer(path) -> bool:
    """Whether a config or one of its bases has the model."""
    lines = path.read_text().splitlines()
    bases = [path.parent / line.split()[1] for line in lines if line.startswith("_BASE_:")]
    return "  META_ARCHITECTURE: MaskTransformer" in lines or any(map(is_mask_transformer, bases))


FILES = [path for path in YAMLS if is_mask_transformer(path)]
OWN = ROOT / "configs/panoptic/own_data_mask_transformer.yaml"
TRAINED = [path for path in FILES if "toy" not in path.parts and path != OWN]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
every_set = pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)


def load(path, *overrides):
    return load_config(str(path), ["MODEL.DEVICE", "cpu", *overrides])


def test_all_presets_are_found():
    assert {path.parent.name for path in FILES} == {"toy", "panoptic", "semantic", "open_vocabulary"}
    assert len(FILES) > 10


@pytest.mark.slow
@every_file
def test_the_model_is_built_and_segments(path):
    cfg = load(path, "MODEL.SPAR.PRETRAINED", "", "MODEL.SPAR.TEMPLATES", "simple", "MODEL.SPAR.TEXT_CACHE", "")
    if path == OWN:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2, 4
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    assert isinstance(model, MaskTransformer) and len(model.laterals) == min(3, len(model.backbone.encoder.blocks) - 1)
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert any(id(p) in trained for p in model.backbone.encoder.parameters()) == path.stem.endswith("_all")
    if model.vocabulary is not None:
        model.set_vocabulary("things: cat; stuff: sky")
    with torch.no_grad():
        (result,) = model([{"image": torch.from_numpy(reference_image(32, 48).transpose(2, 0, 1).copy())}])
    assert set(result) == ({"panoptic_seg"} if cfg.MODEL.MASK_TRANSFORMER.TASK == "panoptic" else {"sem_seg_labels"})


@every_set
def test_classes_are_those_of_the_data_sets(path):
    cfg = load(path)
    text = cfg.MODEL.MASK_TRANSFORMER.CLASSIFIER == "text"
    for name in [*cfg.DATASETS.TRAIN, *(() if text else cfg.DATASETS.TEST)]:
        metadata = MetadataCatalog.get(name)
        if cfg.MODEL.MASK_TRANSFORMER.TASK == "semantic":
            assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == len(metadata.stuff_classes)
        else:
            numbers = separate_numbers(name, metadata.as_dict())
            assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(numbers.things)
            assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 1 + len(numbers.stuff)


@every_set
def test_crops_of_usual_images_have_one_size(path):
    cfg = load(path)
    crop = [RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)]
    augmentations = AugmentationList([*crop, *build_augmentation(cfg, is_train=True)])
    sizes = set()
    for size in [(1024, 2048)] if "cityscapes_mask" in path.name else [(512, 683), (683, 512), (1024, 768)]:
        augmented = AugInput(reference_image(*size))
        augmentations(augmented)
        sizes.add(augmented.image.shape[:2])
    assert len(sizes) == 1 and len(set(sizes.pop())) == 1


@every_set
def test_hours_are_marked_as_estimated(path):
    if "coco_to" in path.name:
        return
    comment = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "hours on 1 H200" in comment and "(estimated" in comment.replace("# ", "") and "not run" in comment
