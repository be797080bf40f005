"""Export of an encoder to a program of ``torch.export``, which runs without this package."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch.fx.experimental import _config as config

from spar_d2.encoders import DenseEncoder
from spar_d2.export.inputs import example_inputs, exported_module
from spar_d2.utils.io import atomic_write


def export_program(encoder: DenseEncoder, path: str | os.PathLike, output: str = "features") -> None:
    """Export an encoder with ``torch.export`` for images of any size.

    ``torch.export.load(path).module(check_guards=False)`` takes and returns the tensors of
    :func:`~spar_d2.export.export_onnx`, on a CPU. With its guards, it would refuse sizes of 1, which it handles well.

    Args:
        encoder: encoder to export, on any device. It is not changed.
        path: output file, "NAME.pt2".
        output: "features", "scores" or "labels".

    Raises:
        ValueError: an argument is invalid, or the encoder uses ``reference_compat``.
        RuntimeError: the encoder cannot be exported.
    """
    model = exported_module(encoder, output)
    inputs, shapes = example_inputs(model)
    try:
        # Without this, torch.export assumes that an image has more than one row and column of patches.
        with torch.no_grad(), cast(Any, config).patch(backed_size_oblivious=True):
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # exporters raise anything
        raise RuntimeError(f"{type(encoder).__name__} cannot be exported with torch.export: {error}") from error
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
