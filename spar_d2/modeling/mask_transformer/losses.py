"""Losses of mask classification: classes, masks at sampled points, and dice, after each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils import comm

from spar_d2.modeling.mask_transformer.centers import center_loss
from spar_d2.modeling.mask_transformer.matching import Weights, costs, match
from spar_d2.modeling.mask_transformer.points import look_up, placed, sample, uncertain_points
from spar_d2.modeling.mask_transformer.targets import Targets
from spar_d2.utils.transfer import send

# A query without a segment is not told to be no object if more than this share of its mask is unlabeled.
_UNLABELED = 0.5


@dataclass(frozen=True)
class Group:
    """Predictions of images of one size, and their targets.

    Attributes:
        logits: (L, B, Q, K + 1) class logits after each of L stages; the last class stands for no object.
        masks: (L, B, Q, h, w) mask logits.
        scale: width and height of the images relative to the area that the masks cover, at most 1.
        targets: targets of the B images, on the device of the masks.
        centers: arguments (B, h, w) of :func:`center_loss`, or None if the head finds no centers.
    """

    logits: torch.Tensor
    masks: torch.Tensor
    scale: tuple[float, float]
    targets: Sequence[Targets]
    centers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Criterion:
    """Loss of mask classification (MaskFormer, arXiv:2107.06278; Mask2Former, arXiv:2112.01527).

    Segments are assigned to queries by the least cost, separately after each stage; the losses of all stages are added.
    Pixels without a label have no weight.

    Attributes:
        weights: weights of the terms.
        no_object: weight of queries without a segment in the class loss.
        points: number of points at which each mask is compared.
        center: weight of the loss of the heat map of centers.
    """

    weights: Weights = Weights()
    no_object: float = 0.1
    points: int = 12544
    center: float = 1.0

    def __call__(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        """Compute {"loss_class", "loss_mask", "loss_dice"}, averaged over the segments of all images and processes.

        With heat maps, there is also "loss_center", averaged over the centers.
        On a GPU, the host waits once.
        """
        found = [self._costs(group, index) for group in groups for index in range(len(group.targets))]
        assigned = iter(match([cost for cost, _ in found]))
        unlabeled = iter([part for _, part in found])
        device = groups[0].masks.device
        segments = sum(len(target.classes) for group in groups for target in group.targets)
        stages = len(groups[0].logits)
        class_sums = torch.zeros(2, stages, device=device)
        mask_sums = torch.zeros(2, device=device)
        for group in groups:
            pairs = [next(assigned) for _ in group.targets]
            rows = [
                (stage, image, query, segment)
                for image, stages_of_image in enumerate(pairs)
                for stage, (queries, numbers) in enumerate(stages_of_image)
                for query, segment in zip(queries, numbers)
            ]
            ignored = torch.stack([next(unlabeled) for _ in group.targets], dim=1)
            index = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
            index = send(index, device).unbind(1)
            class_sums = class_sums + self._class_sums(group, index, ignored)
            mask_sums = mask_sums + self._mask_sums(group, index)
        heat = [group.centers for group in groups if group.centers is not None]
        centers = sum(((wanted == 1).sum() for _, wanted, _ in heat), torch.zeros((), device=device))
        counts = torch.cat([class_sums[1].detach(), torch.full((1,), float(segments), device=device), centers[None]])
        if comm.get_world_size() > 1:
            # Gradients are averaged over the processes, so that these are means, too.
            torch.distributed.all_reduce(counts)
            counts /= comm.get_world_size()
        # The mean of each stage, then the sum over stages.
        class_loss = (class_sums[0] / counts[:-2].clamp(min=1e-6)).sum()
        mask_loss, dice_loss = mask_sums / counts[-2].clamp(min=1)
        losses = {
            "loss_class": self.weights.classes * class_loss,
            "loss_mask": self.weights.mask * mask_loss,
            "loss_dice": self.weights.dice * dice_loss,
        }
        if heat:
            center_sum = torch.stack([center_loss(*maps) for maps in heat]).sum()
            losses["loss_center"] = self.center * center_sum / counts[-1].clamp(min=1)
        return losses

    @torch.no_grad()
    def _costs(self, group: Group, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the costs (L, Q, G) of an image, and whether the mask of each query is unlabeled, (L, Q) bool."""
        target, masks = group.targets[index], group.masks[:, index].float()
        points = torch.rand(self.points, 2, device=masks.device)
        logits = sample(masks, placed(points, group.scale).expand(len(masks), -1, -1))
        valid = look_up(target.valid, points).float()
        inside = look_up(target.masks, points).float()
        cost = costs(group.logits[:, index].float().softmax(-1), target.classes, logits, inside, valid, self.weights)
        probable = logits.sigmoid()
        unlabeled = probable @ (1 - valid) > _UNLABELED * probable.sum(-1)
        return cost, unlabeled

    def _class_sums(self, group: Group, index: Sequence[torch.Tensor], ignored: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the class losses of each stage, and the sum of the weights, (2, L)."""
        stage, image, query, segment = index
        logits = group.logits.float()
        nothing = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:-1], nothing, device=logits.device)
        weight = torch.full(logits.shape[:-1], self.no_object, device=logits.device).masked_fill_(ignored, 0)
        classes = torch.nn.utils.rnn.pad_sequence([t.classes for t in group.targets], batch_first=True)
        wanted[stage, image, query] = classes[image, segment]
        # A number would be copied to a GPU, for which the host waits.
        weight[stage, image, query] = weight.new_ones(())
        loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view_as(weight)
        return torch.stack([(loss * weight).sum((1, 2)), weight.sum((1, 2))])

    def _mask_sums(self, group: Group, index: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sums of mask and dice losses of all segments and stages, (2,)."""
        stage, image, query, segment = index
        if not len(stage):
            return group.masks.sum(dtype=torch.float32) * 0 + torch.zeros(2, device=group.masks.device)
        masks = group.masks[stage, image, query].float()
        points = uncertain_points(masks, self.points, group.scale)
        logits = sample(masks[:, None], placed(points, group.scale))[:, 0]
        starts = [0]
        for target in group.targets:
            starts.append(starts[-1] + len(target.classes))
        first = send(torch.tensor(starts[:-1]), masks.device)
        everything = torch.cat([target.masks for target in group.targets])
        valid = look_up(torch.stack([target.valid for target in group.targets]), points, image).float()
        inside = look_up(everything, points, first[image] + segment).float()
        entropy = F.binary_cross_entropy_with_logits(logits, inside, reduction="none") * valid
        inside, probable = inside * valid, logits.sigmoid() * valid
        dice = 1 - (2 * (inside * probable).sum(1) + 1) / (inside.sum(1) + probable.sum(1) + 1)
        return torch.stack([(entropy.sum(1) / valid.sum(1).clamp(min=1)).sum(), dice.sum()])
