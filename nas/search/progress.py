"""How a long search talks to whoever started it, and how it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from nas.core.errors import InterruptedRunError, StorageError
from nas.core.jsonio import read_record, write_record

TICK_S = 5.0  # between two notes of the time; each costs a millisecond


class Reporter(Protocol):
    """What a search tells: the command line shows it, tests collect it."""

    def say(self, text: str) -> None:
        """A line for people."""
        ...

    def warn(self, text: str) -> None:
        """A line that must not be overlooked."""
        ...

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """`done` of `total` in a named stage; called often."""
        ...


class StopFlag:
    """Set by the first Ctrl-C (or SIGTERM, SIGHUP); the second one ends the process at once.

    While it is set, `check` raises, and workers see the stop file and keep a checkpoint.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self.is_set = False

    def tell_workers(self, file: Path) -> None:
        """The file whose presence tells workers to stop; made at once when the flag is set already."""
        self._file = file
        if self.is_set:
            file.touch()

    def set(self) -> None:
        """Asks every part of the run to stop at its next safe point."""
        self.is_set = True
        if self._file is not None and self._file.parent.is_dir():
            self._file.touch()

    def check(self) -> None:
        """Call where stopping is safe.

        Raises:
            InterruptedRunError: the run was asked to stop.
        """
        if self.is_set:
            raise InterruptedRunError("stopped; finished work is kept")


class StoppableReporter:
    """A reporter whose `progress` is also a safe point: long work calls it after each kept piece.

    Args:
        plain: what really tells; loops that look at the flag themselves use it directly.
        stop: makes `progress` raise.
        clock: goes on with each `progress`, None: none.
        name: of the further device that everything is about; empty where that needs no words.
    """

    def __init__(self, plain: Reporter, stop: StopFlag, clock: RunClock | None = None, name: str = "") -> None:
        self.plain = plain
        self._stop = stop
        self._clock = clock
        self._name = f"{name}: " if name else ""

    def on(self, name: str) -> StoppableReporter:
        """The same, for what is about a further device."""
        return StoppableReporter(self.plain, self._stop, self._clock, name)

    def say(self, text: str) -> None:
        """A line for people."""
        self.plain.say(self._name + text)

    def warn(self, text: str) -> None:
        """A line that must not be overlooked."""
        self.plain.warn(self._name + text)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Tells, then raises InterruptedRunError when the run was asked to stop."""
        self.plain.progress(self._name + stage, done, total, note)
        if self._clock is not None:
            self._clock.tick()
        self._stop.check()


@dataclass(frozen=True, slots=True)
class Spent:
    """`clock.json`: seconds of all sessions of a run: wall time, and processor time of the searching process alone."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


class RunClock:
    """Time that a run took, those of its sessions included that were interrupted; a killed one loses `TICK_S` at most.

    Args:
        file: where it is kept.
        wall, cpu: clocks, seconds.
    """

    def __init__(
        self,
        file: Path,
        wall: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._file, self._wall, self._cpu = file, wall, cpu
        self._before = time_spent(file)
        self._wall_start, self._cpu_start = wall(), cpu()
        self._kept_at = self._wall_start

    @property
    def spent(self) -> Spent:
        """Time so far."""
        return Spent(
            self._before.wall_s + self._wall() - self._wall_start, self._before.cpu_s + self._cpu() - self._cpu_start
        )

    def tick(self) -> None:
        """Keeps the time now and then."""
        if self._wall() - self._kept_at >= TICK_S:
            self.keep()

    def keep(self) -> None:
        """Keeps the time durably."""
        self._kept_at = self._wall()
        write_record(self._file, self.spent)


def time_spent(file: Path) -> Spent:
    """Time that a run has taken so far; nothing where it has not begun."""
    return read_record(Spent, file) if file.exists() else Spent()


@contextmanager
def kept_clock(file: Path) -> Iterator[RunClock]:
    """A running clock, kept at the end whatever happens."""
    clock = RunClock(file)
    try:
        yield clock
    finally:
        with suppress(StorageError):  # a full disk has its own error, which must not be hidden
            clock.keep()


@contextmanager
def stop_on_signals(flag: StopFlag, reporter: Reporter) -> Iterator[None]:
    """First SIGINT, SIGTERM or SIGHUP: set the flag. Second: end now, through KeyboardInterrupt."""

    def handle(number: int, _: FrameType | None) -> None:
        if flag.is_set:
            raise KeyboardInterrupt
        flag.set()
        with suppress(RuntimeError):  # the signal came in the middle of a print, which cannot be entered twice
            reporter.warn(
                f"{signal.Signals(number).name}: finishing or checkpointing the current step; once more to end now"
            )

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does; SIGINT too where a shell has the command ignore it,
    as it does in the background."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
