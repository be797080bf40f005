"""Text embeddings of an encoder. Does not need Detectron2."""

from __future__ import annotations

import functools

from spar_d2.encoders import EncoderSpec, TextTower
from spar_d2.encoders.registry import build_text, find_family
from spar_d2.encoders.settling import settled
from spar_d2.encoders.weights import source_checksum
from spar_d2.text import TextEmbeddings, load_templates


def text_embeddings(spec: EncoderSpec, templates: str, cache_dir: str, device: str) -> TextEmbeddings:
    """Create text embeddings for a model. Its text tower is built on first use.

    Args:
        spec: spec of the model.
        templates: see :func:`spar_d2.text.load_templates`.
        cache_dir: see :class:`spar_d2.text.TextEmbeddings`; "" caches embeddings in memory only.
        device: device of the text tower.
    """

    # Embeddings of random weights are useless, and differ between versions of PyTorch.
    folder = cache_dir if spec.pretrained else None
    # Module-level functions, so that the embeddings can be pickled with their model.
    build_tower, identity = functools.partial(_build_tower, spec, device), functools.partial(_identity, spec)
    return TextEmbeddings(build_tower, identity, load_templates(templates), folder)


def _build_tower(spec: EncoderSpec, device: str) -> TextTower:
    return build_text(spec).to(device)


def _identity(spec: EncoderSpec) -> str:
    """Cache key of the text tower: differs if embeddings of the same text may differ."""
    family = find_family(spec.name)
    # The activation is added only if it is not the model's default, so that existing cache entries stay valid.
    usual = family.conventions(EncoderSpec(spec.name)).quick_gelu
    taken = settled(spec, family).quick_gelu
    activation = "" if taken == usual else f" quick_gelu={taken}"
    part = f" {spec.pretrained_part}" if spec.pretrained_part else ""
    return f"{source_checksum(spec.name)} {source_checksum(spec.pretrained)}{activation}{part}"
