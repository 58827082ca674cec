"""Measuring under faults: a process that dies or hangs, a full disk, a strange folder, noise, jumping clocks."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import DeviceError, NasError, StorageError
from nas.core.records import BlockConfig, Candidate, DeviceProfile, HeadConfig, Measurement, StageConfig, StemConfig
from nas.core.walk import expand
from nas.devices import onnxruntime_cpu, watchdog
from nas.devices.base import REFERENCE_KEY, MeasureJob, OnProgress, OnResult
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import (
    Gate,
    ProtocolSettings,
    Subject,
    is_accepted,
    measure_interleaved,
    one_line,
    session_value,
)
from nas.latency.table import LatencyTable
from nas.latency.verify import verify_table
from nas.measure.fill import FillProgress, fill
from nas.measure.networks import measure_networks
from nas.testing import SimulatedDevice, mean_model


def small(width: int = 16) -> Candidate:
    block = BlockConfig(8, 16, width, stride=2)
    return Candidate(16, 4, StemConfig(8), (StageConfig((block,)),), HeadConfig())


LAYERS = expand(small())
LOOK = ["reference", "overhead", "gate"]


def opened(folder: Path) -> LatencyTable:
    return LatencyTable.open(folder, SimulatedDevice().profile)


class Counting(SimulatedDevice):
    """Keeps what it was asked, does something before a job of a given key, and changes results."""

    def __init__(
        self,
        before: dict[str, Callable[[], object]] | None = None,
        change: Callable[[Measurement], Measurement] = lambda m: m,
    ) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._before = before or {}
        self._change = change

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        results = []
        for job in jobs:
            self.asked.append(job.key)
            self._before.get(job.key, lambda: None)()
            results.append(self._change(super().measure([job], progress=progress)[0]))
            if on_result is not None:
                on_result(results[-1])
        return results


def taking_ms(m: Measurement, value: float) -> Measurement:
    """The same measurement with another time."""
    return replace(m, latency_ms=value, rounds_ms=((value,),) * 3, session_ms=(value,))


# A process that dies or hangs

DIES = """
import json, os, signal, sys
from pathlib import Path
from test_measuring_faults import LAYERS, Counting, opened, small
from nas.measure.fill import FillProgress, fill
from nas.measure.networks import measure_networks

TOP = Path(sys.argv[1])


class Dying(Counting):
    # Step 2n - 1 is before the n-th job, step 2n when its result has been told.
    def __init__(self, step):
        super().__init__()
        self.step = step

    def measure(self, jobs, on_result=None, progress=None):
        results = []
        for job in jobs:
            self.die_at(2 * len(self.asked) + 1)
            results += super().measure([job], on_result, progress)
            self.die_at(2 * len(self.asked))
        return results

    def die_at(self, step):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def work(device, folder):
    fill(opened(folder), device, LAYERS)
    measure_networks(opened(folder), device, [small(), small(24)])
    return device.asked


def keys_of(path):
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    return [row.get("measurement", row)["key"] for row in rows]


