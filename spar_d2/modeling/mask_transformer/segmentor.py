"""Detectron2 model for panoptic and semantic segmentation by mask classification on a dense encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.banded_upsampling import covered_size
from spar_d2.modeling.dense_inference import DenseInference
from spar_d2.modeling.inference_inputs import of_one_size, result_size
from spar_d2.modeling.mask_transformer.centers import center_targets
from spar_d2.modeling.mask_transformer.classifiers import LearnedClassifier, TextClassifier, pooled_features, two_way
from spar_d2.modeling.mask_transformer.head import MaskTransformerHead
from spar_d2.modeling.mask_transformer.joined_head import JoinedHead
from spar_d2.modeling.mask_transformer.losses import Criterion, Group
from spar_d2.modeling.mask_transformer.predictor import Prediction
from spar_d2.modeling.mask_transformer.readout import Queries
from spar_d2.modeling.mask_transformer.settings import TASKS, settings
from spar_d2.modeling.mask_transformer.targets import Targets, panoptic_targets, semantic_targets
from spar_d2.modeling.mask_transformer.vocabulary_classes import VocabularyClasses
from spar_d2.utils.registering import registered


@registered(META_ARCH_REGISTRY)
class MaskTransformer(DenseInference, nn.Module):
    """Segments images by queries that each give a mask and a class, see :class:`MaskTransformerHead`.

    Images of any sizes are encoded without padding to a common size. The encoder is used once per image.

    Args:
        backbone: backbone whose dense and intermediate features are used.
        head: mask head.
        classifier: classifies query embeddings.
        criterion: loss.
        things, stuff: numbers of thing and stuff classes of the training data; things come first.
        pixel_mean, pixel_std: pixel statistics in the channel order of the input, for values in 0..255.
        task: "panoptic", or "semantic" for label maps, whose classes are all stuff.
        laterals: blocks of the encoder whose outputs are added to the patches.
        masked_attention: share of the training in which queries attend only to their masks; it ends block by block.
        max_iter: number of training steps, for ``masked_attention``.
        ignore_label: label of pixels without a class.
        outputs: any of "panoptic_seg", "sem_seg" and "instances".
        labels: whether "sem_seg_labels" (H, W) replaces "sem_seg" (classes, H, W).
        object_threshold, overlap_threshold, duplicate_threshold: see :meth:`Queries.panoptic`.
        detections: maximum number of instances.
        vocabulary: text embeddings and classes; required with a :class:`TextClassifier`, otherwise None.
        inference: inference mode of the dense features that are pooled for unseen classes.
        window, stride, window_batch: settings of the sliding window.

    Raises:
        ValueError: an argument has an invalid value.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: SPARViT,
        head: MaskTransformerHead | JoinedHead,
        classifier: LearnedClassifier | TextClassifier,
        criterion: Criterion,
        things: int,
        stuff: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        task: str = TASKS[0],
        laterals: Sequence[int] = (),
        masked_attention: float = 0.8,
        max_iter: int = 1,
        ignore_label: int = 255,
        outputs: Sequence[str] = ("panoptic_seg",),
        labels: bool = False,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        duplicate_threshold: float = 0.7,
        detections: int = 100,
        vocabulary: VocabularyClasses | None = None,
        inference: str = "single_pass",
        window: int = 0,
        stride: int = 24,
        window_batch: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.classifier, self.criterion = backbone, head, classifier, criterion
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.things, self.stuff, self.task = things, stuff, task
        self.laterals, self.masked_attention, self.max_iter = tuple(laterals), masked_attention, max_iter
        self.ignore_label, self.outputs, self.labels = ignore_label, tuple(outputs), labels
        self.object_threshold, self.overlap_threshold = object_threshold, overlap_threshold
        self.duplicate_threshold, self.detections = duplicate_threshold, detections
        # Not a module: text towers do not belong to the model.
        self.vocabulary = vocabulary
        self._set_inference_mode(inference, window, stride, window_batch)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return settings(cfg, build_backbone(cfg))

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, torch.Tensor]:
        """Detectron2's interface.

        Args:
            batched_inputs: dicts with "image" (3, H, W) in ``INPUT.FORMAT``, 0..255, of any size. In training, also
                "sem_seg" and, for panoptic segmentation, "instances", as :class:`~spar_d2.data.mappers.PanopticMapper`
                gives them. Optional in inference: "height" and "width" of the result.

        Returns:
            In training, the losses. In inference, one dict per image with the outputs: "panoptic_seg", see
            :meth:`Queries.panoptic`; "instances", see :meth:`Queries.instances`; "sem_seg" (classes, height, width)
            float32 scores, where class 0 of panoptic models stands for all things, or "sem_seg_labels".

        Raises:
            ValueError: an image has another shape, or labels are missing.
        """
        images = [self._normalize(inputs["image"]) for inputs in batched_inputs]
        groups = of_one_size(images)
        if self.training:
            return self._losses([self._group(same, images, batched_inputs) for same in groups])
        results: dict[int, dict] = {}
        for same in groups:
            results |= zip(same, self._inferred([images[i] for i in same], [batched_inputs[i] for i in same]))
        return [results[index] for index in range(len(images))]

    @property
    def class_counts(self) -> tuple[int, int]:
        """Numbers of thing and stuff classes of inference."""
        if self.vocabulary is None:
            return self.things, self.stuff
        return self.vocabulary.things, len(self.vocabulary.tested) - self.vocabulary.things

    def check_classes(self, dataset: str, things: int, stuff: int) -> None:
        """Raise ``ValueError`` if a data set, whose names the classes get, has other numbers of classes."""
        if self.class_counts != (things, stuff):
            needed = self.class_counts
            raise ValueError(
                f"DATASETS.TEST must name a data set with the model's classes, {needed[0]} things and {needed[1]} "
                f"stuff classes; {dataset!r} has {things} and {stuff}"
            )

    def set_vocabulary(self, vocabulary) -> None:
        """Change the classes of a model whose classes are words.

        Args:
            vocabulary: any form that :meth:`spar_d2.text.PanopticVocabulary.of` accepts, with headings for things and
                stuff in panoptic segmentation.

        Raises:
            ValueError: the vocabulary is invalid, or the classes of the model are fixed.
        """
        if self.vocabulary is None:
            raise ValueError(
                "the classes of this model are fixed; they can be changed with MODEL.MASK_TRANSFORMER.CLASSIFIER text"
            )
        self.vocabulary.set(vocabulary)

    @contextlib.contextmanager
    def classes_of(self, dataset: str) -> Iterator[None]:
        """Temporarily use the classes of a data set, if the classes of the model are words."""
        if self.vocabulary is None:
            yield
            return
        with self.vocabulary.of_dataset(dataset):
            yield

    def _group(self, same: Sequence[int], images: Sequence[torch.Tensor], inputs: Sequence[dict]) -> Group:
        x = torch.stack([images[index] for index in same])
        predictions = self._predictions(x)[1]
        if isinstance(self.classifier, TextClassifier) and self.vocabulary is not None:
            self.vocabulary.for_training(self.classifier, x.device)
        embeddings = torch.stack([prediction.embeddings for prediction in predictions])
        logits = self.classifier(embeddings)
        if self.vocabulary is not None:
            logits = self.vocabulary.without_unseen(logits)
        targets = [self._targets(inputs[index]).to(x.device) for index in same]
        grid, patch = self.backbone.encoder.grid(*x.shape[2:]), self.backbone.encoder.patch_size
        scale = x.shape[3] / (grid[1] * patch), x.shape[2] / (grid[0] * patch)
        masks, heat = torch.stack([prediction.masks for prediction in predictions]), predictions[0].centers
        centers = None if heat is None else (heat, *center_targets(targets, self.things, grid, patch))
        return Group(logits, masks, scale, targets, centers)

    def _losses(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        with torch.autocast(groups[0].masks.device.type, enabled=False):
            return self.criterion(groups)

    def _targets(self, inputs: Mapping) -> Targets:
        excluded = () if self.vocabulary is None else self.vocabulary.unseen
        if self.task == TASKS[0]:
            return panoptic_targets(dict(inputs), self.things, self.ignore_label, excluded)
        return semantic_targets(dict(inputs), self.ignore_label, excluded)

    def _predictions(self, x: torch.Tensor) -> tuple[torch.Tensor | None, list[Prediction]]:
        """Return dense features, or None if queries pass the encoder, and predictions for images (B, 3, H, W)."""
        if isinstance(self.head, JoinedHead):
            return None, self.head(self.backbone.encoder, self.backbone.convert(x))
        features = self.backbone.encoder.intermediates(self.backbone.convert(x), self.laterals, dense=True)
        return features[-1], self.head(features, self._masked(len(self.head.blocks)))

    def _masked(self, count: int) -> list[bool]:
        """Choose the blocks in which queries attend only to their masks, at random as the training proceeds."""
        if not (self.training and self.masked_attention and has_event_storage()):
            return []
        # In blocks, from 0 to their number at the end of masked attention.
        progress = get_event_storage().iter / self.max_iter / self.masked_attention * count
        draws = torch.rand(count)
        return [bool(draw > progress - number) for number, draw in enumerate(draws.tolist())]

    @torch.no_grad()
    def _inferred(self, images: Sequence[torch.Tensor], inputs: Sequence[dict]) -> list[dict]:
        x = torch.stack(list(images))
        dense, (*_, prediction) = self._predictions(x)
        probabilities = self._probabilities(x, dense, prediction)
        encoder, size = self.backbone.encoder, tuple(x.shape[2:])
        grid = encoder.grid(*size)
        things, results = self.class_counts[0], []
        for number, record in enumerate(inputs):
            wanted = result_size(record)
            covered = covered_size(grid, encoder.patch_size, size, wanted)
            masks = prediction.masks[number].float()
            results.append(self._outputs(Queries(probabilities[number], masks, covered, wanted, things)))
        return results

    def _probabilities(self, x: torch.Tensor, dense: torch.Tensor | None, prediction: Prediction) -> torch.Tensor:
        """Compute class probabilities (B, Q, K + 1); ``dense`` is None to compute the features that are pooled."""
        if not isinstance(self.classifier, TextClassifier) or self.vocabulary is None:
            return self.classifier(prediction.embeddings).float().softmax(-1)
        self.vocabulary.for_inference(self.classifier, x.device)
        logits = self.classifier(prediction.embeddings)
        if dense is None or self.inference != "single_pass":
            dense = self.dense_maps(self.backbone.convert(x))
        cosines = self.classifier.scores(pooled_features(dense, prediction.masks))
        return two_way(logits, cosines, *self.vocabulary.two_way(x.device))

    def _outputs(self, queries: Queries) -> dict:
        result: dict = {}
        if "panoptic_seg" in self.outputs:
            result["panoptic_seg"] = queries.panoptic(
                self.object_threshold, self.overlap_threshold, self.duplicate_threshold
            )
        if "instances" in self.outputs:
            result["instances"] = queries.instances(self.detections)
        if "sem_seg" in self.outputs and self.labels and self.task != TASKS[0]:
            result["sem_seg_labels"] = queries.labels()
        elif "sem_seg" in self.outputs:
            scores = queries.class_scores()
            if self.task == TASKS[0]:
                scores = torch.cat([scores[: queries.things].sum(0, keepdim=True), scores[queries.things :]])
            result["sem_seg"] = scores
        return result
