"""Checkpoints every so many steps, of which the latest are kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from detectron2.engine.hooks import PeriodicCheckpointer

from spar_d2.checkpoint.checkpointer import LAST, Checkpointer, UnsavedError

logger = logging.getLogger(__name__)


class Checkpoints(PeriodicCheckpointer):
    """Detectron2's periodic checkpoints; one that cannot be written does not stop the training, but for the last.

    Args:
        checkpointer: writes them.
        period: iterations between them.
        keep: how many of the latest stay, beside the final one; 0 for all.
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
        # No step is left. A run that was killed between its last two checkpoints still needs the final one, with the
        # number of the step it is of.
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
            logger.error("Training goes on without a checkpoint: %s", error)
        else:
            if (self.trainer.iter + 1) % self.period == 0:
                self._remove_old()

    def _set_aside(self) -> None:
        """A run that begins anew must not be resumed from what an earlier one left in its folder."""
        tag = Path(self.checkpointer.save_dir) / LAST
        names = {path.name for path in tag.parent.glob("*.pth")}
        if self.checkpointer.save_to_disk and names - self.checkpointer.earlier:
            self.checkpointer.earlier = names
        if self.checkpointer.save_to_disk and tag.is_file():
            os.replace(tag, tag.with_name(f"{LAST}.previous"))
            message = "%s holds an earlier run, and this one begins anew: its %s is now called %s.previous"
            logger.info(message, tag.parent, LAST, LAST)

    def _remove_old(self) -> None:
        """Of this run, as the folder shows them: no list of its own outlives a run that is killed."""
        if not self.keep or not self.checkpointer.save_to_disk:
            return
        paths = Path(self.checkpointer.save_dir).glob(f"{self.file_prefix}_[0-9]*.pth")
        earlier = self.checkpointer.earlier
        written = {int(path.stem.split("_")[-1]): path for path in paths if path.name not in earlier}
        # Later ones are of before an earlier one was gone back to, and not in the way.
        for iteration in sorted(i for i in written if i <= self.trainer.iter)[: -self.keep]:
            written[iteration].unlink(missing_ok=True)
