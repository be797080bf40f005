"""Export of an encoder to a model folder: weights, configs and a model card."""

from __future__ import annotations

import os
from pathlib import Path

import timm

from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.convert import as_format
from spar_d2.encoders.folders import CONFIG, ENTRY, OPEN_CLIP_CONFIG, WEIGHTS, model_folder
from spar_d2.encoders.model_configs import known_config
from spar_d2.encoders.registry import EncoderFamily, build, build_text, find_family
from spar_d2.encoders.weights import write_safetensors
from spar_d2.export.inputs import describe
from spar_d2.export.model_card import CARD, model_card
from spar_d2.utils.io import check_not_read, write_json, write_text


def export_folder(spec: EncoderSpec, folder: str | os.PathLike, license: str = "") -> list[Path]:
    """Write a model folder, which is used like a model name: ``build_encoder(folder)``, ``MODEL.SPAR.ENCODER``.

    It has ``model.safetensors`` (with the text tower if there is one), ``config.json``, a model card, and for models of
    open_clip ``open_clip_config.json``. ``open_clip.create_model("local-dir:FOLDER")`` and
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` read folders of their models.

    Args:
        spec: specification of the encoder.
        folder: output folder: new, empty, or a model folder, whose files are replaced.
        license: license of the weights for the model card; "" for that of the pretrained tag, where it is known.

    Returns:
        The written files.

    Raises:
        ValueError: the encoder needs code of a repository (DINOv3.txt), or an argument is invalid.
        FileNotFoundError, RuntimeError: see :func:`spar_d2.encoders.build_encoder`.
    """
    folder, family = Path(folder), find_family(spec.name)
    if family.file_format == "dinov3":
        raise ValueError(f"{spec.name} needs the code of the dinov3 repository, which a model folder does not have")
    if not spec.pretrained:
        raise ValueError("pretrained must be a weight file or tag: random weights are not worth a folder")
    _check_folder(folder)
    check_not_read(folder / WEIGHTS, dict.fromkeys(["pretrained"], spec.pretrained))
    encoder = build(spec)
    tensors = dict(build_text(spec).model.state_dict()) if family.has_text else {}
    tensors |= encoder.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    # The config is last: a folder without it is not used.
    write_safetensors(as_format(tensors, family, family.file_format), folder / WEIGHTS, encoder.origin)
    write_text(model_card(encoder, spec, license or _license(spec, encoder)), folder / CARD)
    configs = {OPEN_CLIP_CONFIG: _open_clip_config(spec, encoder)} if family.file_format == "open_clip" else {}
    configs[CONFIG] = _config(spec, encoder, family)
    for name, content in configs.items():
        write_json(content, folder / name, indent=1)
    return [folder / name for name in (WEIGHTS, CARD, *configs)]


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or model_folder(str(folder)))):
        raise ValueError(f"--output must be a new or empty folder, or a model folder; got {folder}")


def _config(spec: EncoderSpec, encoder: DenseEncoder, family: EncoderFamily) -> dict:
    name = OPEN_CLIP_CONFIG if family.file_format == "open_clip" else spec.name
    settings = {ENTRY: {"encoder": name, "readout": spec.readout, **describe(encoder)}}
    if family.file_format == "open_clip":
        return settings
    side = encoder.native_size
    statistics = {"input_size": [3, side, side], "mean": list(encoder.pixel_mean), "std": list(encoder.pixel_std)}
    # timm builds models of a fixed size for the size of their pre-training, which only its own configs have.
    architecture = {"architecture": spec.name, "num_classes": 0, "model_args": {"img_size": side}}
    known = timm.get_pretrained_cfg(spec.name)
    statistics["fixed_input_size"] = bool(known and known.fixed_input_size)
    return {**architecture, "pretrained_cfg": statistics, **settings}


def _open_clip_config(spec: EncoderSpec, encoder: DenseEncoder) -> dict:
    model = dict(known_config(spec.name))
    if encoder.origin and encoder.origin.quick_gelu is not None:
        model["quick_gelu"] = encoder.origin.quick_gelu
    statistics = {"mean": list(encoder.pixel_mean), "std": list(encoder.pixel_std)}
    return {"model_cfg": model, "preprocess_cfg": statistics}


def _license(spec: EncoderSpec, encoder: DenseEncoder) -> str:
    """Return the license of the initial weights that timm names, or ""."""
    tag = encoder.origin.pretrained if encoder.origin else spec.pretrained
    is_timm = timm.is_model(spec.name) and tag in find_family(spec.name).tags(spec.name)
    known = timm.get_pretrained_cfg(f"{spec.name}.{tag}") if is_timm else None
    return (known and known.license) or ""
