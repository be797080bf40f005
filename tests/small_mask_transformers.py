"""Small mask transformers by the toy config, their inputs, targets and predictions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from reference import ROOT, reference_image
from spar_d2.engine.setup import load_config
from spar_d2.modeling.mask_transformer import MaskTransformer, losses
from spar_d2.modeling.mask_transformer.losses import Group
from spar_d2.modeling.mask_transformer.targets import Targets

THINGS, STUFF, QUERIES = 8, 5, 12
_SMALL = {"QUERIES": QUERIES, "WIDTH": 32, "BLOCKS": 2, "HEADS": 2, "POINTS": 100}
SEMANTIC = [
    *("MODEL.MASK_TRANSFORMER.TASK", "semantic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 13),
    *("DATASETS.TRAIN", "('spar_scenes_train',)", "DATASETS.TEST", "('spar_scenes_val',)"),
]
TEXT = ["MODEL.MASK_TRANSFORMER.CLASSIFIER", "text"]


def small_config(*overrides) -> CfgNode:
    """The toy config with a smaller head that shows all of its queries."""
    keys = [item for key, value in _SMALL.items() for item in (f"MODEL.MASK_TRANSFORMER.{key}", value)]
    shown = ["MODEL.MASK_TRANSFORMER.OBJECT_THRESHOLD", 0.0, "MODEL.MASK_TRANSFORMER.OVERLAP_THRESHOLD", 0.1]
    return load_config(str(ROOT / "configs/toy/mask_transformer.yaml"), [*keys, *shown, *overrides])


def small_model(*overrides) -> MaskTransformer:
    """A model with random weights of the head, whose queries are hardly ever no object."""
    torch.manual_seed(0)
    model = build_model(small_config(*overrides)).eval()
    for block in getattr(model.head, "blocks", ()):
        torch.nn.init.normal_(block.proj.weight, std=0.3)
    last = getattr(model.classifier, "predictor", None)
    with torch.no_grad():
        if last is not None:
            last.weight *= 3
            last.bias[-1] = -5
        else:
            model.classifier.no_object.bias -= 20
    return model


def image(size: tuple[int, int], index: int = 0) -> torch.Tensor:
    return torch.from_numpy(reference_image(*size, index)).permute(2, 0, 1)


def panoptic_record(size: tuple[int, int], index: int = 0, things: int = 2, stuff: int = 2, crowd: bool = True) -> dict:
    """Input of the training: bands of stuff, rectangles of things, and a corner without a label."""
    height, width = size
    labels = torch.full(size, 255)
    for number in range(stuff):
        labels[number * height // stuff : (number + 1) * height // stuff] = 1 + (number + index) % STUFF
    masks = torch.zeros(things, *size, dtype=torch.bool)
    for number in range(things):
        top, left = height * number // (things + 1), width * number // (things + 1)
        masks[number, top : top + height // 3, left : left + width // 3] = True
        masks[:number] &= ~masks[number]
    labels[masks.any(0)] = 0
    if crowd:  # a thing that is no instance
        labels[-height // 4 :, -width // 4 :] = 0
        masks[:, -height // 4 :, -width // 4 :] = False
    labels[: height // 8, -width // 4 :] = 255
    masks[:, : height // 8, -width // 4 :] = False
    instances = Instances(size)
    instances.gt_classes = torch.tensor([(3 * number + index) % THINGS for number in range(things)], dtype=torch.int64)
    instances.gt_masks = BitMasks(masks)
    return {"image": image(size, index), "instances": instances, "sem_seg": labels}


def semantic_record(size: tuple[int, int], index: int = 0) -> dict:
    labels = torch.arange(size[0])[:, None].expand(size) * 5 // size[0] + index
    labels = labels.clone()
    labels[: size[0] // 8] = 255
    return {"image": image(size, index), "sem_seg": labels}


def random_targets(segments: int, size: tuple[int, int], classes: int, seed: int, unlabeled: float = 0.3) -> Targets:
    """Segments of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, segments + 1, size, generator=generator)
    masks = torch.stack([owners == number for number in range(segments)]) if segments else torch.zeros(0, *size).bool()
    valid = torch.rand(size, generator=generator) >= unlabeled
    return Targets(torch.randint(0, classes, (segments,), generator=generator), masks & valid, valid)


def random_group(
    segments: Sequence[int],
    size: tuple[int, int] = (12, 20),
    queries: int = 7,
    classes: int = 5,
    stages: int = 3,
    seed: int = 0,
    unlabeled: float = 0.3,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Group:
    """Random predictions with mask logits in each pixel, or fewer if ``scale`` is below 1, for one image each."""
    generator = torch.Generator().manual_seed(seed + 100)
    logits = torch.randn(stages, len(segments), queries, classes + 1, generator=generator)
    masks = 2 * torch.randn(stages, len(segments), queries, *size, generator=generator)
    targets = [random_targets(count, size, classes, seed + number, unlabeled) for number, count in enumerate(segments)]
    return Group(logits, masks, scale, targets)


def centers(size: tuple[int, int]) -> torch.Tensor:
    """Centers (H * W, 2) of all pixels, x and y in 0..1."""
    y, x = torch.meshgrid(*((torch.arange(side) + 0.5) / side for side in size), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def use_all_pixels(patch: pytest.MonkeyPatch) -> None:
    """Let losses and costs compare masks at the center of every pixel of each image, whatever the number of points."""
    of_costs, of_masks = losses.Criterion._costs, losses.Criterion._mask_sums

    def everywhere(group):
        return centers(tuple(group.targets[0].valid.shape)).to(group.masks.device)

    def costs(self, group, index):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch, "rand", lambda *shape, device: everywhere(group))
            return of_costs(self, group, index)

    def mask_sums(self, group, index):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(losses, "uncertain_points", lambda masks, *_: everywhere(group).expand(len(masks), -1, -1))
            return of_masks(self, group, index)

    patch.setattr(losses.Criterion, "_costs", costs)
    patch.setattr(losses.Criterion, "_mask_sums", mask_sums)