lives = []
while not lives or lives[-1]["killed"]:
    folder = TOP / str(len(lives))
    child = os.fork()
    if child == 0:
        work(Dying(len(lives) + 1), folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    table = opened(folder)
    kept = [*table.rows, *table.networks]
    asked = work(Counting(), folder)
    lines = keys_of(folder / "rows.jsonl") + keys_of(folder / "networks.jsonl")
    lives.append({"killed": os.WIFSIGNALED(status), "kept": kept, "asked": asked, "lines": lines})
print(json.dumps(lives))
"""


def test_a_killed_process_loses_no_result_and_the_same_call_measures_only_the_rest(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    lives = json.loads(answer.stdout)
    wanted = lives[-1]["kept"]
    assert wanted[:3] == [x.key for x in LAYERS] and len(wanted) == 5
    jobs = [*LOOK, *wanted[:3], *LOOK, *wanted[3:]]
    assert len(lives) == 2 * len(jobs) + 1
    for step, life in enumerate(lives, start=1):
        assert life["kept"] == [k for k in jobs[: step // 2] if k not in LOOK]
        assert [k for k in life["asked"] if k not in LOOK] == [k for k in wanted if k not in life["kept"]]
        assert sorted(k for k in life["lines"] if k not in LOOK) == sorted(wanted)


HANGS = """
import sys
from pathlib import Path
from test_measuring_faults import LAYERS, Counting, opened
from nas.measure.fill import FillProgress, fill


def hang():
    print("hangs", flush=True)
    sys.stdin.readline()


fill(opened(Path(sys.argv[1])), Counting({LAYERS[2].key: hang}), LAYERS)
"""


def test_a_process_that_hangs_is_named_and_when_it_is_ended_another_goes_on(tmp_path: Path) -> None:
    hanging = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert hanging.stdout is not None
        assert hanging.stdout.readline() == "hangs\n"
        waiting = Counting()
        with pytest.raises(
            StorageError, match=rf"process {hanging.pid} on this machine since .*wait for it, or stop it"
        ):
            fill(opened(tmp_path), waiting, LAYERS, wait_s=0.1)
        assert waiting.asked == []
        assert list(LatencyTable.read(tmp_path).rows) == [x.key for x in LAYERS[:2]]  # a reader waits for nobody
    finally:
        hanging.kill()
        hanging.communicate()
    again = Counting()
    assert fill(opened(tmp_path), again, LAYERS, wait_s=0.0).measured == 1
    assert again.asked == [*LOOK, LAYERS[2].key]


STUCK = """
import sys, time
from dataclasses import replace
from pathlib import Path
from test_measuring_faults import LAYERS
from nas.devices import onnxruntime_cpu, watchdog
from nas.devices.protocol import ProtocolSettings
from nas.export.graph import layer_model
from nas.latency.table import LatencyTable
from nas.measure.fill import fill

bound, place, stuck = onnxruntime_cpu.bound_run, sys.argv[2], layer_model(LAYERS[2])


def third_never_returns(model, *more):
    if model != stuck:
        return bound(model, *more)
    if place == "making":
        time.sleep(600)
    return lambda: time.sleep(600)


onnxruntime_cpu.bound_run = third_never_returns
device = onnxruntime_cpu.OnnxRuntimeCpu(replace(ProtocolSettings(), hang_s=1.5, wait_share=0.1, row_sessions=1))
fill(LatencyTable.open(Path(sys.argv[1]), device.profile), device, LAYERS)
"""


@pytest.mark.parametrize("place", ["making", "running"])
def test_a_runtime_that_never_returns_ends_the_process_and_the_same_command_goes_on_without_that_row(
    tmp_path: Path, place: str
) -> None:
    command = [sys.executable, "-c", STUCK, str(tmp_path), place]
    stuck = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=60)
    assert stuck.returncode == DeviceError.exit_code, stuck.stderr
    key = LAYERS[2].key
    assert f"error: {key} did not return within 1.5 s; it is recorded as failed." in stuck.stderr
    table = LatencyTable.read(tmp_path)
    assert table.rows[key].error == "did not return within 1.5 s"
    device = OnnxRuntimeCpu()
    report = fill(LatencyTable.open(tmp_path, device.profile), device, LAYERS)
    assert (report.measured, report.failed) == (2, ())
    assert LatencyTable.read(tmp_path).rows[key].error is not None


def test_a_pause_of_the_whole_process_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and `fg`, or a laptop that slept: the clock went on, the runtime could not."""
    now = iter([0.0, 0.0, 0.1, 900.0, 900.1, 900.2, 900.3])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(now))
    hung: list[str] = []
    step, done = watchdog._Step(), Looks(4)
    step.key = "a row"
    watchdog._look(step, done, 0.5, lambda key: bool(hung.append(key)))  # type: ignore[arg-type, func-returns-value]
    assert hung == []


