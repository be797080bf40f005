"""Outputs of the frozen blocks that are kept in memory in training."""

import pytest
import torch

from reference import reference_image
from small_trainers import as_tensor, trainer_for
from spar_d2.distillation import DistillationHook
from spar_d2.distillation.frozen_outputs import FrozenOutputs
from spar_d2.encoders import find_encoder


def trained(cfg, images, steps=3):
    hook = DistillationHook(cfg)
    trainer = trainer_for(cfg, images, hook)
    trainer.train(0, steps)
    return trainer, hook


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["last_blocks:1", "posembed", "all"])
def test_a_training_with_kept_outputs_is_bit_equal_to_one_without(tiny_cfg, trainable, precision):
    tiny_cfg.MODEL.SPAR.TRAINABLE, tiny_cfg.MODEL.SPAR.PRECISION = trainable, precision
    images = [as_tensor(reference_image(*size)) for size in ((64, 96), (64, 96), (70, 64))]
    plain, _ = trained(tiny_cfg, images)
    tiny_cfg.SPAR.DISTILL.FROZEN_OUTPUTS_GIB = 0.1
    cached, hook = trained(tiny_cfg, images)
    assert cached.losses == plain.losses
    for (name, first), second in zip(plain.model.named_parameters(), cached.model.parameters()):
        assert torch.equal(first, second), name
    counts = (hook.frozen_outputs.misses, hook.frozen_outputs.hits)
    assert counts == ((3, 6) if trainable == "last_blocks:1" else (0, 0)), "only if the first blocks are frozen"
    assert find_encoder(cached.model).frozen_outputs is None, "only in training"


def test_a_full_memory_computes_the_other_images():
    outputs = FrozenOutputs(150 / 2**30)
    images, computed = torch.rand(3, 3, 4, 4), []

    def compute(image):
        computed.append(image)
        return image.flatten(1)[..., None][:, :30]

    for _ in range(2):
        for image in images:
            tokens = outputs(image[None], lambda image=image: compute(image[None]))
            assert torch.equal(tokens, compute(image[None]))
    assert (outputs.hits, outputs.misses) == (1, 5)


def test_batches_are_kept_image_by_image():
    outputs, images = FrozenOutputs(1.0), torch.rand(3, 3, 2, 2)
    outputs(images[:2], lambda: images[:2].flatten(2))
    outputs(images[1:], lambda: images[1:].flatten(2))
    assert (outputs.hits, outputs.misses) == (0, 4)
    assert torch.equal(outputs(images.flip(0), lambda: None), images.flip(0).flatten(2))


@pytest.mark.parametrize("gib", [-1.0, float("inf"), float("nan")])
def test_the_memory_is_positive(tiny_cfg, gib):
    tiny_cfg.SPAR.DISTILL.FROZEN_OUTPUTS_GIB = gib
    with pytest.raises(ValueError, match=r"SPAR\.DISTILL\.FROZEN_OUTPUTS_GIB"):
        DistillationHook(tiny_cfg)
