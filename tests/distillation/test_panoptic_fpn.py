"""The hook in Detectron2's own training of its PanopticFPN."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from spar_d2.distillation import DistillationHook

SIZES = [(120, 180), (97, 203)]
ITS_OWN = {"loss_sem_seg", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}


@pytest.fixture
def cfg(panoptic_cfg):
    cfg = panoptic_cfg
    # Its own heads, narrower, for time.
    cfg.MODEL.SPAR.OUT_CHANNELS = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 4
    return cfg


def labeled(height: int, width: int, number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[0, 20:80, 30:90] = True
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[30.0, 20, 90, 80]]))
    instances.gt_classes = torch.tensor([3])
    instances.gt_masks = BitMasks(masks)
    return {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        "instances": instances,
        "sem_seg": torch.randint(0, 54, (height, width), generator=generator),
        "file_name": f"{number}.jpg",
    }


def data() -> list[list[dict]]:
    return [[labeled(*size, number) for number, size in enumerate(SIZES)]] * 9


def trainer_for(model) -> SimpleTrainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return SimpleTrainer(model, data(), torch.optim.SGD(trained, lr=1e-3))


def built(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def train(trainer: SimpleTrainer, start: int, end: int) -> None:
    torch.manual_seed(start)  # regions of interest are drawn at random
    trainer.train(start, end)


@pytest.mark.slow
def test_the_loss_joins_the_models_own(cfg):
    trainer = trainer_for(built(cfg))
    hook = DistillationHook(cfg)
    trainer.register_hooks([hook])
    train(trainer, 0, 6)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert ITS_OWN | {"loss_distill", "total_loss"} <= set(latest)
    assert latest["total_loss"] == pytest.approx(sum(latest[name] for name in ITS_OWN | {"loss_distill"}), rel=1e-5)
    assert hook.windows_encoded == 6 * 2 * 4


@pytest.mark.slow
def test_the_loss_lowers(cfg):
    cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 0
    trainer = trainer_for(built(cfg))
    trainer.register_hooks([DistillationHook(cfg)])
    train(trainer, 0, 4)
    losses = [value for value, _ in trainer.storage.history("loss_distill").values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_training_without_the_hook_is_unchanged(cfg):
    """A model that has been distilled trains on as one of the same weights that never met the hook."""
    distilled = built(cfg)
    keys = list(distilled.state_dict())
    trainable = [name for name, p in distilled.named_parameters() if p.requires_grad]
    first = trainer_for(distilled)
    first.register_hooks([DistillationHook(cfg)])
    train(first, 0, 2)
    plain = built(cfg)
    plain.load_state_dict(distilled.state_dict())

    assert list(distilled.state_dict()) == keys
    assert [name for name, p in distilled.named_parameters() if p.requires_grad] == trainable
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in distilled.modules())
    with EventStorage():
        assert set(distilled.train()(data()[0])) == ITS_OWN
    for model in (distilled, plain):
        train(trainer_for(model), 2, 4)
    for (name, one), other in zip(distilled.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(one, other), name
    with torch.no_grad():
        outputs = [model.eval()([data()[0][0]])[0]["sem_seg"] for model in (distilled, plain)]
    assert torch.equal(*outputs)
