"""A training under torchrun with one process, which is stopped by Ctrl-C and resumed."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.data_loading import draw_photos
from benchmarks.gpu_check.checks import COMPARISONS, FACTS, LIMITS, Fact, compare, without_tf32
from benchmarks.gpu_check.children import child
from benchmarks.gpu_check.features import examples
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import ROOT, TINY, Settings
from benchmarks.passes import random_image
from spar_d2.encoders import DenseEncoder, set_trainable
from spar_d2.engine.trainer import STUDENT_FILE

TITLE = "Stopped and resumed under torchrun"
_CONFIG = ROOT / "configs" / "distill" / "openclip_vit_b_16_sampled.yaml"
_PHOTOS = 4
# Longer than any check: the training is stopped.
_MANY_STEPS = 1_000_000
_PATIENCE = 60
_CHECKPOINT = re.compile(r"model_(\d+)\.pth")


def check_torchrun(record: Record, settings: Settings) -> None:
    """Check collectives and gradients in a group of one process; then train, stop and resume under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        _check_group(record, settings, folder)
        photos = folder / "photos"
        photos.mkdir()
        list(draw_photos(photos, _PHOTOS, (240, 160)))
        _check_training(record, settings, photos, folder / "run")


def _check_group(record: Record, settings: Settings, folder: Path) -> None:
    device = settings.device
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        numbers = torch.arange(8.0, device=device)
        dist.all_reduce(numbers)
        found = numbers.tolist()
        question = "all_reduce over one process changes nothing"
        record.add(TITLE, FACTS, Fact(backend, question, str(found), found == list(range(8))))
        name, encoder = next(examples())
        with without_tf32():
            single = _gradient(encoder.to(device), False)
            wrapped = _gradient(copy.deepcopy(encoder), True)
        compared = "gradients with DistributedDataParallel and without"
        found = compare(f"{name}, {backend}", compared, wrapped, single, LIMITS["float32"], dim=0)
        record.add("Gradients in a group of processes", COMPARISONS, found)
    finally:
        dist.destroy_process_group()


def _gradient(encoder: DenseEncoder, parallel: bool) -> torch.Tensor:
    set_trainable(encoder, "last_blocks:2")
    device = next(encoder.parameters()).device
    devices = [device.index or 0] if device.type == "cuda" else None
    model = DistributedDataParallel(encoder, device_ids=devices) if parallel else encoder
    features = model(random_image(64, 80, device))
    # Different weights for all features: a last norm would keep the mean square constant.
    (features * torch.linspace(-1, 1, features.numel(), device=device).view_as(features)).mean().backward()
    found = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad(set_to_none=True)
    return torch.cat(found)


def _check_training(record: Record, settings: Settings, photos: Path, output: Path) -> None:
    logs = record.path.parent / "torchrun"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    overrides = {
        "MODEL.DEVICE": settings.device.type,
        "MODEL.SPAR.PRETRAINED": "",
        "SPAR.DATA.IMAGES": photos,
        "SPAR.PICTURE_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": 1,
        "SEED": 0,
        "OUTPUT_DIR": output,
    }
    arguments = [*TINY, *(item for pair in overrides.items() for item in pair)]
    tool = [*launcher, str(ROOT / "tools" / "train_net.py"), "--config-file", str(_CONFIG)]
    with child(
        [*tool, *map(str, arguments), "SOLVER.MAX_ITER", str(_MANY_STEPS)], logs / "stopped.log", ROOT
    ) as process:
        _wait_for_steps(output / "metrics.json", process)
        process.send_signal(signal.SIGINT)
        process.wait(_PATIENCE)
    last = output / "last_checkpoint"
    name = last.read_text() if last.is_file() else "none"
    matched = _CHECKPOINT.fullmatch(name)
    valid = matched is not None and (output / name).is_file()
    record.add(TITLE, FACTS, Fact("Ctrl-C", "a checkpoint is written", name, valid))
    if not valid:
        return
    iteration = int(matched[1]) + 1
    log = logs / "resumed.log"
    steps = ["SOLVER.MAX_ITER", str(iteration + settings.resumed_steps)]
    with child([*tool, "--resume", *map(str, arguments), *steps], log, ROOT) as process:
        code = process.wait()
    match = re.search(r"Starting training from iteration (\d+)", log.read_text(errors="replace"))
    found = match[1] if match else "none"
    record.add(TITLE, FACTS, Fact("--resume", f"goes on from iteration {iteration}", found, found == str(iteration)))
    finished = last.read_text()
    ended = code == 0 and (output / STUDENT_FILE).is_file()
    question = "ends well, with a student"
    record.add(TITLE, FACTS, Fact("--resume", question, f"exit code {code}, {finished}", ended))


def _wait_for_steps(metrics: Path, process: subprocess.Popen) -> None:
    """Wait until a training has written metrics.

    Raises:
        RuntimeError: the training ended before.
    """
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"the training under torchrun ended with exit code {process.returncode}, see its log")
        time.sleep(0.1)
