"""What Detectron2 sees: backbones and the open-vocabulary segmentor; and the way from features to labels.

Only the last is imported here, it needs no Detectron2. The rest registers itself when Detectron2's registries are
imported, see :mod:`spar_d2.registration`.
"""

from spar_d2.modeling.scores import class_probabilities, segment_features

__all__ = ["class_probabilities", "segment_features"]
