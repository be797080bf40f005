"""Export of an encoder to one ONNX file for images of any size and any number of classes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.export.inputs import describe, example_inputs, exported_module
from spar_d2.export.onnx_precision import check_precision, reduce_precision
from spar_d2.export.packages import check_packages
from spar_d2.utils.io import atomic_write

OPSET = 18
# Larger models do not fit into one file of protocol buffers.
_LARGEST_BYTES = 1_900_000_000


def export_onnx(
    encoder: DenseEncoder, path: str | os.PathLike, output: str = "features", precision: str = "float32"
) -> None:
    """Export an encoder to ONNX.

    The file has the input "image" (B, 3, H, W) float32, RGB in 0..255, and one output:

    - "features" (B, D, ceil(H / p), ceil(W / p)) float32;
    - "scores" (B, Q, ceil(H / p), ceil(W / p)) float32, cosine similarities; with the input "text" (Q, D) float32, unit
      vectors;
    - "labels" (B, H, W) int64, the class of every pixel; with "text" and the input "query_class" (Q,) int64, the class
      of every vector. Scores of all vectors are interpolated to the size of the image, which takes 4 B Q H W bytes.

    B, H, W and Q are free.

    Args:
        encoder: encoder to export, on any device. It is not changed.
        path: output file.
        output: "features", "scores" or "labels".
        precision: "float32"; "float16": weights and matrix products in half precision; "int8": weights as integers
            with a scale for each column, and activations quantized when the model runs. Inputs and outputs are float32.

    Raises:
        ValueError: an argument is invalid, the encoder uses ``reference_compat``, or its weights are larger than
            1.9 GB.
        RuntimeError: a required package is not installed, or the encoder cannot be exported.
    """
    check_precision(precision)
    model = exported_module(encoder, output)
    check_bytes(model)
    metadata = describe(encoder) | {"precision": precision}
    save_onnx(model, *example_inputs(model), path, precision, metadata)


def check_bytes(model: nn.Module) -> None:
    """Raise ``ValueError`` if a module is too large for one file."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _LARGEST_BYTES:
        raise ValueError(
            f"the weights must be at most {_LARGEST_BYTES / 1e9} GB for one ONNX file, got {size / 1e9:.1f} GB"
        )


def save_onnx(
    model: Any,
    inputs: tuple[torch.Tensor, ...],
    shapes: tuple[dict, ...],
    path: str | os.PathLike,
    precision: str,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Trace a module with ``input_names``, and ``output_name`` or several ``output_names``, and write an ONNX file.

    Args:
        model: module in eval mode.
        inputs: example inputs.
        shapes: free dimensions of the inputs, see :func:`torch.export.export`.
        path: output file.
        precision: see :func:`export_onnx`.
        metadata: properties to store in the file, as JSON.

    Raises:
        RuntimeError: a required package is not installed, or the module cannot be exported.
    """
    check_packages("onnxscript")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=model.input_names,
                output_names=getattr(model, "output_names", None) or [model.output_name],
                dynamic_shapes=shapes,
            )
    except Exception as error:  # exporters raise anything
        raise RuntimeError(f"{type(model).__name__} cannot be exported to ONNX: {error}") from error
    assert program is not None
    program.model.metadata_props.update(
        {f"spar_d2.{key}": json.dumps(value) for key, value in (metadata or {}).items()}
    )
    with atomic_write(path) as temporary:
        program.save(str(temporary), external_data=False)
        reduce_precision(Path(temporary), precision)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress and the warnings of the exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
