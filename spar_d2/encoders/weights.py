"""Reading weight files of others, safely, and writing our own."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spar_d2.files import replacing

KEY = "MODEL.SPAR.PRETRAINED"
# Without them a contrastive model still encodes; files differ in whether they have them.
OPTIONAL_KEYS = {"logit_scale", "logit_bias"}
_RANDOM_WEIGHTS_SEED = 0
_LONGEST_LINE = 200
# What trainers put around a state dict.
_WRAPPERS = ("state_dict", "model")
# What distributed training and torch.compile put before keys.
_PREFIXES = ("module.", "_orig_mod.")
# Where larger models hold the encoder's: the authors of SPAR (Lightning's, then those of their plain files), this
# project's models in Detectron2. What is not under them is not of the encoder.
_ROOTS = ("segmentor.net.model.", "model.", "backbone.encoder.", "backbone.net.encoder.")


@contextlib.contextmanager
def fixed_random_weights() -> Iterator[None]:
    """What is built inside has the same random weights every time; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_WEIGHTS_SEED)
        yield


def read_checkpoint(path: str | os.PathLike, key: str = KEY) -> Mapping:
    """Whatever a weight file holds, as long as it is tensors in plain containers.

    Args, raises: as :func:`read_state_dict`, which takes the weights out of it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
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


def first_line(error: Exception) -> str:
    """What an error says, in a line that is not too long; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def read_state_dict(path: str | os.PathLike, key: str = KEY) -> dict[str, torch.Tensor]:
    """Read a weight file: safetensors, or what ``torch.save`` wrote, restricted to tensors and plain containers.

    Args:
        path: ``*.safetensors``; anything else is given to ``torch.load(weights_only=True)``. A dictionary inside
            "state_dict" or "model" is unwrapped, and the prefixes that DDP and Detectron2 add to keys are removed.
        key: name of the setting that the path came from, for error messages.

    Returns:
        Key to tensor, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is damaged, empty, or holds something else than tensors.
    """
    return take_state_dict(read_checkpoint(path, key), path, key)


def take_state_dict(content: Mapping, path: str | os.PathLike, key: str = KEY) -> dict[str, torch.Tensor]:
    """The weights in what :func:`read_checkpoint` gave for ``path``; see :func:`read_state_dict`."""
    while any(isinstance(content.get(name), Mapping) for name in _WRAPPERS):
        content = next(content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping))
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise RuntimeError(f"{key}: {path} holds no weights")
    for prefix in _PREFIXES:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for root in _ROOTS:
        inside = {name.removeprefix(root): tensor for name, tensor in tensors.items() if name.startswith(root)}
        tensors = inside or tensors
    return tensors


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


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write tensors to a safetensors file that either is complete or is not there."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def fingerprint(source: str) -> str:
    """Text that changes with what it stands for: a file's SHA-256, or else a name or tag itself."""
    if not Path(source).is_file():
        return source
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
