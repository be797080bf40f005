"""Training of a mask transformer by the toy config, cut short: what changes, resuming, processes, and scores."""

import copy

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from pretended_cuda import PretendedCuda
from processes import run_in_two_processes
from small_mask_transformers import SEMANTIC, TEXT, panoptic_record, small_config, small_model, use_all_pixels
from small_trainers import assert_equal, train
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine.trainer import Trainer


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def few_scenes(datasets, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 6))
    monkeypatch.setitem(SCENE_SPLITS, "val", (303, 3))


def config(folder, *overrides):
    folder.mkdir(exist_ok=True)
    short = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2]
    small = ["INPUT.MIN_SIZE_TRAIN", "(64, 96)", "SEED", 5]
    tests = [] if "DATASETS.TEST" in overrides or SEMANTIC[0] in overrides else ["DATASETS.TEST", "()"]
    return small_config(*short, *small, *tests, "OUTPUT_DIR", str(folder), *overrides)


@pytest.mark.parametrize("trainable", ["none", pytest.param("last_blocks:1", marks=pytest.mark.slow)])
def test_frozen_is_frozen(tmp_path, trainable):
    trainer = Trainer(config(tmp_path / "run", "MODEL.SPAR.TRAINABLE", trainable, "SOLVER.MAX_ITER", 2))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    inside = {name for name in changed if name.startswith("backbone.")}
    assert inside == {name for name in inside if "resblocks.4." in name}
    assert bool(inside) == (trainable != "none")
    learned = {name for name in before if not name.startswith("backbone.")}
    assert learned == changed - inside


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], TEXT], ids=["learned", "text"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, keys):
    train(config(tmp_path / "through", *keys))
    train(config(tmp_path / "stopped", *keys), stop_at=3)
    train(config(tmp_path / "stopped", *keys), resume=True)
    finals = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("through", "stopped")]
    assert_equal(*finals)


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    keys = ["SOLVER.MAX_ITER", 60, "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.CHECKPOINT_PERIOD", 100]
    trainer = train(config(tmp_path / "run", *keys))
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(losses) == 60
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize(("head", "count"), [("ROI_HEADS", 8), ("SEM_SEG_HEAD", 6)])
def test_wrong_numbers_of_classes_are_an_error_at_the_start(tmp_path, head, count):
    with pytest.raises(ValueError, match=rf"MODEL\.{head}\.NUM_CLASSES .*{count}, .*got 7"):
        Trainer(config(tmp_path / "run", f"MODEL.{head}.NUM_CLASSES", 7))


@pytest.mark.parametrize(
    "keys",
    [
        ["MODEL.MASK_TRANSFORMER.OUTPUTS", "('sem_seg',)", "DATASETS.TEST", "('spar_scenes_panoptic_val',)"],
        ["DATASETS.TEST", "('spar_scenes_val',)"],
    ],
)
def test_outputs_that_cannot_be_evaluated_are_an_error_at_the_start(tmp_path, keys):
    with pytest.raises(
        ValueError, match=r"MODEL\.MASK_TRANSFORMER\.OUTPUTS must contain .*_seg for .*spar_scenes.*_val"
    ):
        Trainer(config(tmp_path, *keys))


def test_label_maps_are_no_panoptic_labels(tmp_path):
    keys = ["DATASETS.TRAIN", "('spar_scenes_train',)"]
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: MaskTransformer .*have no annotations"):
        Trainer(config(tmp_path / "run", *keys))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], TEXT], ids=["learned", "text"])
def test_evaluation_gives_panoptic_scores(tmp_path, keys):
    cfg = config(tmp_path / "run", *keys, "DATASETS.TEST", "('spar_scenes_panoptic_val',)", "SOLVER.MAX_ITER", 2)
    scores = train(cfg).scores
    assert {"PQ", "PQ_th", "PQ_st", "SQ", "RQ"} <= scores["panoptic_seg"].keys()
    assert 0 <= scores["panoptic_seg"]["PQ"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], TEXT], ids=["learned", "text"])
def test_semantic_models_are_trained_on_label_maps(tmp_path, keys):
    cfg = config(tmp_path / "run", *SEMANTIC, *keys, "SOLVER.MAX_ITER", 2)
    scores = train(cfg).scores
    assert 0 <= scores["sem_seg"]["mIoU"] <= 100 and "IoU-moon" in scores["sem_seg"]


