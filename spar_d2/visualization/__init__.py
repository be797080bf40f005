"""Pictures: features as colours, predictions side by side."""

from spar_d2.visualization.panels import draw_panels
from spar_d2.visualization.pca import shared_pca_colours

__all__ = ["draw_panels", "shared_pca_colours"]
