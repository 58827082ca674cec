"""The timing loop on a board: warm-up, interleaved rounds behind a reference network, all samples out.

It is the protocol of `nas/devices/protocol.py` as far as it has to run where the samples are taken; what a latency is,
the host decides from the samples with the functions that it uses for its own. Whether a look at the reference is calm
is asked on both sides: `is_calm` is that one function.

Nothing here knows a runtime: a session is anything with `time(runs, warmup)`; clocks are arguments.
"""

import time
from typing import Any, Callable, Dict, List, Optional

from .errors import BoardError, as_board_error

Sample = Dict[str, Any]
Begin = Callable[[str], None]


class Clock(object):
    """Time of this board, as an argument so that tests can set it."""

    def seconds(self) -> float:
        """Monotonic time."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)

    def utc(self) -> str:
        """Date and time for people, ISO 8601 in UTC; never used for durations or order."""
        return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


class Plan(object):
    """Numbers of the protocol for jobs of one kind, as the host sends them; see `ProtocolSettings` for their meaning.

    `sessions` fresh sessions of the runtime, each with `rounds` rounds of about `round_ms` and `min_runs` to `max_runs`
    runs. `gate_runs` of the reference network come before each round (0: none). A round that is not calm is repeated at
    most `retries` times while the waits, at most `wait_share` lengths of all rounds together, last. `whole`: 1 where
    the models are whole networks: few, so copies of inputs and outputs are measured, and energy where that takes long.

    Raises:
        BoardError: a number is missing, not a number, or out of range.
    """

    FIELDS = (
        ("sessions", 1, 1000),
        ("rounds", 1, 1000),
        ("round_ms", 0, 1e6),
        ("warmup_runs", 0, 1e6),
        ("min_runs", 1, 1e6),
        ("max_runs", 1, 1e6),
        ("retries", 0, 1000),
        ("wait_ms", 0, 1e6),
        ("wait_round_ms", 0, 1e7),
        ("wait_share", 0, 1e4),
        ("gate_runs", 0, 1e4),
        ("gate_cpu_share", 0, 1),
        ("gate_drift", 1, 100),
        ("round_cpu_share", 0, 1),
        ("calibration_checks", 0, 1e4),
        ("alive", 1, 1e4),
        ("hang_s", 0, 1e6),
        ("build_s", 0, 1e6),
        ("whole", 0, 1),
    )

    def __init__(self, told: Dict[str, Any]) -> None:
        for name, low, high in self.FIELDS:
            value = told.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise BoardError("bad_request", "plan: %s must be within %g and %g, got %r" % (name, low, high, value))
        self.sessions = int(told["sessions"])
        self.rounds = int(told["rounds"])
        self.round_ms = float(told["round_ms"])
        self.warmup_runs = int(told["warmup_runs"])
        self.min_runs = int(told["min_runs"])
        self.max_runs = int(told["max_runs"])
        self.retries = int(told["retries"])
        self.wait_ms = float(told["wait_ms"])
        self.wait_round_ms = float(told["wait_round_ms"])
        self.wait_share = float(told["wait_share"])
        self.gate_runs = int(told["gate_runs"])
        self.gate_cpu_share = float(told["gate_cpu_share"])
        self.gate_drift = float(told["gate_drift"])
        self.round_cpu_share = float(told["round_cpu_share"])
        self.calibration_checks = int(told["calibration_checks"])
        self.alive = int(told["alive"])
        self.hang_s = float(told["hang_s"])
        self.build_s = float(told["build_s"])
        self.whole = bool(told["whole"])


def is_calm(median_ms: float, cpu_share: float, best_ms: float, drift: float, least_share: float) -> bool:
    """Whether a look at the reference network lets a round count.

    Args:
        median_ms: of its runs in this look.
        cpu_share: share of a core that the look got, 0-1; 1 where nothing was computed on a core.
        best_ms: best time that is known of the reference.
        drift: largest time that counts as undisturbed, relative to the best.
        least_share: least share of a core.
    """
    return cpu_share > least_share and median_ms < drift * best_ms


class Gate(object):
    """The reference network on this board, and the best time that was seen of it."""

    def __init__(self, session: Any, best_ms: Optional[float]) -> None:
        self._session = session
        self.best_ms = float("inf") if best_ms is None else best_ms
        self._is_ready = False

    def look(self, plan: Plan, begin: Callable[[], None] = lambda: None) -> Sample:
        """`{"median_ms", "cpu_share"}` of `plan.gate_runs` runs now; the first look finds the best time.

        `begin` is called before each further reading of the first look: where a reading starts a program, it takes
        seconds, and all of them together more than the limit of one step.
        """
        if not self._is_ready:
            self._read(plan.gate_runs, plan.warmup_runs)
            for _ in range(plan.calibration_checks):
                begin()
                self._read(plan.gate_runs, 0)
            self._is_ready = True
            begin()
        return self._read(plan.gate_runs, 0)

    def _read(self, runs: int, warmup: int) -> Sample:
        told = self._session.time(runs, warmup)
        median_ms = median(told["samples_ms"])
        if median_ms > 0:  # a clock that stood still is no best time
            self.best_ms = min(self.best_ms, median_ms)
        return {"median_ms": median_ms, "cpu_share": told.get("cpu_share", 1.0)}


class Subject(object):
    """One model under measurement: its session of the runtime, the rounds so far, and what went wrong."""

    def __init__(self, key: str, session: Any) -> None:
        self.key = key
        self.session = session
        self.runs = 0
        self.rounds = []  # type: List[Sample]
        self.error = None  # type: Optional[BoardError]


def measure_rounds(
    subjects: List[Subject],
    plan: Plan,
    gate: Optional[Gate],
    clock: Clock,
    begin: Begin,
    look: Callable[[], Sample],
    after_round: Callable[[], None],
) -> None:
    """Fills `rounds` of all subjects in turn, as many as the plan has; one that raises gets an `error`, others go on.

    Args:
        subjects: models with an open session.
        plan: numbers of the protocol.
        gate: the reference network; None where the plan has none.
        clock: time.
        begin: told the key of a subject before anything is done with it: what hangs is then known.
        look: gives what the board's sensors say after a round, such as `{"throttled": true, "temperature_c": 71.5}`.
        after_round: called after each round, outside any timed window.
    """
    patience = _patience(subjects, plan)
    for subject in subjects:
        begin(subject.key)
        _guarded(subject, lambda s=subject: _prepare(s, plan))  # type: ignore[misc]
    for _ in range(plan.rounds):
        for subject in subjects:
            if subject.error is None:
                _guarded(subject, lambda s=subject: _round(s, plan, gate, clock, look, patience, begin))  # type: ignore[misc]
            after_round()


def measure_in_turn(
    subjects: List[Subject],
    plan: Plan,
    gate: Optional[Gate],
    clock: Clock,
    begin: Begin,
    look: Callable[[], Sample],
    after_turn: Callable[[], None],
) -> None:
    """Rounds of subjects that are warm and know their number of runs, one after the other, again and again.

    Arguments are those of `measure_rounds`; `after_turn` is called when each of them had a round.

    Raises:
        Exception: whatever a session raises.
    """
    patience = _patience(subjects, plan)
    for _ in range(plan.rounds):
        for subject in subjects:
            _round(subject, plan, gate, clock, look, patience, begin)
        after_turn()


def _patience(subjects: List[Subject], plan: Plan) -> List[float]:
    """Seconds that all subjects together may spend on waits and on repeated rounds."""
    return [plan.wait_share * len(subjects) * plan.rounds * plan.round_ms / 1e3 if plan.retries else 0.0]


def _prepare(subject: Subject, plan: Plan) -> None:
    pilot = max(1, min(plan.min_runs, 10))
    median_ms = median(subject.session.time(pilot, plan.warmup_runs)["samples_ms"])
    wanted = plan.round_ms / median_ms if median_ms > 0 else plan.max_runs
    subject.runs = int(min(plan.max_runs, max(plan.min_runs, wanted)))


def _round(
    subject: Subject,
    plan: Plan,
    gate: Optional[Gate],
    clock: Clock,
    look: Callable[[], Sample],
    patience: List[float],
    begin: Begin,
) -> None:
    for _ in range(plan.retries + 1):
        begin(subject.key)  # each attempt has the time of a step
        reading = None if gate is None else _calm_reading(gate, plan, clock, patience)
        began_s = clock.seconds()
        told = _sent(subject.session.time(subject.runs, 0))
        told["gate"] = reading
        told.update(look())
        subject.rounds.append(told)
        share = told.get("cpu_share", 1.0)
        calm = reading is None or _is_calm(reading, gate, plan)
        if (calm and share > plan.round_cpu_share and not told.get("throttled")) or patience[0] <= 0:
            return
        if share <= plan.round_cpu_share or told.get("throttled"):
            clock.sleep(plan.wait_ms / 1e3)
        patience[0] -= clock.seconds() - began_s - told.get("cooled_s", 0.0)


def _sent(told: Sample) -> Sample:
    """What travels of a round: nanoseconds of its samples, and not what `enqueue_bound` sums up of its runs."""
    left = {name: value for name, value in told.items() if name not in ("host_ms", "single_ms")}
    return dict(left, samples_ms=[round(ms, 6) for ms in told["samples_ms"]])


def _calm_reading(gate: Gate, plan: Plan, clock: Clock, patience: List[float]) -> Sample:
    """A look at the reference; while it is not calm further ones, as long as the patience lasts."""
    began_s = clock.seconds()
    longest_s = min(plan.wait_round_ms / 1e3, patience[0])
    reading = gate.look(plan)
    while not _is_calm(reading, gate, plan) and clock.seconds() - began_s < longest_s:
        if reading["cpu_share"] <= plan.gate_cpu_share:
            clock.sleep(plan.wait_ms / 1e3)  # another program wants this processor
        reading = gate.look(plan)
    patience[0] -= clock.seconds() - began_s
    return reading


def _is_calm(reading: Sample, gate: Optional[Gate], plan: Plan) -> bool:
    best_ms = float("inf") if gate is None else gate.best_ms
    return is_calm(reading["median_ms"], reading["cpu_share"], best_ms, plan.gate_drift, plan.gate_cpu_share)


def _guarded(subject: Subject, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as e:  # whatever a runtime raises becomes a result with its reason
        subject.error = as_board_error(e, "build_failed")


def median(values: List[float]) -> float:
    """The middle one of the values, or the mean of the two in the middle.

    Raises:
        BoardError: no value.
    """
    if not values:
        raise BoardError("truncated", "a run of the model gave no samples")
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
