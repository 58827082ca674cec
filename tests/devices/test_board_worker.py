"""The worker on a board that is hot, and on one with power sensors; every figure is simulated."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_board.tree import ORIN_NANO_SUPER, put, write_board

from nas.devices.board.errors import BoardError
from nas.devices.board.rounds import Clock
from nas.devices.board.stream import Images, Widener
from nas.devices.board.worker import Worker

PLAN = {
    **dict.fromkeys(("warmup_runs", "gate_runs", "gate_cpu_share", "round_cpu_share", "calibration_checks"), 0),
    **{"sessions": 1, "rounds": 2, "round_ms": 10, "min_runs": 10, "max_runs": 10, "retries": 2, "wait_ms": 100},
    **{"wait_round_ms": 1000, "wait_share": 20, "gate_drift": 2, "alive": 4, "hang_s": 30, "build_s": 60, "whole": 1},
}


class FakeClock(Clock):
    """Time that passes when somebody sleeps or a model runs; calls `on_sleep`."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self._on_sleep = on_sleep

    def seconds(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> None:
        self.now_s += seconds

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)
        self.slept.append(seconds)
        self._on_sleep()


class RealClock(Clock):
    """A clock that goes, where a thread has to read meanwhile; `slower`: how many times longer each run took."""

    def __init__(self) -> None:
        self.slower: list[float] = []

    def spend(self, seconds: float) -> None:
        began_s = time.perf_counter()
        time.sleep(seconds)
        if seconds:
            self.slower.append((time.perf_counter() - began_s) / seconds)


class Session:
    build_s, engine_bytes, warnings = 0.1, 10, ()

    def __init__(self, clock: FakeClock | RealClock, on_time: Callable[[int], None], in_place: bool) -> None:
        if in_place:
            self.run_only = self._run_only
        self.calls = 0
        self._clock = clock
        self._on_time = on_time

    def set_inputs(self, feeds: dict[str, bytes]) -> None:
        pass

    def time(self, runs: int, warmup: int) -> dict[str, Any]:  # noqa: ARG002
        self.calls += 1
        self._on_time(self.calls)
        self._clock.spend(runs / 1000)
        return {"samples_ms": [1.0] * runs, "host_ms": [1.0], "clock": "cuda_event"}

    def _run_only(self, runs: int) -> None:
        self.time(runs, 0)

    def close(self) -> None:
        pass


class Runner:
    name = "fake"

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make

    def load(self, model_path: str, options: dict[str, Any]) -> Session:  # noqa: ARG002
        return self._make()


