"""On a GPU, nothing mixes devices, and the CPU hardly ever waits in training and inference."""

import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from pretended_cuda import PretendedCuda
from small_mask_transformers import SEMANTIC, TEXT, image, panoptic_record, semantic_record, small_model

CUDA = ["MODEL.DEVICE", "cuda"]
UNSEEN = ["MODEL.MASK_TRANSFORMER.UNSEEN", "('star', 'snow')"]
OUTPUTS = "MODEL.MASK_TRANSFORMER.OUTPUTS"
BFLOAT16 = ["MODEL.SPAR.PRECISION", "bfloat16"]


@pytest.fixture
def gpu():
    with PretendedCuda() as pretended:
        yield pretended


def on_gpu(*keys):
    """A model with the weights of the CPU's, on the pretended GPU."""
    return small_model(*CUDA, *keys)


@pytest.mark.parametrize(
    ("keys", "make"),
    [
        ((), panoptic_record),
        (["MODEL.SPAR.CHECKPOINTING", True, *BFLOAT16], panoptic_record),
        (TEXT, panoptic_record),
        ([*TEXT, *UNSEEN], panoptic_record),
        (SEMANTIC, semantic_record),
    ],
)
def test_a_training_step_waits_at_most_twice(gpu, keys, make):
    model = on_gpu(*keys).train()
    records = [make((40, 56), 0), make((33, 30), 1), make((40, 56), 2)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for iteration in range(2):
        gpu.reset()
        with EventStorage(iteration):
            losses = model(records)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert all(loss.is_cuda and loss.isfinite() for loss in losses.values())
        waits = gpu.waits_in("spar_d2")
    # The checks of the losses above wait outside of the package.
    assert waits <= 2, gpu.report()
    assert gpu.attention_by("MATH") == 0, gpu.report()
    assert all(p.grad.is_cuda for name, p in model.named_parameters() if not name.startswith("backbone"))


def test_training_in_detectron2s_plain_trainer(gpu):
    model = on_gpu().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = SimpleTrainer(model, [[panoptic_record((40, 56))]] * 3, torch.optim.AdamW(trained, lr=1e-3))
    trainer.train(0, 2)
    assert trainer.storage.latest()["total_loss"][0] > 0


LIMITS = {
    "panoptic": ([], 2),
    "panoptic, words": (TEXT, 2),
    "labels": (SEMANTIC, 0),
    "labels, words": ([*SEMANTIC, *TEXT], 0),
    "scores": ([*SEMANTIC, "MODEL.SPAR.OUTPUT", "scores"], 0),
    "instances": ([OUTPUTS, "('instances',)"], 0),
    "all, words, sliding window": (
        [*TEXT, OUTPUTS, "('panoptic_seg', 'sem_seg', 'instances')", "MODEL.SPAR.INFERENCE", "sliding_window"],
        4,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_inference_waits_at_most_twice_for_an_image(gpu, name):
    keys, limit = LIMITS[name]
    model = on_gpu(*keys)
    record = {"image": image((51, 77)), "height": 60, "width": 90}
    model([record])  # positions of the grid and words are computed once
    gpu.reset()
    output = model([record])[0]
    assert gpu.waits_in("spar_d2") <= limit, gpu.report()
    for part in output.values():
        tensor = part[0] if isinstance(part, tuple) else getattr(part, "pred_masks", part)
        assert tensor.is_cuda


def test_results_are_those_of_the_cpu():
    record = {"image": image((51, 77))}
    keys = [*TEXT, OUTPUTS, "('panoptic_seg', 'sem_seg')"]
    on_cpu = small_model(*keys)
    expected = on_cpu([record])[0]
    weights = copy.deepcopy(on_cpu.state_dict())
    with PretendedCuda():
        model = on_gpu(*keys)
        model.load_state_dict(weights)
        found = model([record])[0]
        scores, ids = found["sem_seg"].cpu(), found["panoptic_seg"][0].cpu()
    torch.testing.assert_close(scores, expected["sem_seg"], rtol=1e-4, atol=1e-5)
    assert (ids == expected["panoptic_seg"][0]).float().mean() > 0.999
