"""Reading weight files of others, safely, and writing our own."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from spar_d2.encoders.messages import KEY, first_line
from spar_d2.encoders.origin import ENTRY, Origin
from spar_d2.encoders.state_dicts import take_state_dict
from spar_d2.encoders.weight_files import files_of, read_checkpoint
from spar_d2.utils.io import atomic_write

# Without them a contrastive model still encodes; files differ in whether they have them.
OPTIONAL_KEYS = {"logit_scale", "logit_bias"}
_RANDOM_WEIGHTS_SEED = 0


@contextlib.contextmanager
def fixed_random_weights() -> Iterator[None]:
    """What is built inside has the same random weights every time; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_WEIGHTS_SEED)
        yield


def read_state_dict(path: str | os.PathLike, key: str = KEY, part: str = "") -> dict[str, torch.Tensor]:
    """Read the weights in a file; see :func:`read_checkpoint` for files, and :func:`take_state_dict` for their parts.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged, empty, or holds something else than one set of weights.
    """
    return take_state_dict(read_checkpoint(path, key), path, key, part)


def no_such_weights(name: str, pretrained: str, tags: Sequence[str]) -> FileNotFoundError:
    """What to raise where ``pretrained`` is no file and none of the model's tags; suggests near ones."""
    near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4) or tags[:5]
    allowed = f"a tag of {name} ({', '.join(near)}, ...)" if tags else f"{name} has no tags"
    return FileNotFoundError(f"{KEY}: {pretrained!r} is neither a weight file nor a known tag; {allowed}")


def failed_download(name: str, tag: str, error: Exception) -> RuntimeError:
    """What to raise where weights cannot be downloaded."""
    return RuntimeError(
        f"{KEY}: the weights {tag!r} of {name} could not be had ({first_line(error)}); "
        "with no way to download them, give the path of a weight file"
    )


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, origin: Origin | None = None
) -> None:
    """Write tensors, and where they are from, to a safetensors file that either is complete or is not there."""
    # A single entry: safetensors writes several in any order, and equal runs would give different files.
    metadata = {ENTRY: origin.text()} if origin else None
    with atomic_write(path) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, temporary, metadata)


def source_checksum(source: str) -> str:
    """Text that changes with what it stands for: a file's SHA-256, with its shards, or else a name or tag itself."""
    if not Path(source).is_file():
        return source
    digest = hashlib.sha256()
    for part in files_of(source):
        if part.is_file():
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
