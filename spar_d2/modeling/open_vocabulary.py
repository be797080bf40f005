"""Open-vocabulary segmentor: compares dense features with text embeddings."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import nn

from spar_d2.data.transforms import resize_shortest_edge
from spar_d2.encoders.registry import check_has_text
from spar_d2.modeling.backbone import DENSE, SPARViT
from spar_d2.modeling.banded_upsampling import ScoreMap, covered_size
from spar_d2.modeling.build import encoder_spec, refinement_from_config, teacher_from_config
from spar_d2.modeling.dense_inference import TEACHER, DenseInference, check_choice
from spar_d2.modeling.example_embeddings import ClassVectors, class_vectors, encoder_pixels, needs_text
from spar_d2.modeling.inference_inputs import inference_settings, of_one_size, result_size, with_vocabulary
from spar_d2.modeling.postprocessing import score_probabilities, segment_scores
from spar_d2.modeling.refinement import EncodedImage, Refinement
from spar_d2.modeling.words import text_embeddings
from spar_d2.teacher import DenseTeacher
from spar_d2.teacher.keys import result_key
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.text.examples import ExampleVocabulary
from spar_d2.utils.registering import registered

OUTPUTS = ("labels", "scores", "features")
_VOCABULARIES_KEPT = 8


@registered(META_ARCH_REGISTRY)
class OpenVocabularySegmentor(DenseInference, nn.Module):
    """Segments images into the classes of any vocabulary, without training on labels.

    In training mode, it only encodes the images and returns no loss.
    A :class:`~spar_d2.distillation.DistillationHook` adds the loss.

    Args:
        backbone: backbone that computes the dense feature map.
        embeddings: computes the text embeddings of a vocabulary.
        vocabulary: class names; None if :meth:`set_vocabulary` is called later.
        pixel_mean, pixel_std: pixel statistics in the channel order of the input, for values in 0..255.
        logit_scale, prob_threshold, area_threshold: see :func:`spar_d2.modeling.segment_features`. An
            ``area_threshold`` of 0 disables it.
        output: "labels", "scores" or "features", see :meth:`forward`.
        inference: inference mode, "single_pass", "sliding_window" or "teacher".
        window, stride, window_batch: settings of the sliding window. A window of 0 means the pre-training image size of
            the encoder; a window_batch of 0 is chosen from the window size.
        example_size: shortest side and maximum longest side, in pixels, that the images of classes by example are
            resized to; a shortest side of 0 means their original size.
        refinement: refinement of the class scores; None for none. It has no effect on the output "features".
        teacher: computes the features in the inference mode "teacher".

    Raises:
        ValueError: an argument has an invalid value.
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
        example_size: Sequence[int] = (0, 0),
        refinement: Refinement | None = None,
        teacher: DenseTeacher | None = None,
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
        self._set_inference_mode(inference, window, stride, window_batch, teacher)
        self._text: dict[tuple[Vocabulary, int], ClassVectors] = {}
        self.example_size = tuple(example_size)
        self.refinement = refinement or Refinement(())
        if self.refinement.at_pixels and backbone.encoder.reference_compat:
            raise ValueError(
                "MODEL.SPAR.REFINE: anyup and lposs+ need to know which pixels a patch covers: set "
                "MODEL.SPAR.REFERENCE_COMPAT False, or use lposs alone"
            )
        self._set_inference_settings(vocabulary, logit_scale, prob_threshold, area_threshold)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
        settings = inference_settings(cfg)
        if needs_text(settings["vocabulary"]):
            check_has_text(spar.ENCODER)
        return {
            "backbone": build_backbone(cfg),
            "embeddings": text_embeddings(encoder_spec(cfg), spar.TEMPLATES, spar.TEXT_CACHE, cfg.MODEL.DEVICE),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **settings,
            "output": spar.OUTPUT,
            "inference": spar.INFERENCE,
            "window": teacher.WINDOW,
            "stride": teacher.STRIDE,
            "window_batch": teacher.BATCH_SIZE,
            "example_size": (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
            "refinement": refinement_from_config(cfg),
            "teacher": teacher_from_config(cfg) if spar.INFERENCE == TEACHER else None,
        }

    def set_vocabulary(self, vocabulary: Vocabulary | str | list | None) -> None:
        """Change the classes. Text embeddings of new classes are computed at the next inference.

        Args:
            vocabulary: any form that :meth:`spar_d2.text.Vocabulary.of` accepts, or None. Label k stands for class k of
                the vocabulary; no class is dropped or merged.
        """
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)

    @contextlib.contextmanager
    def configured(self, cfg: CfgNode) -> Iterator[None]:
        """Temporarily use the vocabulary, logit scale and thresholds of another config; raises as the class does."""
        before = (self.vocabulary, self.logit_scale, self.prob_threshold, self.area_threshold)
        self._set_inference_settings(**inference_settings(cfg))
        try:
            yield
        finally:
            self._set_inference_settings(*before)

    def _set_inference_settings(
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
            batched_inputs: dicts with "image" (3, H, W) in ``INPUT.FORMAT``, 0..255, of any size. Optional in
                inference: "height" and "width" of the result (default: those of the image), and "vocabulary", the
                classes of this image only, in any form that :meth:`spar_d2.text.Vocabulary.of` accepts.

        Returns:
            In inference, one dict per image: "sem_seg_labels" (height, width) int64 for output "labels"; "sem_seg"
            (classes, height, width) float32 probabilities for output "scores"; "features" (D, h, w) for output
            "features". In training, an empty dict of losses.

        Raises:
            RuntimeError: there is no distillation hook in training, or no vocabulary in inference.
            ValueError: an image has another shape, or is too small for the refinement.
        """
        images = [self._normalize(inputs["image"]) for inputs in batched_inputs]
        if not self.training:
            batched_inputs = [with_vocabulary(inputs) for inputs in batched_inputs]
            if self.output != "features":
                # Fail before encoding if there is no vocabulary.
                for inputs in batched_inputs:
                    self._text_vectors(inputs)
            return [self._output(*pair) for pair in zip(batched_inputs, self._encoded(images))]
        if not self._forward_hooks:
            raise RuntimeError(
                "OpenVocabularySegmentor has no loss of its own: train it with a spar_d2.distillation.DistillationHook"
            )
        for same in of_one_size(images):
            self.backbone(torch.stack([images[index] for index in same]))
        return {}

    @torch.no_grad()
    def _output(self, inputs: dict, image: EncodedImage) -> dict[str, torch.Tensor]:
        if self.output == "features":
            return {"features": image.features}
        size, normalized = result_size(inputs), self.output == "scores" or self.prob_threshold > 0
        if not self.refinement.at_pixels:
            return self.read([self._score_map(inputs, image, size, False, normalized)], inputs, size)
        scores = self.refinement.pixel_scores(image, self._text_vectors(inputs), size, normalized)
        if self.output == "scores":
            return {"sem_seg": scores.probabilities(self.logit_scale, len(self._vocabulary_of(inputs)))}
        return {"sem_seg_labels": scores.labels(self.logit_scale, self.prob_threshold, self.area_threshold)}

    @torch.no_grad()
    def score_maps(self, views: list[dict], mirrored: list[bool], size: tuple[int, int]) -> list[ScoreMap]:
        """Compute cosine scores of several augmented copies of one image.

        Args:
            views: augmented copies, as ``batched_inputs`` of :meth:`forward`, prepared by :func:`with_vocabulary`.
            mirrored: whether each copy is horizontally flipped.
            size: (H, W) of the result.
        """
        encoded = self._encoded([self._normalize(view["image"]) for view in views])
        grids = zip(views, encoded, [size] * len(views), mirrored)
        return [self._score_map(*arguments, normalized=True) for arguments in grids]

    @torch.no_grad()
    def read(self, maps: list[ScoreMap], inputs: dict, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Convert the score maps of an image to the output of :meth:`forward`."""
        query_class = self._text_vectors(inputs).query_class
        if self.output == "scores":
            classes = len(self._vocabulary_of(inputs))
            return {"sem_seg": score_probabilities(maps, query_class, size, self.logit_scale, classes)}
        arguments = (maps, query_class, size, self.logit_scale, self.prob_threshold, self.area_threshold)
        return {"sem_seg_labels": segment_scores(*arguments)}

    def _score_map(
        self, inputs: dict, image: EncodedImage, size: tuple[int, int], mirrored: bool, normalized: bool
    ) -> ScoreMap:
        height, width = inputs["image"].shape[-2:]
        # Result pixels that the feature grid covers: those of the padded image. As in the reference code,
        # REFERENCE_COMPAT stretches the grid over the result instead.
        encoder = self.backbone.encoder
        covered = size
        if not encoder.reference_compat:
            covered = covered_size(encoder.grid(height, width), encoder.patch_size, (height, width), size)
        scores = self.refinement.patch_scores(image, self._text_vectors(inputs), normalized)
        return ScoreMap(scores, covered, mirrored)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Compute the features (D, h, w) that inference uses for an image (3, H, W) in ``INPUT.FORMAT``, 0..255."""
        return self._encode([self._normalize(image)])[0]

    def _encoded(self, images: list[torch.Tensor]) -> list[EncodedImage]:
        """Encode normalized images (3, H, W), and keep them for refinement."""
        reads = (functools.partial(self.backbone.convert, image[None]) for image in images)
        return [EncodedImage(self.backbone.encoder, *pair) for pair in zip(reads, self._encode(images))]

    @torch.no_grad()
    def _encode(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encode normalized images (3, H, W) to feature maps (D, h, w)."""
        dense: dict[int, torch.Tensor] = {}
        for same in of_one_size(images):
            x = torch.stack([images[index] for index in same])
            # Call the backbone itself where possible, so that its hooks see every image.
            single_pass = self.inference == "single_pass"
            maps = self.backbone(x)[DENSE] if single_pass else self.dense_maps(self.backbone.convert(x))
            dense.update(zip(same, maps))
        return [dense[index] for index in range(len(images))]

    def _text_vectors(self, inputs: dict) -> ClassVectors:
        """Return the class vectors for an image, on the model's device."""
        return self.class_vectors(self._vocabulary_of(inputs))

    def class_vectors(self, vocabulary: Vocabulary) -> ClassVectors:
        """Return the cached class vectors of a vocabulary, on the model's device."""
        # Class vectors of examples depend on the weights, which training changes in place.
        by_example = isinstance(vocabulary, ExampleVocabulary)
        version = sum(p._version for p in self.backbone.encoder.parameters()) if by_example else 0
        key = (vocabulary, version)
        if key not in self._text:
            # Keep the last few vocabularies: the images of a batch may alternate between them.
            while len(self._text) >= _VOCABULARIES_KEPT:
                self._text.pop(next(iter(self._text)))
            self._text[key] = class_vectors(
                vocabulary, self.embeddings, self._encode_example, self.backbone.encoder, self._example_settings()
            ).to(self.pixel_mean.device)
        return self._text[key]

    def _example_settings(self) -> list:
        sliding = self.windows if self.inference == "sliding_window" else ()
        return [self.inference, *sliding, *map(result_key, self._teacher), *self.example_size]

    @torch.no_grad()
    def _encode_example(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[float, float]]:
        """Encode an RGB image (H, W, 3) uint8 at the size of test images, see :func:`class_vectors`."""
        encoder = self.backbone.encoder
        x = encoder_pixels(encoder, resize_shortest_edge(pixels, *self.example_size), self.pixel_mean.device)
        features = self.dense_maps(x)[0]
        return features, covered_size(features.shape[1:], encoder.patch_size, x.shape[-2:], pixels.shape[:2])

    def _vocabulary_of(self, inputs: dict) -> Vocabulary:
        vocabulary = inputs.get("vocabulary") or self.vocabulary
        if vocabulary is None:
            raise RuntimeError("no classes to segment: set MODEL.SPAR.VOCABULARY or call set_vocabulary()")
        return vocabulary
