"""Fills a latency table: the missing rows of a set of layers, each as its own small network, resumable row by row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from nas.core.errors import RecordError
from nas.core.records import LayerSpec, Measurement
from nas.devices.base import Device, MeasureJob
from nas.devices.graphs import overhead_job, reference_job
from nas.export.graph import layer_model
from nas.latency.table import LatencyTable

DRIFT_LIMIT = 0.05  # the reference network may be this much slower than before; then the machine is in another state
ROWS_AT_A_TIME = 40  # rows whose graphs are kept in memory; measured interleaved, stored together
SECONDS_PER_ROW = 0.03  # before anything is measured: 0.02 on a calm machine, 0.04-0.07 on a busy one
TELL_EVERY_S = 0.5  # between results: often enough for people, too rarely to disturb
REFERENCE_EVERY_S = 120.0
WAIT_S = 600.0  # another process may be filling the same table: two at a time would disturb each other


@dataclass(frozen=True, slots=True)
class FillProgress:
    """How far filling is. `remaining_s` is None until a row shows how long one takes; `message` is for people."""

    done: int
    total: int
    failed: int
    unstable: int
    elapsed_s: float
    remaining_s: float | None
    message: str = ""


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling did.

    `measured` rows were added, `failed` are (key, reason), `unstable` were measured without one calm round. `drift` is
    how much slower (0.1 = 10 %) the reference network is than in the sessions that filled the table before, None where
    there were none.
    """

    measured: int
    failed: tuple[tuple[str, str], ...]
    unstable: tuple[str, ...]
    drift: float | None
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each thing that a user should know before trusting the numbers."""
        result = []
        if self.drift is not None and self.drift > DRIFT_LIMIT:
            result.append(
                f"the machine is {self.drift:.0%} slower than when this table was begun; the new rows are kept but are"
                " not comparable. Close other programs, then run: nas measure --again"
            )
        if self.unstable:
            result.append(
                f"{len(self.unstable)} of {self.measured} rows had no calm round: other programs were running."
                " They are marked; measure them again with: nas measure --again"
            )
        if self.failed:
            key, reason = self.failed[0]
            result.append(f"{len(self.failed)} rows could not be measured, the first: {key}: {reason}")
        return tuple(result)


OnFill = Callable[[FillProgress], None]


def fill(
    table: LatencyTable,
    device: Device,
    layers: Iterable[LayerSpec],
    *,
    again: bool = False,
    progress: OnFill | None = None,
    write: Callable[[LayerSpec], bytes] = layer_model,
    wait_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> FillReport:
    """Measures the rows that a set of layers needs and the table lacks, and the overhead of a call when it is new.

    Every result is stored as soon as it is there: when the program is stopped, the same call goes on where it was.

    Args:
        table: opened for the device's state.
        device: measures.
        layers: any layers, repeats allowed.
        again: also measures rows whose measuring failed, and those without a calm round.
        progress: told after each row, and now and then while rows are measured.
        write: gives the ONNX bytes of a layer.
        wait_s: how long to wait while another process writes the table, seconds.
        clock: seconds, monotonic.

    Raises:
        StorageError: the table is read only, or another process keeps it.
        UsageError: a layer in a precision that cannot be written for this device.
    """
    started = clock()
    by_key = {layer.key: layer for layer in layers}
    if not table.missing(by_key, again=again) and table.has_overhead:
        return FillReport(0, (), (), None, 0.0)

    def waiting(message: str) -> None:
        if progress is not None:
            progress(FillProgress(0, len(by_key), 0, 0, clock() - started, None, message))

    with table.writing(wait_s, waiting):
        todo = [by_key[key] for key in table.missing(by_key, again=again)]  # the other process may have measured some
        drift = open_session(table, device)
        tally = _Tally(len(todo), clock, progress)
        for start in range(0, len(todo), ROWS_AT_A_TIME):
            part = todo[start : start + ROWS_AT_A_TIME]
            jobs = [MeasureJob(x.key, "row", x.precision, write(x), x.macs) for x in part]
            tally.begin(len(part))
            device.measure(jobs, on_result=lambda m: tally.take(store(table, m)), progress=tally.work)
    return FillReport(tally.done, tuple(tally.failed), tuple(tally.unstable), drift, clock() - started)


def open_session(table: LatencyTable, device: Device) -> float | None:
    """Measures the reference network (and the overhead when it is new) before a session's rows; tells the device.

    A search fills a few rows at a time: within `REFERENCE_EVERY_S` the last look at the reference is enough.

    Returns:
        How much slower the reference is than in earlier sessions (0.1 = 10 %); None for the first session, or when the
        reference was looked at a short while ago.
    """
    now = time.monotonic()
    if table.has_overhead and table.looked_at_s is not None and now - table.looked_at_s < REFERENCE_EVERY_S:
        return None
    before = table.reference_ms
    device.expect_reference(before)
    jobs = [reference_job()] if table.has_overhead else [reference_job(), overhead_job()]
    reference, *_ = [store(table, m) for m in device.measure(jobs)]
    table.looked_at_s = now
    if before is None:
        device.expect_reference(reference.latency_ms)
        return None
    return None if reference.latency_ms is None else reference.latency_ms / before - 1


def store(table: LatencyTable, measurement: Measurement) -> Measurement:
    """Adds a measurement; an impossible value (a clock gone wrong) is added as failed, with its reason."""
    try:
        return table.add(measurement)
    except RecordError as e:
        return table.add(replace(measurement, latency_ms=None, session_ms=(), error=str(e)))


class _Tally:
    """Counts results and tells about them. Rows are measured interleaved: work is done before any has a result."""

    def __init__(self, total: int, clock: Callable[[], float], progress: OnFill | None) -> None:
        self.done = 0
        self.failed: list[tuple[str, str]] = []
        self.unstable: list[str] = []
        self._total = total
        self._clock = clock
        self._progress = progress
        self._started = self._told = clock()
        self._before = 0
        self._part = 0
        self._worked = 0.0

    def begin(self, part: int) -> None:
        """The next `part` rows are measured now."""
        self._before += self._part
        self._part = part

    def work(self, share: float) -> None:
        """This share of the rows that were begun is measured."""
        self._worked = self._before + share * self._part
        if self._clock() - self._told >= TELL_EVERY_S:
            self._tell("")

    def take(self, m: Measurement) -> None:
        """A row is stored."""
        self.done += 1
        self._worked = max(self._worked, self.done)
        if m.error is not None:
            self.failed.append((m.key, m.error))
        elif not m.is_stable:
            self.unstable.append(m.key)
        self._tell(m.key)

    def _tell(self, message: str) -> None:
        if self._progress is None:
            return
        self._told = self._clock()
        elapsed = self._told - self._started
        remaining = elapsed / self._worked * (self._total - self._worked) if self._worked > 0 else None
        self._progress(
            FillProgress(self.done, self._total, len(self.failed), len(self.unstable), elapsed, remaining, message)
        )
