"""Stopping several processes together."""

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils import comm

from processes import run_in_two_processes
from spar_d2.distillation.readings import PERIOD
from spar_d2.engine.interrupt import Interrupted, StopOnInterrupt


class Nothing(TrainerBase):
    """Trains nothing; one process is asked to stop."""

    def run_step(self):
        if comm.get_rank() == 1 and self.iter == self.asked:
            self.stop.requested = True


class Checkpointer:
    saved: tuple = ()

    def save(self, name, iteration):
        self.saved += (iteration,)


def train(rank, folder, asked, steps):
    trainer, checkpointer, asking = Nothing(), Checkpointer(), []
    trainer.asked, trainer.stop = asked, StopOnInterrupt(checkpointer)
    trainer.register_hooks([trainer.stop])
    all_gather = comm.all_gather
    comm.all_gather = lambda data: asking.append(trainer.iter) or all_gather(data)
    try:
        trainer.train(0, steps)
        ended = "complete"
    except Interrupted:
        ended = "stopped"
    (folder / f"end{rank}").write_text(f"{ended} {checkpointer.saved} {asking}")


def ends(folder) -> set[str]:
    return {(folder / f"end{rank}").read_text() for rank in range(2)}


@pytest.mark.processes
def test_processes_ask_each_other_now_and_then_and_stop_together(tmp_path):
    run_in_two_processes(train, tmp_path, PERIOD + 3, 5 * PERIOD)
    last = 2 * PERIOD - 1
    assert ends(tmp_path) == {f"stopped ({last},) {[PERIOD - 1, last]}"}


@pytest.mark.processes
def test_a_request_shortly_before_the_end_still_stops(tmp_path):
    run_in_two_processes(train, tmp_path, PERIOD + 1, PERIOD + 3)
    assert ends(tmp_path) == {f"stopped ({PERIOD + 2},) {[PERIOD - 1, PERIOD + 2]}"}
