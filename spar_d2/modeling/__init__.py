"""What Detectron2 sees: backbones, segmentors and a linear probe; and the way from features to labels.

Only the last needs no Detectron2. The rest registers itself when Detectron2's registries are imported, see
:mod:`spar_d2.registration`.
"""

import contextlib
import importlib

# That registers the modules of this room, which must not happen half-way through one of them.
with contextlib.suppress(ImportError):
    import detectron2.modeling  # noqa: F401

from spar_d2.modeling.postprocessing import class_probabilities, segment_features

_WITH_DETECTRON2 = {
    "LinearProbe": "linear_probe",
    "OpenVocabularySegmentor": "open_vocab",
    "SPARPyramid": "pyramid",
    "SPARViT": "backbone",
}
__all__ = [*_WITH_DETECTRON2, "class_probabilities", "segment_features"]


def __getattr__(name: str):
    if name in _WITH_DETECTRON2:
        return getattr(importlib.import_module(f"spar_d2.modeling.{_WITH_DETECTRON2[name]}"), name)
    raise AttributeError(f"module 'spar_d2.modeling' has no attribute '{name}'")
