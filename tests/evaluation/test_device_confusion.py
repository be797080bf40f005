"""Counting on the device against counting in numpy."""

import numpy as np
import pytest
import torch

from spar_d2.evaluation.confusion_matrix import confusion_matrix
from spar_d2.evaluation.device_confusion import DeviceConfusion


@pytest.mark.parametrize("classes", [1, 2, 19, 150, 300])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_counts_are_those_of_numpy(classes, dtype):
    rng = np.random.default_rng(classes)
    counter = DeviceConfusion(classes, 255, torch.device("cpu"))
    expected = np.zeros((classes, classes + 1), dtype=np.int64)
    for size in ((1, 1), (7, 13), (64, 48)):
        top = min(classes + 5, np.iinfo(dtype).max)
        truth = rng.integers(0, top, size).astype(dtype)
        truth[0, 0] = 255
        prediction = rng.integers(-1, classes + 3, size)
        counter.add(torch.from_numpy(prediction), truth)
        expected += confusion_matrix(prediction, truth, classes, 255)
    assert np.array_equal(counter.total(), expected)
