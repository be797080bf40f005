"""Whether weights fit a model, and what to say where they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from spar_d2.encoders.messages import KEY
from spar_d2.encoders.registry import nearest_family

_SHOWN = 3
_BLOCK = re.compile(r"\b(?:res)?blocks\.(\d+)\.")


def check_fit(
    own: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    needed: Iterable[str],
    source: str,
    key: str = KEY,
    known: Iterable[str] | None = None,
) -> None:
    """Check ``tensors`` against a model's ``own`` state dict.

    Args:
        own: what is to be filled.
        tensors: what is there.
        needed: keys of ``own`` that may not be absent.
        source: where ``tensors`` came from, for error messages.
        key: name of the setting that ``source`` came from.
        known: keys that may be there; default: those of ``own``.

    Raises:
        RuntimeError: needed keys are missing, keys are unknown to the model, or shapes differ; names a few of each, and
            the family that the weights look like. Or as :func:`check_values`.
    """
    missing = sorted(set(needed) - set(tensors))
    unexpected = sorted(set(tensors) - set(own if known is None else known))
    # A text tower of another library's counts its positions itself; older versions of it kept them in files.
    unexpected = [name for name in unexpected if not name.endswith(".position_ids")]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{len(found)} {kind} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for kind, found in (("missing keys", missing), ("unknown keys", unexpected), ("other shapes", shapes))
        if found
    ]
    if problems:
        raise RuntimeError(
            f"{key}: {source} does not fit the model: {'; '.join(problems)}. {describe_weights(tensors)} "
            "Choose the weights' own model in MODEL.SPAR.ENCODER, or other weights"
        )
    check_values(own, tensors, source, key)


def check_values(
    own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str, key: str = KEY
) -> None:
    """Check that ``tensors`` are numbers such as a model's ``own``: plain, of its kind, and finite.

    Raises:
        RuntimeError: some are not; names one, and what it is.
    """
    for name, tensor in tensors.items():
        if name in own and tensor.shape == own[name].shape and (wrong := _what_is_wrong(own[name], tensor)):
            raise RuntimeError(f"{key}: {name} in {source} {wrong}; take a file with the weights as they were trained")


def _what_is_wrong(own: torch.Tensor, tensor: torch.Tensor) -> str:
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"is sparse or nested ({tensor.layout})"
    if tensor.is_meta:
        return "has a shape but no values"
    if not own.is_floating_point():
        kinds = [(t.is_floating_point(), t.is_complex(), t.dtype is torch.bool) for t in (own, tensor)]
        return "" if kinds[0] == kinds[1] else f"is {tensor.dtype} where the model has {own.dtype}"
    # Numbers of 8 bits mean something only with the scales that they were divided by.
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return f"is {tensor.dtype} where the model has {own.dtype}"
    # As the model keeps them: what is finite in 64 bits may be infinite in 32.
    if tensor.numel() and not all(end.to(own.dtype).isfinite() for end in torch.aminmax(tensor.detach())):
        return f"has values that are NaN or infinite in {own.dtype}"
    return ""


def describe_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """A sentence on what weights look like: their family, and the sizes that tell its models apart."""
    family = nearest_family(tensors)
    if family is None:
        return "They look like those of no family that is known here."
    tensors = family.from_file(tensors)
    sizes = []
    patches = [t for name, t in tensors.items() if t.ndim == 4 and t.shape[1] == 3 and name.split(".")[0] != "text"]
    if patches:
        root = next(name for name, t in tensors.items() if t is patches[0]).split(".")[0]
        blocks = [int(m[1]) for name in tensors if name.startswith(f"{root}.") and (m := _BLOCK.search(name))]
        sizes = [
            f"{patches[0].shape[0]} wide",
            f"patch {patches[0].shape[-1]}",
            f"{max(blocks, default=-1) + 1} blocks",
        ]
    detail = f" ({', '.join(sizes)})" if sizes else ""
    return f"They look like the family {family.name}{detail}, models such as {', '.join(family.names()[:3])}."
