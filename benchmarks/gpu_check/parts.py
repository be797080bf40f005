"""Parts of the check, most important first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: name on the command line.
        about: short description.
        seconds: time limit, if all parts use the default time limit.
        function: "module.function" in this package, called with a record and the settings.
        is_check: whether the part checks correctness. Otherwise, it only measures.
    """

    name: str
    about: str
    seconds: int
    function: str
    is_check: bool = False

    def load(self) -> Callable[[Record, Settings], None]:
        """Import and return the function. Its module may need Detectron2."""
        module, _, name = self.function.partition(".")
        return getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)


PARTS = (
    Part("features", "encoders vs. CPU, other precisions, attention kernels", 40, "features.check_features", True),
    Part("targets", "teacher and gradients vs. CPU, reproducibility", 40, "targets.check_targets", True),
    Part("labels", "post-processing vs. CPU", 30, "labels.check_labels", True),
    Part("compiled", "torch.compile vs. eager", 55, "compiled.check_compiled", True),
    Part("panoptic", "MaskTransformer vs. CPU, speed beside PanopticFPN", 40, "panoptic.check_panoptic", True),
    Part("speed-encoders", "single passes vs. the libraries", 60, "speed.measure_encoders"),
    Part("speed-teacher", "teacher vs. straightforward implementation and student", 55, "speed.measure_teachers"),
    Part("speed-labels", "labels vs. full maps, evaluator vs. Detectron2's", 30, "speed.measure_labels"),
    Part("speed-refinement", "refinement vs. all of an image at once", 20, "speed.measure_refinements"),
    Part("distillation", "training with the sampled recipes", 65, "distillation.measure_distillations"),
    Part("demo", "scores of the demo vs. CPU", 45, "demo.run_demo", True),
    Part("torchrun", "NCCL, Ctrl-C and --resume", 55, "torchrun.check_torchrun", True),
)
# Default time limit of all parts together, in minutes.
MINUTES = sum(part.seconds for part in PARTS) / 60


def find(names: list[str]) -> list[Part]:
    """Return parts by name, in order of importance; all parts if no names are given.

    Raises:
        ValueError: a name is unknown.
    """
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--parts must be out of {', '.join(known)}; got {', '.join(unknown)}")
    return [part for part in PARTS if part.name in names or not names]
