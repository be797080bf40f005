"""Linear probes by the toy config, cut short: precomputed features, the frozen encoder, stopping and resuming."""

import logging
import os
import signal
import time

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from PIL import Image

from processes import run_in_two_processes
from reference import ROOT
from small_trainers import Crash, assert_equal
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine.setup import load_config
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.probing import feature_loader as probing
from spar_d2.probing.feature_store import FILE, FeatureStore, read_features
from spar_d2.probing.trainer import ProbeTrainer
from spar_d2.teacher import SlidingWindowTeacher

SCENES = 5


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def few_scenes(drawn, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(drawn))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, SCENES))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 2))


def config(folder, *overrides):
    folder.mkdir(exist_ok=True)
    short = ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2]
    short += ["INPUT.MIN_SIZE_TRAIN", "(64,)"]
    path = str(ROOT / "configs/toy/linear_probe.yaml")
    return load_config(path, [*short, "DATASETS.TEST", "()", "SEED", 5, "OUTPUT_DIR", str(folder), *overrides])


class Losses(HookBase):
    def __init__(self):
        self.values = []

    def after_step(self):
        self.values.append(self.trainer.storage.latest()["total_loss"][0])


def train(cfg, resume=False, hooks=()):
    # As the tools' set-up does, for the weights of the probe.
    seed_all_rng(cfg.SEED)
    trainer = ProbeTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.losses = Losses()
    trainer.register_hooks([trainer.losses, *hooks])
    trainer.train()
    return trainer


def checkpoint(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.fixture
def own_ctrl_c():
    """Python's handling of Ctrl-C, even after a failed training has changed it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of images that were encoded, call by call."""
    calls, encode = [], ProbeSegmentor.dense_maps
    monkeypatch.setattr(ProbeSegmentor, "dense_maps", lambda self, x: calls.append(len(x)) or encode(self, x))
    return calls


ENCODERS = {
    "OpenCLIP": (),
    "vision only": ("MODEL.SPAR.ENCODER", "vit_nano_patch8_dinov3", "MODEL.SPAR.PRETRAINED", ""),
    "sliding window": ("MODEL.SPAR.INFERENCE", "sliding_window", "SPAR.TEACHER.STRIDE", 40),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ENCODERS)
def test_precomputed_features_train_the_same_probe_up_to_float16(tmp_path, way, encoded):
    """Features are rounded to float16 (11 bits): losses differ by less than 1e-3 of themselves."""
    through = train(config(tmp_path / "a", *ENCODERS[way], "SPAR.PROBE.CACHE_DIR", ""))
    assert sum(encoded) == 12
    encoded.clear()
    kept = train(config(tmp_path / "b", *ENCODERS[way]))
    assert encoded == [1] * SCENES
    np.testing.assert_allclose(kept.losses.values, through.losses.values, rtol=1e-3)
    assert kept.losses.values[-1] < kept.losses.values[0]
    first, second = checkpoint(tmp_path / "a")["model"], checkpoint(tmp_path / "b")["model"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=5e-3, atol=5e-4)


@pytest.mark.slow
def test_existing_features_give_the_same_probe_bit_for_bit(tmp_path, encoded):
    folder = ["SPAR.PROBE.CACHE_DIR", str(tmp_path / "features")]
    train(config(tmp_path / "a", *folder))
    encoded.clear()
    train(config(tmp_path / "b", *folder, "DATALOADER.NUM_WORKERS", 1))
    assert encoded == []
    assert_equal(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


@pytest.mark.slow
def test_stored_features_equal_those_of_the_encoder_and_of_the_sliding_window(tmp_path):
    for way in ("OpenCLIP", "sliding window"):
        cfg = config(tmp_path / "run", "INPUT.MIN_SIZE_TRAIN", "(0,)", *ENCODERS[way])
        model = build_model(cfg)
        encoder = model.backbone.encoder
        records = DatasetCatalog.get("spar_scenes_train")
        kept = probing.keep_features(cfg, model, records, str(tmp_path / "features"))
        assert [record["file_name"] for record in kept] == [record["file_name"] for record in records]
        for record in kept[:2]:
            image = torch.from_numpy(np.array(Image.open(record["file_name"]))).permute(2, 0, 1)
            x = model.encoder_input(image)
            wanted = encoder(x) if way == "OpenCLIP" else SlidingWindowTeacher(encoder, None, 40, 128)(x)
            found = read_features(record[FILE])
            assert found.dtype == torch.float16
            assert torch.equal(found, wanted[0].detach().half())


@pytest.mark.slow
def test_the_encoder_never_changes_and_stays_in_eval_mode(tmp_path):
    for number, overrides in enumerate(((), ("SPAR.PROBE.CACHE_DIR", ""))):
        cfg = config(tmp_path / str(number), *overrides)
        before = build_model(cfg).backbone.state_dict()
        trainer = train(cfg)
        backbone = trainer.model.train().backbone
        assert not any(module.training for module in backbone.encoder.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
        written = checkpoint(tmp_path / str(number))["model"]
        assert all(torch.equal(written[f"backbone.{name}"], tensor) for name, tensor in before.items())


def test_counts_of_parameters_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="spar_d2"):
        trainer = ProbeTrainer(config(tmp_path / "run"))
    rows = {line.split()[0]: line.split()[1:] for line in caplog.text.splitlines() if "trainable" in line}
    frozen = sum(p.numel() for p in trainer.model.backbone.parameters())
    assert rows["sem_seg_head"][:3] == ["1,933", "of", "1,933"]
    assert rows["backbone.encoder"][:3] == ["0", "of", f"{frozen:,}"]


AUGMENTED = ("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", "(64, 96)")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), AUGMENTED, ("MODEL.SPAR.TRAINABLE", "last_blocks:1")])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, overrides):
    train(config(tmp_path / "through", *overrides))
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path / "stopped", *overrides), hooks=[Crash(5)])
    resumed = train(config(tmp_path / "stopped", *overrides), resume=True)
    assert resumed.start_iter == 4
    assert_equal(checkpoint(tmp_path / "through"), checkpoint(tmp_path / "stopped"))


