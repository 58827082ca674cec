"""Damaged, edited and torn tables: never a wrong number, never a lost row, always a place in the message."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_examples import candidate, filled, network, profile, row

from nas.core.errors import NasError, RecordError, StorageError
from nas.core.walk import expand
from nas.latency.table import LatencyTable

LAYERS = expand(candidate())


def edit(folder: Path, number: int, change: Callable[[dict[str, Any]], None], name: str = "rows.jsonl") -> None:
    """Changes one line (from 1) as a person with an editor would."""
    path = folder / name
    text = path.read_text().splitlines()
    data = json.loads(text[number - 1])
    change(data["row"])
    text[number - 1] = json.dumps(data)
    path.write_text("\n".join(text) + "\n")


def scale(factor: float) -> Callable[[dict[str, Any]], None]:
    """Another unit everywhere in the row."""

    def change(data: dict[str, Any]) -> None:
        data["latency_ms"] *= factor
        data["rounds_ms"] = [[s * factor for s in r] for r in data["rounds_ms"]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(latency_ms=-0.1), "latency_ms must be positive, got -0.1"),
        (lambda d: d.update(latency_ms=0), "latency_ms must be positive, got 0"),
        (lambda d: d.update(latency_ms=float("nan")), "NaN is not a finite number"),
        (lambda d: d.update(latency_ms=float("inf")), "Infinity is not a finite number"),
        (lambda d: d.update(latency_ms="0,5"), "latency_ms: expected float, got str '0,5'"),
        (lambda d: d.update(latency_ms=d["latency_ms"] * 3), "lies outside its own samples.*was the unit changed"),
        (lambda d: d.update(latency_ms=d["latency_ms"] / 1000), "is shorter than any call.*are these seconds|outside"),
        (lambda d: d.update(latency_us=5), "unknown field 'latency_us' of Measurement; did you mean 'latency_ms'"),
        (lambda d: d.pop("clock"), "field 'clock' of Measurement is missing"),
        (lambda d: d.update(rounds_ms=[[0.1, "x"]]), r"rounds_ms\[0\]: expected a list of numbers"),
        (lambda d: d.update(rounds_ms=[[0.1, -1]]), r"rounds_ms\[0\]: samples must be times of less than"),
        (lambda d: d.update(accepted=[]), "one accepted flag per round"),
        (lambda d: d.update(sequence=0), "sequence must be at least 1"),
        (lambda d: d.update(key="ir|in=1x2x3"), "is not a row key; a row key looks like ir"),
        (lambda d: d.update(kind="network"), "a network does not belong into rows.jsonl"),
        (scale(1000.0), "is too long for .* multiply-adds; are these microseconds"),
        (scale(0.001), "is too short for .* multiply-adds; are these seconds|shorter than any call"),
    ],
)
def test_nonsense_names_file_and_line(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    filled(tmp_path, [candidate()])
    edit(tmp_path, 3, change)
    with pytest.raises(RecordError, match=message) as e:
        LatencyTable.open(tmp_path, profile())
    assert f"{tmp_path / 'rows.jsonl'}:3" in str(e.value)


def test_a_line_that_is_no_json_names_file_and_line(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace('"row":', '"row"', 1))
    with pytest.raises(RecordError, match=r"rows.jsonl:1: not valid JSON"):
        LatencyTable.open(tmp_path, profile())


def test_a_valid_change_is_used_but_known_as_not_measured(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    edit(tmp_path, 2, lambda d: d.update(measured_at="2030-01-01T00:00:00+00:00"))
    table = LatencyTable.open(tmp_path, profile())
    assert table.edited == (f"{tmp_path / 'rows.jsonl'}:2",)
    assert f"not as measured, or not in this device state, the first: {table.edited[0]}" in table.warnings[0]
    assert len(table.rows) == 6


def test_a_number_changed_within_its_samples_is_noticed(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    value = f'"latency_ms":{table.row_ms(LAYERS[0].key)}'
    path.write_text(path.read_text().replace(value, value + "1"))
    assert LatencyTable.open(tmp_path, profile()).edited == (f"{path}:3",)


def test_a_reader_that_saw_a_torn_line_reads_its_replacement(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[0]))
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    table.add(row(LAYERS[1]))
    path.write_bytes(path.read_bytes()[: len(whole) + 50])  # another process was stopped while it wrote
    reader = LatencyTable.read(tmp_path)
    LatencyTable.open(tmp_path, profile()).add(row(LAYERS[2]))
    reader.refresh()
    assert list(reader.rows) == [LAYERS[0].key, LAYERS[2].key]
    assert (tmp_path / "rows.jsonl.torn").read_bytes().startswith(b'{"check":')


def test_a_full_disk_costs_the_row_that_did_not_fit(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[0]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "rows.jsonl").stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"rows.jsonl: cannot be written: .*MiB free there"):
            table.add(row(LAYERS[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    table.add(row(LAYERS[2]))
    assert list(LatencyTable.open(tmp_path, profile()).rows) == [LAYERS[0].key, LAYERS[2].key]


ADD = """
import sys
from pathlib import Path
from latency_examples import candidate, profile, row
from nas.core.walk import expand
from nas.latency.table import LatencyTable
layers = expand(candidate(width=int(sys.argv[2])))
table = LatencyTable.open(Path(sys.argv[1]), profile())
for layer in layers:
    with table.writing(wait_s=60):
        table.add(row(layer))
