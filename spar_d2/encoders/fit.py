"""Checks that weights fit a model, with informative error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from spar_d2.encoders.messages import KEY
from spar_d2.encoders.registry import nearest_family

_SHOWN = 3
_BLOCK = re.compile(r"\b(?:res)?blocks\.(\d+)\.")


def check_fit(
    expected: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    needed: Iterable[str],
    source: str,
    key: str = KEY,
    known: Iterable[str] | None = None,
    advice: str = "",
) -> None:
    """Check that weights fit the state dict of a model.

    Args:
        expected: state dict of the model.
        tensors: weights to load.
        needed: keys of ``expected`` that must be in ``tensors``.
        source: file or tag of the weights, for error messages.
        key: config key or argument that ``source`` comes from, for error messages.
        known: keys that may be in ``tensors``; default: the keys of ``expected``.
        advice: end of the error message, for weights of other parts than an encoder.

    Raises:
        RuntimeError: needed keys are missing, keys are unknown, shapes differ, or values are invalid (see
            :func:`check_values`). The message lists a few keys and the family that the weights look like.
    """
    missing = sorted(set(needed) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected if known is None else known))
    # Older versions of transformers saved position_ids, which are now computed.
    unexpected = [name for name in unexpected if not name.endswith(".position_ids")]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(items)} {kind} ({', '.join(items[:_SHOWN])}{', ...' if len(items) > _SHOWN else ''})"
        for kind, items in (("missing keys", missing), ("unknown keys", unexpected), ("mismatched shapes", shapes))
        if items
    ]
    if problems:
        advice = advice or (
            f"{describe_weights(tensors)} Set MODEL.SPAR.ENCODER to the model of these weights, or choose other weights"
        )
        raise RuntimeError(f"{key}: {source} does not fit the model: {'; '.join(problems)}. {advice}")
    check_values(expected, tensors, source, key)


def check_values(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str, key: str = KEY
) -> None:
    """Check that tensors are dense, finite, and of the same kind (floating point, integer, ...) as those of a model.

    Args:
        expected: state dict of the model.
        tensors: weights to load; keys and shapes that do not match ``expected`` are ignored.
        source: file or tag of the weights, for error messages.
        key: config key or argument that ``source`` comes from, for error messages.

    Raises:
        RuntimeError: a tensor is invalid; the message gives its name and the problem.
    """
    for name, tensor in tensors.items():
        if name in expected and tensor.shape == expected[name].shape and (problem := _problem(expected[name], tensor)):
            raise RuntimeError(f"{key}: {name} in {source} {problem}; use a file with the original weights")


def _problem(expected: torch.Tensor, tensor: torch.Tensor) -> str:
    """Describe the problem of a tensor, or return ""."""
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"is sparse or nested ({tensor.layout})"
    if tensor.is_meta:
        return "is a meta tensor without values"
    if not expected.is_floating_point():
        kinds = [(t.is_floating_point(), t.is_complex(), t.dtype is torch.bool) for t in (expected, tensor)]
        return "" if kinds[0] == kinds[1] else f"is {tensor.dtype} where the model has {expected.dtype}"
    # 8-bit floats are meaningless without their quantization scales.
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return f"is {tensor.dtype} where the model has {expected.dtype}"
    # Check in the dtype of the model: values that are finite in float64 may be infinite in float32.
    if tensor.numel() and not all(end.to(expected.dtype).isfinite() for end in torch.aminmax(tensor.detach())):
        return f"has values that are NaN or infinite in {expected.dtype}"
    return ""


def describe_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a sentence that describes the likely family and model size of weights."""
    family = nearest_family(tensors)
    if family is None:
        return "They match no known family."
    tensors = family.from_file(tensors)
    sizes = []
    patches = [t for name, t in tensors.items() if t.ndim == 4 and t.shape[1] == 3 and name.split(".")[0] != "text"]
    if patches:
        root = next(name for name, t in tensors.items() if t is patches[0]).split(".")[0]
        blocks = [int(m[1]) for name in tensors if name.startswith(f"{root}.") and (m := _BLOCK.search(name))]
        sizes = [
            f"width {patches[0].shape[0]}",
            f"patch size {patches[0].shape[-1]}",
            f"{max(blocks, default=-1) + 1} blocks",
        ]
    detail = f" ({', '.join(sizes)})" if sizes else ""
    return f"They look like {family.name} weights{detail}, for models such as {', '.join(family.names()[:3])}."