@pytest.mark.slow
def test_features_computed_before_ctrl_c_are_kept_for_the_next_run(tmp_path, encoded, monkeypatch, own_ctrl_c):
    cfg = config(tmp_path / "run")
    keep = FeatureStore.keep

    def keep_and_stop(self, *arguments):
        keep(self, *arguments)
        if len(encoded) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "keep", keep_and_stop)
        trainer = train(cfg)
    assert (trainer.iter, len(encoded), trainer.losses.values) == (0, 3, [])
    encoded.clear()
    assert len(train(cfg).losses.values) == 6
    assert encoded == [1] * (SCENES - 3)


def features_of(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_damaged_missing_or_outdated_features_are_recomputed(tmp_path, encoded, drawn, caplog):
    cfg = config(tmp_path / "run", "SOLVER.MAX_ITER", 3)
    train(cfg)
    folder = tmp_path / "run" / "features"
    (index,) = folder.rglob("index_*.json")
    encoded.clear()
    index.write_text("{")
    train(cfg)
    assert encoded == [] and "is corrupt" in caplog.text

    damaged = features_of(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    with pytest.raises(RuntimeError, match=rf"SPAR\.PROBE\.CACHE_DIR: {damaged} .*--resume"):
        train(cfg)
    damaged.unlink()
    train(cfg)
    assert encoded == [1]

    encoded.clear()
    (image,) = (DatasetCatalog.get("spar_scenes_train")[i]["file_name"] for i in [1])
    before = Image.open(image).copy()
    Image.fromarray(255 - np.asarray(before)).save(image)
    train(cfg)
    before.save(image)
    assert encoded == [1]


@pytest.mark.slow
def test_features_are_stored_per_image_size_encoder_and_inference_mode(tmp_path, encoded):
    cfg = config(tmp_path / "run", "SOLVER.MAX_ITER", 1)
    changes = [(), ("INPUT.MIN_SIZE_TRAIN", "(72,)"), ENCODERS["sliding window"], ENCODERS["vision only"], ()]
    counts = []
    for change in changes:
        encoded.clear()
        own = cfg.clone()
        own.merge_from_list(list(change))
        train(own)
        counts.append(len(encoded))
    assert counts == [SCENES] * 4 + [0]


OBSTACLES = [
    (["INPUT.CROP.ENABLED", True], r"INPUT\.CROP\.ENABLED .*False"),
    (["INPUT.RANDOM_FLIP", "horizontal"], r"INPUT\.RANDOM_FLIP .*got \'horizontal\'"),
    (["INPUT.MIN_SIZE_TRAIN", "(64, 96)"], r"INPUT\.MIN_SIZE_TRAIN .*got \(64, 96\)"),
    (["MODEL.SPAR.TRAINABLE", "last_blocks:1"], r"MODEL\.SPAR\.TRAINABLE .*got \'last_blocks:1\'"),
    (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], r"MODEL\.META_ARCHITECTURE .*ProbeSegmentor"),
    (["SPAR.DISTILL.ENABLED", True], r"SPAR\.DISTILL\.ENABLED .*False"),
    (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], r"DATALOADER\.SAMPLER_TRAIN .*TrainingSampler"),
]


