"""open_clip's own ViT (with class token) as a dense encoder.

The last block keeps only the value path of its attention: every patch passes its own value on, both residuals and the
MLP stay (MaskCLIP, arXiv:2112.01071, as used by SPAR). All earlier blocks are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.positions import resample_positions


class OpenCLIPEncoder(DenseEncoder):
    """Dense features of the image tower of an open_clip model.

    Args:
        visual: ``model.visual`` of an open_clip model, a ``VisionTransformer`` with class token; used, not copied, so
            ``state_dict()`` has the library's keys ("visual.conv1.weight").
        reference_compat: reproduce the authors' handling of sizes, see :class:`DenseEncoder` and
            :func:`resample_positions`.

    Raises:
        ValueError: ``visual`` is another kind of tower, or a ViT with parts that dense features cannot be taken from.
    """

    def __init__(self, visual: nn.Module, reference_compat: bool = False) -> None:
        super().__init__()
        _check_tower(visual)
        self.visual = visual
        self.reference_compat = reference_compat
        self.patch_size = visual.patch_size[0]
        self.native_size = visual.image_size[0]
        self.width = visual.conv1.out_channels
        self.embed_dim = self.width if visual.proj is None else visual.proj.shape[1]
        preprocess = getattr(visual, "preprocess_cfg", {})
        self.pixel_mean = tuple(preprocess.get("mean", OPENAI_DATASET_MEAN))
        self.pixel_std = tuple(preprocess.get("std", OPENAI_DATASET_STD))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        tokens, grid = self._embed(x)
        for block in self.blocks[:-1]:
            tokens = _run_block(block, tokens)
        tokens = self.visual.ln_post(_run_value_path(self.blocks[-1], tokens[:, 1:]))
        if self.visual.proj is not None:
            tokens = tokens @ self.visual.proj
        return _to_map(tokens, grid)

    def _encode_intermediates(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        tokens, grid = self._embed(x)
        maps = []
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            tokens = _run_block(block, tokens)
            if index in indices:
                maps.append(_to_map(tokens[:, 1:], grid))
        return maps

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, 3, H, W) to tokens (B, 1 + h * w, C), class token first, and (h, w)."""
        visual = self.visual
        patches = visual.conv1(x)
        grid = (patches.shape[-2], patches.shape[-1])
        table = visual.positional_embedding
        positions = resample_positions(table[1:], visual.grid_size, grid, self.reference_compat)
        patches = patches.flatten(2).transpose(1, 2) + positions.to(patches.dtype)
        class_token = (visual.class_embedding + table[0]).to(patches.dtype).expand(len(x), 1, -1)
        return visual.ln_pre(torch.cat([class_token, patches], dim=1)), grid


def _run_block(block: ResidualAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    x = x + block.ls_1(_attend(block.attn, block.ln_1(x)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attend(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Self-attention with the weights of ``attn``: (B, N, C) to (B, N, C), never an N x N matrix in memory."""
    batch, tokens, width = x.shape
    # (B, N, 3C) -> (3, B, heads, N, C / heads)
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = qkv.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attn.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def _run_value_path(block: ResidualAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """The block with every token attending to itself alone: queries and keys are not even computed."""
    attn, width = block.attn, x.shape[-1]
    value = F.linear(block.ln_1(x), attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])
    x = x + block.ls_1(attn.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h * w, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def _check_tower(visual: nn.Module) -> None:
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"OpenCLIPEncoder takes the VisionTransformer of an open_clip model (model.visual), "
            f"got {type(visual).__name__}"
        )
    blocks = visual.transformer.resblocks
    reasons = {
        "attentional pooling": visual.attn_pool is not None,
        "attention other than nn.MultiheadAttention": any(type(b) is not ResidualAttentionBlock for b in blocks),
        "patches that are not square": len(set(visual.patch_size)) > 1,
        "training images that are not square": len(set(visual.image_size)) > 1,
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ValueError(f"OpenCLIPEncoder cannot take dense features from a ViT with {' and '.join(found)}")
