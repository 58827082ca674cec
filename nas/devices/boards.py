"""Several boards of one state as one Device: they share the work, and a lost board leaves its share to the others.

Lost is also a board that came back in another state, as after a boot with unlocked clocks, and one that another program
keeps busy: what the others measure holds all the same.

A name joins them by commas: `ssh:me@nano1,ssh:me@nano2`. One table holds for all of them, so boards that differ in
anything that a latency depends on are refused.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DeviceError, UsageError
from nas.core.records import DeviceProfile, Measurement
from nas.devices.address import parse_address
from nas.devices.base import (
    NO_STREAMS,
    CalmReport,
    Device,
    JobPrecision,
    LayerTime,
    MeasureJob,
    OnProgress,
    OnResult,
    StreamJob,
    StreamTimes,
)
from nas.devices.board_profile import LOCK_CLOCKS, same_state
from nas.devices.graphs import REFERENCE_CHANNELS, REFERENCE_SIZE, reference_model
from nas.devices.link import RefusedRequestError
from nas.devices.remote import RemoteDevice
from nas.devices.ssh import RemoteError

T = TypeVar("T")

_NEARLY_ALL = 0.99  # until all results are there
JOBS_AT_A_TIME = 8  # that a board takes from what is left: few, so that all end at about the same time


def open_boards(name: str, say: Callable[[str], None]) -> Device:
    """The board, or the boards, with this name.

    Args:
        name: `ssh:...`, or several joined by commas.
        say: told in a line when a board is lost or found again.

    Raises:
        UsageError: the name does not fit, or names a board twice.
        DeviceError: a board cannot be used, or they are not in one state.
    """
    names = name.split(",")
    wrong = [part for part in names if not part.startswith("ssh:")]
    if wrong:
        raise UsageError(
            f"device {name!r}: {wrong[0]!r} is no board behind SSH; several boards are joined so: ssh:a,ssh:b"
        )
    if len(set(names)) < len(names):
        raise UsageError(f"device {name!r}: a board is named twice")
    addresses = [parse_address(part) for part in names]
    boards: list[RemoteDevice] = []
    try:
        for address in addresses:
            boards.append(RemoteDevice(address, say=say))
        return boards[0] if len(boards) == 1 else Boards(boards, names, say)
    except BaseException:
        for board in boards:
            board.close()
        raise


def unlocked_warning(profile: DeviceProfile, name: str) -> str | None:
    """What to tell before anything is measured on a board whose clocks are not locked; None for every other device.

    Args:
        profile: of the device.
        name: under which it was opened.
    """
    command = profile.details.get(LOCK_CLOCKS)
    if command is None:
        return None
    return (
        f"{profile.name}: the clocks of the board are not locked, so times depend on what ran before, and hold for no "
        f"table of locked clocks. First, on the board: {command}; or from here, where sudo -n is allowed there: nas "
        f"doctor --device {quote(name)} --lock-clocks"
    )


def why_no_answers(device: Device) -> str:
    """Why a board measures models but cannot give their outputs; empty for every device that can.

    trtexec writes no exact outputs, so the Python module of TensorRT has to be there, too.
    """
    for board in device.boards if isinstance(device, Boards) else (device,):
        if board.profile.details.get("runner") != "trtexec" or not isinstance(board, RemoteDevice):
            continue
        module = next((r for r in board.runners if r.name == "tensorrt"), None)
        if module is not None and module.missing:
            return module.missing
        if module is None:  # only what was asked for is described: whether it is there shows when it is needed
            shape = (1, REFERENCE_CHANNELS, REFERENCE_SIZE, REFERENCE_SIZE)
            try:
                board.run(reference_model(), np.zeros(shape, np.float32))
            except RemoteError:
                raise
            except DeviceError as e:
                return str(e)
    return ""


class Boards:
    """Devices in one state that share the work."""

    def __init__(
        self, boards: Sequence[Device], names: Sequence[str], say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Takes them over.

        Args:
            boards: at least one.
            names: of each, for people.
            say: told in a line when one is lost.

        Raises:
            DeviceError: they differ in their state; the message has each field that does.
        """
        first = boards[0].profile
        for board, name in zip(boards[1:], names[1:], strict=True):
            lines = same_state(first, board.profile)
            if lines:
                raise DeviceError(
                    f"{names[0]} and {name} are not in one state, so one table cannot hold for both:\n  "
                    + "\n  ".join(lines)
                    + "\nBring them into one state, or search on each with a table of its own (also_on)"
                )
        self._state = first
        self._boards = {name: board for name, board in zip(names, boards, strict=True)}
        self._lost: dict[str, str] = {}
        self._say = say
        self._sequence = 0

    @property
    def boards(self) -> tuple[Device, ...]:
        """Those that are left."""
        return tuple(self._left.values())

    @property
    def profile(self) -> DeviceProfile:
        """State of the boards, as the first one that is left in it tells it; else what it was."""
        told = (board.profile for board in self._left.values())
        return next((profile for profile in told if not same_state(self._state, profile)), self._state)

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Told to every board."""
        for board in self._boards.values():
            board.expect_reference(reference_ms, streaming_ms)

    def calm(self, checks: int = 20) -> CalmReport:
        """The report of the board that is least calm."""
        return max((board.calm(checks) for board in self._left.values()), key=lambda r: (r.rejected_share, r.drift))

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs of the model, computed on the first board that is left."""
        return self._on_first(lambda board: board.run(model, images))

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
        """Typical time of each layer of a model on the first board that is left; see `LayerTimer`."""
        return self._on_first(lambda board: cast(RemoteDevice, board).layer_times(model, precision))

    def _on_first(self, work: Callable[[Device], T]) -> T:
        """What the first board that is left gives; when it is lost meanwhile, the next one is asked."""
        for name, board in self._left.items():
            try:
                return work(board)
            except DeviceError as e:
                if not _is_loss(e):
                    raise
                self._lose(name, e, len(self._left) - 1)
        raise RemoteError(_all_lost(self._lost))

    @property
    def no_stream(self) -> str:
        """Why the first board that is left cannot time a stream of images; empty where it can."""
        board = next(iter((self._left or self._boards).values()))
        return str(getattr(board, "no_stream", NO_STREAMS))

    def stream_times(self, job: StreamJob, progress: OnProgress | None = None) -> StreamTimes:
        """Times of the images of a stream on the first board that is left; see `StreamTimer`."""
        if self.no_stream:
            raise DeviceError(f"{job.key}: the stream cannot be timed: {self.no_stream}")
        return self._on_first(lambda board: cast(RemoteDevice, board).stream_times(job, progress))

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """Measures jobs on all boards at once; see `Device.measure`. Both callbacks are called in the caller's thread.

        Raises:
            RemoteError: the last board is lost; the message has the reason of each.
        """
        results: dict[int, Measurement] = {}
        if not jobs:
            return []
        work, told = _Work(len(jobs)), _Told()
        boards = self._left
        if not boards:
            raise RemoteError(_all_lost(self._lost))
        threads = [
            threading.Thread(target=_serve, args=(name, board, jobs, work, told), name=f"board {name}", daemon=True)
            for name, board in boards.items()
        ]
        for thread in threads:
            thread.start()
        shares = dict.fromkeys(boards, 0.0)
        highest, running, failure = 0.0, len(threads), None
        try:
            while running:
                event = told.get()
                if event.measurement is not None:
                    self._sequence += 1
                    results[event.index] = replace(event.measurement, sequence=self._sequence)
                    if on_result is not None:
                        on_result(results[event.index])
                if event.is_end:
                    running -= 1
                    if event.error is not None and _is_loss(event.error):
                        self._lose(event.board, event.error, running)
                    elif event.error is not None:
                        work.stop()
                        failure = failure or event.error
                shares[event.board] = event.share
                highest = max(highest, min(_NEARLY_ALL, (len(results) + sum(shares.values())) / len(jobs)))
                if progress is not None:
                    progress(highest)
        finally:
            work.stop()
            for thread in threads:
                thread.join()
        if failure is not None:
            raise failure
        if len(results) < len(jobs):
            raise RemoteError(_all_lost(self._lost))
        if progress is not None:
            progress(1.0)
        return [results[i] for i in range(len(jobs))]

    def close(self) -> None:
        """Ends all connections."""
        for board in self._boards.values():
            if isinstance(board, RemoteDevice):
                board.close()

    @property
    def _left(self) -> dict[str, Device]:
        return {name: board for name, board in self._boards.items() if name not in self._lost}

    def _lose(self, name: str, error: Exception, left: int) -> None:
        self._lost[name] = str(error)
        rest = f"the other {left} go on with its share" if left > 1 else "the other one goes on with its share"
        self._say(f"{name} is lost: {error}{f'; {rest}' if left else ''}")


