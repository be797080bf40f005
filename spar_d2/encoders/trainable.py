"""Selection of the trainable parameters of an encoder (``MODEL.SPAR.TRAINABLE``)."""

from __future__ import annotations

import re

from torch import nn

from spar_d2.encoders.base import DenseEncoder

KEY = "MODEL.SPAR.TRAINABLE"
_IN_BLOCK = ("qkv", "mlp")


def set_trainable(encoder: DenseEncoder, spec: str) -> list[str]:
    """Freeze an encoder except for the parameters selected by ``spec``.

    Parameters that do not affect the dense features (such as the query of attention pooling) are never trained.

    Args:
        encoder: encoder whose parameters' ``requires_grad`` is set in place.
        spec: "all", "none", or a comma-separated list of keywords: ``last_blocks:N``, ``blk_I`` (block I), ``qkv_I``
            and ``mlp_I`` (layers of block I), ``posembed`` (position embedding), ``patchembed`` and ``attn_pool_kv``.
            Negative block indices I count from the last block.

    Returns:
        Names of the trainable parameters.

    Raises:
        ValueError: a keyword is unknown, or the encoder does not have the block or parameter.
    """
    trainable = _trainable(encoder, spec)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trainable)
    encoder.train(encoder.training)
    return trainable


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and of all parameters of a module."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _trainable(encoder: DenseEncoder, spec: str) -> list[str]:
    used = [name for name, _ in encoder.named_parameters() if not re.match(encoder.unused, name)]
    keywords = [keyword.strip() for keyword in spec.split(",") if keyword.strip()]
    if keywords == ["all"]:
        return used
    if keywords == ["none"]:
        return []
    if not keywords:
        raise ValueError(f"{KEY} must be {_allowed(encoder)}; got {spec!r}")
    selected = {name for keyword in keywords for name in _select(encoder, used, keyword)}
    return [name for name in used if name in selected]


def _select(encoder: DenseEncoder, used: list[str], keyword: str) -> list[str]:
    """Return the names of the parameters that a keyword selects."""
    count = len(encoder.blocks)
    if match := re.fullmatch(r"last_blocks:(\d+)", keyword):
        number = int(match[1])
        if not 1 <= number <= count:
            raise ValueError(f"{KEY}: the number of blocks in {keyword!r} must be in 1..{count}, got {number}")
        return [name for index in range(count - number, count) for name in _block(encoder, index).values()]
    if match := re.fullmatch(rf"(blk|{'|'.join(_IN_BLOCK)})_(-?\d+)", keyword):
        number = int(match[2])
        if not -count <= number < count:
            raise ValueError(f"{KEY}: the block index in {keyword!r} must be in {-count}..{count - 1}")
        pattern = "" if match[1] == "blk" else encoder.parts[match[1]]
        return [name for inner, name in _block(encoder, number).items() if re.match(pattern, inner)]
    if keyword in encoder.parts and keyword not in _IN_BLOCK:
        return [name for name in used if re.match(encoder.parts[keyword], name)]
    raise ValueError(f"{KEY} must be {_allowed(encoder)}; got {keyword!r}")


def _block(encoder: DenseEncoder, index: int) -> dict[str, str]:
    """Map the names of a block's parameters within the block to their names within the encoder."""
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    return {inner: names[id(parameter)] for inner, parameter in encoder.blocks[index].named_parameters()}


def _allowed(encoder: DenseEncoder) -> str:
    others = [keyword for keyword in encoder.parts if keyword not in _IN_BLOCK]
    return (
        '"all", "none", or a comma-separated list of "last_blocks:N", "blk_I", "qkv_I", "mlp_I" with I in '
        f"{-len(encoder.blocks)}..{len(encoder.blocks) - 1}, and, for {type(encoder).__name__}, {', '.join(others)}"
    )
