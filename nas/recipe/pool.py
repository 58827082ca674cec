"""Worker processes for training on one machine: one thread each, jobs as small records, results as files and records.

A worker that dies (killed, out of memory) costs its job one retry, alone, so that no other job is blamed; a job that
dies twice is a result with a reason. Workers die with their parent, so a killed search leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from multiprocessing.sharedctypes import Synchronized
from typing import Generic, Literal, Protocol, TypeVar

from nas.core.errors import InterruptedRunError, NasError, StorageError

J = TypeVar("J")
R = TypeVar("R")
StartMethod = Literal["spawn", "fork"]

POLL_S = 0.2  # between two looks at the stop flag
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent ends (Linux only)
_PARENTS = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to workers too, but the parent decides


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job gave no result: a row of the report, not an end of the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobResult(Generic[J, R]):
    """A job with what came of it."""

    job: J
    value: R | JobFailure


class JobPool(Protocol):
    """Whatever runs jobs: processes of this machine, or workers on many that share a storage."""

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Every job once with what came of it, in the order in which they are ready; see `WorkerPool.map`."""
        ...

    def feed(
        self,
        function: Callable[[J], R],
        next_job: Callable[[], J | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """The same for jobs that are asked for while others run; see `WorkerPool.feed`."""
        ...


class WorkerPool:
    """Processes that stay alive through a run, so that imports are paid once.

    Args:
        workers: number of processes; each uses one thread.
        start: `spawn` makes fresh interpreters; `fork` copies this process, which must have no other threads and must
            have imported everything: for tests, which start hundreds.
        gpus: number of GPUs that the workers share, each of them using one; 0: none.
    """

    def __init__(self, workers: int, start: StartMethod = "spawn", gpus: int = 0) -> None:
        self.workers = workers
        self._gpus = gpus
        self._started = get_context(start).Value("i", 0) if gpus else None
        self._start: StartMethod = start
        self._executor: ProcessPoolExecutor | None = None
        self._processes: list[BaseProcess] = []
        if start == "fork":  # now: torch cannot differentiate in a copy of a process that has done so
            self._submit(abs, 0)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers at once; what they had not written is done again by the next run."""
        if self._executor is not None:
            for process in list((self._executor._processes or {}).values()):
                process.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _submit(self, function: Callable[[J], R], job: J) -> Future[R]:
        for _ in range(self.workers):
            try:
                return self._try_submit(function, job)
            except BrokenProcessPool:  # a worker died while it had nothing to do: no job is to blame
                self.close()
        return self._try_submit(function, job)

    def _try_submit(self, function: Callable[[J], R], job: J) -> Future[R]:
        if self._start == "spawn":
            ensure_running()  # it would unblock signals in the middle of the next step
        with _blocked(_PARENTS):  # inherited: a worker that is still importing must not see Ctrl-C
            if self._executor is None:
                self._executor = ProcessPoolExecutor(
                    self.workers,
                    mp_context=get_context(self._start),
                    initializer=_start_worker,
                    initargs=(os.getpid(), self._gpus, self._started),
                )
            future = self._executor.submit(function, job)
            self._processes = list((self._executor._processes or {}).values())
            return future

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Results in the order in which they are ready; arguments and errors as for `feed`.

        Args:
            function: for every job.
            jobs: all of them.
            should_stop: asked while waiting.
        """
        todo = deque(jobs)
        yield from self.feed(function, lambda: todo.popleft() if todo else None, should_stop)

    def feed(
        self,
        function: Callable[[J], R],
        next_job: Callable[[], J | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Results, as they are ready, of jobs that are asked for whenever a worker is free: results may lead to jobs.

        Args:
            function: a module-level function; its errors become `JobFailure`s.
            next_job: the next job, a small record that can be sent to another process; None while there is none. It is
                asked again after every result, and the loop ends when nothing is running and there is none.
            should_stop: asked while waiting; True ends the loop after the jobs that are running.

        Raises:
            InterruptedRunError: `should_stop` said so, or a job was told to stop and kept its checkpoint.
            StorageError: a job could not read or write its files; the next one could not either.
        """
        suspects = deque[J]()
        running: dict[Future[R], J] = {}
        alone = False  # a suspect is running, and nothing beside it
        stopped = False
        while True:
            stopped = stopped or should_stop()
            if not stopped and not running and suspects:
                job = suspects.popleft()
                running[self._submit(function, job)] = job
                alone = True
            while not suspects and not alone and len(running) < self.workers and not stopped:
                following = next_job()
                if following is None:
                    break
                running[self._submit(function, following)] = following
            if not running:
                break
            done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            broken: list[J] = []
            for future in done:
                job = running.pop(future)
                try:
                    value: R | JobFailure = future.result()
                except BrokenProcessPool:
                    broken.append(job)
                    continue
                except InterruptedRunError:
                    stopped = True
                    continue
                except StorageError:
                    raise
                except NasError as e:
                    value = JobFailure(str(e))
                except Exception as e:  # a failed candidate is a row with a reason; the search goes on
                    value = JobFailure(f"{type(e).__name__}: {e}")
                yield JobResult(job, value)
            if broken:
                # All futures of a broken pool are lost. Whose worker died is not known: each of them is tried alone.
                broken.extend(running.values())
                running.clear()
                self.close()
                stopped = stopped or should_stop()  # whoever stops the run may have ended the workers too
                if alone and not stopped:
                    yield JobResult(broken[0], JobFailure(f"worker process died twice ({self._deaths()})"))
                else:
                    suspects.extend(broken)
            alone = alone and bool(running)
        if stopped:
            raise InterruptedRunError("stopped; finished work is kept")

    def _deaths(self) -> str:
        """How the workers ended that were not ended by the pool itself."""
        codes = {p.exitcode for p in self._processes} - {None, 0, -signal.SIGTERM}
        names = [signal.Signals(-c).name if c < 0 else f"exit code {c}" for c in sorted(c for c in codes if c)]
        text = ", ".join(names) or "no exit code"
        return f"{text}: killed, perhaps for want of memory; fewer workers need less" if "SIGKILL" in names else text


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals that arrive inside wait until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, gpus: int, started: Synchronized[int] | None) -> None:
    """One thread, flushed denormals, no reaction to Ctrl-C (the parent decides), an end together with the parent.

    With several GPUs the workers take them in turn.
    """
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has the parent's handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl took effect
            os._exit(1)
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if started is not None:
        with started.get_lock():
            number, started.value = started.value, started.value + 1
        torch.cuda.set_device(number % gpus)
