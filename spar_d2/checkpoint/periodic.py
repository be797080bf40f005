"""Periodic checkpoints, of which the most recent are kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from detectron2.engine.hooks import PeriodicCheckpointer

from spar_d2.checkpoint.checkpointer import LAST, Checkpointer, UnsavedError

logger = logging.getLogger(__name__)


class Checkpoints(PeriodicCheckpointer):
    """``PeriodicCheckpointer`` that continues training if a checkpoint, other than the last, cannot be written.

    Args:
        checkpointer: checkpointer that writes the checkpoints.
        period: number of iterations between checkpoints.
        keep: number of most recent checkpoints to keep, in addition to the final one; 0 keeps all.
    """

    checkpointer: Checkpointer

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int = 0) -> None:
        super().__init__(checkpointer, period)
        self.keep = keep

    def before_train(self) -> None:
        super().before_train()
        trainer, final = self.trainer, f"{self.file_prefix}_final"
        if trainer.start_iter == 0:
            self._set_aside()
        if trainer.start_iter < trainer.max_iter:
            return
        # No steps remain. If the run was killed before writing the final checkpoint, write it now, with the iteration
        # of the last step.
        trainer.iter = trainer.start_iter - 1
        if Path(self.checkpointer.get_checkpoint_file()).stem != final:
            self.checkpointer.save(final, iteration=trainer.iter)
        self._remove_old()

    def after_step(self) -> None:
        try:
            super().after_step()
        except UnsavedError as error:
            if self.trainer.iter + 1 >= self.trainer.max_iter:
                raise
            logger.error("Continuing training without a checkpoint: %s", error)
        else:
            if (self.trainer.iter + 1) % self.period == 0:
                self._remove_old()

    def _set_aside(self) -> None:
        """Ensure that a new run is not resumed from checkpoints of an earlier run in the same folder."""
        tag = Path(self.checkpointer.save_dir) / LAST
        names = {path.name for path in tag.parent.glob("*.pth")}
        if self.checkpointer.save_to_disk and names - self.checkpointer.earlier:
            self.checkpointer.earlier = names
        if self.checkpointer.save_to_disk and tag.is_file():
            os.replace(tag, tag.with_name(f"{LAST}.previous"))
            message = "%s contains an earlier run, but this run starts from the beginning: renamed %s to %s.previous"
            logger.info(message, tag.parent, LAST, LAST)

    def _remove_old(self) -> None:
        """Remove old checkpoints of this run. They are listed from the folder, as the run may have been resumed."""
        if not self.keep or not self.checkpointer.save_to_disk:
            return
        paths = Path(self.checkpointer.save_dir).glob(f"{self.file_prefix}_[0-9]*.pth")
        earlier = self.checkpointer.earlier
        written = {int(path.stem.split("_")[-1]): path for path in paths if path.name not in earlier}
        # Ignore later checkpoints: they exist if the run was resumed from an earlier one.
        for iteration in sorted(i for i in written if i <= self.trainer.iter)[: -self.keep]:
            written[iteration].unlink(missing_ok=True)
