"""AnyUp by its definition, with whole maps and all pairs, to compare the fast one with; and its reference weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from spar_d2.refine import AnyUp

# RULES.md in there says how the numbers were made.
WIDTH, GROUPS, HEADS = 128, 8, 4


def anyup_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight that the reference numbers were made with: seeded by its key alone."""
    value = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if last in ("freqs", "basis"):
        value = value * np.float32({"freqs": 3, "basis": 20}[last])
    elif value.ndim == 1:
        value = np.float32(last == "weight") + value * np.float32(0.1)
    else:
        value = value / np.float32(math.sqrt(shape[1] if value.ndim == 2 else math.prod(shape[1:])))
    return torch.from_numpy(value)


def reference_anyup() -> AnyUp:
    """AnyUp with the weights of the reference numbers."""
    model = AnyUp().eval()
    model.load_state_dict({key: anyup_weight(key, tuple(value.shape)) for key, value in model.state_dict().items()})
    return model


def upsample(
    weights: Mapping[str, torch.Tensor], image: torch.Tensor, features: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """``AnyUp.forward`` in float64, for one image."""
    weights = {key: value.double() for key, value in weights.items()}
    image, features = image.double(), features.double()
    grid = features.shape[2:]

    def blocks(name: str, x: torch.Tensor) -> torch.Tensor:
        for block in (f"{name}.1.block", f"{name}.2.block"):
            y = x
            for norm, conv in ((0, 2), (3, 5)):
                gain, bias = weights[f"{block}.{norm}.weight"], weights[f"{block}.{norm}.bias"]
                y = F.conv2d(F.silu(F.group_norm(y, GROUPS, gain, bias, 1e-5)), weights[f"{block}.{conv}.weight"])
            x = x + y
        return x

    def encode(name: str, x: torch.Tensor) -> torch.Tensor:
        return blocks(name, F.conv2d(x, weights[f"{name}.0.weight"]))

    e = encode("image_encoder", image)
    u, v = (torch.linspace(0, 1, side, dtype=torch.float64) for side in image.shape[2:])
    rows, columns = weights["rope.freqs"][:, :, None, None]
    angle = u[:, None] * rows + v * columns
    e = e * angle.cos() + torch.cat([-e[:, WIDTH // 2 :], e[:, : WIDTH // 2]], 1) * angle.sin()
    q = F.adaptive_avg_pool2d(encode("query_encoder", e), size)
    k = F.adaptive_avg_pool2d(encode("key_encoder", e), grid)

    channels = features.shape[1]
    unit = F.normalize(features, dim=1, eps=1e-12)
    basis = weights["key_features_encoder.0.basis"]
    taps = F.conv2d(torch.ones(1, 1, *grid, dtype=torch.float64), torch.ones(1, 1, 5, 5).double(), padding=2)
    # (C, 128, h, w) / (h, w), then the 128 * C numbers of a cell, re-read as 128 rows.
    s = F.conv2d(unit.transpose(0, 1), basis, padding=2) / taps
    table = s.flatten(0, 1).reshape(WIDTH, channels, *grid)
    k = torch.cat([k, blocks("key_features_encoder", table.softmax(0).mean(1)[None])], 1)
    k = blocks("aggregation", F.conv2d(F.pad(k, (1, 1, 1, 1), "reflect"), weights["aggregation.0.weight"]))
    q = F.conv2d(q, weights["cross_decode.conv2d.weight"], padding=1)

    attention = "cross_decode.cross_attn"
    projected = []
    for number, (name, x) in enumerate((("q", q), ("k", k))):
        x = x[0].flatten(1).T
        x = x / (x.square().mean(1, keepdim=True) + 2.0**-23).sqrt() * weights[f"{attention}.norm_{name}.weight"]
        weight, bias = (
            weights[f"{attention}.attention.in_proj_{part}"].chunk(3)[number] for part in ("weight", "bias")
        )
        projected.append(F.linear(x, weight, bias).unflatten(1, (HEADS, -1)).transpose(0, 1))
    scores = projected[0] @ projected[1].transpose(1, 2) / math.sqrt(WIDTH // HEADS)
    down, across = (allowed(pixels, cells) for pixels, cells in zip(size, grid))
    inside = (down[:, None, :, None] & across[None, :, None, :]).flatten(0, 1).flatten(1)
    shares = scores.masked_fill(~inside, -torch.inf).softmax(-1).mean(0)
    return (shares @ features[0].flatten(1).T).T.unflatten(1, size)[None]


def allowed(pixels: int, cells: int) -> torch.Tensor:
    """(pixels, cells) bool: the cells within reach of a pixel along one side."""
    center = (torch.arange(pixels, dtype=torch.float32) + 0.5) / pixels
    first, last = ((center - 0.1).clamp(0, 1) * cells).floor(), ((center + 0.1).clamp(0, 1) * cells).ceil()
    cell = torch.arange(cells)
    return (cell >= first[:, None]) & (cell < last[:, None])
