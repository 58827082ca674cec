"""The measuring protocol for a noisy host: interleaved rounds behind a gate, thread CPU time, low percentile, minimum;
over the fresh sessions of a network the lower quartile.

Why, measured on a shared two-core x86-64 virtual machine (10 fresh sessions, networks of 0.3-6 ms): the mean or median
of run times varies by 2-17 %, the minimum over separated rounds of their 20th percentile by 0.6-1.6 %; longer rounds do
not help. Thread CPU time does not see preemption; the reference network in the gate sees what it cannot: a neighbour in
the cache or on the memory bus, and a lower clock. Thread CPU time is the latency only while all work is on one thread.

With several threads a sample is wall time, and the share of a core stays that of the calling thread, which works or
spins until the others are done: it shows when that thread lost its core. Nothing shows it for the others at this
scale: the CPU time of a process counts what runs on another core only at the scheduler's ticks (two busy threads read
as one over 1.2 ms). A worker without a core makes the reference network slow, which the gate sees.

On a busy host calm moments are short but they hold together: with 14 % of the gate's looks calm, the next look after a
calm one was calm in 73 % and the one after ten looks (20 ms) in 53 %. So a round does not start before the gate is
calm: looking again costs a fraction of a round, and the total of such waiting is limited.

The reference network stays in the second-level cache, where a neighbour's traffic does not reach it: on a host whose
third-level cache is shared it read calm (1 % above its best) while networks of 2 to 14 MB of weights took 5 to 25 %
longer than at best, for seconds at a time, and rows of blocks repeated within 0.5 %. So subjects that read more than
that cache holds are watched by a second reference, a chain of convolutions that reads 8 MB: the rank correlation of its
time with that of a network run right after it was 0.5 to 0.8 (12 networks, 40 rounds each).

Nothing here knows a runtime: a subject is a function without arguments, the clock is an argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, Protocol

import numpy as np

from nas.core.errors import RecordError
from nas.devices.base import CalmReport, JobKind
from nas.devices.board import errors
from nas.devices.board.rounds import is_calm

Run = Callable[[], object]
SampleClock = Literal["thread_cpu", "wall"]

SESSION_QUANTILE = 0.25  # of the sessions of the runtime: what stands for a network, see `network_value`


class Clock(Protocol):
    """Time, as an argument so that tests can set it."""

    def cpu_ns(self) -> int:
        """CPU time of this thread in nanoseconds."""
        ...

    def wall_ns(self) -> int:
        """Monotonic time in nanoseconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits."""
        ...

    def utc(self) -> str:
        """Date and time for people, ISO 8601 in UTC; never used for durations or order."""
        ...


class SystemClock:
    """The clock of this machine."""

    def cpu_ns(self) -> int:
        return time.thread_time_ns()

    def wall_ns(self) -> int:
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def utc(self) -> str:
        return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class ProtocolSettings:
    """Numbers of the protocol; the defaults were tuned on the machine named above.

    clock: what a sample is timed with: `thread_cpu` while all work is on the calling thread, else `wall`.
    warmup_runs: runs before anything is timed.
    network_round_ms, row_round_ms: length of a round, in milliseconds of that clock.
    network_rounds, row_rounds: rounds in one session.
    network_sessions, row_sessions: fresh sessions of the runtime.
    most_network_sessions: sessions at most, of all but rows: they go on until `agreeing_sessions` found the same time.
    agreeing_sessions: so many of the fastest sessions have to agree. Where something disturbs all the time, two agree
        by chance: with two (within 1 %, at most 9 sessions) networks came out 6.8 % (fp32) and 2.8 % (int8) above the
        best that was ever seen of them, with four (1.5 %, at most 15) 2.6 % and 1.0 % (24 networks, 4 times each).
    agreement: largest difference between these sessions that is taken for the same time, as a ratio.
    networks_alive, rows_alive: how many have a session of the runtime at a time, and are measured interleaved. Of
        further networks each has a session before any has its next: under a neighbour that crowded the third-level
        cache the best of 70 rounds of a network varied by 3 to 5 % from one quarter of a minute to the next, and by
        1 to 2 % where the 70 were spread over 150 s (8 networks of 2 to 18 MB).
    min_runs, max_runs: runs in one round; `min_network_runs` is the least of all but rows.
    retries: how often a disturbed round is repeated; 0: nothing is repeated or waited for.
    wait_ms: pause after another program had the processor, in milliseconds.
    wait_round_ms: longest wait for a calm moment before one round, in milliseconds.
    wait_share: all such waits of an interleaved batch together, in lengths of its rounds; on a host that is never calm
        measuring takes so many times longer and ends with marked results.
    gate_runs: runs of the reference network before a round.
    gate_first_runs: of these, the runs after which a look at a host that is clearly not calm ends.
    gate_fresh_ms: while the host is quiet, a look at the reference network holds for so long, in milliseconds.
    gate_streak: calm looks in a row after which the host is quiet.
    gate_streaming_runs: runs of the streaming reference, the first of which finds the cache full of something else.
    gate_cpu_share: least share of a core in the gate, 0-1.
    gate_drift: largest median of the gate, and largest time of the streaming reference, relative to the best ever seen.
    round_cpu_share: least share of a core in a round, 0-1.
    quantile: the percentile of the run times of a round that stands for it, 0-1.
    min_sample_ns: a sample shorter than this is made of more runs (coarse clocks).
    max_inner: most runs in one sample.
    hang_s: seconds after which a session that is being made, or a round, is taken for one that never ends.
    calibration_checks: gate checks that find the best time of the reference network before the first measurement.
    """

    clock: SampleClock = "thread_cpu"
    warmup_runs: int = 3
    network_round_ms: float = 5.0
    row_round_ms: float = 2.0
    network_rounds: int = 4
    row_rounds: int = 3
    network_sessions: int = 4
    row_sessions: int = 1
    most_network_sessions: int = 15
    agreeing_sessions: int = 4
    agreement: float = 0.015
    networks_alive: int = 24
    rows_alive: int = 40
    min_runs: int = 4
    min_network_runs: int = 6
    max_runs: int = 60
    retries: int = 6
    wait_ms: float = 10.0
    wait_round_ms: float = 1000.0
    wait_share: float = 10.0
    gate_runs: int = 6
    gate_first_runs: int = 2
    gate_fresh_ms: float = 10.0
    gate_streak: int = 6
    gate_streaming_runs: int = 4
    gate_cpu_share: float = 0.97
    gate_drift: float = 1.05
    round_cpu_share: float = 0.95
    quantile: float = 0.2
    min_sample_ns: int = 500
    max_inner: int = 1024
    hang_s: float = 120.0
    calibration_checks: int = 20

    def __post_init__(self) -> None:
        for name in (
            "network_rounds",
            "row_rounds",
            "network_sessions",
            "row_sessions",
            "most_network_sessions",
            "agreeing_sessions",
            "networks_alive",
            "rows_alive",
            "min_runs",
            "gate_runs",
            "gate_first_runs",
            "gate_streaming_runs",
            "max_inner",
            "calibration_checks",
        ):
            if getattr(self, name) < 1:
                raise RecordError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_runs < self.min_runs:
            raise RecordError(f"max_runs ({self.max_runs}) must not be below min_runs ({self.min_runs})")
        if not 0 <= self.quantile <= 1:
            raise RecordError(f"quantile must be within 0 and 1, got {self.quantile}")

    def rounds(self, kind: JobKind) -> int:
        """Rounds in one session."""
        return self.row_rounds if kind == "row" else self.network_rounds

    def round_ms(self, kind: JobKind) -> float:
        """Length of a round, milliseconds."""
        return self.row_round_ms if kind == "row" else self.network_round_ms

    def least_runs(self, kind: JobKind) -> int:
        """Runs in one round, at least."""
        return self.min_runs if kind == "row" else max(self.min_runs, self.min_network_runs)

    def sessions(self, kind: JobKind) -> int:
        """Fresh sessions of the runtime, at least."""
        return self.row_sessions if kind == "row" else self.network_sessions

    def most_sessions(self, kind: JobKind) -> int:
        """Fresh sessions of the runtime, at most."""
        return self.row_sessions if kind == "row" else max(self.network_sessions, self.most_network_sessions)

    def alive(self, kind: JobKind) -> int:
        """How many are measured interleaved."""
        return self.rows_alive if kind == "row" else self.networks_alive


@dataclass(frozen=True, slots=True)
class GateReading:
    """One look at the references: median time of the network's runs, the share of a core that this thread got, and the
    fastest run of the streaming reference where that was looked at."""

    median_ms: float
    cpu_share: float
    streaming_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One round: a sample per run (ms), this thread's share of a core, and the gate before it."""

    samples_ms: tuple[float, ...]
    cpu_share: float
    gate: GateReading