class Looks:
    """An event that is set after so many looks."""

    def __init__(self, count: int) -> None:
        self._left = count

    def wait(self, _: float) -> bool:
        self._left -= 1
        return self._left < 0


def test_a_device_that_breaks_off_keeps_what_it_measured_and_gives_the_table_free(tmp_path: Path) -> None:
    def breaks() -> None:
        raise DeviceError("the board does not answer any more")

    with pytest.raises(DeviceError, match="does not answer any more"):
        fill(opened(tmp_path), Counting({LAYERS[1].key: breaks}), LAYERS)
    again = Counting()
    assert fill(opened(tmp_path), again, LAYERS, wait_s=0.0).measured == 2
    assert again.asked == [*LOOK, LAYERS[1].key, LAYERS[2].key]


# A disk and a folder that take nothing


def test_a_full_disk_ends_a_fill_with_its_reason_and_with_space_it_goes_on(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up() -> None:
        used = (tmp_path / "rows.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (used + 200, limits[1]))

    device = Counting({LAYERS[1].key: fill_up})
    try:
        with pytest.raises(StorageError, match=r"rows.jsonl: cannot be written: .*MiB free there\. Free space") as e:
            fill(opened(tmp_path), device, LAYERS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.exit_code == 6
    assert device.asked == [*LOOK, LAYERS[0].key, LAYERS[1].key]  # nothing more is measured that could not be kept
    assert list(LatencyTable.read(tmp_path).rows) == [LAYERS[0].key]
    again = Counting()
    assert fill(opened(tmp_path), again, LAYERS, wait_s=0.0).measured == 2
    assert again.asked == [*LOOK, LAYERS[1].key, LAYERS[2].key]
    assert verify_table(tmp_path) == ()


STRANGER = """
import os, sys
from pathlib import Path
from test_measuring_faults import LAYERS, Counting, opened, small
from nas.core.errors import StorageError
from nas.core.walk import expand
from nas.latency.table import LatencyTable
from nas.measure.fill import FillProgress, fill

folder = Path(sys.argv[1])
if os.getuid() == 0:  # root may write everywhere
    os.setgid(65534)
    os.setuid(65534)
device = Counting()
print(len(LatencyTable.read(folder).rows), fill(opened(folder), device, LAYERS).measured)
for folder in (folder, folder.with_name("nothing")):
    try:
        fill(opened(folder), device, expand(small(24)))
    except StorageError as e:
        print(e.exit_code, e)
print(device.asked)
"""


def test_a_folder_of_somebody_else_is_refused_before_anything_is_measured_and_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    fill(opened(folder), SimulatedDevice(), LAYERS)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:4]):
        if parent.name.startswith(("pytest", "popen")) or parent == tmp_path:  # popen: one of several test processes
            parent.chmod(0o755)
    tmp_path.chmod(0o555)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder)],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        tmp_path.chmod(0o755)
        folder.chmod(0o755)
    assert answer.returncode == 0, answer.stderr
    counts, known, new, asked = answer.stdout.splitlines()
    assert counts == "3 0"
    assert known.startswith(f"6 {folder}: cannot be locked: ") and known.endswith("Is the folder writable?")
    assert new.startswith(f"6 {tmp_path / 'nothing'}: cannot be written: Permission denied")
    assert asked == "[]"


# A device that changes


