"""The sliding-window teacher, in plain PyTorch."""

from spar_d2.teacher.sliding import SampledTarget, SlidingWindowTeacher, sliding_window_features
from spar_d2.teacher.windows import WindowPlan

__all__ = ["SampledTarget", "SlidingWindowTeacher", "WindowPlan", "sliding_window_features"]