"""


def test_writers_of_several_processes_lose_nothing(tmp_path: Path) -> None:
    widths = (24, 32, 40, 48)
    command = [sys.executable, "-c", ADD, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(w)], cwd=Path(__file__).parent) for w in widths]
    assert [w.wait(timeout=60) for w in writers] == [0] * len(widths)
    table = LatencyTable.open(tmp_path, profile())
    assert set(table.rows) == {x.key for w in widths for x in expand(candidate(width=w))}
    numbers = [json.loads(line)["row"]["sequence"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, 6 * len(widths) + 1))


def test_a_network_with_another_candidate_is_refused(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    table.add(network(candidate(), 1.0), candidate(), "if")
    edit(tmp_path, 1, lambda d: d["candidate"].update(resolution=64), "networks.jsonl")
    with pytest.raises(RecordError, match=r"networks.jsonl:1: measured network: key .* is not that of its candidate"):
        LatencyTable.open(tmp_path, profile())


def test_a_torn_last_line_at_every_byte_costs_that_line_only(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    for layer in LAYERS[:3]:
        table.add(row(layer))
    data = (tmp_path / "rows.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(0, len(data) + 1, 7):
        (tmp_path / "rows.jsonl").write_bytes(data[:cut])
        table = LatencyTable.open(tmp_path, profile())
        assert list(table.rows) == [x.key for x in LAYERS[: sum(end <= cut for end in ends)]]
        assert table.edited == ()


@cache
def two_rows() -> dict[str, bytes]:
    """Files of a table with two rows, made once."""
    with tempfile.TemporaryDirectory() as name:
        table = LatencyTable.open(Path(name), profile())
        for layer in LAYERS[:2]:
            table.add(row(layer))
        return {n: (Path(name) / n).read_bytes() for n in ("device.json", "rows.jsonl")}


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, len(two_rows()["rows.jsonl"])), after=st.integers(0, 1))
def test_after_a_torn_write_the_next_row_is_whole(cut: int, after: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "device.json").write_bytes(two_rows()["device.json"])
        (folder / "rows.jsonl").write_bytes(two_rows()["rows.jsonl"][:cut])
        table = LatencyTable.open(folder, profile())
        expected = list(table.rows)
        for layer in LAYERS[3 : 3 + after]:
            table.add(row(layer))
            expected.append(layer.key)
            assert len((folder / "rows.jsonl").read_text().splitlines()) == len(expected)
        final = LatencyTable.open(folder, profile())
        assert list(final.rows) == expected
        assert final.edited == ()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_leaves_possible_numbers(data: st.DataObject) -> None:
    raw = bytearray(two_rows()["rows.jsonl"])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "device.json").write_bytes(two_rows()["device.json"])
        (folder / "rows.jsonl").write_bytes(bytes(raw))
        try:
            read = LatencyTable.open(folder, profile())
        except NasError as e:
            assert str(folder / "rows.jsonl") in str(e)
        else:
            for m in read.rows.values():
                assert m.latency_ms is None or 1e-4 <= m.latency_ms < 1e4