def test_rows_of_a_device_that_slowed_down_in_the_middle_are_named_uncertain_and_replaced(tmp_path: Path) -> None:
    hot: list[bool] = []

    def throttled(m: Measurement) -> Measurement:
        return replace(taking_ms(m, 1.5 * (m.latency_ms or 0.0)), accepted=(False,) * 3) if hot else m

    calm = opened(tmp_path / "calm")
    fill(calm, SimulatedDevice(), LAYERS)
    folder = tmp_path / "hot"
    report = fill(opened(folder), Counting({LAYERS[1].key: lambda: hot.append(True)}, throttled), LAYERS)
    slow = [x.key for x in LAYERS[1:]]
    assert report.unstable == tuple(slow)
    assert "2 of 3 rows had no calm round" in report.warnings[0]
    table = opened(folder)
    assert table.row_ms(slow[0]) == pytest.approx(1.5 * calm.row_ms(slow[0]))
    assert table.row_std_ms(slow[0]) > 3 * 0.015 * table.row_ms(slow[0])
    again = Counting()
    assert fill(table, again, LAYERS, again=True).unstable == ()
    assert again.asked == [*LOOK, *slow]
    assert [table.row_ms(x.key) for x in LAYERS] == [calm.row_ms(x.key) for x in LAYERS]


def test_a_network_that_took_an_impossible_time_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    device = Counting(change=lambda m: taking_ms(m, 1e5) if m.kind == "network" else m)
    (failed,) = measure_networks(opened(tmp_path), device, [small()])
    assert failed.latency_ms is None and failed.session_ms == ()
    assert "100000 ms is too long for" in (failed.error or "") and "microseconds" in (failed.error or "")
    assert [n.measurement for n in opened(tmp_path).networks.values()] == [failed]


# Noise


class FakeClock:
    """Time that moves only when something spends it."""

    def __init__(self) -> None:
        self.cpu = 0
        self.wall = 0

    def cpu_ns(self) -> int:
        return self.cpu

    def wall_ns(self) -> int:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.wall += int(seconds * 1e9)

    def utc(self) -> str:
        return "2000-01-01T00:00:00+00:00"

    def spend(self, cpu_us: float, wall_us: float | None = None) -> None:
        self.cpu += int(cpu_us * 1e3)
        self.wall += int((cpu_us if wall_us is None else wall_us) * 1e3)


SETTINGS = ProtocolSettings(calibration_checks=2, warmup_runs=1)


def gate_of(clock: FakeClock, wall_us: float = 300.0) -> Gate:
    return Gate(lambda: clock.spend(300.0, wall_us), SETTINGS, clock)


@pytest.mark.parametrize("kind", ["log-normal", "bimodal", "outliers"])
def test_the_value_of_a_noisy_network_is_that_of_its_calm_runs_and_all_samples_are_kept(kind: str) -> None:
    rng, clock = np.random.default_rng(3), FakeClock()
    taken: list[float] = []

    def run() -> None:
        time_us = 1000 * float(np.exp(rng.normal(0, 0.01)))
        if kind == "log-normal":
            time_us *= float(np.exp(abs(rng.normal(0, 0.1))))
        elif kind == "bimodal":
            time_us *= 1.6 if rng.random() < 0.5 else 1.0
        elif rng.random() < 0.15:
            time_us *= 30
        taken.append(int(time_us * 1e3) / 1e6)
        clock.spend(time_us)

    sessions = [Subject("x", "network", run) for _ in range(SETTINGS.network_sessions)]
    for subject in sessions:
        measure_interleaved([subject], gate_of(clock), SETTINGS, clock)
    values = [session_value(s.attempts, SETTINGS) for s in sessions]
    assert np.mean(taken) > 1.05  # what a plain mean would have said
    assert min(values) == pytest.approx(1.0, abs=0.025)
    assert max(values) / min(values) < 1.03
    samples = [x for s in sessions for a in s.attempts for x in a.samples_ms]
    assert len(samples) >= 3 * SETTINGS.network_rounds * SETTINGS.min_runs
    assert set(samples) <= set(taken) and max(samples) == pytest.approx(max(taken), rel=0.5)


# What disturbs measuring itself


class TickingClock(FakeClock):
    """Every look at the CPU time takes 50 us: a sample is 50 us, whatever really ran."""

    def cpu_ns(self) -> int:
        self.spend(50.0)
        return self.cpu


