"""Safe reading of weight files: safetensors, sharded checkpoints, torch.save files, and TorchScript archives."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from spar_d2.encoders.messages import KEY, first_line
from spar_d2.encoders.torchscript import is_script, read_script, root_of

_INDEX = ".index.json"
_SHARDS = (".safetensors", ".bin", ".pt", ".pth")
_ZIP = b"PK\x03\x04"


def read_checkpoint(path: str | os.PathLike, key: str = KEY) -> Mapping:
    """Read a weight file that contains only tensors and plain Python containers. No code in the file is executed.

    Args:
        path: ``*.safetensors``, ``*.index.json`` with its shards in the same folder, or a file written by
            ``torch.save`` or ``torch.jit.save``.
        key: config key or argument that the path comes from, for error messages.

    Returns:
        Content of the file by key, with tensors on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: the file is corrupt, or contains objects other than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no weight file {path}")
    try:
        content = _read_shards(path) if path.name.endswith(_INDEX) else _read(path)
    except Exception as error:  # corrupt files can cause almost any exception
        # Messages of UnpicklingError suggest unsafe loading, so they are not shown.
        reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise RuntimeError(
            f"{key}: {path} cannot be read as weights, it is corrupt or contains more than tensors ({reason}); "
            "download it again, or save only its state_dict()"
        ) from error
    if not isinstance(content, Mapping):
        raise RuntimeError(
            f"{key}: {path} must contain a state_dict(), but contains an object of type {type(content).__name__}"
        )
    return content


def files_of(path: str | os.PathLike) -> list[Path]:
    """Return a weight file and, if it is an index file, its shards."""
    path = Path(path)
    if not path.name.endswith(_INDEX):
        return [path]
    try:
        return [path, *sorted(set(_read_index(path).values()))]
    except (ValueError, RecursionError):  # reading the weights reports the error
        return [path]


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    with open(path, "rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            script = is_script(archive)
            _check_size(archive, path, script)
            if script:
                return read_script(archive)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_size(archive: zipfile.ZipFile, path: Path, script: bool) -> None:
    """Reject zip bombs: PyTorch does not compress tensors, so an archive must not unpack to more than its size."""
    root = root_of(archive)
    tensors = (f"{root}data/", f"{root}data.pkl")
    records = [info for info in archive.infolist() if not script or info.filename.startswith(tensors)]
    unpacked, packed = sum(info.file_size for info in records), path.stat().st_size
    if unpacked > packed:
        raise ValueError(f"it has {packed} bytes but unpacks to {unpacked}")


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    shard_of = _read_index(path)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not shard.is_file():
            raise ValueError(f"its shard {shard.name} is missing")
        loaded = _read(shard)
        content = loaded if isinstance(loaded, Mapping) else {}
        names = [name for name, file in shard_of.items() if file == shard]
        missing = [name for name in names if name not in content]
        if missing:
            raise ValueError(f"its shard {shard.name} has no tensor {missing[0]!r}")
        tensors.update({name: content[name] for name in names})
    return tensors


def _read_index(path: Path) -> dict[str, Path]:
    """Map tensor names to their shard files."""
    index = json.loads(path.read_text(encoding="utf-8"))
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError('it has no "weight_map"')
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or not shard.endswith(_SHARDS):
            raise ValueError(f"its shard {shard!r} is not the name of a weight file in the same folder")
    return {name: path.parent / shard for name, shard in shards.items()}
