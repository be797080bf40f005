"""Reading and writing of the weights of AnyUp."""

from __future__ import annotations

import os
from pathlib import Path

from spar_d2.encoders.fit import check_values
from spar_d2.encoders.weights import read_state_dict, write_safetensors
from spar_d2.refine.anyup import AnyUp

_KEY = "path"
_SHOWN = 3


def load_anyup(path: str | os.PathLike, key: str = _KEY) -> AnyUp:
    """Build AnyUp from a weight file. No code in the file is executed.

    Args:
        path: the authors' file ``anyup_multi_backbone.pth``, or a file of :func:`save_anyup`.
        key: config key or argument that the path comes from, for error messages.

    Returns:
        The frozen model, in eval mode on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: the file is corrupt, or has values that are not finite.
        ValueError: the file has other keys or shapes.
    """
    model = AnyUp()
    expected = model.state_dict()
    tensors = read_state_dict(path, key)
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (
            ("missing keys", sorted(expected.keys() - tensors.keys())),
            ("unknown keys", sorted(tensors.keys() - expected.keys())),
            (
                "mismatched shapes",
                [
                    f"{name} {tuple(tensors[name].shape)} instead of {tuple(weight.shape)}"
                    for name, weight in expected.items()
                    if name in tensors and tensors[name].shape != weight.shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{key}: {path} does not fit AnyUp: {'; '.join(problems)}. Use anyup_multi_backbone.pth of wimmerth/anyup, "
            f"which has {len(expected)} tensors with {sum(weight.numel() for weight in expected.values())} parameters"
        )
    check_values(expected, tensors, str(path), key)
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


def save_anyup(model: AnyUp, path: str | os.PathLike) -> None:
    """Atomically write the weights of AnyUp to a ``.safetensors`` file.

    Raises:
        ValueError: the path has another suffix.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    write_safetensors(model.state_dict(), path)
