"""Comparison of an exported file with PyTorch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from spar_d2.encoders import DenseEncoder
from spar_d2.export.modules import EXPORTED, ExportedEncoder
from spar_d2.export.packages import check_packages

_CLASSES = 20
_REPEATS, _LONG_SECONDS = 3, 2.0


@dataclass(frozen=True)
class Comparison:
    """Comparison for an image size.

    Attributes:
        size: (H, W) of the image.
        difference: largest difference of the outputs, relative to the largest output of PyTorch; 0 for labels.
        cosine: smallest cosine similarity of the output vectors of a patch, or of the class logits of a query; 1 for
            labels.
        same: fraction of patches with the same largest output (the best class of scores, or the best query of masks),
            of queries with the same best class, or of pixels with the same label.
        seconds, torch_seconds: median times of onnxruntime and PyTorch.
    """

    size: tuple[int, int]
    difference: float
    cosine: float
    same: float
    seconds: float
    torch_seconds: float


def check_sizes(encoder: DenseEncoder) -> list[tuple[int, int]]:
    """Return eight image sizes (H, W): a pixel, odd ones, the pre-training size, long and large ones."""
    native, patch = encoder.native_size, encoder.patch_size
    return [
        (1, 1),
        (patch, patch),
        (37, 53),
        (native, native),
        (native + 1, native // 2 + 3),
        (1, 4 * native),
        (480, 640),
        (1024, 1024),
    ]


def compare(path: str | os.PathLike, encoder: DenseEncoder, sizes: list[tuple[int, int]]) -> Iterator[Comparison]:
    """Compare an exported file with the encoder in PyTorch, on random images and classes, on the CPU.

    Args:
        path: file of :func:`~spar_d2.export.export_onnx`.
        encoder: encoder with the same weights.
        sizes: image sizes (H, W).

    Raises:
        RuntimeError: onnxruntime is not installed, or cannot run the file.
    """
    session = _session(path)
    yield from _compared(session, path, EXPORTED[session.get_outputs()[0].name](encoder), sizes)


def compare_module(
    path: str | os.PathLike, model: ExportedEncoder, sizes: Sequence[tuple[int, int]]
) -> Iterator[Comparison]:
    """Compare an exported file with the module that it was exported from; arguments and exceptions as above."""
    yield from _compared(_session(path), path, model, sizes)


def _session(path: str | os.PathLike) -> Any:
    check_packages("onnxruntime")
    import onnxruntime

    return onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])


def _compared(
    session: Any, path: str | os.PathLike, model: ExportedEncoder, sizes: Sequence[tuple[int, int]]
) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        # Coarse random images: an encoder hardly sees noise.
        coarse = torch.rand(1, 3, 5, 5, generator=generator) * 255
        inputs = {"image": F.interpolate(coarse, size=size, mode="bilinear")}
        inputs["text"] = F.normalize(torch.randn(_CLASSES, model.encoder.embed_dim, generator=generator), dim=1)
        inputs["query_class"] = torch.arange(_CLASSES)
        inputs["seen"] = torch.arange(_CLASSES) % 2 == 0
        inputs = {name: inputs[name] for name in model.input_names}
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        with torch.no_grad():
            expected, torch_seconds = _timed(model, *inputs.values())
        found, seconds = _timed(session.run, None, arrays)
        expected = expected if isinstance(expected, tuple) else (expected,)
        pairs = [(np.asarray(one), wanted.numpy()) for one, wanted in zip(found, expected, strict=True)]
        for one, wanted in pairs:
            if one.shape != wanted.shape:
                raise RuntimeError(
                    f"{path}: an image of {size[1]}x{size[0]} gives {one.shape} instead of {wanted.shape}"
                )
        parts = [_differences(one, wanted) for one, wanted in _in_the_same_order(pairs)]
        differences, cosines, same = zip(*parts)
        yield Comparison(size, max(differences), min(cosines), min(same), seconds, torch_seconds)


def _in_the_same_order(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sort the found queries as the expected ones, if there are queries.

    Queries are in the order of the scores of their centers, of which some may be equal up to rounding.
    """
    if len(pairs) != 2:
        return pairs
    # (Q, cells) of one image
    found, expected = (torch.from_numpy(masks[0]).float().flatten(1) for masks in pairs[1])
    order = linear_sum_assignment(torch.cdist(expected, found).numpy())[1]
    return [(one[:, order], wanted) for one, wanted in pairs]


def _differences(found: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    if found.dtype.kind == "i":  # labels
        return 0.0, 1.0, float((found == expected).mean())
    if found.ndim == 3:  # class logits of queries
        found, expected = found.swapaxes(1, 2), expected.swapaxes(1, 2)
    difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((found * expected).sum(1) / np.maximum(lengths, 1e-30)).min())
    return difference, cosine, float((found.argmax(1) == expected.argmax(1)).mean())


def _timed(function: Callable[..., Any], *arguments: object) -> tuple[Any, float]:
    """Return the result of a function, and its median time, without the first call unless that is long."""
    result, seconds = None, []
    while len(seconds) <= _REPEATS and sum(seconds) < _LONG_SECONDS:
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds[1:] or seconds)
