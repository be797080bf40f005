"""Cached text embeddings of vocabularies."""

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
from spar_d2.utils.environment import cache_root
from spar_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """Interface of text towers."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts to unnormalized embeddings (n, D)."""
        ...

    def reads_all(self, text: str) -> bool:
        """Return whether a text fits into the context length."""
        ...


class TextEmbeddings:
    """Computes normalized text embeddings of a vocabulary, with a cache in memory and optionally on disk.

    Each query (class name or synonym) is inserted into all prompt templates. The embeddings of the prompts are
    normalized, averaged, and normalized again.

    Args:
        build_tower: function that builds the text tower. It is called only if embeddings are missing in the cache; the
            tower is freed afterwards.
        identity: cache key of model and weights, or a function that returns it. The key of a cache file also includes
            the templates and queries.
        templates: prompt templates with one "{}" each.
        cache_dir: cache folder; None caches in memory only, "auto" is :func:`default_cache_dir`.
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
        self.cache_dir = _check_cache_dir(cache_dir)
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of all queries of a vocabulary.

        Returns:
            Normalized text embeddings (Q, D) float32, and the class index of each query (Q,) int64, on the CPU.
        """
        queries = vocabulary.queries
        missing = [query for query in dict.fromkeys(queries) if query not in self._memory]
        if missing:
            file = self.cache_dir / f"{self._key(missing)}.safetensors" if self.cache_dir else None
            embeddings = _read(file, len(missing)) if file and file.is_file() else None
            if embeddings is None:
                embeddings = self._compute(missing)
                if file:
                    _write(file, embeddings)
            self._memory.update(zip(missing, embeddings))
        return torch.stack([self._memory[query] for query in queries]), torch.tensor(vocabulary.query_class)

    def _key(self, queries: list[str]) -> str:
        if callable(self.identity):
            self.identity = self.identity()
        content = json.dumps([self.identity, self.templates, queries], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _compute(self, queries: list[str]) -> torch.Tensor:
        logger.info("Encoding %d class names and synonyms with %d templates ...", len(queries), len(self.templates))
        tower = self.build_tower()
        for query in queries:
            # Truncation is harmless if it only affects the part of the template after the class name.
            if not all(tower.reads_all(template[: template.index("{}")] + query) for template in self.templates):
                logger.warning("Class name exceeds the context length of the text encoder: %r", _shortened(query))
        prompts = [template.replace("{}", query) for query in queries for template in self.templates]
        # (Q * templates, D) -> (Q, templates, D)
        embeddings = F.normalize(tower.encode(prompts).float(), dim=-1).unflatten(0, (len(queries), -1))
        return F.normalize(embeddings.mean(1), dim=-1).cpu()


def _check_cache_dir(folder: str | os.PathLike | None) -> Path | None:
    """Resolve the cache folder. Logs a warning and returns None if it is inaccessible or the home folder is unknown."""
    if not folder:
        return None
    try:
        path = default_cache_dir() if folder == "auto" else Path(folder).expanduser()
        (path / "entry").is_file()
    except (OSError, RuntimeError) as error:
        logger.warning("Text embeddings are not cached on disk: %s (MODEL.SPAR.TEXT_CACHE, SPAR_CACHE)", error)
        return None
    return path


def _read(file: Path, count: int) -> torch.Tensor | None:
    try:
        embeddings = load_file(file)["text"]
        if embeddings.ndim == 2 and len(embeddings) == count:
            return embeddings
        error = f"{count} embeddings expected, got the shape {tuple(embeddings.shape)}"
    except (SafetensorError, KeyError, OSError) as reason:
        error = reason
    logger.warning("The cached text embeddings %s are corrupt (%s); recomputing them.", file, error)
    return None


def _write(file: Path, embeddings: torch.Tensor) -> None:
    try:
        with atomic_write(file) as temporary:
            save_file({"text": embeddings}, temporary)
    except OSError as error:
        logger.warning("Failed to cache text embeddings in %s (%s).", file.parent, error)


def default_cache_dir() -> Path:
    """Return the default cache folder for text embeddings: ``$SPAR_CACHE/text`` or ``~/.cache/spar_d2/text``."""
    return cache_root() / "text"


def _shortened(query: str) -> str:
    return query if len(query) <= 60 else f"{query[:60]}..."
