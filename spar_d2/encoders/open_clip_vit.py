"""Dense encoder of open_clip's ViT with class token.

In the last block, the attention is reduced to the value path: each patch token attends only to itself, with both
residuals and the MLP (MaskCLIP, arXiv:2112.01071, as used by SPAR). All earlier blocks are unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from spar_d2.encoders.base import Context, DenseEncoder
from spar_d2.encoders.image_sizes import Crop, Pad
from spar_d2.encoders.model_configs import conventions, known_config, side_of
from spar_d2.encoders.open_clip_models import OpenCLIPModelFamily
from spar_d2.encoders.origin import Conventions
from spar_d2.encoders.positions import resample_positions, sampling_weights
from spar_d2.encoders.refusals import refuse_parts
from spar_d2.encoders.registry import EncoderSpec, register_family
from spar_d2.encoders.self_correlation import SELF_CORRELATION, attend_to_similar, check_readout

# The reference code enlarges the target grid by 0.1 patches to avoid rounding down. This also shifts the sampling
# positions slightly; it is kept because existing students were trained with it.
_GRID_MARGIN = 0.1


class OpenCLIPEncoder(DenseEncoder):
    """Dense features of the image tower of an open_clip model.

    Args:
        visual: ``model.visual`` of an open_clip model, a ``VisionTransformer`` with class token. It is not copied. The
            keys of ``state_dict()`` are those of open_clip ("visual.conv1.weight").
        reference_compat: crop images to whole patches instead of padding them, and do not resample position embeddings
            if the grid has the pre-training number of patches in another shape, as the reference code does.

        readout: "" for the value path; "self_correlation" for
            :func:`~spar_d2.encoders.self_correlation.attend_to_similar` in the last block.

    Raises:
        ValueError: ``visual`` is not a ViT, or a ViT with unsupported parts, or ``readout`` is unknown.
    """

    parts = {
        "qkv": r"attn\.in_proj_",
        "mlp": r"mlp\.",
        "posembed": r"visual\.positional_embedding",
        "patchembed": r"visual\.conv1\.",
    }
    prefix_tokens = 1
    readout = ""

    def __init__(self, visual: nn.Module, reference_compat: bool = False, readout: str = "") -> None:
        super().__init__()
        check_readout(readout, "", SELF_CORRELATION)
        if readout:  # cache keys cover attributes of the instance
            self.readout = readout
        self.visual = tower = _checked(visual)
        self.reference_compat = reference_compat
        self.patch_size = cast(tuple[int, int], tower.patch_size)[0]
        self.native_size = tower.grid_size[0] * self.patch_size
        self.width = tower.conv1.out_channels
        self.embed_dim = self.width if tower.proj is None else tower.proj.shape[1]
        preprocess = getattr(tower, "preprocess_cfg", {})
        self.pixel_mean = tuple(preprocess.get("mean", OPENAI_DATASET_MEAN))
        self.pixel_std = tuple(preprocess.get("std", OPENAI_DATASET_STD))
        self.eval()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    @property
    def size_policy(self) -> Pad:
        return (Crop if self.reference_compat else Pad)(self.patch_size)

    def _last_call(self, context: Context) -> tuple[Callable, Context]:
        return (_run_self_correlation if self.readout else _run_value_path), ()

    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        tokens = self.visual.ln_post(tokens[:, -patches:])
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        visual = self.visual
        patches = visual.conv1(x)
        grid = (patches.shape[-2], patches.shape[-1])
        table, sizes = visual.positional_embedding, (visual.grid_size, grid, _GRID_MARGIN)
        weights = functools.partial(self._of_grid, grid, lambda: sampling_weights(*sizes, x.device))
        positions = resample_positions(table[1:], *sizes, self.reference_compat, weights)
        patches = patches.flatten(2).transpose(1, 2) + positions.to(patches.dtype)
        class_token = (visual.class_embedding + table[0]).to(patches.dtype).expand(x.shape[0], 1, -1)
        return visual.ln_pre(torch.cat([class_token, patches], dim=1)), grid, ()

    @staticmethod
    def _step(block: ResidualAttentionBlock, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + block.ls_1(_attend(block.attn, block.ln_1(tokens)))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def _attend(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Memory-efficient self-attention with the weights of ``attn``: (B, N, C) to (B, N, C)."""
    query, key, value = _query_key_value(attn, x)
    return _project(attn, F.scaled_dot_product_attention(query, key, value))


