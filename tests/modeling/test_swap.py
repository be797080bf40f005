"""The backbones in Detectron2's own, unmodified configs: forward, and one training step, at an odd size."""

import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.projects import deeplab, point_rend
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from spar_d2.encoders import build_encoder
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.pyramid import SPARPyramid

HEIGHT, WIDTH = SIZE = (103, 167)


def labeled_image(polygons: bool = False) -> dict:
    boxes = [[15.0, 10, 75, 60], [100.0, 50, 160, 95]]
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor(boxes))
    instances.gt_classes = torch.tensor([3, 17])
    outlines = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
    instances.gt_masks = PolygonMasks(outlines) if polygons else BitMasks(masks)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    labels = torch.randint(0, 54, SIZE)
    return {"image": image, "instances": instances, "sem_seg": labels, "height": HEIGHT, "width": WIDTH}


def deeplab_image() -> dict:
    """A training record of Panoptic-DeepLab: semantic labels, centers and offsets, with their weights."""
    return {
        "image": torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8),
        "sem_seg": torch.randint(0, 19, SIZE),
        "sem_seg_weights": torch.ones(SIZE),
        "center": torch.rand(SIZE),
        "center_weights": torch.ones(SIZE),
        "offset": 10 * torch.randn(2, *SIZE),
        "offset_weights": torch.ones(SIZE),
        "height": HEIGHT,
        "width": WIDTH,
    }


def zoo_config(path: str, tiny_model, backbone: str = "SPARPyramid"):
    cfg = get_cfg()
    if path:
        cfg.merge_from_file(model_zoo.get_config_file(path))
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED = tiny_model
    return cfg


def check_training_step(model, record: dict, loss: str) -> None:
    """One step changes the trained parameters and no others."""
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    with EventStorage():
        losses = model([record])
    assert loss in losses
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("resblocks.2." in name for name in changed)
    assert not any("resblocks.0." in name or "conv1" in name for name in changed if "encoder" in name)
    assert any("simfp" in name for name in changed) or isinstance(model.backbone, SPARViT)


@pytest.mark.slow
def test_panoptic_fpn(panoptic_cfg):
    torch.manual_seed(0)
    model = build_model(panoptic_cfg)
    record = labeled_image()
    with torch.no_grad():
        output = model.eval()([record])[0]
    assert output["sem_seg"].shape[1:] == SIZE
    assert output["panoptic_seg"][0].shape == SIZE
    check_training_step(model, record, "loss_sem_seg")


@pytest.mark.parametrize("backbone", ["SPARViT", "SPARPyramid"])
def test_a_head_that_asks_for_a_missing_level_is_told_the_keys(panoptic_cfg, backbone):
    panoptic_cfg.MODEL.BACKBONE.NAME = backbone
    panoptic_cfg.MODEL.SPAR.OUT_FEATURES = ("dense",)
    with pytest.raises(ValueError, match=r"no feature map 'p\d'.*MODEL\.SPAR\.OUT_FEATURES"):
        build_model(panoptic_cfg)


@pytest.mark.slow
def test_mask_rcnn(tiny_model):
    torch.manual_seed(0)
    model = build_model(zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", tiny_model))
    with torch.no_grad():
        output = model.eval()([labeled_image(polygons=True)])[0]
    assert output["instances"].image_size == SIZE
    check_training_step(model, labeled_image(polygons=True), "loss_mask")


TO_P7 = ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.slow
def test_retinanet(tiny_model):
    torch.manual_seed(0)
    cfg = zoo_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", tiny_model)
    cfg.MODEL.SPAR.OUT_FEATURES = TO_P7
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["instances"].image_size == SIZE
    check_training_step(model, labeled_image(), "loss_box_reg")


@pytest.mark.slow
def test_fcos(tiny_model):
    torch.manual_seed(0)
    config = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    net = SPARViT(build_encoder(*tiny_model), config.pixel_mean, config.pixel_std, "BGR", trainable="last_blocks:1")
    config.backbone = SPARPyramid(net, TO_P7)
    model = instantiate(config)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["instances"].image_size == SIZE
    check_training_step(model, labeled_image(), "loss_fcos_loc")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["SPARPyramid", "SPARViT"])
def test_semantic_segmentor(tiny_model, backbone):
    torch.manual_seed(0)
    cfg = zoo_config("", tiny_model, backbone)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    if backbone == "SPARViT":
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES, cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = ["dense"], 16
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["sem_seg"].shape == (54, *SIZE)
    check_training_step(model, labeled_image(), "loss_sem_seg")


@pytest.fixture
def panoptic_deeplab(monkeypatch):
    """Detectron2's project, whose data mapper, which is not used here, wants one function of a package."""
    if importlib.util.find_spec("panopticapi") is None:
        package, utils = ModuleType("panopticapi"), ModuleType("panopticapi.utils")
        utils.rgb2id = lambda rgb: rgb.astype("int64") @ [1, 256, 65536]
        monkeypatch.setitem(sys.modules, "panopticapi", package)
        monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)
    return importlib.import_module("detectron2.projects.panoptic_deeplab")


