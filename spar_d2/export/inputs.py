"""Example inputs of exported modules, with free sizes."""

from __future__ import annotations

import json

import torch

from spar_d2 import __version__
from spar_d2.encoders import DenseEncoder
from spar_d2.export.modules import EXPORTED, ExportedEncoder


def exported_module(encoder: DenseEncoder, output: str) -> ExportedEncoder:
    """Wrap a copy of an encoder in the module for an output.

    Raises:
        ValueError: the output is unknown, or the encoder uses ``reference_compat``.
    """
    if output not in EXPORTED:
        raise ValueError(f"output must be one of {', '.join(EXPORTED)}; got {output!r}")
    return EXPORTED[output](encoder).eval()


def example_inputs(model: ExportedEncoder) -> tuple[tuple[torch.Tensor, ...], tuple[dict, ...]]:
    """Return inputs to trace a module with, and their free dimensions for :func:`torch.export.export`."""
    free, patch = torch.export.Dim.DYNAMIC, model.encoder.patch_size
    # No example size may be 0, 1 or a size of the encoder: torch.export would take it for a fixed one.
    examples = {
        "image": torch.zeros(2, 3, 4 * patch + 1, 5 * patch + 1),
        "text": torch.zeros(3, model.encoder.embed_dim),
        "query_class": torch.zeros(3, dtype=torch.int64),
        "seen": torch.zeros(5, dtype=torch.bool),
    }
    shapes = {"image": {0: free, 2: free, 3: free}, **dict.fromkeys(("text", "query_class", "seen"), {0: free})}
    return tuple(examples[name] for name in model.input_names), tuple(shapes[name] for name in model.input_names)


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
