"""MaskTransformer as a plain module for export: pixels in 0..255 in, class and mask logits out, for any size."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from spar_d2.export.inputs import describe, example_inputs
from spar_d2.export.modules import ExportedEncoder
from spar_d2.export.onnx import check_bytes, save_onnx
from spar_d2.export.onnx_precision import check_precision
from spar_d2.modeling.example_embeddings import ClassVectors
from spar_d2.modeling.mask_transformer.classifiers import LearnedClassifier, TextClassifier, pooled_features, two_way
from spar_d2.modeling.mask_transformer.head import MaskTransformerHead
from spar_d2.modeling.mask_transformer.joined_head import JoinedHead
from spar_d2.modeling.mask_transformer.predictor import Prediction
from spar_d2.modeling.mask_transformer.segmentor import MaskTransformer
from spar_d2.utils.io import atomic_write, write_json

# Smaller probabilities have no finite logarithm in float32.
_LEAST = 1e-30


class ExportedMaskTransformer(ExportedEncoder):
    """A MaskTransformer with a learned classifier.

    Args:
        model: model, which is copied.

    Raises:
        ValueError: the encoder handles image sizes as the reference code (``reference_compat``).
    """

    output_name = "class_logits"
    output_names = ("class_logits", "masks")
    head: MaskTransformerHead | JoinedHead

    def __init__(self, model: MaskTransformer) -> None:
        super().__init__(model.backbone.encoder)
        self.head = copy.deepcopy(model.head).cpu().float()
        self.classifier = copy.deepcopy(model.classifier).cpu().float()
        self.eval().requires_grad_(False)
        self.laterals = model.laterals

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Compute classes and masks of all queries.

        Args:
            image: (B, 3, H, W) float32 RGB in 0..255, of any size.

        Returns:
            Class logits (B, Q, K + 1), the last class for no object; and mask logits (B, Q, h * s, w * s) for s x s
            cells in each patch, also of patches at the border that are partly outside of the image.
        """
        _, prediction = self._predicted((image - self.mean) / self.std)
        return self.classifier(prediction.embeddings), prediction.masks

    def _predicted(self, x: torch.Tensor) -> tuple[torch.Tensor | None, Prediction]:
        """Return dense features, or None if queries pass the encoder, and the prediction for normalized images."""
        if isinstance(self.head, JoinedHead):
            return None, self.head(self.encoder, x)[-1]
        features = self.encoder.intermediates(x, self.laterals, dense=True)
        return features[-1], self.head(features)[-1]


