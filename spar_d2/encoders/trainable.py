"""Which parameters of an encoder are trained, said in words."""

from __future__ import annotations

import re

from spar_d2.encoders.base import DenseEncoder

ALLOWED = '"last_blocks:N", "all", "none", or blocks by number such as "blk_-1,blk_-2"'


def set_trainable(encoder: DenseEncoder, spec: str) -> list[str]:
    """Freeze an encoder except for what ``spec`` names.

    Args:
        encoder: its parameters' ``requires_grad`` are set in place.
        spec: ``last_blocks:N``, ``all``, ``none``, or the authors' spelling, ``blk_I`` for single blocks, joined by
            commas; negative numbers count from the end.

    Returns:
        Names of the trainable parameters.

    Raises:
        ValueError: a word that is not allowed, or a block that the encoder does not have.
    """
    chosen = _chosen_blocks(spec, len(encoder.blocks))
    encoder.requires_grad_(chosen is None)
    for index in chosen or ():
        encoder.blocks[index].requires_grad_(True)
    encoder.train(encoder.training)
    return [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]


def _chosen_blocks(spec: str, count: int) -> set[int] | None:
    """Block numbers that ``spec`` names, or None for all of the encoder."""
    words = [word.strip() for word in spec.split(",") if word.strip()]
    if words == ["all"]:
        return None
    if words == ["none"]:
        return set()
    chosen: set[int] = set()
    for word in words:
        if match := re.fullmatch(r"last_blocks:(\d+)", word):
            number = int(match[1])
            if not 1 <= number <= count:
                raise ValueError(f"MODEL.SPAR.TRAINABLE: {word!r} asks for {number} blocks, allowed are 1..{count}")
            chosen.update(range(count - number, count))
        elif match := re.fullmatch(r"blk_(-?\d+)", word):
            number = int(match[1])
            if not -count <= number < count:
                raise ValueError(f"MODEL.SPAR.TRAINABLE: {word!r} is no block, allowed are {-count}..{count - 1}")
            chosen.add(number % count)
        else:
            raise ValueError(f"MODEL.SPAR.TRAINABLE must be {ALLOWED}; got {word!r} in {spec!r}")
    if not chosen:
        raise ValueError(f"MODEL.SPAR.TRAINABLE must be {ALLOWED}; got {spec!r}")
    return chosen
