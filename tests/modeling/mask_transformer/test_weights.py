"""Weights of a head with other settings are refused; those of a classifier for other classes are not."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from small_mask_transformers import small_model
from spar_d2.checkpoint.checkpointer import Checkpointer

NODE = "MODEL.MASK_TRANSFORMER"
JOINED = [f"{NODE}.ENCODER_BLOCKS", 2, "MODEL.SPAR.TRAINABLE", "last_blocks:2"]


@pytest.mark.parametrize("checkpointer", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize(
    ("keys", "common", "found"),
    [
        ([f"{NODE}.QUERIES", 20], [], r"head\.queries \(3, 32\) instead of \(5, 32\), head\.places"),
        ([f"{NODE}.QUERIES", 20], JOINED, r"head\.queries \(12, 128\) instead of \(20, 128\), head\.places"),
        ([f"{NODE}.CENTER_SHARE", 0.0], [], r"unknown keys \(head\.centers\."),
        ([f"{NODE}.BLOCKS", 3], [], r"missing keys \(head\.blocks\.2\."),
        ([f"{NODE}.WIDTH", 64], [], r"mismatched shapes"),
    ],
)
def test_other_settings_are_refused(checkpointer, keys, common, found, tmp_path):
    torch.save({"model": small_model(*common).state_dict()}, tmp_path / "model.pth")
    with pytest.raises(
        RuntimeError, match=rf"MODEL\.WEIGHTS: .*model\.pth does not fit.*{found}.*{NODE}.*config\.yaml"
    ):
        checkpointer(small_model(*keys, *common)).load(str(tmp_path / "model.pth"))


def test_weights_for_other_classes_are_taken(tmp_path):
    trained = small_model()
    torch.nn.init.normal_(trained.head.queries)
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    model = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    assert torch.equal(model.head.queries, trained.head.queries)
    assert model.classifier.predictor.weight.shape == (3 + 5 + 1, 32)


def test_more_centers_in_inference_take_the_same_weights(tmp_path):
    trained = small_model()
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    model = small_model(f"{NODE}.TEST_CENTERS", 40)
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    assert torch.equal(model.head.queries, trained.head.queries)
