"""State of a board, read from trees of files as four generations of Jetson show them. All values are simulated."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from fake_board.tools import install_board_tools, runner_in
from fake_board.tree import BOARDS, BOOT_ID, NANO, ORIN_NANO_SUPER, THOR, FakeBoard, put, write_board

from nas.devices.board.errors import BoardError
from nas.devices.board.state import (
    are_locked,
    identity,
    locked_mhz,
    parse_current_mode,
    parse_power_modes,
    read_identity,
    read_rails,
    read_state,
    run_program,
    slow_clocks,
    snapshot,
)


def nothing_installed(argv: list[str], timeout_s: float) -> tuple[int, str, str]:  # noqa: ARG001
    raise BoardError("not_found", f"{argv[0]} is not installed")


def state_of(folder: Path, board: FakeBoard, **tools: Any) -> dict[str, Any]:
    root = write_board(folder / "root", board)
    install_board_tools(folder / "bin", root, **tools)
    return read_state(str(root), runner_in(folder / "bin"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nano", ("tegra210", "Jetson Nano", "32.7.1", "4.6.1", "10.2.300", {"id": 0, "name": "MAXN"}, 921.6)),
        (
            "xavier_nx",
            (
                "tegra194",
                "Jetson Xavier NX 8GB",
                "35.4.1",
                "5.1.2",
                "11.4.19",
                {"id": 8, "name": "MODE_20W_6CORE"},
                1109.2,
            ),
        ),
        (
            "orin_nano_super",
            (
                "tegra234",
                "Jetson Orin Nano (developer kit)",
                "36.4.3",
                "6.2",
                "12.6.68",
                {"id": 1, "name": "25W"},
                1020,
            ),
        ),
        ("thor", ("tegra264", "Jetson Thor", "38.2.0", "7.0", "13.0.48", {"id": 1, "name": "120W"}, 1575)),
    ],
)
def test_each_generation_tells_what_it_is(tmp_path: Path, name: str, expected: tuple[Any, ...]) -> None:
    state = state_of(tmp_path, BOARDS[name])
    found = tuple(state[key] for key in ("soc", "module", "l4t", "jetpack", "cuda", "power_mode"))
    assert (*found, state["clocks"]["gpu_max_mhz"]) == expected
    assert state["boot_id"] == BOOT_ID
    assert state["clocks_locked"] is False
    assert len(state["clocks"]["cpu_mhz"]) == BOARDS[name].cpus


def test_ids_of_power_modes_are_those_of_the_file_and_not_of_their_order() -> None:
    text = "# < POWER_MODEL ID=9 NAME=EXAMPLE >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    text += "< POWER_MODEL NAME=15W ID=0 > # was < ID=5 >\n"
    modes, default = parse_power_modes(text + "< PM_CONFIG DEFAULT=2 >\n< PARAM TYPE=FILE NAME=X >\n")
    assert modes == [{"id": 2, "name": "MAXN_SUPER"}, {"id": 0, "name": "15W"}]
    assert default == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NV Power Mode: MAXN\n0\n", (0, "MAXN")),
        ("NVPM VERB: Current mode: NV Power Mode: 25W\n1\nNVPM VERB: PARAM CPU_ONLINE\n", (1, "25W")),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n\n2\n", (2, "15W")),
        ("NV Power Mode: 15W\n", (None, "15W")),
        ("NVPM ERROR: failed\n", (None, None)),
    ],
)
def test_the_current_mode_as_nvpmodel_prints_it(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_current_mode(text) == expected


def test_without_nvpmodel_the_status_file_tells_the_mode(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    put(root, "var/lib/nvpmodel/status", "pmode:0002 fmode:quiet")
    state = read_state(str(root), nothing_installed)
    assert state["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert "power_mode" not in state["unknown"]


def test_what_is_not_known_is_none_and_says_why(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    state = read_state(str(root), nothing_installed)
    assert state["power_mode"] is None
    assert state["unknown"]["power_mode"] == "nvpmodel -q: nvpmodel is not installed"
    problem = next(p for p in state["problems"] if p["what"] == "power mode unknown")
    assert problem["fix"] == "sudo nvpmodel -q"


def test_nonsense_of_nvpmodel_is_no_mode(tmp_path: Path) -> None:
    state = state_of(tmp_path, NANO, fail="garbage")
    assert state["power_mode"] is None
    assert "nvpmodel -q ended with 255: NVPM ERROR" in state["unknown"]["power_mode"]


def test_an_l4t_of_two_numbers_ends_with_a_zero(tmp_path: Path) -> None:
    board = dataclasses.replace(NANO, release="# R36 (release), REVISION: 3, GCID: 1, BOARD: generic")
    state = read_state(str(write_board(tmp_path, board)), nothing_installed)
    assert (state["l4t"], state["jetpack"]) == ("36.3.0", "6.0")


def test_an_l4t_that_is_not_in_the_table_gets_no_jetpack(tmp_path: Path) -> None:
    board = dataclasses.replace(NANO, release="# R40 (release), REVISION: 1.0, GCID: 1, BOARD: generic")
    state = read_state(str(write_board(tmp_path, board)), nothing_installed)
    assert (state["l4t"], state["jetpack"]) == ("40.1.0", None)
    assert "L4T 40.1.0 is not in our table" in state["unknown"]["jetpack"]


def test_packages_tell_l4t_and_jetpack_where_the_file_is_missing(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    (root / "etc/nv_tegra_release").unlink()
    versions = {"nvidia-l4t-core": "36.4.3-20250107174145", "nvidia-jetpack": "6.2.1+b38"}

    def dpkg(argv: list[str], timeout_s: float) -> tuple[int, str, str]:  # noqa: ARG001
        return (0, versions[argv[-1]], "") if argv[0] == "dpkg-query" else (1, "", "")

    state = read_state(str(root), dpkg)
    assert (state["l4t"], state["jetpack"]) == ("36.4.3", "6.2.1")


def test_thor_shows_two_gpu_nodes_and_the_computing_one_is_read(tmp_path: Path) -> None:
    clocks = snapshot(str(write_board(tmp_path, THOR)))["clocks"]
    assert (clocks["gpu_mhz"], clocks["gpu_max_mhz"]) == (315, 1575)


def test_locked_clocks_are_those_with_one_frequency(tmp_path: Path) -> None:
    clocks = snapshot(str(write_board(tmp_path, ORIN_NANO_SUPER.locked)))["clocks"]
    assert are_locked(clocks) is True
    assert slow_clocks(clocks) is None
    clocks["gpu_mhz"] = 816.0
    assert are_locked(clocks) is True, "slower than locked is throttled, not unlocked"
    assert slow_clocks(clocks) == "the GPU is locked to 1020 MHz and runs at 816 MHz"
    assert locked_mhz(clocks) == "gpu 1020, cpu 1728"
    lower = dict(clocks, gpu_min_mhz=816.0, gpu_max_mhz=816.0)
    assert are_locked(lower) is True
    assert locked_mhz(lower) == "gpu 816, cpu 1728", "locked anew at another frequency is another state"
    clocks["cpu_min_mhz"] = [115.2] * 6
    assert are_locked(clocks) is False
    assert locked_mhz(clocks) is None
    assert are_locked({}) is None


def test_sensors_that_mean_nothing_are_left_out(tmp_path: Path) -> None:
    root = write_board(tmp_path, NANO)
    assert "PMIC-Die" not in snapshot(str(root))["temperature_c"]
    root = write_board(tmp_path / "orin", ORIN_NANO_SUPER)
    state = read_state(str(root), nothing_installed)
    assert "cv0-thermal" not in state["temperature_c"], "a sensor that is off reads -256"
    assert state["trip_c"]["tj-thermal"] == 95, "the fan's trip does not count"


@pytest.mark.parametrize("name", BOARDS)
def test_rails_in_the_form_of_each_generation(tmp_path: Path, name: str) -> None:
    rails = {r["name"]: r["mw"] for r in read_rails(str(write_board(tmp_path, BOARDS[name])))}
    assert rails == pytest.approx(BOARDS[name].rails)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_only_root_may_read_says_so(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER)
    (root / "sys/kernel/debug/bpmp/debug/clk/emc/rate").chmod(0)
    state = read_state(str(root), nothing_installed)
    assert state["clocks"]["emc_mhz"] is None
    assert state["unknown"]["clocks.emc_mhz"].endswith("emc/rate: Permission denied")


def test_problems_have_a_reason_and_a_fix(tmp_path: Path) -> None:
    board = dataclasses.replace(ORIN_NANO_SUPER.locked, counters=(0, 2, 5))
    root = write_board(tmp_path / "root", board)
    put(root, "proc/meminfo", "MemTotal: 7802192 kB\nMemAvailable: 500000 kB\n")
    put(root, "sys/class/thermal/thermal_zone2/temp", "91000\n")
    put(root, "sys/class/devfreq/17000000.gpu/cur_freq", "612000000\n")
    install_board_tools(tmp_path / "bin", root)
    problems = {p["what"]: p for p in read_state(str(root), runner_in(tmp_path / "bin"))["problems"]}
    assert set(problems) == {"wrong clocks", "hot", "over-current", "little memory"}
    assert problems["hot"]["why"] == "tj-thermal has 91.0 C, and is slowed down from 95.0 C"
    assert problems["over-current"]["why"].startswith("since it started, the supply gave too little 7 times")
    assert "488 MB are free" in problems["little memory"]["why"]
    assert all(p["fix"] for p in problems.values())


def test_a_desktop_is_a_problem_with_the_way_back(tmp_path: Path) -> None:
    root = write_board(tmp_path, ORIN_NANO_SUPER.locked)

    def run(argv: list[str], timeout_s: float) -> tuple[int, str, str]:  # noqa: ARG001
        return (0, "active\n", "") if argv[0] == "systemctl" else (1, "", "")

    problem = read_state(str(root), run)["problems"][-1]
    assert problem["what"] == "desktop"
    assert "sudo systemctl isolate multi-user.target" in problem["fix"] and "graphical.target" in problem["fix"]


def test_a_host_that_is_no_jetson_gives_what_there_is() -> None:
    state = read_state()
    assert state["soc"] is None and state["power_mode"] is None and state["problems"] == []
    assert "no Tegra" in state["unknown"]["soc"]
    assert state["board"].startswith(platform.machine())
    assert state["python"].count(".") == 2
    assert state["memory_mb"]["total"] > 0


def test_what_may_not_change_is_the_same_in_two_readings(tmp_path: Path) -> None:
    first, second = (identity(state_of(tmp_path, ORIN_NANO_SUPER)) for _ in range(2))
    assert first == second
    assert first["power_mode"] == "25W" and first["boot_id"] == BOOT_ID


def test_what_may_not_change_is_read_without_the_rest(tmp_path: Path) -> None:
    root = write_board(tmp_path / "root", ORIN_NANO_SUPER.locked)
    install_board_tools(tmp_path / "bin", root)
    run, started = runner_in(tmp_path / "bin"), []

    def counted(argv: list[str], timeout_s: float) -> tuple[int, str, str]:
        started.append(argv[0])
        return run(argv, timeout_s)

    assert read_identity(str(root), counted) == identity(read_state(str(root), run))
    assert started == ["nvpmodel"], "it is read around each group of models"


def test_a_line_of_tegrastats_is_part_of_what_a_bundle_tells(tmp_path: Path) -> None:
    assert "VDD_IN 5000mW/5000mW" in state_of(tmp_path / "orin", ORIN_NANO_SUPER)["tegrastats"]
    assert read_state(str(tmp_path / "nothing"), nothing_installed)["tegrastats"] is None


def test_a_program_that_is_not_there_or_does_not_end_is_an_error_of_ours() -> None:
    with pytest.raises(BoardError, match="no-such-program is not installed") as e:
        run_program(["no-such-program"])
    assert e.value.kind == "not_found"
    with pytest.raises(BoardError, match=r"did not return within 0\.2 s") as e:
        run_program(["sleep", "9"], 0.2)
    assert e.value.kind == "hung"
