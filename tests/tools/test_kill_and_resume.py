"""A training killed at a few moments; ``tests/kill_and_resume.py`` can do it at more of them."""

from types import SimpleNamespace

import pytest
import torch

from kill_and_resume import Moment, check, shortened
from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.checkpoint.periodic import Checkpoints


@pytest.mark.slow
def test_a_killed_and_resumed_training_ends_like_an_uninterrupted_one(tmp_path):
    moments = [
        Moment("checkpoint", sighting=2, size=1_000_000),
        Moment("cache entry", sighting=2),
        Moment("training", seconds=0.2),
        Moment("final checkpoint"),
    ]
    kills, wrong = check(tmp_path, moments)
    assert not wrong, shortened(wrong)
    assert [kill.moment.aim for kill in kills] == [moment.aim for moment in moments]


class Run:
    """As much of a trainer as its checkpoints need."""

    def __init__(self, folder, keep):
        self.checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(folder))
        self.hook = Checkpoints(self.checkpointer, period=1, keep=keep)

    def train(self, start, end, max_iter=100):
        self.hook.trainer = SimpleNamespace(start_iter=start, max_iter=max_iter, iter=start)
        self.hook.before_train()
        for self.hook.trainer.iter in range(start, end):
            self.hook.after_step()


def test_the_number_of_checkpoints_is_limited_and_the_last_one_is_never_removed(tmp_path):
    for keep in (1, 2):
        folder = tmp_path / str(keep)
        Run(folder, keep).train(0, 3)
        # Killed before its latest checkpoint was named, started over, killed before an old one was removed.
        for start in (2, 0, 3):
            (folder / "model_0000000.pth").touch()
            Run(folder, keep).train(start, start + 1)
            last = folder / (folder / "last_checkpoint").read_text()
            assert last.name == f"model_{start:07d}.pth"
            assert last.is_file()
        run = Run(folder, keep)
        run.train(4, 6)
        # Checkpoints that existed when it started over are another run's and are kept.
        assert run.checkpointer.earlier == {f"model_{number:07d}.pth" for number in range(3 - keep, 3)}
        assert len({path.name for path in folder.glob("*.pth")} - run.checkpointer.earlier) == keep


def test_a_run_killed_before_its_final_checkpoint_still_writes_it(tmp_path):
    Run(tmp_path, 0).train(0, 3)
    Run(tmp_path, 0).train(3, 3, max_iter=3)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2
