import json

import numpy as np
import pytest
import torch

from processes import run_in_two_processes
from spar_d2.evaluation import FeatureEvaluator

TARGETS = [torch.from_numpy(np.random.default_rng(i).standard_normal((6, 4 + i, 5))).float() for i in range(4)]


def records(indices):
    return [{"image": torch.tensor(index)} for index in indices]


def build_target():
    return lambda image: TARGETS[int(image)]


def features(index):
    return {"features": TARGETS[index] * 0.5 + torch.linspace(0, 1, TARGETS[index].shape[2])}


def test_scores_by_their_formulas():
    evaluator = FeatureEvaluator(build_target, distributed=False)
    for index in range(4):
        evaluator.process(records([index]), [features(index)])
    scores = evaluator.evaluate()["features"]
    ours = torch.cat([features(index)["features"].flatten(1) for index in range(4)], dim=1)
    theirs = torch.cat([target.flatten(1) for target in TARGETS], dim=1)
    cosine = (ours * theirs).sum(0) / (ours.norm(dim=0) * theirs.norm(dim=0))
    assert scores["cosine"] == pytest.approx(100 * cosine.mean().item(), rel=1e-5)
    assert scores["mse"] == pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)
    variance = sum((t - t.mean((1, 2), keepdim=True)).square().sum() for t in TARGETS).item() / theirs.numel()
    assert scores["unexplained"] == pytest.approx(100 * scores["mse"] / variance, rel=1e-5)


def test_the_teacher_itself_is_perfect_and_is_built_once():
    built = []
    evaluator = FeatureEvaluator(lambda: built.append(1) or build_target(), distributed=False)
    assert not built
    evaluator.process(records([0, 1]), [{"features": TARGETS[0]}, {"features": TARGETS[1]}])
    evaluator.process(records([2]), [{"features": TARGETS[2]}])
    assert built == [1]
    assert evaluator.evaluate()["features"] == pytest.approx({"cosine": 100, "mse": 0, "unexplained": 0})
    evaluator.reset()
    with pytest.raises(RuntimeError, match="no image"):
        evaluator.evaluate()


def test_wrong_outputs_are_named():
    evaluator = FeatureEvaluator(build_target, distributed=False)
    with pytest.raises(ValueError, match=r'needs "features".*MODEL\.SPAR\.OUTPUT'):
        evaluator.process(records([0]), [{"sem_seg_labels": TARGETS[0]}])
    with pytest.raises(ValueError, match=r"differ in shape: \(6, 5, 5\) and \(6, 4, 5\)"):
        evaluator.process(records([0]), [features(1)])


def _evaluate_half(rank, folder):
    """One of two processes: adds every other image, and writes down the scores it gets."""
    evaluator = FeatureEvaluator(build_target)
    for index in range(rank, 4, 2):
        evaluator.process(records([index]), [features(index)])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_add_up(tmp_path):
    whole = FeatureEvaluator(build_target, distributed=False)
    for index in range(4):
        whole.process(records([index]), [features(index)])
    run_in_two_processes(_evaluate_half, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second is None
    assert first["features"] == pytest.approx(whole.evaluate()["features"])
