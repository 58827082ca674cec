"""What a latency table keeps, refuses and answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from latency_examples import OVERHEAD_MS, candidate, filled, measured, network, profile, row, row_time_ms

from nas.core.errors import DeviceError, MissingRowError, RecordError, StorageError
from nas.core.jsonio import canonical_json
from nas.core.records import PROFILE_STATE_FIELDS
from nas.core.walk import expand
from nas.latency.correction import CORRECTION_VERSION, Correction
from nas.latency.lines import network_key, streaming_key
from nas.latency.table import FOREIGN_ROW_STD, LatencyTable

LAYERS = expand(candidate())


def test_a_new_table_says_what_its_numbers_are(tmp_path: Path) -> None:
    LatencyTable.open(tmp_path / "t", profile())
    text = (tmp_path / "t/README.md").read_text()
    for part in ("test board", "governor=host", "milliseconds", "20th percentile", "thread_cpu"):
        assert part in text
    assert json.loads((tmp_path / "t/device.json").read_text())["profile"]["board"] == "test board"


def test_rows_come_back_as_they_were_added(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    added = table.add(row(LAYERS[0]))
    again = LatencyTable.open(tmp_path, profile())
    assert again.rows[LAYERS[0].key] == added
    assert again.row_ms(LAYERS[0].key) == added.latency_ms
    assert again.edited == ()


def test_networks_come_back_with_their_candidate_and_without_thresholds(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(network(candidate(), 1.5), candidate(), "if")
    stored = LatencyTable.open(tmp_path, profile()).networks[network_key(candidate(), "if")]
    assert stored.candidate == candidate().with_thresholds((None,))
    assert stored.measurement.latency_ms == 1.5


def test_networks_that_differ_in_thresholds_only_are_one() -> None:
    assert network_key(candidate(), "if") == network_key(candidate().with_thresholds((0.5,)), "if")
    assert network_key(candidate(), "if") != network_key(candidate("int8"), "if")
    assert network_key(candidate(), "if") != network_key(candidate(), "logits")


def test_the_newest_row_counts_and_the_raw_file_keeps_both(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[1], 0.2))
    table.add(dataclasses.replace(row(LAYERS[1], 0.3), measured_at="1999-01-01T00:00:00+00:00"))  # a clock set back
    assert table.row_ms(LAYERS[1].key) == 0.3
    assert LatencyTable.open(tmp_path, profile()).row_ms(LAYERS[1].key) == 0.3
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_a_failure_does_not_replace_a_number(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    failed = measured(LAYERS[1].key, "row", "fp32", None, error="out of memory")
    table.add(failed)
    assert table.missing([LAYERS[1].key]) == []
    table.add(row(LAYERS[1], 0.2))
    table.add(failed)
    assert LatencyTable.open(tmp_path, profile()).row_ms(LAYERS[1].key) == 0.2


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([(0.010, True), (0.012, False)], 0.010),
        ([(0.012, False), (0.014, False)], 0.012),
        ([(0.014, False), (0.012, False)], 0.012),
        ([(0.010, True), (0.009, False)], 0.009),
        ([(0.010, False), (0.012, True)], 0.012),
        ([(0.010, True), (0.012, True)], 0.012),
    ],
)
def test_a_disturbed_measurement_never_replaces_a_faster_one(
    tmp_path: Path, values: list[tuple[float, bool]], counts: float
) -> None:
    table = LatencyTable.open(tmp_path, profile())
    for value, stable in values:
        table.add(measured(LAYERS[1].key, "row", LAYERS[1].precision, value, stable=stable))
    assert table.row_ms(LAYERS[1].key) == LatencyTable.read(tmp_path).row_ms(LAYERS[1].key) == counts


def test_missing_rows_are_listed_once_and_in_order(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[1]))
    keys = [x.key for x in LAYERS]
    assert table.missing([*keys, *keys]) == [k for k in dict.fromkeys(keys) if k != LAYERS[1].key]


def test_failed_and_disturbed_rows_are_measured_again_on_demand(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(measured(LAYERS[0].key, "row", "fp32", None, error="x"))
    table.add(row(LAYERS[1], stable=False))
    table.add(row(LAYERS[2]))
    keys = [x.key for x in LAYERS[:3]]
    assert table.missing(keys) == []
    assert table.missing(keys, again=True) == keys[:2]


def test_lookup_of_unmeasured_row_names_the_command(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate(exits=False)])
    with pytest.raises(
        MissingRowError, match=r"exit\|in=24x8x8.* has no row in .*\(5 rows\)\. Run: nas measure --table"
    ):
        table.row_ms(next(x for x in LAYERS if x.kind == "exit_head").key)


def test_lookup_of_a_failed_row_gives_its_reason(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(measured(LAYERS[0].key, "row", "fp32", None, error="Fail: no kernel"))
    with pytest.raises(MissingRowError, match=r"could not be measured for .*: Fail: no kernel\. Leave it out"):
        table.row_ms(LAYERS[0].key)


def test_overhead_is_taken_off_but_never_all_of_a_row(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    with pytest.raises(MissingRowError, match="overhead of a call has not been measured"):
        _ = table.overhead_ms
    table.add(measured("overhead", "overhead", "none", OVERHEAD_MS))
    table.add(row(LAYERS[0]))
    table.add(row(LAYERS[1], OVERHEAD_MS * 1.001))
    assert table.net_ms(LAYERS[0].key) == pytest.approx(row_time_ms(LAYERS[0]) - OVERHEAD_MS)
    assert table.net_ms(LAYERS[1].key) == pytest.approx(0.05 * OVERHEAD_MS * 1.001)


def test_a_disturbed_row_is_less_certain(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[0], 0.2))
    table.add(row(LAYERS[1], 0.2, stable=False))
    assert table.row_std_ms(LAYERS[0].key) == pytest.approx(0.015 * 0.2)
    assert table.row_std_ms(LAYERS[1].key) == pytest.approx(0.05 * 0.2)


def test_overhead_and_gate_are_the_least_of_calm_sessions(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(measured("overhead", "overhead", "none", 0.0048))
    assert not table.has_overhead
    assert table.gate_ms == 0.0
    for key, value, stable in (
        ("gate", 0.007, True),
        ("overhead", 0.003, True),
        ("overhead", 0.002, False),
        ("overhead", 0.0035, True),
        ("gate", 0.0055, True),
    ):
        table.add(measured(key, "overhead", "none", value, stable=stable))
    assert table.has_overhead
    assert LatencyTable.open(tmp_path, profile()).overhead_ms == table.overhead_ms == 0.003
    assert table.gate_ms == pytest.approx(0.0025)


def test_reference_is_that_of_good_calm_sessions(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    assert table.reference_ms is None
    for value, stable in ((0.38, True), (0.30, True), (0.301, True), (0.302, True), (0.35, True), (0.1, False)):
        table.add(measured("reference", "overhead", "fp32", value, stable=stable))
    assert table.reference_ms == pytest.approx(0.3008)


def test_rows_and_networks_of_a_slower_machine_are_known_once_it_is_faster(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    keys = [LAYERS[0].key, network_key(candidate(), "if"), LAYERS[1].key, LAYERS[2].key]
    table.add(measured("reference", "overhead", "fp32", 0.38))
    table.add(row(LAYERS[0]))
    table.add(network(candidate(), 1.0), candidate(), "if")
    assert table.outdated(keys) == []
    assert not table.is_slow_now
    table.add(measured("reference", "overhead", "fp32", 0.30))
    table.add(row(LAYERS[1]))
    assert table.outdated(keys) == keys[:2]
    assert not table.is_slow_now
    table.add(measured("reference", "overhead", "fp32", 0.36))
    assert table.is_slow_now
    table.add(row(LAYERS[0]))
    table.add(measured("reference", "overhead", "fp32", 0.31))
    table.add(row(LAYERS[2]))
    again = LatencyTable.open(tmp_path, profile())
    assert again.outdated(keys) == keys[:2]  # measured again, but the machine was slow again
    assert not again.is_slow_now


OTHER_STATE = {
    "board": "other board",
    "runtime": "trt",
    "runtime_version": "2.0",
    "power_mode": "governor=powersave",
    "clocks_locked": True,
    "locked_mhz": "gpu 816",
    "threads": 2,
    "driver": "none",
    "kind": "simulated",
}


@pytest.mark.parametrize("field", PROFILE_STATE_FIELDS)
def test_a_table_of_another_state_is_refused_with_both_values(tmp_path: Path, field: str) -> None:
    LatencyTable.open(tmp_path, profile())
    with pytest.raises(DeviceError) as e:
        LatencyTable.open(tmp_path, profile(**{field: OTHER_STATE[field]}))
    lines = [line.strip() for line in str(e.value).splitlines() if "the table has" in line]
    mine, other = getattr(profile(), field), OTHER_STATE[field]
    assert lines == [f"{field}: the table has {mine!r}, this device has {other!r}"]
    assert "nas measure --space NAME --table DIR" in str(e.value)


@pytest.mark.parametrize(
    ("stored", "now", "steps"),
    [
        ({"clocks_locked": True}, {"clocks_locked": False}, "sudo jetson_clocks."),
        ({"clocks_locked": False}, {"clocks_locked": True}, "boot it, which unlocks the clocks."),
        (
            {"power_mode": "MAXN", "clocks_locked": True},
            {"power_mode": "15W", "clocks_locked": True},
            "sudo nvpmodel -m ID (the id of MAXN in /etc/nvpmodel.conf); then sudo jetson_clocks.",
        ),
    ],
)
def test_the_commands_that_bring_a_jetson_back_into_the_state_of_its_table(
    tmp_path: Path, stored: dict, now: dict, steps: str
) -> None:
    jetson = {"details": {"soc": "tegra194"}}
    LatencyTable.open(tmp_path, profile(**stored, **jetson))
    with pytest.raises(DeviceError) as e:
        LatencyTable.open(tmp_path, profile(**now, **jetson))
    assert f"To bring the board back into the state of the table, on it: {steps}" in str(e.value)
    with pytest.raises(DeviceError) as e:
        LatencyTable.open(tmp_path, profile(**now))
    assert "on it:" not in str(e.value), "no Jetson"


def test_what_does_not_change_the_state_is_not_compared(tmp_path: Path) -> None:
    LatencyTable.open(tmp_path, profile(details={"load_1min": "0.1"}))
    LatencyTable.open(tmp_path, profile(details={"load_1min": "5.0"}, name="renamed"))


def test_the_refusal_names_the_way_to_borrow(tmp_path: Path) -> None:
    LatencyTable.open(tmp_path / "theirs", profile())
    with pytest.raises(DeviceError, match=r"--set run.tables=DIR --allow-foreign-table \S+theirs$"):
        LatencyTable.open(tmp_path / "theirs", profile(board="another"))


def other_state(folder: Path, reference_ms: float | None) -> LatencyTable:
    """A table of another board with overhead, reference network and all rows of `candidate()`."""
    table = filled(folder, [candidate()], board="another board")
    if reference_ms is not None:
        table.add(measured("reference", "overhead", "fp32", reference_ms))
    return table


def test_borrowed_rows_are_scaled_by_the_reference_network_and_uncertain(tmp_path: Path) -> None:
    theirs = other_state(tmp_path / "theirs", reference_ms=0.2)
    mine = LatencyTable.open(tmp_path / "mine", profile())
    for key, kind, ms in (("overhead", "overhead", 0.01), ("gate", "overhead", 0.02), ("reference", "overhead", 0.5)):
        mine.add(measured(key, kind, "none" if key != "reference" else "fp32", ms))
    own = mine.add(row(LAYERS[1], 0.7))
    mine.borrow(tmp_path / "theirs")
    key = LAYERS[0].key
    assert mine.net_ms(key) == pytest.approx(2.5 * theirs.net_ms(key))
    assert mine.row_ms(key) == pytest.approx(2.5 * theirs.net_ms(key) + 0.01)
    assert mine.row_std_ms(key) == pytest.approx(FOREIGN_ROW_STD * mine.row_ms(key))
    assert mine.row_ms(LAYERS[1].key) == 0.7 and mine.rows[LAYERS[1].key] == own
    assert mine.row_std_ms(LAYERS[1].key) < 0.1 * 0.7
    keys = [x.key for x in LAYERS]
    assert mine.borrowed == {*keys} - {LAYERS[1].key} and set(mine.rows) == set(keys)
    assert mine.missing([*keys, "unknown"]) == mine.missing([*keys, "unknown"], again=True) == ["unknown"]
    assert LatencyTable.open(tmp_path / "mine", profile()).missing(keys) == [k for k in keys if k in mine.borrowed]


def test_rows_are_borrowed_as_they_are_where_no_reference_was_measured(tmp_path: Path) -> None:
    theirs = other_state(tmp_path / "theirs", reference_ms=None)
    mine = filled(tmp_path / "mine", [])
    mine.borrow(tmp_path / "theirs")
    assert mine.net_ms(LAYERS[0].key) == theirs.net_ms(LAYERS[0].key)


def test_a_row_that_failed_elsewhere_is_not_borrowed(tmp_path: Path) -> None:
    theirs = filled(tmp_path / "theirs", [], board="another board")
    theirs.add(measured(LAYERS[0].key, "row", "fp32", None, error="out of memory"))
    mine = filled(tmp_path / "mine", [])
    mine.borrow(tmp_path / "theirs")
    assert mine.missing([LAYERS[0].key]) == [LAYERS[0].key]


def test_interpolated_rows_answer_until_they_are_measured_and_are_never_stored(tmp_path: Path) -> None:
    widths = (16, 24, 32, 40)
    layers = [next(x for x in expand(candidate(width=w)) if x.name == "stages.0.1") for w in widths]
    table = filled(tmp_path, [candidate(width=16), candidate(width=40)])
    wanted = layers[1]
    assert not table.has_row(wanted.key)
    table.interpolate(layers)
    assert wanted.key in table.interpolated and table.has_row(wanted.key)
    assert table.missing([wanted.key]) == []
    assert table.missing([wanted.key], interpolated=True) == [wanted.key]
    low, high = table.net_ms(layers[0].key), table.net_ms(layers[3].key)
    assert min(low, high) < table.net_ms(wanted.key) < max(low, high)
    assert table.row_ms(wanted.key) == pytest.approx(table.net_ms(wanted.key) + OVERHEAD_MS)
    assert table.row_std_ms(wanted.key) > table.row_std_ms(layers[0].key)
    assert wanted.key not in table.rows and not LatencyTable.read(tmp_path).has_row(wanted.key)
    table.add(row(wanted, 0.5))
    assert table.row_ms(wanted.key) == 0.5
    assert wanted.key not in table.interpolated


def test_a_table_of_the_same_state_is_not_foreign(tmp_path: Path) -> None:
    filled(tmp_path / "tables" / "theirs", [candidate()])
    mine = LatencyTable.open(tmp_path / "mine", profile())
    with pytest.raises(DeviceError, match=r"this very device state, so it is not foreign.*run\.tables=\S+tables$"):
        mine.borrow(tmp_path / "tables" / "theirs")
    with pytest.raises(StorageError, match="no latency table here"):
        mine.borrow(tmp_path / "nothing")
    assert mine.foreign is None


def test_a_table_opened_to_read_takes_nothing(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    table = LatencyTable.read(tmp_path)
    assert table.profile == profile()
    with pytest.raises(StorageError, match="open to read only"):
        table.add(row(LAYERS[0]))


def test_reading_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"here \(device.json is missing\)\. Run: nas measure --space"):
        LatencyTable.read(tmp_path)
    filled(tmp_path, [candidate()])
    assert len(LatencyTable.read(tmp_path).rows) == 6


def test_rows_without_a_device_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(RecordError, match=r"rows.jsonl is there but device.json is missing"):
        LatencyTable.open(tmp_path, profile())


def test_a_table_of_a_later_program_is_refused(tmp_path: Path) -> None:
    LatencyTable.open(tmp_path, profile())
    path = tmp_path / "device.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(RecordError, match="table version 2, this program reads 1"):
        LatencyTable.open(tmp_path, profile())


def test_only_rows_overheads_and_networks_with_their_candidate_are_taken(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    with pytest.raises(RecordError, match="its candidate must be stored with it"):
        table.add(network(candidate(), 1.0))
    with pytest.raises(RecordError, match="not that of its candidate"):
        table.add(network(candidate(), 1.0), candidate("int8"), "if")
    with pytest.raises(RecordError, match="not a segment"):
        table.add(measured("x#1", "segment", "fp32", 1.0))
    with pytest.raises(RecordError, match="overhead 'other' is unknown; known: overhead, gate, reference"):
        table.add(measured("other", "overhead", "none", 1.0))
    with pytest.raises(RecordError, match="precision 'int8' is not that of the key, 'fp32'"):
        table.add(measured(LAYERS[0].key, "row", "int8", 0.1))
    assert not (tmp_path / "rows.jsonl").exists()


HOLD = """
import sys
from pathlib import Path
from latency_examples import profile
from nas.latency.table import FOREIGN_ROW_STD, LatencyTable
table = LatencyTable.open(Path(sys.argv[1]), profile())
with table.writing():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_told_who_holds_the_table(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path / "t", profile())
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "t")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    try:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            StorageError, match=rf"is being written by process {other.pid} on this machine since .*wait"
        ):
            table.add(row(LAYERS[0]))
        told: list[str] = []
        with pytest.raises(StorageError), table.writing(wait_s=0.2, on_wait=told.append):
            pass
        assert len(told) == 1 and f"held by process {other.pid}" in told[0]
    finally:
        other.kill()  # also the worst way to leave: no lock may stay behind
        other.communicate()
    table.add(row(LAYERS[0]))
    assert not (tmp_path / "t/.lock-holder.json").exists()


