"""Cached text embeddings of vocabularies."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from spar_d2.text.vocabulary import Vocabulary
from spar_d2.utils.content_cache import ContentCache, digest
from spar_d2.utils.environment import cache_root

logger = logging.getLogger(__name__)

# A service gets new words without end.
_QUERIES_KEPT = 20_000


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

    Attributes:
        cache: cache on disk; None without one.
        is_saving: whether new embeddings are written to the cache on disk. False is for words that have no end.
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
        folder = _check_cache_dir(cache_dir)
        self.cache = ContentCache(folder, "cache_dir (MODEL.SPAR.TEXT_CACHE)") if folder else None
        self.is_saving = True
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of all queries of a vocabulary.

        Returns:
            Normalized text embeddings (Q, D) float32, and the class index of each query (Q,) int64, on the CPU.
        """
        queries = vocabulary.queries
        missing = [query for query in dict.fromkeys(queries) if query not in self._memory]
        if missing:
            self._memory.update(zip(missing, self._load(missing)))
        embeddings = torch.stack([self._memory[query] for query in queries])
        for query in list(self._memory)[:-_QUERIES_KEPT]:
            del self._memory[query]
        return embeddings, torch.tensor(vocabulary.query_class)

    def _load(self, queries: list[str]) -> torch.Tensor:
        if self.cache is None:
            return self._compute(queries)
        if callable(self.identity):
            self.identity = self.identity()
        name = digest(json.dumps([self.identity, self.templates, queries], ensure_ascii=False)) + ".safetensors"
        # reshape() raises an error for another number of embeddings.
        embeddings = self.cache.load(name, lambda tensors: tensors["text"].reshape(len(queries), -1))
        if embeddings is None:
            embeddings = self._compute(queries)
            if self.is_saving:
                self.cache.try_save(name, {"text": embeddings})
        return embeddings

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


def default_cache_dir() -> Path:
    """Return the default cache folder for text embeddings: ``$SPAR_CACHE/text`` or ``~/.cache/spar_d2/text``."""
    return cache_root() / "text"


def _shortened(query: str) -> str:
    return query if len(query) <= 60 else f"{query[:60]}..."
