"""Two kinds of checks, and their tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.tables import Table

# Largest error of a tensor beside its length: rounding through a dozen blocks, with room for another order of sums.
LIMITS = {"float32": 1e-4, "TF32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


def _result(check: Comparison | Fact) -> str:
    return "passed" if check.passed else "**FAILED**"


@dataclass(frozen=True)
class Comparison:
    """A tensor beside the one that it should be, up to rounding.

    Attributes:
        subject: what was computed.
        compared: how, and with what.
        largest: of the absolute differences.
        relative: length of the difference / length of the expected tensor.
        cosine: the lowest of corresponding vectors.
        limit: of ``relative``.
    """

    subject: str
    compared: str
    largest: float
    relative: float
    cosine: float
    limit: float

    @property
    def passed(self) -> bool:
        # A comparison with NaN is false.
        return self.relative <= self.limit


@dataclass(frozen=True)
class Fact:
    """Something that is so or not.

    Attributes:
        subject: what was looked at.
        question: what should be.
        found: what is.
    """

    subject: str
    question: str
    found: str
    passed: bool


COMPARISONS = Table(
    columns={
        "what": lambda c: c.subject,
        "compared": lambda c: c.compared,
        "largest difference": lambda c: f"{c.largest:.1e}",
        "relative error": lambda c: f"{c.relative:.1e}",
        "lowest cosine": lambda c: f"{c.cosine:.6f}",
        "limit": lambda c: f"{c.limit:.0e}",
        "result": _result,
    },
    always=(
        "relative error: length of the difference / length of what is compared with, of a whole tensor; limit: of it.",
        "lowest cosine: of the feature vectors of all cells; of gradients, of all of them as one vector.",
    ),
    sometimes={},
)
FACTS = Table(
    columns={
        "what": lambda f: f.subject,
        "should be": lambda f: f.question,
        "found": lambda f: f.found,
        "result": _result,
    },
    always=(),
    sometimes={},
)


def compare(
    subject: str, compared: str, found: torch.Tensor, expected: torch.Tensor, limit: float, dim: int = 1
) -> Comparison:
    """Compare two tensors of one shape, on any devices.

    Args:
        subject, compared, limit: see :class:`Comparison`.
        found, expected: of any floating-point types.
        dim: along which vectors lie whose cosines are taken.
    """
    # Sums of many squares are exact enough in float64 only.
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    difference = found - expected
    relative = (difference.norm() / expected.norm()).item()
    cosines = F.cosine_similarity(found, expected, dim=dim)
    # Cells that no window saw.
    nothing = (found == 0).all(dim) & (expected == 0).all(dim)
    cosine = cosines.masked_fill(nothing, 1.0).min().item()
    return Comparison(subject, compared, difference.abs().max().item(), relative, cosine, limit)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within it, a GPU computes float32 matrix products and convolutions in float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
