"""Linear probe head: a norm and one linear layer on dense features."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from spar_d2.data.label_check import check_labels
from spar_d2.modeling.backbone import DENSE
from spar_d2.utils.registering import registered

NORMS = ("", "BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "FrozenBN", "GN", "LN")


@registered(SEM_SEG_HEADS_REGISTRY)
class LinearProbe(nn.Module):
    """A norm over the channels of a feature map, followed by a linear layer (1x1 convolution) to class logits.

    Args:
        input_shape: output shapes of the backbone.
        num_classes: number of classes C; labels are 0..C-1.
        in_feature: name of the backbone output to probe.
        norm: norm as in Detectron2's ``get_norm``; "" for none.
        ignore_value: label that is ignored in the loss.
        loss_weight: weight of the loss, above 0.

    Raises:
        ValueError: an argument has an invalid value.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_feature: str = DENSE,
        norm: str = "BN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if in_feature not in input_shape:
            raise ValueError(
                f"in_feature (MODEL.SEM_SEG_HEAD.IN_FEATURES) of LinearProbe must be an output of the backbone, one of "
                f"{', '.join(input_shape)}; got {in_feature!r}"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes (MODEL.SEM_SEG_HEAD.NUM_CLASSES) must be at least 1, got {num_classes}")
        if norm not in NORMS:
            allowed = ", ".join(map(repr, NORMS))
            raise ValueError(f"norm (MODEL.SEM_SEG_HEAD.NORM) must be one of {allowed}; got {norm!r}")
        if not 0 < loss_weight < math.inf:
            raise ValueError(f"loss_weight (MODEL.SEM_SEG_HEAD.LOSS_WEIGHT) must be above 0, got {loss_weight}")
        shape = input_shape[in_feature]
        if shape.channels is None or shape.stride is None:
            raise ValueError(
                f"in_feature (MODEL.SEM_SEG_HEAD.IN_FEATURES) of LinearProbe must be an output with channels and a "
                f"stride; the backbone's output_shape() of {in_feature!r} is {shape}"
            )
        self.in_feature, self.stride = in_feature, shape.stride
        self.num_classes, self.ignore_value, self.loss_weight = num_classes, ignore_value, loss_weight
        self.norm = get_norm(norm, shape.channels) or nn.Identity()
        self.predictor = nn.Conv2d(shape.channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        assert self.predictor.bias is not None
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        check_classes(cfg)
        names = head.IN_FEATURES
        if isinstance(names, str) or len(names) != 1:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES of LinearProbe must be a list of one name, out of "
                f"{', '.join(input_shape)}; got {names!r}"
            )
        return {
            "input_shape": input_shape,
            "num_classes": head.NUM_CLASSES,
            "in_feature": names[0],
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Detectron2's interface of semantic segmentation heads.

        Args:
            features: dict of feature maps (B, D, h, w).
            targets: labels (B, H, W) of the padded images; required in training.

        Returns:
            In training, None and {"loss_sem_seg": ...}. In inference, bilinearly upsampled logits (B, C, h * stride,
            w * stride) float32 and {}.

        Raises:
            ValueError: as :meth:`losses`, or there are no labels in training.
        """
        logits = self.predictor(self._normalized(features[self.in_feature]))
        if not self.training:
            return _upsample(logits.float(), self.stride), {}
        if targets is None:
            raise ValueError('LinearProbe needs labels in training: the inputs have no "sem_seg"')
        return None, self.losses(list(logits), list(targets))

    def classify(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute logits (C, h, w) of feature maps (D, h, w) of any sizes.

        In training, the norm's statistics are computed over the features of all maps. Maps are not padded, so that
        padding does not affect the statistics.

        Raises:
            ValueError: there are no maps.
        """
        if not len(maps):
            raise ValueError("maps must have at least one feature map, got none")
        # (1, D, 1, N): the features of all maps.
        cells = torch.cat([features.flatten(1) for features in maps], dim=1)[None, :, None]
        logits = self.predictor(self._normalized(cells))[0, :, 0]
        sizes = [features.shape[1] * features.shape[2] for features in maps]
        parts = zip(logits.split(sizes, dim=1), maps)
        return [part.unflatten(1, features.shape[1:]) for part, features in parts]

    def losses(self, logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the mean cross-entropy over all labeled pixels of all images.

        Logits are upsampled bilinearly to the pixels that the feature grid covers and cropped to the labels, so that
        pixels stay aligned. Only one image is upsampled at a time, also for the gradient.

        Args:
            logits: logits (C, h, w) of each image.
            labels: integer labels (H, W) of each image. The last row and column of patches may be incomplete.

        Returns:
            {"loss_sem_seg": ...}; zero if no pixel is labeled.

        Raises:
            ValueError: a label is out of range (checked on the CPU only, see :func:`check_labels`); the sizes of logits
                and labels do not match; or their numbers differ or are zero.
        """
        if not len(logits) or len(logits) != len(labels):
            raise ValueError(
                f"logits and labels must be of the same images, at least one; got {len(logits)} and {len(labels)}"
            )
        for cells, numbers in zip(logits, labels):
            self._check_labels(cells, numbers)
        labels = [numbers.long() for numbers in labels]
        count = functools.reduce(torch.add, [(numbers != self.ignore_value).sum() for numbers in labels]).clamp(min=1)
        total = _PixelLoss.apply(labels, self.stride, self.ignore_value, *(cells.float() for cells in logits))
        return {"loss_sem_seg": self.loss_weight * total / count}

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.norm, nn.SyncBatchNorm) and self.training and not x.is_cuda:
            raise ValueError(
                'MODEL.SEM_SEG_HEAD.NORM "SyncBN" needs GPUs; use "BN", or "naiveSyncBN_N" for several processes'
            )
        return self.norm(x)

    def _check_labels(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        grid = tuple(math.ceil(side / self.stride) for side in labels.shape)
        if grid != tuple(logits.shape[1:]):
            raise ValueError(
                f"labels of {'x'.join(map(str, labels.shape))} pixels have {'x'.join(map(str, grid))} patches of "
                f"{self.stride} pixels, but their image has {'x'.join(map(str, logits.shape[1:]))}: an image and its "
                "labels must have the same size"
            )
        if not labels.is_cuda:  # avoids a GPU sync; the data mappers have already checked the labels
            check_labels(labels, self.num_classes, self.ignore_value)


class _PixelLoss(torch.autograd.Function):
    """Sum of per-pixel cross-entropies. Stores only gradients of the size of the low-resolution logits."""

    @staticmethod
    def forward(ctx, labels, stride, ignore_value, *logits):
        total, gradients = 0, []
        for cells, numbers in zip(logits, labels):
            cells = cells.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(cells.device.type, enabled=False):
                pixels = _upsample(cells[None], stride)[..., : numbers.shape[0], : numbers.shape[1]]
                loss = F.cross_entropy(pixels, numbers[None], ignore_index=ignore_value, reduction="sum")
            gradients += torch.autograd.grad(loss, cells)
            total = total + loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, factor):
        return None, None, None, *(factor * gradient for gradient in ctx.saved_tensors)


def _upsample(logits: torch.Tensor, stride: int) -> torch.Tensor:
    return F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)


def check_classes(cfg: CfgNode) -> None:
    """Raise ``ValueError`` if ``MODEL.SEM_SEG_HEAD`` and a data set of the config differ in their number of classes."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("stuff_classes") or ()
        if classes and len(classes) != count:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES must be {len(classes)}, the number of classes of {name!r}; got {count}"
            )
