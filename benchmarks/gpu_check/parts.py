"""The parts of the check, most important first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings


@dataclass(frozen=True)
class Part:
    """One of the parts.

    Attributes:
        name: as on the command line.
        about: what it does, in a few words.
        seconds: its share of the time, where all parts have the default together.
        function: "module.function" within this room, of a record and the settings.
        is_check: whether it says what is right; without it, nothing is known to be.
    """

    name: str
    about: str
    seconds: int
    function: str
    is_check: bool = False

    def load(self) -> Callable[[Record, Settings], None]:
        """The function; its module, which may need Detectron2, is imported only now."""
        module, _, name = self.function.partition(".")
        return getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)


PARTS = (
    Part("features", "encoders beside a CPU, other precisions, attention kernels", 45, "features.check_features", True),
    Part("targets", "the teacher and gradients beside a CPU, the same bits twice", 45, "targets.check_targets", True),
    Part("labels", "from features to labels beside a CPU", 30, "labels.check_labels", True),
    Part("compiled", "torch.compile beside plain code", 55, "compiled.check_compiled", True),
    Part("speed-encoders", "single passes beside the libraries' own", 90, "speed.measure_encoders"),
    Part("speed-teacher", "the teacher beside the straightforward way and the student", 60, "speed.measure_teachers"),
    Part("speed-labels", "labels beside full maps, the evaluator beside Detectron2's", 30, "speed.measure_labels"),
    Part("distillation", "training by the sampled recipes", 80, "distillation.measure_distillations"),
    Part("demo", "the demo's scores beside a CPU's", 45, "demo.run_demo", True),
    Part("torchrun", "NCCL, Ctrl-C and --resume", 55, "torchrun.check_torchrun", True),
)
# Minutes that all parts together may take.
MINUTES = sum(part.seconds for part in PARTS) / 60


def find(names: list[str]) -> list[Part]:
    """The parts of those names, in the order of importance; all of them where none is named.

    Raises:
        ValueError: a name that is no part's.
    """
    known = {part.name: part for part in PARTS}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"--parts must be of {', '.join(known)}; got {', '.join(wrong)}")
    return [part for part in PARTS if part.name in names or not names]
