"""A run killed at many moments and resumed after each, beside the same run without a stop.

    python tests/kill_and_resume.py --kills 20 --seed 0

Exit code 1 where anything differs or is left over.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from processes import start_tool
from reference import ROOT, TINY_CONFIG, fill_with_reference, reference_image

CONFIG = str(ROOT / "configs" / "distill" / "Base-distill.yaml")
STEPS, PERIOD, KEPT = 20, 2, 2
# Of the folders that `spar_d2.utils.io.atomic_write` writes in.
TEMPORARY = re.compile(r"\..*\.tmp(\.|$)")
# Prefixes of temporary folders, by the kind of the file.
TARGETS = {
    "checkpoint": r"\.model_\d",
    "last_checkpoint": r"\.last_checkpoint\.",
    "final checkpoint": r"\.model_final\.",
    "student": r"\.student\.",
    "cache entry": r"\.[0-9a-f]{32}\.",
}
_SMALL = ("cache entry", "last_checkpoint")
# Windows that the teacher encoded: those of targets that were in the cache already are not encoded again.
_MAY_DIFFER = "trainer.hooks.DistillationHook.windows_encoded"


@dataclass
class Training:
    """A short distillation with the tiny CLIP: where it reads, and where it writes."""

    world: Path
    output: Path

    @property
    def cache(self) -> Path:
        return self.output.with_name(f"{self.output.name}-cache")

    def overrides(self) -> list[str]:
        pairs = {
            "MODEL.DEVICE": "cpu",
            "MODEL.SPAR.ENCODER": self.world / "tiny.json",
            "MODEL.SPAR.PRETRAINED": self.world / "weights.safetensors",
            "MODEL.SPAR.PRECISION": "float32",
            "SPAR.DATA.IMAGES": self.world / "photos",
            "SPAR.DATA.SCALE_BOX": "(192,96)",
            "SPAR.DATA.MIN_SHORT_SIDE": 64,
            "SPAR.DATA.CROP_MIN_SIDE": 48,
            "SPAR.DATA.FROZEN": True,
            "SPAR.TEACHER.WINDOWS_PER_IMAGE": 0,
            "SPAR.TEACHER.STRIDE": 24,
            "SPAR.TEACHER.CACHE_DIR": self.cache,
            "SPAR.EMA_DECAY": 0.9,
            "SPAR.KEEP_CHECKPOINTS": KEPT,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.BASE_LR": 1e-3,
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
            "SOLVER.WARMUP_ITERS": 5,
            "SOLVER.MAX_ITER": STEPS,
            "SOLVER.CHECKPOINT_PERIOD": PERIOD,
            "DATALOADER.NUM_WORKERS": 1,
            "SEED": 3,
            "OUTPUT_DIR": self.output,
        }
        return [str(word) for pair in pairs.items() for word in pair]

    def start(self) -> Process:
        return Process(self)

    def temporaries(self) -> list[Path]:
        """Folders of files that are being written, or were when their writer was killed."""
        return [path for folder in (self.output, self.cache) for path in _temporaries(folder)]

    def finished(self) -> str:
        """The name in ``last_checkpoint``; "none" if there is no such file."""
        last = self.output / "last_checkpoint"
        return last.read_text() if last.exists() else "none"

    def next_iteration(self) -> int:
        """The iteration to resume from."""
        name = self.finished()
        return int(name[6:13]) + 1 if name[6:13].isdigit() else {"none": 0, "model_final.pth": STEPS}[name]


class Process:
    """``tools/train_net.py --resume``, with its data-loading worker in a separate process group."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.log = training.output.with_name(f"{training.output.name}.log")
        arguments = ["--resume", "--config-file", CONFIG, *training.overrides()]
        self.log.write_bytes(b"")
        # One thread, so that sums are always taken in the same order.
        tool, environment = ROOT / "tools" / "train_net.py", {"OMP_NUM_THREADS": "1"}
        self._process = start_tool(tool, arguments, self.log, environment)
        atexit.register(self.kill)

    def begin(self) -> int | None:
        """The iteration that it said it starts from."""
        found = re.search(rb"Starting training from iteration (\d+)", self.log.read_bytes())
        return int(found[1]) if found else None

    def running(self) -> bool:
        return self._process.is_alive()

    def wait_for_training(self, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while self.running() and self.begin() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def kill(self) -> bool:
        """Kill it with all its processes; False where it had ended by itself."""
        if not self.running():
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        return True

    def end(self, limit: float = 300) -> None:
        """Wait until it has ended, which must be well.

        Raises:
            RuntimeError: it failed.
        """
        self._process.join(limit)
        if self._process.exitcode != 0:
            raise RuntimeError(f"the training failed with {self._process.exitcode}:\n{self.log.read_text()[-3000:]}")


@dataclass
class Moment:
    """When to kill.

    Attributes:
        aim: "start" (before the training began), "training" (any time in it), or what is being written, of ``TARGETS``.
        seconds: from the start of the process or of the training.
        sighting: which of the files that are written to kill at.
        size: in bytes, that the file has reached.
        limit: seconds of training after which it is killed anyway.
    """

    aim: str
    seconds: float = 0.0
    sighting: int = 1
    size: int = 0
    limit: float = 30.0

    def __str__(self) -> str:
        return f"{self.aim} from {self.size} bytes" if self.aim in TARGETS else f"{self.aim} + {self.seconds:.2f} s"

    def earlier(self) -> Moment:
        """One that is met more easily."""
        return replace(self, seconds=self.seconds / 2, size=self.size // 2)

    def wait(self, process: Process) -> None:
        if self.aim != "start":
            process.wait_for_training()
        if self.aim in TARGETS:
            self._wait_for_writing(process)
        deadline = time.monotonic() + self.seconds
        while process.running() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _wait_for_writing(self, process: Process) -> None:
        folder = process.training.cache if self.aim == "cache entry" else process.training.output
        name, seen, deadline = re.compile(TARGETS[self.aim]), set(), time.monotonic() + self.limit
        while process.running() and time.monotonic() < deadline:
            # Without a pause: a file is written in some milliseconds.
            there = (path for path in _temporaries(folder) if name.match(path.name))
            seen.update(path.name for path in there if _size(path) >= self.size)
            if len(seen) >= self.sighting:
                return


def draw_moments(kills: int, generator: random.Random) -> list[Moment]:
    """Moments of all kinds in an order that makes sense: the last files are written last."""
    weights = {"training": 5, "checkpoint": 5, "cache entry": 4, "start": 3, "last_checkpoint": 2}
    last = ["final checkpoint", "student"][: kills // 5]
    # Each kind in its share, then in any order.
    kinds = [kind for kind, weight in weights.items() for _ in range(weight)]
    kinds = [kinds[i * len(kinds) // (kills - len(last))] for i in range(kills - len(last))]
    generator.shuffle(kinds)
    return [_moment(kind, generator) for kind in [*kinds, *last]]


def _moment(kind: str, generator: random.Random) -> Moment:
    if kind in ("start", "training"):
        return Moment(kind, generator.uniform(0, 6 if kind == "start" else 1))
    sighting = 1 if kind in ("final checkpoint", "student") else generator.randint(1, 3)
    # Empty, half-written or complete, but not yet in its place.
    size = generator.choice([0, 1, 1]) * generator.randint(1, 4_000_000 if kind not in _SMALL else 1)
    return Moment(kind, sighting=sighting, size=size)


@dataclass
class Kill:
    """State of a run when it was killed.

    Attributes:
        moment: that was aimed at.
        begin: iteration that the process started from; None where it had not come to that.
        finished: what ``last_checkpoint`` named.
        left: the temporary folders that it leaves, and their sizes in bytes.
        wrong: what should not be.
    """

    moment: Moment
    begin: int | None
    finished: str
    left: dict[str, int]
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        begun = "not training yet" if self.begin is None else f"training from iteration {self.begin}"
        left = ", ".join(f"{name} ({size} bytes)" for name, size in self.left.items()) or "none"
        wrong = "".join(f"\n  WRONG: {line}" for line in self.wrong)
        return f"{self.moment!s:36} {begun}, last checkpoint {self.finished}, temporary folders: {left}{wrong}"


def killed(training: Training, moments: list[Moment], most: int) -> Iterator[Kill]:
    """Start, kill at the next moment, start again, ... until ``most`` kills are done or the training has ended.

    Moments that were met are taken off the list.
    """
    for _ in range(most):
        if not moments:
            return
        due, before = training.next_iteration(), training.temporaries()
        process = training.start()
        moments[0].wait(process)
        if not process.kill():
            process.end()
            moments[0] = moments[0].earlier()
            return
        left = {path.name: _size(path) for path in training.temporaries() if path not in before}
        kill = Kill(moments.pop(0), process.begin(), training.finished(), left)
        if kill.begin not in (None, due):
            kill.wrong.append(f"it went on from iteration {kill.begin} instead of {due}")
        kill.wrong += damaged(training)
        yield kill


def damaged(training: Training) -> list[str]:
    """Unreadable files of a run, except temporary ones."""
    wrong = []
    last = training.finished()
    if last != "none" and not (training.output / last).is_file():
        wrong.append(f"last_checkpoint names {last}, which is not there")
    for path in training.output.glob("[!.]*.pth"):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # junk makes torch raise almost anything
            wrong.append(f"{path.name} cannot be loaded: {error}")
    metrics = training.output / "metrics.json"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            json.loads(line)
        except ValueError:
            wrong.append(f"a line of metrics.json is cut off: {line!r}")
    return wrong + damaged_entries(training)


def damaged_entries(training: Training) -> list[str]:
    """Entries of the cache that it would not take."""
    from spar_d2.engine.setup import load_config
    from spar_d2.modeling.build import teacher_from_config
    from spar_d2.teacher import TargetCache
    from spar_d2.utils.content_cache import ContentCache

    # In a separate cache, because opening one removes temporary folders, which are counted first.
    with tempfile.TemporaryDirectory() as folder:
        cache = TargetCache(folder, teacher_from_config(load_config(CONFIG, training.overrides())))
    kept = ContentCache(training.cache, **cache.metadata)
    entries = training.cache.rglob("[!.]*.safetensors")
    return [f"the cache entry {path} is damaged" for path in entries if not kept.load(str(path), dict)]


def _entries(training: Training) -> dict[str, dict[str, torch.Tensor]]:
    # Not compared by their bytes: safetensors writes metadata in any order.
    return {str(p.relative_to(training.cache)): load_file(p) for p in training.cache.rglob("[!.]*.safetensors")}


def differences(ours: object, theirs: object, name: str = "") -> list[str]:
    """Names of the entries that differ in two nested structures of tensors and plain values."""
    if type(ours) is not type(theirs):
        return [name]
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
        return [] if same else [name]
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{name} (keys)"]
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{name}.{key}".lstrip("."))]
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{name} (length)"]
        return [d for i, (a, b) in enumerate(zip(ours, theirs)) for d in differences(a, b, f"{name}.{i}")]
    return [] if ours == theirs else [name]


def compare(training: Training, whole: Training) -> list[str]:
    """Differences between a run that was killed and resumed and an uninterrupted one."""
    wrong = [f"the temporary folder {path} is left" for path in training.temporaries()]
    names = [sorted(path.name for path in run.output.glob("[!.]*.pth")) for run in (training, whole)]
    if names[0] != names[1]:
        wrong.append(f"checkpoints {names[0]} instead of {names[1]}")
    if training.finished() != whole.finished():
        wrong.append(f"last_checkpoint names {training.finished()} instead of {whole.finished()}")
    for name in set(names[0]) & set(names[1]):
        ours, theirs = (torch.load(run.output / name, weights_only=True) for run in (training, whole))
        wrong += [f"{name}: {d} differs" for d in differences(ours, theirs) if d != _MAY_DIFFER]
    ours, theirs = (_entries(run) for run in (training, whole))
    wrong += [f"cache entry {d} differs" for d in differences(ours, theirs)]
    students = [(run.output / "student.safetensors") for run in (training, whole)]
    if not all(path.exists() for path in students) or students[0].read_bytes() != students[1].read_bytes():
        wrong.append("student.safetensors differs")
    return wrong + damaged(training)


def shortened(lines: list[str], most: int = 10) -> str:
    """The first of some lines, and how many there are."""
    return "\n".join(lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else []))


def make_world(folder: Path, photos: int = 28) -> Path:
    """The tiny CLIP as files, and photos of different sizes; more than are drawn before the middle of the training."""
    import open_clip

    from spar_d2.encoders.weights import write_safetensors

    (folder / "photos").mkdir(parents=True)
    (folder / "tiny.json").write_text(json.dumps(TINY_CONFIG))
    write_safetensors(fill_with_reference(open_clip.CLIP(**TINY_CONFIG)).state_dict(), folder / "weights.safetensors")
    for number in range(photos):
        height, width = 64 + number * 37 % 64, 64 + number * 53 % 96
        Image.fromarray(reference_image(height, width, number)).save(folder / "photos" / f"{number:02d}.png")
    return folder


def check(
    folder: Path, moments: list[Moment], per_run: int = 8, show: Callable[[str], None] = print
) -> tuple[list[Kill], list[str]]:
    """Kill runs at the moments, at most ``per_run`` times each, and compare them with one that is not killed.

    Args:
        folder: for all files.
        show: is given a line for each kill and each run.

    Returns:
        The kills, and what was found wrong.
    """
    world, started, total = make_world(folder / "world"), time.monotonic(), len(moments)
    whole = Training(world, folder / "whole")
    first, moments = whole.start(), list(moments)
    kills, wrong = [], []
    runs = 0
    while moments:
        runs += 1
        training = Training(world, folder / f"killed{runs}")
        for kill in killed(training, moments, per_run):
            kills.append(kill)
            wrong += kill.wrong
            left = (time.monotonic() - started) / len(kills) * (total - len(kills))
            show(f"kill {len(kills)}/{total} (run {runs}, about {left:.0f} s left): {kill}")
        training.start().end()
        first.end()
        found = compare(training, whole)
        show(f"run {runs} has ended: {shortened(found) or 'the same as the run without a stop'}")
        wrong += found
    return kills, wrong


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; -1 if the folder is gone, because its file is complete and has its own name."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return -1


def _temporaries(folder: str | os.PathLike) -> Iterator[Path]:
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            if TEMPORARY.match(name):
                yield Path(parent, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and their order")
    parser.add_argument("--output", type=Path, help="new folder for all files (default: a temporary one)")
    args = parser.parse_args()
    moments, started = draw_moments(args.kills, random.Random(args.seed)), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        kills, wrong = check(args.output or Path(temporary), moments, show=lambda line: print(line, flush=True))
    aimed = [kill for kill in kills if kill.moment.aim in TARGETS]
    met = [kill for kill in aimed if any(re.match(TARGETS[kill.moment.aim], path) for path in kill.left)]
    seconds = time.monotonic() - started
    print(f"{len(kills)} kills in {seconds:.0f} s; {len(met)} of {len(aimed)} aimed at a file met it unfinished")
    print(shortened(wrong) or "nothing differs and nothing is left over")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
