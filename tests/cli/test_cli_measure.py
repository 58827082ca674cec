"""`nas measure`: rows by key or for a space, once each, on the real device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.core.records import DeviceProfile
from nas.devices.base import Device
from nas.devices.board_profile import LOCK_CLOCKS
from nas.latency.table import LatencyTable
from nas.measure.fill import FillReport, fill
from nas.testing import SimulatedDevice

ROW = "ir|in=8x4x4|out=8x4x4|k=3|s=1|e=16|se=0|act=relu|fp32"
HEAD = "head|in=8x4x4|out=4x1x1|e=0|h=0|act=relu|fp32"


def test_rows_are_measured_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "my table"
    args = ["measure", "--rows", ROW, "--rows", HEAD, "--table", str(table), "--json"]
    assert run(args) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["rows"], first["measured"], first["failed"], first["missing"]) == (2, 2, [], [])
    assert set(first["latency_ms"]) == {ROW, HEAD}
    assert 0 < first["overhead_ms"] < first["latency_ms"][ROW] < 5
    assert run(args) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["measured"] == 0
    assert second["latency_ms"] == first["latency_ms"]


def test_a_dry_run_counts_and_begins_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["measure", "--space", "tiny-32", "--precision", "fp32", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["missing"]) == document["rows"] > 100
    assert document["about_s"] > 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "give either --space NAME or --rows KEY"),
        (["--space", "tiny-32", "--rows", ROW], 2, "give either --space NAME or --rows KEY"),
        (["--space", "tny-32"], 2, "--space: no space named 'tny-32'; did you mean 'tiny-32'?"),
        (["--space", "no/such.yaml"], 2, "no/such.yaml: no such file"),
        (["--rows", "ir|x"], 2, "is not a row key"),
        (["--space", "tiny-32", "--precision", "fp16"], 2, "--precision fp16: this device offers fp32, int8"),
        (["--rows", ROW.replace("fp32", "fp16")], 2, "this device offers fp32, int8"),
        (["--rows", ROW, "--precision", "fp32"], 2, "--precision goes with --space"),
        (["--rows", ROW, "--device", "orin"], 2, "device 'orin' does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    args: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["measure", *args]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_clocks_that_are_not_locked_are_warned_about_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unlocked(SimulatedDevice):
        @property
        def profile(self) -> DeviceProfile:
            return replace(super().profile, clocks_locked=False, details={LOCK_CLOCKS: "sudo jetson_clocks"})

    monkeypatch.setattr("nas.devices.open_device", lambda *_: Unlocked())
    assert run(["measure", "--rows", ROW, "--dry-run", "--device", "ssh:me@nx"]) == 0
    err = capsys.readouterr().err
    assert "on the board: sudo jetson_clocks" in err and "nas doctor --device ssh:me@nx --lock-clocks" in err


def test_a_table_of_another_device_is_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["measure", "--rows", ROW, "--table", str(tmp_path)]
    assert run(args) == 0
    path = tmp_path / "device.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["profile"]["power_mode"] = "governor=powersave boost=off"
    path.write_text(json.dumps(state), encoding="utf-8")
    assert run(args) == 4
    err = capsys.readouterr().err
    assert "power_mode" in err and "governor=powersave" in err


def test_the_number_of_covering_networks_is_told_and_hours_only_for_a_time_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["measure", "--space", "tiny-32", "--precision", "fp32", "--how", "covering", "--dry-run"]
    assert run([*args, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["least_networks"] <= first["networks"] < first["rows"] / 2
    assert first["hours"] is None
    assert run([*args, "--engine-s", "90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hours"] == pytest.approx(first["networks"] * 90 / 3600)
    assert run(args) == 0
    said = capsys.readouterr().out
    assert f"rows to measure in {first['networks']} covering networks" in said
    assert "give --engine-s SECONDS" in said
    assert not list(tmp_path.iterdir())


def test_covering_networks_are_counted_for_precisions_that_this_device_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    both = ["--precision", "fp16", "--precision", "int8"]
    args = ["measure", "--space", "jetson-64", *both, "--how", "covering"]
    assert run([*args, "--dry-run", "--engine-s", "60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["networks"], told["hours"]) == (554, 192, pytest.approx(3.2))
    assert run(args) == 2
    assert "--precision fp16: this device offers fp32" in capsys.readouterr().err


def test_rows_that_no_covering_network_gives_are_named_with_the_command_that_measures_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(table: LatencyTable, device: Device, *_: object, **__: object) -> FillReport:
        fill(table, device, [])
        return FillReport(20, tuple((f"row{i}", "no kernel") for i in range(12)), ("row13",), None, 1.0, "?")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.measure.covering.fill_covering", filled)
    monkeypatch.setattr("nas.measure.fill.measure_streaming", lambda *_, **__: None)
    assert run(["measure", "--space", "tiny-32", "--precision", "fp32", "--how", "covering", "--table", "t"]) == 0
    said = capsys.readouterr().err
    options = "--space tiny-32 --classes 10 --precision fp32 --device cpu --table t"
    assert f"nas measure --how isolated {options}\n" in said and "  row9 and 2 more\n" in said
    assert f"measure them again with: nas measure --again --how covering {options}\n" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rows", ROW, "--how", "covering"], "--how covering goes with --space NAME"),
        (["--space", "tiny-32", "--engine-s", "9"], "--engine-s goes with --how covering --dry-run"),
    ],
)
def test_options_of_covering_networks_that_do_not_fit_are_refused(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["measure", *args]) == 2
    assert message in capsys.readouterr().err
