"""Ends the process when a runtime never returns: nothing inside can stop it, and a search would wait for ever.

What hangs is told first, so that it can be recorded as failed; the same command then goes on without it. The thread
that looks needs Python's lock: ONNX Runtime gives it free while it runs a model and while it makes a session.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nas.core.errors import DeviceError
from nas.devices.base import HANG_REASON

PAUSE_S = 5.0  # a longer gap between two looks means that the process or the machine was paused, not the runtime


@contextmanager
def watched(limit_s: float, on_hang: Callable[[str], bool]) -> Iterator[Callable[[str], None]]:
    """Watches work step by step from a thread of its own; the work must release Python's lock, as runtimes do.

    Args:
        limit_s: how long one step may take, seconds.
        on_hang: called in that thread with the key of the step that takes longer, just before the process ends with
            the exit code of a device that failed; says whether that was recorded.

    Yields:
        A function that is told the key of each step when it begins.
    """
    step = _Step()
    done = threading.Event()
    thread = threading.Thread(target=_look, args=(step, done, limit_s, on_hang), daemon=True, name="watchdog")
    thread.start()
    try:
        yield step.begin
    finally:
        done.set()
        thread.join()


class _Step:
    """The step that is being done, and since when."""

    def __init__(self) -> None:
        self.key = ""
        self.since_s = time.monotonic()

    def begin(self, key: str) -> None:
        self.key, self.since_s = key, time.monotonic()


def _look(step: _Step, done: threading.Event, limit_s: float, on_hang: Callable[[str], bool]) -> None:
    last_s = time.monotonic()
    paused_s = 0.0
    paused_at = step.since_s
    while not done.wait(min(1.0, limit_s / 4)):
        now_s = time.monotonic()
        if step.since_s != paused_at:  # another step: pauses before it do not count
            paused_s, paused_at = 0.0, step.since_s
        if now_s - last_s > PAUSE_S:
            paused_s += now_s - last_s
        last_s = now_s
        if step.key and now_s - step.since_s - paused_s > limit_s:
            _end(step.key, limit_s, on_hang)


def _end(key: str, limit_s: float, on_hang: Callable[[str], bool]) -> None:
    is_recorded = False
    try:
        is_recorded = on_hang(key)
    finally:
        what_now = (
            "it is recorded as failed. The same command goes on without it"
            if is_recorded
            else "nothing more can be done in this process. If it happens again, run: nas doctor"
        )
        print(f"\nerror: {key} {HANG_REASON} {limit_s:g} s; {what_now}", file=sys.stderr, flush=True)
        os._exit(DeviceError.exit_code)
