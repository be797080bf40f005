"""Checkpoints of any kind for models that hold an encoder, also through Detectron2's own checkpointer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.encoders.fit import check_fit, check_values
from spar_d2.encoders.origin import read_origin
from spar_d2.encoders.registry import nearest_family
from spar_d2.encoders.settling import FIELDS
from spar_d2.encoders.state_dicts import take_state_dict, with_averages
from spar_d2.encoders.weights import read_checkpoint

logger = logging.getLogger(__name__)

KEY = "MODEL.WEIGHTS"
# Formats that only Detectron2 knows.
_THEIRS = (".pkl", ".pyth")


def read_for_model(model: nn.Module, path: str, averages: bool = True, whole: bool = True) -> dict:
    """Read a checkpoint, or encoder weights in any of their formats, for a model.

    Args:
        model: what it will be loaded into; a checkpoint of a whole model is told by its keys.
        path: the file.
        averages: take the moving averages that the checkpoint keeps of its weights, where it does.
        whole: the file must have weights for the encoder.

    Returns:
        What the file holds, with a state dict by the model's keys under "model".

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged, is of another model or expects other images, or is not finite.
    """
    content = read_checkpoint(path, KEY)
    if averages:
        content = with_averages(content, path, KEY)
    inner = content["model"] if isinstance(content.get("model"), Mapping) else content
    state = {name.removeprefix("module."): tensor for name, tensor in inner.items() if isinstance(name, str)}
    own = model.state_dict()
    if any(name in own for name in state):
        # Detectron2 itself only warns of what is missing or has another shape.
        for prefix in (f"{name}." for name, part in model.named_modules() if isinstance(part, DenseEncoder)):
            needed = {name: tensor for name, tensor in own.items() if name.startswith(prefix)}
            found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            if found or whole:
                check_fit(needed, found, needed, path, KEY)
                _check_expected(model, path)
            else:
                logger.warning("%s: %s has no weights for the encoder, which stays as it was built", KEY, path)
        check_values(own, {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, path, KEY)
        return {**(content if inner is not content else {}), "model": state}
    tensors = take_state_dict(content, path, KEY)
    if not whole and nearest_family(tensors) is None:
        logger.warning("%s: %s has no weights for the encoder, which stays as it was built", KEY, path)
        return {**content, "model": inner}
    return {"model": _encoder_weights(model, tensors, path)}


def _encoder_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Weights for the model's encoder under the model's own keys; those of a text tower are left out."""
    encoder = find_encoder(model)
    own = encoder.state_dict()
    family = nearest_family(tensors)
    tensors = tensors if family is None else family.from_file(tensors)
    roots = {key.split(".")[0] for key in own}
    tensors = {k: v for k, v in tensors.items() if k.split(".")[0] in roots} or tensors
    check_fit(own, tensors, own, path, KEY)
    _check_expected(model, path)
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    prefix = f"{prefix}." if prefix else ""
    # The model's other weights stay as they are, so that nothing is reported as missing.
    return {**model.state_dict(), **{f"{prefix}{key}": tensor for key, tensor in tensors.items()}}


def _check_expected(model: nn.Module, path: str) -> None:
    """Raise ``RuntimeError`` where a file says that its weights expect other images than the encoder is given."""
    origin, encoder = read_origin(path), find_encoder(model)
    if origin is None:
        return
    quick_gelu = encoder.origin.quick_gelu if encoder.origin else None
    taken = {"pixel_mean": encoder.pixel_mean, "pixel_std": encoder.pixel_std, "quick_gelu": quick_gelu}
    pairs = {name: (getattr(origin, name), taken[name]) for name in FIELDS}
    for name, (said, own) in pairs.items():
        if None not in (said, own) and said != own:
            given = list(said) if isinstance(said, tuple) else said
            raise RuntimeError(
                f"{KEY}: {path} is of a model with {name} {given}, and the encoder here has {own}; set "
                f"MODEL.SPAR.{name.upper()} to {given}, or give the file in MODEL.SPAR.PRETRAINED"
            )


@functools.cache
def teach_detectron2() -> None:
    """Make Detectron2's checkpointer read for models that hold an encoder as :func:`read_for_model` does.

    By itself it leaves out what is not under the model's own names, which is all of a student's file, and only warns.
    """
    theirs = DetectionCheckpointer._load_file

    @functools.wraps(theirs)
    def load_file(self: DetectionCheckpointer, filename: str) -> dict:
        encoders = sum(isinstance(part, DenseEncoder) for part in self.model.modules())
        query = getattr(self._parsed_url_during_load, "query", "")
        if encoders != 1 or query or filename.endswith(_THEIRS):
            return theirs(self, filename)
        # With a trainer's state it may be about to go on with a run, which is one of the weights themselves.
        return read_for_model(self.model, filename, averages=not self.checkpointables, whole=False)

    DetectionCheckpointer._load_file = load_file
