"""Model folders: weights, model config and a description in one folder, which is used like a model name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Entry of config.json with the settings of this package. Other entries are for timm.
ENTRY = "spar_d2"
_KEY = "MODEL.SPAR.ENCODER"
_LARGEST = 1 << 20


@dataclass(frozen=True)
class ModelFolder:
    """Settings in a model folder.

    Attributes:
        name: model name, or path of the model config in the folder.
        pretrained: path of the weights in the folder.
        readout: see :func:`spar_d2.encoders.build_encoder`.
    """

    name: str
    pretrained: str
    readout: str = ""


def model_folder(name: str) -> ModelFolder | None:
    """Read a model folder of ``spar-d2 export folder`` or open_clip; None if ``name`` is not such a folder.

    Raises:
        ValueError: the config in the folder is invalid.
        FileNotFoundError: the folder has no weights.
    """
    if not isinstance(name, str) or not os.path.isdir(name):
        return None
    folder = Path(name)
    settings = _settings(folder / CONFIG)
    if not settings and not (folder / OPEN_CLIP_CONFIG).is_file():
        return None
    encoder = settings.get("encoder", OPEN_CLIP_CONFIG)
    weights = next((folder / file for file in (WEIGHTS, OPEN_CLIP_WEIGHTS) if (folder / file).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{_KEY}: the folder {name} has no {WEIGHTS}")
    path = str(folder / encoder) if encoder == OPEN_CLIP_CONFIG else encoder
    return ModelFolder(path, str(weights), settings.get("readout", ""))


def _settings(path: Path) -> dict[str, str]:
    """Return the settings "encoder" and "readout" in a config file; none if it is missing or of another library."""
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_KEY}: {path} is not valid JSON: {error}") from error
    settings = content.get(ENTRY) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        return {}
    chosen = {key: settings.get(key, "") for key in ("encoder", "readout")}
    # The name of a folder would be read again, and another config file is none of this folder.
    if not all(isinstance(value, str) for value in chosen.values()) or _is_path(chosen["encoder"]):
        raise ValueError(f'{_KEY}: {path} must name a model or {OPEN_CLIP_CONFIG} as "encoder", got {settings}')
    return chosen


def _is_path(name: str) -> bool:
    return not name or (name != OPEN_CLIP_CONFIG and (name.endswith(".json") or Path(name).name != name))
