"""NumPy 2 compatibility of Detectron2's ``SemSegEvaluator``.

The evaluator reads ground truth with ``np.array(..., copy=False)``. In NumPy 1, this means "copy if needed". In NumPy
2, it means "never copy", and fails with ``Unable to avoid copy while creating an array as requested.``
"""

from __future__ import annotations

import functools

import numpy as np


def mend_evaluator() -> None:
    """Patch the image reader of Detectron2's ``SemSegEvaluator`` to copy pixels. No effect with NumPy 1."""
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
    # The class also refers to the function as the default value of an argument.
    defaults = sem_seg_evaluation.SemSegEvaluator.__init__.__kwdefaults__ or {}
    for name, value in defaults.items():
        if value is original:
            defaults[name] = load_image_into_numpy_array