@pytest.mark.slow
def test_evaluation_uses_the_words_of_the_data_set(tmp_path):
    """Whatever the vocabulary of inference is; it is kept."""
    words = ["MODEL.SPAR.VOCABULARY", "things: cat; stuff: sky"]
    cfg = config(tmp_path / "run", *TEXT, *words, "DATASETS.TEST", "('spar_scenes_panoptic_val',)")
    trainer = Trainer(cfg)
    assert 0 <= trainer.test(cfg, trainer.model)["panoptic_seg"]["PQ"] <= 100
    assert len(trainer.model.vocabulary.tested) == 2


@pytest.mark.slow
def test_mixed_precision_and_accumulation(tmp_path):
    keys = ["SOLVER.AMP.ENABLED", True, "MODEL.SPAR.PRECISION", "bfloat16", "SPAR.ACCUMULATION_STEPS", 2]
    trainer = train(config(tmp_path / "run", *keys, "SOLVER.MAX_ITER", 2))
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


class Waits(HookBase):
    """Counts how often the CPU waits in each step, with all that hooks do before and after it."""

    def __init__(self, gpu):
        self.gpu, self.counts = gpu, []

    def before_step(self):
        self.gpu.reset()

    def after_step(self):
        self.counts.append(self.gpu.waits_in("spar_d2"))
        assert self.gpu.attention_by("MATH") == 0


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], [*TEXT, "SOLVER.AMP.ENABLED", True, "MODEL.SPAR.PRECISION", "bfloat16"]])
def test_a_step_on_a_gpu_waits_for_the_matching_and_the_check_of_the_losses(tmp_path, keys):
    with PretendedCuda() as gpu:
        trainer = Trainer(config(tmp_path / "run", "MODEL.DEVICE", "cuda", *keys))
        waits = Waits(gpu)
        trainer.register_hooks([waits])
        trainer.train()
        assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    # Words are encoded in the first step, and numbers are written after the last one.
    assert len(waits.counts) == 4 and max(waits.counts[1:3]) <= 2, gpu.report()


RECORDS = [((40, 56), 0, 3), ((40, 56), 1, 1)]
# Every process draws its own masked blocks.
WITHOUT = ["MODEL.MASK_TRANSFORMER.MASKED_ATTENTION", 0.0]


def records() -> list[dict]:
    return [panoptic_record(size, index, things) for size, index, things in RECORDS]


def gradients(model, batch, kinds=("loss_mask", "loss_dice")) -> dict:
    """Gradients of some losses; the others count nothing, so that no parameter is left out."""
    model.zero_grad()
    with EventStorage(0), pytest.MonkeyPatch.context() as patch:
        use_all_pixels(patch)
        losses = model(batch)
    sum(loss * (name in kinds) for name, loss in losses.items()).backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": found}


def _one_image(rank, folder):
    """One of two processes: gradients for its own image."""
    model = torch.nn.parallel.DistributedDataParallel(small_model(*WITHOUT).train(), broadcast_buffers=False)
    of_masks = gradients(model, [records()[rank]])
    of_classes = gradients(model, [records()[rank]], ("loss_class",))
    without = gradients(model, [panoptic_record((40, 56), things=0, stuff=0)] if rank else [records()[0]])
    torch.save([of_masks, of_classes, without], folder / f"{rank}.pth")


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_make_the_step_of_one_with_both_images(tmp_path):
    run_in_two_processes(_one_image, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    model = small_model(*WITHOUT).train()
    together, classes = gradients(model, records()), gradients(model, records(), ("loss_class",))["gradients"]
    for name in ("loss_class", "loss_mask", "loss_dice"):
        mean = (both[0][0]["losses"][name] + both[1][0]["losses"][name]) / 2
        torch.testing.assert_close(mean, together["losses"][name], rtol=1e-4, atol=1e-5)
    for name, expected in together["gradients"].items():
        for first, second in zip(both[0], both[1]):
            assert torch.equal(first["gradients"][name], second["gradients"][name])
        torch.testing.assert_close(both[0][0]["gradients"][name], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(both[0][1]["gradients"][name], classes[name], rtol=1e-3, atol=1e-5)
        # The segments of the first image count half, as there are two processes, and it is averaged with nothing.
        only = gradients(model, [records()[0]])["gradients"][name] if name == "head.queries" else None
        if only is not None:
            torch.testing.assert_close(both[0][2]["gradients"][name], only, rtol=1e-3, atol=1e-5)
