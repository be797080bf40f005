"""Loads checkpoints and encoder weights of any format into models, also through Detectron2's checkpointer."""

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
# Formats that only Detectron2 reads.
_DETECTRON2_FORMATS = (".pkl", ".pyth")


def read_for_model(model: nn.Module, path: str, averages: bool = True, whole: bool = True) -> dict:
    """Read a checkpoint, or encoder weights of any format, for a model.

    Args:
        model: model that the weights will be loaded into. A checkpoint of a whole model is recognized by its keys.
        path: checkpoint file.
        averages: use the EMA weights of the checkpoint, if it has any.
        whole: require weights for the encoder.

    Returns:
        Content of the file, with a state dict in the model's keys under "model".

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: the file is corrupt, belongs to another model, was trained with other image statistics or
            activation, or has values that are NaN or infinite.
    """
    content = read_checkpoint(path, KEY)
    if averages:
        content = with_averages(content, path, KEY)
    inner = content["model"] if isinstance(content.get("model"), Mapping) else content
    state = {name.removeprefix("module."): tensor for name, tensor in inner.items() if isinstance(name, str)}
    target_state = model.state_dict()
    if any(name in target_state for name in state):
        # Detectron2 only warns about missing or mismatched weights.
        for prefix in (f"{name}." for name, part in model.named_modules() if isinstance(part, DenseEncoder)):
            needed = {name: tensor for name, tensor in target_state.items() if name.startswith(prefix)}
            file_state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            if file_state or whole:
                check_fit(needed, file_state, needed, path, KEY)
                _check_expected(model, path)
            else:
                logger.warning("%s: %s has no weights for the encoder, which keeps its initial weights", KEY, path)
        _check_parts(model, target_state, state, path)
        check_values(target_state, {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, path, KEY)
        return {**(content if inner is not content else {}), "model": state}
    tensors = take_state_dict(content, path, KEY)
    if not whole and nearest_family(tensors) is None:
        logger.warning("%s: %s has no weights for the encoder, which keeps its initial weights", KEY, path)
        return {**content, "model": inner}
    return {"model": _encoder_weights(model, tensors, path)}


def _check_parts(
    model: nn.Module, target_state: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: str
) -> None:
    """Raise ``RuntimeError`` if the file has other weights of a part that must fit as a whole.

    Such a part has the end of the error message as ``fit_advice``. Other parts, such as classifiers, may be replaced.
    """
    for prefix, part in model.named_modules():
        if hasattr(part, "fit_advice"):
            needed, found = (
                {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
                for tensors in (target_state, state)
            )
            if found:
                check_fit(needed, found, needed, path, KEY, advice=str(part.fit_advice))


def _encoder_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Return encoder weights in the model's keys. Weights of a text tower are dropped."""
    encoder = find_encoder(model)
    target_state = encoder.state_dict()
    family = nearest_family(tensors)
    tensors = tensors if family is None else family.from_file(tensors)
    roots = {key.split(".")[0] for key in target_state}
    tensors = {k: v for k, v in tensors.items() if k.split(".")[0] in roots} or tensors
    check_fit(target_state, tensors, target_state, path, KEY)
    _check_expected(model, path)
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    prefix = f"{prefix}." if prefix else ""
    # Keep the model's other weights, so that they are not reported as missing.
    return {**model.state_dict(), **{f"{prefix}{key}": tensor for key, tensor in tensors.items()}}


def _check_expected(model: nn.Module, path: str) -> None:
    """Raise ``RuntimeError`` if the file's image statistics or activation differ from those of the encoder."""
    origin, encoder = read_origin(path), find_encoder(model)
    if origin is None:
        return
    quick_gelu = encoder.origin.quick_gelu if encoder.origin else None
    taken = {"pixel_mean": encoder.pixel_mean, "pixel_std": encoder.pixel_std, "quick_gelu": quick_gelu}
    pairs = {name: (getattr(origin, name), taken[name]) for name in FIELDS}
    for name, (expected, value) in pairs.items():
        if None not in (expected, value) and expected != value:
            given = list(expected) if isinstance(expected, tuple) else expected
            raise RuntimeError(
                f"{KEY}: {path} was trained with {name} {given}, and the encoder here has {value}; set "
                f"MODEL.SPAR.{name.upper()} to {given}, or name the file in MODEL.SPAR.PRETRAINED"
            )


@functools.cache
def teach_detectron2() -> None:
    """Patch Detectron2's checkpointer to use :func:`read_for_model` for models with an encoder.

    Unpatched, it only warns about weights that do not have the model's keys, which includes every exported student.
    """
    original_load_file = DetectionCheckpointer._load_file

    @functools.wraps(original_load_file)
    def load_file(self: DetectionCheckpointer, filename: str) -> dict:
        encoders = sum(isinstance(part, DenseEncoder) for part in self.model.modules())
        query = getattr(self._parsed_url_during_load, "query", "")
        if encoders != 1 or query or filename.endswith(_DETECTRON2_FORMATS):
            return original_load_file(self, filename)
        # With a trainer's state, a run may be resuming, which needs the raw weights rather than the EMA.
        return read_for_model(self.model, filename, averages=not self.checkpointables, whole=False)

    DetectionCheckpointer._load_file = load_file