def test_telemetry_results_and_progress_are_taken_outside_the_timed_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TickingClock()
    spent: list[str] = []

    def spending(what: str) -> None:
        spent.append(what)
        clock.spend(1e6)

    def telemetry(_root: Path) -> tuple[float | None, float | None]:
        spending("telemetry")
        return 2000.0, 50.0

    monkeypatch.setattr(onnxruntime_cpu, "clock_and_temperature", telemetry)
    quick = replace(SETTINGS, gate_cpu_share=0.5, round_cpu_share=0.5, network_sessions=2, row_round_ms=0.2)
    quick = replace(quick, agreeing_sessions=2)
    device = OnnxRuntimeCpu(quick, clock=clock)
    jobs = [MeasureJob(f"n{i}", "network", "none", mean_model(), 0) for i in range(2)]
    found = device.measure(jobs, lambda _: spending("result"), lambda _: spending("progress"))
    assert spent.count("telemetry") == 1 and spent.count("result") == 2
    assert spent.count("progress") == 2 * 2 * quick.network_rounds + 1  # after each round, and at the end
    for m in found:
        assert {s for r in m.rounds_ms for s in r} == {0.05}
        assert all(m.accepted)
        assert (m.latency_ms, m.clock_mhz, m.temperature_c) == (0.05, 2000.0, 50.0)


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_clock_that_jumps_by_an_hour_costs_one_round_and_changes_no_value(jump_s: int) -> None:
    clock = FakeClock()
    runs = [0]

    def run() -> None:
        runs[0] += 1
        clock.spend(1000.0)
        if runs[0] == 6:  # in the first round
            clock.wall += jump_s * 10**9

    subject, gate = Subject("x", "row", run), gate_of(clock)
    measure_interleaved([subject], gate, SETTINGS, clock)
    accepted = [is_accepted(a, gate, SETTINGS) for a in subject.attempts]
    assert accepted == [False, *(True,) * SETTINGS.row_rounds]
    assert {s for a in subject.attempts for s in a.samples_ms} == {1.0}


def test_waiting_for_a_calm_moment_ends_although_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(clock, "sleep", lambda _: clock.spend(0.0, -5e6))
    subject = Subject("x", "row", lambda: clock.spend(1000.0))
    gate = gate_of(clock, wall_us=900.0)  # another program has two thirds of the processor
    measure_interleaved([subject], gate, SETTINGS, clock)
    rounds = SETTINGS.row_rounds
    assert rounds <= len(subject.attempts) <= rounds * (SETTINGS.retries + 1)
    assert not any(is_accepted(a, gate, SETTINGS) for a in subject.attempts)
    assert session_value(subject.attempts, SETTINGS) == 1.0


def test_order_is_that_of_measuring_although_the_date_goes_back(tmp_path: Path) -> None:
    years = iter(range(2100, 2000, -1))

    def earlier_and_slower(m: Measurement) -> Measurement:
        year = next(years)
        slower = m if m.key == REFERENCE_KEY else taking_ms(m, (m.latency_ms or 0.0) * (3 - year / 2100))
        return replace(slower, measured_at=f"{year}-01-01T00:00:00+00:00")

    device = Counting(change=earlier_and_slower)
    first = fill(opened(tmp_path), device, LAYERS)
    before = dict(opened(tmp_path).rows)
    second = fill(opened(tmp_path), device, LAYERS, anew=True)
    table = opened(tmp_path)
    assert first.measured == second.measured == len(LAYERS)
    for key, old in before.items():
        new = table.rows[key]
        assert new.measured_at < old.measured_at
        assert new.sequence > old.sequence and table.row_ms(key) > (old.latency_ms or 0.0)


# Found by looking for what no test covered


