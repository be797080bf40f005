"""Detectron2's evaluator of semantic segmentation under NumPy 2: the one function of Detectron2 that is replaced.

It reads ground truth with ``np.array(..., copy=False)``. NumPy 1 took that for "copy where needed". NumPy 2 takes it
for "never copy", and fails: ``Unable to avoid copy while creating an array as requested.``
"""

from __future__ import annotations

import functools

import numpy as np


def mend_evaluator() -> None:
    """Let Detectron2's ``SemSegEvaluator`` copy the pixels that it reads; nothing changes with an older NumPy."""
    if int(np.__version__.split(".")[0]) < 2:
        return
    from detectron2.evaluation import sem_seg_evaluation

    original = getattr(sem_seg_evaluation, "load_image_into_numpy_array", None)
    if original is None:
        return

    @functools.wraps(original)
    def load_image_into_numpy_array(filename, copy=False, dtype=None):
        return original(filename, copy=True, dtype=dtype)

    sem_seg_evaluation.load_image_into_numpy_array = load_image_into_numpy_array
    # The class holds it as the default of an argument.
    defaults = sem_seg_evaluation.SemSegEvaluator.__init__.__kwdefaults__ or {}
    for name, value in defaults.items():
        if value is original:
            defaults[name] = load_image_into_numpy_array
