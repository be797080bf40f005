"""The open-vocabulary segmentor: dense features compared with the vectors of words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import nn

from spar_d2.encoders.registry import check_has_text
from spar_d2.modeling.backbone import DENSE, SPARViT
from spar_d2.modeling.banded_upsampling import ScoreMap, covered_size
from spar_d2.modeling.build import encoder_spec
from spar_d2.modeling.dense_inference import DenseInference, check_choice
from spar_d2.modeling.postprocessing import cosine_scores, score_probabilities, segment_scores
from spar_d2.modeling.words import text_embeddings
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.utils.registering import registered

OUTPUTS = ("labels", "scores", "features")
_VOCABULARIES_KEPT = 8


@registered(META_ARCH_REGISTRY)
class OpenVocabularySegmentor(DenseInference, nn.Module):
    """Segments images into the classes of any vocabulary, without training on labels.

    In training it only encodes the images and returns no loss of its own: a
    :class:`~spar_d2.distillation.DistillationHook` adds it.

    Args:
        backbone: gives the dense map.
        embeddings: gives the vectors of words.
        vocabulary: the classes; None until :meth:`set_vocabulary`.
        pixel_mean, pixel_std: in the order of the input's channels, for 0..255.
        logit_scale, prob_threshold, area_threshold: see :func:`spar_d2.modeling.segment_features`; ``area_threshold``
            0 is none.
        output: "labels", "scores" or "features", see :meth:`forward`.
        inference: "single_pass" or "sliding_window".
        window, stride, window_batch: of the sliding window; window 0 is the encoder's native size, window_batch 0 is
            chosen by it.

    Raises:
        ValueError: an argument that is not allowed.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: SPARViT,
        embeddings: TextEmbeddings,
        vocabulary: Vocabulary | None,
        pixel_mean: list[float],
        pixel_std: list[float],
        logit_scale: float = 40.0,
        prob_threshold: float = 0.0,
        area_threshold: float = 0.0,
        output: str = "labels",
        inference: str = "single_pass",
        window: int = 0,
        stride: int = 24,
        window_batch: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, SPARViT):
            raise ValueError(
                f"MODEL.BACKBONE.NAME must be SPARViT for OpenVocabularySegmentor, got {type(backbone).__name__}"
            )
        check_choice("OUTPUT", output, OUTPUTS)
        self.backbone = backbone
        self.embeddings = embeddings
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.output = output
        self._infer_by(inference, window, stride, window_batch)
        self._text: dict[Vocabulary, tuple[torch.Tensor, torch.Tensor]] = {}
        self._read_by(vocabulary, logit_scale, prob_threshold, area_threshold)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
        reading = _reading(cfg)
        if reading["vocabulary"] is not None:
            check_has_text(spar.ENCODER)
        return {
            "backbone": build_backbone(cfg),
            "embeddings": text_embeddings(encoder_spec(cfg), spar.TEMPLATES, spar.TEXT_CACHE, cfg.MODEL.DEVICE),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **reading,
            "output": spar.OUTPUT,
            "inference": spar.INFERENCE,
            "window": teacher.WINDOW,
            "stride": teacher.STRIDE,
            "window_batch": teacher.BATCH_SIZE,
        }

    def set_vocabulary(self, vocabulary: Vocabulary | str | list | None) -> None:
        """Change the classes, at once; the vectors of words that are new are computed when first needed.

        Args:
            vocabulary: as :meth:`spar_d2.text.Vocabulary.of` takes it; None for none. Labels are the numbers of its
                classes, of which none is left out or merged.
        """
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)

    @contextlib.contextmanager
    def configured(self, cfg: CfgNode) -> Iterator[None]:
        """Within it, vocabulary, logit scale and thresholds are those of another config; raises as the class does."""
        before = (self.vocabulary, self.logit_scale, self.prob_threshold, self.area_threshold)
        self._read_by(**_reading(cfg))
        try:
            yield
        finally:
            self._read_by(*before)

    def _read_by(
        self,
        vocabulary: Vocabulary | None,
        logit_scale: float,
        prob_threshold: float,
        area_threshold: float | None,
    ) -> None:
        for key, value in (("PROB_THRESHOLD", prob_threshold), ("AREA_THRESHOLD", area_threshold or 0)):
            if not 0 <= value <= 1:
                raise ValueError(f"MODEL.SPAR.{key} must be in 0..1, got {value}")
        self.set_vocabulary(vocabulary)
        self.logit_scale = logit_scale
        self.prob_threshold = prob_threshold
        self.area_threshold = area_threshold or None

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, torch.Tensor]:
        """Detectron2's interface.

        Args:
            batched_inputs: each with "image" (3, H, W) in ``INPUT.FORMAT``, 0..255, any size; for inference optionally
                "height" and "width" of the result (default: the image's), and "vocabulary", the classes of this image
                alone, as :meth:`spar_d2.text.Vocabulary.of` takes them.

        Returns:
            In inference a list with, for each image, "sem_seg_labels" (height, width) int64, or, with output "scores",
            "sem_seg" (classes, height, width) float32 probabilities, or, with output "features", "features" (D, h, w).
            In training an empty dict of losses.

        Raises:
            RuntimeError: training without a distillation hook, or inference without a vocabulary.
            ValueError: an image of another shape.
        """
        images = [self._normalize(inputs["image"]) for inputs in batched_inputs]
        if not self.training:
            batched_inputs = [with_vocabulary(inputs) for inputs in batched_inputs]
            if self.output != "features":
                # Words that are not there should not be found out after encoding.
                for inputs in batched_inputs:
                    self._text_vectors(inputs)
            return [self._output(inputs, dense) for inputs, dense in zip(batched_inputs, self._encode(images))]
        if not self._forward_hooks:
            raise RuntimeError(
                "OpenVocabularySegmentor has no loss of its own: train it with a spar_d2.distillation.DistillationHook"
            )
        for same in _of_one_size(images):
            self.backbone(torch.stack([images[index] for index in same]))
        return {}

    @torch.no_grad()
    def _output(self, inputs: dict, features: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.output == "features":
            return {"features": features}
        size = result_size(inputs)
        return self.read([self._score_map(inputs, features, size, mirrored=False)], inputs, size)

    @torch.no_grad()
    def score_maps(self, views: list[dict], mirrored: list[bool], size: tuple[int, int]) -> list[ScoreMap]:
        """Cosines of several views of one image with its words.

        Args:
            views: as ``batched_inputs`` of :meth:`forward`, with words as :func:`with_vocabulary` makes them.
            mirrored: for each view whether it shows the mirror image.
            size: (H, W) of the result.
        """
        dense = self._encode([self._normalize(view["image"]) for view in views])
        return [self._score_map(*arguments) for arguments in zip(views, dense, [size] * len(views), mirrored)]

    @torch.no_grad()
    def read(self, maps: list[ScoreMap], inputs: dict, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """What :meth:`forward` returns for an image, from its score maps."""
        _, query_class = self._text_vectors(inputs)
        if self.output == "scores":
            classes = len(self._vocabulary_of(inputs))
            return {"sem_seg": score_probabilities(maps, query_class, size, self.logit_scale, classes)}
        arguments = (maps, query_class, size, self.logit_scale, self.prob_threshold, self.area_threshold)
        return {"sem_seg_labels": segment_scores(*arguments)}

    def _score_map(self, inputs: dict, features: torch.Tensor, size: tuple[int, int], mirrored: bool) -> ScoreMap:
        text, _ = self._text_vectors(inputs)
        height, width = inputs["image"].shape[-2:]
        # What the grid covers, in pixels of the result: the padded image, or with REFERENCE_COMPAT the authors' choice,
        # which stretches the grid over the result.
        encoder = self.backbone.encoder
        covered = size
        if not encoder.reference_compat:
            covered = covered_size(encoder.grid(height, width), encoder.patch_size, (height, width), size)
        return ScoreMap(cosine_scores(features, text), covered, mirrored)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Dense features as inference uses them: (3, H, W) in ``INPUT.FORMAT``, 0..255, to (D, h, w)."""
        return self._encode([self._normalize(image)])[0]

    @torch.no_grad()
    def _encode(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """For each image (3, H, W), normalized, (D, h, w)."""
        dense: dict[int, torch.Tensor] = {}
        for same in _of_one_size(images):
            x = torch.stack([images[index] for index in same])
            # By the backbone itself where it can, so that hooks on it see every image.
            single_pass = self.inference == "single_pass"
            maps = self.backbone(x)[DENSE] if single_pass else self.dense_maps(self.backbone.convert(x))
            dense.update(zip(same, maps))
        return [dense[index] for index in range(len(images))]

    def _text_vectors(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (Q, D) and classes (Q,) of the words of an image, on the model's device."""
        vocabulary = self._vocabulary_of(inputs)
        if vocabulary not in self._text:
            # Those of the last few, which the images of a batch may alternate between.
            while len(self._text) >= _VOCABULARIES_KEPT:
                self._text.pop(next(iter(self._text)))
            text, query_class = self.embeddings(vocabulary)
            device = self.pixel_mean.device
            self._text[vocabulary] = text.to(device), query_class.to(device)
        return self._text[vocabulary]

    def _vocabulary_of(self, inputs: dict) -> Vocabulary:
        vocabulary = inputs.get("vocabulary") or self.vocabulary
        if vocabulary is None:
            raise RuntimeError("no classes to segment: set MODEL.SPAR.VOCABULARY or call set_vocabulary()")
        return vocabulary


def with_vocabulary(inputs: dict) -> dict:
    """An input whose own words, if it has any, are a :class:`Vocabulary`: they are read once, whatever their form."""
    own = inputs.get("vocabulary")
    return inputs if own is None else {**inputs, "vocabulary": Vocabulary.of(own)}


def result_size(inputs: dict) -> tuple[int, int]:
    """(H, W) of the result asked for: "height" and "width" of an input, or those of its image."""
    height, width = inputs["image"].shape[-2:]
    return inputs.get("height", height), inputs.get("width", width)


def _of_one_size(images: list[torch.Tensor]) -> list[list[int]]:
    """Indices of images that are encoded together, by size; sizes are never padded to each other."""
    groups: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    return list(groups.values())


def _reading(cfg: CfgNode) -> dict:
    """How a config wants features to be read, as arguments of the segmentor."""
    spar = cfg.MODEL.SPAR
    return {
        "vocabulary": _vocabulary(cfg),
        "logit_scale": spar.LOGIT_SCALE,
        "prob_threshold": spar.PROB_THRESHOLD,
        "area_threshold": spar.AREA_THRESHOLD,
    }


def _vocabulary(cfg: CfgNode) -> Vocabulary | None:
    """The configured classes, or those of the first test data set; None where none are needed, or it has no names."""
    if cfg.MODEL.SPAR.OUTPUT == "features":
        return None
    if cfg.MODEL.SPAR.VOCABULARY:
        return Vocabulary.load(cfg.MODEL.SPAR.VOCABULARY)
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        classes = metadata.get("stuff_classes")
        if words := metadata.get("vocabulary"):
            return Vocabulary.of(words)
        return Vocabulary(classes) if classes else None
    return None
