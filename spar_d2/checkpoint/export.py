"""Export of a student to a weight file of its library."""

from __future__ import annotations

import logging
import os

import torch

from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.convert import as_format
from spar_d2.encoders.registry import build_text, find_family
from spar_d2.encoders.settling import origin_of, settled
from spar_d2.encoders.weights import write_safetensors

logger = logging.getLogger(__name__)


def export_student(encoder: DenseEncoder, spec: EncoderSpec, path: str | os.PathLike) -> None:
    """Write a student, with its text tower if there is one, to a weight file of its library.

    The file can be loaded with ``open_clip.create_model(name, pretrained=path)`` or, for timm models,
    ``timm.create_model(name, checkpoint_path=path)``, and used as ``MODEL.SPAR.PRETRAINED`` and ``MODEL.WEIGHTS``. Its
    metadata contains the origin of the student and its pixel statistics and activation.

    Args:
        encoder: student.
        spec: specification from which the student was built.
        path: ``*.safetensors`` file to write.
    """
    family = find_family(spec.name)
    origin = encoder.origin or origin_of(settled(spec, family))
    tensors: dict[str, torch.Tensor] = {}
    try:
        if family.has_text:
            tensors.update(build_text(spec).model.state_dict())
    except (RuntimeError, ValueError, OSError) as error:  # a missing text tower must not lose hours of training
        logger.warning("Writing the student without a text tower: %s", error)
    tensors.update(encoder.state_dict())
    write_safetensors(as_format(tensors, family, family.file_format), path, origin)
    logger.info("Wrote the student to %s", path)
