"""SPAR (Single-Pass Any-Resolution ViT) for Detectron2.

Importing the package registers its backbones, meta-architectures, data sets and config keys (``MODEL.SPAR.*`` and
``SPAR.*``) with Detectron2. Registration is deferred until the corresponding module of Detectron2 is imported, so
``import spar_d2`` itself is fast.
"""

from typing import TYPE_CHECKING

from spar_d2.deprecated import support_old_names
from spar_d2.registration import register_all

if TYPE_CHECKING:
    from spar_d2.predict import Predictor, segment

__version__ = "0.1.0"
__all__ = ["Predictor", "segment"]

register_all()
support_old_names()


def __getattr__(name: str):
    # These are imported lazily because they import open_clip, which is slow.
    if name in __all__:
        from spar_d2 import predict

        return getattr(predict, name)
    raise AttributeError(f"module 'spar_d2' has no attribute '{name}'")