def measured(
    root: Path, clock: FakeClock | RealClock, on_time: Callable[[int], None] = lambda _: None, in_place: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The one result, and what was told meanwhile."""
    told: list[dict[str, Any]] = []
    worker = Worker(told.append, [Runner(lambda: Session(clock, on_time, in_place))], str(root), clock)
    job = {"index": 0, "key": "row", "path": "unused", "feeds": {}, "precision": "fp32"}
    answer = worker.answer({"op": "measure", "runner": "fake", "plan": PLAN, "jobs": [job], "work": "unused"})
    return answer["results"][0], told


def throttle(root: Path) -> None:
    for path, text in json.loads((root / "throttle.json").read_text()).items():
        put(root, path, text)


def cool(root: Path) -> None:
    for i in range(4):
        put(root, f"sys/class/thermal/thermal_zone{i}/temp", "50000\n")
    put(root, "sys/class/devfreq/17000000.gpu/cur_freq", "1020000000\n")


def test_a_throttled_round_is_marked_and_measured_again_once_it_is_cool(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    clock = FakeClock(lambda: cool(root))

    def heat(call: int) -> None:
        if call == 2:  # the first is the pilot
            throttle(root)

    result, told = measured(root, clock, heat)
    rounds = result["sessions"][0]
    assert [r["throttled"] for r in rounds] == [True, False, False]
    assert "oc3_event_cnt rose by 7" in rounds[0]["throttled_why"]
    assert rounds[0]["cooled_s"] == 2.0
    assert clock.slept[0] == 2.0
    beats = [m for m in told if m.get("limit_s") == 60.0 and m.get("at") == "row"]
    assert len(beats) == 2, "the limit of building, and a sign of life while it cooled"


def test_only_what_somebody_reads_of_a_round_travels(tmp_path: Path) -> None:
    result, _ = measured(write_board(tmp_path, ORIN_NANO_SUPER.locked), FakeClock())
    for told in result["sessions"][0]:
        assert told["samples_ms"] == [round(ms, 6) for ms in told["samples_ms"]]
        assert "host_ms" not in told and "single_ms" not in told


def test_a_board_that_never_cools_keeps_its_marks_and_comes_to_an_end(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    throttle(root)
    clock = FakeClock()
    result, _ = measured(root, clock)
    rounds = result["sessions"][0]
    assert all(r["throttled"] for r in rounds)
    assert 2 <= len(rounds) <= 6
    assert sum(r["cooled_s"] for r in rounds) == 1200.0


def test_what_a_build_did_to_the_board_marks_no_round(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    counters = {
        path: text for path, text in json.loads((root / "throttle.json").read_text()).items() if "event_cnt" in path
    }
    assert counters

    class Hungry(Runner):
        def load(self, model_path: str, options: dict[str, Any]) -> Session:
            for path, text in counters.items():
                put(root, path, text)
            return super().load(model_path, options)

    clock = FakeClock()
    worker = Worker(lambda _: None, [Hungry(lambda: Session(clock, lambda _: None, True))], str(root), clock)
    job = {"index": 0, "key": "row", "path": "unused", "feeds": {}, "precision": "fp32"}
    answer = worker.answer({"op": "measure", "runner": "fake", "plan": PLAN, "jobs": [job], "work": "unused"})
    assert [r["throttled_why"] for r in answer["results"][0]["sessions"][0]] == ["", ""]


def test_each_reading_of_the_first_look_has_the_time_of_a_step(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    clock = FakeClock()
    worker = Worker(told.append, [Runner(lambda: Session(clock, lambda _: None, True))], str(tmp_path), clock)
    plan = {**PLAN, "gate_runs": 10, "calibration_checks": 20}
    asked = {"op": "calm", "runner": "fake", "reference": "unused", "work": "unused", "checks": 3, "plan": plan}
    assert len(worker.answer(asked)["readings"]) == 3
    assert sum(m.get("limit_s") == plan["hang_s"] for m in told) >= 24


def test_energy_comes_from_the_rails_while_the_model_runs(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    result, _ = measured(root, FakeClock(), in_place=True)
    assert result["energy"] is None, "no reading fell into the windows of a clock that stands still"
    clock = RealClock()
    real, _ = measured(root, clock, in_place=True)
    energy = real["energy"]
    assert energy["whole_board"] is True and energy["rounds"] == 3
    # 5000 mW (simulated), and about a millisecond an inference: more where other programs keep the machine busy.
    assert 0.9 * 5 * min(clock.slower) < energy["mj"] < 1.35 * 5 * max(clock.slower)
    assert energy["std_mj"] < energy["mj"]


def test_energy_of_a_program_is_what_a_long_run_takes_more_than_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run loads an engine first, for 0.2 s here, which is in none of the inferences."""
    monkeypatch.setattr("nas.devices.board.worker.ENERGY_PROGRAM_S", 0.4)
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    clock = RealClock()
    result, _ = measured(root, clock, lambda call: clock.spend(0.2 if call > 3 else 0.0), in_place=False)
    energy = result["energy"]
    # 5000 mW (simulated), a millisecond an inference; that of the short run may have taken longer than of the long one.
    assert 0.65 * 5 < energy["mj"] < 1.35 * 5 * max(clock.slower)
    assert energy["rounds"] == 3


def test_copies_are_told_apart_and_their_failure_leaves_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "transfer_ms", lambda _: 0.25, raising=False)
    result, _ = measured(tmp_path, FakeClock())
    assert result["transfer_ms"] == 0.25 and result["warnings"] == []
    monkeypatch.setattr(Session, "transfer_ms", lambda _: 1 / 0)
    result, _ = measured(tmp_path, FakeClock())
    assert (result["error"], result["transfer_ms"]) == (None, None)
    assert result["warnings"] == ["copies: ZeroDivisionError: division by zero"]


