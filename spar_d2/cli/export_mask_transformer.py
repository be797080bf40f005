"""Export of a trained MaskTransformer, for `spar-d2 export onnx --config-file`."""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

import spar_d2  # noqa: F401  registers
from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.data.build import MASK_TRANSFORMER, dataset_of_classes
from spar_d2.demo.panoptic import check_new_classes
from spar_d2.engine.setup import load_config
from spar_d2.export import check_sizes
from spar_d2.export.check import Comparison, compare_module
from spar_d2.modeling.mask_transformer import MaskTransformer
from spar_d2.modeling.mask_transformer.exported import export_mask_transformer, write_model_classes
from spar_d2.modeling.mask_transformer.settings import TASKS
from spar_d2.modeling.mask_transformer.vocabulary_classes import dataset_vocabulary
from spar_d2.utils.io import check_not_read


def export(args: argparse.Namespace) -> tuple[list[Path], list[Comparison]]:
    """Export the model of ``args.config_file``.

    Returns:
        The written files, and comparisons with PyTorch if ``args.check`` is set.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: an argument is invalid, or the model cannot be exported.
    """
    cfg = _config(args)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError("--weights or MODEL.WEIGHTS must name the checkpoint of the trained model")
    for output in (args.output, args.output.with_suffix(".safetensors")):
        check_not_read(output, {"--weights": weights})
    model = build_model(cfg).eval()
    names = class_names(cfg, model)
    Checkpointer(model).load(weights)
    module = export_mask_transformer(model, args.output, args.free_classes, args.precision)
    written = [args.output, *write_model_classes(args.output, model, names)]
    sizes = check_sizes(module.encoder) if args.check else []
    return written, list(compare_module(args.output, module, sizes)) if sizes else []


def _config(args: argparse.Namespace) -> CfgNode:
    if args.kind != "features":
        raise ValueError(f"--{args.kind} is an output of encoders; it must not be used with --config-file")
    if args.weights and not Path(args.weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {args.weights}")
    overrides = [*args.opts, "MODEL.DEVICE", "cpu"]
    for key, value in (("VOCABULARY", args.vocabulary), ("TEMPLATES", args.templates)):
        # Quoted, because yacs would parse a file named "2024" as a number.
        overrides += [f"MODEL.SPAR.{key}", repr(value)] if value else []
    cfg = load_config(args.config_file, overrides)
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind != MASK_TRANSFORMER:
        raise ValueError(f"--config-file must be a config of {MASK_TRANSFORMER}, got one of {kind}; see --encoder")
    if args.vocabulary:
        check_new_classes(cfg, "--vocabulary")
    return cfg


def class_names(cfg: CfgNode, model: MaskTransformer) -> tuple[list[str], list[str]]:
    """Return the names of things and stuff of a model with a learned classifier: those of its data set.

    Raises:
        ValueError: there is no data set, or it has another number of classes.
    """
    if model.vocabulary is not None:
        return [], []
    dataset = dataset_of_classes(cfg)
    found = dataset_vocabulary(dataset, model.task == TASKS[0])
    names, things = found.vocabulary.names, found.things
    model.check_classes(dataset, things, len(names) - things)
    return names[:things], names[things:]
