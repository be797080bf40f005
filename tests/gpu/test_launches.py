"""Launches, casts of weights and the least time of full-size models on an H100, counted without one."""

import functools

import pytest
import torch

from rooflines import HALF, MEMORY, Rooflines, WithoutValues, images, on_device
from spar_d2.encoders import build_encoder
from spar_d2.modeling import segment_features
from spar_d2.teacher.sliding import plan_windows, sliding_window_features

# Numbers of launches and milliseconds; ten percent more are allowed.
WANTED = {
    "SigLIP2 B/16-512, single pass, 1024x1024": (140, 2.2),
    "SigLIP2 B/16-512, 32 windows of 512": (130, 12.7),
    "OpenCLIP B/16, 32 windows of 224": (126, 2.1),
    "DINOv3 L/16, 32 windows of 256": (450, 11.0),
    "teacher of SigLIP2 B/16-512, 1024x1024, window 512, stride 24": (2300, 200.0),
    "labels, 1000 classes, 2048x2048": (400, 6.0),
}
SLACK = 1.1
SIGLIP = "ViT-B-16-SigLIP2-512"
FORWARD = {
    "SigLIP2 B/16-512, single pass, 1024x1024": (SIGLIP, (1, 3, 1024, 1024)),
    "SigLIP2 B/16-512, 32 windows of 512": (SIGLIP, (32, 3, 512, 512)),
    "OpenCLIP B/16, 32 windows of 224": ("ViT-B-16", (32, 3, 224, 224)),
    "DINOv3 L/16, 32 windows of 256": ("vit_large_patch16_dinov3", (32, 3, 256, 256)),
}


@functools.cache
def built(name: str):
    """A frozen encoder of full size on the device, without values."""
    with WithoutValues():
        encoder = build_encoder(name)
    return on_device(encoder).accelerate("bfloat16").freeze()


def check(counted: Rooflines, case: str) -> None:
    launches, milliseconds = WANTED[case]
    assert 0 < counted.launches <= SLACK * launches, counted.report()
    assert 0 < counted.milliseconds <= SLACK * milliseconds, counted.report()


@torch.no_grad()
def test_launches_bytes_and_flops_are_counted():
    """A layer of 8 MB under autocast, by hand."""
    layer, x = on_device(torch.nn.Linear(1024, 2048, bias=False)), images(4096, 1024)
    with Rooflines(layer) as counted:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        scores = torch.zeros(3).to("cuda")
        assert scores.sum().item() == 0.5
    assert y.shape == (4096, 2048) and y.dtype == torch.bfloat16
    half = 2 * (4096 * 1024 + 2048 * 1024 + 4096 * 2048)
    product = counted.rows["mm", "bfloat16"]
    assert (product.calls, product.flops, product.bytes) == (1, 2 * 4096 * 1024 * 2048, half)
    assert product.seconds == pytest.approx(product.flops / HALF) and product.seconds > half / MEMORY
    casts = counted.rows["_to_copy", "bfloat16"]
    assert casts.calls == 2 and casts.bytes == 6 * (4096 + 2048) * 1024
    assert casts.seconds == pytest.approx(casts.bytes / MEMORY)
    # Casts of other tensors than weights, views and allocations are not counted.
    assert (counted.launches, counted.weight_casts, counted.waits) == (4, 1, 2)
    assert (counted.copies, counted.copied_bytes) == (1, 12)
    assert counted.milliseconds == pytest.approx(1e3 * sum(row.seconds for row in counted.rows.values()))
    assert "1 casts of weights" in counted.report()
    plain = images(1, 2, 4, 6)
    with Rooflines(), pytest.raises(RuntimeError, match="would write a matrix of all pairs"):
        torch.nn.functional.scaled_dot_product_attention(plain, plain, plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_frozen_encoders(case):
    name, shape = FORWARD[case]
    encoder = built(name)
    x = images(*shape)
    with Rooflines():
        encoder(x)  # positions of a grid are kept
    with Rooflines(encoder) as counted:
        features = encoder(x)
    assert features.dtype == torch.float32 and features.device.type == "cuda"
    check(counted, case)
    assert (counted.copies, counted.waits) == (0, 0), counted.report()
    # A table of positions, 1.5 MB, is resampled in float32 where the grid is another.
    assert counted.weight_casts == (shape[2] != encoder.native_size), counted.report()


@pytest.mark.slow
@torch.no_grad()
def test_teacher():
    encoder = built(SIGLIP)
    with Rooflines(encoder) as counted:
        target = sliding_window_features(encoder, images(1, 3, 1024, 1024), window=512, stride=24)
    assert target.shape == (1, 768, 64, 64)
    assert len(plan_windows(encoder, 1024, 1024, 512, 24)) == 529
    check(counted, "teacher of SigLIP2 B/16-512, 1024x1024, window 512, stride 24")
    assert counted.weight_casts == 0 and counted.copies <= 2 and counted.waits <= 2, counted.report()


@pytest.mark.parametrize("thresholds", [(0.0, None), (0.1, 0.01)])
def test_labels(thresholds):
    features, text = images(768, 128, 128), images(1000, 768)
    classes = images(1000, dtype=torch.int64)
    with Rooflines() as counted:
        labels = segment_features(features, text, classes, (2048, 2048), None, 40.0, *thresholds)
    assert labels.shape == (2048, 2048) and labels.dtype == torch.int64
    check(counted, "labels, 1000 classes, 2048x2048")
    assert counted.waits == 0 and counted.copies == 0, counted.report()
