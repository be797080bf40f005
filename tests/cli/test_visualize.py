"""`spar-d2 visualize`: predictions beside the ground truth."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

from own_sets import forget, panoptic_set, semantic_set
from reference import ROOT
from spar_d2.cli.__main__ import main
from spar_d2.data.datasets.file_registration import register_dataset_file
from spar_d2.demo.ground_truth import draw_beside_truth, truth_reader
from spar_d2.demo.panoptic import build_demo
from spar_d2.engine.setup import load_config

CONFIGS = {
    "segment": ("configs/segment/Base-segment.yaml", semantic_set, "beach"),
    "probe": ("configs/linear_probe/own_data.yaml", semantic_set, "beach"),
    "panoptic": ("configs/panoptic/own_data.yaml", panoptic_set, "boats"),
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path, tiny_model):
    """Config file, data set and overrides of a model with the tiny CLIP."""
    config, write_set, name = CONFIGS[request.param]
    encoder = ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
    heads = ["MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]
    encoder += [*heads, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SPAR.OUT_CHANNELS", "32"]
    encoder += ["MODEL.SPAR.TEMPLATES", "simple", "INPUT.MIN_SIZE_TEST", "48", "MODEL.SPAR.PRECISION", "float32"]
    yield str(ROOT / config), f"{name}_val", [*encoder, "SPAR.DATA.REGISTER", str(write_set(tmp_path))]
    forget()


@pytest.mark.slow
def test_pictures_have_both_sides(model, tmp_path, capsys):
    config, name, overrides = model
    folder = tmp_path / "drawn"
    torch.manual_seed(0)
    cfg = load_config(config, [*overrides, "DATASETS.TEST", name])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    flags = ["--weights", str(tmp_path / "model.pth"), "--dataset", name, "--output", str(folder), "--count", "5"]
    main(["visualize", "--config-file", config, *flags, "--opts", *overrides])
    assert f"2 pictures of {name}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["001_0.png", "002_1.png", "overview.png"]
    with Image.open(folder / "001_0.png") as picture:
        assert picture.width > 2 * 64 and picture.height > 48


def test_the_truth_is_that_of_the_data_set(model):
    config, name, overrides = model
    cfg = load_config(config, [*overrides, "DATASETS.TEST", name])
    demo = build_demo(cfg, ["overlay"])
    read = truth_reader(demo, name)
    record = DatasetCatalog.get(name)[0]
    truth = read(record)
    names = [*demo.names, "(ignored)"]
    found = {names[number] for number in np.unique(truth.labels)}
    assert {"sand", "sea", "boat"} <= found <= {"sand", "sea", "boat", "(ignored)"}
    assert names[truth.labels[30, 12]] == "boat" and names[truth.labels[5, 5]] == "sand"
    (image, true_picture, seen_picture), both, present = draw_beside_truth(demo, record, read)
    assert image.shape == true_picture.shape == seen_picture.shape == (48, 64, 3)
    assert {names[number] for number in present} >= found and both.shape[1] > 2 * 64


def test_a_set_with_other_classes_is_refused(tmp_path, tiny_cfg):
    tiny_cfg.DATASETS.TEST = ("spar_scenes_val",)
    demo = build_demo(tiny_cfg, ["overlay"])
    register_dataset_file(semantic_set(tmp_path))
    try:
        with pytest.raises(ValueError, match="beach_val has 3 classes, but the model has 13"):
            truth_reader(demo, "beach_val")
    finally:
        forget()
