"""Builds encoders and teachers from a config."""

from __future__ import annotations

from detectron2.config import CfgNode

from spar_d2.encoders import EncoderSpec
from spar_d2.encoders.precision import AUTO, PRECISIONS, resolve_precision
from spar_d2.encoders.registry import build
from spar_d2.teacher import SlidingWindowTeacher


def encoder_spec(cfg: CfgNode) -> EncoderSpec:
    """Convert ``MODEL.SPAR`` to an encoder spec."""
    spar = cfg.MODEL.SPAR
    return EncoderSpec(
        name=spar.ENCODER,
        pretrained=spar.PRETRAINED,
        reference_compat=spar.REFERENCE_COMPAT,
        dinov3_repo=spar.DINOV3_REPO,
        dinov3_backbone=spar.DINOV3_BACKBONE,
        dinov3_tokens=spar.DINOV3_TOKENS,
        pixel_mean=spar.PIXEL_MEAN,
        pixel_std=spar.PIXEL_STD,
        quick_gelu=spar.QUICK_GELU,
        pretrained_part=spar.PRETRAINED_PART,
        readout=spar.READOUT,
    )


def precision_from_config(cfg: CfgNode) -> str:
    """Return ``MODEL.SPAR.PRECISION``, with "auto" resolved for ``MODEL.DEVICE``.

    Raises:
        ValueError: the precision is unknown.
    """
    precision = resolve_precision(cfg.MODEL.SPAR.PRECISION, cfg.MODEL.DEVICE)
    _check_precision("MODEL.SPAR.PRECISION must be one of", precision)
    return precision


def teacher_from_config(cfg: CfgNode) -> SlidingWindowTeacher:
    """Build the teacher of ``SPAR.TEACHER`` with the pre-trained encoder of ``MODEL.SPAR``, on ``MODEL.DEVICE``.

    Raises:
        ValueError: the precision, window or stride is invalid; or as ``build_encoder``.
    """
    spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
    precision = resolve_precision(teacher.PRECISION or spar.PRECISION, cfg.MODEL.DEVICE)
    if not teacher.PRECISION and cfg.SOLVER.AMP.ENABLED and precision == "float32":
        precision = "float16"  # same as Detectron2's mixed precision for the student
    _check_precision('SPAR.TEACHER.PRECISION must be "" or one of', precision)
    encoder = build(encoder_spec(cfg)).accelerate(precision, spar.COMPILE).to(cfg.MODEL.DEVICE)
    return SlidingWindowTeacher(encoder, teacher.WINDOW, teacher.STRIDE, teacher.BATCH_SIZE)


def _check_precision(must: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{must} {', '.join((*PRECISIONS, AUTO))}; got {precision!r}")
