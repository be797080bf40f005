"""The optimizer's groups: layer-wise learning rates of the encoder, and no decay of norms and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from spar_d2.encoders import DenseEncoder

# Of torch.optim: those that take a step without a closure, on dense gradients.
OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD")
# What the encoders' libraries call position tables and the tokens that are parameters ...
_TABLES = ("positional_embedding", "pos_embed", "class_embedding", "cls_token", "reg_token", "storage_tokens")
# ... and everything that comes before the blocks.
_BEFORE_BLOCKS = {*_TABLES, "mask_token", "conv1", "patch_embed", "ln_pre", "norm_pre"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SPAR.OPTIMIZER`` over the trainable parameters, with Detectron2's rules for decay and biases.

    Raises:
        ValueError: a key that is not allowed, or nothing to train.
    """
    if cfg.SPAR.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(f"SPAR.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}; got {cfg.SPAR.OPTIMIZER!r}")
    groups = optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        layer_decay=cfg.SPAR.LAYER_DECAY,
    )
    if not groups:
        raise ValueError(f"nothing to train: MODEL.SPAR.TRAINABLE is {cfg.MODEL.SPAR.TRAINABLE!r}")
    kind = getattr(torch.optim, cfg.SPAR.OPTIMIZER)
    momentum = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SPAR.OPTIMIZER == "SGD" else {}
    clipping = cast("Callable[..., torch.optim.Optimizer]", maybe_add_gradient_clipping(cfg, kind))
    return clipping(groups, lr=cfg.SOLVER.BASE_LR, **momentum)


def optimizer_params(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Detectron2's ``get_default_optimizer_params`` for a model with SPAR encoders; also for LazyConfigs.

    Args:
        model: its trainable parameters are taken.
        base_lr: learning rate.
        weight_decay, weight_decay_norm: for all parameters, and for those of norms; position tables and tokens of the
            encoders have none.
        bias_lr_factor, weight_decay_bias: as Detectron2's; None is as for all.
        layer_decay: see :func:`layer_factors`.

    Returns:
        Groups for an optimizer of ``torch.optim``.

    Raises:
        ValueError: ``layer_decay`` is not in 0..1.
    """
    factors = layer_factors(model, layer_decay)
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
        lr_factor_func=(lambda name: factors.get(name, 1.0)) if layer_decay != 1 else None,
        overrides={name: {"weight_decay": 0.0} for name in _TABLES},
    )
    # It knows the norms of torch, but not its own layer norm, which the pyramid is made with.
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    single = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    for group in single:
        if id(group["params"][0]) in norms:
            group["weight_decay"] = weight_decay_norm
    return reduce_param_groups(single)


def layer_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors on the learning rate of the encoders' parameters (layer-wise decay, BEiT, arXiv:2106.08254, and ViTDet).

    Args:
        model: has any number of SPAR encoders.
        layer_decay: in 0..1, above 0.

    Returns:
        By the parameters' names in ``model``: ``layer_decay ** (n - i)`` for block i of n, and
        ``layer_decay ** (n + 1)`` for what is before the blocks; 1 for what is after them.

    Raises:
        ValueError: another ``layer_decay``.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay (SPAR.LAYER_DECAY) must be above 0 and at most 1, got {layer_decay}")
    factors = {}
    for place, module in model.named_modules():
        if isinstance(module, DenseEncoder):
            layer = _layers(module)
            last = len(module.blocks) + 1
            prefix = f"{place}." if place else ""
            factors |= {prefix + name: layer_decay ** (last - number) for name, number in layer.items()}
    return factors


def _layers(encoder: DenseEncoder) -> dict[str, int]:
    """Number of the layer of every parameter: 0 before the blocks, 1 for the first block, n + 1 after the last."""
    blocks = {id(p): index + 1 for index, block in enumerate(encoder.blocks) for p in block.parameters()}
    after = len(encoder.blocks) + 1
    return {
        name: blocks.get(id(parameter), 0 if _BEFORE_BLOCKS & set(name.split(".")) else after)
        for name, parameter in encoder.named_parameters()
    }


def count_parameters(model: nn.Module) -> str:
    """How many parameters of every part of a model are trained, as a table; an encoder is a part of its own."""
    encoders = [f"{place}." for place, module in model.named_modules() if isinstance(module, DenseEncoder) and place]
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = next((prefix[:-1] for prefix in encoders if name.startswith(prefix)), name.split(".")[0])
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    rows = [*parts.items(), ("all", [sum(counts) for counts in zip(*parts.values())])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {trained:>13,} of {count:>13,} trainable" for name, (trained, count) in rows)
