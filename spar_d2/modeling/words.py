"""The vectors of words that belong to an encoder. Needs no Detectron2."""

from __future__ import annotations

import functools

from spar_d2.encoders import EncoderSpec, TextTower
from spar_d2.encoders.registry import build_text, find_family
from spar_d2.encoders.settling import settled
from spar_d2.encoders.weights import source_checksum
from spar_d2.text import TextEmbeddings, load_templates


def text_embeddings(spec: EncoderSpec, templates: str, cache_dir: str, device: str) -> TextEmbeddings:
    """Vectors of words by the text tower of a model, which is built when it is first needed.

    Args:
        spec: the model.
        templates: see :func:`spar_d2.text.load_templates`.
        cache_dir: see :class:`spar_d2.text.TextEmbeddings`; "" keeps vectors in memory only.
        device: where words are encoded.
    """

    # Random weights are not worth keeping, and differ between versions of PyTorch.
    folder = cache_dir if spec.pretrained else None
    # Functions of this module, so that the vectors can be pickled with their model.
    build_tower, identity = functools.partial(_build_tower, spec, device), functools.partial(_identity, spec)
    return TextEmbeddings(build_tower, identity, load_templates(templates), folder)


def _build_tower(spec: EncoderSpec, device: str) -> TextTower:
    return build_text(spec).to(device)


def _identity(spec: EncoderSpec) -> str:
    """Text that differs where vectors of the same words may."""
    family = find_family(spec.name)
    # Said only where it is not what the name says, so that what was kept before there was a choice is found.
    usual = family.conventions(EncoderSpec(spec.name)).quick_gelu
    taken = settled(spec, family).quick_gelu
    activation = "" if taken == usual else f" quick_gelu={taken}"
    part = f" {spec.pretrained_part}" if spec.pretrained_part else ""
    return f"{source_checksum(spec.name)} {source_checksum(spec.pretrained)}{activation}{part}"
