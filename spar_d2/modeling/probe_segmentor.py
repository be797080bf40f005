"""Segmentor for a linear probe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor

from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.banded_upsampling import ScoreMap, covered_size
from spar_d2.modeling.dense_inference import DenseInference, check_choice
from spar_d2.modeling.inference_inputs import result_size
from spar_d2.modeling.linear_probe import LinearProbe
from spar_d2.modeling.postprocessing import score_probabilities, segment_scores
from spar_d2.utils.registering import registered

OUTPUTS = ("labels", "scores")


@registered(META_ARCH_REGISTRY)
class ProbeSegmentor(DenseInference, SemanticSegmentor):
    """Detectron2's segmentor for a :class:`LinearProbe`, with the same weight names. Unlike Detectron2's segmentor, it

    - computes labels in row chunks, without a map of all classes and pixels;
    - encodes images of different sizes separately, without padding them to a common size;
    - supports sliding-window features and, in training, precomputed features ("features" of an input).

    Args:
        backbone: backbone that computes the dense feature map.
        sem_seg_head: linear probe.
        pixel_mean, pixel_std: pixel statistics in the channel order of the input, for values in 0..255.
        output: "labels" or "scores", see :meth:`forward`.
        inference: "single_pass" or "sliding_window"; also used in training.
        window, stride, window_batch: settings of the sliding window. A window of 0 means the pre-training image size of
            the encoder; a window_batch of 0 is chosen from the window size.

    Raises:
        ValueError: an argument has an invalid value.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: SPARViT,
        sem_seg_head: LinearProbe,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        output: str = "labels",
        inference: str = "single_pass",
        window: int = 0,
        stride: int = 24,
        window_batch: int = 0,
    ) -> None:
        parts = (("BACKBONE", backbone, SPARViT), ("SEM_SEG_HEAD", sem_seg_head, LinearProbe))
        for key, part, kind in parts:
            if not isinstance(part, kind):
                raise ValueError(
                    f"MODEL.{key}.NAME must be {kind.__name__} for ProbeSegmentor, got {type(part).__name__}"
                )
        # @configurable hides the signature of Detectron2's segmentor.
        arguments = {"backbone": backbone, "sem_seg_head": sem_seg_head}
        super().__init__(**arguments, pixel_mean=pixel_mean, pixel_std=pixel_std)  # pyright: ignore[reportCallIssue]
        check_choice("OUTPUT", output, OUTPUTS)
        self._set_inference_mode(inference, window, stride, window_batch)
        encoder = backbone.encoder
        if encoder.reference_compat:
            raise ValueError("MODEL.SPAR.REFERENCE_COMPAT must be False for ProbeSegmentor: it stretches score maps")
        if inference == "sliding_window" and any(p.requires_grad for p in encoder.parameters()):
            raise ValueError(
                'MODEL.SPAR.TRAINABLE must be "none" with MODEL.SPAR.INFERENCE sliding_window, which has no gradient'
            )
        self.output = output

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        spar, teacher = cfg.MODEL.SPAR, cfg.SPAR.TEACHER
        return {
            **super().from_config(cfg),
            "output": spar.OUTPUT,
            "inference": spar.INFERENCE,
            "window": teacher.WINDOW,
            "stride": teacher.STRIDE,
            "window_batch": teacher.BATCH_SIZE,
        }

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, torch.Tensor]:
        """Detectron2's interface.

        Args:
            batched_inputs: dicts with "image" (3, H, W) in ``INPUT.FORMAT``, 0..255, of any size. Optional in
                inference: "height" and "width" of the result (default: those of the image). In training: "sem_seg" (H,
                W), and optionally "features" (D, h, w) in place of the image.

        Returns:
            In training, the losses. In inference, one dict per image: "sem_seg_labels" (height, width) int64, or, for
            output "scores", "sem_seg" (C, height, width) float32 probabilities.

        Raises:
            ValueError: an image has another shape; or as :meth:`LinearProbe.losses`.
        """
        if not self.training:
            return self._segment(batched_inputs)
        missing = [inputs.get("file_name", "an image") for inputs in batched_inputs if "sem_seg" not in inputs]
        if missing:
            raise ValueError(f'LinearProbe needs labels in training: {missing[0]} has no "sem_seg"')
        logits = self.sem_seg_head.classify(self._features(batched_inputs))
        labels = [inputs["sem_seg"].to(self.device, non_blocking=True) for inputs in batched_inputs]
        return self.sem_seg_head.losses(logits, labels)

    @torch.no_grad()
    def _segment(self, batched_inputs: list[dict]) -> list[dict]:
        logits = self.sem_seg_head.classify(self._features(batched_inputs))
        classes = torch.arange(self.sem_seg_head.num_classes, device=self.device)
        results = []
        for inputs, cells in zip(batched_inputs, logits):
            size = result_size(inputs)
            covered = covered_size(cells.shape[1:], self.sem_seg_head.stride, inputs["image"].shape[-2:], size)
            maps = [ScoreMap(cells.float().permute(1, 2, 0).contiguous(), covered)]
            if self.output == "labels":
                results.append({"sem_seg_labels": segment_scores(maps, classes, size)})
            else:
                results.append({"sem_seg": score_probabilities(maps, classes, size, 1.0, len(classes))})
        return results

    def _features(self, batched_inputs: list[dict]) -> list[torch.Tensor]:
        """Return the features (D, h, w) of each image."""
        if all("features" in inputs for inputs in batched_inputs):
            return [inputs["features"].to(self.device, non_blocking=True).float() for inputs in batched_inputs]
        images = [self.encoder_input(inputs["image"]) for inputs in batched_inputs]
        same_size = len({image.shape for image in images}) == 1
        return [features for x in ([torch.cat(images)] if same_size else images) for features in self.dense_maps(x)]

    @contextlib.contextmanager
    def configured(self, cfg: CfgNode) -> Iterator[None]:
        """Does nothing: a probe has fixed classes. Same interface as the open-vocabulary segmentor."""
        yield
