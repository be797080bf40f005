"""What every dense image encoder offers, whatever library its weights come from."""

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
    """A ViT that gives one feature per patch, for images of any size.

    The library's modules always stay in eval mode: dropout, stochastic depth or randomly shifted positions would only
    add noise to what is a regression.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: channels D of the dense features.
        width: channels C of the intermediate features.
        native_size: side of the square images that the model was pre-trained on, in pixels, in whole patches.
        pixel_mean, pixel_std: three floats each, RGB, for pixels in 0..1.
        logit_scale: factor on the cosines with the words that the method uses.
        reference_compat: treat sizes as the authors' code does; what that means differs between families.
        parts: regular expressions over the names of parameters, by the words for what is trained; those of "qkv" and
            "mlp" over the names within a block.
        unused: regular expression over the names of parameters of the library's model that dense features do not
            pass through; they are never trained.
        prefix_tokens: tokens before those of the patches.
        origin: where its weights are from, as it travels with them in files; None where that is not known.
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
        # Positions of the last few grids; see :meth:`_of_grid`.
        self._grids = RecentGrids()
        # Copies of frozen blocks in `_precision`, by their block; see :meth:`frozen_blocks_cast`.
        self._cast_blocks: dict[nn.Module, nn.Module] = {}

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, first to last."""

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, h * p, w * p) to (B, D, h, w)."""

    @abstractmethod
    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        """(B, 3, h * p, w * p) to tokens (B, prefix + h * w, C), (h, w), and what the blocks need besides tokens."""

    @staticmethod
    @abstractmethod
    def _step(block: nn.Module, tokens: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """The tokens after one of the blocks."""

    def accelerate(
        self, precision: str = "float32", compile: bool = False, checkpointing: bool = False
    ) -> DenseEncoder:
        """Choose how the encoder computes; weights and features stay in the type that they have.

        Args:
            precision: "bfloat16" or "float16" runs matrix products in it (``torch.autocast``, which casts weights in
                every pass; :meth:`freeze` casts them once); "float32" leaves that to the surroundings.
            compile: compile the blocks with ``torch.compile``, once for all sizes.
            checkpointing: in training, keep only the input of every block and compute the rest again for the gradient.

        Returns:
            The encoder itself.

        Raises:
            ValueError: another precision, or one that weights which :meth:`freeze` cast can no longer have.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision (MODEL.SPAR.PRECISION) must be one of {', '.join(PRECISIONS)}; got {precision!r}"
            )
        if self._is_cast and PRECISIONS[precision] is not self._precision:
            raise ValueError(f"precision must stay bfloat16, which freeze() cast the weights to; got {precision!r}")
        self._precision, self._compile, self._checkpointing = PRECISIONS[precision], compile, checkpointing
        return self

    def freeze(self, fixed_shape: bool = False) -> DenseEncoder:
        """Make this an encoder that is only used: it has no gradients, and no weight may change from now on.

        With the precision "bfloat16" the weights themselves are cast to it, norms and residuals included: half the
        memory, and nothing is cast in a pass. "float16" stays with autocast, as residuals may be too large for it.

        Args:
            fixed_shape: all inputs will have one shape, so that compiled code may be for that shape alone.

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
        """Whether compiled code is for inputs of one shape, which then must not change."""
        return self._compile and self._fixed_shape

    @contextlib.contextmanager
    def frozen_blocks_cast(self) -> Iterator[None]:
        """Within it, blocks that are not trained compute from bfloat16 copies of their weights, cast once.

        For a training in which the weights of frozen blocks do not change. It does nothing in another precision.
        """
        if self._precision is torch.bfloat16:
            frozen = [block for block in self.blocks if not any(p.requires_grad for p in block.parameters())]
            self._cast_blocks = {block: cast_parameters(copy.deepcopy(block), torch.bfloat16) for block in frozen}
        try:
            yield
        finally:
            self._cast_blocks = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dense features of the last layer, in the space of the text vectors where there are some, not normalized.

        Args:
            x: (B, 3, H, W) of any floating-point type, RGB, normalized with ``pixel_mean`` and ``pixel_std``; any
                H, W >= 1. The right and bottom are padded with zeros to whole patches.

        Returns:
            (B, D, ceil(H / p), ceil(W / p)) in the type of ``x``; see :meth:`grid` for ``reference_compat``.

        Raises:
            ValueError: ``x`` has another shape or type, or (``reference_compat`` only) is smaller than a patch.
        """
        images = self._prepare(x)
        with self._autocast(images):
            return self._encode(images).to(x.dtype)

    def intermediates(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """Output of chosen blocks as maps (B, C, h, w), in the order of ``indices``; negative ones count from the end.

        Raises:
            ValueError: an index that is no block's, or as for :meth:`forward`.
        """
        count = len(self.blocks)
        wrong = [i for i in indices if not -count <= i < count]
        if wrong or not indices:
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
        """The images checked, in whole patches, and in the type of the weights."""
        check_images(x)
        return self.size_policy.apply(x.to(next(self.parameters()).dtype))

    @property
    def size_policy(self) -> Pad:
        """How images of any size become images of whole patches."""
        return Pad(self.patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Size of the feature map for an image of the given size in pixels."""
        return self.size_policy.grid(height, width)

    def train(self, mode: bool = True) -> DenseEncoder:
        """Only says whether the encoder is in training, which a frozen one never is; its modules stay in eval mode."""
        super().train(False)
        self.training = mode and any(p.requires_grad for p in self.parameters())
        return self

    def _run_blocks(
        self, blocks: Iterable[nn.Module], tokens: torch.Tensor, *context: torch.Tensor, step: Callable | None = None
    ) -> Iterator[torch.Tensor]:
        """Apply ``step``, by default :meth:`_step`, with block after block and yield the tokens after each."""
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
            return run(block, tokens.to(dtype), *(part.to(dtype) for part in context))

    def _use(self, trained: bool) -> str:
        """What compiled code is for; each use has code of its own."""
        if trained:
            return "trained"
        if torch.is_grad_enabled():
            return "frozen"
        return FIXED_SHAPE if self.has_fixed_shape else "inference"

    def _of_grid(self, grid: tuple[int, int], make: Callable[[], Tensors]) -> Tensors:
        """What ``make`` gives for a grid (h, w), which depends on nothing else and has no gradient; kept for a few."""
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            # Tracing compares two traces, and the second would find it kept.
            return make()
        return self._grids.get((*grid, self._precision), next(self.parameters()), make)

    def _autocast(self, x: torch.Tensor) -> contextlib.AbstractContextManager:
        if self._precision is None:
            return contextlib.nullcontext()
        # Weights that were cast once are not to be cast to anything else.
        return torch.autocast(x.device.type, self._precision, enabled=x.dtype != self._precision)


def _needs_gradient(block: nn.Module, tokens: torch.Tensor) -> bool:
    return tokens.requires_grad or any(p.requires_grad for p in block.parameters())


def last(items: Iterator[torch.Tensor]) -> torch.Tensor:
    """The last of the tensors, keeping none of the earlier ones."""
    result = None
    for item in items:
        result = item
    if result is None:
        raise ValueError("items must hold at least one tensor, got none")
    return result


def to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h * w, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def refuse_parts(encoder: str, reasons: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` where a tower has parts (whether it has each) that an encoder class cannot take."""
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ValueError(f"{encoder} cannot take dense features from a ViT with {' and '.join(found)}")


def find_encoder(model: nn.Module) -> DenseEncoder:
    """The one dense encoder inside a model.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, DenseEncoder)]
    if len(found) != 1:
        raise RuntimeError(
            f"a model with one SPAR encoder is needed, found {len(found)}; "
            "set MODEL.BACKBONE.NAME to SPARViT or SPARPyramid"
        )
    return found[0]


def check_images(x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is (B, 3, H, W) floating point with B, H, W >= 1."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point RGB tensor (B, 3, H, W), got {got}")
    if 0 in x.shape:
        raise ValueError(f"images must have at least one pixel, got {tuple(x.shape)}")
