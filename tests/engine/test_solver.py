"""Learning rates and decay of every parameter."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from spar_d2.encoders import FAMILIES, set_trainable
from spar_d2.engine.solver import build_optimizer, count_parameters, layer_factors, optimizer_params
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.pyramid import SPARPyramid

WITH_EXAMPLE = [family for family in FAMILIES.values() if family.example()]


class Model(nn.Module):
    def __init__(self, encoder) -> None:
        super().__init__()
        self.backbone = SPARPyramid(SPARViT(encoder), ["p4"], 8)
        self.head = nn.Conv2d(8, 3, 1)


@pytest.mark.parametrize("family", WITH_EXAMPLE, ids=lambda family: family.name)
def test_rates_fall_from_block_to_block(family):
    model = Model(family.example())
    encoder = model.backbone.net.encoder
    factors = layer_factors(model, 0.5)
    prefix = "backbone.net.encoder."
    assert set(factors) == {prefix + name for name, _ in encoder.named_parameters()}
    names = {id(p): prefix + name for name, p in encoder.named_parameters()}
    count = len(encoder.blocks)
    in_blocks = set()
    for index, block in enumerate(encoder.blocks):
        inside = {names[id(p)] for p in block.parameters()}
        in_blocks |= inside
        assert {factors[name] for name in inside} == {0.5 ** (count - index)}
    first = {prefix + name for name in _matching(encoder, "patchembed") | _matching(encoder, "posembed")}
    assert {factors[name] for name in first} == {0.5 ** (count + 1)}
    for name in set(factors) - in_blocks:
        assert factors[name] in (0.5 ** (count + 1), 1.0), name
    # Layers after the blocks have the full learning rate: at least the last norm.
    assert any(factors[name] == 1 and "norm" in name or "ln_post" in name for name in set(factors) - in_blocks)


def _matching(encoder, word: str) -> set[str]:
    if word not in encoder.parts:
        return set()
    return set(set_trainable(encoder, word))


@pytest.mark.parametrize("family", WITH_EXAMPLE, ids=lambda family: family.name)
def test_norms_and_positions_do_not_decay(family):
    model = Model(family.example())
    groups = optimizer_params(model, base_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    rate = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert set(decay) == set(names.values())
    modules = dict(model.named_modules())
    for name, value in decay.items():
        norm = "LayerNorm" in type(modules[name.rpartition(".")[0]]).__name__
        free = norm or any(word in name for word in ("embedding", "pos_embed", "token"))
        assert value == (0.0 if free else 0.1), name
    factors = layer_factors(model, 0.5)
    assert all(rate[name] == factors.get(name, 1.0) for name in rate)
    assert rate["head.weight"] == rate["backbone.simfp_4.0.weight"] == 1.0


def test_without_layer_decay_it_is_one_rate():
    model = Model(WITH_EXAMPLE[0].example())
    assert {group["lr"] for group in optimizer_params(model, base_lr=0.3, weight_decay=0.1)} == {0.3}


@pytest.mark.parametrize("decay", [0, -1, 1.5])
def test_wrong_layer_decay(decay):
    with pytest.raises(ValueError, match=r"SPAR\.LAYER_DECAY.*at most 1"):
        layer_factors(nn.Linear(1, 1), decay)


def test_by_config():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SPAR.LAYER_DECAY = 0.2, 0.1, 0.5
    model = Model(WITH_EXAMPLE[0].example())
    set_trainable(model.backbone.net.encoder, "last_blocks:1")
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert {group["lr"] for group in optimizer.param_groups} == {0.2, 0.1}
    cfg.SPAR.OPTIMIZER = "SGD"
    assert build_optimizer(cfg, model).defaults["momentum"] == cfg.SOLVER.MOMENTUM
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(cfg, model)


def test_parameters_are_counted_by_part():
    model = Model(WITH_EXAMPLE[0].example())
    set_trainable(model.backbone.net.encoder, "none")
    encoder = sum(p.numel() for p in model.backbone.net.encoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    lines = {line.split()[0]: line.split()[1:] for line in count_parameters(model).splitlines()}
    assert lines["backbone.net.encoder"] == ["0", "of", f"{encoder:,}", "trainable"]
    assert lines["head"][0] == "27"
    assert lines["all"] == [f"{everything - encoder:,}", "of", f"{everything:,}", "trainable"]