def test_a_fill_that_waits_for_another_process_says_so(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    told: list[FillProgress] = []
    with first.writing(), pytest.raises(NasError, match="is being written by process"):
        fill(second, SimulatedDevice(), LAYERS, progress=told.append, wait_s=0.1)
    assert "waiting for" in told[0].message and told[0].remaining_s is None


def test_a_device_of_another_state_does_not_fill_a_table(tmp_path: Path) -> None:
    table, device = LatencyTable.open(tmp_path, replace(SimulatedDevice().profile, kind="measured")), Counting()
    with pytest.raises(DeviceError, match="kind: the table has 'measured', this device has 'simulated'"):
        fill(table, device, LAYERS)
    assert device.asked == []


def test_a_device_that_changes_its_state_in_the_middle_stores_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.measure.fill.CHECK_STATE_S", 0.0)
    state = ["none"]

    class Changing(Counting):
        @property
        def profile(self) -> DeviceProfile:
            return replace(SimulatedDevice().profile, power_mode=state[0])

    device = Changing({LAYERS[1].key: lambda: state.append(state.pop().replace("none", "15W"))})
    with pytest.raises(DeviceError, match="power_mode: the table has 'none', this device has '15W'"):
        fill(opened(tmp_path), device, LAYERS)
    assert list(LatencyTable.read(tmp_path).rows) == [LAYERS[0].key]
    with pytest.raises(DeviceError, match="What was measured in it is not kept"):
        measure_networks(opened(tmp_path), device, [small()])
    assert not LatencyTable.read(tmp_path).networks


def test_what_a_killed_process_left_half_written_is_swept(tmp_path: Path) -> None:
    table = opened(tmp_path)
    (tmp_path / ".correction.json.tmp-abc").write_text("half")
    fill(table, SimulatedDevice(), LAYERS)
    assert [p.name for p in tmp_path.glob(".*.tmp-*")] == []


def test_a_device_that_slows_in_the_middle_without_saying_so_is_told(tmp_path: Path) -> None:
    layers = list(dict.fromkeys(x for w in range(8, 8 * 12, 8) for x in expand(small(w))))
    hot: list[bool] = []
    device = Counting(
        {layers[3].key: lambda: hot.append(True)},
        lambda m: taking_ms(m, 1.3 * (m.latency_ms or 0)) if hot else m,
    )
    report = fill(opened(tmp_path), device, layers)
    assert report.drift == pytest.approx(0.3, rel=0.05) and "30% slower" in report.warnings[0]


@pytest.mark.parametrize("tick_us", [1000])
def test_a_coarse_clock_is_a_failed_row_and_not_the_end_of_measuring(
    monkeypatch: pytest.MonkeyPatch, tick_us: int
) -> None:
    class Coarse(FakeClock):
        def cpu_ns(self) -> int:
            return self.cpu // (tick_us * 1000) * tick_us * 1000

    clock = Coarse()
    monkeypatch.setattr(onnxruntime_cpu, "bound_run", lambda *_: lambda: clock.spend(130.0))
    device = OnnxRuntimeCpu(ProtocolSettings(calibration_checks=2, warmup_runs=1), clock=clock)
    (m,) = device.measure([MeasureJob("n", "row", "none", mean_model(), 0)])
    assert (m.latency_ms or 0) > 0 or m.error


def test_a_governor_that_changes_while_a_device_is_open_shows_in_its_profile(tmp_path: Path) -> None:
    file = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    file.parent.mkdir(parents=True)
    file.write_text("performance\n")
    device = OnnxRuntimeCpu(root=tmp_path)
    before = device.profile.fingerprint
    file.write_text("powersave\n")
    assert device.profile.fingerprint != before


def test_a_reason_that_is_no_utf8_can_be_stored(tmp_path: Path) -> None:
    m = SimulatedDevice().measure([MeasureJob(LAYERS[0].key, "row", "fp32", mean_model(), 0)])[0]
    reason = one_line(OSError("file \udcff is not there"))
    opened(tmp_path).add(replace(m, latency_ms=None, rounds_ms=(), accepted=(), session_ms=(), error=reason))
    assert opened(tmp_path).rows[LAYERS[0].key].error == r"OSError: file \udcff is not there"
