"""Sliding-window teacher, compared with a straightforward implementation of its description."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock

from benchmarks.encoders import library_forward
from benchmarks.measure import median_seconds, peak_bytes
from benchmarks.passes import Forward, random_image, result_if_it_fits, without_gradient
from benchmarks.tables import NO_LIBRARY, NO_PEAK, PEAK_NOTE, Table, number, ratio
from spar_d2.encoders import DenseEncoder, OpenCLIPEncoder, build_encoder
from spar_d2.encoders.grids import to_map
from spar_d2.encoders.precision import PRECISIONS
from spar_d2.teacher import SlidingWindowTeacher, WindowPlan


@functools.singledispatch
def dense_forward(encoder: DenseEncoder, grid: tuple[int, int]) -> Forward | None:
    """Return the encoder's dense features as computed by its library, for a patch grid (h, w).

    They equal the encoder's features at its pre-training image size. A family registers its own implementation if these
    are not the last h * w tokens of :func:`benchmarks.encoders.library_forward`.

    Returns:
        A function from (B, 3, h * p, w * p) to (B, D, h, w), or None if there is no reference.
    """
    forward = library_forward(encoder, grid)
    if forward is None:
        return None
    return lambda x: to_map(forward(x)[:, -grid[0] * grid[1] :], grid)


@dense_forward.register
def _(encoder: OpenCLIPEncoder, grid: tuple[int, int]) -> Forward:
    visual = library_forward(encoder, grid)
    *earlier, last = visual.transformer.resblocks

    def forward(x: torch.Tensor) -> torch.Tensor:
        patches = visual.conv1(x).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.expand(len(x), 1, -1)
        tokens = visual.ln_pre(torch.cat([class_token, patches], dim=1) + visual.positional_embedding)
        for block in earlier:
            tokens = block(tokens)
        # The library pools to a single vector. The method passes the value of each patch through the last block.
        tokens = visual.ln_post(_with_values_only(last, tokens)[:, 1:])
        return to_map(tokens if visual.proj is None else tokens @ visual.proj, grid)

    return forward


def _with_values_only(block: ResidualAttentionBlock, tokens: torch.Tensor) -> torch.Tensor:
    attn = block.attn
    value = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)[2]
    tokens = tokens + block.ls_1(attn.out_proj(value))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def straightforward_features(
    forward: Forward, x: torch.Tensor, plan: WindowPlan, batch_size: int = 8, windows: int | None = None
) -> torch.Tensor:
    """Compute the teacher's target in a straightforward way: copy, encode and add all windows one by one, and divide.

    Args:
        forward: dense features of windows (B, 3, window, window), see :func:`dense_forward`.
        x: (1, 3, H, W).
        plan: window plan.
        batch_size: batch size of the windows.
        windows: process only the first windows of the plan; counts are still those of all windows.

    Returns:
        (1, D, ceil(H / p), ceil(W / p)).
    """
    height, width = x.shape[-2:]
    image = F.pad(x, (0, plan.width - width, 0, plan.height - height))[0]
    origins, side = plan.origins.tolist(), plan.window
    copies = torch.stack([image[:, top : top + side, left : left + side] for top, left in origins[:windows]])
    features = torch.cat([forward(batch) for batch in copies.split(batch_size)])
    mosaic = torch.zeros(features.shape[1], *plan.mosaic_size, device=x.device)
    counts = torch.zeros(plan.mosaic_size, device=x.device)
    for index, (top, left) in enumerate(origins):
        row, column = top // plan.cell, left // plan.cell
        rows, columns = slice(row, row + plan.window_cells), slice(column, column + plan.window_cells)
        if index < len(features):
            fine = F.interpolate(features[index : index + 1], scale_factor=plan.factor, mode="bilinear")
            mosaic[:, rows, columns] += fine[0]
        counts[rows, columns] += 1
    mosaic /= counts
    patches = (plan.height // plan.patch, plan.width // plan.patch)
    target = F.interpolate(mosaic[None], size=patches, mode="bilinear")
    return target[..., : -(-height // plan.patch), : -(-width // plan.patch)]


@dataclass(frozen=True)
class Measurement:
    """Measurement of the target of one image, or of the contribution of its first windows.

    Implementations are "ours"; "straightforward", always in float32; and, if ours is not in float32, "autocast", the
    straightforward implementation under ``torch.autocast``. The latter two may be missing. "student" is an optional
    single pass over the same image.

    Attributes:
        encoder: name of the model.
        precision: "float32", "bfloat16" or "float16", of ours.
        width, height: image size in pixels.
        planned: number of windows of the image.
        windows: number of encoded windows.
        seconds: median times by implementation.
        peaks: peak memory in bytes without weights and image, by implementation except autocast; None if unavailable.
        difference: largest difference between our features and the straightforward ones.
        deviation: standard deviation of the straightforward features.
    """

    encoder: str
    precision: str
    width: int
    height: int
    planned: int
    windows: int
    seconds: Mapping[str, float]
    peaks: Mapping[str, int | None]
    difference: float | None = None
    deviation: float | None = None

    def rate(self, way: str) -> float | None:
        """Windows per second of an implementation."""
        return self.windows / self.seconds[way] if way in self.seconds else None

    @property
    def seconds_per_image(self) -> float:
        """Time of ours, extrapolated to all windows."""
        return self.planned / self.rate("ours")


TABLE = Table(
    columns={
        "encoder": lambda m: m.encoder,
        "precision": lambda m: m.precision,
        "size": lambda m: f"{m.width}x{m.height}",
        "windows": lambda m: str(m.windows) if m.windows == m.planned else f"{m.windows} of {m.planned}",
        "windows/s": lambda m: number(m.rate("ours")),
        "straightforward windows/s": lambda m: number(m.rate("straightforward")),
        "ratio": lambda m: ratio(m.rate("ours"), m.rate("straightforward")),
        "autocast ratio": lambda m: ratio(m.rate("ours"), m.rate("autocast")),
        "s per image": lambda m: number(m.seconds_per_image),
        "peak MiB": lambda m: number(m.peaks["ours"], 2**20),
        "straightforward peak MiB": lambda m: number(m.peaks.get("straightforward"), 2**20),
        "difference": lambda m: "-" if m.difference is None else f"{m.difference:.1e}",
        "difference / std": lambda m: "-" if m.difference is None else f"{m.difference / m.deviation:.1e}",
    },
    always=(
        "straightforward: all windows copied into one tensor, encoded in small batches by the library's modules in "
        "float32, added to the canvas one by one.",
        "windows/s: from the median time of alternating runs of ours and the straightforward implementation.",
        "ratio: windows/s of ours / straightforward; autocast ratio: / the same code under torch.autocast, if ours "
        "is not in float32.",
        PEAK_NOTE,
        "difference: largest between the features of ours and straightforward; std: of all features of the latter.",
    ),
    sometimes={
        '"of" under windows: only the first windows of the image were encoded; s per image is extrapolated, and the '
        "straightforward peak grows with their number.": lambda m: m.windows < m.planned,
        f'"-" under straightforward: {NO_LIBRARY}': lambda m: "straightforward" not in m.seconds,
        NO_PEAK: lambda m: None in m.peaks.values(),
    },
)
WITH_STUDENT = replace(
    TABLE,
    columns={
        **TABLE.columns,
        "student ms": lambda m: number(m.seconds["student"], 1e-3),
        "teacher / student": lambda m: number(m.seconds_per_image / m.seconds["student"]),
    },
    always=(*TABLE.always, "student: a single pass of the same encoder in the same precision over the same image."),
)


def measure_teacher(
    name: str,
    sizes: Sequence[tuple[int, int]],
    precisions: Sequence[str],
    device: torch.device,
    stride: int = 24,
    batch_size: int = 32,
    baseline_batch_size: int = 8,
    windows: int | None = None,
    repeats: int = 5,
    compile: bool = False,
    dinov3_repo: str = "",
    student: bool = False,
    limit: float | None = None,
) -> Iterator[Measurement]:
    """Measure targets of single images with random weights, for all precisions and sizes.

    Args:
        name, dinov3_repo: see :func:`spar_d2.encoders.build_encoder`.
        sizes: (width, height) of the images in pixels.
        precisions: names of ``spar_d2.encoders.precision.PRECISIONS``.
        device: device to measure on.
        stride, batch_size: see :class:`spar_d2.teacher.SlidingWindowTeacher`.
        baseline_batch_size: batch size of the straightforward implementation.
        windows: encode only the first windows of each image; None for all.
        repeats: number of runs for the median.
        compile: compile our encoder's blocks; the library's are not compiled.
        student: also measure a single pass over the image; :data:`WITH_STUDENT` shows it.
        limit: number of seconds after which runs of one size are not repeated; None for no limit.

    Raises:
        RuntimeError: ours does not fit into memory; or as ``build_encoder`` and the teacher.
    """
    # The library's weights stay trainable, as by default: autocast then converts them once for all batches instead of
    # once per batch.
    encoder = build_encoder(name, dinov3_repo=dinov3_repo).to(device)
    forward = None
    for precision in precisions:
        # The teacher has its own frozen copy in the given precision.
        teacher = SlidingWindowTeacher(encoder.accelerate(precision, compile), stride=stride, batch_size=batch_size)
        forward = forward or dense_forward(encoder, encoder.grid(teacher.window, teacher.window))
        for width, height in sizes:
            x, planned = random_image(height, width, device), len(teacher.plan(height, width))
            count = min(windows or planned, planned)
            ways = {"ours": without_gradient(_target_of(teacher, count, planned), x)}
            results = {"ours": ways["ours"]()}
            for way, call in _straightforward_calls(teacher, forward, x, baseline_batch_size, count, precision).items():
                if (result := result_if_it_fits(call)) is not None:
                    ways[way], results[way] = call, result
            if student:
                single = copy.deepcopy(encoder).accelerate(precision, compile).freeze()
                ways["student"] = without_gradient(single, x)
                ways["student"]()
            compared = _compare(results["ours"], results.get("straightforward"))
            peaks = {way: peak_bytes(call, device) for way, call in ways.items() if way != "autocast"}
            seconds = dict(zip(ways, median_seconds(list(ways.values()), repeats, device, limit)))
            yield Measurement(name, precision, width, height, planned, count, seconds, peaks, *compared)


def _target_of(teacher: SlidingWindowTeacher, windows: int, planned: int) -> Forward:
    """Return a function that computes the teacher's target, or the contribution of its first windows."""
    if windows == planned:
        return teacher
    picks = torch.arange(windows)[None]
    return lambda x: teacher.encode_windows(x, picks, torch.ones(picks.shape)).weighted_sum


def _straightforward_calls(
    teacher: SlidingWindowTeacher,
    forward: Forward | None,
    x: torch.Tensor,
    batch_size: int,
    windows: int,
    precision: str,
) -> dict[str, Callable[[], torch.Tensor]]:
    if forward is None:
        return {}
    plan, dtype = teacher.plan(*x.shape[-2:]), PRECISIONS[precision]
    plain = functools.partial(straightforward_features, forward, plan=plan, batch_size=batch_size, windows=windows)
    ways = {"straightforward": without_gradient(plain, x)}
    return {**ways, "autocast": without_gradient(plain, x, dtype)} if dtype else ways


def _compare(actual: torch.Tensor, expected: torch.Tensor | None) -> tuple[float | None, float | None]:
    """Return the largest difference and the standard deviation of the expected values, where windows contributed."""
    if expected is None:
        return None, None
    return (actual - expected).abs().max().item(), expected[expected != 0].std().item()
