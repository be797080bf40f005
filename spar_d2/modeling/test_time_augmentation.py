"""Test-time augmentation of the open-vocabulary segmentor, by Detectron2's config keys ``TEST.AUG.*``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from fvcore.transforms import HFlipTransform
from torch import nn

from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor, result_size, with_vocabulary
from spar_d2.utils.images import check_sides


class SegmentorWithTTA(nn.Module):
    """The segmentor over several sizes and the mirror image of each input, with its interface.

    The cosines of all views are averaged at every pixel of the result, still in row bands, and read once.

    Args:
        cfg: ``TEST.AUG.MIN_SIZES``, ``MAX_SIZE`` and ``FLIP`` say which views there are.
        model: the segmentor, in eval mode.
        tta_mapper: makes the views of an input; default: Detectron2's.

    Raises:
        ValueError: a model that is no :class:`OpenVocabularySegmentor`, or one that returns features, or no sizes, or
            absurd ones.
    """

    model: OpenVocabularySegmentor
    tta_mapper: Callable[[dict], list[dict]]

    def __init__(self, cfg: CfgNode, model: nn.Module, tta_mapper: Callable[[dict], list[dict]] | None = None) -> None:
        super().__init__()
        segmentor = getattr(model, "module", model)
        if not isinstance(segmentor, OpenVocabularySegmentor):
            raise ValueError(
                f"TEST.AUG.ENABLED: augmented tests need an OpenVocabularySegmentor, got {type(segmentor).__name__}"
            )
        if segmentor.output == "features":
            raise ValueError(
                'TEST.AUG.ENABLED: there is no average of features, MODEL.SPAR.OUTPUT must not be "features"'
            )
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
        """As :meth:`OpenVocabularySegmentor.forward` in inference."""
        return [self._segment(inputs) for inputs in batched_inputs]

    def _segment(self, inputs: dict) -> dict[str, torch.Tensor]:
        inputs, size = with_vocabulary(inputs), result_size(inputs)
        # The mapper works in numpy, and needs the size that the image had.
        views = self.tta_mapper({**inputs, "image": inputs["image"].cpu(), "height": size[0], "width": size[1]})
        mirrored = [_is_mirrored(view) for view in views]
        return self.model.read(self.model.score_maps(views, mirrored, size), inputs, size)


def _is_mirrored(view: dict) -> bool:
    flips = sum(isinstance(transform, HFlipTransform) for transform in view["transforms"].transforms)
    return flips % 2 == 1
