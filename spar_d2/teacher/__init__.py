"""Teachers, independent of Detectron2: sliding window, single pass, ensembles, and any function."""

from spar_d2.teacher.cache import TargetCache
from spar_d2.teacher.dense_teacher import TEACHER_REGISTRY, DenseTeacher, FunctionTeacher, as_teacher
from spar_d2.teacher.ensemble import EnsembleTeacher, MirroredTeacher, RescaledTeacher
from spar_d2.teacher.refined import SmoothedTeacher, UpsampledTeacher
from spar_d2.teacher.single_pass import SinglePassTeacher
from spar_d2.teacher.sliding import SampledTarget, SlidingWindowTeacher, sliding_window_features
from spar_d2.teacher.windows import WindowPlan

__all__ = [
    "TEACHER_REGISTRY",
    "DenseTeacher",
    "EnsembleTeacher",
    "FunctionTeacher",
    "MirroredTeacher",
    "RescaledTeacher",
    "SampledTarget",
    "SinglePassTeacher",
    "SlidingWindowTeacher",
    "SmoothedTeacher",
    "TargetCache",
    "UpsampledTeacher",
    "WindowPlan",
    "as_teacher",
    "sliding_window_features",
]
