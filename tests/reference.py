"""Reference numbers of the method, and how to re-create the weights and images they were made with."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from spar_d2.encoders import FAMILIES, DenseEncoder, OpenCLIPEncoder, SigLIPEncoder, build_encoder

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "tests" / "dinov3_stand_in"
# RULES.md in there says how the numbers were made.
GOLDEN = ROOT / "tests" / "data" / "golden"
GOLDEN_PQ = ROOT / "tests" / "data" / "golden_pq"
# Photos and annotations of others, which are no part of this repository.
SHARED = ROOT.parent / "shared"
TINY_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def reference_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight that the reference numbers were made with: seeded by its key alone."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    value = rng.standard_normal(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if key in ("logit_scale", "logit_bias"):
        return torch.tensor({"logit_scale": math.log(100.0), "logit_bias": -10.0}[key])
    if last in ("positional_embedding", "pos_embed"):
        value = value * np.float32(0.3)
    elif value.ndim == 1 and last == "weight":
        value = np.float32(1) + value * np.float32(0.1)
    elif value.ndim <= 1:
        value = value * np.float32(0.1)
    else:
        inputs = shape[value.ndim - 1] if value.ndim in (2, 3) else math.prod(shape[1:])
        value = value * np.float32(1 / math.sqrt(inputs))
    return torch.from_numpy(value)


def fill_with_reference(module: torch.nn.Module) -> torch.nn.Module:
    """Give every floating-point entry of a module its reference weight, in place."""
    state = {k: reference_weight(k, tuple(v.shape)) for k, v in module.state_dict().items() if v.is_floating_point()}
    module.load_state_dict(state, strict=False)
    return module


def reference_encoder(model: str, reference_compat: bool = False) -> DenseEncoder:
    """The encoder of the reference numbers of that name ("openclip-tiny", "siglip-tiny"), with their weights."""
    if model == "openclip-tiny":
        return OpenCLIPEncoder(fill_with_reference(open_clip.CLIP(**TINY_CONFIG)).visual, reference_compat)
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3}
    visual = torch.nn.Module()
    visual.trunk = VisionTransformer(**sizes, class_token=False, global_pool="map", num_classes=0)
    encoder = SigLIPEncoder(visual, reference_compat)
    return fill_with_reference(encoder)


def example_encoder(family: str) -> DenseEncoder:
    """A tiny encoder of a family; DINOv3.txt's is built by the stand-in for a clone of its repository."""
    encoder = FAMILIES[family].example()
    if encoder is None and family == "DINOv3.txt":
        encoder = build_encoder(FAMILIES[family].names()[0], dinov3_repo=str(STAND_IN))
        encoder.native_size = 64  # as small as the other families' examples
    if encoder is None:
        pytest.skip(f"an example of {family} needs what is not here")
    return encoder


def reference_image(height: int, width: int, index: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 image of the reference cases."""
    rng = np.random.RandomState(zlib.crc32(f"image:{height}x{width}:{index}".encode()) & 0x7FFFFFFF)
    base = rng.randint(0, 256, size=(math.ceil(height / 8), math.ceil(width / 8), 3), dtype=np.int64)
    image = base.repeat(8, 0).repeat(8, 1)[:height, :width]
    noise = rng.randint(-24, 25, size=(height, width, 3), dtype=np.int64)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def normalized(image: np.ndarray, encoder) -> torch.Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) as the encoder wants it."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    return ((torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std)[None]


def golden_names(prefix: str) -> list[str]:
    """Names of the reference cases that start with ``prefix``."""
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and metadata of a reference case."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{name}.json").read_text())


def golden_input(arrays: dict[str, np.ndarray], encoder) -> torch.Tensor:
    """(n, 3, H, W), stored or made from the stored image."""
    if "x" in arrays:
        return torch.from_numpy(arrays["x"])
    return torch.cat([normalized(image, encoder) for image in arrays["image_u8"]])


def cells_of(plan, windows: torch.Tensor) -> torch.Tensor:
    """(k,) window numbers to (k, window_cells ** 2) numbers of the mosaic cells they cover, both in raster order."""
    rows, columns = (plan.origins[windows] // plan.cell).unbind(1)
    steps = torch.arange(plan.window_cells)
    cells = (rows[:, None] + steps)[:, :, None] * plan.mosaic_size[1] + (columns[:, None] + steps)[:, None]
    return cells.flatten(1)
