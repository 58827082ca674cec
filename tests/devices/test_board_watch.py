"""Throttling between rounds, cooling down, energy, power modes. All figures are simulated."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_board.tools import calls_of, install_board_tools, install_trtexec, runner_in
from fake_board.tree import NANO, ORIN_NANO_SUPER, THOR, put, set_rails, write_board

from nas.devices.board.energy import PowerSampler, of_rounds, total_power
from nas.devices.board.errors import BoardError
from nas.devices.board.power import change, mode_of
from nas.devices.board.state import identity, read_rails, read_state
from nas.devices.board.watch import Watch, marks

GPU = "sys/class/devfreq/17000000.gpu"


def throttle(root: Path) -> None:
    for path, text in json.loads((root / "throttle.json").read_text()).items():
        put(root, path, text)


def test_a_quiet_round_is_not_marked_and_tells_heat_and_clock(tmp_path: Path) -> None:
    watch = Watch(str(write_board(tmp_path, ORIN_NANO_SUPER.locked)))
    told = watch.look()
    assert told == {"throttled": False, "throttled_why": "", "temperature_c": 46.0, "clock_mhz": 1020.0}


def test_a_throttled_round_says_everything_that_happened(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    watch = Watch(str(root))
    throttle(root)
    why = watch.look()["throttled_why"]
    assert "oc3_event_cnt rose by 7" in why
    assert "the GPU is locked to 1020 MHz and runs at 510 MHz" in why
    assert "tj-thermal has 96.5 C, and is slowed down from 95.0 C" in why


def test_events_before_the_first_round_do_not_mark_it(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    put(root, "sys/class/hwmon/hwmon4/oc3_event_cnt", "40\n")
    watch = Watch(str(root))
    assert not watch.look()["throttled"]
    put(root, "sys/class/hwmon/hwmon4/oc3_event_cnt", "41\n")
    watch.begin()
    assert not watch.look()["throttled"]


def test_a_cooling_device_marks_when_it_begins_to_slow_the_board_down(tmp_path: Path) -> None:
    root = write_board(tmp_path, NANO)
    watch = Watch(str(root))
    put(root, "sys/class/thermal/cooling_device0/cur_state", "7\n")
    assert not watch.look()["throttled"], "a fan that turns faster is no throttling"
    put(root, "sys/class/thermal/cooling_device1/cur_state", "2\n")
    assert watch.look()["throttled_why"] == "cpufreq-cpu0 slows the board down (state 2)"


def test_unlocked_clocks_that_are_low_mark_nothing() -> None:
    clocks = {"gpu_mhz": 306.0, "gpu_min_mhz": 306.0, "gpu_max_mhz": 1020.0}
    assert marks({}, {"clocks": clocks}) == []


def test_a_reboot_in_the_middle_of_a_run_shows(tmp_path: Path) -> None:
    root = write_board(tmp_path / "root", ORIN_NANO_SUPER)
    program = install_trtexec(tmp_path / "bin", "10.3", every="reboot", root=root)
    before = read_state(str(root), runner_in(tmp_path / "bin"))
    model = tmp_path / "model.onnx"
    model.write_bytes(tiny_model())
    code, _, err = runner_in(tmp_path / "bin")([str(program), f"--onnx={model}", "--iterations=10"], 20)
    assert code == 0, err
    after = identity(read_state(str(root), runner_in(tmp_path / "bin")))
    assert [name for name, value in identity(before).items() if after[name] != value] == ["boot_id"]


def tiny_model() -> bytes:
    from nas.devices.graphs import reference_model

    return reference_model()


def test_cooling_down_waits_until_it_is_cool_and_tells_how_far(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)
    watch = Watch(str(root))
    throttle(root)
    told: list[str] = []
    heat = iter([90000, 82000, 79000, 20000])

    def sleep(seconds: float) -> None:  # noqa: ARG001
        celsius = next(heat)
        for i in range(4):
            put(root, f"sys/class/thermal/thermal_zone{i}/temp", f"{celsius}\n")
        put(root, f"{GPU}/cur_freq", "1020000000\n")

    assert watch.cool_down(sleep, told.append) == 6.0
    assert len(told) == 3
    assert "cooling down for 0 of at most 300 s" in told[0] and "tj-thermal has 96.5 C" in told[0]
    assert not watch.look()["throttled"], "what happened before and while it cooled marks nothing later"


def test_cooling_down_ends_at_its_limit(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    throttle(root)
    waited: list[float] = []
    assert Watch(str(root)).cool_down(waited.append, limit_s=5.0) == 5.0
    assert waited == [2.0, 2.0, 1.0]


# -- energy ------------------------------------------------------------------------------------------------------------


def test_the_rail_of_the_whole_board_is_taken_where_there_is_one(tmp_path: Path) -> None:
    assert total_power(read_rails(str(write_board(tmp_path / "a", ORIN_NANO_SUPER)))) == (5000.0, True)
    assert total_power(read_rails(str(write_board(tmp_path / "b", NANO)))) == (2100.0, True)
    assert total_power(read_rails(str(write_board(tmp_path / "c", THOR)))) == (22000.0, False)
    assert total_power([]) == (None, False)


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_energy_is_mean_power_times_time_over_the_runs() -> None:
    clock = FakeTime()
    powers = [1000.0, 4000.0, 4000.0, 6000.0, 6000.0, 1000.0]
    rails = iter([[{"name": "VDD_IN", "mw": 0.0}], *([{"name": "VDD_IN", "mw": p}] for p in powers)])
    sampler = PowerSampler(read=lambda: next(rails), clock=clock)
    for second in range(6):
        clock.now_s = float(second)
        sampler.take()
    assert sampler.window(1.0, 4.0) == (5000.0, 4)
    assert sampler.energy_mj(1.0, 4.0, 100) == 5000.0 * 3 / 100
    assert sampler.energy_mj(1.0, 3.0, 100) is None, "three readings are too few"
    assert sampler.energy_mj(1.0, 4.0, 0) is None


def test_a_board_without_a_sensor_has_no_energy(tmp_path: Path) -> None:
    threads = threading.active_count()
    sampler = PowerSampler(str(tmp_path))
    sampler.start()
    assert threading.active_count() == threads
    assert not sampler.has_sensor
    assert sampler.energy_mj(0.0, 1e9, 10) is None
    sampler.stop()


def test_the_thread_reads_until_it_is_stopped(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    seen = threading.Event()
    count = 0

    def read() -> list[dict[str, Any]]:
        nonlocal count
        count += 1
        if count > 8:
            seen.set()
        return read_rails(str(root))

    sampler = PowerSampler(interval_s=0.001, read=read)
    sampler.start()
    assert seen.wait(10)
    sampler.stop()
    stopped = count
    power_mw, readings = sampler.window(0.0, float("inf"))
    assert power_mw == 5000.0 and readings == stopped - 1
    set_rails(root, ORIN_NANO_SUPER, {"VDD_IN": 9000})
    assert count == stopped


def test_the_spread_of_rounds_does_not_follow_one_odd_round() -> None:
    assert of_rounds([None, None]) is None
    assert of_rounds([2.0, None]) == {"mj": 2.0, "std_mj": 0.0, "rounds": 1.0}
    found = of_rounds([2.0, 2.1, 1.9, 2.05, 40.0])
    assert found is not None
    assert found["mj"] == 2.05 and found["std_mj"] == pytest.approx(1.4826 * 0.05)


# -- power modes and clocks --------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> tuple[str, Any, Path]:
    root = write_board(tmp_path / "root", ORIN_NANO_SUPER)
    install_board_tools(tmp_path / "bin", root, reboot=[3])
    return str(root), runner_in(tmp_path / "bin"), tmp_path / "bin"


def test_nothing_is_run_where_nothing_is_asked_for(board: tuple[str, Any, Path]) -> None:
    root, run, programs = board
    told = change(None, False, "unused", root, run)
    assert told["ran"] == [] and calls_of(programs / "sudo") == []


@pytest.mark.parametrize("wanted", ["MAXN_SUPER", "2", "maxn_super"])
def test_a_mode_is_set_by_name_or_id_and_the_way_back_is_said(board: tuple[str, Any, Path], wanted: str) -> None:
    root, run, programs = board
    told = change(wanted, False, "unused", root, run)
    assert told["ran"] == [["sudo", "-n", "nvpmodel", "-m", "2"]]
    assert calls_of(programs / "sudo") == [["-n", "nvpmodel", "-m", "2"]]
    assert told["back"] == ["sudo nvpmodel -m 1"]
    assert told["state"]["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}


def test_the_mode_that_is_set_already_runs_nothing(board: tuple[str, Any, Path]) -> None:
    root, run, programs = board
    told = change("25W", False, "unused", root, run)
    assert told["ran"] == [] and calls_of(programs / "sudo") == []
    assert told["notes"] == ["the power mode is 25W already: nothing was run"]


def test_an_unknown_mode_is_refused_with_those_that_there_are(board: tuple[str, Any, Path]) -> None:
    root, run, programs = board
    with pytest.raises(BoardError, match="no power mode 'MAXN' on this board; modes: 0=15W, 1=25W, 2=MAXN_SUPER, 3=7W"):
        change("MAXN", False, "unused", root, run)
    assert calls_of(programs / "sudo") == []
    with pytest.raises(BoardError, match="this board has no power modes"):
        mode_of({"power_modes": [], "unknown": {}}, "0")


def test_a_mode_that_wants_a_reboot_is_left_to_a_person(board: tuple[str, Any, Path]) -> None:
    root, run, _ = board
    with pytest.raises(BoardError, match=r"needs a reboot, which is never done from here.*sudo nvpmodel -m 3"):
        change("7W", False, "unused", root, run)
    assert read_state(root, run)["power_mode"]["name"] == "25W"


def test_clocks_are_stored_locked_and_can_be_restored(board: tuple[str, Any, Path], tmp_path: Path) -> None:
    root, run, _ = board
    store = str(tmp_path / "before.conf")
    told = change("MAXN_SUPER", True, store, root, run)
    assert [argv[2:] for argv in told["ran"]] == [
        ["nvpmodel", "-m", "2"],
        ["jetson_clocks", "--store", store],
        ["jetson_clocks"],
    ]
    assert told["state"]["clocks_locked"] is True
    assert told["back"] == [f"sudo jetson_clocks --restore {store}", "sudo nvpmodel -m 1"]
    run(["sudo", "-n", "jetson_clocks", "--restore", store], 10)
    assert read_state(root, run)["clocks_locked"] is False


def test_where_sudo_wants_a_password_nothing_changes_and_the_command_is_told(tmp_path: Path) -> None:
    root = write_board(tmp_path / "root", ORIN_NANO_SUPER)
    install_board_tools(tmp_path / "bin", root, password=True)
    with pytest.raises(BoardError, match=r"sudo wants a password.*Log in there and run: sudo nvpmodel -m 2"):
        change("MAXN_SUPER", False, "unused", str(root), runner_in(tmp_path / "bin"))
    assert read_state(str(root), runner_in(tmp_path / "bin"))["power_mode"]["name"] == "25W"
