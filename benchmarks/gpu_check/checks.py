"""Two kinds of checks and their tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.tables import Table

# Maximum relative error of a tensor: rounding errors of a dozen blocks, with a margin for another summation order.
LIMITS = {"float32": 1e-4, "TF32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


def _result(check: Comparison | Fact) -> str:
    return "passed" if check.passed else "**FAILED**"


@dataclass(frozen=True)
class Comparison:
    """Comparison of a tensor with the expected one, up to rounding.

    Attributes:
        subject: computed quantity.
        compared: the two ways of computing it.
        largest: largest absolute difference.
        relative: norm of the difference / norm of the expected tensor.
        cosine: lowest cosine similarity of corresponding vectors.
        limit: limit of ``relative``.
    """

    subject: str
    compared: str
    largest: float
    relative: float
    cosine: float
    limit: float

    @property
    def passed(self) -> bool:
        # NaN fails the check.
        return self.relative <= self.limit


@dataclass(frozen=True)
class Fact:
    """A yes/no check.

    Attributes:
        subject: checked object.
        question: expected state.
        found: actual state.
        passed: whether they agree.
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
        "relative error: norm of the difference / norm of the expected tensor; limit: its maximum.",
        "lowest cosine: minimum over the feature vectors of all patches; gradients are compared as a single vector.",
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
    """Compare two tensors of the same shape, on any devices.

    Args:
        subject, compared, limit: see :class:`Comparison`.
        found, expected: tensors of any floating-point dtype.
        dim: dimension of the vectors whose cosine similarity is computed.
    """
    # float64, because sums of many squares are not precise enough in float32.
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    difference = found - expected
    relative = (difference.norm() / expected.norm()).item()
    cosines = F.cosine_similarity(found, expected, dim=dim)
    # Positions that no window covers.
    uncovered = (found == 0).all(dim) & (expected == 0).all(dim)
    cosine = cosines.masked_fill(uncovered, 1.0).min().item()
    return Comparison(subject, compared, difference.abs().max().item(), relative, cosine, limit)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 for float32 matrix products and convolutions on a GPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
