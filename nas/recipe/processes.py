"""The sub-networks of a supernet's step shared among processes that torchrun started, on one machine or several.

Differs from data-parallel training as usual (Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704): gradients are
not averaged in buckets, every process gets those of every sub-network and adds them in the same order. So the weights
are the same for any number of processes, and a training may go on with another number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

NUMBERS = 2  # of a result, beside its tensors
Result = tuple[tuple[Tensor | None, ...], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all of them: `rank` from 0 of `count`. The first one writes files."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def agreed(self, value: int) -> int:
        """The value of the first process, in all of them."""
        told = torch.tensor([value], dtype=torch.int64)
        if self.count > 1:
            dist.broadcast(told, 0)
        return int(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def share(self, work: Callable[[int], Result], number: int, like: Sequence[Tensor]) -> list[Result]:
        """Results of `work(0)` to `work(number - 1)`, each computed by one process and known to all, in order.

        Args:
            work: called for this process's places only.
            number: of results.
            like: tensors of the shapes of a result's.
        """
        own = {i: work(i) for i in range(number) if i % self.count == self.rank}
        return [self._told(own.get(i), i % self.count, like) for i in range(number)]

    def _told(self, mine: Result | None, source: int, like: Sequence[Tensor]) -> Result:
        sizes = [t.numel() for t in like]
        # All values, which of them are there, the numbers; in main memory, from which gloo sends.
        flat = torch.zeros(sum(sizes) + len(sizes) + NUMBERS)
        if mine is not None:
            pairs = zip(mine[0], sizes, strict=True)
            values = [torch.zeros(n) if g is None else g.detach().reshape(-1).cpu() for g, n in pairs]
            marks = [float(g is not None) for g in mine[0]]
            flat = torch.cat([*values, torch.tensor([*marks, *mine[1]])])
        dist.broadcast(flat, source)
        marks = flat[sum(sizes) : -NUMBERS].tolist()
        parts = zip(flat[: sum(sizes)].split(sizes), like, marks, strict=True)
        first, second = flat[-NUMBERS:].tolist()
        tensors = (torch.empty_like(t).copy_(part.reshape(t.shape)) if mark else None for part, t, mark in parts)
        return tuple(tensors), (first, second)


@contextmanager
def started_processes() -> Iterator[Processes]:
    """The processes of torchrun; this one alone where it did not start it."""
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    if torch.cuda.is_available():  # a GPU for each process of this machine
        torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # the others wait while the first one makes a teacher
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
