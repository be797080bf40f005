"""Classes of a vocabulary beside an exported file: their text embeddings and names."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file

from spar_d2.encoders import DenseEncoder
from spar_d2.export.inputs import describe
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.utils.io import atomic_write, write_json


def write_classes(
    path: str | os.PathLike, encoder: DenseEncoder, vocabulary: Vocabulary | None, embeddings: TextEmbeddings | None
) -> list[Path]:
    """Write what a program needs to use an exported file: "NAME.json", and "NAME.safetensors" if there are classes.

    The JSON has the properties of the encoder (:func:`describe`) and "classes", a list of names and synonyms. The
    safetensors file has "text" (Q, D) float32, a unit vector for each synonym, and "query_class" (Q,) int64, the class
    of each synonym.

    Args:
        path: exported file, "NAME.onnx".
        encoder: exported encoder.
        vocabulary: classes; None for none.
        embeddings: text embeddings of the encoder; needed for a vocabulary.

    Returns:
        The written files.
    """
    stem, content, written = Path(path).with_suffix(""), describe(encoder), []
    if vocabulary is not None and embeddings is not None:
        text, query_class = embeddings(vocabulary)
        pairs = zip(vocabulary.names, vocabulary.classes)
        content["classes"] = [{"name": name, "synonyms": list(synonyms)} for name, synonyms in pairs]
        written.append(stem.with_name(f"{stem.name}.safetensors"))
        with atomic_write(written[0]) as temporary:
            save_file({"text": text.contiguous(), "query_class": query_class.contiguous()}, temporary)
    written.insert(0, stem.with_name(f"{stem.name}.json"))
    write_json(content, written[0], indent=1, ensure_ascii=False)
    return written
