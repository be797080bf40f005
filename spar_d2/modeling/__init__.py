"""Detectron2 backbones, segmentors and heads, and post-processing of dense features.

Only post-processing works without Detectron2. The other modules are registered when Detectron2's registries are
imported, see :mod:`spar_d2.registration`.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING

# This import registers the modules of this package. It must not happen while one of them is being imported.
with contextlib.suppress(ImportError):
    import detectron2.modeling  # noqa: F401

from spar_d2.modeling.postprocessing import class_probabilities, segment_features

if TYPE_CHECKING:
    from spar_d2.modeling.backbone import SPARViT
    from spar_d2.modeling.linear_probe import LinearProbe
    from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
    from spar_d2.modeling.pyramid import SPARPyramid

_WITH_DETECTRON2 = {
    "LinearProbe": "linear_probe",
    "OpenVocabularySegmentor": "open_vocabulary",
    "SPARPyramid": "pyramid",
    "SPARViT": "backbone",
}
__all__ = [
    "LinearProbe",
    "OpenVocabularySegmentor",
    "SPARPyramid",
    "SPARViT",
    "class_probabilities",
    "segment_features",
]


def __getattr__(name: str):
    if name in _WITH_DETECTRON2:
        return getattr(importlib.import_module(f"spar_d2.modeling.{_WITH_DETECTRON2[name]}"), name)
    raise AttributeError(f"module 'spar_d2.modeling' has no attribute '{name}'")
