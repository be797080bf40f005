"""Dense encoder and text tower of DINOv3.txt, built from a local clone of the dinov3 repository.

Like the reference code of SPAR, the encoder compares the patch tokens of the backbone with the second half of the text
embeddings. That half was trained to match the mean patch token of the vision head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import default_bpe
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.fit import check_fit
from spar_d2.encoders.image_sizes import Pad, Stretch
from spar_d2.encoders.messages import KEY, first_line
from spar_d2.encoders.origin import Conventions
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec, register_family
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.weights import fixed_random_weights, read_state_dict

TOKENS = ("backbone", "head")
_NAMES = ("dinov3_vitl16_dinotxt_tet1280d20h24l",)
_NATIVE_SIZE, _PATCH = 384, 16
_VISUAL = "visual_model."
_BACKBONE = "visual_model.backbone."


class DINOtxtEncoder(DenseEncoder):
    """Dense features of the image tower of DINOv3.txt.

    Args:
        visual_model: ``model.visual_model`` of a DINOv3.txt model of the dinov3 repository, with a ViT in ``.backbone``
            and additional blocks in ``.head``. It is not copied. The keys of ``state_dict()`` are those of the
            repository ("visual_model.backbone.blocks.0...").
        reference_compat: stretch images to whole patches instead of padding them, as the reference code does.
        tokens: "backbone" for the patch tokens of the backbone, "head" for those of the head.

    Raises:
        ValueError: ``visual_model`` or ``tokens`` is invalid.
    """

    parts = {"qkv": r"attn\.qkv\.", "mlp": r"mlp\.", "patchembed": r"visual_model\.backbone\.patch_embed\."}
    pixel_mean, pixel_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    native_size = _NATIVE_SIZE
    # Its class is defined in the dinov3 repository, which type checkers do not see.
    visual_model: Any

    def __init__(self, visual_model: nn.Module, reference_compat: bool = False, tokens: str = "backbone") -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"tokens (MODEL.SPAR.DINOV3_TOKENS) must be one of {', '.join(TOKENS)}; got {tokens!r}")
        _check_tower(visual_model)
        self.visual_model = visual_model
        self.reference_compat = reference_compat
        self.tokens = tokens
        backbone = self.visual_model.backbone
        self.patch_size = backbone.patch_size
        self.width = self.embed_dim = backbone.embed_dim
        self.prefix_tokens = 1 + backbone.n_storage_tokens
        unused = r"visual_model\.backbone\.(mask_token$|cls_norm\.|local_cls_norm\.)"
        if tokens == "backbone":
            unused += r"|visual_model\.head\."
        elif isinstance(projection := self.visual_model.head.linear_projection, nn.Linear):
            self.embed_dim = projection.out_features
        self.unused = unused
        self.eval()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual_model.backbone.blocks

    @property
    def size_policy(self) -> Pad:
        return (Stretch if self.reference_compat else Pad)(self.patch_size)

    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        tokens = self.visual_model.backbone.norm(tokens)
        if self.tokens == "head":
            tokens = self.visual_model.head(tokens)
        return tokens[:, -patches:]

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        backbone = self.visual_model.backbone
        tokens, (height, width) = backbone.prepare_tokens_with_masks(x)
        grid = (height, width)
        # Sines and cosines of the rotary embedding: (h * w, C / heads) each.
        return tokens, grid, self._of_grid(grid, lambda: tuple(backbone.rope_embed(H=height, W=width)))

    @staticmethod
    def _step(block: nn.Module, tokens: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        return block(tokens, (sin, cos))


def _check_tower(visual_model: nn.Module) -> None:
    backbone = getattr(visual_model, "backbone", None)
    wanted = (
        "blocks",
        "norm",
        "patch_size",
        "embed_dim",
        "n_storage_tokens",
        "prepare_tokens_with_masks",
        "rope_embed",
    )
    if not hasattr(visual_model, "head") or any(not hasattr(backbone, name) for name in wanted):
        raise ValueError(
            "visual_model must be the image tower of DINOv3.txt (model.visual_model of a model from the dinov3 "
            f"repository), got {type(visual_model).__name__}"
        )
    if getattr(backbone, "untie_cls_and_patch_norms", False):
        raise ValueError("DINOtxtEncoder does not support a backbone with a separate norm for the class token")


class _TextModel(nn.Module):
    """The text tower, reduced to the half of its embeddings that matches patch tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # The attribute names are the key prefixes of weight files.
        self.text_model = model.text_model
        self.logit_scale = model.logit_scale

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.text_model(tokens)
        return embeddings[:, embeddings.shape[1] // 2 :]


def _create(spec: EncoderSpec, part: str) -> tuple[Any, Any]:
    """Build the model of the dinov3 repository and its tokenizer, and load the weights of ``part``.

    Args:
        spec: specification of the encoder.
        part: "visual" or "text"; the other tower keeps random weights.
    """
    repo = _find_repo(spec.dinov3_repo)
    for key, file in ((KEY, spec.pretrained), ("MODEL.SPAR.DINOV3_BACKBONE", spec.dinov3_backbone)):
        if file and not Path(file).is_file():
            raise FileNotFoundError(f"{key}: there is no weight file {file}; DINOv3.txt has no pretrained tags")
    try:
        with fixed_random_weights():
            built: Any = torch.hub.load(
                str(repo), spec.name, source="local", pretrained=False, bpe_path_or_url=default_bpe()
            )
            model, tokenizer = built
    except Exception as error:  # third-party code may raise anything
        raise RuntimeError(
            f"MODEL.SPAR.DINOV3_REPO: {repo} cannot build {spec.name} ({first_line(error)}); "
            "is it a complete and recent clone of the dinov3 repository?"
        ) from error
    if spec.pretrained:
        expected = {k: v for k, v in model.state_dict().items() if k.startswith(_VISUAL) == (part == "visual")}
        tensors = _read_weights(spec, part)
        # Rotary periods are computed at construction, and missing in some files.
        needed = [name for name in expected if not name.endswith(".periods")]
        check_fit(expected, tensors, needed, spec.pretrained, known=model.state_dict())
        model.load_state_dict({name: tensors[name] for name in expected if name in tensors}, strict=False)
    return model.eval(), tokenizer


def _read_weights(spec: EncoderSpec, part: str) -> dict[str, torch.Tensor]:
    tensors = read_state_dict(spec.pretrained, part=spec.pretrained_part)
    if part == "visual" and spec.dinov3_backbone:
        backbone = read_state_dict(spec.dinov3_backbone, "MODEL.SPAR.DINOV3_BACKBONE")
        tensors.update({f"{_BACKBONE}{name.removeprefix(_BACKBONE)}": tensor for name, tensor in backbone.items()})
    is_dinotxt = any(name.startswith((_VISUAL, "text_model.")) for name in tensors)
    if part == "visual" and is_dinotxt and not any(name.startswith(_BACKBONE) for name in tensors):
        raise RuntimeError(
            f"{KEY}: {spec.pretrained} contains the vision head and the text encoder, but no backbone; "
            "set MODEL.SPAR.DINOV3_BACKBONE to the weights of the DINOv3 ViT-L/16"
        )
    return tensors


def _find_repo(folder: str) -> Path:
    if not folder:
        raise ValueError(
            "MODEL.SPAR.DINOV3_REPO (dinov3_repo) must be the folder of a clone of the dinov3 repository, "
            "which contains the code of DINOv3.txt"
        )
    if not (Path(folder) / "hubconf.py").is_file():
        raise FileNotFoundError(
            f"MODEL.SPAR.DINOV3_REPO: {folder} is not a clone of the dinov3 repository (hubconf.py is missing)"
        )
    return Path(folder).resolve()


class DINOtxtFamily(EncoderFamily):
    """DINOv3.txt, built from a clone of the dinov3 repository."""

    name = "DINOv3.txt"
    marks = (
        "visual_model.backbone.cls_token",
        "visual_model.head.ln_final.weight",
        "text_model.backbone.ln_final.weight",
    )
    file_format = "dinov3"

    def claims(self, name: str) -> bool:
        return re.fullmatch(r"dinov3_\w*dinotxt\w*", name) is not None

    def names(self) -> list[str]:
        return list(_NAMES)

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        return _NATIVE_SIZE, _PATCH

    def conventions(self, spec: EncoderSpec) -> Conventions:
        return Conventions(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def build(self, spec: EncoderSpec) -> DenseEncoder:
        model, _ = _create(spec, "visual")
        return DINOtxtEncoder(model.visual_model, spec.reference_compat, spec.dinov3_tokens)

    def build_text(self, spec: EncoderSpec) -> TextTower:
        model, tokenizer = _create(spec, "text")
        return TextTower(_TextModel(model), tokenizer.tokenize)


register_family(DINOtxtFamily())