@pytest.mark.slow
@pytest.mark.parametrize("features", [["res2", "res3", "res5"], ["res2", "res3", "res4"]], ids=["res5", "res4"])
def test_panoptic_deeplab(tiny_model, panoptic_deeplab, features):
    torch.manual_seed(0)
    cfg = get_cfg()
    panoptic_deeplab.add_panoptic_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PanopticDeepLabSemSegHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = cfg.MODEL.INS_EMBED_HEAD.IN_FEATURES = features
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = cfg.MODEL.INS_EMBED_HEAD.PROJECT_FEATURES = ["res2", "res3"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = cfg.MODEL.INS_EMBED_HEAD.PROJECT_CHANNELS = [32, 64]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = cfg.MODEL.INS_EMBED_HEAD.ASPP_CHANNELS = 32
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.INS_EMBED_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.HEAD_CHANNELS = cfg.MODEL.INS_EMBED_HEAD.HEAD_CHANNELS = 32
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = 19, "hard_pixel_mining"
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = True
    cfg.MODEL.PANOPTIC_DEEPLAB.USE_DEPTHWISE_SEPARABLE_CONV = True
    cfg.MODEL.SEM_SEG_HEAD.NORM = cfg.MODEL.INS_EMBED_HEAD.NORM = "BN"
    cfg.DATASETS.TRAIN = ("cityscapes_fine_panoptic_train",)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "SPARPyramid", "", "cpu"
    cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED = tiny_model
    cfg.MODEL.SPAR.OUT_FEATURES = features
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([deeplab_image()])[0]
    assert output["panoptic_seg"][0].shape == SIZE
    # Batch norms of its pooling branch need two images.
    record = deeplab_image()
    check_training_step(_Twice(model), record, "loss_sem_seg")


class _Twice(torch.nn.Module):
    """Runs a model on the same input twice in one batch."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.backbone = model, model.backbone

    def forward(self, records):
        return self.model(records * 2)


@pytest.mark.slow
def test_pointrend(tiny_model):
    """Both of Detectron2's projects for it: masks of instances, and semantic segmentation."""
    torch.manual_seed(0)
    cfg = zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", tiny_model)
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "PointRendMaskHead", ""
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["instances"].image_size == SIZE
    check_training_step(model, labeled_image(), "loss_mask_point")


@pytest.mark.slow
def test_pointrend_for_semantic_segmentation(tiny_model):
    torch.manual_seed(0)
    cfg = zoo_config("", tiny_model)
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticSegmentor", "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["sem_seg"].shape == (54, *SIZE)
    check_training_step(model, labeled_image(), "loss_sem_seg_point")


@pytest.mark.slow
def test_deeplab_v3_plus(tiny_model):
    torch.manual_seed(0)
    cfg = zoo_config("", tiny_model)
    deeplab.add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticSegmentor", "DeepLabV3PlusHead"
    cfg.MODEL.SPAR.OUT_FEATURES = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res4"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NORM = 54, "BN"
    cfg.INPUT.CROP.ENABLED = False
    model = build_model(cfg)
    with torch.no_grad():
        output = model.eval()([labeled_image()])[0]
    assert output["sem_seg"].shape == (54, *SIZE)
    check_training_step(_Twice(model), labeled_image(), "loss_sem_seg")


def documented_vitdet(tiny_model):
    """ViTDet as Detectron2 ships it, changed by the lines of docs/frameworks.md, but with a tiny encoder."""
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()
    lines = re.search(r"^## ViTDet.*?\n\n((?:    .*\n)+)", page, re.MULTILINE).group(1)
    config = model_zoo.get_config("common/models/mask_rcnn_vitdet.py")
    config.optimizer = model_zoo.get_config("common/optim.py").AdamW
    exec(textwrap.dedent(lines), {"model": config.model, "optimizer": config.optimizer})
    backbone = config.model.backbone
    backbone.net.encoder.name, backbone.net.encoder.pretrained = tiny_model
    backbone.square_pad = 256
    config.model.proposal_generator.pre_nms_topk = config.model.proposal_generator.post_nms_topk = (50, 20)
    return config


@pytest.mark.slow
def test_vitdet(tiny_model):
    torch.manual_seed(0)
    config = documented_vitdet(tiny_model)
    model = instantiate(config.model)
    config.optimizer.params.model = model
    rates = {group["lr"] for group in instantiate(config.optimizer).param_groups}
    assert len(rates) > 1 and max(rates) == config.optimizer.lr
    assert model.backbone.padding_constraints == {"size_divisibility": 64, "square_size": 256}
    seen = []
    model.backbone.net.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    with torch.no_grad():
        output = model.eval()([labeled_image(polygons=True)])[0]
    assert output["instances"].image_size == SIZE
    assert seen == [(1, 3, 256, 256)]
    check_training_step(model, labeled_image(polygons=True), "loss_mask")


def test_other_frameworks_configs_know_the_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL:\n  SPAR:\n    TRAINABLE: none\n  BACKBONE:\n    NAME: SPARPyramid\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg.MODEL.SPAR.TRAINABLE == "none"
    with pytest.raises((KeyError, AssertionError), match="NO_SUCH_KEY"):
        cfg.merge_from_list(["MODEL.SPAR.NO_SUCH_KEY", 1])
