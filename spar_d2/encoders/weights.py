"""Reading and writing of weight files, and related error messages."""

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

# Encoding does not need these parameters, and some weight files lack them.
OPTIONAL_KEYS = {"logit_scale", "logit_bias"}
_RANDOM_WEIGHTS_SEED = 0


@contextlib.contextmanager
def fixed_random_weights() -> Iterator[None]:
    """Context manager that fixes the seed of random weights, without changing the caller's generator state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_WEIGHTS_SEED)
        yield


def read_state_dict(path: str | os.PathLike, key: str = KEY, part: str = "") -> dict[str, torch.Tensor]:
    """Read a state dict from a weight file.

    Args:
        path: weight file, see :func:`spar_d2.encoders.weight_files.read_checkpoint`.
        key: config key or argument that the path comes from, for error messages.
        part: key of the set of weights to read, see :func:`spar_d2.encoders.state_dicts.take_state_dict`.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: the file is corrupt, has no weights, or has several sets of weights and ``part`` is "".
    """
    return take_state_dict(read_checkpoint(path, key), path, key, part)


def no_such_weights(name: str, pretrained: str, tags: Sequence[str]) -> FileNotFoundError:
    """Create the error for a value that is neither a weight file nor a tag of the model; it suggests similar tags."""
    near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4) or tags[:5]
    hint = f"tags of {name}: {', '.join(near)}, ..." if tags else f"{name} has no tags"
    return FileNotFoundError(f"{KEY}: {pretrained!r} is neither a weight file nor a known tag; {hint}")


def failed_download(name: str, tag: str, error: Exception) -> RuntimeError:
    """Create the error for a failed download of weights."""
    return RuntimeError(
        f"{KEY}: the weights {tag!r} of {name} failed to download ({first_line(error)}); "
        "without network access, set it to the path of a weight file"
    )


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, origin: Origin | None = None
) -> None:
    """Atomically write tensors and their origin to a safetensors file."""
    # A single metadata entry: safetensors does not preserve the order of entries, and files should be reproducible.
    metadata = {ENTRY: origin.text()} if origin else None
    with atomic_write(path) as temporary:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, temporary, metadata)


def source_checksum(source: str) -> str:
    """Return the SHA-256 checksum of a weight file (with its shards); names and tags are returned unchanged."""
    if not Path(source).is_file():
        return source
    digest = hashlib.sha256()
    for part in files_of(source):
        if part.is_file():
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
