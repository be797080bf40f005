"""Smaller ONNX files: half precision and 8-bit integers, by the tools of onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path

from spar_d2.export.packages import check_packages

PRECISIONS = ("float32", "float16", "int8")
# These compute in half precision. Norms, softmax and positions stay in float32, as with autocast: their values can
# exceed the range of float16.
_HALF = {"MatMul", "Gemm", "Conv", "Gather", "Transpose", "Reshape"}


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` if a precision is unknown."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")


def reduce_precision(path: Path, precision: str) -> None:
    """Convert a float32 ONNX file in place."""
    if precision == "float32":
        return
    check_packages("onnx", "onnxruntime")
    import onnx

    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = onnx.load(path)
        others = sorted({node.op_type for node in model.graph.node} - _HALF)
        onnx.save(convert_float_to_float16(model, keep_io_types=True, op_block_list=others), path)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It advises through the root logger to optimize the graph, which the exporter did.
    root = logging.getLogger()
    level, root.level = root.level, logging.ERROR
    try:
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        root.level = level
