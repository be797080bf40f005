"""Results of segmentation: labels, regions, and the formats of other programs."""

from spar_d2.results.segmentation import Segmentation

__all__ = ["Segmentation"]
