"""Waiting for processes whose work ends much later."""

import datetime
import time

import pytest
import torch.distributed as dist
from detectron2.data import MetadataCatalog

from processes import run_in_two_processes
from spar_d2.evaluation import FeatureEvaluator, SemanticEvaluator
from spar_d2.utils.processes import all_gather_when_done, gather_when_done, wait_for_all

# Seconds of the timeout, which is usually 10 or 30 minutes, and of the delay of the other process.
LIMIT, LATER = 2, 4


def impatient(rank: int, folder, *_) -> None:
    """Make the group that everything but long waits uses give up soon."""
    dist.destroy_process_group()
    limit = datetime.timedelta(seconds=LIMIT)
    meeting = f"file://{folder}/impatient"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)


def evaluate_late(rank, folder, kind):
    impatient(rank, folder)
    MetadataCatalog.get("late").set(stuff_classes=["a", "b"])
    evaluator = SemanticEvaluator("late") if kind == "semantic" else FeatureEvaluator(lambda: None)
    evaluator.reset()
    if kind == "semantic":
        evaluator._confusion += rank + 1
    else:
        evaluator._sums += rank + 1
    if rank == 1:
        time.sleep(LATER)
    scores = evaluator.evaluate()
    if rank == 0:
        (folder / "scores").write_text(str(dict(scores)))
    else:
        assert scores is None


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["semantic", "features"])
def test_an_evaluation_waits_for_the_process_with_the_longer_share(tmp_path, kind):
    run_in_two_processes(evaluate_late, tmp_path, kind)
    assert "nan" not in (tmp_path / "scores").read_text()


def meet_late(rank, folder):
    impatient(rank, folder)
    if rank == 1:
        time.sleep(LATER)
    wait_for_all()
    assert all_gather_when_done(rank) == [0, 1]
    if rank == 0:
        time.sleep(LATER)
    assert gather_when_done(rank) == ([0, 1] if rank == 0 else [])


@pytest.mark.processes
@pytest.mark.slow
def test_all_ways_of_waiting_are_patient(tmp_path):
    run_in_two_processes(meet_late, tmp_path)


def test_one_process_waits_for_nobody():
    wait_for_all()
    assert gather_when_done(3) == all_gather_when_done(3) == [3]
