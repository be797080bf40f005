"""The sliding-window teacher, independent of Detectron2."""

from spar_d2.teacher.cache import TargetCache
from spar_d2.teacher.sliding import SampledTarget, SlidingWindowTeacher, sliding_window_features
from spar_d2.teacher.windows import WindowPlan

__all__ = ["SampledTarget", "SlidingWindowTeacher", "TargetCache", "WindowPlan", "sliding_window_features"]
