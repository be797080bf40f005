"""Which parameters of an encoder are trained, said in words."""

from __future__ import annotations

import re

from torch import nn

from spar_d2.encoders.base import DenseEncoder

KEY = "MODEL.SPAR.TRAINABLE"
_IN_BLOCK = ("qkv", "mlp")


def set_trainable(encoder: DenseEncoder, spec: str) -> list[str]:
    """Freeze an encoder except for what ``spec`` names.

    Parameters that dense features do not pass through (such as the query of a pooling) are never trained.

    Args:
        encoder: its parameters' ``requires_grad`` are set in place.
        spec: ``all``, ``none``, or words joined by commas: ``last_blocks:N``, and the authors' words ``blk_I`` (a
            block), ``qkv_I`` and ``mlp_I`` (these parts of it), ``posembed`` (the position table), ``patchembed`` and
            ``attn_pool_kv``. I is the number of a block; negative ones count from the end.

    Returns:
        Names of the trainable parameters.

    Raises:
        ValueError: a word that is not allowed, a block or a part that the encoder does not have.
    """
    wanted = _wanted(encoder, spec)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in wanted)
    encoder.train(encoder.training)
    return wanted


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """How many numbers of a module are trained, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _wanted(encoder: DenseEncoder, spec: str) -> list[str]:
    used = [name for name, _ in encoder.named_parameters() if not re.match(encoder.unused, name)]
    words = [word.strip() for word in spec.split(",") if word.strip()]
    if words == ["all"]:
        return used
    if words == ["none"]:
        return []
    if not words:
        raise ValueError(f"{KEY} must be {_allowed(encoder)}; got {spec!r}")
    named = {name for word in words for name in _named(encoder, used, word)}
    return [name for name in used if name in named]


def _named(encoder: DenseEncoder, used: list[str], word: str) -> list[str]:
    """Names of the parameters that one word stands for."""
    count = len(encoder.blocks)
    if match := re.fullmatch(r"last_blocks:(\d+)", word):
        number = int(match[1])
        if not 1 <= number <= count:
            raise ValueError(f"{KEY}: {word!r} asks for {number} blocks, allowed are 1..{count}")
        return [name for index in range(count - number, count) for name in _block(encoder, index).values()]
    if match := re.fullmatch(rf"(blk|{'|'.join(_IN_BLOCK)})_(-?\d+)", word):
        number = int(match[2])
        if not -count <= number < count:
            raise ValueError(f"{KEY}: {word!r} is no block, allowed are {-count}..{count - 1}")
        pattern = "" if match[1] == "blk" else encoder.parts[match[1]]
        return [name for inner, name in _block(encoder, number).items() if re.match(pattern, inner)]
    if word in encoder.parts and word not in _IN_BLOCK:
        return [name for name in used if re.match(encoder.parts[word], name)]
    raise ValueError(f"{KEY} must be {_allowed(encoder)}; got {word!r}")


def _block(encoder: DenseEncoder, index: int) -> dict[str, str]:
    """Names of a block's parameters, from those within the block to those within the encoder."""
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    return {inner: names[id(parameter)] for inner, parameter in encoder.blocks[index].named_parameters()}


def _allowed(encoder: DenseEncoder) -> str:
    others = [word for word in encoder.parts if word not in _IN_BLOCK]
    return (
        '"all", "none", or words joined by commas, of "last_blocks:N", "blk_I", "qkv_I", "mlp_I" with I in '
        f"{-len(encoder.blocks)}..{len(encoder.blocks) - 1}, and, for {type(encoder).__name__}, {', '.join(others)}"
    )
