"""Access to the project's config files, in a clone or an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path

from detectron2.config import CfgNode

_PACKAGE = Path(__file__).resolve().parent
# A wheel contains the configs inside the package; an editable install uses the configs of the clone.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def config_folder() -> Path:
    """Return the folder of the config files.

    Raises:
        FileNotFoundError: the installed package lacks its config files.
    """
    for folder in _FOLDERS:
        if (folder / "Base-SPAR.yaml").is_file():
            return folder
    raise FileNotFoundError(f"the configs of spar_d2 are not in {_FOLDERS[0]}; reinstall the package")


def get_config_file(config_path: str) -> str:
    """Return the path of a config file, like ``detectron2.model_zoo.get_config_file``.

    Args:
        config_path: path relative to ``configs/``, such as "segment/openclip_vit_b_16.yaml".

    Raises:
        FileNotFoundError: the config does not exist; the message suggests similar names.
    """
    folder = config_folder()
    path = folder / config_path
    if path.is_file():
        return str(path)
    names = [found.relative_to(folder).as_posix() for found in folder.rglob("*.*") if found.suffix in (".yaml", ".py")]
    similar = difflib.get_close_matches(config_path, names, n=3, cutoff=0.3)
    raise FileNotFoundError(f"config {config_path!r} not found in {folder}; did you mean {', '.join(similar)}?")


def get_config(config_path: str) -> CfgNode:
    """Return a config as a mutable ``CfgNode``. Raises the same errors as :func:`get_config_file`."""
    from detectron2.config import get_cfg

    import spar_d2  # noqa: F401  registers the config keys

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    return cfg
