"""Base class of dense image encoders."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spar_d2.encoders.compilation import FIXED_SHAPE, compiled
from spar_d2.encoders.grids import RecentGrids
from spar_d2.encoders.image_sizes import Pad
from spar_d2.encoders.origin import Origin
from spar_d2.encoders.precision import PRECISIONS, cast_parameters

Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class DenseEncoder(nn.Module, ABC):
    """A ViT that computes one feature per patch, for images of any size.

    The ViT always stays in eval mode: dropout, stochastic depth and random position shifts would only add noise to the
    feature regression.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: number of channels D of the dense features.
        width: number of channels C of the intermediate features.
        native_size: pre-training image size: side of the square images in pixels, rounded down to whole patches.
        pixel_mean, pixel_std: pixel mean and standard deviation (RGB, pixels in 0..1), three floats each.
        logit_scale: scale of the cosine similarities between dense features and text embeddings.
        reference_compat: handle image sizes as the reference code of the SPAR authors does; the effect depends on the
            encoder class.
        parts: maps the keywords of ``MODEL.SPAR.TRAINABLE`` to regular expressions that match parameter names; for
            "qkv" and "mlp", names within a block.
        unused: regular expression that matches the names of parameters that do not affect the dense features. These
            parameters are never trained.
        prefix_tokens: number of tokens before the patch tokens.
        origin: metadata on the origin of the weights, as stored in weight files; None if unknown.
    """

    patch_size: int
    embed_dim: int
    width: int
    native_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    logit_scale: float = 40.0
    reference_compat: bool = False
    parts: Mapping[str, str]
    unused: str = r"(?!)"
    prefix_tokens: int = 0
    origin: Origin | None = None

    _precision: torch.dtype | None = None
    _compile: bool = False
    _checkpointing: bool = False
    _fixed_shape: bool = False
    _is_cast: bool = False

    def __init__(self) -> None:
        super().__init__()
        # Cache of position tensors for the last few grid sizes; see :meth:`_of_grid`.
        self._grids = RecentGrids()
        # Maps frozen blocks to their copies in `_precision`; see :meth:`frozen_blocks_cast`.
        self._cast_blocks: dict[nn.Module, nn.Module] = {}

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, in order."""

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Compute dense features (B, D, h, w) of images (B, 3, h * p, w * p)."""

    @abstractmethod
    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        """Embed images (B, 3, h * p, w * p).

        Returns:
            Tokens (B, prefix + h * w, C), the grid size (h, w), and additional inputs of the blocks.
        """

    @staticmethod
    @abstractmethod
    def _step(block: nn.Module, tokens: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """Apply one block to the tokens."""

    def accelerate(
        self, precision: str = "float32", compile: bool = False, checkpointing: bool = False
    ) -> DenseEncoder:
        """Set precision, compilation and activation checkpointing. The dtype of weights and features does not change.

        Args:
            precision: "bfloat16" or "float16" computes matrix products in this precision with ``torch.autocast``, which
                casts the weights in every forward pass (:meth:`freeze` casts them once). "float32" does not change the
                autocast state of the caller.
            compile: compile the blocks with ``torch.compile``, with dynamic shapes.
            checkpointing: use activation checkpointing in training.

        Returns:
            The encoder itself.

        Raises:
            ValueError: the precision is unknown, or differs from the one to which :meth:`freeze` cast the weights.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision (MODEL.SPAR.PRECISION) must be one of {', '.join(PRECISIONS)}; got {precision!r}"
            )
        if self._is_cast and PRECISIONS[precision] is not self._precision:
            raise ValueError(f"precision must be bfloat16 after freeze() cast the weights to it; got {precision!r}")
        self._precision, self._compile, self._checkpointing = PRECISIONS[precision], compile, checkpointing
        return self

    def freeze(self, fixed_shape: bool = False) -> DenseEncoder:
        """Freeze the encoder for inference: disable gradients; weights must not change afterwards.

        With precision "bfloat16", all weights are cast once, and norms and residuals are also computed in bfloat16.
        This halves the memory and avoids casts in the forward pass. "float16" keeps using autocast, because residuals
        may exceed its range.

        Args:
            fixed_shape: whether all inputs have the same shape, so that compiled code can be specialized for it.

        Returns:
            The encoder itself.
        """
        self.requires_grad_(False).eval()
        self._fixed_shape = fixed_shape
        if self._precision is torch.bfloat16:
            cast_parameters(self, torch.bfloat16)
            self._is_cast = True
        return self

    @property
    def has_fixed_shape(self) -> bool:
        """Whether compiled code is specialized for one input shape, which then must not change."""
        return self._compile and self._fixed_shape

    @contextlib.contextmanager
    def frozen_blocks_cast(self) -> Iterator[None]:
        """Context manager in which frozen blocks use bfloat16 copies of their weights, cast once.

        Use it in training, where the weights of frozen blocks do not change. It has no effect in other precisions.
        """
        if self._precision is torch.bfloat16:
            frozen = [block for block in self.blocks if not any(p.requires_grad for p in block.parameters())]
            self._cast_blocks = {block: cast_parameters(copy.deepcopy(block), torch.bfloat16) for block in frozen}
        try:
            yield
        finally:
            self._cast_blocks = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute unnormalized dense features, in the embedding space of the text tower if there is one.

        Args:
            x: (B, 3, H, W) floating-point RGB images of any size, normalized with ``pixel_mean`` and ``pixel_std``.
                They are padded with zeros at the right and bottom to whole patches.

        Returns:
            (B, D, ceil(H / p), ceil(W / p)) with the dtype of ``x``; see :meth:`grid` for ``reference_compat``.

        Raises:
            ValueError: ``x`` has the wrong shape or dtype, or (with ``reference_compat``) is smaller than a patch.
        """
        images = self._prepare(x)
        with self._autocast(images):
            return self._encode(images).to(x.dtype)

    def intermediates(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """Compute intermediate features.

        Args:
            x: images, see :meth:`forward`.
            indices: block indices; negative indices count from the last block.

        Returns:
            Outputs of these blocks as feature maps (B, C, h, w), in the order of ``indices``.

        Raises:
            ValueError: an index is out of range, or ``x`` is invalid, see :meth:`forward`.
        """
        count = len(self.blocks)
        invalid = [i for i in indices if not -count <= i < count]
        if invalid or not indices:
            raise ValueError(f"indices must be block numbers in {-count}..{count - 1}, got {list(indices)}")
        chosen = [i % count for i in indices]
        images = self._prepare(x)
        with self._autocast(images):
            tokens, grid, context = self._embed(images)
            after = self._run_blocks(self.blocks[: max(chosen) + 1], tokens, *context)
            maps = {
                index: to_map(tokens[:, self.prefix_tokens :], grid).to(x.dtype)
                for index, tokens in enumerate(after)
                if index in chosen
            }
        return [maps[index] for index in chosen]

    def _prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Validate the images, pad or crop them to whole patches, and convert them to the dtype of the weights."""
        check_images(x)
        return self.size_policy.apply(x.to(next(self.parameters()).dtype))

    @property
    def size_policy(self) -> Pad:
        """Policy that pads, crops or stretches images to whole patches."""
        return Pad(self.patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the feature map for an image size in pixels."""
        return self.size_policy.grid(height, width)

    def train(self, mode: bool = True) -> DenseEncoder:
        """Set ``training``, which stays False if the encoder is frozen. Submodules always stay in eval mode."""
        super().train(False)
        self.training = mode and any(p.requires_grad for p in self.parameters())
        return self

    def _run_blocks(
        self,
        blocks: Iterable[nn.Module],
        tokens: torch.Tensor,
        *context: torch.Tensor | int,
        step: Callable | None = None,
    ) -> Iterator[torch.Tensor]:
        """Apply ``step`` (default: :meth:`_step`) to the blocks in turn, and yield the tokens after each block."""
        step = step or self._step
        was_cast = False
        for block in blocks:
            trained = torch.is_grad_enabled() and _needs_gradient(block, tokens)
            run = compiled(step, self._use(trained)) if self._compile else step
            if not trained and block in self._cast_blocks:
                tokens, was_cast = self._run_cast(run, self._cast_blocks[block], tokens, context), True
                yield tokens
                continue
            if was_cast:
                tokens, was_cast = tokens.to(next(block.parameters()).dtype), False
            if trained and self._checkpointing:
                tokens = checkpoint(run, block, tokens, *context, use_reentrant=False)
            else:
                with contextlib.nullcontext() if trained else torch.no_grad():
                    tokens = run(block, tokens, *context)
            yield tokens

    @staticmethod
    def _run_cast(run: Callable, block: nn.Module, tokens: torch.Tensor, context: Sequence) -> torch.Tensor:
        dtype = next(block.parameters()).dtype
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            cast = [part.to(dtype) if isinstance(part, torch.Tensor) else part for part in context]
            return run(block, tokens.to(dtype), *cast)

    def _use(self, trained: bool) -> str:
        """Return the use case of compiled code; each use case is compiled separately."""
        if trained:
            return "trained"
        if torch.is_grad_enabled():
            return "frozen"
        return FIXED_SHAPE if self.has_fixed_shape else "inference"

    def _of_grid(self, grid: tuple[int, int], make: Callable[[], Tensors], kind: str = "") -> Tensors:
        """Cache the result of ``make`` for the last few grids (h, w).

        The result must depend on nothing but the grid, and has no gradient. ``kind`` distinguishes results.
        """
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            # Tracing compares two traces, and a cache hit would make the second one different.
            return make()
        return self._grids.get((*grid, self._precision, kind), next(self.parameters()), make)

    def _autocast(self, x: torch.Tensor) -> contextlib.AbstractContextManager:
        if self._precision is None:
            return contextlib.nullcontext()
        # No autocast if freeze() has already cast the weights.
        return torch.autocast(x.device.type, self._precision, enabled=x.dtype != self._precision)


def _needs_gradient(block: nn.Module, tokens: torch.Tensor) -> bool:
    return tokens.requires_grad or any(p.requires_grad for p in block.parameters())


def last(items: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the last tensor without keeping references to the earlier ones."""
    result = None
    for item in items:
        result = item
    if result is None:
        raise ValueError("items must contain at least one tensor, got none")
    return result


def to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reshape tokens (B, h * w, C) to a feature map (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def refuse_parts(encoder: str, reasons: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` if a ViT has unsupported parts.

    Args:
        encoder: name of the encoder class.
        reasons: maps descriptions of unsupported parts to whether the ViT has them.
    """
    unsupported = [reason for reason, present in reasons.items() if present]
    if unsupported:
        raise ValueError(f"{encoder} does not support a ViT with {' and '.join(unsupported)}")


def find_encoder(model: nn.Module) -> DenseEncoder:
    """Return the dense encoder of a model.

    Raises:
        RuntimeError: the model does not have exactly one dense encoder.
    """
    encoders = [module for module in model.modules() if isinstance(module, DenseEncoder)]
    if len(encoders) != 1:
        raise RuntimeError(
            f"the model must have exactly one SPAR encoder, found {len(encoders)}; "
            "set MODEL.BACKBONE.NAME to SPARViT or SPARPyramid"
        )
    return encoders[0]


def check_images(x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating-point tensor (B, 3, H, W) with B, H, W >= 1."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point RGB tensor (B, 3, H, W), got {got}")
    if 0 in x.shape:
        raise ValueError(f"images must have at least one pixel, got {tuple(x.shape)}")
