"""How a long search talks to whoever started it, and how it is stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from nas.core.errors import InterruptedRunError


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
    """Set by the first Ctrl-C (or SIGTERM); the second one ends the process at once.

    While it is set, `check` raises, and workers see the stop file and keep a checkpoint.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.is_set = False

    def set(self) -> None:
        """Asks every part of the run to stop at its next safe point."""
        self.is_set = True
        if self.file is not None and self.file.parent.is_dir():
            self.file.touch()

    def check(self) -> None:
        """Call where stopping is safe.

        Raises:
            InterruptedRunError: the run was asked to stop.
        """
        if self.is_set:
            raise InterruptedRunError("stopped; finished work is kept")


class StoppableReporter:
    """A reporter whose `progress` is also a safe point: long work calls it after each kept piece."""

    def __init__(self, inner: Reporter, stop: StopFlag) -> None:
        self._inner = inner
        self._stop = stop

    def say(self, text: str) -> None:
        self._inner.say(text)

    def warn(self, text: str) -> None:
        self._inner.warn(text)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        self._inner.progress(stage, done, total, note)
        self._stop.check()


@contextmanager
def stop_on_signals(flag: StopFlag, reporter: Reporter) -> Iterator[None]:
    """First SIGINT, SIGTERM or SIGHUP: set the flag. Second: end now, through KeyboardInterrupt."""

    def handle(number: int, _: FrameType | None) -> None:
        if flag.is_set:
            raise KeyboardInterrupt
        flag.set()
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
