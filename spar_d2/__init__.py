"""SPAR (Single-Pass Any-Resolution ViT) for Detectron2.

Importing the package makes Detectron2 know its backbones, its meta-architecture, its data sets and its config keys
``MODEL.SPAR.*`` and ``SPAR.*``. Registration waits until the program imports the part of Detectron2 concerned, so that
``import spar_d2`` itself costs next to nothing.
"""

from typing import TYPE_CHECKING

from spar_d2.deprecated import support_old_names
from spar_d2.registration import register_all

if TYPE_CHECKING:
    from spar_d2.predict import segment

__version__ = "0.1.0"
__all__ = ["segment"]

register_all()
support_old_names()


def __getattr__(name: str):
    # `segment` pulls in the encoders and open_clip, which a mere registration must not.
    if name == "segment":
        from spar_d2.predict import segment

        return segment
    raise AttributeError(f"module 'spar_d2' has no attribute '{name}'")
