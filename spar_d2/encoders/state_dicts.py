"""From what a weight file holds to one state dict: containers, moving averages and prefixes of others."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

import torch

from spar_d2.encoders.messages import KEY

logger = logging.getLogger(__name__)

PART_KEY = "MODEL.SPAR.PRETRAINED_PART"
# What trainers put around a state dict; the plain ones go without saying.
_PLAIN = ("state_dict", "model", "model_state_dict", "model_state", "module")
_PARTS = (*_PLAIN, "state_dict_ema", "ema_state_dict", "model_ema", "ema", "teacher", "student")
# Where this project's checkpoints keep the moving averages of weights.
_AVERAGES = ("trainer", "hooks", "ModelEma", "averages")
# What torch.compile and PyTorch's wrappers put into keys, at any place.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# What distributed training puts before keys.
_DISTRIBUTED = "module."
# Where larger models hold the encoder's: the authors of SPAR (Lightning's, then those of their plain files), this
# project's models in Detectron2, a self-supervised training. What is not under them is not of the encoder.
_ROOTS = ("segmentor.net.model.", "model.", "backbone.encoder.", "backbone.net.encoder.", "backbone.")
# Tensors in files of OpenAI's that are no weights; the mask is computed.
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def take_state_dict(
    content: Mapping, path: str | os.PathLike, key: str = KEY, part: str = ""
) -> dict[str, torch.Tensor]:
    """The weights in what :func:`spar_d2.encoders.weight_files.read_checkpoint` gave for ``path``.

    The moving averages of a training with ``SPAR.EMA_DECAY`` take the place of the weights that they are of.

    Args:
        content: a state dict, or containers around it.
        path: the file, for error messages.
        key: name of the setting that the path came from.
        part: name of the container to take, where the file has several; "" takes the only one.

    Returns:
        Key to tensor, without what distributed training, compilation and larger models put before keys.

    Raises:
        RuntimeError: there are no weights, or several and none was named.
    """
    content = _unwrapped(with_averages(content, path, key), path, key, part)
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise RuntimeError(f"{key}: {path} holds no weights")
    wrong = [name for name in tensors if not isinstance(name, str)]
    if wrong:
        raise RuntimeError(f"{key}: {path} holds tensors under {wrong[0]!r}, which is no name; save a state_dict()")
    before: dict[str, torch.Tensor] = {}
    while tensors.keys() != before.keys():
        before = tensors
        tensors = _without_prefixes(tensors, path, key)
        for root in _ROOTS:
            inside = {name.removeprefix(root): tensor for name, tensor in tensors.items() if name.startswith(root)}
            tensors = inside or tensors
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}


def with_averages(content: Mapping, path: str | os.PathLike, key: str = KEY) -> Mapping:
    """A checkpoint whose "model" has the moving averages that the checkpoint keeps beside it; itself if it has none."""
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
            raise RuntimeError(f"{key}: {path} is damaged: its moving average of {name!r} is of no weight in it")
        state[names[name]] = average.to(weight.dtype)
    # A warning, as others expect the weights that were trained themselves.
    logger.warning(
        "%s: %s keeps moving averages (SPAR.EMA_DECAY) of %d tensors; they are taken in place of the last step's",
        key,
        path,
        len(averages),
    )
    return {**content, "model": state}


def _unwrapped(content: Mapping, path: str | os.PathLike, key: str, part: str) -> Mapping:
    """The innermost container, or the one of the name ``part``."""
    outer: list[Mapping] = []
    while True:
        if any(content is other for other in outer):
            raise RuntimeError(f"{key}: {path} is damaged: one of its dictionaries holds itself")
        outer.append(content)
        found = {name: content[name] for name in _PARTS if isinstance(content.get(name), Mapping) and content[name]}
        if found:  # others go by names that only their trainers know
            found |= {name: inner for name, inner in content.items() if name not in found and _holds_weights(inner)}
        if part and isinstance(content.get(part), Mapping):
            found, part = {part: content[part]}, ""
        if not found or (part and len(found) > 1):
            break
        if len(found) > 1:
            raise RuntimeError(
                f"{key}: {path} holds several sets of weights: {', '.join(found)}. Name one in {PART_KEY} "
                "(build_encoder's pretrained_part, convert_weights.py's --part)"
            )
        ((name, content),) = found.items()
        if name not in _PLAIN:
            logger.warning("%s: the weights %r of %s are taken", key, name, path)
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
    bare: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = _WRAPPED.sub("", name)
        while short.startswith(_DISTRIBUTED):
            short = short.removeprefix(_DISTRIBUTED)
        if short in bare:
            raise RuntimeError(f"{key}: {path} has two tensors for {short!r}, one of them under {name!r}")
        bare[short] = tensor
    return bare
