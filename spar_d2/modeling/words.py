"""The vectors of words that belong to an encoder. Needs no Detectron2."""

from __future__ import annotations

from spar_d2.encoders import EncoderSpec, TextTower
from spar_d2.encoders.registry import build_text
from spar_d2.encoders.weights import fingerprint
from spar_d2.text import TextEmbeddings, load_templates


def text_embeddings(spec: EncoderSpec, templates: str, cache_dir: str, device: str) -> TextEmbeddings:
    """Vectors of words by the text tower of a model, which is built when it is first needed.

    Args:
        spec: the model.
        templates: see :func:`spar_d2.text.load_templates`.
        cache_dir: see :class:`spar_d2.text.TextEmbeddings`; "" keeps vectors in memory only.
        device: where words are encoded.
    """

    def build_tower() -> TextTower:
        return build_text(spec).to(device)

    def identity() -> str:
        return f"{fingerprint(spec.name)} {fingerprint(spec.pretrained)}"

    # Random weights are not worth keeping, and differ between versions of PyTorch.
    return TextEmbeddings(build_tower, identity, load_templates(templates), cache_dir if spec.pretrained else None)
