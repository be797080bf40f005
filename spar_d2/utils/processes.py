"""Collective operations without short timeouts."""

from __future__ import annotations

import datetime
import functools
from typing import TypeVar, cast

import torch.distributed as dist
from detectron2.utils import comm

T = TypeVar("T")
# Process groups for training have timeouts of 10 or 30 minutes, to detect dead processes. In evaluation, however,
# processes may finish hours apart.
_PATIENCE = datetime.timedelta(days=7)


@functools.lru_cache(maxsize=1)
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # the group contains all processes
    return group


def gather_when_done(data: T) -> list[T]:
    """Gather data from all processes, without a short timeout.

    Returns:
        The data of all processes, ordered by rank, in the process of rank 0; an empty list in the others.
    """
    if comm.get_world_size() == 1:
        return [data]
    return cast("list[T]", comm.gather(data, group=_patient_group(dist.group.WORLD)))


def all_gather_when_done(data: T) -> list[T]:
    """Gather data from all processes in all processes, ordered by rank, without a short timeout."""
    if comm.get_world_size() == 1:
        return [data]
    return cast("list[T]", comm.all_gather(data, group=_patient_group(dist.group.WORLD)))


def wait_for_all() -> None:
    """Wait for all processes, without a short timeout."""
    all_gather_when_done(None)