class ExportedTextClasses(ExportedMaskTransformer):
    """A MaskTransformer whose classes are words, with their vectors as inputs."""

    input_names = ("image", "text", "query_class", "seen")
    classifier: TextClassifier

    def __init__(self, model: MaskTransformer) -> None:
        super().__init__(model)
        if model.inference != "single_pass":
            raise ValueError(
                f"MODEL.SPAR.INFERENCE must be single_pass for an export, got {model.inference}: no file has windows"
            )
        assert model.vocabulary is not None
        self.scale, self.weights = model.vocabulary.scale, model.vocabulary.weights

    def forward(  # type: ignore[override]
        self, image: torch.Tensor, text: torch.Tensor, query_class: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute classes and masks of all queries.

        Args:
            image: (B, 3, H, W) float32 RGB in 0..255, of any size.
            text: (N, D) float32 unit vectors.
            query_class: (N,) int64 class of each vector.
            seen: (K,) bool, whether a class was trained.

        Returns:
            As in the base class; class logits are the logarithm of the probabilities.
        """
        x = (image - self.mean) / self.std
        dense, prediction = self._predicted(x)
        dense = self.encoder(x) if dense is None else dense
        self.classifier.set_classes(ClassVectors(text, query_class), seen.shape[0])
        cosines = self.classifier.scores(pooled_features(dense, prediction.masks, self.head.predictor.cells))
        logits = self.classifier(prediction.embeddings)
        probabilities = two_way(logits, cosines, self.scale, seen, self.weights)
        return probabilities.clamp(min=_LEAST).log(), prediction.masks


class ExportedFixedWords(ExportedTextClasses):
    """A MaskTransformer whose classes are words, with the vectors of its present classes inside."""

    input_names = ("image",)
    text: torch.Tensor
    query_class: torch.Tensor
    seen: torch.Tensor

    def __init__(self, model: MaskTransformer) -> None:
        super().__init__(model)
        for name, tensor in class_inputs(model).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Compute classes and masks of all queries; image and results as in :class:`ExportedMaskTransformer`."""
        return super().forward(image, self.text, self.query_class, self.seen)


def exported_mask_transformer(model: MaskTransformer, free_classes: bool = False) -> ExportedMaskTransformer:
    """Wrap a copy of a model in a module for export.

    Args:
        model: model with a learned classifier, or with words.
        free_classes: whether the vectors of the classes are inputs.

    Raises:
        ValueError: ``free_classes`` is set for a learned classifier, or the model cannot be exported.
    """
    if isinstance(model.classifier, LearnedClassifier):
        if free_classes:
            raise ValueError(
                "--free-classes needs a model with MODEL.MASK_TRANSFORMER.CLASSIFIER text, got a learned classifier"
            )
        return ExportedMaskTransformer(model).eval()
    return (ExportedTextClasses if free_classes else ExportedFixedWords)(model).eval()


def class_inputs(model: MaskTransformer) -> dict[str, torch.Tensor]:
    """Return "text", "query_class" and "seen" of the present classes of a model whose classes are words."""
    words = model.vocabulary
    assert words is not None
    text, query_class = words.embeddings(words.tested.vocabulary)
    return {"text": text.cpu(), "query_class": query_class.cpu(), "seen": words.two_way(torch.device("cpu"))[1]}


def export_mask_transformer(
    model: MaskTransformer, path: str | os.PathLike, free_classes: bool = False, precision: str = "float32"
) -> ExportedMaskTransformer:
    """Export a model to ONNX.

    The file has the input "image" (B, 3, H, W) float32, RGB in 0..255, and the outputs "class_logits" (B, Q, K + 1) and
    "masks" (B, Q, h * s, w * s), see :meth:`ExportedMaskTransformer.forward`. B, H and W are free. With
    ``free_classes``, it also has the inputs of :meth:`ExportedTextClasses.forward`, and K is free.

    Args:
        model: model to export, on any device. It is not changed.
        path: output file.
        free_classes: whether the vectors of the classes are inputs.
        precision: see :func:`spar_d2.export.export_onnx`.

    Returns:
        The exported module, for comparisons.

    Raises:
        ValueError: an argument is invalid, or the model cannot be exported.
        RuntimeError: a required package is not installed, or the exporter failed.
    """
    check_precision(precision)
    module = exported_mask_transformer(model, free_classes)
    check_bytes(module)
    save_onnx(module, *example_inputs(module), path, precision, describe(module.encoder) | {"precision": precision})
    return module


def write_model_classes(
    path: str | os.PathLike, model: MaskTransformer, names: tuple[list[str], list[str]]
) -> list[Path]:
    """Write what a program needs to use an exported file: "NAME.json", and "NAME.safetensors" if classes are words.

    The JSON has the properties of the encoder, "mask_cells" (cells along each side of a patch), the thresholds, and
    "classes", in order: name, and whether it is a thing. The safetensors file has the tensors of :func:`class_inputs`.

    Args:
        path: exported file, "NAME.onnx".
        model: exported model.
        names: names of things and of stuff, for a learned classifier.

    Returns:
        The written files.
    """
    stem, words = Path(path).with_suffix(""), model.vocabulary
    things, stuff = names
    if words is not None:
        known = words.tested.vocabulary.names
        things, stuff = known[: words.things], known[words.things :]
    pairs = [*((name, True) for name in things), *((name, False) for name in stuff)]
    content = describe(model.backbone.encoder) | {
        "task": model.task,
        "mask_cells": model.head.predictor.cells,
        "object_threshold": model.object_threshold,
        "overlap_threshold": model.overlap_threshold,
        "duplicate_threshold": model.duplicate_threshold,
        "classes": [{"name": name, "thing": thing} for name, thing in pairs],
    }
    written = [stem.with_name(f"{stem.name}.json")]
    write_json(content, written[0], indent=1, ensure_ascii=False)
    if words is not None:
        written.append(stem.with_name(f"{stem.name}.safetensors"))
        with atomic_write(written[1]) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in class_inputs(model).items()}, temporary)
    return written