@dataclass(frozen=True, slots=True)
class _Event:
    """What a board's thread tells: a result, how far it is in the jobs that it took (in jobs), or its end."""

    board: str
    share: float = 0.0
    index: int = -1
    measurement: Measurement | None = None
    is_end: bool = False
    error: Exception | None = None


_Told = queue.Queue[_Event]


class _StoppedError(Exception):
    """Ends the work of a board in the middle."""


class _Work:
    """Jobs that nobody has taken yet, by index. What a lost board had taken comes back, so the others wait for that."""

    def __init__(self, count: int) -> None:
        self._left = list(range(count))
        self._taken = 0
        self._change = threading.Condition()
        self.is_stopped = False

    def take(self, most: int) -> list[int]:
        """The next jobs; empty when all are done or the work was stopped."""
        with self._change:
            self._change.wait_for(lambda: self._left or not self._taken or self.is_stopped)
            if self.is_stopped:
                return []
            taken, self._left = self._left[:most], self._left[most:]
            self._taken += len(taken)
            return taken

    def done(self, count: int, back: Sequence[int] = ()) -> None:
        """So many of the taken jobs are no longer with a board; those in `back` are for another one."""
        with self._change:
            self._taken -= count
            self._left = [*back, *self._left]
            self._change.notify_all()

    def stop(self) -> None:
        """Nobody gets anything more."""
        with self._change:
            self.is_stopped = True
            self._change.notify_all()


