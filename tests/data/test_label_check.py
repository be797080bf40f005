"""Labels are checked in the processes that read them, with the name of their file."""

import pytest
import torch
from detectron2.config import get_cfg

import spar_d2  # noqa: F401  registers
from spar_d2.data.label_check import LabelCheck


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    return cfg


@pytest.mark.parametrize("given", [{"image": torch.zeros(3, 40, 50)}, {"features": torch.zeros(8, 3, 4)}])
def test_labels_that_are_no_class_are_named_with_their_file(cfg, given):
    labels = torch.zeros(40, 50, dtype=torch.int64)
    check = LabelCheck(cfg, lambda record: {**given, "sem_seg": labels}, patch_size=16)
    record = {"sem_seg_file_name": "street.png"}
    labels[3, 4] = 255
    assert torch.equal(check(record)["sem_seg"], labels)
    for wrong in (5, -1):
        labels[0, 0] = wrong
        with pytest.raises(ValueError, match=rf"labels of street\.png must be in 0\.\.4 .*got .*{wrong}"):
            check(record)


@pytest.mark.parametrize("given", [{"image": torch.zeros(3, 40, 51)}, {"features": torch.zeros(8, 3, 5)}])
def test_labels_of_another_size_are_left_to_the_head(cfg, given):
    check = LabelCheck(cfg, lambda record: {**given, "sem_seg": torch.full((40, 50), 99)}, patch_size=16)
    assert check({})["sem_seg"].unique().tolist() == [99]
