"""Visualization of features and predictions. Only ``overlay.py`` needs Detectron2."""

from spar_d2.visualization.palette import class_colors
from spar_d2.visualization.panels import draw_panels
from spar_d2.visualization.pca import fit_pca_colors, shared_pca_colors

__all__ = ["class_colors", "draw_panels", "fit_pca_colors", "shared_pca_colors"]
