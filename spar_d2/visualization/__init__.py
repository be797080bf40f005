"""Pictures: features as colours, predictions side by side, and, with Detectron2, over their photos (``overlay.py``)."""

from spar_d2.visualization.palette import class_colours
from spar_d2.visualization.panels import draw_panels
from spar_d2.visualization.pca import fit_pca_colours, shared_pca_colours

__all__ = ["class_colours", "draw_panels", "fit_pca_colours", "shared_pca_colours"]
