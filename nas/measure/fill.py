"""Fills a latency table: the missing rows of a set of layers, each as its own small network, resumable row by row."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import pairwise

from nas.core.errors import DeviceError, RecordError
from nas.core.records import Candidate, LayerSpec, Measurement
from nas.core.walk import total_params
from nas.devices.base import Device, MeasureJob
from nas.devices.graphs import GATE_STREAMING_MB, gate_job, overhead_job, reference_job, streaming_job
from nas.devices.protocol import SKIPPED_TACTICS, THROTTLED
from nas.export.dialect import ORT, dialect_for
from nas.export.graph import layer_model
from nas.latency.lines import STREAMING_MB, streaming_key
from nas.latency.table import LatencyTable, difference_lines, way_back

DRIFT_LIMIT = 0.05  # the reference network may be this much slower than before; then the machine is in another state
ROWS_AT_A_TIME = 40  # rows whose graphs are kept in memory; measured interleaved, stored together
SECONDS_PER_NETWORK = 0.8  # in several sessions: 0.2 tiny, 0.7-1.2 with megabytes of weights
SECONDS_PER_ROW = 0.02  # before anything is measured: 0.013 on a calm machine, 0.02-0.07 on a busy one
LEAST_TIMES = 3  # that show how long a measurement takes
TELL_EVERY_S = 0.5  # between results: often enough for people, too rarely to disturb
LOOK_EVERY_S = 120.0  # at the reference network, overhead and gate
CHECK_STATE_S = 1.0  # between looks at the device's state before results are stored
LOOK_AGAIN_ROWS = 20  # after this many rows the look is repeated
STREAMING_AGREEMENT = 1.02  # two looks at a chain of weights that differ by less found the same, undisturbed, time
STREAMING_LOOKS = 6  # at a chain, at most
STREAMING_FROM_MB = 1.0  # smaller networks stay in the second-level cache of any device this is for
WAIT_S = 600.0  # another process may be filling the same table: two at a time would disturb each other


@dataclass(frozen=True, slots=True)
class Pace:
    """About how many seconds a device takes for a row and for a whole network; None where nobody knows."""

    row_s: float | None
    network_s: float | None


def pace_of(runtime: str, table: LatencyTable | None) -> Pace:
    """What is known beforehand: of a processor from other processors, of engines from those that the table has.

    An engine is built for seconds to many minutes, as its board and power mode are. So before a few were built there
    nothing is said.

    Args:
        runtime: of the device.
        table: of the device's state; None where there is none yet.
    """
    if runtime != "tensorrt":
        return Pace(SECONDS_PER_ROW, SECONDS_PER_NETWORK)
    if table is None:
        return Pace(None, None)
    networks = [network.measurement for network in table.networks.values()]
    return Pace(seconds_each(table.rows.values()), seconds_each(networks))


def seconds_each(found: Iterable[Measurement]) -> float | None:
    """About how many seconds one of these took, from the times at which they were made; None for fewer than three.

    Those that were measured together have one time. It is the median, so pauses between two commands do not count.
    """
    counts = sorted(Counter(datetime.fromisoformat(m.measured_at).timestamp() for m in found).items())
    each = [(now - before) / n for (before, _), (now, n) in pairwise(counts) for _ in range(n)]
    return statistics.median(each) if len(each) >= LEAST_TIMES else None


@dataclass(frozen=True, slots=True)
class FillProgress:
    """How far filling is. `remaining_s` is None until a row shows how long one takes; `message` is for people."""

    done: int
    total: int
    failed: int
    unstable: int
    remaining_s: float | None
    message: str = ""


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling did.

    `measured` rows were added, `failed` are (key, reason), `unstable` were measured without one calm round. `drift` is
    how much slower (0.1 = 10 %) the reference network is than in the sessions that filled the table before, None where
    there were none. `again` is the command that measures disturbed rows of the table again. `notes` are (key,
    source) of the measured rows whose measurement says something.
    """

    measured: int
    failed: tuple[tuple[str, str], ...]
    unstable: tuple[str, ...]
    drift: float | None
    seconds: float
    again: str
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each thing that a user should know before trusting the numbers."""
        result = []
        if self.drift is not None and self.drift > DRIFT_LIMIT:
            result.append(
                f"the machine is {self.drift:.0%} slower than in the good sessions of this table; the new rows are kept"
                f" but do not count as calm. Close other programs, then run: {self.again}. If it stays so,"
                " the machine has changed: begin a new table"
            )
        slowed = [(key, why) for key, why in self._noted(THROTTLED) if key in self.unstable]
        if slowed:
            key, why = slowed[0]
            result.append(
                f"{len(slowed)} of {self.measured} rows had no calm round: the board was slowed down, the first: {key}:"
                f" {why}. They are marked; see that the board is cool, has power enough and the clocks that it was"
                f" locked to, then measure them again with: {self.again}"
            )
        disturbed = len(self.unstable) - len(slowed)
        if disturbed:
            result.append(
                f"{disturbed} of {self.measured} rows had no calm round: other programs were running."
                f" They are marked; measure them again with: {self.again}"
            )
        short = self._noted(SKIPPED_TACTICS)
        if short:
            key, why = short[0]
            result.append(
                f"{len(short)} of {self.measured} rows are of engines that were built while memory was short, the first"
                f" {key}: {why}. With more of it they may be faster: end other programs, the desktop first"
            )
        if self.failed:
            key, reason = self.failed[0]
            result.append(f"{len(self.failed)} rows could not be measured, the first: {key}: {reason}")
        return tuple(result)

    def _noted(self, begin: str) -> list[tuple[str, str]]:
        """Rows with a note that begins so, and the note."""
        parts = ((key, part) for key, source in self.notes for part in source.split("; "))
        return [(key, part) for key, part in parts if part.startswith(begin)]


OnFill = Callable[[FillProgress], None]


def fill(
    table: LatencyTable,
    device: Device,
    layers: Iterable[LayerSpec],
    *,
    again: bool = False,
    anew: bool = False,
    progress: OnFill | None = None,
    write: Callable[[LayerSpec], bytes] | None = None,
    wait_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> FillReport:
    """Measures the rows that a set of layers needs and the table lacks, and what an empty call and a decision cost.

    Every result is stored as soon as it is there: when the program is stopped, the same call goes on where it was. Rows
    without a calm round get a second chance at the end; rows that were measured while the machine was slower than it is
    now known to be are measured again.

    Args:
        table: opened for the device's state.
        device: measures.
        layers: any layers, repeats allowed.
        again: also measures rows whose measuring failed, and those without a calm round.
        anew: measures all of these rows, whatever the table has.
        progress: told after each row, and now and then while rows are measured.
        write: gives the ONNX bytes of a layer; by default in the form that the device's runtime reads.
        wait_s: how long to wait while another process writes the table, seconds.
        clock: seconds, monotonic.

    Raises:
        StorageError: the table is read only, or another process keeps it.
        UsageError: a layer in a precision that cannot be written for this device.
    """
    started = clock()
    write = write or partial(layer_model, dialect=dialect_for(device.profile))
    by_key = {layer.key: layer for layer in layers}

    def todo(more: bool, state_unknown: bool = False) -> list[LayerSpec]:
        keys = table.missing(by_key, again=more, interpolated=True)
        if state_unknown or not table.is_slow_now:
            keys = list(dict.fromkeys([*keys, *table.outdated(by_key)]))
        return [by_key[key] for key in keys]

    if not anew and not todo(again, state_unknown=True) and table.has_overhead:
        return FillReport(0, (), (), None, 0.0, table.again)

    def waiting(message: str) -> None:
        if progress is not None:
            progress(FillProgress(0, len(by_key), 0, 0, None, message))

    with table.writing(wait_s, waiting):
        drift = open_session(table, device)
        tally = _Tally(clock, progress)
        rows = list(by_key.values()) if anew else todo(again)  # another process may have measured some
        _measure(table, device, rows, write, tally)
        disturbed, tally.unstable = tally.unstable, []
        _measure(table, device, [by_key[key] for key in disturbed], write, tally)  # once more: noise comes in bursts
        if len(rows) >= LOOK_AGAIN_ROWS:  # a machine that has become faster since shows that it was busy before
            later = open_session(table, device, now=True)
            drift = later if drift is None else max(drift, later or 0.0)  # or slower, in the middle
            _measure(table, device, todo(more=False), write, tally)
    return FillReport(
        len(tally.keys),
        tuple(tally.failed),
        tuple(tally.unstable),
        drift,
        clock() - started,
        table.again,
        tuple((key, source) for key, source in tally.notes.items() if source),
    )


def fp32_mb(candidate: Candidate) -> float:
    """Weights of a network in fp32, 10^6 bytes: given the largest of a space, what `measure_streaming` is for."""
    return 4 * total_params(candidate) / 1e6


def measure_streaming(
    table: LatencyTable, device: Device, weight_mb: float, *, wait_s: float = WAIT_S, progress: OnFill | None = None
) -> None:
    """Measures what weights cost that do not stay in the cache, as far as a network of `weight_mb` needs it.

    Nothing is measured for small networks, nor what the table has already.

    Args:
        table: opened for the device's state.
        device: measures.
        weight_mb: weights of the largest network, 10^6 bytes.
        wait_s: how long to wait while another process writes the table, seconds.
        progress: told when another process has to be waited for.

    Raises:
        StorageError: the table is read only, or another process keeps it.
    """
    below = (STREAMING_FROM_MB, *STREAMING_MB)
    sizes = [mb for mb, before in zip(STREAMING_MB, below, strict=False) if weight_mb > before]

    def missing_sizes() -> list[int]:
        known = {mb for mb, _ in table.streaming}
        return [mb for mb in sizes if mb not in known]

    if not missing_sizes():
        return

    def waiting(message: str) -> None:
        if progress is not None:
            progress(FillProgress(0, len(sizes), 0, 0, None, message))

    with table.writing(wait_s, waiting):
        open_session(table, device)
        jobs = [
            streaming_job(streaming_key(mb, cached=cached), mb, cached=cached)
            for mb in missing_sizes()  # another process may have measured some
            for cached in (False, True)
        ]
        device.measure(jobs, on_result=lambda m: store(table, m))


def open_session(table: LatencyTable, device: Device, *, now: bool = False) -> float | None:
    """Measures reference network, overhead and gate before a session's rows; tells the device about the reference.

    A search fills a few rows at a time: within `LOOK_EVERY_S` the last look is enough, unless `now`. Chains that stream
    their weights are looked at again until two looks agree: a neighbour that crowds the third-level cache can make them
    up to 22 % slower for minutes, four times what their weights really cost.

    Returns:
        How much slower the reference is than in good sessions (0.1 = 10 %); None for the first session, or when it was
        looked at a short while ago.

    Raises:
        DeviceError: the device is in another state than the table, also when that changed since it was opened.
    """
    time_s = time.monotonic()
    if not now and table.has_overhead and table.looked_at_s is not None and time_s - table.looked_at_s < LOOK_EVERY_S:
        return None
    state_check(table, device)()
    before = table.reference_ms
    streaming = streaming_key(GATE_STREAMING_MB, cached=False)
    device.expect_reference(before, table.fixed_ms(streaming))
    gate = gate_job(in_graph=dialect_for(device.profile) is ORT)  # for TensorRT exits are a chain
    jobs = [reference_job(), overhead_job(), gate, *_doubtful_chains(table)]
    reference, *_ = [store(table, m) for m in device.measure(jobs)]
    table.looked_at_s = time_s
    device.expect_reference(table.reference_ms, table.fixed_ms(streaming))
    return None if before is None or reference.latency_ms is None else reference.latency_ms / before - 1


def _doubtful_chains(table: LatencyTable) -> list[MeasureJob]:
    """Jobs of the chains that were measured, and of which no two looks found the same least time yet."""
    jobs = []
    for mb in STREAMING_MB:
        key = streaming_key(mb, cached=False)
        looks = [m.latency_ms for m in table.fixed.get(key, ()) if m.latency_ms is not None]
        least = sorted(looks)[:2]
        agree = len(least) == 2 and least[1] <= STREAMING_AGREEMENT * least[0]
        if looks and not agree and len(looks) < STREAMING_LOOKS:
            jobs.append(streaming_job(key, mb, cached=False))
    return jobs


def state_check(table: LatencyTable, device: Device) -> Callable[[], None]:
    """A function to be called before a result is stored: looks at the device's state, at most every `CHECK_STATE_S`.

    It raises DeviceError when the device is in another state than its table.
    """
    looked_s = -CHECK_STATE_S

    def check() -> None:
        nonlocal looked_s
        if time.monotonic() - looked_s < CHECK_STATE_S:
            return
        looked_s = time.monotonic()
        lines = difference_lines(table.profile, device.profile)
        if lines:
            raise DeviceError(
                f"{table.folder}: the device is in another state than its table:\n  "
                + "\n  ".join(lines)
                + "\nWhat was measured in it is not kept. Bring the device back into the state of the table, or begin "
                + "another table."
                + way_back(table.profile, device.profile)
            )

    return check


def _measure(
    table: LatencyTable,
    device: Device,
    rows: Sequence[LayerSpec],
    write: Callable[[LayerSpec], bytes],
    tally: _Tally,
) -> None:
    tally.total += len(rows)
    check_state = state_check(table, device)

    def take(m: Measurement) -> None:
        check_state()
        tally.take(store(table, m))

    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[start : start + ROWS_AT_A_TIME]
        jobs = [MeasureJob(x.key, "row", x.precision, write(x), x.macs) for x in part]
        tally.begin(len(part))
        device.measure(jobs, on_result=take, progress=tally.work)


def store(table: LatencyTable, measurement: Measurement) -> Measurement:
    """Adds a measurement; an impossible value (a clock gone wrong) is added as failed, with its reason."""
    try:
        return table.add(measurement)
    except RecordError as e:
        return table.add(replace(measurement, latency_ms=None, session_ms=(), error=str(e)))


class _Tally:
    """Counts results and tells about them. Rows are measured interleaved: work is done before any has a result."""

    def __init__(self, clock: Callable[[], float], progress: OnFill | None) -> None:
        self.total = 0
        self.done = 0
        self.keys: set[str] = set()
        self.failed: list[tuple[str, str]] = []
        self.unstable: list[str] = []
        self.notes: dict[str, str] = {}
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
        self.keys.add(m.key)
        self._worked = max(self._worked, self.done)
        self.notes[m.key] = m.source  # of the last attempt
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
        remaining = elapsed / self._worked * (self.total - self._worked) if self._worked > 0 else None
        self._progress(FillProgress(self.done, self.total, len(self.failed), len(self.unstable), remaining, message))