def _query_key_value(attn: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    # (B, N, 3C) -> (3, B, heads, N, C / heads)
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    return qkv.reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def _project(attn: nn.MultiheadAttention, heads: torch.Tensor) -> torch.Tensor:
    # (B, heads, N, C / heads) -> (B, N, C)
    return attn.out_proj(heads.transpose(1, 2).flatten(2))


def _run_self_correlation(block: ResidualAttentionBlock, tokens: torch.Tensor) -> torch.Tensor:
    """Apply a block with :func:`attend_to_similar`, and drop the class token."""
    query, key, value = _query_key_value(block.attn, block.ln_1(tokens))
    x = tokens[:, 1:] + block.ls_1(_project(block.attn, attend_to_similar(query, key, value, prefix=1)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _run_value_path(block: ResidualAttentionBlock, tokens: torch.Tensor) -> torch.Tensor:
    """Apply a block with each patch attending only to itself, and drop the class token.

    Queries and keys are not computed.
    """
    x = tokens[:, 1:]
    attn, width = block.attn, x.shape[-1]
    value = F.linear(block.ln_1(x), attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])
    x = x + block.ls_1(attn.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _checked(visual: nn.Module) -> VisionTransformer:
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"visual must be the VisionTransformer of an open_clip model (model.visual), got {type(visual).__name__}"
        )
    blocks = visual.transformer.resblocks
    reasons = {
        "attentional pooling": visual.attn_pool is not None,
        "attention other than nn.MultiheadAttention": any(type(b) is not ResidualAttentionBlock for b in blocks),
        "non-square patches": len(set(visual.patch_size)) > 1,
        "non-square training images": len(set(visual.image_size)) > 1,
    }
    refuse_parts("OpenCLIPEncoder", reasons)
    return visual


def _is_plain_vit(config: dict | None) -> bool:
    if config is None:
        return False
    vision = config["vision_cfg"]
    is_external = "timm_model_name" in vision or "hf_model_name" in vision
    return not is_external and isinstance(vision.get("layers", 12), int) and not vision.get("attentional_pool")


class OpenCLIPFamily(OpenCLIPModelFamily):
    """open_clip models whose image tower is open_clip's own ViT."""

    name = "open_clip ViT"
    marks = ("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding")
    toy = "toy/tiny_clip.json"
    encoder_class = OpenCLIPEncoder
    accepts = staticmethod(_is_plain_vit)

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        vision = known_config(spec.name)["vision_cfg"]
        patch, size = (side_of(vision.get(key, default)) for key, default in (("patch_size", 16), ("image_size", 224)))
        return size // patch * patch, patch

    def conventions(self, spec: EncoderSpec) -> Conventions:
        return conventions(spec.name, spec.pretrained, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

    def example(self) -> DenseEncoder:
        vision = open_clip.CLIPVisionCfg(image_size=64, layers=3, width=96, patch_size=16, head_width=32)
        text = open_clip.CLIPTextCfg(context_length=77, vocab_size=64, width=32, heads=2, layers=1)
        return OpenCLIPEncoder(open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).visual)

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Weight files of only the image tower lack the prefix "visual.".
        if "conv1.weight" in tensors and "class_embedding" in tensors:
            return {f"visual.{key}": tensor for key, tensor in tensors.items()}
        return dict(tensors)


register_family(OpenCLIPFamily())
