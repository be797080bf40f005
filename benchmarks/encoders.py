"""Single passes of encoders, compared with the forward passes of their libraries."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.flops import count_flops
from benchmarks.measure import median_seconds, peak_bytes
from benchmarks.passes import Forward, random_image, result_if_it_fits, without_gradient
from benchmarks.tables import NO_LIBRARY, NO_PEAK, PEAK_NOTE, Table, number, ratio
from spar_d2.encoders import (
    DenseEncoder,
    DINOtxtEncoder,
    DINOv3Encoder,
    OpenCLIPEncoder,
    OpenCLIPTimmEncoder,
    SigLIPEncoder,
    TimmViTEncoder,
    build_encoder,
)
from spar_d2.encoders.positions import resample_positions
from spar_d2.encoders.precision import PRECISIONS


@functools.singledispatch
def library_forward(encoder: DenseEncoder, grid: tuple[int, int]) -> Forward | None:
    """Return the forward pass of the encoder's library with the encoder's weights, for a patch grid (h, w).

    Families register their own implementation. Without one, encoders are measured alone.

    Returns:
        A function of (B, 3, h * p, w * p) with the library's own result, or None. It does not modify the encoder.
    """
    return None


@library_forward.register
def _(encoder: OpenCLIPEncoder, grid: tuple[int, int]) -> Forward:
    visual = _copy_sharing_weights(encoder.visual)
    table = visual.positional_embedding
    patches = resample_positions(table[1:], visual.grid_size, grid)
    visual.positional_embedding = nn.Parameter(torch.cat([table[:1], patches]), requires_grad=False)
    return visual


@library_forward.register
def _(encoder: SigLIPEncoder, grid: tuple[int, int]) -> Forward:
    trunk = _copy_sharing_weights(encoder.visual.trunk)
    trunk.set_input_size(tuple(cells * encoder.patch_size for cells in grid))
    pool = trunk.attn_pool

    def forward(x: torch.Tensor) -> torch.Tensor:
        # The library pools to a single vector. These are the pooling layers, applied to every patch.
        value = pool.proj(pool.kv(trunk.forward_features(x)).chunk(2, dim=-1)[1])
        return value + pool.mlp(pool.norm(value))

    return forward


@library_forward.register
def _(encoder: TimmViTEncoder, grid: tuple[int, int]) -> Forward:
    trunk = _copy_sharing_weights(encoder.trunk)
    trunk.set_input_size(tuple(cells * encoder.patch_size for cells in grid))
    if encoder.readout == "tokens":
        return trunk.forward_features

    def forward(x: torch.Tensor) -> torch.Tensor:
        embedded = trunk._pos_embed(trunk.patch_embed(x))
        tokens, options = (embedded[0], {"rope": embedded[1]}) if isinstance(embedded, tuple) else (embedded, {})
        tokens = trunk.norm_pre(tokens)
        for block in trunk.blocks[:-1]:
            tokens = block(tokens, **options)
        # The library's blocks have no value path: each token may attend to itself only.
        alone = torch.eye(tokens.shape[1], dtype=torch.bool, device=x.device)
        return trunk.norm(trunk.blocks[-1](tokens, **options, attn_mask=alone))

    return forward


@library_forward.register
def _(encoder: OpenCLIPTimmEncoder, grid: tuple[int, int]) -> Forward:
    trunk, pool = encoder.trunk, encoder.trunk.attn_pool
    tokens_of = library_forward.dispatch(TimmViTEncoder)(encoder, grid)

    def forward(x: torch.Tensor) -> torch.Tensor:
        tokens = tokens_of(x)
        if pool is not None:
            # The library pools to a single vector: here, each token alone.
            tokens = pool(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        return encoder.visual.head(trunk.head(trunk.fc_norm(tokens)))

    return forward


@library_forward.register
def _(encoder: DINOv3Encoder, grid: tuple[int, int]) -> Forward:
    return encoder.visual.forward_features


@library_forward.register
def _(encoder: DINOtxtEncoder, grid: tuple[int, int]) -> Forward:
    tower = encoder.visual_model
    if encoder.tokens == "head":
        return lambda x: tower.get_class_and_patch_tokens(x)[1]
    return lambda x: tower.backbone.get_intermediate_layers(x, n=1)[0]


def _copy_sharing_weights(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


@dataclass(frozen=True)
class Measurement:
    """Measurement of a single pass on a square image. Unavailable values are None.

    Attributes:
        encoder: name of the model.
        precision: "float32", "bfloat16" or "float16".
        size: image side in pixels.
        cells: number of patches, without class and register tokens.
        flops: floating-point operations, see :mod:`benchmarks.flops`.
        seconds, library_seconds: median times.
        peak, library_peak: peak memory in bytes, without weights and image.
    """

    encoder: str
    precision: str
    size: int
    cells: int
    flops: int
    seconds: float
    library_seconds: float | None
    peak: int | None
    library_peak: int | None


TABLE = Table(
    columns={
        "encoder": lambda m: m.encoder,
        "precision": lambda m: m.precision,
        "size": lambda m: str(m.size),
        "tokens": lambda m: str(m.cells),
        "GFLOP": lambda m: number(m.flops, 1e9),
        "ms": lambda m: number(m.seconds, 1e-3),
        "library ms": lambda m: number(m.library_seconds, 1e-3),
        "ratio": lambda m: ratio(m.seconds, m.library_seconds),
        "TFLOP/s": lambda m: number(m.flops, 1e12 * m.seconds),
        "peak MiB": lambda m: number(m.peak, 2**20),
        "library peak MiB": lambda m: number(m.library_peak, 2**20),
        "KiB per token": lambda m: number(m.peak, 2**10 * m.cells),
    },
    always=(
        "GFLOP: multiply-adds of convolutions, linear layers and attention, each counted as 2.",
        "ms: median of alternating passes of ours and the library; ratio: ours / library.",
        PEAK_NOTE,
        "KiB per token: peak memory per token; a constant value means that memory grows linearly with the tokens.",
    ),
    sometimes={
        f'"-" under library: {NO_LIBRARY}': lambda m: m.library_seconds is None,
        NO_PEAK: lambda m: m.peak is None,
    },
)


def measure_encoder(
    name: str,
    sizes: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
    repeats: int = 5,
    compile: bool = False,
    dinov3_repo: str = "",
    limit: float | None = None,
) -> Iterator[Measurement]:
    """Measure single passes of an encoder with random weights, for all precisions and sizes.

    Args:
        name, dinov3_repo: see :func:`spar_d2.encoders.build_encoder`.
        sizes: image sides in pixels.
        precisions: names of ``spar_d2.encoders.precision.PRECISIONS``.
        device: device to measure on.
        repeats: number of passes for the median.
        compile: compile the encoder's blocks; the library's forward pass is not compiled.
        limit: number of seconds after which passes are not repeated; None for no limit.

    Raises:
        RuntimeError: a pass of the encoder does not fit into memory; or as ``build_encoder``.
    """
    # Frozen, because autocast would keep copies of trainable weights until the end of the pass.
    encoder = build_encoder(name, dinov3_repo=dinov3_repo).requires_grad_(False).to(device)
    grids = [encoder.grid(size, size) for size in sizes]
    flops = count_flops(encoder, [height * width for height, width in grids])
    for precision in precisions:
        # Weights are converted to the precision, as in inference.
        ours = copy.deepcopy(encoder).accelerate(precision, compile).freeze()
        for size, (height, width), count in zip(sizes, grids, flops):
            passes = _passes(ours, encoder, size, precision)
            peaks = [peak_bytes(one, device) for one in passes]
            seconds = median_seconds(passes, repeats, device, limit)
            (ours_seconds, library_seconds), (peak, library_peak) = (*seconds, None)[:2], (*peaks, None)[:2]
            yield Measurement(
                name, precision, size, height * width, count, ours_seconds, library_seconds, peak, library_peak
            )


def _passes(frozen: DenseEncoder, encoder: DenseEncoder, size: int, precision: str) -> list[Callable[[], object]]:
    """Return our pass over an image and, if available, the library's. Both have been run once.

    Args:
        frozen: encoder in the given precision.
        encoder: encoder in float32, whose weights the library's pass uses.
    """
    x = random_image(size, size, next(encoder.parameters()).device)
    forward = library_forward(encoder, encoder.grid(size, size))
    ours, padded = without_gradient(frozen, x), encoder.size_policy.apply(x)
    ours()
    library = None if forward is None else without_gradient(forward, padded, PRECISIONS[precision])
    return [ours, library] if library and result_if_it_fits(library) is not None else [ours]
