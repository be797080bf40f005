import numpy as np
import pytest
import torch

from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.methods import Method, measure
from spar_d2.comparison.progress import Progress
from spar_d2.data.datasets.scenes import SCENE_SPLITS

DATASET = "spar_scenes_tune"


@pytest.fixture
def cfg(tiny_cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 5))
    tiny_cfg.DATASETS.TEST = (DATASET,)
    return tiny_cfg


class Crash(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "period"), [(Crash, 0), (KeyboardInterrupt, 1000)])
def test_an_interrupted_evaluation_resumes(cfg, tmp_path, monkeypatch, stop, period):
    method = Method("single pass")
    model = build_segmentor(cfg, method.weights, method.overrides)
    expected = measure(cfg, DATASET, method, model)
    seen = []

    def forward(inputs):
        seen.append(inputs[0]["file_name"])
        if len(seen) == 4:
            raise stop
        return type(model).forward(model, inputs)

    monkeypatch.setattr(model, "forward", forward)
    path = tmp_path / "unfinished.safetensors"
    with pytest.raises(stop):
        measure(cfg, DATASET, method, model, progress=Progress(path, "a", period))
    assert len(set(seen)) == 3
    result = measure(cfg, DATASET, method, model, progress=Progress(path, "a", period=0))
    # The first image of each part is run twice, to warm up.
    assert len(set(seen)) == 5 and len(seen) == 4 + 4
    assert result.scores == pytest.approx(expected.scores, nan_ok=True)
    assert len(result.seconds) == 5
    assert measure(cfg, DATASET, method, model, limit=2).scores != expected.scores


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["of another", "corrupt", "of other classes"])
def test_unusable_progress_starts_over(cfg, tmp_path, kept):
    from spar_d2.evaluation import SemanticEvaluator

    evaluator = SemanticEvaluator(DATASET, distributed=False)
    path = tmp_path / "unfinished.safetensors"
    progress = Progress(path, "a", period=0)
    evaluator._confusion += 1
    progress.keep(evaluator, [1.0, 2.0])
    fresh = SemanticEvaluator(DATASET, distributed=False)
    assert progress.restore(fresh) == [1.0, 2.0]
    assert np.array_equal(fresh._confusion, evaluator._confusion)
    if kept == "corrupt":
        path.write_bytes(b"corrupt")
    elif kept == "of other classes":
        fresh._confusion = np.zeros((2, 3), dtype=np.int64)
    other = Progress(path, "b" if kept == "of another" else "a")
    if kept != "of other classes":
        fresh.reset()
    assert other.restore(fresh) == []
    assert fresh._confusion.sum() == 0
    progress.finish()
    assert not path.exists()


@pytest.mark.slow
def test_test_time_augmentation_is_measured_too(cfg):
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = True, (128, 256), True
    calls = []
    method = Method("augmented")
    model = build_segmentor(cfg, method.weights, method.overrides)
    model.backbone.register_forward_hook(lambda _, inputs, __: calls.append(tuple(inputs[0].shape[2:])))
    assert measure(cfg, DATASET, method, model, limit=1).scores["mIoU"] >= 0
    assert torch.tensor(calls).unique(dim=0).tolist() == [[128, 128], [256, 256]]