def test_each_attempt_of_a_round_has_the_time_of_a_step_and_its_programs_less(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    given: list[float] = []

    class Watched(Runner):
        def load(self, model_path: str, options: dict[str, Any]) -> Session:
            given.append(options["run_s"])
            return super().load(model_path, options)

    told: list[dict[str, Any]] = []
    throttle(root)
    clock = FakeClock()
    worker = Worker(told.append, [Watched(lambda: Session(clock, lambda _: throttle(root), True))], str(root), clock)
    job = {"index": 0, "key": "row", "path": "unused", "feeds": {}, "precision": "fp32"}
    result = worker.answer({"op": "measure", "runner": "fake", "plan": PLAN, "jobs": [job], "work": "unused"})
    attempts = len(result["results"][0]["sessions"][0])
    assert attempts > PLAN["rounds"], "throttled rounds are repeated"
    assert sum(m.get("at") == "row" and m["limit_s"] == PLAN["hang_s"] for m in told) >= attempts
    assert given == [pytest.approx(27.0)], "a program is ended before the worker that waits for it"


class Kept(Session):
    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": "x", "dtype": "float32", "shape": [1, 1]}]

    def outputs(self) -> list[dict[str, Any]]:
        if self.fails:
            raise RuntimeError("sticky error of the device")
        return [{"name": "y", "dtype": "float32", "shape": [1, 1], "data": b"\0\0\0\0"}]

    def close(self) -> None:
        self.closed = True


def test_an_engine_is_built_once_for_all_images_and_goes_before_something_is_measured(tmp_path: Path) -> None:
    made: list[Kept] = []

    def make() -> Kept:
        made.append(Kept(FakeClock(), lambda _: None, True))
        made[-1].fails = made[-1].closed = False
        return made[-1]

    worker = Worker(lambda _: None, [Runner(make)], str(tmp_path), FakeClock())
    (tmp_path / "images").write_bytes(bytes(8))

    def ask(path: str) -> int:
        request = {"op": "run", "runner": "fake", "path": path, "images": str(tmp_path / "images"), "shape": [2, 1]}
        worker.answer({**request, "limit_s": 60, "work": str(tmp_path)})
        return len(made)

    assert [ask(path) for path in ("a", "a", "b", "a", "b")] == [1, 1, 2, 2, 2], "segments of a chain, in turn"
    assert [ask(path) for path in ("c", "d", "e", "b", "a")] == [3, 4, 5, 5, 6], "the one used longest ago goes"
    made[1].fails = True
    with pytest.raises(RuntimeError):
        ask("b")
    assert made[1].closed and ask("b") == 7, "what failed is not kept"
    job = {"index": 0, "key": "row", "path": "unused", "feeds": {}, "precision": "fp32"}
    worker.answer({"op": "measure", "runner": "fake", "plan": PLAN, "jobs": [job], "work": "unused"})
    assert all(session.closed for session in made)


class Chain:
    """Images of one byte that take as many milliseconds; calls `on_time` with the number of the call."""

    def __init__(self, clock: FakeClock, on_time: Callable[[int], None]) -> None:
        self._clock, self._on_time = clock, on_time
        self.calls, self.is_closed = 0, False

    def input(self) -> dict[str, Any]:
        return {"name": "x", "dtype": "float32", "shape": [1, 1, 1, 1]}

    def time(self, images: Iterable[bytes]) -> dict[str, Any]:
        self.calls += 1
        self._on_time(self.calls)
        samples = [struct.unpack("<f", data)[0] for data in images]
        self._clock.spend(sum(samples) / 1000)
        return {"samples_ms": samples, "exits": [int(ms > 2) for ms in samples], "clock": "cuda_event"}

    def close(self) -> None:
        self.is_closed = True


def test_parts_of_a_stream_that_were_throttled_are_marked_and_timed_again(tmp_path: Path) -> None:
    root = write_board(tmp_path / "board", ORIN_NANO_SUPER.locked)
    clock = FakeClock(lambda: cool(root))
    chains: list[Chain] = []

    class Chaining(Runner):
        def chain(self, sessions: list[Session], thresholds: list[float]) -> Chain:
            assert (len(sessions), thresholds) == (2, [0.75])
            chains.append(Chain(clock, lambda call: throttle(root) if call == 2 else None))  # the first warms up
            return chains[-1]

    path = tmp_path / "images"
    path.write_bytes(bytes([1, 2, 3, 4, 5]))
    told: list[dict[str, Any]] = []
    worker = Worker(told.append, [Chaining(lambda: Session(clock, lambda _: None, True))], str(root), clock)
    job = {"index": 0, "key": "s", "paths": ["a", "b"], "precisions": ["fp16"] * 2, "thresholds": [0.75]}
    job |= {"images": str(path), "images_kind": "uint8", "shape": [5, 1, 1, 1]}
    plan = {**PLAN, "min_runs": 2, "max_runs": 3, "build_s": 99}
    answer = worker.answer({"op": "stream", "runner": "fake", "plan": plan, "jobs": [job], "work": "unused"})
    (session,) = answer["results"][0]["sessions"]
    assert session["exits"] == [0, 0, 1, 1, 1]
    first, second = session["blocks"]
    assert [r["throttled"] for r in first] == [True, False, False] and "oc3_event_cnt" in first[0]["throttled_why"]
    assert [r["samples_ms"] for r in first] == [[1.0, 2.0, 3.0]] * 3
    assert [r["samples_ms"] for r in second] == [[4.0, 5.0]] * 2
    limits = [m["limit_s"] for m in told if m.get("at") == "s"]
    assert limits.count(99.0) == 3 and limits.count(PLAN["hang_s"]) >= 6, "two builds and a graph; rounds"
    assert sum("step" in m for m in told) == PLAN["rounds"]
    assert chains[0].is_closed


def test_a_runner_that_takes_no_images_one_by_one_says_so(tmp_path: Path) -> None:
    worker = Worker(lambda _: None, [Runner(lambda: Session(FakeClock(), lambda _: None, True))], str(tmp_path))
    with pytest.raises(BoardError, match="fake takes no images one by one"):
        worker.answer({"op": "stream", "runner": "fake", "plan": PLAN, "jobs": [], "work": "unused"})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_become_the_numbers_that_a_model_takes(dtype: str) -> None:
    values = bytes(range(256)) * 3
    assert Widener(dtype)(values) == np.frombuffer(values, np.uint8).astype(dtype).tobytes()


def test_images_that_a_model_does_not_take_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes(12))
    entry = {"name": "x", "dtype": "float32", "shape": [1, 3, 2, 2]}
    for kind, shape, known in (
        ("uint8", [2, 3, 1, 2], entry),
        ("float16", [1, 3, 2, 2], entry),
        ("int64", [1, 3, 2, 2], {**entry, "dtype": "int64"}),
    ):
        with pytest.raises(BoardError, match=r"input 'x' takes .* got images"):
            Images(str(path), kind, shape, known)
    images = Images(str(path), "uint8", [1, 3, 2, 2], entry)
    path.unlink()
    assert [len(image) for image in images.read(0, 1)] == [48], "also when its name is gone"
    images.close()


def test_a_board_without_sensors_has_no_energy_and_is_never_throttled(tmp_path: Path) -> None:
    result, _ = measured(tmp_path, FakeClock())
    assert result["energy"] is None
    assert [r["throttled"] for r in result["sessions"][0]] == [False, False]


def test_energy_that_fails_leaves_the_times_and_says_why(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)

    def crash(call: int) -> None:
        if call > 3:  # the pilot and two rounds
            raise RuntimeError("sticky error of the device")

    result, _ = measured(root, FakeClock(), crash)
    assert result["error"] is None and len(result["sessions"][0]) == 2
    assert result["energy"] == {"mj": None, "why": "RuntimeError: sticky error of the device"}
