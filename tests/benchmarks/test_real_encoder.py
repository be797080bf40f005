"""The script of docs/real_encoder.md, on drawn frames and random weights."""

import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from benchmarks import real_encoder, real_encoder_features, real_encoder_labels
from reference import reference_image
from spar_d2.encoders import build_encoder

# Small: the script does not depend on the encoder.
TINY = "vit_tiny_patch16_224"


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Flags of the inputs: weights, frames and a photograph."""
    generator = np.random.default_rng(0)
    colors = generator.integers(20, 230, (11, 3))
    for split in ("train", "test"):
        for part in ("images", "labels"):
            (tmp_path / "camvid" / part / split).mkdir(parents=True)
        for number in range(3):
            # All classes: sky above a road, and squares of the others.
            labels = np.zeros((360, 480), np.uint8)
            labels[150 + 30 * number :] = 3
            for place, other in enumerate(set(range(11)) - {0, 3}):
                labels[100:140, 50 * place : 50 * place + 40] = other
            frame = colors[labels] + generator.integers(-9, 9, (360, 480, 1))
            Image.fromarray(frame.astype(np.uint8)).save(tmp_path / f"camvid/images/{split}/{number}.png")
            Image.fromarray(labels).save(tmp_path / f"camvid/labels/{split}/{number}.png")
    (tmp_path / "photos").mkdir()
    Image.fromarray(reference_image(90, 120)).save(tmp_path / "photos/a.png")
    monkeypatch.setattr(real_encoder_features, "ENCODER", TINY)
    weights = build_encoder(real_encoder_features.ENCODER, "").state_dict()
    for name, factor in (("weights", 1.0), ("student", 1.01)):
        save_file({key: factor * tensor for key, tensor in weights.items()}, tmp_path / f"{name}.safetensors")
    flags = ["--weights", "weights.safetensors", "--student", "student.safetensors", "--camvid", "camvid"]
    return [*flags, "--photos", "photos", "--output", "out"]


@pytest.mark.slow
def test_all_tables_and_pictures_are_made_from_features_that_are_computed_once(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, name, pixels in ((real_encoder_features, "WINDOW", 48), (real_encoder, "STRIDE", 32)):
        monkeypatch.setattr(module, name, pixels)
    monkeypatch.setattr(real_encoder_labels, "STEPS", 30)
    arguments = [*inputs, "--sides", "48", "64", "--seeds", "1", "--train-frames", "3", "--test-frames", "2"]
    monkeypatch.setattr(sys, "argv", ["real_encoder", *arguments, "--parts", *real_encoder.PARTS[1:]])
    real_encoder.main()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").rglob("*.safetensors")}
    assert len(stored) == 6 * 5 + 3, "five frames by methods and sizes, and the photograph at one size"
    table = (tmp_path / "out/probe.md").read_text().splitlines()
    assert len(table) == 2 + 6
    # Colors alone tell sky from road.
    assert all(float(row.split("|")[3].split("±")[0]) > 15 for row in table[2:])
    for name, rows in (("distance.md", 2 * 2 + 2), ("seconds.md", 6), ("examples.md", 6 * 3), ("directions.md", 2 * 4)):
        assert len((tmp_path / "out" / name).read_text().splitlines()) == 2 + rows, name
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"features.png", "labels.png"}
    monkeypatch.setattr(sys, "argv", ["real_encoder", *arguments, "--parts", "encode"])
    real_encoder.main()
    assert stored == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").rglob("*.safetensors")}
