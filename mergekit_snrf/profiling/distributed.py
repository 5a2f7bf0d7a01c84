"""The processes that share a profiling run under torchrun or accelerate launch."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_snrf.errors import SnrfError

T = TypeVar("T")

# Ranks wait for the slowest one, and a side may take days.
_TIMEOUT = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; one process alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Return this rank's part of the work: neighbours, which are of similar size, go to different ranks."""
        return list(work[self.rank :: self.world])

    def from_first(self, value: T) -> T:
        """Return the value of rank 0, after all ranks have called this."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def all(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def reduce(self, tensor: Tensor, operation: str) -> None:
        """Combine a CPU tensor of all ranks in place on rank 0, by ``min``, ``max`` or ``sum``."""
        if self.world > 1:
            dist.reduce(tensor, dst=0, op=getattr(dist.ReduceOp, operation.upper()), group=self.group)

    def device(self, name: str | None) -> str | None:
        """Return the device of this rank, an own one with several CUDA devices; ``SnrfError``: all would share one."""
        if self.world == 1:
            return name
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            return str(device)
        if device.index is not None:
            what = f"{name!r} would be shared by {self.world} processes"
            raise SnrfError(None, what, "use cuda for one each", field="device")
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return f"cuda:{local % max(1, torch.cuda.device_count())}"


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the other processes of the run, if torchrun or accelerate launch started several.

    Statistics are small and lie on the CPU, so they travel over gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_TIMEOUT)
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if started:
            dist.destroy_process_group()
