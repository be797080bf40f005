"""Export of encoders for use without this package."""

from spar_d2.export.check import Comparison, check_sizes, compare
from spar_d2.export.classes import write_classes
from spar_d2.export.folder import export_folder
from spar_d2.export.inputs import describe
from spar_d2.export.onnx import export_onnx
from spar_d2.export.torch_program import export_program

__all__ = [
    "Comparison",
    "check_sizes",
    "compare",
    "describe",
    "export_folder",
    "export_onnx",
    "export_program",
    "write_classes",
]
