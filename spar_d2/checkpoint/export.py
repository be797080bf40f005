"""The student as a weight file of its library."""

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
    """Write a student, with the text tower it belongs to where there is one, as a weight file of its library.

    ``open_clip.create_model(name, pretrained=path)``, or for a model of timm's
    ``timm.create_model(name, checkpoint_path=path)``, loads the file, as do ``MODEL.SPAR.PRETRAINED`` and
    ``MODEL.WEIGHTS`` here. Where the student is from, and what it expects, is in the file's metadata.

    Args:
        encoder: the student.
        spec: what it was built from.
        path: ``*.safetensors`` to write.
    """
    family = find_family(spec.name)
    origin = encoder.origin or origin_of(settled(spec, family))
    tensors: dict[str, torch.Tensor] = {}
    try:
        if family.has_text:
            tensors.update(build_text(spec).model.state_dict())
    except (RuntimeError, ValueError, OSError) as error:  # hours of training must not be lost over the text
        logger.warning("The student is written without a text tower: %s", error)
    tensors.update(encoder.state_dict())
    write_safetensors(as_format(tensors, family, family.file_format), path, origin)
    logger.info("Wrote the student to %s", path)
