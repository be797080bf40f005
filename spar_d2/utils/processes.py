"""Waiting for other processes for as long as their work takes."""

from __future__ import annotations

import datetime
import functools
from typing import TypeVar, cast

import torch.distributed as dist
from detectron2.utils import comm

T = TypeVar("T")
# The groups that trainings exchange gradients in give up after 10 or 30 minutes, and should: a process that is silent
# for so long is dead. Shares of an evaluation, though, may end hours apart.
_PATIENCE = datetime.timedelta(days=7)


@functools.lru_cache(maxsize=1)
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


def gather_when_done(data: T) -> list[T]:
    """What every process has, in their order, in the first one; empty in the others. Waits for the slowest."""
    if comm.get_world_size() == 1:
        return [data]
    return cast("list[T]", comm.gather(data, group=_patient_group(dist.group.WORLD)))


def all_gather_when_done(data: T) -> list[T]:
    """What every process has, in their order, in all of them. Waits for the slowest."""
    if comm.get_world_size() == 1:
        return [data]
    return cast("list[T]", comm.all_gather(data, group=_patient_group(dist.group.WORLD)))


def wait_for_all() -> None:
    """Return when all processes have come here."""
    all_gather_when_done(None)
