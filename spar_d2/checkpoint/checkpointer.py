"""Checkpointer with atomic writes and safe reads."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.origin import Origin, add_origin
from spar_d2.modeling.encoder_state import KEY, read_for_model
from spar_d2.utils.io import atomic_write, write_text

logger = logging.getLogger(__name__)

# File with the name of the checkpoint from which --resume continues.
LAST = "last_checkpoint"
# File with the names of checkpoints of earlier runs in the same folder, which this run must not remove.
EARLIER = "earlier_checkpoints"


class UnsavedError(RuntimeError):
    """Raised if a checkpoint cannot be written."""


class Checkpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` with atomic writes and safe reads.

    Checkpoints are written to a temporary file and renamed. Reading them does not execute code. The checkpointer also
    loads encoder weights (``*.safetensors``, such as an exported student) into the encoder of the model. EMA weights
    (``SPAR.EMA_DECAY``) in a checkpoint are loaded instead of the trained weights, except when resuming the run.
    """

    _resumes = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model, checkpointables and ``kwargs`` to ``{name}.pth`` in the output folder.

        Raises:
            UnsavedError: the checkpoint cannot be written; earlier checkpoints are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_write(path) as temporary:
                torch.save({"model": self.model.state_dict(), **states, **kwargs}, temporary)
                add_origin(temporary, self._origin())
            self.tag_last_checkpoint(os.path.basename(path))
            if os.path.basename(path) in self.earlier:
                self.earlier = self.earlier - {os.path.basename(path)}
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.save_dir).free / 2**30
            raise UnsavedError(
                f"the checkpoint {path} could not be written ({free:.2f} GiB are free): {error}. Earlier checkpoints "
                "are unchanged; --resume continues from the last one"
            ) from error

    def _origin(self) -> Origin | None:
        """Return the origin of the weights of the model's encoder, if it has exactly one."""
        origins = [part.origin for part in self.model.modules() if isinstance(part, DenseEncoder)]
        return origins[0] if len(origins) == 1 else None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(last_filename_basename, os.path.join(self.save_dir, LAST))

    @property
    def earlier(self) -> set[str]:
        """Names of checkpoints in the folder that belong to earlier runs, other than the resumed one."""
        path = Path(self.save_dir) / EARLIER
        return set(path.read_text().splitlines()) if path.is_file() else set()

    @earlier.setter
    def earlier(self, names: set[str]) -> None:
        write_text("".join(f"{name}\n" for name in sorted(names)), Path(self.save_dir) / EARLIER)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint or encoder weights.

        Raises:
            FileNotFoundError: the file does not exist.
            RuntimeError: the file is corrupt or does not fit the model.
            ValueError: the file is a pickle.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"{KEY}: there is no checkpoint {path}")
        return super().load(path, *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint with all states if ``resume`` is set and one exists, else the weights in ``path``.

        Raises the same errors as :meth:`load`.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=resume)
        last = self.get_checkpoint_file()
        # Without checkpointables, as with --eval-only, the model is only evaluated, so EMA weights are loaded.
        self._resumes = bool(self.checkpointables)
        try:
            return super().resume_or_load(path, resume=True)
        except (FileNotFoundError, RuntimeError) as error:
            others = sorted(p.name for p in Path(self.save_dir).glob("*.pth") if str(p) != last)
            raise type(error)(
                f"--resume: {os.path.join(self.save_dir, LAST)} names {os.path.basename(last) or 'nothing'}, which "
                f"cannot be loaded ({error}). To continue from another checkpoint, write its name into that file; "
                f"available checkpoints: {', '.join(others) or 'none'}"
            ) from error
        finally:
            self._resumes = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            raise ValueError(f"{KEY}: {filename} is a pickle, which can execute code; use .pth or .safetensors weights")
        return read_for_model(self.model, filename, averages=not self._resumes)
