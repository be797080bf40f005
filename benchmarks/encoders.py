"""A single pass of every family of encoders beside the straightforward forward of the library it comes from."""

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
from spar_d2.encoders import DenseEncoder, DINOtxtEncoder, DINOv3Encoder, OpenCLIPEncoder, SigLIPEncoder, build_encoder
from spar_d2.encoders.positions import resample_positions
from spar_d2.encoders.precision import PRECISIONS


@functools.singledispatch
def library_forward(encoder: DenseEncoder, grid: tuple[int, int]) -> Forward | None:
    """How the encoder's library itself takes an image of a grid of patches (h, w), with the encoder's weights.

    A family registers its own. None where it has not: its encoders are measured alone.

    Returns:
        A function of (B, 3, h * p, w * p); its result is whatever the library gives. It does not change the encoder.
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
        # The library pools into one vector; these are its layers, applied to every patch.
        value = pool.proj(pool.kv(trunk.forward_features(x)).chunk(2, dim=-1)[1])
        return value + pool.mlp(pool.norm(value))

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
    """A single pass over one square image; None is what could not be had.

    Attributes:
        encoder: name of the model.
        precision: "float32", "bfloat16" or "float16".
        size: side of the image in pixels.
        cells: patches in it, without class token and registers.
        flops: operations, see :mod:`benchmarks.flops`.
        seconds, library_seconds: median time.
        peak, library_peak: bytes beside weights and image.
    """

    encoder: str
    precision: str
    size: int
    cells: int
    flops: int | None
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
        "GFLOP: multiply-adds of convolutions, linear layers and attention, each counted as 2 (fvcore).",
        "ms: median of passes that ours and the library's take in turn; ratio: ours / library's.",
        PEAK_NOTE,
        "KiB per token: of the peak; where it does not grow with the size, memory grows linearly with the tokens.",
    ),
    sometimes={
        '"-" under GFLOP: fvcore is not installed.': lambda m: m.flops is None,
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
    """Measure single passes of one encoder with random weights, precision by precision, size by size.

    Args:
        name, dinov3_repo: as for :func:`spar_d2.encoders.build_encoder`, which also says what is raised.
        sizes: sides of the images in pixels.
        precisions: of ``spar_d2.encoders.precision.PRECISIONS``.
        device: where to measure.
        repeats: passes whose median is taken.
        compile: compile the encoder's blocks; the library's forward is always as it comes.
        limit: seconds after which the passes of one size are not repeated; None is no limit.

    Raises:
        RuntimeError: moreover, where a pass of the encoder does not fit into memory.
    """
    # Frozen: autocast would keep its copies of weights that could be trained until the end of the pass.
    encoder = build_encoder(name, dinov3_repo=dinov3_repo).requires_grad_(False).to(device)
    grids = [encoder.grid(size, size) for size in sizes]
    flops = count_flops(encoder, [height * width for height, width in grids]) or [None] * len(sizes)
    for precision in precisions:
        # As in inference, with weights in the precision.
        ours = copy.deepcopy(encoder).accelerate(precision, compile).freeze()
        for size, (height, width), count in zip(sizes, grids, flops):
            passes = _passes(ours, encoder, size, precision)
            peaks = [peak_bytes(one, device) for one in passes]
            seconds = median_seconds(passes, repeats, device, limit)
            (own, others), (peak, library_peak) = (*seconds, None)[:2], (*peaks, None)[:2]
            yield Measurement(name, precision, size, height * width, count, own, others, peak, library_peak)


def _passes(frozen: DenseEncoder, encoder: DenseEncoder, size: int, precision: str) -> list[Callable[[], object]]:
    """Our pass over an image and, where there is one that fits into memory, the library's; each was run once.

    Args:
        frozen: computes in the precision.
        encoder: the same in float32, whose weights the library's pass uses.
    """
    x = random_image(size, size, next(encoder.parameters()).device)
    forward = library_forward(encoder, encoder.grid(size, size))
    ours, whole = without_gradient(frozen, x), encoder.size_policy.apply(x)
    ours()
    library = None if forward is None else without_gradient(forward, whole, PRECISIONS[precision])
    return [ours, library] if library and result_if_it_fits(library) is not None else [ours]