def test_two_tables_of_one_folder_see_each_others_rows(tmp_path: Path) -> None:
    first, second = LatencyTable.open(tmp_path, profile()), LatencyTable.open(tmp_path, profile())
    first.add(row(LAYERS[0], 0.1))
    second.add(row(LAYERS[1], 0.2))
    assert second.row_ms(LAYERS[0].key) == 0.1
    assert [second.rows[x.key].sequence for x in LAYERS[:2]] == [1, 2]
    first.refresh()
    assert first.row_ms(LAYERS[1].key) == 0.2


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[0]))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(StorageError, match="became shorter while it was in use"):
        table.refresh()


def test_the_correction_is_kept_and_belongs_to_its_state(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    assert table.correction() is None
    table.save_correction(Correction(table.profile.fingerprint, ()))
    assert LatencyTable.open(tmp_path, profile()).correction() == Correction(profile().fingerprint, ())
    with pytest.raises(DeviceError, match="does not belong to"):
        table.save_correction(Correction("0" * 16, ()))
    (tmp_path / "correction.json").write_text('{"fingerprint": "x", "fits": [], "version": 1}')
    assert table.correction() is None  # of an earlier program: fitted anew
    of_another_state = f'{{"fingerprint": "other", "fits": [], "version": {CORRECTION_VERSION}}}'
    (tmp_path / "correction.json").write_text(of_another_state)
    with pytest.raises(DeviceError, match="made for device state other"):
        table.correction()


def streamed(folder: Path, costs_ms: dict[int, float]) -> LatencyTable:
    """A table in which so many megabytes of weights take so much longer than weights in the cache."""
    table = filled(folder, [])
    for megabytes, cost_ms in costs_ms.items():
        work_ms = 0.05 * megabytes
        table.add(measured(streaming_key(megabytes, cached=True), "overhead", "fp32", work_ms))
        table.add(measured(streaming_key(megabytes, cached=False), "overhead", "fp32", work_ms + cost_ms))
    return table


def test_cost_of_streamed_weights_is_interpolated_and_goes_on_beyond_what_was_measured(tmp_path: Path) -> None:
    table = streamed(tmp_path, {2: 0.01, 4: 0.01, 8: 0.05, 16: 0.45})
    assert table.streaming[0] == (0.0, 0.0)
    assert table.streaming_ms([0, 1, 2, 6, 16, 18]) == pytest.approx([0, 0.005, 0.01, 0.03, 0.45, 0.55])
    assert LatencyTable.read(tmp_path).streaming == table.streaming
    assert filled(tmp_path / "other", []).streaming_ms(7.0) == 0.0


def test_cost_of_streamed_weights_never_falls_and_needs_both_measurements(tmp_path: Path) -> None:
    table = streamed(tmp_path, {2: 0.02, 4: 0.01, 8: -0.01})
    table.add(measured(streaming_key(16, cached=False), "overhead", "fp32", 3.0))
    assert [mb for mb, _ in table.streaming] == [0.0, 2.0, 4.0, 8.0]
    assert [ms for _, ms in table.streaming] == pytest.approx([0, 0.02, 0.02, 0.02])


def test_networks_of_another_protocol_are_left_out_and_told_and_their_rows_stay(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(row(LAYERS[0]))
    table.add(network(candidate(), 1.0), candidate(), "if")
    assert len(LatencyTable.read(tmp_path).networks) == 1 and not LatencyTable.read(tmp_path).warnings
    file = tmp_path / "networks.jsonl"
    line = json.loads(file.read_text())["row"]
    del line["measurement"]["protocol"]  # as it was written until 2026-11-28
    text = canonical_json(line)
    check = hashlib.sha256(f"{profile().fingerprint} {text}".encode()).hexdigest()[:16]
    file.write_text(f'{{"check":"{check}","row":{text}}}\n')
    again = LatencyTable.open(tmp_path, profile())
    assert not again.networks and list(again.rows) == [LAYERS[0].key]
    assert "1 networks were measured by another protocol than today's" in again.warnings[0]
    again.add(network(candidate(), 1.1), candidate(), "if")
    assert [n.measurement.latency_ms for n in LatencyTable.read(tmp_path).networks.values()] == [1.1]
