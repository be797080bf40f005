"""Words to unit vectors, computed once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spar_d2.text.vocabulary import Vocabulary
from spar_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What the embeddings need of a text tower."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to (n, D), not normalized."""
        ...

    def reads_all(self, text: str) -> bool:
        """Whether it sees a text to its end."""
        ...


class TextEmbeddings:
    """Unit vectors of a vocabulary's words, kept in memory word by word and, if wanted, on disk.

    Every word is put into all templates; the vectors of the sentences are normalized, averaged, and normalized again.

    Args:
        build_tower: makes the text tower. Called only when something must be computed; the tower is freed afterwards.
        identity: text that names model and weights, or a function that gives it, called when first needed; entries on
            disk are found by it, the templates and the words.
        templates: sentences with one "{}" each.
        cache_dir: folder for entries on disk; None keeps them in memory only, "auto" is :func:`default_cache_dir`.
    """

    def __init__(
        self,
        build_tower: Callable[[], TextEncoder],
        identity: str | Callable[[], str],
        templates: Sequence[str],
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.build_tower = build_tower
        self.identity = identity
        self.templates = tuple(templates)
        self.cache_dir = _usable(cache_dir)
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of all queries.

        Returns:
            text (Q, D) float32 of unit length, and query_class (Q,) int64, the class of each; on the CPU.
        """
        queries = vocabulary.queries
        missing = [word for word in dict.fromkeys(queries) if word not in self._memory]
        if missing:
            file = self.cache_dir / f"{self._key(missing)}.safetensors" if self.cache_dir else None
            vectors = _read(file, len(missing)) if file and file.is_file() else None
            if vectors is None:
                vectors = self._compute(missing)
                if file:
                    _write(file, vectors)
            self._memory.update(zip(missing, vectors))
        return torch.stack([self._memory[word] for word in queries]), torch.tensor(vocabulary.query_class)

    def _key(self, words: list[str]) -> str:
        if callable(self.identity):
            self.identity = self.identity()
        content = json.dumps([self.identity, self.templates, words], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _compute(self, words: list[str]) -> torch.Tensor:
        logger.info("Encoding %d words in %d templates ...", len(words), len(self.templates))
        tower = self.build_tower()
        for word in words:
            # The words are what matters: what follows them in a template may be cut.
            if not all(tower.reads_all(template[: template.index("{}")] + word) for template in self.templates):
                logger.warning("The text encoder does not read this to its end, it is too long: %r", _shortened(word))
        sentences = [template.replace("{}", word) for word in words for template in self.templates]
        # (Q * templates, D) -> (Q, templates, D)
        vectors = F.normalize(tower.encode(sentences).float(), dim=-1).unflatten(0, (len(words), -1))
        return F.normalize(vectors.mean(1), dim=-1).cpu()


def _usable(folder: str | os.PathLike | None) -> Path | None:
    """The folder for entries; None, with a warning, where it may not be entered or nobody's home is known."""
    if not folder:
        return None
    try:
        path = default_cache_dir() if folder == "auto" else Path(folder).expanduser()
        (path / "entry").is_file()
    except (OSError, RuntimeError) as error:
        logger.warning("Text vectors are not kept between runs: %s (MODEL.SPAR.TEXT_CACHE, SPAR_CACHE)", error)
        return None
    return path


def _read(file: Path, words: int) -> torch.Tensor | None:
    try:
        vectors = load_file(file)["text"]
        if vectors.ndim == 2 and len(vectors) == words:
            return vectors
        error = f"{words} vectors expected, got the shape {tuple(vectors.shape)}"
    except (SafetensorError, KeyError, OSError) as reason:
        error = reason
    logger.warning("The stored text vectors %s are damaged (%s); computing them again.", file, error)
    return None


def _write(file: Path, vectors: torch.Tensor) -> None:
    try:
        with atomic_write(file) as temporary:
            save_file({"text": vectors}, temporary)
    except OSError as error:
        logger.warning("Text vectors could not be stored in %s (%s); going on without.", file.parent, error)


def default_cache_dir() -> Path:
    """Folder for vectors of words: "text" in the folder that SPAR_CACHE names, or else in ~/.cache/spar_d2."""
    return Path(os.environ.get("SPAR_CACHE") or "~/.cache/spar_d2").expanduser() / "text"


def _shortened(word: str) -> str:
    return word if len(word) <= 60 else f"{word[:60]}..."
