"""The pyramid in Detectron2's own, unmodified configs."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

SIZE = (203, 331)


def labelled_image() -> dict:
    height, width = SIZE
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 20:120, 30:150] = True
    masks[1, 100:190, 200:320] = True
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor([[30.0, 20, 150, 120], [200.0, 100, 320, 190]]))
    instances.gt_classes = torch.tensor([3, 17])
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": torch.randint(0, 54, SIZE), "height": 203, "width": 331}


def test_panoptic_fpn_runs_forward_and_trains_a_step(panoptic_cfg):
    torch.manual_seed(0)
    model = build_model(panoptic_cfg)
    record = labelled_image()
    with torch.no_grad():
        output = model.eval()([record])[0]
    assert output["sem_seg"].shape[1:] == SIZE
    assert output["panoptic_seg"][0].shape == SIZE

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    with EventStorage():
        losses = model.train()([record])
    assert {"loss_sem_seg", "loss_mask", "loss_rpn_cls"} <= set(losses)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("resblocks.2." in name for name in changed)
    assert not any("resblocks.0." in name or "conv1" in name for name in changed if "encoder" in name)
    assert any("simfp" in name for name in changed)


def test_other_frameworks_configs_know_the_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL:\n  SPAR:\n    TRAINABLE: none\n  BACKBONE:\n    NAME: SPARPyramid\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg.MODEL.SPAR.TRAINABLE == "none"
    with pytest.raises((KeyError, AssertionError), match="NO_SUCH_KEY"):
        cfg.merge_from_list(["MODEL.SPAR.NO_SUCH_KEY", 1])
