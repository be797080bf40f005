"""The thread that works on waiting images."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_d2.service.batching import Batcher


class Recorder:
    """Returns key and value of every image, and records the batches. It waits for ``go`` at the first one."""

    def __init__(self) -> None:
        self.batches, self.go, self.started = [], threading.Event(), threading.Event()

    def __call__(self, key, images):
        self.started.set()
        assert self.go.wait(20)
        self.batches.append((key, [image.shape for image in images]))
        if any(image.flat[0] == 255 for image in images):
            raise ValueError("255 is wrong")
        return [(key, int(image.flat[0])) for image in images]


def image(value: int, side: int = 2) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


@settings(deadline=None, max_examples=50)
@given(
    jobs=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([1, 2, 3]), st.integers(0, 255)), max_size=20),
    most=st.integers(1, 4),
    pixels=st.integers(1, 20),
)
def test_every_image_gets_its_own_result_and_batches_stay_in_bounds(jobs, most, pixels):
    record = Recorder()
    batcher = Batcher(record, most, pixels)
    futures = [batcher.submit(key, image(value, side)) for key, side, value in jobs]
    record.go.set()
    for (key, _, value), future in zip(jobs, futures):
        if value == 255:
            assert str(future.exception(20)) == "255 is wrong"
        else:
            assert future.result(20) == (key, value)
    batcher.close()
    for _, shapes in record.batches:
        assert len({*shapes}) == 1 and len(shapes) <= most
        assert len(shapes) == 1 or len(shapes) * shapes[0][0] * shapes[0][1] <= pixels


def test_what_waits_with_the_same_key_and_size_is_one_batch():
    record = Recorder()
    batcher = Batcher(record)
    batcher.submit("first", image(0))
    record.started.wait(20)
    futures = [batcher.submit(key, image(1, side)) for key, side in [("a", 2), ("b", 2), ("a", 3), ("a", 2), ("b", 2)]]
    record.go.set()
    for future in futures:
        future.result(20)
    assert [(key, len(shapes)) for key, shapes in record.batches] == [("first", 1), ("a", 2), ("b", 2), ("a", 1)]
    batcher.close()


def test_canceled_jobs_are_not_done_and_a_closed_batcher_cancels_the_rest():
    record = Recorder()
    batcher = Batcher(record)
    running = batcher.submit("a", image(1))
    record.started.wait(20)
    canceled, waiting = batcher.submit("b", image(2)), batcher.submit("c", image(3))
    assert canceled.cancel() and not running.cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(20)
    record.go.set()
    closing.join(20)
    assert running.result(20) == ("a", 1) and [key for key, _ in record.batches] == ["a"]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", image(1))
