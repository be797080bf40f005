"""Label propagation over the pixels of an image (LPOSS+, arXiv 2503.19777).

Scores of pixels within a window of 13x13 pixels and with similar colors are drawn to each other.
"""

from __future__ import annotations

import math

import torch

from spar_d2.encoders.precision import full_float32
from spar_d2.refine.conjugate_gradients import chunks, solve
from spar_d2.refine.inputs import check_device, check_tensor, finite_ranges
from spar_d2.refine.lab_colors import scaled_lab
from spar_d2.refine.patch_propagation import ALPHA

# Largest distance of neighbors in rows and columns, and width of their window.
_REACH = 6
_WIDTH = 2 * _REACH + 1
# Weights are exp(-color distance / 0.01), computed as powers of two: exp is many times slower where it underflows.
_EXPONENT = -100 / math.log(2)
# Colors may leave 0..1 by this much.
_OVERSHOOT = 0.1
# Distance of the color of padding to all others; its weights underflow to zero.
_FAR = 1e3
# Added to squared distances: far below those of different colors, it makes the square root of zero fast and finite.
_TINY = 1e-30
# Bytes of weights that are kept; the rest is computed in every step. Bytes of the classes that are propagated at once.
_WEIGHT_BYTES = 256 << 20
_CLASS_BYTES = 320 << 20
# Numbers for each weight while it is computed.
_AT_ONCE = 5
# Ranges of pixels are as short for fewer classes as for these, which bounds the memory of weights.
_FEWEST = 8
# Tensors of the size of an image that exist for each class: four of the solver and the result.
_COPIES = 5


