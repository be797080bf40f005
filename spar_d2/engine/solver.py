"""Optimizer with layer-wise learning rates of the encoder, and without weight decay for norms and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from spar_d2.encoders import DenseEncoder

# Optimizers of torch.optim that support dense gradients and need no closure.
OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD")
# Names of position embeddings and learned tokens in the libraries of the encoders ...
_TABLES = ("positional_embedding", "pos_embed", "class_embedding", "cls_token", "reg_token", "storage_tokens")
# ... and of all parameters before the blocks.
_BEFORE_BLOCKS = {*_TABLES, "mask_token", "conv1", "patch_embed", "ln_pre", "norm_pre"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build ``SPAR.OPTIMIZER`` for the trainable parameters, with Detectron2's options for weight decay and biases.

    Raises:
        ValueError: a config value is invalid, or no parameter is trainable.
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
        raise ValueError(f"the model has no trainable parameters: MODEL.SPAR.TRAINABLE is {cfg.MODEL.SPAR.TRAINABLE!r}")
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
    """Version of Detectron2's ``get_default_optimizer_params`` for models with SPAR encoders; supports LazyConfigs.

    Args:
        model: model whose trainable parameters are optimized.
        base_lr: base learning rate.
        weight_decay: weight decay of parameters. It is 0 for position embeddings and tokens of the encoders.
        weight_decay_norm: weight decay of normalization layers.
        bias_lr_factor, weight_decay_bias: see Detectron2; None uses the values of other parameters.
        layer_decay: see :func:`layer_factors`.

    Returns:
        Parameter groups for an optimizer of ``torch.optim``.

    Raises:
        ValueError: ``layer_decay`` is invalid.
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
    # Detectron2 recognizes torch's norms, but not its own LayerNorm, which the pyramid uses.
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    single = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    for group in single:
        if id(group["params"][0]) in norms:
            group["weight_decay"] = weight_decay_norm
    return reduce_param_groups(single)


def layer_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Compute learning rate factors for layer-wise decay (BEiT, arXiv:2106.08254, and ViTDet).

    Args:
        model: model with any number of SPAR encoders.
        layer_decay: decay factor, greater than 0 and at most 1.

    Returns:
        Maps parameter names of the encoders in ``model`` to factors: ``layer_decay ** (n - i)`` for block i of n,
        ``layer_decay ** (n + 1)`` before the blocks, and 1 after them.

    Raises:
        ValueError: ``layer_decay`` is invalid.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay (SPAR.LAYER_DECAY) must be greater than 0 and at most 1, got {layer_decay}")
    factors = {}
    for module_name, module in model.named_modules():
        if isinstance(module, DenseEncoder):
            layer = _layers(module)
            last = len(module.blocks) + 1
            prefix = f"{module_name}." if module_name else ""
            factors |= {prefix + name: layer_decay ** (last - number) for name, number in layer.items()}
    return factors


def _layers(encoder: DenseEncoder) -> dict[str, int]:
    """Return the layer of each parameter: 0 before the blocks, i + 1 in block i, n + 1 after the blocks."""
    blocks = {id(p): index + 1 for index, block in enumerate(encoder.blocks) for p in block.parameters()}
    after = len(encoder.blocks) + 1
    return {
        name: blocks.get(id(parameter), 0 if _BEFORE_BLOCKS & set(name.split(".")) else after)
        for name, parameter in encoder.named_parameters()
    }


def count_parameters(model: nn.Module) -> str:
    """Return a table with the number of trainable parameters of each top-level module and each encoder."""
    encoders = [f"{name}." for name, module in model.named_modules() if isinstance(module, DenseEncoder) and name]
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = next((prefix[:-1] for prefix in encoders if name.startswith(prefix)), name.split(".")[0])
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    rows = [*parts.items(), ("all", [sum(counts) for counts in zip(*parts.values())])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {trained:>13,} of {count:>13,} trainable" for name, (trained, count) in rows)
