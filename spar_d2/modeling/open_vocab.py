"""The open-vocabulary segmentor: dense features compared with the vectors of words."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import nn

from spar_d2.encoders import TextTower
from spar_d2.encoders.registry import build_text, check_has_text
from spar_d2.encoders.weights import fingerprint
from spar_d2.modeling.backbone import DENSE, SPARViT
from spar_d2.modeling.build import encoder_spec
from spar_d2.modeling.scores import class_probabilities, segment_features
from spar_d2.teacher import sliding_window_features
from spar_d2.teacher.sliding import check_window
from spar_d2.text import TextEmbeddings, Vocabulary, load_templates

OUTPUTS = ("labels", "scores", "features")
INFERENCES = ("single_pass", "sliding_window")


@META_ARCH_REGISTRY.register()
class OpenVocabularySegmentor(nn.Module):
    """Segments images into the classes of any vocabulary, without training on labels.

    In training it only encodes the images and returns no loss of its own: a
    :class:`~spar_d2.distillation.DistillationHook` adds it.

    Args:
        backbone: gives the dense map.
        embeddings: gives the vectors of words.
        vocabulary: the classes; None until :meth:`set_vocabulary`.
        pixel_mean, pixel_std: in the order of the input's channels, for 0..255.
        logit_scale, prob_threshold, area_threshold: see :func:`segment_features`; ``area_threshold`` 0 is none.
        output: "labels", "scores" or "features", see :meth:`forward`.
        inference: "single_pass" or "sliding_window".
        window, stride, window_batch: of the sliding window; window 0 is the encoder's native size.

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
        window_batch: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, SPARViT):
            raise ValueError(
                f"MODEL.BACKBONE.NAME must be SPARViT for OpenVocabularySegmentor, got {type(backbone).__name__}"
            )
        for key, value, allowed in (("OUTPUT", output, OUTPUTS), ("INFERENCE", inference, INFERENCES)):
            if value not in allowed:
                raise ValueError(f"MODEL.SPAR.{key} must be one of {', '.join(allowed)}; got {value!r}")
        for key, value in (("PROB_THRESHOLD", prob_threshold), ("AREA_THRESHOLD", area_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"MODEL.SPAR.{key} must be in 0..1, got {value}")
        self.backbone = backbone
        self.embeddings = embeddings
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.logit_scale = logit_scale
        self.prob_threshold = prob_threshold
        self.area_threshold = area_threshold or None
        self.output = output
        self.inference = inference
        self.window, self.stride, self.window_batch = check_window(backbone.encoder, window, stride, window_batch)
        self.set_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
        # Only vectors on disk outlive the model, and must be told from those of other weights.
        identity = f"{fingerprint(spar.ENCODER)} {fingerprint(spar.PRETRAINED)}" if spar.TEXT_CACHE else ""

        def build_tower() -> TextTower:
            return build_text(encoder_spec(cfg)).to(cfg.MODEL.DEVICE)

        vocabulary = _vocabulary(cfg)
        if vocabulary is not None:
            check_has_text(spar.ENCODER)
        return {
            "backbone": build_backbone(cfg),
            "embeddings": TextEmbeddings(build_tower, identity, load_templates(spar.TEMPLATES), spar.TEXT_CACHE),
            "vocabulary": vocabulary,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "logit_scale": spar.LOGIT_SCALE,
            "prob_threshold": spar.PROB_THRESHOLD,
            "area_threshold": spar.AREA_THRESHOLD,
            "output": spar.OUTPUT,
            "inference": spar.INFERENCE,
            "window": teacher.WINDOW,
            "stride": teacher.STRIDE,
            "window_batch": teacher.BATCH_SIZE,
        }

    def set_vocabulary(self, vocabulary: Vocabulary | None) -> None:
        """Change the classes; their vectors are computed when first needed."""
        self.vocabulary = vocabulary
        self._text: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, torch.Tensor]:
        """Detectron2's interface.

        Args:
            batched_inputs: each with "image" (3, H, W) in ``INPUT.FORMAT``, 0..255, any size; for inference optionally
                "height" and "width" of the result (default: the image's).

        Returns:
            In inference a list with, for each image, "sem_seg_labels" (height, width) int64, or, with output "scores",
            "sem_seg" (classes, height, width) float32 probabilities, or, with output "features", "features" (D, h, w).
            In training an empty dict of losses.

        Raises:
            RuntimeError: training without a distillation hook, or inference without a vocabulary.
            ValueError: an image of another shape.
        """
        images = [self._normalise(inputs["image"]) for inputs in batched_inputs]
        if not self.training:
            return [self._segment(image, inputs) for image, inputs in zip(images, batched_inputs)]
        if not self._forward_hooks:
            raise RuntimeError(
                "OpenVocabularySegmentor has no loss of its own: train it with a spar_d2.distillation.DistillationHook"
            )
        # Images of one size are encoded together; sizes are never padded to each other.
        for size in dict.fromkeys(image.shape for image in images):
            self.backbone(torch.stack([image for image in images if image.shape == size]))
        return {}

    @torch.no_grad()
    def _segment(self, image: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
        if self.output == "features":
            return {"features": self._encode(image)}
        text, query_class = self._text_vectors()
        features = self._encode(image)
        height, width = image.shape[-2:]
        size = (inputs.get("height", height), inputs.get("width", width))
        # What the grid covers, in pixels of the result: the padded image, or with REFERENCE_COMPAT the authors' choice,
        # which stretches the grid over the result.
        encoder = self.backbone.encoder
        covered = size
        if not encoder.reference_compat:
            # Whole numbers first and one division last: the result is rounded once and never below `size`.
            sides = zip(encoder.grid(height, width), size, (height, width))
            covered = tuple(cells * encoder.patch_size * wanted / given for cells, wanted, given in sides)
        arguments = (features, text, query_class, size, covered, self.logit_scale)
        if self.output == "scores":
            return {"sem_seg": class_probabilities(*arguments)}
        return {"sem_seg_labels": segment_features(*arguments, self.prob_threshold, self.area_threshold)}

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Dense features as inference uses them: (3, H, W) in ``INPUT.FORMAT``, 0..255, to (D, h, w)."""
        return self._encode(self._normalise(image))

    def encoder_input(self, image: torch.Tensor) -> torch.Tensor:
        """What the encoder is given for an image: (3, H, W) in ``INPUT.FORMAT``, 0..255, to (1, 3, H, W)."""
        x = self._normalise(image)[None]
        return x if self.backbone.pixels is None else self.backbone.pixels(x)

    def _normalise(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f'"image" must be (3, H, W), in the order of INPUT.FORMAT; got {tuple(image.shape)}')
        return (image.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        """(3, H, W), normalised, to (D, h, w)."""
        x = image[None]
        if self.inference == "single_pass":
            return self.backbone(x)[DENSE][0]
        x = x if self.backbone.pixels is None else self.backbone.pixels(x)
        return sliding_window_features(self.backbone.encoder, x, self.window, self.stride, self.window_batch)[0]

    def _text_vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._text is None:
            if self.vocabulary is None:
                raise RuntimeError("no classes to segment: set MODEL.SPAR.VOCABULARY or call set_vocabulary()")
            self._text = tuple(tensor.to(self.pixel_mean.device) for tensor in self.embeddings(self.vocabulary))
        return self._text


def _vocabulary(cfg: CfgNode) -> Vocabulary | None:
    """The configured classes, or those of the first test data set; None where none are needed, or it has no names."""
    if cfg.MODEL.SPAR.OUTPUT == "features":
        return None
    if cfg.MODEL.SPAR.VOCABULARY:
        return Vocabulary.load(cfg.MODEL.SPAR.VOCABULARY)
    for name in cfg.DATASETS.TEST:
        classes = MetadataCatalog.get(name).get("stuff_classes")
        return Vocabulary(classes) if classes else None
    return None
