"""Refinement of class scores in inference: LPOSS, AnyUp and LPOSS+, alone or in a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.precision import full_float32
from spar_d2.modeling.banded_upsampling import Resampling, Upsampling
from spar_d2.modeling.example_embeddings import ClassVectors
from spar_d2.modeling.pixel_scores import AttendedScores, BilinearScores, PixelScores, propagated_band
from spar_d2.modeling.postprocessing import cosine_scores
from spar_d2.refine import AnyUp, PatchGraph, PixelGraph, imagenet_normalized
from spar_d2.refine.anyup import KEPT_BYTES
from spar_d2.utils.transfer import send

# In the only order that makes sense: scores of patches, their upsampling, scores of pixels.
STEPS = ("lposs", "anyup", "lposs+")
# Memory that AnyUp keeps beside a graph of pixels.
_KEPT_WITH_GRAPH = 128 << 20


def parse_refine(refine: str) -> tuple[str, ...]:
    """Split a value of ``MODEL.SPAR.REFINE`` into its steps.

    Raises:
        ValueError: a step is unknown or repeated, or steps are not in the order of ``STEPS``.
    """
    words = [word.strip() for word in refine.split(",")] if isinstance(refine, str) else [str(refine)]
    steps = tuple(words) if words != [""] else ()
    if steps != tuple(step for step in STEPS if step in steps):
        raise ValueError(
            f'refine (MODEL.SPAR.REFINE) must be "" or a comma-separated list of {", ".join(STEPS)}, each at most once '
            f"and in this order; got {refine!r}"
        )
    return steps


@dataclass(frozen=True)
class EncodedImage:
    """An image and its dense features.

    Attributes:
        encoder: encoder of the features.
        read: function that returns the input (1, 3, H, W) of the encoder. It is not called unless pixels are needed.
        features: (D, h, w) dense features.
    """

    encoder: DenseEncoder
    read: Callable[[], torch.Tensor]
    features: torch.Tensor

    @functools.cached_property
    def x(self) -> torch.Tensor:
        """Input (1, 3, H, W) of the encoder."""
        return self.read()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.x.shape[2], self.x.shape[3]

    def rgb(self, padded: bool = False) -> torch.Tensor:
        """Return the image (1, 3, H, W) as RGB in 0..1, or with the padding of the encoder, (1, 3, h * p, w * p)."""
        x = self.encoder.size_policy.apply(self.x) if padded else self.x
        mean, std = _statistics(self.encoder, x.device)
        return (x * std + mean).clamp_(0, 1)


class Refinement:
    """Refines the class scores of images.

    Models of this class are moved to the device of the features when they are used. They are no modules, so that they
    are no part of a segmentor's weights.

    Args:
        steps: result of :func:`parse_refine`.
        neighbours: number of neighbors of a patch in the graph of LPOSS.
        anyup: upsampling model; needed for the step "anyup".
        guide: encoder whose features tell LPOSS which patches are alike. Default: the features of the image.

    Raises:
        ValueError: ``neighbours`` is less than 1, or ``anyup`` is missing.
    """

    def __init__(
        self,
        steps: Sequence[str],
        neighbours: int = 400,
        anyup: AnyUp | None = None,
        guide: DenseEncoder | None = None,
    ) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours (MODEL.SPAR.REFINE_NEIGHBOURS) must be at least 1, got {neighbours}")
        if "anyup" in steps and anyup is None:
            raise ValueError(
                "anyup (MODEL.SPAR.ANYUP) must be the weights of AnyUp (anyup_multi_backbone.pth of wimmerth/anyup) if "
                f'MODEL.SPAR.REFINE is "{",".join(steps)}", got none'
            )
        self.steps, self.neighbours, self.anyup, self.guide = tuple(steps), neighbours, anyup, guide

    @property
    def at_pixels(self) -> bool:
        """Whether scores are refined at pixels, by :meth:`pixel_scores`, and not only at patches."""
        return self.steps not in ((), ("lposs",))

    @torch.no_grad()
    def patch_scores(self, image: EncodedImage, classes: ClassVectors, normalized: bool) -> torch.Tensor:
        """Compute cosine scores (h, w, Q) float32 of patches, propagated if "lposs" is a step.

        Propagation multiplies the scores of a patch by a factor that is common to all classes.

        Args:
            image: encoded image.
            classes: class vectors.
            normalized: divide propagated scores by this factor, for probabilities.
        """
        scores = cosine_scores(classes.centered(image.features), classes.vectors)
        if "lposs" not in self.steps:
            return scores
        # (h, w, Q) -> (N, Q), and a column of ones
        columns = scores.flatten(0, 1)
        if normalized:
            columns = F.pad(columns, (0, 1), value=1.0)
        graph = PatchGraph(self._guide(image), image.encoder.patch_size, self.neighbours, check=False)
        spread = graph.propagate(columns, check=False)
        if normalized:
            spread = spread[:, :-1] / spread[:, -1:]
        return spread.contiguous().view(scores.shape)

    @torch.no_grad()
    def pixel_scores(
        self, image: EncodedImage, classes: ClassVectors, size: tuple[int, int], normalized: bool
    ) -> PixelScores:
        """Prepare the scores of all pixels.

        Args:
            image: encoded image; its patches cover it and padding at the right and bottom.
            classes: class vectors.
            size: (H, W) of the result, which shows the whole image.
            normalized: whether scores must be comparable among pixels, for probabilities.

        Raises:
            ValueError: the grid is too small for AnyUp.
        """
        with full_float32(image.features.device):
            if "anyup" in self.steps:
                source = self._attended(image, classes, normalized)
            else:
                scores = self.patch_scores(image, classes, normalized)
                source = BilinearScores(scores, image.encoder.patch_size, image.size)
            if "lposs+" in self.steps:
                graph = PixelGraph(image.rgb()[0], check=False)
                bands = functools.partial(propagated_band, source, graph, size, normalized)
            else:
                assert isinstance(source, AttendedScores)
                bands = functools.partial(source.bands, size)
        return PixelScores(bands, size, classes.query_class)

    def _attended(self, image: EncodedImage, classes: ClassVectors, normalized: bool) -> AttendedScores:
        features, patch = image.features.float(), image.encoder.patch_size
        grid = (features.shape[1], features.shape[2])
        if min(grid) < 2:
            raise ValueError(
                f"refine (MODEL.SPAR.REFINE): anyup needs at least 2x2 patches, and an image of {image.size[0]}x"
                f"{image.size[1]} pixels has {grid[0]}x{grid[1]}: enlarge the image, or leave out anyup"
            )
        assert self.anyup is not None
        anyup = self.anyup.to(features.device)
        # Guidance must show the area of the features, which includes the padding.
        guidance = imagenet_normalized(image.rgb(padded=True))
        kept = _KEPT_WITH_GRAPH if "lposs+" in self.steps else KEPT_BYTES
        attention = anyup.prepare(guidance, features[None], (grid[0] * patch, grid[1] * patch), kept)
        if "lposs" in self.steps:
            values = self.patch_scores(image, classes, normalized).permute(2, 0, 1)
            return AttendedScores(attention, values, image.size)
        values = classes.centered(features)
        if normalized or "lposs+" in self.steps:
            return AttendedScores(attention, values, image.size, classes.vectors)
        # The length of an upsampled feature is common to all classes, so products have the same best class.
        return AttendedScores(attention, torch.einsum("qd,dhw->qhw", classes.vectors, values), image.size)

    def _guide(self, image: EncodedImage) -> torch.Tensor:
        """Return features (D, h, w) that tell which patches are alike."""
        if self.guide is None:
            return image.features
        guide = self.guide.to(image.features.device)
        mean, std = _statistics(guide, image.features.device)
        features = guide((image.rgb() - mean) / std)[0].float().permute(1, 2, 0)
        # The two grids may cover more than the image, each by a part of its patch.
        ratio = guide.patch_size / image.encoder.patch_size
        exact = not image.encoder.reference_compat
        down, across = (
            Resampling(cells, cells * ratio if exact else wanted, wanted, False, features.device)
            for cells, wanted in zip(features.shape[:2], image.features.shape[1:])
        )
        block = Upsampling(features, down, across).block(slice(0, down.wanted), slice(0, across.wanted))
        return block.permute(2, 0, 1)


def _statistics(encoder: DenseEncoder, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield pixel mean and standard deviation (3, 1, 1) of an encoder."""
    for values in (encoder.pixel_mean, encoder.pixel_std):
        yield send(torch.tensor(values).view(3, 1, 1), device)