def _serve(name: str, board: Device, jobs: Sequence[MeasureJob], work: _Work, told: _Told) -> None:
    """Measures on one board until nothing is left or it is lost."""
    while True:
        taken = work.take(JOBS_AT_A_TIME)
        if not taken:
            told.put(_Event(name, is_end=True))
            return
        finished: list[int] = []
        by_key: dict[str, list[int]] = {}
        for i in taken:
            by_key.setdefault(jobs[i].key, []).append(i)

        def take(m: Measurement, by_key: dict[str, list[int]] = by_key, finished: list[int] = finished) -> None:
            finished.append(by_key[m.key].pop(0))
            told.put(_Event(name, index=finished[-1], measurement=m))

        def tell(share: float, taken: list[int] = taken, finished: list[int] = finished) -> None:
            if work.is_stopped:
                raise _StoppedError
            told.put(_Event(name, share=max(0.0, share * len(taken) - len(finished))))

        try:
            board.measure([jobs[i] for i in taken], take, tell)
        except _StoppedError:
            work.done(len(taken))
            told.put(_Event(name, is_end=True))
            return
        except Exception as e:
            told.put(_Event(name, is_end=True, error=e))
            work.done(len(taken), [i for i in taken if i not in finished])
            return
        work.done(len(taken))


def _is_loss(error: BaseException) -> bool:
    """Whether an error is of one board only, so that the others can go on without it."""
    cause = error if isinstance(error, RefusedRequestError) else error.__cause__  # `run` wraps what it was refused
    return isinstance(error, RemoteError) or (isinstance(cause, RefusedRequestError) and cause.kind == "busy")


def _all_lost(lost: dict[str, str]) -> str:
    reasons = "\n  ".join(f"{name}: {reason}" for name, reason in lost.items())
    return f"every board is lost:\n  {reasons}\nWhat arrived is kept: the same command goes on from there"
