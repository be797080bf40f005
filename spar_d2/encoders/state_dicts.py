"""Extracts a state dict from the content of a weight file: removes containers and key prefixes, applies EMA weights."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

import torch

from spar_d2.encoders.messages import KEY

logger = logging.getLogger(__name__)

PART_KEY = "MODEL.SPAR.PRETRAINED_PART"
# Containers in which trainers store state dicts; selecting one other than the plain ones logs a warning.
_PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "module")
_PARTS = (*_PLAIN, "state_dict_ema", "ema_state_dict", "model_ema", "ema", "teacher", "student")
# Path of the EMA weights in this project's checkpoints.
_AVERAGES = ("trainer", "hooks", "ModelEma", "averages")
# Inserted anywhere in keys by torch.compile and PyTorch's wrappers.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Key prefix of DistributedDataParallel.
_DISTRIBUTED = "module."
# Key prefixes of the encoder in larger models: the SPAR authors' Lightning checkpoints and plain files, this project's
# Detectron2 models, self-supervised training. Keys without the prefix do not belong to the encoder.
_ROOTS = ("segmentor.net.model.", "model.", "backbone.encoder.", "backbone.net.encoder.", "backbone.")
# Tensors in OpenAI's files that are not weights.
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def take_state_dict(
    content: Mapping, path: str | os.PathLike, key: str = KEY, part: str = ""
) -> dict[str, torch.Tensor]:
    """Extract the state dict from the content of a weight file.

    If the file is a checkpoint of a training with ``SPAR.EMA_DECAY``, the EMA weights replace the trained weights.

    Args:
        content: state dict or nested containers, see :func:`spar_d2.encoders.weight_files.read_checkpoint`.
        path: weight file, for error messages.
        key: config key or argument that the path comes from, for error messages.
        part: key of the container to use if the file has several; "" if it has one.

    Returns:
        State dict without the key prefixes of distributed training, compilation and larger models.

    Raises:
        RuntimeError: the file has no weights, or several sets of weights and ``part`` is "".
    """
    content = _unwrapped(with_averages(content, path, key), path, key, part)
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise RuntimeError(f"{key}: {path} contains no weights")
    invalid = [name for name in tensors if not isinstance(name, str)]
    if invalid:
        raise RuntimeError(
            f"{key}: {path} must contain a state_dict(), but has a tensor with the key {invalid[0]!r}, "
            "which is not a string"
        )
    previous: dict[str, torch.Tensor] = {}
    while tensors.keys() != previous.keys():
        previous = tensors
        tensors = _without_prefixes(tensors, path, key)
        for root in _ROOTS:
            inside = {name.removeprefix(root): tensor for name, tensor in tensors.items() if name.startswith(root)}
            tensors = inside or tensors
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}


def with_averages(content: Mapping, path: str | os.PathLike, key: str = KEY) -> Mapping:
    """Return a checkpoint in which the EMA weights, if any, replace the weights under "model"."""
    averages: object = content
    for name in _AVERAGES:
        averages = averages.get(name) if isinstance(averages, Mapping) else None
    model = content.get("model")
    if not isinstance(averages, Mapping) or not averages or not isinstance(model, Mapping):
        return content
    names = {str(name).removeprefix(_DISTRIBUTED): name for name in model}
    state = dict(model)
    for name, average in averages.items():
        weight = model.get(names.get(name))
        if not isinstance(average, torch.Tensor) or weight is None or average.shape != weight.shape:
            raise RuntimeError(f"{key}: {path} is corrupt: its EMA weight {name!r} matches no weight of the model")
        state[names[name]] = average.to(weight.dtype)
    # A warning, because some users expect the weights of the last step.
    logger.warning(
        "%s: %s contains EMA weights (SPAR.EMA_DECAY) of %d tensors; using them instead of the last step's weights",
        key,
        path,
        len(averages),
    )
    return {**content, "model": state}


def _unwrapped(content: Mapping, path: str | os.PathLike, key: str, part: str) -> Mapping:
    """Return the innermost container, or the container with the key ``part``."""
    outer: list[Mapping] = []
    while True:
        if any(content is other for other in outer):
            raise RuntimeError(f"{key}: {path} is corrupt: one of its dictionaries contains itself")
        outer.append(content)
        parts = {name: content[name] for name in _PARTS if isinstance(content.get(name), Mapping) and content[name]}
        if parts:  # trainers may store further sets of weights under other keys
            parts |= {name: inner for name, inner in content.items() if name not in parts and _holds_weights(inner)}
        if part and isinstance(content.get(part), Mapping):
            parts, part = {part: content[part]}, ""
        if not parts or (part and len(parts) > 1):
            break
        if len(parts) > 1:
            raise RuntimeError(
                f"{key}: {path} contains several sets of weights: {', '.join(parts)}. Select one with {PART_KEY} "
                "(pretrained_part of build_encoder, --part of convert_weights.py)"
            )
        ((name, content),) = parts.items()
        if name not in _PLAIN:
            logger.warning("%s: using the weights %r of %s", key, name, path)
    if part:
        names = ", ".join(sorted(str(name) for name, inner in outer[0].items() if isinstance(inner, Mapping)))
        raise RuntimeError(f"{PART_KEY}: {path} has no {part!r}; it has {names or 'one set of weights'}")
    return content


def _holds_weights(inner: object) -> bool:
    values = list(inner.values()) if isinstance(inner, Mapping) else []
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return len(tensors) > len(values) / 2 and sum(tensor.ndim >= 2 for tensor in tensors) >= 2


def _without_prefixes(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, key: str
) -> dict[str, torch.Tensor]:
    stripped: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = _WRAPPED.sub("", name)
        while short.startswith(_DISTRIBUTED):
            short = short.removeprefix(_DISTRIBUTED)
        if short in stripped:
            raise RuntimeError(f"{key}: {path} has two tensors for {short!r}, one of them with the key {name!r}")
        stripped[short] = tensor
    return stripped
