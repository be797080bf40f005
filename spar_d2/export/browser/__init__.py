"""Export of a static page that segments photos in the visitor's browser."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import cast

from spar_d2.encoders import DenseEncoder, TextTower
from spar_d2.export.browser.packages import RUNTIME, TOKENIZERS, copy_package, write_files
from spar_d2.export.browser.words import clip_tokenizer, export_words
from spar_d2.export.inputs import describe
from spar_d2.export.onnx import export_onnx
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.utils.io import write_text
from spar_d2.visualization import class_colors

_PAGE = Path(__file__).parent / "page"
_DATA = "model.json"
# The attention of all pairs of patches must fit into the memory of a browser: 1 GB for 16 heads.
_MOST_PATCHES = 4096
# Colors of classes that visitors type.
_COLORS = 100


def export_browser(
    encoder: DenseEncoder,
    folder: str | os.PathLike,
    vocabulary: Vocabulary,
    embeddings: TextEmbeddings,
    precision: str = "float32",
    words: str = "",
    node_modules: str | os.PathLike = "",
) -> list[Path]:
    """Write a folder with a page that segments photos in the browser; any static server can serve it.

    Photos do not leave the visitor's computer, and nothing is loaded from other hosts. The model runs on the GPU
    (WebGPU) where the browser has one, else on the CPU (WebAssembly).

    Args:
        encoder: encoder to export.
        folder: output folder: new, empty, or of an earlier export.
        vocabulary: classes that visitors choose from.
        embeddings: text embeddings of the encoder.
        precision: see :func:`~spar_d2.export.export_onnx`.
        words: name of the model, to export its text tower, too, so that visitors can type other classes; "" for no.
        node_modules: folder in which npm installed the packages in :mod:`spar_d2.export.browser.packages`; "" downloads
            them with npm.

    Returns:
        The written files.

    Raises:
        ValueError: an argument is invalid, or the folder has other files.
        FileNotFoundError: ``node_modules`` has no such packages.
        RuntimeError: a required package or npm is missing, or the encoder cannot be exported.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / _DATA).is_file())):
        raise ValueError(f"--output must be a new or empty folder, or one of an earlier export; got {folder}")
    if words:
        clip_tokenizer(words)
    text, query_class = embeddings(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    written, tokens = copy_package(RUNTIME, folder, node_modules), None
    if words:
        written += copy_package(TOKENIZERS, folder, node_modules)
        files, tokens = export_words(words, cast(TextTower, embeddings.build_tower()), folder)
        written += files
    export_onnx(encoder, folder / "model.onnx", "scores", precision)
    pairs = zip(vocabulary.names, vocabulary.classes, class_colors(vocabulary.names))
    content = {
        **describe(encoder),
        "most_patches": _MOST_PATCHES,
        "classes": [{"name": name, "synonyms": list(synonyms), "color": color} for name, synonyms, color in pairs],
        "query_class": query_class.tolist(),
        "tokens": tokens,
        "templates": list(embeddings.templates),
        "colors": class_colors(_COLORS),
        "text": base64.b64encode(text.float().contiguous().numpy().astype("<f4").tobytes()).decode(),
    }
    write_text(json.dumps(content, ensure_ascii=False), folder / _DATA)
    # index.html is last: an unfinished folder shows no page.
    pages = sorted(_PAGE.iterdir(), key=lambda path: path.name == "index.html")
    write_files(folder, {page.name: page.read_bytes() for page in pages})
    return [*written, folder / "model.onnx", folder / _DATA, *(folder / page.name for page in pages)]
