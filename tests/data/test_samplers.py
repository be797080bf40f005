import itertools

import pytest

from spar_d2.data.samplers import ResumableBatchSampler as Sampler


def take(sampler: Sampler, batches: int) -> list:
    return list(itertools.islice(sampler, batches))


@pytest.mark.parametrize(("size", "batch"), [(7, 2), (10, 4), (3, 5), (1, 1)])
def test_every_epoch_draws_every_photo_once_in_another_order(size, batch):
    draws = [draw for batch in take(Sampler(size, batch, seed=3), 12 * size // batch + 1) for draw in batch]
    assert [draw.position for draw in draws] == list(range(len(draws)))
    orders = set()
    for epoch in range(10):
        part = [draw for draw in draws if draw.epoch == epoch]
        assert sorted(draw.index for draw in part) == list(range(size))
        orders.add(tuple(draw.index for draw in part))
    assert len(orders) > 1 or size == 1


def test_the_order_follows_the_seed():
    first, same, other = (take(Sampler(50, 4, seed), 20) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("start", [0, 1, 5, 17])
def test_the_sampler_can_start_at_any_batch(start):
    through = take(Sampler(10, 4, seed=1), 30)
    resumed = Sampler(10, 4, seed=1)
    resumed.start = start
    assert take(resumed, 30 - start) == through[start:]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_batches_of_one(processes):
    alone = take(Sampler(10, 8, seed=1), 9)
    parts = [take(Sampler(10, 8, 1, rank, processes), 9) for rank in range(processes)]
    assert [list(itertools.chain(*batch)) for batch in zip(*parts)] == alone


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="no images"):
        Sampler(0, 1)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH .*2, got 3"):
        Sampler(5, 3, world_size=2)
