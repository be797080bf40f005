"""Dense encoders of open_clip models whose image tower is a timm ViT: Perception Encoder (PE-Core), EVA-CLIP, ...

Each patch token is read out as if the pooling of the tower saw only this token:

- attention pooling ("map"): value path of the pooling layer, as for SigLIP (SPAR, arXiv:2604.02252);
- class token ("token"): value path of the last block (MaskCLIP, arXiv:2112.01071);
- average pooling ("avg"): the token itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import Eva
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.model_configs import conventions, known_config, timm_sizes, timm_statistics
from spar_d2.encoders.open_clip_models import OpenCLIPModelFamily
from spar_d2.encoders.origin import Conventions
from spar_d2.encoders.registry import EncoderSpec, register_family
from spar_d2.encoders.self_correlation import SELF_CORRELATION, check_readout
from spar_d2.encoders.siglip import is_siglip, pool_each
from spar_d2.encoders.timm_family import is_timm_vit
from spar_d2.encoders.timm_vit import TimmViTEncoder

_READOUTS = {"map": "tokens", "token": "value", "avg": "tokens"}
_TRUNK = "visual.trunk."


class OpenCLIPTimmEncoder(TimmViTEncoder):
    """Dense features of the image tower of an open_clip model, in the embedding space of its text tower.

    Args:
        visual: ``model.visual`` of an open_clip model: a module with ``.trunk``, a timm ``VisionTransformer`` or
            ``Eva`` model with ``global_pool`` "map", "token" or "avg", and ``.head``. It is not copied. The keys of
            ``state_dict()`` are those of open_clip ("visual.trunk.blocks.0...").
        reference_compat: the sliding window crops partial patches at the right and bottom, as the reference code does.
            A single pass always pads images.
        readout: "" for the read-out of the pooling; "self_correlation" to replace the attention of the last block by
            :func:`~spar_d2.encoders.self_correlation.attend_to_similar`.

    Raises:
        ValueError: ``visual`` is not a supported image tower, or ``readout`` is unknown.
    """

    # Parameters of the pooling layer that depend on other tokens.
    unused = r"visual\.trunk\.attn_pool\.(latent$|q\.|[qk]_norm\.|pos_embed)"

    def __init__(self, visual: nn.Module, reference_compat: bool = False, readout: str = "") -> None:
        trunk = getattr(visual, "trunk", None)
        pool = getattr(trunk, "global_pool", None)
        if pool not in _READOUTS:
            raise ValueError(
                "visual must be the image tower of an open_clip model whose .trunk is a timm ViT with global_pool "
                f"{', '.join(_READOUTS)}; got {type(visual).__name__} with {pool!r}"
            )
        check_readout(readout, "", SELF_CORRELATION)
        super().__init__(visual, reference_compat, readout or _READOUTS[pool])
        if pool == "map":
            self.parts = {**self.parts, "attn_pool_kv": r"visual\.trunk\.attn_pool\.kv\."}
        self.embed_dim = self._read(torch.zeros(1, 1, self.width), 1).shape[-1]

    @property
    def trunk(self) -> Any:
        return self.visual.trunk

    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        trunk = self.trunk
        tokens = trunk.norm(tokens[:, -patches:])
        if isinstance(trunk.attn_pool, AttentionPoolLatent):
            tokens = pool_each(trunk.attn_pool, tokens)
        return cast(nn.Module, self.visual.head)(trunk.head(trunk.fc_norm(tokens)))


def _is_timm_clip(config: dict | None) -> bool:
    vision = (config or {}).get("vision_cfg", {})
    name = vision.get("timm_model_name", "")
    pool, proj = vision.get("timm_pool"), vision.get("timm_proj")
    plain = pool in _READOUTS and proj in ("linear", "mlp", "none", "", None)
    return plain and not is_siglip(config) and is_timm_vit(name)


class OpenCLIPTimmFamily(OpenCLIPModelFamily):
    """open_clip models whose image tower is a timm ViT, other than SigLIP."""

    name = "open_clip timm ViT"
    marks = ("visual.trunk.patch_embed.proj.weight", "visual.trunk.blocks.0.norm1.weight", "visual.trunk.cls_token")
    toy = "toy/tiny_eva02.json"
    encoder_class = OpenCLIPTimmEncoder
    accepts = staticmethod(_is_timm_clip)
    timm_prefix = _TRUNK

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        return timm_sizes(known_config(spec.name)["vision_cfg"]["timm_model_name"])

    def conventions(self, spec: EncoderSpec) -> Conventions:
        trunk = known_config(spec.name)["vision_cfg"]["timm_model_name"]
        statistics = timm_statistics(trunk, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        # The timm trunk has a fixed activation.
        return dataclasses.replace(conventions(spec.name, spec.pretrained, *statistics), quick_gelu=None)

    def example(self) -> DenseEncoder:
        visual = nn.Module()
        sizes: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3}
        visual.trunk = Eva(
            **sizes,
            num_classes=64,
            global_pool="token",
            use_rot_pos_emb=True,
            ref_feat_shape=4,
            qkv_fused=False,
            head_init_scale=1.0,
        )
        visual.head = nn.Identity()
        return OpenCLIPTimmEncoder(visual)

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Weight files of only the image tower or its timm trunk lack the prefixes "visual." and "trunk.".
        for mark, prefix in (("patch_embed.proj.weight", _TRUNK), ("trunk.patch_embed.proj.weight", "visual.")):
            if mark in tensors:
                return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
        return dict(tensors)


register_family(OpenCLIPTimmFamily())
