"""Classes of a MaskTransformer whose classes are words: those of the training, and those of inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from spar_d2.encoders.registry import check_has_text
from spar_d2.modeling.build import encoder_spec
from spar_d2.modeling.example_embeddings import ClassVectors
from spar_d2.modeling.mask_transformer.classifiers import TextClassifier
from spar_d2.modeling.words import text_embeddings
from spar_d2.text import PanopticVocabulary, TextEmbeddings
from spar_d2.utils.panoptic_numbers import class_values, separate_numbers
from spar_d2.utils.transfer import send

_VOCABULARIES_KEPT = 8


class VocabularyClasses:
    """Training and test classes as words, and their text embeddings.

    Args:
        embeddings: computes text embeddings.
        trained: classes of the training data.
        tested: classes of inference.
        unseen: names of training classes whose labels are not used.
        scale: factor of cosine similarities before the softmax.
        weights: weights of the pooled features for seen and for other classes, see :func:`two_way`.

    Attributes:
        unseen: numbers of the training classes whose labels are not used.

    Raises:
        ValueError: a class in ``unseen`` is not in the training data, or no class is left.
    """

    def __init__(
        self,
        embeddings: TextEmbeddings,
        trained: PanopticVocabulary,
        tested: PanopticVocabulary,
        unseen: tuple[str, ...],
        scale: float,
        weights: tuple[float, float],
    ) -> None:
        names = trained.vocabulary.names
        unknown = [name for name in unseen if name not in names]
        if unknown or len(set(unseen)) >= len(names):
            raise ValueError(
                f"MODEL.MASK_TRANSFORMER.UNSEEN must be some of the training classes {', '.join(names)}; got {unseen}"
            )
        self.embeddings, self.trained, self.tested = embeddings, trained, tested
        self.unseen = frozenset(names.index(name) for name in unseen)
        self.scale, self.weights = scale, weights
        self._ready: dict[tuple, tuple[ClassVectors, torch.Tensor]] = {}

    @classmethod
    def of_config(cls, cfg: CfgNode, things: int, stuff: int) -> VocabularyClasses:
        """Take the training classes from ``DATASETS.TRAIN``, and those of inference from ``MODEL.SPAR.VOCABULARY``.

        Without a vocabulary, the classes of inference are those of ``DATASETS.TEST``, or of the training.

        Raises:
            ValueError: the encoder has no text tower, or there is no data set with names of classes.
        """
        check_has_text(cfg.MODEL.SPAR.ENCODER)
        panoptic = cfg.MODEL.MASK_TRANSFORMER.TASK == "panoptic"
        if not cfg.DATASETS.TRAIN:
            raise ValueError(
                "MODEL.MASK_TRANSFORMER.CLASSIFIER text: DATASETS.TRAIN must name the training data, whose classes are "
                "the seen ones"
            )
        trained = dataset_vocabulary(cfg.DATASETS.TRAIN[0], panoptic)
        found = (trained.things, len(trained) - trained.things)
        if found != (things, stuff):
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES and MODEL.SEM_SEG_HEAD.NUM_CLASSES must be those of the training data, "
                f"{found[0]} things and {found[1]} stuff classes{' plus one' if panoptic else ''}"
            )
        node, spar = cfg.MODEL.MASK_TRANSFORMER, cfg.MODEL.SPAR
        if spar.VOCABULARY:
            tested = PanopticVocabulary.of(spar.VOCABULARY, panoptic)
        else:
            tested = dataset_vocabulary(cfg.DATASETS.TEST[0], panoptic) if cfg.DATASETS.TEST else trained
        embeddings = text_embeddings(encoder_spec(cfg), spar.TEMPLATES, spar.TEXT_CACHE, cfg.MODEL.DEVICE)
        weights = (node.SEEN_WEIGHT, node.UNSEEN_WEIGHT)
        return cls(embeddings, trained, tested, tuple(node.UNSEEN), spar.LOGIT_SCALE, weights)

    @property
    def things(self) -> int:
        """Number of thing classes of inference."""
        return self.tested.things

    def set(self, vocabulary: object) -> None:
        """Change the classes of inference, see :meth:`PanopticVocabulary.of`."""
        self.tested = PanopticVocabulary.of(vocabulary, self.trained.panoptic)

    @contextlib.contextmanager
    def of_dataset(self, name: str) -> Iterator[None]:
        """Temporarily use the classes of a data set."""
        before = self.tested
        self.tested = dataset_vocabulary(name, self.trained.panoptic)
        try:
            yield
        finally:
            self.tested = before

    def for_training(self, classifier: TextClassifier, device: torch.device) -> None:
        """Let a classifier use the training classes."""
        classifier.set_classes(self._of(self.trained, device)[0], len(self.trained))

    def for_inference(self, classifier: TextClassifier, device: torch.device) -> None:
        """Let a classifier use the classes of inference."""
        classifier.set_classes(self._of(self.tested, device)[0], len(self.tested))

    def without_unseen(self, logits: torch.Tensor) -> torch.Tensor:
        """Exclude unseen classes from training logits (..., K + 1)."""
        if not self.unseen:
            return logits
        hidden = torch.tensor([number in self.unseen for number in range(logits.shape[-1])])
        return logits.masked_fill(send(hidden, logits.device), torch.finfo(logits.dtype).min)

    def two_way(self, device: torch.device) -> tuple[float, torch.Tensor, tuple[float, float]]:
        """Return scale, seen classes (K,) bool and weights for :func:`two_way`.

        A class of inference is seen if one of its words is a word of a training class.
        """
        return self.scale, self._of(self.tested, device)[1], self.weights

    def _of(self, vocabulary: PanopticVocabulary, device: torch.device) -> tuple[ClassVectors, torch.Tensor]:
        """Return the vectors of all classes, and whether each is seen, (K,) bool; kept for the last vocabularies."""
        key = (vocabulary.vocabulary, device)
        if key not in self._ready:
            if len(self._ready) > _VOCABULARIES_KEPT:
                self._ready.clear()
            vectors = ClassVectors(*self.embeddings(vocabulary.vocabulary)).to(device)
            self._ready[key] = vectors, send(torch.tensor(self._seen(vocabulary)), device)
        return self._ready[key]

    def _seen(self, vocabulary: PanopticVocabulary) -> list[bool]:
        used = [number for number in range(len(self.trained)) if number not in self.unseen]
        words = {word.casefold() for number in used for word in self.trained.vocabulary.classes[number]}
        return [any(word.casefold() in words for word in synonyms) for synonyms in vocabulary.vocabulary.classes]


def dataset_vocabulary(name: str, panoptic: bool) -> PanopticVocabulary:
    """Return the classes of a data set: things and stuff in PanopticFPN's order, or the classes of its label maps.

    Raises:
        ValueError: the metadata have no names, or no mapping to contiguous ids.
    """
    metadata = MetadataCatalog.get(name)
    if not panoptic:
        classes = metadata.get("vocabulary") or list(metadata.get("stuff_classes") or ())
        if classes:
            return PanopticVocabulary.of(classes, panoptic=False)
    elif metadata.get("thing_classes") or metadata.get("stuff_classes"):
        numbers = separate_numbers(name, metadata.as_dict())
        things, stuff = (
            class_values(metadata.get(key) or (), contiguous)
            for key, contiguous in (("thing_classes", numbers.things), ("stuff_classes", numbers.stuff))
        )
        if None not in (*things, *stuff):
            synonyms = metadata.get("synonyms") or {}
            things, stuff = ([[word, *synonyms.get(word, ())] for word in names] for names in (things, stuff))
            return PanopticVocabulary(things, stuff)
    raise ValueError(f"the data set {name!r} has no names of classes in its metadata, which text embeddings need")
