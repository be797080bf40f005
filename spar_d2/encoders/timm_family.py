"""Families of timm's ViTs, and loading of their weights."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import model_entrypoint

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.fit import check_fit
from spar_d2.encoders.model_configs import timm_sizes, timm_statistics
from spar_d2.encoders.origin import Conventions
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec, register_family
from spar_d2.encoders.timm_vit import READOUTS, TimmViTEncoder
from spar_d2.encoders.weights import failed_download, fixed_random_weights, no_such_weights, read_state_dict

PREFIX = "visual."
# timm modules whose models are instances of VisionTransformer or Eva.
_MODULES = ("vision_transformer", "deit", "eva")
_HEADS = ("head.", "head_dist.")


@functools.cache
def tags_of_timm(name: str) -> list[str]:
    """Return the pretrained tags of a timm model."""
    return [full.split(".", 1)[1] for full in timm.list_pretrained(f"{name}.*")]


@functools.cache
def _names() -> list[str]:
    names = [name for module in _MODULES for name in timm.list_models(module=module) if "_dinov3" not in name]
    return sorted(names, key=lambda name: ("dinov2" not in name, name))


def is_timm_vit(name: str) -> bool:
    """Return whether timm has a model of this name that is a ``VisionTransformer`` or ``Eva``.

    True also for models that other packages registered; these are checked when they are built.
    """
    module = model_entrypoint(name).__module__ if timm.is_model(name) else "timm.models."
    return not module.startswith("timm.models.") or module.removeprefix("timm.models.") in _MODULES


class TimmFamily(EncoderFamily):
    """timm's ViTs with learned or rotary position embeddings.

    Attributes:
        encoder_class: class of the encoders.
    """

    name = "timm ViT"
    marks = ("visual.patch_embed.proj.weight", "visual.pos_embed", "visual.blocks.0.norm1.weight")
    toy = "vit_nano_patch8_dinov2"
    absent = ("visual.attn_pool.kv.weight",)
    has_text = False
    file_format = "timm"
    timm_prefix = PREFIX
    readouts = READOUTS
    encoder_class: type[TimmViTEncoder] = TimmViTEncoder

    def claims(self, name: str) -> bool:
        # DINOv3 has a family of its own, and names with a tag ("vit_small_patch14_dinov2.lvd142m") an error message.
        return "." not in name and "_dinov3" not in name and is_timm_vit(name)

    def names(self) -> list[str]:
        return _names()

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        return timm_sizes(self._full_name(spec))

    def conventions(self, spec: EncoderSpec) -> Conventions:
        return Conventions(*timm_statistics(self._full_name(spec), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def tags(self, name: str) -> list[str]:
        return tags_of_timm(name)

    def build(self, spec: EncoderSpec) -> DenseEncoder:
        full_name = self._full_name(spec)
        if spec.pretrained in self.tags(spec.name):
            try:
                trunk = timm.create_model(full_name, pretrained=True, num_classes=0)
            except Exception as error:  # the Hugging Face Hub client may raise anything
                raise failed_download(spec.name, spec.pretrained, error) from error
            return self._encoder(trunk, spec)
        with fixed_random_weights():
            encoder = self._encoder(timm.create_model(full_name, num_classes=0), spec)
        if spec.pretrained:
            self._load(encoder, spec)
        return encoder

    def example(self) -> DenseEncoder:
        sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3, "init_values": 1.0}
        return self.encoder_class(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **sizes))

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Weight files of timm lack the prefix "visual.", and may have classifiers.
        if "patch_embed.proj.weight" not in tensors:
            return dict(tensors)
        return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}

    def _encoder(self, trunk: Any, spec: EncoderSpec) -> TimmViTEncoder:
        try:
            return self.encoder_class(trunk, spec.reference_compat, spec.readout or "tokens")
        except ValueError as error:
            raise ValueError(f"MODEL.SPAR.ENCODER: {spec.name!r} is not supported: {error}") from error

    def _full_name(self, spec: EncoderSpec) -> str:
        return f"{spec.name}.{spec.pretrained}" if spec.pretrained in self.tags(spec.name) else spec.name

    def _load(self, encoder: TimmViTEncoder, spec: EncoderSpec) -> None:
        if not Path(spec.pretrained).is_file():
            raise no_such_weights(spec.name, spec.pretrained, self.tags(spec.name))
        tensors = self.from_file(read_state_dict(spec.pretrained, part=spec.pretrained_part))
        expected = encoder.state_dict()
        if tensors.keys() != expected.keys():
            tensors = self._converted(tensors, encoder, spec)
        check_fit(expected, tensors, expected, spec.pretrained)
        encoder.load_state_dict(tensors)

    def _converted(
        self, tensors: dict[str, torch.Tensor], encoder: TimmViTEncoder, spec: EncoderSpec
    ) -> dict[str, torch.Tensor]:
        """Convert weights of another project (Meta's DINOv2, ...) as timm does for its pre-trained weights.

        Returns the weights unchanged if timm cannot convert them.
        """
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        patches = plain.get("patch_embed.proj.weight")
        # timm would resample patches of another size, and accepts missing weights of SigLIP.
        if "siglip" in spec.name or (
            patches is not None and patches.shape != encoder.trunk.patch_embed.proj.weight.shape
        ):
            return tensors
        # With the class count of the model, timm requires all weights.
        overlay = {"state_dict": plain, "num_classes": 0}
        try:
            # timm prints a line for each tensor that it drops.
            with contextlib.redirect_stdout(io.StringIO()), fixed_random_weights():
                model = timm.create_model(spec.name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
        except Exception:  # timm may raise anything for weights of another model
            return tensors
        converted = {f"{PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}
        # Models that others registered with timm may ignore pretrained weights, and keep their random ones.
        random = {name: tensor for name, tensor in encoder.state_dict().items() if tensor.aminmax()[0] < tensor.max()}
        ignored = any(torch.equal(converted[name], tensor) for name, tensor in random.items())
        return tensors if ignored else converted


register_family(TimmFamily())
