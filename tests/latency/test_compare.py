"""Tables held against each other, merged and verified; and no damage of a table gives a silently wrong number."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from latency_examples import GATE_MS, OVERHEAD_MS, candidate, filled, measured, network, profile, row, row_time_ms

from nas.core.errors import DeviceError, NasError, RecordError, StorageError, UsageError
from nas.core.jsonio import canonical_json, read_record
from nas.core.records import DeviceProfile
from nas.core.walk import expand
from nas.latency.compare import compare_tables, group_of, merge_tables
from nas.latency.entries import ImportSettings
from nas.latency.importers import imported_profile
from nas.latency.lines import line_of
from nas.latency.newtable import write_table
from nas.latency.table import DeviceFile, LatencyTable
from nas.latency.verify import verify_table

LAYERS = expand(candidate())
KEYS = [x.key for x in LAYERS]


def scaled(folder: Path, factor: float, **changes: object) -> LatencyTable:
    """The rows of the example candidate, all so many times slower, and a measured network."""
    table = LatencyTable.open(folder, profile(**changes))
    with table.writing():
        table.add(measured("overhead", "overhead", "none", OVERHEAD_MS * factor))
        table.add(measured("gate", "overhead", "none", (OVERHEAD_MS + GATE_MS) * factor))
        table.add(measured("reference", "overhead", "fp32", 0.4 * factor))
        for layer in LAYERS:
            table.add(row(layer, row_time_ms(layer) * factor))
        table.add(network(candidate(), 1.0 * factor), candidate(), "if")
    return table


def test_two_tables_differ_in_state_and_by_group(tmp_path: Path) -> None:
    a = scaled(tmp_path / "a", 1.0)
    b = scaled(tmp_path / "b", 2.0, power_mode="15W")
    with b.writing():
        b.add(row(LAYERS[1], 3 * row_time_ms(LAYERS[1])))
    found = compare_tables(a, b)
    assert found.state == (("power_mode", "governor=host", "15W"),)
    assert (found.only_a, found.only_b) == ((), ())
    groups = {(g.group, g.precision): g for g in found.groups}
    assert groups["stem", "fp32"].median_ratio == pytest.approx(2)
    assert groups["stem", "fp32"].spread == pytest.approx(0)
    blocks = groups["inverted_residual", "fp32"]
    assert blocks.rows == 2
    assert (blocks.greatest.key, blocks.greatest.ratio) == (LAYERS[1].key, pytest.approx(3))
    assert blocks.least.ratio == pytest.approx(2)
    assert blocks.median_ratio == pytest.approx(2.5)
    assert groups["fixed", "none"].rows == 3
    assert groups["network", "-"].median_ratio == pytest.approx(2)


def test_rows_in_one_table_only_are_named(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", [candidate()]), filled(tmp_path / "b", [candidate("int8")])
    found = compare_tables(a, b)
    assert found.state == ()
    assert set(found.only_a) == set(KEYS)
    assert all(key.endswith("|int8") for key in found.only_b)
    assert [g.group for g in found.groups] == ["fixed"]


def test_failed_rows_are_no_common_rows(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", [candidate()]), filled(tmp_path / "b", [])
    b.add(measured(KEYS[0], "row", "fp32", None, error="no kernel"))
    assert KEYS[0] in compare_tables(a, b).only_a


def test_groups_of_keys() -> None:
    assert group_of("overhead") == ("fixed", "none")
    assert group_of("weights-8MB-cached") == ("fixed", "none")
    assert group_of(KEYS[0]) == ("stem", "fp32")
    assert group_of("r32-d3-x1-fp32-0123456789ab|if") == ("network", "-")


def test_a_merged_row_is_the_median_and_its_deviation_that_between_boards(tmp_path: Path) -> None:
    tables = {f"board-{f}": scaled(tmp_path / str(f), f) for f in (1.0, 1.1, 1.5)}
    merged = merge_tables(tables)
    write_table(tmp_path / "all", tables["board-1.0"].profile, merged.rows, merged.networks, readme="")
    table = LatencyTable.read(tmp_path / "all")
    for layer in LAYERS:
        assert table.row_ms(layer.key) == pytest.approx(1.1 * row_time_ms(layer))
        assert table.row_std_ms(layer.key) == pytest.approx(0.216 * row_time_ms(layer), rel=0.01)
    assert table.overhead_ms == pytest.approx(1.1 * OVERHEAD_MS)
    assert table.gate_ms == pytest.approx(1.1 * GATE_MS)
    assert table.reference_ms == pytest.approx(0.44)
    only = next(iter(table.networks.values())).measurement
    assert only.latency_ms == pytest.approx(1.1)
    assert only.session_ms == pytest.approx((1.0, 1.1, 1.5))
    assert only.std_ms == pytest.approx(2 * 0.05 / 3**0.5)
    assert only.source == "median of board-1.0 1.0 ms, board-1.1 1.1 ms, board-1.5 1.5 ms"
    numbers = [m.sequence for m in (*merged.rows, *(n.measurement for n in merged.networks))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert merged.ratios == tuple(
        (name, pytest.approx(r)) for name, r in zip(tables, (1 / 1.1, 1.0, 1.5 / 1.1), strict=True)
    )
    spread = {s.group: s for s in merged.spreads}["stem"]
    assert (spread.rows, spread.common) == (1, 1)
    assert spread.median == spread.greatest == pytest.approx(0.5 / 1.1)
    assert spread.greatest_key == KEYS[0]


def test_a_row_of_one_board_stays_as_it_is_and_a_failure_does_not_hide_a_number(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", [candidate()]), filled(tmp_path / "b", [])
    b.add(measured(KEYS[0], "row", "fp32", None, error="no kernel"))
    b.add(measured("head|in=8x4x4|out=4x1x1|e=0|h=0|act=relu|fp32", "row", "fp32", None, error="out of memory"))
    merged = merge_tables({"a": a, "b": b})
    rows = {m.key: m for m in merged.rows}
    assert rows[KEYS[0]].latency_ms == a.row_ms(KEYS[0])
    assert rows[KEYS[0]].error is None
    failed = rows["head|in=8x4x4|out=4x1x1|e=0|h=0|act=relu|fp32"]
    assert (failed.latency_ms, failed.error, failed.source) == (None, "out of memory", "failed in b (line 4)")
    assert {s.group: s.common for s in merged.spreads}["stem"] == 0


def test_tables_of_two_states_have_no_centre(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", []), filled(tmp_path / "b", [], threads=2, power_mode="15W")
    with pytest.raises(DeviceError, match="a and b were measured in different device states") as e:
        merge_tables({"a": a, "b": b})
    assert "power_mode: 'governor=host' and '15W'\n  threads: 1 and 2" in str(e.value)
    assert str(e.value).endswith("nas table diff a b")


def test_a_copy_does_not_count_twice(tmp_path: Path) -> None:
    a = filled(tmp_path / "a", [candidate()])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UsageError, match="a and b hold the very same measurements; one is a copy"):
        merge_tables({"a": a, "b": LatencyTable.read(tmp_path / "b")})
    with pytest.raises(UsageError, match="needs at least two tables"):
        merge_tables({"a": a})


# What verifying finds


def edit(folder: Path, number: int, change: Callable[[dict[str, Any]], object], *, again: bool = False) -> None:
    """Changes a line of rows.jsonl; `again` with the right checksum, as a program would write it."""
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    data = json.loads(lines[number - 1])
    change(data["row"])
    if again:
        data = line_of(data["row"], read_record(DeviceFile, folder / "device.json").profile.fingerprint)
    lines[number - 1] = canonical_json(data)
    path.write_text("\n".join(lines) + "\n")


def test_a_measured_table_has_nothing_wrong(tmp_path: Path) -> None:
    scaled(tmp_path, 1.0)
    assert verify_table(tmp_path) == ()
    with pytest.raises(StorageError, match="no latency table here"):
        verify_table(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "again", "what", "fix"),
    [
        (
            lambda d: d.update(measured_at="2030"),
            False,
            "was changed after it was measured, or is of another",
            "restore it",
        ),
        (lambda d: d.update(latency_ms=-1), True, "latency_ms must be positive, got -1", "delete the line"),
        (lambda d: d.update(latency_ms="0,5"), True, "latency_ms: expected float, got str '0,5'", "delete the line"),
        (lambda d: d.update(power_w=5), True, "unknown field 'power_w' of Measurement", "update this program"),
        (lambda d: d.update(key="gru|in=1x1x1|out=1x1x1|fp32"), True, "is not a row key", "delete the line"),
        (lambda d: d.update(latency_ms=d["latency_ms"] * 9), True, "lies outside its own samples", "delete the line"),
        (lambda d: d.update(sequence=2), True, "has sequence number 2, which ", "nas table merge"),
        (lambda d: d.pop("clock"), True, "field 'clock' of Measurement is missing", "delete the line"),
    ],
)
def test_each_wrong_line_is_named_with_its_fix(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], again: bool, what: str, fix: str
) -> None:
    scaled(tmp_path, 1.0)
    edit(tmp_path, 4, change, again=again)
    (problem,) = verify_table(tmp_path)
    assert problem.place == f"{tmp_path / 'rows.jsonl'}:4"
    assert what in problem.what
    assert fix in problem.fix
    assert not problem.what.startswith(problem.place)


def test_all_problems_are_told_not_only_the_first(tmp_path: Path) -> None:
    scaled(tmp_path, 1.0)
    edit(tmp_path, 4, lambda d: d.update(sequence=0), again=True)
    edit(tmp_path, 6, lambda d: d.update(latency_ms=None), again=True)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes() + b'{"check":"\xff\n' + b'{"che')
    places = [p.place.rpartition(":")[2] for p in verify_table(tmp_path)]
    assert places == ["4", "6", "10", "11"]
    assert "is not UTF-8" in verify_table(tmp_path)[2].what
    assert "the last line is torn after 5 bytes" in verify_table(tmp_path)[3].what


def test_rows_measured_again_contradict_beyond_their_spreads_only(tmp_path: Path) -> None:
    table = scaled(tmp_path, 1.0)
    value = row_time_ms(LAYERS[0])
    table.add(row(LAYERS[0], value * 1.04))
    assert verify_table(tmp_path) == ()
    table.add(row(LAYERS[0], value * 3, stable=False))  # a disturbed row says nothing
    assert verify_table(tmp_path) == ()
    table.add(row(LAYERS[0], value * 1.4))
    (problem,) = verify_table(tmp_path)
    assert problem.place.endswith("rows.jsonl:12")
    assert problem.what.startswith(f"{KEYS[0]}: {1.4 * value:.4g} ms and {value:.4g} ms were measured")


def test_rows_measured_while_the_machine_was_slow_contradict_nothing(tmp_path: Path) -> None:
    table = scaled(tmp_path, 1.0)
    table.add(measured("reference", "overhead", "fp32", 0.8))
    table.add(row(LAYERS[0], 2 * row_time_ms(LAYERS[0])))
    assert verify_table(tmp_path) == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('"version": 99', "table version 99, this program reads 1"),
        ('"version": 0', "table version 0, this program reads 1"),
        ('"version": 1, "x": 2', "unknown field 'x' of DeviceFile"),
        ('"version": ', "not valid JSON"),
    ],
)
def test_a_device_file_that_cannot_be_read_is_told(tmp_path: Path, text: str, what: str) -> None:
    scaled(tmp_path, 1.0)
    path = tmp_path / "device.json"
    path.write_text(path.read_text().replace('"version": 1', text))
    problems = verify_table(tmp_path)
    assert problems[0].place == str(path)
    assert what in problems[0].what
    if "99" in text:
        assert "newer program: update" in problems[0].fix


def test_a_damaged_correction_is_told_and_one_of_another_version_is_not(tmp_path: Path) -> None:
    scaled(tmp_path, 1.0)
    (tmp_path / "correction.json").write_text("{")
    (problem,) = verify_table(tmp_path)
    assert problem.fix == "delete the file; it is computed anew from networks.jsonl"
    (tmp_path / "correction.json").write_text('{"version": 9999}')
    assert verify_table(tmp_path) == ()


def test_tables_inside_a_merged_one_and_entries_of_an_imported_one_are_verified(tmp_path: Path) -> None:
    scaled(tmp_path / "a", 1.0)
    state = imported_profile("x", ImportSettings("fp32", "ms"), state={}, details={})
    files = {"entries.jsonl": '{"name": 1}\n', "import.json": '{"entries": 2}'}
    write_table(tmp_path / "x", state, [], readme="", files=files, copies={"sources/1-a": tmp_path / "a"})
    edit(tmp_path / "x" / "sources" / "1-a", 2, lambda d: d.update(sequence=-1), again=True)
    problems = verify_table(tmp_path / "x")
    assert [p.place.removeprefix(f"{tmp_path / 'x'}/") for p in problems] == [
        "entries.jsonl:1",
        "import.json",
        "sources/1-a/rows.jsonl:2",
    ]
    assert verify_table(tmp_path / "a") == ()


# Damage


def small(folder: Path) -> LatencyTable:
    """Three rows and a network; every line short, so that each of its bytes can be tried."""
    table = LatencyTable.open(folder, profile())
    with table.writing():
        table.add(measured("overhead", "overhead", "none", OVERHEAD_MS))
        for layer in LAYERS[:2]:
            table.add(row(layer))
        table.add(network(candidate(), 1.0), candidate(), "if")
    return table


def content(table: LatencyTable) -> dict[str, object]:
    return {**table.rows, **table.networks, **table.fixed}


def damaged(folder: Path, name: str, data: bytes, original: LatencyTable) -> None:
    """Reads a damaged file: an error of ours that names it, or noticed, or every number that is there is the old."""
    (folder / name).write_bytes(data)
    try:
        found = LatencyTable.read(folder)
    except NasError as e:
        assert isinstance(e, RecordError)
        assert f"{folder / name}:" in str(e)
        return
    if not found.edited:
        before = content(original)
        assert all(before[key] == value for key, value in content(found).items())
    else:
        assert all(place.startswith(str(folder / name)) for place in found.edited)


@pytest.mark.parametrize("name", ["rows.jsonl", "networks.jsonl"])
def test_a_changed_byte_anywhere_is_an_error_or_noticed(tmp_path: Path, name: str) -> None:
    original = small(tmp_path)
    data = (tmp_path / name).read_bytes()
    rng = random.Random(7)
    for place in range(rng.randrange(3), len(data), 3):
        byte = rng.choice(b'0123456789abcxyz"{}[],.:-+e \n\x00\xff')
        if data[place] != byte:
            damaged(tmp_path, name, data[:place] + bytes([byte]) + data[place + 1 :], original)


@pytest.mark.parametrize("name", ["rows.jsonl", "networks.jsonl"])
def test_a_file_cut_anywhere_loses_lines_but_changes_none(tmp_path: Path, name: str) -> None:
    original = small(tmp_path)
    data = (tmp_path / name).read_bytes()
    for cut in range(0, len(data), 5):
        (tmp_path / name).write_bytes(data[:cut])
        found = LatencyTable.read(tmp_path)
        assert found.edited == ()
        before = content(original)
        assert all(before[key] == value for key, value in content(found).items())


@pytest.mark.parametrize("value", [None, True, -1, 0, 1e308, "x", "", [], {}, [[1]], ["1"]])
def test_every_field_changed_to_anything_is_an_error_or_noticed(tmp_path: Path, value: object) -> None:
    original = small(tmp_path)
    line = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])
    for field in line["row"]:
        for change in ({field: value}, {f"{field}_": value}):
            text = canonical_json({"check": line["check"], "row": {**line["row"], **change}})
            if text != canonical_json(line):
                damaged(tmp_path, "rows.jsonl", f"{text}\n".encode(), original)


def test_a_damaged_device_file_is_an_error_of_ours_or_another_state(tmp_path: Path) -> None:
    original = small(tmp_path)
    path = tmp_path / "device.json"
    data = path.read_bytes()
    rng = random.Random(11)
    states = 0
    for place in range(0, len(data), 2):
        byte = rng.choice(b'059ax"{}[],:- \n\xff')
        path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
        try:
            found: DeviceProfile = LatencyTable.read(tmp_path).profile
        except NasError as e:
            assert str(path) in str(e)
        else:
            states += replace(found, name="", details={}) != replace(original.profile, name="", details={})
    assert states
