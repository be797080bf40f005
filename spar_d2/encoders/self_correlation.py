"""Attention of the patches to the patches with similar attention outputs, for read-outs of the last block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from spar_d2.encoders.symbolic import is_symbolic

SELF_CORRELATION = "self_correlation"

# Logits are this number times the cosine similarity.
_SCALE = 10.0
# Logits in memory at a time. On a CPU, they should fit into its cache.
_LOGITS = {"cpu": 1 << 20, "other": 1 << 26}


def attend_to_similar(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: int, rows: int | None = None
) -> torch.Tensor:
    """Average the values of patches over the patches whose attention outputs are similar.

    Each patch first attends to all tokens as usual. The weights of the average are the softmax over the cosine
    similarities of these outputs times 10, per head. Patches with a negative cosine are excluded. The weights are
    computed for some rows at a time, so memory is linear in the number of patches, also in training.

    Args:
        query, key, value: (B, heads, prefix + N, d), after norms and rotary position embeddings.
        prefix: number of tokens before the patches. They are not averaged.
        rows: patches per step; None chooses it by device.

    Returns:
        (B, heads, N, d) averages, before the output projection.
    """
    attended = F.scaled_dot_product_attention(query[:, :, prefix:], key, value)
    return _average_similar(F.normalize(attended, dim=-1), value[:, :, prefix:], rows)


# The number of steps depends on the image size, and compiled code would unroll them.
@torch.compiler.disable()
def _average_similar(units: torch.Tensor, value: torch.Tensor, rows: int | None) -> torch.Tensor:
    if rows is None and not is_symbolic(units.shape):
        rows = _LOGITS.get(units.device.type, _LOGITS["other"]) // units[..., 0].numel()
    parts = [units] if rows is None else units.split(max(1, rows), dim=2)
    # A backward pass would need the weights of all rows, and computes them again.
    again = torch.is_grad_enabled() and len(parts) > 1 and (units.requires_grad or value.requires_grad)
    if not again:
        averages = [_average(part, units, value) for part in parts]
    else:
        averages = [checkpoint(_average, part, units, value, use_reentrant=False) for part in parts]
    return averages[0] if len(averages) == 1 else torch.cat(averages, dim=2)


def _average(part: torch.Tensor, units: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    logits = (part * _SCALE) @ units.transpose(-2, -1)
    return logits.masked_fill(logits < 0, float("-inf")).softmax(-1) @ value


def check_readout(readout: str, *allowed: str) -> None:
    """Raise ``ValueError`` if a read-out is not allowed."""
    if readout not in allowed:
        names = ", ".join(name or '""' for name in allowed)
        raise ValueError(f"readout (MODEL.SPAR.READOUT) must be one of {names}; got {readout!r}")
