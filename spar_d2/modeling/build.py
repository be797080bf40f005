"""Builds encoders and teachers from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import cast

from detectron2.config import CfgNode

from spar_d2.encoders import FAMILIES, DenseEncoder, EncoderSpec
from spar_d2.encoders.precision import AUTO, PRECISIONS, resolve_precision
from spar_d2.encoders.registry import build, find_family
from spar_d2.encoders.self_correlation import SELF_CORRELATION
from spar_d2.encoders.settling import pixel_statistics, settled
from spar_d2.modeling.refinement import Refinement, parse_refine
from spar_d2.refine import load_anyup
from spar_d2.teacher import (
    TEACHER_REGISTRY,
    DenseTeacher,
    EnsembleTeacher,
    MirroredTeacher,
    RescaledTeacher,
    SinglePassTeacher,
    SlidingWindowTeacher,
    SmoothedTeacher,
    TargetCache,
    UpsampledTeacher,
    as_teacher,
)
from spar_d2.teacher.keys import PixelStatistics, encoder_key, result_key

# Kinds that refine the targets of the kind in SPAR.TEACHER.BASE.
_REFINED = ("smoothed", "upsampled")
# Errors of building an encoder.
_ERRORS = (ValueError, FileNotFoundError, RuntimeError)


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


def teacher_from_config(cfg: CfgNode) -> DenseTeacher:
    """Build the teacher of ``SPAR.TEACHER``; built-in ones use the pre-trained encoder of ``MODEL.SPAR``.

    Raises:
        ValueError: the kind is unknown, or the precision, window or stride is invalid; or as ``build_encoder``.
    """
    return as_teacher(_builder(cfg.SPAR.TEACHER.KIND, "SPAR.TEACHER.KIND")(cfg))


def target_cache(cfg: CfgNode, teacher: DenseTeacher) -> TargetCache:
    """Return the cache in ``SPAR.TEACHER.CACHE_DIR`` for the targets of a teacher.

    Raises:
        ValueError: the folder cannot be created, or the teacher has no identity.
    """
    spec = encoder_spec(cfg)
    statistics = PixelStatistics(*pixel_statistics(settled(spec, find_family(spec.name))))
    return TargetCache(cfg.SPAR.TEACHER.CACHE_DIR, teacher, statistics)


def refinement_from_config(cfg: CfgNode) -> Refinement | None:
    """Build the refinement of ``MODEL.SPAR.REFINE``; None if there is none, or if the output is "features".

    Raises:
        ValueError: a value is invalid, or does not go with another one; or as ``build_encoder`` and ``load_anyup``.
        FileNotFoundError, RuntimeError: as ``build_encoder`` and ``load_anyup``.
    """
    spar, steps = cfg.MODEL.SPAR, parse_refine(cfg.MODEL.SPAR.REFINE)
    if not steps or spar.OUTPUT == "features":
        return None
    with_anyup = "anyup" in steps and spar.ANYUP
    anyup = load_anyup(spar.ANYUP, "MODEL.SPAR.ANYUP") if with_anyup else None
    guide = _guide_encoder(cfg) if "lposs" in steps else None
    return Refinement(steps, spar.REFINE_NEIGHBOURS, anyup, guide)


def _guide_encoder(cfg: CfgNode) -> DenseEncoder | None:
    """Build the encoder whose features guide LPOSS, frozen; None for the encoder of the segmentor."""
    spar = cfg.MODEL.SPAR
    if not spar.REFINE_ENCODER:
        for key in ("REFINE_PRETRAINED", "REFINE_READOUT"):
            if spar[key]:
                raise ValueError(f'MODEL.SPAR.{key} is of the encoder MODEL.SPAR.REFINE_ENCODER, which is ""; set both')
        return None
    spec = EncoderSpec(spar.REFINE_ENCODER, spar.REFINE_PRETRAINED, readout=spar.REFINE_READOUT)
    spec = dataclasses.replace(spec, dinov3_repo=spar.DINOV3_REPO)
    try:
        readouts = find_family(spec.name).readouts
        if spec.readout in ("", *readouts):
            precision = precision_from_config(cfg)
            return build(spec).to(cfg.MODEL.DEVICE).accelerate(precision, spar.COMPILE).freeze()
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"MODEL.SPAR.REFINE_ENCODER, REFINE_PRETRAINED: {error}") from error
    allowed = ", ".join(f'"{readout}"' for readout in ("", *readouts))
    raise ValueError(f"MODEL.SPAR.REFINE_READOUT must be one of {allowed} for {spec.name}; got {spec.readout!r}")


@TEACHER_REGISTRY.register()
def sliding(cfg: CfgNode) -> DenseTeacher:
    """Sliding window."""
    return _window_teacher(cfg, encoder_spec(cfg))


@TEACHER_REGISTRY.register()
def self_correlation(cfg: CfgNode) -> DenseTeacher:
    """Sliding window with the read-out "self_correlation"."""
    spec = encoder_spec(cfg)
    if SELF_CORRELATION not in find_family(spec.name).readouts:
        supported = ", ".join(name for name, family in FAMILIES.items() if SELF_CORRELATION in family.readouts)
        raise ValueError(
            f"SPAR.TEACHER.KIND: {SELF_CORRELATION} supports encoders of {supported}; got {spec.name}. Use sliding"
        )
    return _window_teacher(cfg, dataclasses.replace(spec, readout=SELF_CORRELATION))


@TEACHER_REGISTRY.register()
def ensemble(cfg: CfgNode) -> DenseTeacher:
    """Mean of the teachers in ``SPAR.TEACHER.ENSEMBLE``."""
    encoders: dict[tuple, DenseEncoder] = {}
    members: list[DenseTeacher] = []
    entries: dict[str, str] = {}
    for entry in map(str, cfg.SPAR.TEACHER.ENSEMBLE):
        try:
            members.append(_member(cfg, [word.strip() for word in entry.split("+")], encoders))
        except ValueError as error:
            raise ValueError(f"SPAR.TEACHER.ENSEMBLE, member {entry!r}: {error}") from error
        earlier = entries.setdefault(result_key(members[-1]), entry)
        if len(entries) < len(members):
            raise ValueError(f"SPAR.TEACHER.ENSEMBLE: {earlier!r} and {entry!r} are the same; members must differ")
    return EnsembleTeacher(members)


@TEACHER_REGISTRY.register()
def smoothed(cfg: CfgNode) -> DenseTeacher:
    """Targets of the kind ``SPAR.TEACHER.BASE``, smoothed by label propagation."""
    return SmoothedTeacher(_base(cfg), cfg.SPAR.TEACHER.NEIGHBOURS)


@TEACHER_REGISTRY.register()
def upsampled(cfg: CfgNode) -> DenseTeacher:
    """Targets of the kind ``SPAR.TEACHER.BASE``, upsampled with AnyUp and averaged in each patch."""
    if not cfg.SPAR.TEACHER.ANYUP:
        raise ValueError(
            'SPAR.TEACHER.ANYUP must be the weights of AnyUp (anyup_multi_backbone.pth of wimmerth/anyup), got ""'
        )
    anyup = load_anyup(cfg.SPAR.TEACHER.ANYUP, "SPAR.TEACHER.ANYUP").to(cfg.MODEL.DEVICE)
    return UpsampledTeacher(_base(cfg), anyup, cfg.SPAR.TEACHER.UPSAMPLING)


def _base(cfg: CfgNode) -> DenseTeacher:
    base = cfg.SPAR.TEACHER.BASE
    teacher = None if base in _REFINED else as_teacher(_builder(base, "SPAR.TEACHER.BASE", _REFINED)(cfg))
    if not hasattr(teacher, "encoder"):
        raise ValueError(
            "SPAR.TEACHER.BASE must be a kind whose teacher has an encoder, such as sliding, self_correlation or an "
            f"ensemble that begins with one of these; got {base!r}"
        )
    return cast(DenseTeacher, teacher)


def _member(cfg: CfgNode, words: Sequence[str], encoders: dict[tuple, DenseEncoder]) -> DenseTeacher:
    """Build a member of an ensemble.

    Args:
        cfg: config of the ensemble.
        words: kind and settings of the member, an entry of ``SPAR.TEACHER.ENSEMBLE``.
        encoders: encoders of the other members, which the member shares.

    Raises:
        ValueError: a word is unknown, is not in its place or does not go with the kind.
    """
    cfg = cfg.clone()
    cfg.defrost()
    kind, mirror, scale = "sliding", False, 1.0
    names = [word.partition(":")[0] for word in words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} must stand once in a member")
    for number, word in enumerate(words):
        name, _, value = word.partition(":")
        if word == "single_pass":
            cfg.SPAR.TEACHER.SINGLE_PASS = True
        elif word == "mirror":
            mirror = True
        elif name == "stride" and value.isdecimal():
            cfg.SPAR.TEACHER.STRIDE = int(value)
        elif name == "scale" and _is_number(value):
            scale = float(value)
        elif number == 0 and name in TEACHER_REGISTRY and name != "ensemble" and not value:
            kind = name
            if kind in _REFINED and cfg.SPAR.TEACHER.BASE == "ensemble":
                raise ValueError(f"SPAR.TEACHER.BASE must not be ensemble if a member of the ensemble is {kind}")
        else:
            kinds = ", ".join(sorted(kind for kind, _ in TEACHER_REGISTRY if kind != "ensemble"))
            raise ValueError(
                f"members are a kind ({kinds}), stride:PIXELS, scale:FACTOR, mirror, single_pass, or several of these "
                f'joined by "+", the kind first; got {word!r}'
            )
    teacher = as_teacher(_builder(kind, "SPAR.TEACHER.ENSEMBLE")(cfg))
    if isinstance(teacher, (SlidingWindowTeacher, SinglePassTeacher)):
        key = (type(teacher), encoder_key(teacher.encoder))
        teacher.encoder = encoders.setdefault(key, teacher.encoder)
    if (mirror or scale != 1) and not hasattr(teacher, "encoder"):
        raise ValueError(f"{kind} has no encoder, so mirror and scale do not apply")
    teacher = RescaledTeacher(teacher, scale) if scale != 1 else teacher
    return MirroredTeacher(teacher) if mirror else teacher


def _builder(kind: str, key: str, excluded: Collection[str] = ()):
    if kind not in TEACHER_REGISTRY:
        kinds = ", ".join(sorted({kind for kind, _ in TEACHER_REGISTRY} - set(excluded)))
        raise ValueError(
            f"{key} must be one of {kinds}, or a function that a module of --import registers with "
            f"TEACHER_REGISTRY.register(); got {kind!r}"
        )
    return TEACHER_REGISTRY.get(kind)


def _is_number(text: str) -> bool:
    try:
        return bool(float(text))
    except ValueError:
        return False


def _window_teacher(cfg: CfgNode, spec: EncoderSpec) -> SlidingWindowTeacher | SinglePassTeacher:
    spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
    precision = resolve_precision(teacher.PRECISION or spar.PRECISION, cfg.MODEL.DEVICE)
    if not teacher.PRECISION and cfg.SOLVER.AMP.ENABLED and precision == "float32":
        precision = "float16"  # same as Detectron2's mixed precision for the student
    _check_precision('SPAR.TEACHER.PRECISION must be "" or one of', precision)
    encoder = build(spec).accelerate(precision, spar.COMPILE).to(cfg.MODEL.DEVICE)
    if teacher.SINGLE_PASS:
        return SinglePassTeacher(encoder)
    return SlidingWindowTeacher(encoder, teacher.WINDOW, teacher.STRIDE, teacher.BATCH_SIZE)


def _check_precision(must: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{must} {', '.join((*PRECISIONS, AUTO))}; got {precision!r}")