@pytest.mark.parametrize(("keys", "message"), OBSTACLES)
def test_a_cache_folder_for_features_that_cannot_be_precomputed_is_an_error(tmp_path, keys, message):
    cfg = config(tmp_path / "run", *keys, "SPAR.PROBE.CACHE_DIR", str(tmp_path / "features"))
    with pytest.raises(ValueError, match=rf"SPAR\.PROBE\.CACHE_DIR .*{message}"):
        ProbeTrainer(cfg)
    assert len(probing.obstacles(cfg)) == 1


def test_without_a_cache_folder_the_log_explains_why_features_are_not_precomputed(tmp_path, encoded, caplog):
    with caplog.at_level(logging.INFO, logger="spar_d2"):
        train(config(tmp_path / "run", "INPUT.RANDOM_FLIP", "horizontal", "SOLVER.MAX_ITER", 1))
    assert 'features are not precomputed (INPUT.RANDOM_FLIP must be "none", got ' in caplog.text
    assert sum(encoded) == 2 and not (tmp_path / "run" / "features").exists()


@pytest.mark.slow
def test_detectron2s_own_segmentor_is_trained_and_tested(tmp_path):
    run = ["DATASETS.TEST", "('spar_scenes_tune',)", "SOLVER.MAX_ITER", 2]
    trainer = train(config(tmp_path / "run", *run, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"))
    assert 0 < trainer.scores["sem_seg"]["pACC"] < 100
    ours = build_model(config(tmp_path / "run"))
    ours.load_state_dict(checkpoint(tmp_path / "run")["model"])


def test_too_little_disk_space_is_reported_before_features_are_computed(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(probing, "RESERVE", 1 << 60)
    with pytest.raises(RuntimeError, match=r'SPAR\.PROBE\.CACHE_DIR: .*0\.0 GiB.*""'):
        train(config(tmp_path / "run"))
    assert encoded == []


def test_a_full_disk_is_an_error_that_names_the_key(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr("spar_d2.teacher.cache.RESERVE", 1 << 60)
    with pytest.raises(RuntimeError, match=r"SPAR\.PROBE\.CACHE_DIR: .* GiB free"):
        train(config(tmp_path / "run"))
    assert encoded == [1]


def test_a_file_instead_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"SPAR\.PROBE\.CACHE_DIR .*got .*file"):
        train(config(tmp_path / "run", "SPAR.PROBE.CACHE_DIR", str(tmp_path / "file")))


def test_nonfinite_features_are_reported_with_their_image(tmp_path, monkeypatch):
    monkeypatch.setattr(ProbeSegmentor, "dense_maps", lambda self, x: torch.full((1, 128, 2, 2), torch.nan))
    with pytest.raises(FloatingPointError, match=r"train/0000\.png"):
        train(config(tmp_path / "run"))


def test_labels_of_another_size_than_their_image_are_an_error(tmp_path, monkeypatch):
    records = DatasetCatalog.get("spar_scenes_train")
    with Image.open(records[0]["sem_seg_file_name"]) as labels:
        labels.resize((40, 40)).save(tmp_path / "small.png")
    broken = [{**record, "sem_seg_file_name": str(tmp_path / "small.png")} for record in records]
    monkeypatch.setitem(DatasetCatalog.data, "spar_scenes_train", lambda: broken)
    with pytest.raises(ValueError, match="40x40 .*5x5"):
        train(config(tmp_path / "run", "INPUT.MIN_SIZE_TRAIN", "(0,)"))


def keep_half(rank, folder):
    torch.set_num_threads(1)
    cfg = config(folder / "run")
    calls, encode = [], ProbeSegmentor.dense_maps
    ProbeSegmentor.dense_maps = lambda self, x: calls.append(len(x)) or encode(self, x)
    SCENE_SPLITS["train"] = (101, SCENES)
    records = DatasetCatalog.get("spar_scenes_train")
    kept = probing.keep_features(cfg, build_model(cfg), records, str(folder / "features"))
    assert len(calls) == len(records[rank::2])
    assert all(os.path.isfile(record[FILE]) for record in kept)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_share_the_images(tmp_path, encoded):
    run_in_two_processes(keep_half, tmp_path)
    cfg = config(tmp_path / "run")
    records = DatasetCatalog.get("spar_scenes_train")
    probing.keep_features(cfg, build_model(cfg), records, str(tmp_path / "features"))
    assert encoded == []
