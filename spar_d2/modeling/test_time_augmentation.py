"""Test-time augmentation (``TEST.AUG.*``) for the open-vocabulary segmentor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from fvcore.transforms import HFlipTransform
from torch import nn

from spar_d2.modeling.inference_inputs import result_size, with_vocabulary
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.utils.images import check_sides


class SegmentorWithTTA(nn.Module):
    """Test-time augmentation over several image sizes and horizontal flips, with the interface of the segmentor.

    The cosine scores of all augmented copies are averaged at every pixel of the result, in row chunks, and converted to
    labels once.

    Args:
        cfg: config whose ``TEST.AUG.MIN_SIZES``, ``MAX_SIZE`` and ``FLIP`` select the augmentations.
        model: segmentor in eval mode.
        tta_mapper: creates the augmented copies of an input; default: Detectron2's mapper.

    Raises:
        ValueError: the model is not an :class:`OpenVocabularySegmentor`, returns features or refines scores at pixels,
            or the sizes are missing or out of range.
    """

    model: OpenVocabularySegmentor
    tta_mapper: Callable[[dict], list[dict]]

    def __init__(self, cfg: CfgNode, model: nn.Module, tta_mapper: Callable[[dict], list[dict]] | None = None) -> None:
        super().__init__()
        segmentor = getattr(model, "module", model)
        if not isinstance(segmentor, OpenVocabularySegmentor):
            raise ValueError(
                f"TEST.AUG.ENABLED: the model must be an OpenVocabularySegmentor, got {type(segmentor).__name__}"
            )
        if segmentor.output == "features":
            raise ValueError('TEST.AUG.ENABLED: features cannot be averaged, MODEL.SPAR.OUTPUT must not be "features"')
        if segmentor.refinement.at_pixels:
            steps = ",".join(segmentor.refinement.steps)
            raise ValueError(f'TEST.AUG.ENABLED: MODEL.SPAR.REFINE must be "" or "lposs", got "{steps}"')
        sizes = cfg.TEST.AUG.MIN_SIZES
        if tta_mapper is None and (not sizes or not all(isinstance(size, int) and size > 1 for size in sizes)):
            raise ValueError(
                f"TEST.AUG.MIN_SIZES must have at least one short side in pixels, such as (400, 500), got {sizes}"
            )
        check_sides("TEST.AUG.MIN_SIZES", sizes)
        self.model = segmentor
        if tta_mapper is None:
            tta_mapper = DatasetMapperTTA(cfg)  # pyright: ignore[reportCallIssue]  # @configurable takes a config
        self.tta_mapper = tta_mapper

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Same as :meth:`OpenVocabularySegmentor.forward` in inference."""
        return [self._segment(inputs) for inputs in batched_inputs]

    def _segment(self, inputs: dict) -> dict[str, torch.Tensor]:
        inputs, size = with_vocabulary(inputs), result_size(inputs)
        # The mapper works in NumPy and needs the original image size.
        views = self.tta_mapper({**inputs, "image": inputs["image"].cpu(), "height": size[0], "width": size[1]})
        mirrored = [_is_mirrored(view) for view in views]
        return self.model.read(self.model.score_maps(views, mirrored, size), inputs, size)


def _is_mirrored(view: dict) -> bool:
    flips = sum(isinstance(transform, HFlipTransform) for transform in view["transforms"].transforms)
    return flips % 2 == 1
