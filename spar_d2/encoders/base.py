"""Base class of dense image encoders."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from spar_d2.encoders.block_calls import BlockCall, Context, apply_blocks, bind_blocks
from spar_d2.encoders.compilation import FIXED_SHAPE, compiled
from spar_d2.encoders.grids import RecentGrids, to_map
from spar_d2.encoders.image_sizes import Pad, check_images
from spar_d2.encoders.origin import Origin
from spar_d2.encoders.precision import PRECISIONS, cast_parameters
from spar_d2.encoders.symbolic import is_symbolic

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
        frozen_outputs: cache of the tokens after the frozen blocks at the start, used in training; None for no cache.
            It is called with the images (B, 3, H, W) and a function that computes the tokens (B, N, C).
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
    frozen_outputs: Callable[[torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor] | None = None

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
    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        """Embed images (B, 3, h * p, w * p).

        Returns:
            Tokens (B, prefix + h * w, C), the grid size (h, w), and additional inputs of the blocks.
        """

    @staticmethod
    @abstractmethod
    def _step(block: nn.Module, tokens: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """Apply one block to the tokens."""

    def _last_call(self, context: Context) -> tuple[Callable, Context]:
        """Return a function that applies the last block for dense features, and its additional inputs.

        Args:
            context: additional inputs of :meth:`_step`, which is the default.
        """
        return self._step, context

    @abstractmethod
    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        """Compute features (B, h * w, D) from the output of the last block, whose last ``patches`` tokens are used."""

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

    def intermediates(self, x: torch.Tensor, indices: Sequence[int], dense: bool = False) -> list[torch.Tensor]:
        """Compute intermediate features.

        Args:
            x: images, see :meth:`forward`.
            indices: block indices; negative indices count from the last block, which is not available with ``dense``.
            dense: append the dense features of :meth:`forward`.

        Returns:
            Outputs of these blocks as feature maps (B, C, h, w), in the order of ``indices``.

        Raises:
            ValueError: an index is out of range, or ``x`` is invalid.
        """
        count = len(self.blocks)
        chosen = [i % count for i in indices if -count <= i < count]
        if len(chosen) < len(indices) or not (chosen or dense) or (dense and count - 1 in chosen):
            but = " but the last one" if dense else ""
            raise ValueError(f"indices must be block numbers in {-count}..{count - 1}{but}, got {list(indices)}")
        images, steps = self._prepare(x), count - 1 if dense else max(chosen) + 1
        with self._autocast(images):
            tokens, grid, context = self._embed(images)
            kept, last = {}, [self._last_call(context)] if dense else []
            for index, call in enumerate(self._bind([(self._step, context)] * steps + last, tokens)):
                tokens = call(tokens)
                if index in chosen:
                    kept[index] = tokens[:, self.prefix_tokens :]
            parts = [kept[index] for index in chosen] + ([self._read(tokens, grid[0] * grid[1])] if dense else [])
            return [to_map(part, grid).to(x.dtype) for part in parts]

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Compute dense features (B, D, h, w) of images (B, 3, h * p, w * p)."""
        tokens, grid, context = self._embed(x)
        plain = [(self._step, context)] * (len(self.blocks) - 1)
        calls = self._bind([*plain, self._last_call(context)], tokens)
        if self.frozen_outputs is not None and torch.is_grad_enabled():
            first = next((index for index, call in enumerate(calls) if call.trained), len(calls))
            frozen, calls = calls[:first], calls[first:]
            if frozen:
                embedded = tokens
                tokens = self.frozen_outputs(x, lambda: apply_blocks(frozen, embedded))
        return to_map(self._read(apply_blocks(calls, tokens), grid[0] * grid[1]), grid)

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

    def _bind(self, steps: Sequence[tuple[Callable, Context]], tokens: torch.Tensor) -> list[BlockCall]:
        """Bind the first blocks to the functions that apply them and to additional inputs."""
        wrap = self._wrap if self._compile else None
        return bind_blocks(self.blocks, steps, tokens.requires_grad, wrap, self._cast_blocks, self._checkpointing)

    def _wrap(self, step: Callable, trained: bool) -> Callable:
        return compiled(step, self._use(trained))

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
        # Tracing compares two traces, and a cache hit would make the second one different.
        is_traced = is_symbolic(grid) or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        return make() if is_traced else self._grids.get((*grid, self._precision, kind), next(self.parameters()), make)

    def _autocast(self, x: torch.Tensor) -> contextlib.AbstractContextManager:
        if self._precision is None:
            return contextlib.nullcontext()
        # No autocast if freeze() has already cast the weights.
        return torch.autocast(x.device.type, self._precision, enabled=x.dtype != self._precision)


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
