"""Export of an encoder to one ONNX file for images of any size and any number of classes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator

import torch

from spar_d2 import __version__
from spar_d2.encoders import DenseEncoder
from spar_d2.export.modules import ExportedEncoder, ExportedScores
from spar_d2.utils.io import atomic_write

OPSET = 18
_PACKAGES = "onnx onnxscript onnxruntime"
# Larger models do not fit into one file of protocol buffers.
_LARGEST_BYTES = 1_900_000_000


def export_onnx(encoder: DenseEncoder, path: str | os.PathLike, scores: bool = False) -> None:
    """Export an encoder to ONNX.

    The file has the input "image" (B, 3, H, W) float32, RGB in 0..255, and the output "features" (B, D, ceil(H / p),
    ceil(W / p)) float32. With ``scores``, it also has the input "text" (Q, D) float32, unit vectors, and instead of
    features the output "scores" (B, Q, ceil(H / p), ceil(W / p)) float32, cosine similarities. B, H, W and Q are free.

    Args:
        encoder: encoder to export, on any device. It is not changed.
        path: output file.
        scores: export scores instead of features.

    Raises:
        ValueError: the encoder uses ``reference_compat``, or its weights are larger than 1.9 GB.
        RuntimeError: a required package is not installed, or the encoder cannot be exported.
    """
    model = (ExportedScores if scores else ExportedEncoder)(encoder).eval()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _LARGEST_BYTES:
        raise ValueError(
            f"the weights must be at most {_LARGEST_BYTES / 1e9} GB for one ONNX file, got {size / 1e9:.1f} GB"
        )
    program = _onnx_program(model, encoder)
    metadata = describe(encoder)
    program.model.metadata_props.update({f"spar_d2.{key}": json.dumps(value) for key, value in metadata.items()})
    with atomic_write(path) as temporary:
        program.save(str(temporary), external_data=False)


def describe(encoder: DenseEncoder) -> dict:
    """Return the properties of an encoder that users of an exported file need."""
    return {
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.embed_dim,
        "native_size": encoder.native_size,
        "pixel_mean": list(encoder.pixel_mean),
        "pixel_std": list(encoder.pixel_std),
        "logit_scale": encoder.logit_scale,
        "origin": json.loads(encoder.origin.text()) if encoder.origin else {},
        "version": __version__,
    }


def _onnx_program(model: ExportedEncoder, encoder: DenseEncoder) -> torch.onnx.ONNXProgram:
    check_packages("onnxscript")
    free = torch.export.Dim.DYNAMIC
    # No example size may be 0, 1 or a size of the encoder: torch.export would take it for a fixed one.
    height, width = (encoder.patch_size * cells + 1 for cells in (4, 5))
    examples = {"image": torch.zeros(2, 3, height, width), "text": torch.zeros(3, encoder.embed_dim)}
    shapes = {"image": {0: free, 2: free, 3: free}, "text": {0: free}}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(examples[name] for name in model.input_names),
                dynamo=True,
                opset_version=OPSET,
                input_names=model.input_names,
                output_names=[model.output_name],
                dynamic_shapes=tuple(shapes[name] for name in model.input_names),
            )
    except Exception as error:  # exporters raise anything
        raise RuntimeError(f"{type(encoder).__name__} cannot be exported to ONNX: {error}") from error
    assert program is not None
    return program


def check_packages(*names: str) -> None:
    """Raise ``RuntimeError`` if a package is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise RuntimeError(f"the export to ONNX requires {name}; run: pip install {_PACKAGES}") from error


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
