"""MaskTransformer on the device, compared with a CPU, and its speed beside that of PanopticFPN."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.gpu_check.checks import COMPARISONS, FACTS, LIMITS, Fact, compare, without_tf32
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import ROOT, Settings
from benchmarks.gpu_check.waits import check_waits
from benchmarks.measure import median_seconds, peak_bytes
from benchmarks.tables import Table
from spar_d2.engine.setup import load_config

# Limits of the host's waits: for the matching in a step, and for the segments of an image.
_STEP_WAITS, _IMAGE_WAITS = 2, 2
_SEGMENTS = 8


@dataclass(frozen=True)
class Speed:
    """Speed of a panoptic model.

    Attributes:
        model: name.
        images: images of a training step.
        side: side of the square images.
        step: seconds of a step.
        inference: seconds of one image in inference.
        peak: peak memory of a step in bytes; None if unknown.
    """

    model: str
    images: int
    side: int
    step: float
    inference: float
    peak: int | None


TABLE = Table(
    columns={
        "model": lambda s: s.model,
        "images": lambda s: f"{s.images} of {s.side}x{s.side}",
        "ms per step": lambda s: f"{s.step * 1e3:.0f}",
        "images per second, training": lambda s: f"{s.images / s.step:.1f}",
        "images per second, inference": lambda s: f"{1 / s.inference:.1f}",
        "peak MiB of a step": lambda s: "-" if s.peak is None else f"{s.peak / 2**20:.0f}",
    },
    always=("random weights and images; in bfloat16 on a GPU; a step includes backward pass and optimizer.",),
    sometimes={},
)


def check_panoptic(record: Record, settings: Settings) -> None:
    """Compare class scores with a CPU, count waits, and measure steps and inference."""
    _, config, overrides = settings.panoptic[0]
    scores = ("MODEL.MASK_TRANSFORMER.OUTPUTS", "('sem_seg',)", "MODEL.SPAR.PRECISION", "float32")
    on_cpu = _model(_config(config, (*overrides, *scores))).eval()
    on_device = copy.deepcopy(on_cpu).to(settings.device)
    with torch.no_grad(), without_tf32():
        for size in settings.sizes:
            inputs = [_inputs(size)]
            expected, found = (model(inputs)[0]["sem_seg"] for model in (on_cpu, on_device))
            check = compare(
                f"class scores, {size[0]}x{size[1]}", "device and CPU", found, expected, LIMITS["float32"], 0
            )
            record.add("MaskTransformer", COMPARISONS, check)
    del on_cpu, on_device
    for name, config, overrides in settings.panoptic:
        _measure(record, settings, name, _model(_config(config, overrides)).to(settings.device))


def _measure(record: Record, settings: Settings, name: str, model: nn.Module) -> None:
    side, count, device = settings.panoptic_side, settings.images_a_step[-1], settings.device
    inputs = [_inputs((side, side)) for _ in range(count)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    losses: dict[str, torch.Tensor] = {}

    def forward() -> None:
        with EventStorage(0), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses.update(model.train()(inputs))

    def step() -> None:
        forward()
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros((), device=device)).backward()
        optimizer.step()

    @torch.no_grad()
    def inference() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model.eval()(inputs[:1])

    step()
    inference()
    seconds = median_seconds([step, inference], settings.repeats, device, settings.limit)
    record.add("Panoptic models", TABLE, Speed(name, count, side, *seconds, peak_bytes(step, device)))
    finite = all(bool(loss.isfinite()) for loss in losses.values())
    record.add("Panoptic losses", FACTS, Fact(name, "finite losses", "finite" if finite else str(losses), finite))
    if name == settings.panoptic[0][0]:
        check_waits(record, f"{name}, losses", forward, device, _STEP_WAITS)
        check_waits(record, f"{name}, image", inference, device, _IMAGE_WAITS)


def _config(name: str, overrides: tuple) -> CfgNode:
    return load_config(str(ROOT / "configs" / name), ["MODEL.SPAR.PRETRAINED", "", "MODEL.DEVICE", "cpu", *overrides])


def _model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def _inputs(size: tuple[int, int]) -> dict:
    """Return random pixels, with bands of stuff and squares of things as labels."""
    height, width = size
    labels = torch.arange(height)[:, None].expand(size) * 2 // height + 1
    masks = torch.zeros(_SEGMENTS, *size, dtype=torch.bool)
    for number, mask in enumerate(masks):
        left = number * width // _SEGMENTS
        mask[height // 4 : height // 2, left : left + max(1, width // _SEGMENTS - 1)] = True
    instances = Instances(size)
    instances.gt_classes = torch.zeros(_SEGMENTS, dtype=torch.int64)
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    pixels = (255 * torch.rand(3, *size)).to(torch.uint8)
    return {"image": pixels, "instances": instances, "sem_seg": labels.masked_fill(masks.any(0), 0)}
