"""What Detectron2 sees: backbones and the open-vocabulary segmentor; and the way from features to labels.

Only the last is named here, it needs no Detectron2. The rest registers itself when Detectron2's registries are
imported, see :mod:`spar_d2.registration`.
"""

import contextlib

# That registers the modules of this room, which must not happen half-way through one of them.
with contextlib.suppress(ImportError):
    import detectron2.modeling  # noqa: F401

from spar_d2.modeling.scores import class_probabilities, segment_features

__all__ = ["class_probabilities", "segment_features"]