@dataclass(frozen=True, slots=True)
class KnownBest:
    """The best times that are known of the references (ms, infinite where unknown); judges looks at them."""

    reference_ms: float
    streaming_ms: float
    settings: ProtocolSettings

    def is_calm(self, reading: GateReading) -> bool:
        """Whether a round after this reading can be accepted."""
        drift = self.settings.gate_drift
        share = self.settings.gate_cpu_share
        streams = reading.streaming_ms is None or reading.streaming_ms < drift * self.streaming_ms
        return streams and is_calm(reading.median_ms, reading.cpu_share, self.reference_ms, drift, share)


def calm_report(readings: Sequence[GateReading], best: KnownBest) -> CalmReport:
    """How quiet a device is by looks at its references, at least one."""
    medians = sorted(r.median_ms for r in readings)
    return CalmReport(
        checks=len(readings),
        rejected=sum(not best.is_calm(r) for r in readings),
        best_ms=best.reference_ms,
        median_ms=medians[len(medians) // 2],
        worst_ms=medians[-1],
        cpu_share=min(r.cpu_share for r in readings),
    )


THROTTLED = "throttled"  # begins a note on rounds that are marked, in `Measurement.source`
SKIPPED_TACTICS = "skipped_tactics"  # begins the note on an engine whose builder was short of memory


def queueing_note(is_graph: bool) -> str:
    """What to say of a model whose inferences the host queues about as slowly as the accelerator computes them."""
    return f"queueing takes about as long as the inference, {'with' if is_graph else 'without'} a CUDA graph"


class Gate:
    """The references in front of every round, and the best time ever seen of each."""

    def __init__(
        self, reference: Run, settings: ProtocolSettings, clock: Clock, streaming: Callable[[], Run] | None = None
    ) -> None:
        """Args:
        reference: runs the reference network once.
        settings: numbers of the protocol.
        clock: time.
        streaming: makes what reads more weights than the cache holds; called when a subject first needs it.
        """
        self._reference = reference
        self._settings = settings
        self._clock = clock
        self._make_streaming = streaming
        self._streaming: Run | None = None
        self._best_ms = float("inf")
        self._best_streaming_ms = float("inf")
        self._expected_ms = float("inf")
        self._expected_streaming_ms = float("inf")
        self._streak = 0  # calm looks in a row
        self._last: tuple[int, GateReading] | None = None  # the last look and when it ended

    @property
    def best_ms(self) -> float:
        """Best median in this session, or the time that earlier sessions had where that is lower."""
        return min(self._best_ms, self._expected_ms)

    @property
    def best_streaming_ms(self) -> float:
        """Best time of the streaming reference in this session, or that of earlier sessions where it is lower."""
        return min(self._best_streaming_ms, self._expected_streaming_ms)

    def expect(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Sets the times of the references in earlier sessions; None forgets them."""
        self._expected_ms = float("inf") if reference_ms is None else reference_ms
        self._expected_streaming_ms = float("inf") if streaming_ms is None else streaming_ms

    def look(self, streams: bool = False) -> GateReading:
        """The reading for a round that begins now: the last one while it is fresh and the host quiet, else a new one.

        A look takes as long as the round of a row; on a quiet host one in a few rounds is enough to see a change.

        Args:
            streams: the round is of a subject that reads more than the cache holds.
        """
        settings = self._settings
        if self._last is not None and self._streak >= settings.gate_streak:
            ended_ns, reading = self._last
            fresh = 0 <= self._clock.wall_ns() - ended_ns < settings.gate_fresh_ms * 1e6
            covers = not streams or reading.streaming_ms is not None or self._make_streaming is None
            if fresh and covers and self.is_calm(reading):
                return reading
        return self.check(streams)

    def check(self, streams: bool = False) -> GateReading:
        """Runs the references and remembers their best times; stops early where the host is clearly not calm."""
        if self._best_ms == float("inf"):
            self._calibrate()
        reading = self._checked()
        if streams and self.is_calm(reading):
            reading = replace(reading, streaming_ms=self._read_streaming())
        self._streak = self._streak + 1 if self.is_calm(reading) else 0
        self._last = self._clock.wall_ns(), reading
        return reading

    def _checked(self) -> GateReading:
        settings = self._settings
        first, share = timed_runs(self._reference, settings.gate_first_runs, 1, self._clock, settings.clock)
        if min(first) >= settings.gate_drift * self.best_ms:
            return GateReading(float(np.median(first)), share)
        return self._read(first, share)

    def is_calm(self, reading: GateReading) -> bool:
        """Whether a round after this reading can be accepted, judged by the best times known now."""
        return KnownBest(self.best_ms, self.best_streaming_ms, self._settings).is_calm(reading)

    def report(self, checks: int) -> CalmReport:
        """Takes `checks` readings of all references, 5 ms apart."""
        readings = []
        for _ in range(max(1, checks)):
            readings.append(self.check(streams=True))
            self._clock.sleep(0.005)
        return calm_report(readings, KnownBest(self.best_ms, self.best_streaming_ms, self._settings))

    def _calibrate(self) -> None:
        for _ in range(self._settings.warmup_runs):
            self._reference()
        for _ in range(self._settings.calibration_checks):
            self._read()

    def _read(self, first: Sequence[float] = (), first_share: float = 1.0) -> GateReading:
        """A reading of `gate_runs` runs, of which some may have been made, with their share of a core."""
        runs = max(1, self._settings.gate_runs - len(first))
        samples, share = timed_runs(self._reference, runs, 1, self._clock, self._settings.clock)
        median_ms = float(np.median([*first, *samples]))
        if median_ms > 0:  # a clock that stood still is no best time
            self._best_ms = min(self._best_ms, median_ms)
        return GateReading(median_ms, min(share, first_share))

    def _read_streaming(self) -> float | None:
        if self._streaming is None:
            if self._make_streaming is None:
                return None
            self._streaming = self._make_streaming()
            for _ in range(self._settings.calibration_checks):
                self._read_streaming()
        runs = self._settings.gate_streaming_runs
        samples, _ = timed_runs(self._streaming, runs, 1, self._clock, self._settings.clock)
        fastest_ms = min(samples)
        if fastest_ms > 0:
            self._best_streaming_ms = min(self._best_streaming_ms, fastest_ms)
        return fastest_ms


@dataclass(slots=True)
class Subject:
    """One thing under measurement in one session of the runtime; `attempts` and `error` grow while it is measured.

    `streams`: it reads more weights than the second-level cache holds, so the streaming reference watches its rounds.
    `before` is called before each sample and is not timed, such as to put the next image into place.
    """

    key: str
    kind: JobKind
    run: Run
    streams: bool = False
    runs: int = 0
    inner: int = 1
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
    before: Run | None = None


def timed_runs(
    run: Run,
    runs: int,
    inner: int,
    clock: Clock,
    kind: SampleClock = "thread_cpu",
    before: Run | None = None,
) -> tuple[tuple[float, ...], float]:
    """Times `runs` samples of `inner` calls each; `before` is called in front of each sample and is not in it.

    Returns:
        Time of one call, per sample, in milliseconds of the clock `kind`; and thread CPU time over wall time of them
        all.
    """
    cpu_ns, wall_ns = clock.cpu_ns, clock.wall_ns
    now_ns = wall_ns if kind == "wall" else cpu_ns
    samples = []
    rest = range(inner - 1)
    wall_start = wall_ns()
    cpu_start = cpu_ns()
    for _ in range(runs):
        if before is not None:
            before()
        start = now_ns()
        run()
        for _ in rest:
            run()
        samples.append(now_ns() - start)
    cpu_total = cpu_ns() - cpu_start
    wall_total = wall_ns() - wall_start
    share = min(1.0, cpu_total / wall_total) if wall_total > 0 else 0.0
    return tuple(round(s / inner / 1e6, 6) for s in samples), share


def round_value(samples_ms: Sequence[float], quantile: float) -> float:
    """The value of a round: a low percentile of its samples, milliseconds."""
    return float(np.quantile(np.asarray(samples_ms, dtype=np.float64), quantile))


def prepare(subject: Subject, settings: ProtocolSettings, clock: Clock) -> None:
    """Warms up, then finds how many runs a sample and a round need. A clock that never advances becomes an error."""
    for _ in range(settings.warmup_runs):
        subject.run()
    while True:
        samples, _ = timed_runs(subject.run, settings.warmup_runs or 1, subject.inner, clock, settings.clock)
        median_ms = float(np.median(samples))
        if median_ms * subject.inner * 1e6 >= settings.min_sample_ns:
            break
        if subject.inner >= settings.max_inner:
            if median_ms <= 0:
                subject.error = f"the clock shows no time for {subject.inner} runs: too fast to be measured"
                return
            break
        subject.inner *= 2
    wanted = settings.round_ms(subject.kind) / median_ms / subject.inner
    subject.runs = int(min(settings.max_runs, max(settings.least_runs(subject.kind), wanted)))


def measure_interleaved(
    subjects: Sequence[Subject],
    gate: Gate,
    settings: ProtocolSettings,
    clock: Clock,
    after_round: Callable[[], None] | None = None,
    begin: Callable[[str], None] = lambda _: None,
) -> None:
    """Fills `attempts` of all subjects in round-robin rounds. A subject that raises gets an `error` and is left out.

    A disturbed round is kept and repeated, at most `settings.retries` times and while the waiting time lasts. `begin`
    is told the key of a subject before its warm-up and before each of its rounds.
    """
    patience = Patience(subjects, settings)
    for subject in subjects:
        begin(subject.key)
        if subject.error is None:
            _guarded(subject, lambda s=subject: prepare(s, settings, clock))  # type: ignore[misc]
    for number in range(max((settings.rounds(s.kind) for s in subjects), default=0)):
        for subject in subjects:
            begin(subject.key)
            if subject.error is None and number < settings.rounds(subject.kind):
                _guarded(subject, lambda s=subject: _round(s, gate, settings, clock, patience))  # type: ignore[misc]
            if after_round is not None:
                after_round()


def measure_in_turn(
    subjects: Sequence[Subject],
    gate: Gate,
    settings: ProtocolSettings,
    clock: Clock,
    begin: Callable[[str], None] = lambda _: None,
) -> None:
    """Rounds of subjects that are warm and know their number of runs, one after the other, again and again.

    Raises:
        Exception: whatever a subject raises.
    """
    patience = Patience(subjects, settings)
    for _ in range(settings.network_rounds):
        for subject in subjects:
            begin(subject.key)
            _round(subject, gate, settings, clock, patience)


class Patience:
    """Wall time that a batch may spend on waiting for calm moments and on repeating disturbed rounds."""

    def __init__(self, subjects: Sequence[Subject], settings: ProtocolSettings) -> None:
        nominal_ms = sum(settings.rounds(s.kind) * settings.round_ms(s.kind) for s in subjects)
        self.left_ns = settings.wait_share * nominal_ms * 1e6 if settings.retries else 0.0  # 0 or less: nothing

    def spend(self, from_ns: int, to_ns: int) -> None:
        """Takes off the time between the two."""
        self.left_ns -= max(0, to_ns - from_ns)


def _round(subject: Subject, gate: Gate, settings: ProtocolSettings, clock: Clock, patience: Patience) -> None:
    for _ in range(settings.retries + 1):
        reading = gate.look(subject.streams)
        began = clock.wall_ns()
        longest = min(settings.wait_round_ms * 1e6, patience.left_ns)
        while not gate.is_calm(reading) and 0 <= clock.wall_ns() - began < longest:
            if reading.cpu_share <= settings.gate_cpu_share:
                clock.sleep(settings.wait_ms / 1e3)  # another program wants this processor
            reading = gate.check(subject.streams)
        waited = clock.wall_ns()
        patience.spend(began, waited)
        samples, share = timed_runs(subject.run, subject.runs, subject.inner, clock, settings.clock, subject.before)
        attempt = Attempt(samples, share, reading)
        subject.attempts.append(attempt)
        if is_accepted(attempt, gate, settings) or patience.left_ns <= 0:
            return
        if share <= settings.round_cpu_share:
            clock.sleep(settings.wait_ms / 1e3)
        patience.spend(waited, clock.wall_ns())


def is_accepted(attempt: Attempt, gate: Gate | KnownBest, settings: ProtocolSettings) -> bool:
    """Whether a round counts, by what is known now: asked again at the end, when the best time may be lower."""
    return gate.is_calm(attempt.gate) and attempt.cpu_share > settings.round_cpu_share


def _guarded(subject: Subject, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as e:  # whatever a runtime raises becomes a recorded row with its reason
        subject.error = one_line(e)


def one_line(error: BaseException) -> str:
    """Type and message of an exception in one line of bounded length."""
    return errors.one_line(f"{type(error).__name__}: {error}")


def session_value(attempts: Sequence[Attempt], settings: ProtocolSettings) -> float:
    """Latency of one session in milliseconds: the minimum over its rounds.

    Disturbed rounds take part: a disturbance only adds time, so the least of more rounds is nearer to the truth. With
    megabytes of weights under a busy neighbour two such minima differed by 7 %, by 10 % over the calm rounds alone
    (12 networks, 4 times).
    """
    return min(round_value(a.samples_ms, settings.quantile) for a in attempts)


def network_value(session_ms: Sequence[float]) -> float:
    """Latency by the values of its sessions, milliseconds: the lower quartile, which is what a fresh session takes.

    Sessions differ by 1 to 2 % in where they lie in memory, and disturbance only adds. The fastest one is a matter of
    luck, and the more sessions there were the lower it is: where they end as soon as they agree, the estimate from ten
    measured networks had an error of 1.77 % by the fastest session, 1.44 % by the quartile and 1.40 % by the median
    (100 int8 networks), and a repeated measurement differed by 0.6, 0.5 and 0.6 % (24 networks, 5 times). On a busy
    host the median is worse: 1.0, 1.1 and 2.0 % (24 fp32 networks, 4 times).
    """
    return float(np.quantile(np.asarray(session_ms, dtype=np.float64), SESSION_QUANTILE))


def agrees(session_ms: Sequence[float], settings: ProtocolSettings) -> bool:
    """Whether enough of the fastest sessions found the same time, so that further ones would find no other."""
    best = sorted(session_ms)[: settings.agreeing_sessions]
    return len(best) >= settings.agreeing_sessions and best[-1] <= (1 + settings.agreement) * best[0]
