"""The measuring protocol with a clock that tests set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest

from nas.core.errors import RecordError
from nas.devices.protocol import (
    Attempt,
    Gate,
    GateReading,
    ProtocolSettings,
    Subject,
    agrees,
    is_accepted,
    measure_interleaved,
    prepare,
    round_value,
    session_value,
    timed_runs,
)

SETTINGS = ProtocolSettings(calibration_checks=2, warmup_runs=1)
REFERENCE_US = 300


class FakeClock:
    """Time that only moves when something spends it; `stolen` is wall time in which the thread does not run."""

    def __init__(self) -> None:
        self.cpu = 0
        self.wall = 0
        self.slept_s = 0.0

    def cpu_ns(self) -> int:
        return self.cpu

    def wall_ns(self) -> int:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.wall += int(seconds * 1e9)

    def utc(self) -> str:
        return "2000-01-01T00:00:00+00:00"

    def spend(self, cpu_us: float, stolen_us: float = 0.0) -> None:
        self.cpu += int(cpu_us * 1e3)
        self.wall += int((cpu_us + stolen_us) * 1e3)


def taking(clock: FakeClock, times_us: Iterable[float], stolen_us: float = 0.0) -> Callable[[], None]:
    """A run that takes these times in turn, the last one for ever."""
    rest: Iterator[float] = iter(times_us)
    last = [0.0]

    def run() -> None:
        last[0] = next(rest, last[0])
        clock.spend(last[0], stolen_us)

    return run


def calm_gate(clock: FakeClock) -> Gate:
    return Gate(taking(clock, [REFERENCE_US]), SETTINGS, clock)


def test_samples_are_thread_cpu_time_per_run() -> None:
    clock = FakeClock()
    samples, share = timed_runs(taking(clock, [10, 20, 30], stolen_us=20), 3, 1, clock)
    assert samples == (0.010, 0.020, 0.030)
    assert share == pytest.approx(0.5)


def test_samples_of_several_threads_are_wall_time_and_the_share_stays_that_of_the_calling_thread() -> None:
    clock = FakeClock()
    samples, share = timed_runs(taking(clock, [10, 20, 30], stolen_us=20), 3, 1, clock, "wall")
    assert samples == (0.030, 0.040, 0.050)
    assert share == pytest.approx(0.5)


def test_every_part_of_the_protocol_times_by_the_clock_of_its_settings() -> None:
    clock, settings = FakeClock(), replace(SETTINGS, clock="wall", gate_cpu_share=0.0, round_cpu_share=0.0)
    gate = Gate(taking(clock, [REFERENCE_US], stolen_us=100.0), settings, clock)
    assert gate.check().median_ms == pytest.approx(0.4)
    assert gate.best_ms == pytest.approx(0.4)
    subject = Subject("x", "row", taking(clock, [200.0], stolen_us=50.0))
    measure_interleaved([subject], gate, settings, clock)
    assert subject.runs == 8  # of 0.25 ms each in a round of 2 ms
    assert session_value(subject.attempts, settings) == pytest.approx(0.25)


def test_a_worker_that_loses_its_core_makes_the_gate_reject_though_the_calling_thread_keeps_its_own() -> None:
    clock, settings = FakeClock(), replace(SETTINGS, clock="wall", retries=0)
    calibration = settings.warmup_runs + settings.calibration_checks * settings.gate_runs
    gate = Gate(taking(clock, [200.0] * calibration + [REFERENCE_US]), settings, clock)
    subject = Subject("x", "row", taking(clock, [1000.0]))
    measure_interleaved([subject], gate, settings, clock)
    assert [a.cpu_share for a in subject.attempts] == [1.0] * settings.row_rounds
    assert not any(is_accepted(a, gate, settings) for a in subject.attempts)


def test_value_of_a_round_is_a_low_percentile_and_ignores_slow_runs() -> None:
    assert round_value([1.0, 1.1, 1.2, 1.3, 50.0], 0.2) == pytest.approx(1.08)


def test_value_of_a_session_is_the_minimum_over_its_rounds() -> None:
    clock = FakeClock()
    gate = calm_gate(clock)
    subject = Subject("x", "row", taking(clock, [100.0]))
    measure_interleaved([subject], gate, SETTINGS, clock)
    assert len(subject.attempts) == SETTINGS.row_rounds
    assert all(is_accepted(a, gate, SETTINGS) for a in subject.attempts)
    assert session_value(subject.attempts, SETTINGS) == pytest.approx(0.1)


def test_a_disturbed_round_counts_where_it_is_the_fastest() -> None:
    clock = FakeClock()
    reading = calm_gate(clock).check()
    disturbed, calm = Attempt((0.099,) * 4, 0.5, reading), Attempt((0.1,) * 4, 1.0, reading)
    assert session_value([disturbed, calm], SETTINGS) == 0.099


def test_sessions_agree_when_enough_of_the_fastest_do() -> None:
    settings = replace(SETTINGS, agreement=0.01, agreeing_sessions=2)
    assert agrees((2.0, 1.0, 1.009), settings)
    assert not agrees((2.0, 1.0, 1.011), settings)
    assert not agrees((1.0,), settings)
    three = replace(settings, agreeing_sessions=3)
    assert agrees((1.009, 2.0, 1.0, 1.005), three)
    assert not agrees((1.0, 1.005, 1.011), three)
    assert not agrees((1.0, 1.0), three)


def test_number_of_runs_fills_the_round_within_its_limits() -> None:
    clock = FakeClock()
    for kind, run_us, expected in (
        ("row", 1000.0, 4),
        ("row", 100.0, 20),
        ("row", 10.0, 60),
        ("network", 1000.0, 6),
        ("network", 100.0, 50),
    ):
        subject = Subject("x", kind, taking(clock, [run_us]))
        prepare(subject, SETTINGS, clock)
        assert subject.runs == expected


def test_subjects_take_turns() -> None:
    clock = FakeClock()
    order: list[str] = []
    subjects = [Subject(key, "row", lambda key=key: (order.append(key), clock.spend(3000.0))) for key in "ab"]  # type: ignore[misc]
    measure_interleaved(subjects, calm_gate(clock), SETTINGS, clock)
    measured = order[2 * (SETTINGS.warmup_runs + 1) :]
    rounds = ["".join(measured[i : i + 4]) for i in range(0, len(measured), 4)]
    assert rounds == ["aaaa", "bbbb"] * SETTINGS.row_rounds


def test_a_preempted_round_is_kept_and_repeated_after_a_pause() -> None:
    clock = FakeClock()
    gate = calm_gate(clock)
    gate.check()
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        clock.spend(1000.0, stolen_us=500.0 if 3 <= calls <= 6 else 0.0)  # the first round loses a third of the time

    subject = Subject("x", "row", run)
    measure_interleaved([subject], gate, SETTINGS, clock)
    assert [is_accepted(a, gate, SETTINGS) for a in subject.attempts] == [False, True, True, True]
    assert clock.slept_s == pytest.approx(SETTINGS.wait_ms / 1e3)


def test_a_machine_that_is_never_calm_ends_flagged_with_the_minimum_of_everything() -> None:
    clock = FakeClock()
    gate = Gate(taking(clock, [REFERENCE_US], stolen_us=100.0), SETTINGS, clock)
    subject = Subject("x", "row", taking(clock, [3000.0] * 8 + [2000.0]))
    measure_interleaved([subject], gate, SETTINGS, clock)
    assert len(subject.attempts) == SETTINGS.row_rounds  # all waiting was in vain, so nothing is repeated
    assert not any(is_accepted(a, gate, SETTINGS) for a in subject.attempts)
    assert session_value(subject.attempts, SETTINGS) == pytest.approx(2.0)
    nominal_s = SETTINGS.row_rounds * SETTINGS.row_round_ms / 1e3
    assert SETTINGS.wait_share * nominal_s <= clock.wall / 1e9 < (SETTINGS.wait_share + 12) * nominal_s


def test_a_round_waits_for_a_calm_moment_and_is_then_taken_once() -> None:
    clock = FakeClock()
    calm_from = 20  # runs of the reference network after its calibration
    times = [REFERENCE_US] * (SETTINGS.warmup_runs + SETTINGS.calibration_checks * SETTINGS.gate_runs)
    times += [1.3 * REFERENCE_US] * calm_from + [REFERENCE_US]
    gate = Gate(taking(clock, times), SETTINGS, clock)
    subject = Subject("x", "row", taking(clock, [1000.0]))
    measure_interleaved([subject], gate, SETTINGS, clock)
    assert len(subject.attempts) == SETTINGS.row_rounds
    assert all(is_accepted(a, gate, SETTINGS) for a in subject.attempts)
    assert clock.slept_s == 0.0  # a slower processor is no other program: giving it away would not help


def test_without_retries_nothing_is_waited_for() -> None:
    clock = FakeClock()
    settings = ProtocolSettings(calibration_checks=2, warmup_runs=1, retries=0)
    gate = Gate(taking(clock, [REFERENCE_US] * 13 + [1.3 * REFERENCE_US]), settings, clock)
    subject = Subject("x", "row", taking(clock, [1000.0]))
    measure_interleaved([subject], gate, settings, clock)
    assert len(subject.attempts) == settings.row_rounds
    assert not any(is_accepted(a, gate, settings) for a in subject.attempts)


def test_gate_notices_a_slower_reference_network() -> None:
    clock = FakeClock()
    gate = calm_gate(clock)
    gate.check()
    assert gate.is_calm(GateReading(0.310, 1.0))
    assert not gate.is_calm(GateReading(0.320, 1.0))
    assert not gate.is_calm(GateReading(0.300, 0.96))


def test_on_a_quiet_host_one_look_holds_for_the_rounds_of_a_few_milliseconds() -> None:
    clock, settings = FakeClock(), replace(SETTINGS, gate_streak=3, gate_fresh_ms=10.0)
    looks: list[int] = []

    def reference() -> None:
        looks.append(clock.wall)
        clock.spend(REFERENCE_US)

    gate = Gate(reference, settings, clock)
    rows = [Subject(f"r{i}", "row", taking(clock, [100.0])) for i in range(20)]
    measure_interleaved(rows, gate, settings, clock)
    assert all(is_accepted(a, gate, settings) for row in rows for a in row.attempts)
    per_look = settings.gate_runs
    rounds = sum(len(row.attempts) for row in rows)
    # A round takes 2 ms, so that one look serves the rounds that begin within 10 ms of it.
    assert len(looks) / per_look < 0.35 * rounds
    times = sorted({a.gate.median_ms for row in rows for a in row.attempts})
    assert times == [REFERENCE_US / 1e3]


def test_every_round_has_a_look_of_its_own_where_the_host_was_not_calm_lately() -> None:
    clock, settings = FakeClock(), replace(SETTINGS, gate_streak=3, gate_fresh_ms=10.0, retries=0)
    state = {"us": float(REFERENCE_US), "looks": 0}

    def reference() -> None:
        state["looks"] += 1
        clock.spend(state["us"])

    gate = Gate(reference, settings, clock)
    for _ in range(5):
        gate.look()
    quiet = state["looks"]
    state["us"] = 2.0 * REFERENCE_US
    clock.sleep(0.011)  # the last look is too old
    assert not gate.is_calm(gate.look())
    state["us"] = float(REFERENCE_US)
    before = state["looks"]
    assert gate.is_calm(gate.look()) and gate.is_calm(gate.look())
    assert state["looks"] - before == 2 * settings.gate_runs
    once = settings.gate_runs
    assert quiet < 5 * once + SETTINGS.warmup_runs + SETTINGS.calibration_checks * settings.gate_runs


def test_rounds_are_judged_again_by_a_better_time_that_comes_later() -> None:
    clock = FakeClock()
    times = [REFERENCE_US] * 60 + [200.0]
    gate = Gate(taking(clock, times), SETTINGS, clock)
    subject = Subject("x", "row", taking(clock, [1000.0]))
    measure_interleaved([subject], gate, SETTINGS, clock)
    assert is_accepted(subject.attempts[0], gate, SETTINGS)
    for _ in range(10):
        gate.check()
    assert not is_accepted(subject.attempts[0], gate, SETTINGS)


def test_gate_remembers_what_earlier_sessions_knew() -> None:
    clock = FakeClock()
    gate = calm_gate(clock)
    gate.expect(0.2)
    assert not gate.is_calm(gate.check())
    gate.expect(None)
    assert gate.is_calm(gate.check())


def test_what_reads_more_than_the_cache_holds_waits_until_the_memory_is_quiet_too() -> None:
    clock = FakeClock()
    quiet_us, busy_us, busy_until_ms = 700.0, 900.0, 150.0
    made: list[int] = []

    def make() -> Callable[[], None]:
        made.append(clock.wall)
        return lambda: clock.spend(busy_us if clock.wall / 1e6 < busy_until_ms else quiet_us)

    settings = replace(SETTINGS, gate_streaming_runs=2)
    gate = Gate(taking(clock, [REFERENCE_US]), settings, clock, make)
    gate.expect(None, quiet_us / 1e3)  # earlier sessions saw it quiet
    row = Subject("row", "row", taking(clock, [100.0]))
    measure_interleaved([row], gate, settings, clock)
    assert not made  # a row that stays in the cache needs no such look
    assert all(a.gate.streaming_ms is None for a in row.attempts)
    began_ms = clock.wall / 1e6
    network = Subject("network", "network", taking(clock, [2000.0]), streams=True)
    measure_interleaved([network], gate, settings, clock)
    assert len(made) == 1 and began_ms < busy_until_ms
    assert all(is_accepted(a, gate, settings) for a in network.attempts)
    assert [a.gate.streaming_ms for a in network.attempts] == [pytest.approx(0.7)] * settings.network_rounds
    assert clock.wall / 1e6 > busy_until_ms


def test_a_busy_memory_alone_makes_a_round_count_as_disturbed() -> None:
    clock = FakeClock()
    settings = replace(SETTINGS, retries=0)
    gate = Gate(taking(clock, [REFERENCE_US]), settings, clock, lambda: taking(clock, [700.0]))
    gate.expect(None, 0.6)  # what earlier sessions had
    subject = Subject("n", "network", taking(clock, [2000.0]), streams=True)
    measure_interleaved([subject], gate, settings, clock)
    assert not any(is_accepted(a, gate, settings) for a in subject.attempts)
    gate.expect(None)
    assert all(is_accepted(a, gate, settings) for a in subject.attempts)


def test_calm_report_shows_rejections_and_drift() -> None:
    clock = FakeClock()
    gate = Gate(taking(clock, [300.0] * 13 + [330.0]), SETTINGS, clock)
    report = gate.report(10)
    assert report.checks == 10
    assert report.rejected == 10
    assert report.drift == pytest.approx(0.1)


def test_a_coarse_clock_gets_more_runs_in_a_sample() -> None:
    clock = FakeClock()
    run = taking(clock, [0.1])  # 100 ns, below the shortest sample
    subject = Subject("x", "row", run)
    prepare(subject, SETTINGS, clock)
    assert subject.error is None
    assert subject.inner == 8
    assert timed_runs(run, 3, subject.inner, clock)[0] == pytest.approx((1e-4,) * 3)


def test_a_clock_that_stands_still_is_an_error_not_an_endless_loop() -> None:
    clock = FakeClock()
    subject = Subject("x", "row", lambda: None)
    measure_interleaved([subject], calm_gate(clock), SETTINGS, clock)
    assert subject.error == "the clock shows no time for 1024 runs: too fast to be measured"
    assert subject.attempts == []


def test_a_subject_that_raises_is_left_out_and_the_others_go_on() -> None:
    clock = FakeClock()

    def fail() -> None:
        raise RuntimeError("no\nmemory")

    bad, good = Subject("bad", "row", fail), Subject("good", "row", taking(clock, [1000.0]))
    measure_interleaved([bad, good], calm_gate(clock), SETTINGS, clock)
    assert bad.error == "RuntimeError: no memory"
    assert len(good.attempts) == SETTINGS.row_rounds


def test_time_that_goes_back_gives_no_negative_share() -> None:
    clock = FakeClock()

    def run() -> None:
        clock.cpu += 1000
        clock.wall -= 5000

    assert timed_runs(run, 3, 1, clock)[1] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_rounds": 0}, "row_rounds must be at least 1, got 0"),
        ({"max_runs": 2}, r"max_runs \(2\) must not be below min_runs \(4\)"),
        ({"quantile": 1.5}, "quantile must be within 0 and 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        ProtocolSettings(**change)  # type: ignore[arg-type]
