"""The configs of this project, from a clone or an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path

from detectron2.config import CfgNode

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the configs within the package; an editable install uses those of its clone.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def config_folder() -> Path:
    """Folder of the configs.

    Raises:
        FileNotFoundError: the package was installed without its configs.
    """
    for folder in _FOLDERS:
        if (folder / "Base-SPAR.yaml").is_file():
            return folder
    raise FileNotFoundError(f"the configs of spar_d2 are not in {_FOLDERS[0]}: install the package again")


def get_config_file(config_path: str) -> str:
    """Path of a config, as ``detectron2.model_zoo.get_config_file`` gives that of one of Detectron2's.

    Args:
        config_path: name below ``configs/``, such as "segment/openclip_vit_b_16.yaml".

    Raises:
        FileNotFoundError: there is no such config; the message names similar ones.
    """
    folder = config_folder()
    path = folder / config_path
    if path.is_file():
        return str(path)
    names = [found.relative_to(folder).as_posix() for found in folder.rglob("*.*") if found.suffix in (".yaml", ".py")]
    similar = difflib.get_close_matches(config_path, names, n=3, cutoff=0.3)
    raise FileNotFoundError(f"there is no config {config_path!r} in {folder}; did you mean {', '.join(similar)}?")


def get_config(config_path: str) -> CfgNode:
    """A config as a node that may be changed; raises as :func:`get_config_file`."""
    from detectron2.config import get_cfg

    import spar_d2  # noqa: F401  registers the config keys

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    return cfg
