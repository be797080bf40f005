"""Export of encoders for use without this package."""

from spar_d2.export.check import Comparison, check_sizes, compare
from spar_d2.export.classes import write_classes
from spar_d2.export.modules import ExportedEncoder, ExportedScores
from spar_d2.export.onnx import describe, export_onnx

__all__ = [
    "Comparison",
    "ExportedEncoder",
    "ExportedScores",
    "check_sizes",
    "compare",
    "describe",
    "export_onnx",
    "write_classes",
]
