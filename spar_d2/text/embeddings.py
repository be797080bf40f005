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

from spar_d2.files import replacing
from spar_d2.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What the embeddings need of a text tower."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to (n, D), not normalised."""


class TextEmbeddings:
    """Unit vectors of a vocabulary's words, kept in memory and, if wanted, on disk.

    Every word is put into all templates; the vectors of the sentences are normalised, averaged, and normalised again.

    Args:
        build_tower: makes the text tower. Called only when something must be computed; the tower is freed afterwards.
        identity: text that names model and weights; entries on disk are found by it, the templates and the words.
        templates: sentences with one "{}" each.
        cache_dir: folder for entries on disk; None keeps them in memory only.
    """

    def __init__(
        self,
        build_tower: Callable[[], TextEncoder],
        identity: str,
        templates: Sequence[str],
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.build_tower = build_tower
        self.identity = identity
        self.templates = tuple(templates)
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of all queries.

        Returns:
            text (Q, D) float32 of unit length, and query_class (Q,) int64, the class of each; on the CPU.
        """
        queries = vocabulary.queries
        key = self._key(queries)
        if key not in self._memory:
            vectors = self._read(key)
            if vectors is None:
                vectors = self._compute(queries)
                self._write(key, vectors)
            self._memory[key] = vectors
        return self._memory[key], torch.tensor(vocabulary.query_class)

    def _key(self, queries: list[str]) -> str:
        content = json.dumps([self.identity, self.templates, queries], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _compute(self, queries: list[str]) -> torch.Tensor:
        logger.info("Encoding %d words in %d templates ...", len(queries), len(self.templates))
        tower = self.build_tower()
        sentences = [template.replace("{}", query) for query in queries for template in self.templates]
        # (Q * templates, D) -> (Q, templates, D)
        vectors = F.normalize(tower.encode(sentences).float(), dim=-1).unflatten(0, (len(queries), -1))
        return F.normalize(vectors.mean(1), dim=-1).cpu()

    def _file(self, key: str) -> Path | None:
        return self.cache_dir / f"{key}.safetensors" if self.cache_dir else None

    def _read(self, key: str) -> torch.Tensor | None:
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        try:
            return load_file(file)["text"]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("The stored text vectors %s are damaged (%s); computing them again.", file, error)
            return None

    def _write(self, key: str, vectors: torch.Tensor) -> None:
        file = self._file(key)
        if file is None:
            return
        try:
            with replacing(file) as temporary:
                save_file({"text": vectors}, temporary)
        except OSError as error:
            logger.warning("Text vectors could not be stored in %s (%s); going on without.", file.parent, error)
