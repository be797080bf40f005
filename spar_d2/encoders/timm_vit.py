"""Dense encoder of timm's ViTs, which have no text tower: the features are the patch tokens after the final norm.

Position embeddings are adapted to the image size as timm does. Learned ones are resampled with antialiased bicubic
interpolation, and rotary ones are computed for the patch grid.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spar_d2.encoders.base import Context, DenseEncoder
from spar_d2.encoders.last_block import check_last_block, run_self_correlation, run_value_path
from spar_d2.encoders.positions import resample_positions, sampling_weights
from spar_d2.encoders.refusals import refuse_parts
from spar_d2.encoders.rotations import symbolic_rotations
from spar_d2.encoders.self_correlation import SELF_CORRELATION, check_readout
from spar_d2.encoders.symbolic import is_symbolic
from spar_d2.utils.transfer import send

READOUTS = ("tokens", "value", SELF_CORRELATION)
Trunk = VisionTransformer | Eva


class TimmViTEncoder(DenseEncoder):
    """Dense features of a timm ViT.

    Args:
        visual: timm ``VisionTransformer`` or ``Eva`` model. It is not copied. The keys of ``state_dict()`` are those of
            timm with the prefix "visual." ("visual.blocks.0...").
        reference_compat: the sliding window crops partial patches at the right and bottom, as the reference code does.
            A single pass always pads images.
        readout: "tokens" for the patch tokens after the final norm, as returned by timm's ``forward_features``; "value"
            to reduce the attention of the last block to its value path, where each token attends only to itself
            (MaskCLIP, arXiv:2112.01071); "self_correlation" to replace it by
            :func:`~spar_d2.encoders.self_correlation.attend_to_similar`.

    Raises:
        ValueError: ``visual`` is not a supported model, or ``readout`` is unknown.
    """

    parts = {
        "qkv": r"attn\.(qkv\.|[qkv]_proj\.|[qv]_bias$)",
        "mlp": r"mlp\.",
        "posembed": r"visual\.(trunk\.)?pos_embed",
        "patchembed": r"visual\.(trunk\.)?patch_embed\.",
    }
    unused = r"visual\.(head|head_dist|fc_norm|attn_pool)\."
    # Step of the last block with the readout "self_correlation".
    _self_correlation: Callable = staticmethod(run_self_correlation)

    def __init__(self, visual: nn.Module, reference_compat: bool = False, readout: str = "tokens") -> None:
        super().__init__()
        check_readout(readout, *READOUTS)
        self.visual = visual
        self.readout = readout
        self.reference_compat = reference_compat
        trunk = check_trunk(self.trunk, type(self).__name__)
        if readout != "tokens":
            check_last_block(trunk.blocks[-1], readout)
        if readout == "value":
            last_block = rf"visual\.(trunk\.)?blocks\.{len(trunk.blocks) - 1}\."
            self.unused = rf"{self.unused}|{last_block}attn\.([qk]_proj\.|[qk]_norm\.|q_bias$)"
        if trunk.pos_embed is None:
            self.parts = {part: pattern for part, pattern in self.parts.items() if part != "posembed"}
        self.patch_size = cast(tuple[int, int], trunk.patch_embed.patch_size)[0]
        self.native_size = trunk.patch_embed.grid_size[0] * self.patch_size
        self.width = self.embed_dim = trunk.embed_dim
        self.prefix_tokens = trunk.num_prefix_tokens
        # timm builds position grids on the CPU and synchronizes with the GPU to copy them. To avoid this, a copy of the
        # rope module computes the rotations on the CPU. The tuple hides it from nn.Module, so it is not a submodule.
        self._rope = (copy.deepcopy(getattr(trunk, "rope", None)),)
        cfg = getattr(trunk, "pretrained_cfg", {})
        self.pixel_mean = tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN))
        self.pixel_std = tuple(cfg.get("std", IMAGENET_DEFAULT_STD))
        for module in trunk.modules():
            if hasattr(module, "fused_attn"):
                # Without fused attention (timm has an environment variable to disable it), memory is O(N^2).
                cast(Any, module).fused_attn = True
        self.eval()

    @property
    def trunk(self) -> Any:
        """The timm ViT."""
        return self.visual

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        return self.trunk.blocks

    def _last_call(self, context: Context) -> tuple[Callable, Context]:
        if self.readout == "value":
            return run_value_path, (self.prefix_tokens,)
        if self.readout == SELF_CORRELATION:
            return self._self_correlation, (self.prefix_tokens, *context)
        return self._step, context

    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        return self.trunk.norm(tokens[:, -patches:])

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        trunk = self.trunk
        patches = trunk.patch_embed.proj(x)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = trunk.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        names = ("cls_token", "dist_token", "reg_token")
        prefix = [token for name in names if (token := getattr(trunk, name, None)) is not None]
        tokens = [torch.cat(prefix, dim=1)] if prefix else []
        if trunk.pos_embed is not None:
            native, table = trunk.patch_embed.grid_size, trunk.pos_embed[0]
            # Some models also have position embeddings for the prefix tokens, at the start of the table.
            count = len(table) - native[0] * native[1]
            if count:
                tokens[0] = tokens[0] + table[:count]
            weights = functools.partial(
                self._of_grid, grid, lambda: sampling_weights(native, grid, 0.0, x.device, antialias=True), "positions"
            )
            positions = resample_positions(table[count:], native, grid, weights=weights)
            patches = patches + positions.to(patches.dtype)
        tokens = torch.cat([*(part.to(patches.dtype).expand(x.shape[0], -1, -1) for part in tokens), patches], dim=1)
        context = () if self._rope[0] is None else self._of_grid(grid, lambda: self._rotations(grid), "rotations")
        return trunk.norm_pre(tokens), grid, context

    def _rotations(self, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return the rotary position embeddings of a grid, which are additional inputs of the blocks."""
        weight = next(self.parameters())
        return (send(self._rotation_table(grid).to(self._precision or weight.dtype), weight.device),)

    def _rotation_table(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return timm's sines and cosines (N, 2 * d) of the patches of a grid, on the CPU."""
        if is_symbolic(grid):
            return symbolic_rotations(self._rope[0], grid, next(self.parameters()).device)
        rope = cast(Any, self._rope[0]).cpu()
        if getattr(rope, "feat_shape", None) is not None:
            rope.update_feat_shape(list(grid))
        return rope.get_embed(shape=list(grid))

    @staticmethod
    def _step(block: nn.Module, tokens: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        return block(tokens, rope=context[0]) if context else block(tokens)


def check_trunk(trunk: nn.Module, encoder: str) -> Any:
    """Return ``trunk`` if it is a supported timm ViT; raise ``ValueError`` otherwise."""
    if not isinstance(trunk, (VisionTransformer, Eva)):
        raise ValueError(
            f"{encoder} requires a VisionTransformer or Eva model of timm (vit_*, deit*, eva*), "
            f"got {type(trunk).__name__}"
        )
    embed = trunk.patch_embed
    plain = isinstance(embed, PatchEmbed) and isinstance(embed.proj, nn.Conv2d)
    refuse_parts(
        encoder,
        {
            "a patch embedding other than one convolution": not plain,
            "non-square patches": plain and len(set(embed.patch_size)) > 1,
            "non-square training images": plain and len(set(cast(Any, embed).grid_size)) > 1,
            "rotations that differ between blocks": getattr(trunk, "rope_mixed", False),
            "neither learned nor rotary position embeddings": trunk.pos_embed is None
            and getattr(trunk, "rope", None) is None,
        },
    )
    return trunk
