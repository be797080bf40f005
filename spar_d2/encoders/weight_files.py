"""Opening weight files of others, safely: safetensors, also in shards, what torch.save wrote, and TorchScript."""

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
    """Whatever a weight file holds, as long as it is tensors in plain containers.

    Args:
        path: ``*.safetensors``, ``*.index.json`` with its shards beside it, or what ``torch.save`` or
            ``torch.jit.save`` wrote. No code in it is run.
        key: name of the setting that the path came from, for error messages.

    Returns:
        Names to what is under them; tensors are on the CPU.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged, or holds something else than tensors in plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no weight file {path}")
    try:
        content = _read_shards(path) if path.name.endswith(_INDEX) else _read(path)
    except Exception as error:  # junk makes the readers raise almost anything
        # The unpickler's own words go on to advise loading the file unsafely.
        reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise RuntimeError(
            f"{key}: {path} cannot be read as weights, it is damaged or holds more than tensors ({reason}); "
            "fetch it again, or save its state_dict() on its own"
        ) from error
    if not isinstance(content, Mapping):
        raise RuntimeError(f"{key}: {path} holds no weights but a {type(content).__name__}; save a state_dict()")
    return content


def files_of(path: str | os.PathLike) -> list[Path]:
    """A weight file, and where it is an index of shards, those that are beside it."""
    path = Path(path)
    if not path.name.endswith(_INDEX):
        return [path]
    try:
        return [path, *sorted(set(_read_index(path).values()))]
    except (ValueError, RecursionError):  # whoever reads the weights says so
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
    """PyTorch compresses no tensors: an archive that unpacks to more than it is was made to fill the memory."""
    root = root_of(archive)
    tensors = (f"{root}data/", f"{root}data.pkl")
    read = [info for info in archive.infolist() if not script or info.filename.startswith(tensors)]
    unpacked, packed = sum(info.file_size for info in read), path.stat().st_size
    if unpacked > packed:
        raise ValueError(f"it has {packed} bytes and unpacks to {unpacked}")


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    shard_of = _read_index(path)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not shard.is_file():
            raise ValueError(f"its shard {shard.name} is not beside it")
        read = _read(shard)
        content = read if isinstance(read, Mapping) else {}
        wanted = [name for name, place in shard_of.items() if place == shard]
        absent = [name for name in wanted if name not in content]
        if absent:
            raise ValueError(f"its shard {shard.name} has no {absent[0]!r}")
        tensors.update({name: content[name] for name in wanted})
    return tensors


def _read_index(path: Path) -> dict[str, Path]:
    """Names of tensors to the files that they are in."""
    index = json.loads(path.read_text(encoding="utf-8"))
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError('it has no "weight_map"')
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or not shard.endswith(_SHARDS):
            raise ValueError(f"its shard {shard!r} is no name of a weight file beside it")
    return {name: path.parent / shard for name, shard in shards.items()}
