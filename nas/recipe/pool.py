"""Worker processes for training on one machine: one thread each, jobs as small records, results as files and records.

A worker that dies (killed, out of memory) costs its job one retry; a job that fails twice is a result with a reason.
Workers die with their parent, so a killed search leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Generic, TypeVar

from nas.core.errors import InterruptedRunError, NasError

J = TypeVar("J")
R = TypeVar("R")

MAX_ATTEMPTS = 2
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent ends (Linux only)


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job gave no result: a row of the report, not an end of the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobResult(Generic[J, R]):
    """A job with what came of it."""

    job: J
    value: R | JobFailure


class WorkerPool:
    """Processes that stay alive through a run, so that imports are paid once.

    Args:
        workers: number of processes; each uses one thread.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers at once; what they had not written is done again by the next run."""
        if self._executor is not None:
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _open(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
            )
        return self._executor

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Results in the order in which they are ready.

        Args:
            function: a module-level function; its errors become `JobFailure`s.
            jobs: small records that can be sent to another process.
            should_stop: asked while waiting; True ends the loop after the jobs that are running.

        Raises:
            InterruptedRunError: `should_stop` said so, or a job was told to stop and kept its checkpoint.
        """
        todo = [(job, 1) for job in reversed(jobs)]
        running: dict[Future[R], tuple[J, int]] = {}
        stopped = False
        while todo or running:
            stopped = stopped or should_stop()
            while todo and len(running) < self.workers and not stopped:
                job, attempt = todo.pop()
                running[self._open().submit(function, job)] = (job, attempt)
            if not running:
                break
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                job, attempt = running.pop(future)
                try:
                    yield JobResult(job, future.result())
                except BrokenProcessPool:
                    broken = True
                    if attempt < MAX_ATTEMPTS:
                        todo.append((job, attempt + 1))
                    else:
                        yield JobResult(job, JobFailure("worker process died twice (killed or out of memory)"))
                except InterruptedRunError:
                    stopped = True
                except NasError as e:
                    yield JobResult(job, JobFailure(str(e)))
                except Exception as e:  # a failed candidate is a row with a reason; the search goes on
                    yield JobResult(job, JobFailure(f"{type(e).__name__}: {e}"))
            if broken:
                # Every future of a broken pool is lost: those that were running beside the dead one count as untried.
                todo.extend((job, attempt) for job, attempt in running.values())
                running.clear()
                self.close()
        if stopped:
            raise InterruptedRunError("stopped; finished work is kept")


def _start_worker(parent: int) -> None:
    """One thread, flushed denormals, no reaction to Ctrl-C (the parent decides), an end together with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl took effect
            os._exit(1)
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
