"""Checkpoints that are complete or absent."""

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
from spar_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)

# Names the checkpoint that --resume goes on from.
LAST = "last_checkpoint"
# Names checkpoints of runs that were in the folder before this one, which are not this one's to remove.
EARLIER = "earlier_checkpoints"


class UnsavedError(RuntimeError):
    """A checkpoint could not be written."""


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safe.

    Checkpoints are written under a temporary name and renamed, and read without running code from them. Besides its
    own, it loads files of encoder weights (``*.safetensors``, such as a student's) into the model's encoder. Of a
    checkpoint with moving averages (``SPAR.EMA_DECAY``) it takes those, unless it goes on with that run.
    """

    _resumes = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model, checkpointables and ``kwargs`` to ``name``.pth in the output folder.

        Raises:
            UnsavedError: it could not be written; earlier ones are as they were.
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
                f"the checkpoint {path} could not be written, {free:.2f} GiB are free there: {error}. Earlier "
                "checkpoints are as they were; --resume goes on from the last"
            ) from error

    def _origin(self) -> Origin | None:
        """Where the weights of the model's encoder are from, if it has one."""
        origins = [part.origin for part in self.model.modules() if isinstance(part, DenseEncoder)]
        return origins[0] if len(origins) == 1 else None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, LAST)) as temporary:
            temporary.write_text(last_filename_basename)

    @property
    def earlier(self) -> set[str]:
        """Names of checkpoints in the folder that are neither this run's nor of the one that it resumes."""
        path = Path(self.save_dir) / EARLIER
        return set(path.read_text().splitlines()) if path.is_file() else set()

    @earlier.setter
    def earlier(self, names: set[str]) -> None:
        with atomic_write(Path(self.save_dir) / EARLIER) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in sorted(names)))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, or encoder weights.

        Raises:
            FileNotFoundError: no such file.
            RuntimeError: a damaged file, or weights of another model.
            ValueError: a pickle.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"{KEY}: there is no checkpoint {path}")
        return super().load(path, *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint with all its states, or else weights; raises as :meth:`load`."""
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=resume)
        last = self.get_checkpoint_file()
        # Without anything else to restore it only is used, as after --eval-only.
        self._resumes = bool(self.checkpointables)
        try:
            return super().resume_or_load(path, resume=True)
        except (FileNotFoundError, RuntimeError) as error:
            whole = sorted(p.name for p in Path(self.save_dir).glob("*.pth") if str(p) != last)
            raise type(error)(
                f"--resume: {os.path.join(self.save_dir, LAST)} names {os.path.basename(last) or 'nothing'}, which "
                f"cannot be loaded ({error}). To go on from another, write its name into that file; there are: "
                f"{', '.join(whole) or 'none'}"
            ) from error
        finally:
            self._resumes = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            raise ValueError(f"{KEY}: {filename} is a pickle, which can run code; use .pth or .safetensors weights")
        return read_for_model(self.model, filename, averages=not self._resumes)