class PixelGraph:
    """Graph of the pixels of an image, which is built once and applied to any number of classes.

    Memory does not grow with the number of classes: weights are kept up to 256 MiB and otherwise computed in every
    step, and classes are propagated in chunks of 320 MiB. Ask for the result in chunks where it is too large itself::

        graph = PixelGraph(image)
        best, weak = best_classes(graph.propagate(part) for part in scores.split(graph.classes_at_once))

    Args:
        image: (3, H, W) floating-point RGB in 0..1, without mean and standard deviation of an encoder.
        check: check for NaN, infinite and other values. A GPU is waited for once.

    Attributes:
        size: (H, W) of the image.
        device: device of the image.
        classes_at_once: number of classes that are propagated at once.

    Raises:
        ValueError: ``image`` has the wrong shape, dtype or values.
    """

    @torch.no_grad()
    def __init__(self, image: torch.Tensor, *, check: bool = True) -> None:
        check_tensor("image", image, "(3, H, W)")
        if len(image) != 3:
            raise ValueError(f"image must be RGB (3, H, W), got {tuple(image.shape)}")
        if check:
            _check_range(finite_ranges(image=image))
        height, width = self.size = (image.shape[1], image.shape[2])
        self.device = image.device
        # Rows end with padding, which separates them from the next row, and the image ends with padded rows. A neighbor
        # is then a fixed number of positions away, and all arithmetic is on contiguous memory.
        self._stride = width + _REACH
        self._pixels = height * self._stride
        self._length = (height + _REACH) * self._stride + _REACH
        # First position and number of the neighbors in each row, from the row of the pixel on. Neighbors before a pixel
        # are pixels for which it is a neighbor after them.
        x = min(_REACH, width - 1)
        self._rows = [(1, x)] if x else []
        self._rows += [(y * self._stride - x, 2 * x + 1) for y in range(1, min(_REACH, height - 1) + 1)]
        self.classes_at_once = max(1, _CLASS_BYTES // (4 * _COPIES * self._length))
        with full_float32(image.device):
            self._colors = self._padded(scaled_lab(image.float()), _FAR)
            self._build()

    def _padded(self, maps: torch.Tensor, value: float) -> torch.Tensor:
        """Pad maps (C, H, W) on the right and bottom and flatten them, (C, length) float32."""
        height, width = self.size
        padded = maps.new_full((len(maps), self._length), value, dtype=torch.float32)
        padded[:, : self._pixels].view(-1, height, self._stride)[..., :width] = maps
        return padded

    def _build(self) -> None:
        self._kept: list[torch.Tensor] = []
        degree = self._colors.new_zeros(self._length)
        budget = _WEIGHT_BYTES // (4 * self._pixels)
        parts = list(chunks(_AT_ONCE * _WIDTH, self._pixels, self.device))
        buffers = self._buffers(parts)
        for first, count in self._rows:
            kept = torch.empty(count, self._pixels, device=self.device) if count <= budget else None
            budget = 0 if kept is None else budget - count
            self._kept += [] if kept is None else [kept]
            for part in parts:
                weights = self._affinity(part, first, count, buffers, None if kept is None else kept[:, part])
                degree[part] += weights.sum(0)
                for number, row in enumerate(weights, first):
                    degree[part.start + number : part.stop + number] += row
        self._scale = degree.masked_fill_(degree == 0, 1).rsqrt_().mul_(math.sqrt(ALPHA))
        for weights, (first, count) in zip(self._kept, self._rows):
            for part in chunks(count, self._pixels, self.device):
                self._normalize(weights[:, part], part, first)

    def _buffers(self, parts: list[slice]) -> torch.Tensor:
        """Memory for the weights of a range of pixels, allocated once: the first use of memory is slow on a CPU."""
        return torch.empty(_AT_ONCE, _WIDTH, parts[0].stop, device=self.device)

    def _neighbors(self, maps: torch.Tensor, part: slice, first: int, count: int) -> torch.Tensor:
        """View of maps (C, length) at consecutive neighbors of a range of n pixels, (C, count, n)."""
        n = part.stop - part.start
        return maps.as_strided((len(maps), count, n), (self._length, 1, 1), part.start + first)

    def _affinity(
        self, part: slice, first: int, count: int, buffers: torch.Tensor, output: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the weights between a range of n pixels and consecutive neighbors.

        Args:
            part: range of pixels.
            first, count: position of the first neighbor relative to each pixel, and number of neighbors.
            buffers: memory for at least these weights, overwritten.
            output: (count, n), or None for one of the buffers.

        Returns:
            The output.
        """
        buffers = buffers[:, :count, : part.stop - part.start]
        output, root, difference = buffers[0] if output is None else output, buffers[1], buffers[2:]
        there = self._neighbors(self._colors, part, first, count)
        torch.sub(there, self._colors[:, None, part], out=difference)
        red, green, blue = difference
        torch.mul(red, red, out=output).add_(_TINY)
        output.addcmul_(green, green).addcmul_(blue, blue)
        # The distance is the square times its inverse square root, which is faster than a square root.
        torch.rsqrt(output, out=root)
        return output.mul_(root).mul_(_EXPONENT).exp2_()

    def _normalize(self, weights: torch.Tensor, part: slice, first: int) -> torch.Tensor:
        """Multiply weights (count, n) by the scales of both pixels, in place."""
        return weights.mul_(self._scale[part]).mul_(self._neighbors(self._scale[None], part, first, len(weights))[0])

    def _apply(self, values: torch.Tensor, output: torch.Tensor) -> None:
        """Write (1 - 0.95 S) values to the output, both (C, length)."""
        output.copy_(values)
        parts = list(chunks(max(len(values), _FEWEST), self._pixels, self.device))
        buffers = self._buffers(parts) if len(self._kept) < len(self._rows) else output.new_empty(0)
        for part in parts:
            here, result = values[:, part], output[:, part]
            for number, (first, count) in enumerate(self._rows):
                if number < len(self._kept):
                    weights = self._kept[number][:, part]
                else:
                    weights = self._normalize(self._affinity(part, first, count, buffers, None), part, first)
                for offset, row in enumerate(weights, first):
                    there = slice(part.start + offset, part.stop + offset)
                    result.addcmul_(row, values[:, there], value=-1)
                    output[:, there].addcmul_(row, here, value=-1)

    @torch.no_grad()
    def propagate(self, columns: torch.Tensor, *, check: bool = True) -> torch.Tensor:
        """Propagate the scores of each class over the graph. Classes do not influence each other.

        Args:
            columns: (Q, H, W) floating-point scores, without softmax or scale.
            check: check for NaN and infinite values. A GPU is waited for once.

        Returns:
            (Q, H, W) float32.

        Raises:
            ValueError: ``columns`` has the wrong shape, dtype or values.
        """
        check_tensor("columns", columns, "(Q, H, W)")
        check_device("columns", columns, "image", self.device)
        if columns.shape[1:] != self.size:
            raise ValueError(
                f"columns (Q, H, W) must have the size of image, {self.size[0]}x{self.size[1]}, got "
                f"{columns.shape[1]}x{columns.shape[2]}"
            )
        if check:
            finite_ranges(columns=columns)
        result = torch.empty(columns.shape, device=self.device)
        with full_float32(self.device):
            for part, output in zip(columns.split(self.classes_at_once), result.split(self.classes_at_once)):
                output.copy_(self._solve(part))
        return result

    def _solve(self, columns: torch.Tensor) -> torch.Tensor:
        solution = solve(self._apply, self._padded(columns, 0))[:, : self._pixels]
        return solution.view(-1, self.size[0], self._stride)[..., : self.size[1]]


def lposs_plus(scores: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Refine class scores of pixels by label propagation (LPOSS+, arXiv 2503.19777).

    Every pixel is connected to those within 6 rows and columns, with a weight of ``exp(-distance / 0.01)`` of their
    colors in scaled CIE Lab. Scores then approach those of connected pixels: at most 10 steps of conjugate gradients
    solve ``(1 - 0.95 S) z = scores`` for each class, with the symmetrically normalized weights ``S``. Computed in
    float32 whatever the dtypes are. A GPU is waited for once. See :class:`PixelGraph` for memory, and for results that
    are too large.

    Args:
        scores: (Q, H, W) floating-point scores of Q classes, without softmax or scale. Upsampling patch scores to the
            pixels is up to the caller.
        image: (3, H, W) floating-point RGB in 0..1, without mean and standard deviation of an encoder.

    Returns:
        (Q, H, W) float32. Values are larger than those of ``scores`` where neighbors agree, up to 20 times.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range, or NaN or infinite values.
    """
    check_tensor("scores", scores, "(Q, H, W)")
    check_tensor("image", image, "(3, H, W)")
    check_device("image", image, "scores", scores.device)
    if image.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"image (3, H, W) must have the size of scores (Q, H, W), {scores.shape[1]}x{scores.shape[2]}, got "
            f"{image.shape[1]}x{image.shape[2]}: upsample the scores to the image first"
        )
    _check_range(finite_ranges(scores=scores, image=image))
    return PixelGraph(image, check=False).propagate(scores, check=False)


def _check_range(ranges: dict[str, tuple[float, float]]) -> None:
    lowest, highest = ranges["image"]
    # Resizing may overshoot a little.
    if lowest < -_OVERSHOOT or highest > 1 + _OVERSHOOT:
        raise ValueError(
            f"image must be RGB in 0..1, got values from {lowest:g} to {highest:g}: divide bytes by 255, and do not "
            f"normalize by mean and standard deviation"
        )
