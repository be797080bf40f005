#!/usr/bin/env python
"""Rebuild the pictures of README and docs: runs the toy experiments, then writes their pictures to docs/images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from spar_d2.data.datasets.scenes import scenes_root

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
OUTPUT = ROOT / "output"
STUDENT = OUTPUT / "demo" / "student.safetensors"


def run(*words: object) -> None:
    """Run a Python command in the root of the clone; raises ``CalledProcessError`` where it fails."""
    command = [sys.executable, "-W", "ignore::FutureWarning", *map(str, words)]
    print("$", *command[3:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    run("-m", "spar_d2.cli", "toy")
    run(
        *("tools/toy/panoptic.py", "--config-file", "toy/panoptic.yaml", "toy/mask_transformer.yaml"),
        *("--student", STUDENT, "--encoders", "pre-trained", "SPAR student"),
    )
    run("-m", "spar_d2.cli", "probe", "--student", STUDENT, "--output", OUTPUT / "demo_probe")
    # Enlarged, so that the names of classes are readable; it is encoded at its original size.
    with Image.open(scenes_root() / "val" / "0010.png") as scene:
        scene.resize((512, 512), Image.Resampling.LANCZOS).save(OUTPUT / "scene.png")
    run(
        *("-m", "spar_d2.cli", "segment", "--input", OUTPUT / "scene.png", "--config-file", "toy/distill.yaml"),
        *("--weights", STUDENT, "--show", "overlay", "pca", "--output", OUTPUT / "overlay.png"),
        *("--opts", "INPUT.MIN_SIZE_TEST", 256),
    )
    pictures = {
        OUTPUT / "demo" / "pictures" / "predictions.png": "demo_predictions.png",
        OUTPUT / "demo" / "pictures" / "features.png": "demo_features.png",
        OUTPUT / "demo_panoptic" / "panoptic.png": "panoptic.png",
        OUTPUT / "demo_probe" / "predictions.png": "linear_probe.png",
        OUTPUT / "overlay.png": "overlay.png",
    }
    for source, name in pictures.items():
        # 256 colors: a third of the size.
        with Image.open(source) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    print(f"{len(pictures)} pictures written to {IMAGES}")


if __name__ == "__main__":
    main()
