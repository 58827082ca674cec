"""A table under kills, full disks and strangers: what was stored stays, what is half written is never read.

Kills come from the process itself at each of its file operations in turn, so that no moment is left to chance.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_examples import candidate, filled, measured, network, profile, row

from nas.core.errors import NasError, RecordError, StorageError
from nas.core.jsonio import canonical_json, write_record
from nas.core.records import Measurement
from nas.core.walk import expand
from nas.latency.correction import Correction
from nas.latency.lines import line_of, network_key
from nas.latency.newtable import write_table
from nas.latency.table import LatencyTable, LockHolder
from nas.latency.verify import verify_table

LAYERS = expand(candidate())
EMPTY = Correction(profile().fingerprint, ())


# Killed at each file operation

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from latency_examples import candidate, network, profile, row
from nas.core.walk import expand
from nas.latency.correction import Correction
from nas.latency.lines import network_key
from nas.latency.newtable import write_table
from nas.latency.table import LatencyTable
from nas.latency.verify import verify_table

TOP, JOB = Path(sys.argv[1]), sys.argv[2]
LAYERS = expand(candidate())[:1]
EVENTS = ("open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.mkdir", "os.rmdir")


def measuring(folder):
    table = LatencyTable.open(folder, profile())
    for layer in LAYERS:
        if layer.key not in table.rows:
            table.add(row(layer))
    if not table.networks:
        table.add(network(candidate(), 1.0), candidate(), "if")
    table.save_correction(Correction(profile().fingerprint, ()))


def joining(folder):
    if not (folder / "new").exists():
        rows = [row(layer) for layer in LAYERS]
        write_table(folder / "new", profile(), rows, readme="x", copies={"sources/1": TOP / "source"})


def is_sound(folder):
    \"\"\"Whether nothing half written can be read; the lock is free, as the work can be done now.\"\"\"
    if JOB == "joining":
        return not (folder / "new").exists() or complete(folder)
    if not (folder / "device.json").exists():
        return not list(folder.glob("*.jsonl"))
    table = LatencyTable.read(folder)
    as_measured = all(m.latency_ms == row(LAYERS[0]).latency_ms for m in table.rows.values())
    is_one = table.correction() in (None, Correction(profile().fingerprint, ()))
    return as_measured and is_one and verify_table(folder) == ()


def complete(folder):
    table = LatencyTable.read(folder / "new" if JOB == "joining" else folder)
    whole = list(table.rows) == [x.key for x in LAYERS] and verify_table(table.folder) == ()
    if JOB == "joining":
        inner = LatencyTable.read(folder / "new" / "sources" / "1")
        return whole and list(inner.rows) == list(table.rows)
    once = len((folder / "rows.jsonl").read_text().splitlines()) == 1
    is_there = list(table.networks) == [network_key(candidate(), "if")] and table.correction() is not None
    return whole and once and is_there


def die_at(number, folder):
    left = [number]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, given):
        if event in EVENTS and str(folder) in str(given[0]):
            count()

    def fsync(handle, sync=os.fsync):
        count()
        sync(handle)
        count()

    os.fsync = fsync
    sys.addaudithook(hook)


measuring(TOP / "source")
work = {"measuring": measuring, "joining": joining}[JOB]
unsound, unfinished, number = [], [], 0
while True:
    number += 1
    folder = TOP / str(number)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        die_at(number, folder)
        work(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not is_sound(folder):
        unsound.append(number)
    work(folder)
    if not complete(folder):
        unfinished.append(number)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    shutil.rmtree(folder)
print(json.dumps({"kills": number - 1, "unsound": unsound, "unfinished": unfinished}))
"""


@pytest.mark.parametrize(("job", "least"), [("measuring", 40), ("joining", 30)])
def test_a_kill_at_any_file_operation_leaves_old_or_new_and_the_same_call_goes_on(
    tmp_path: Path, job: str, least: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), job]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["kills"] >= least
    assert (told["unsound"], told["unfinished"]) == ([], [])


# A full disk


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a disk without space."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_on_a_full_disk_the_old_correction_stays_and_the_table_is_free_again(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    table.save_correction(EMPTY)
    larger = replace(EMPTY, skipped=("a network that could not be used: " + "x" * 5000,))
    with (
        pytest.raises(StorageError, match=r"correction.json: cannot be written: .*MiB free there") as e,
        files_end_at(4096),
    ):
        table.save_correction(larger)
    assert e.value.exit_code == 6
    assert LatencyTable.open(tmp_path, profile()).correction() == EMPTY
    assert [p.name for p in tmp_path.glob(".*") if p.name != ".lock"] == []
    LatencyTable.open(tmp_path, profile()).save_correction(larger)
    assert table.correction() == larger


def test_where_nothing_at_all_can_be_written_no_row_is_believed_and_no_lock_kept(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    with pytest.raises(StorageError, match=r"cannot be written: .*MiB free there"), files_end_at(0):
        table.add(row(LAYERS[0]))
    assert not table.has_row(LAYERS[0].key)
    assert LatencyTable.open(tmp_path, profile()).add(row(LAYERS[0])).sequence == 1
    assert table.add(row(LAYERS[1])).sequence == 2


def test_a_network_that_did_not_fit_is_cut_off_again(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(network(candidate(), 1.0), candidate(), "if")
    end = (tmp_path / "networks.jsonl").stat().st_size
    wider = candidate(width=32)
    with pytest.raises(StorageError, match=r"networks.jsonl: cannot be written"), files_end_at(end + 300):
        table.add(network(wider, 1.1), wider, "if")
    assert not LatencyTable.read(tmp_path).networks.keys() - {network_key(candidate(), "if")}
    table.add(network(wider, 1.2), wider, "if")
    found = LatencyTable.read(tmp_path)
    assert [n.measurement.latency_ms for n in found.networks.values()] == [1.0, 1.2]
    assert found.edited == ()
    assert (tmp_path / "networks.jsonl.torn").stat().st_size == 301


def test_a_table_that_cannot_be_begun_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written"), files_end_at(10):
        LatencyTable.open(tmp_path / "new", profile())
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".lock"]
    source = filled(tmp_path / "source", [candidate()])
    with pytest.raises(StorageError, match=r"rows.jsonl: cannot be written"), files_end_at(2000):
        write_table(tmp_path / "joined", profile(), source.rows.values(), readme="")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]
    assert LatencyTable.open(tmp_path / "new", profile()).rows == {}


# Others at the same table


def test_the_note_of_a_process_that_was_killed_stops_nobody(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    note = tmp_path / ".lock-holder.json"
    write_record(note, LockHolder(1, "far-away", "another boot", "2020-01-01T00:00:00+00:00"))
    told: list[str] = []
    with table.writing(wait_s=60, on_wait=told.append):
        assert "far-away" not in note.read_text()
    assert told == []
    assert not note.exists()


@pytest.mark.parametrize(
    ("note", "who"),
    [
        ('{"pid": 7, "host": "far-away", "boot_id": "b", "since": "noon"}', "process 7 on far-away since noon"),
        ('{"pid": 7', "another process"),
        (None, "another process"),
    ],
)
def test_a_holder_on_another_machine_is_named_by_its_host(tmp_path: Path, note: str | None, who: str) -> None:
    first, second = LatencyTable.open(tmp_path, profile()), LatencyTable.open(tmp_path, profile())
    with first.writing():
        path = tmp_path / ".lock-holder.json"
        path.unlink()
        if note is not None:
            path.write_text(note)
        with pytest.raises(StorageError, match=rf"is being written by {who}\. Two measurements"):
            second.add(row(LAYERS[0]))
    assert second.add(row(LAYERS[0])).sequence == 1


def test_reading_a_table_changes_nothing_in_its_folder(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    with (tmp_path / "rows.jsonl").open("ab") as f:
        f.write(b'{"check":"torn')
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    table = LatencyTable.read(tmp_path)
    table.refresh()
    assert len(table.rows) == 6 and len(verify_table(tmp_path)) == 1
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before


# Lines that no program wrote


def test_zeros_that_a_power_failure_leaves_at_the_end_are_moved_away(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    with (tmp_path / "rows.jsonl").open("ab") as f:
        f.write(b"\0" * 512)
    assert LatencyTable.read(tmp_path).rows == table.rows
    LatencyTable.open(tmp_path, profile()).add(row(LAYERS[0], 0.2))
    assert LatencyTable.read(tmp_path).row_ms(LAYERS[0].key) == 0.2
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == b"\0" * 512 + b"\n"
    assert b"\0" not in (tmp_path / "rows.jsonl").read_bytes()


def replaced_line(folder: Path, name: str, number: int, change: Callable[[str], str]) -> None:
    lines = (folder / name).read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    (folder / name).write_text("\n".join(lines) + "\n")


def test_a_field_that_stands_twice_in_a_line_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    replaced_line(tmp_path, "rows.jsonl", 4, lambda line: line.replace('"latency_ms"', '"latency_ms":0.5,"latency_ms"'))
    with pytest.raises(RecordError, match=r"rows.jsonl:4: key 'latency_ms' appears twice"):
        LatencyTable.read(tmp_path)
    (problem,) = verify_table(tmp_path)
    assert problem.place.endswith("rows.jsonl:4") and "appears twice" in problem.what


def test_a_line_pasted_twice_changes_nothing_and_is_told(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    replaced_line(tmp_path, "rows.jsonl", 5, lambda line: f"{line}\n\n{line}")
    found = LatencyTable.read(tmp_path)
    assert found.rows == table.rows and found.edited == ()
    (problem,) = verify_table(tmp_path)
    assert problem.place.endswith("rows.jsonl:7")
    assert "has sequence number 5, which" in problem.what


def test_line_ends_of_another_system_are_read_and_told(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    found = LatencyTable.read(tmp_path)
    assert found.rows == table.rows
    assert len(found.edited) == 8 and "8 entries of the table are not as measured" in found.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["measurement"].update(latency_ms=-1.0), "latency_ms must be positive"),
        (lambda d: d["measurement"].update(latency_ms=float("nan")), "NaN is not a finite number"),
        (lambda d: d["measurement"].update(latency_ms="1,0"), "latency_ms: expected float, got str '1,0'"),
        (lambda d: d["measurement"].update(latency_ms=1000.0, rounds_ms=[], accepted=[]), "are these microseconds"),
        (lambda d: d["measurement"].update(latency_ms=2.0), "lies outside its own samples"),
        (lambda d: d["measurement"].update(kind="row"), "a row does not belong into networks.jsonl"),
        (lambda d: d["measurement"].update(precision="int8"), "is not that of the candidate, 'fp32'"),
        (lambda d: d.update(form="if-then"), "'if-then' is not allowed; allowed: 'logits', 'if', 'plain'"),
        (lambda d: d["candidate"].update(teacher="x"), "unknown field 'teacher' of Candidate"),
        (lambda d: d.pop("form"), "expected the fields candidate, form and measurement"),
    ],
)
def test_nonsense_in_networks_names_file_and_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    table = LatencyTable.open(tmp_path, profile())
    table.add(network(candidate("int8"), 0.9), candidate("int8"), "if")
    table.add(network(candidate(), 1.0), candidate(), "if")

    def edit(line: str) -> str:
        data = json.loads(line)
        change(data["row"])
        return json.dumps(data)

    replaced_line(tmp_path, "networks.jsonl", 2, edit)
    with pytest.raises(RecordError, match=message) as e:
        LatencyTable.open(tmp_path, profile())
    assert f"{tmp_path / 'networks.jsonl'}:2" in str(e.value)


# Properties of the reader

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
# Half of the values have a type that a field may have: what is wrong then is what they say.
TIMES = st.floats(1e-7, 1e7)
WORDS = st.sampled_from(["row", "overhead", "network", "fp32", "int8", "none", "reference", "wall", LAYERS[2].key])
VALUES = TIMES | WORDS | st.lists(st.lists(TIMES, max_size=3), min_size=3, max_size=3) | ANYTHING
FIELDS = tuple(line_of(row(LAYERS[0]), "")["row"])


@settings(max_examples=250, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2)
    | st.fixed_dictionaries({"latency_ms": TIMES}, optional={"key": WORDS, "kind": WORDS, "precision": WORDS})
)
def test_any_value_in_any_field_is_an_error_with_its_line_or_a_possible_row(changes: dict[str, Any]) -> None:
    plain = {**line_of(replace(row(LAYERS[0]), sequence=2), "")["row"], **changes}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    good = canonical_json(line_of(row(LAYERS[1]), profile().fingerprint))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LatencyTable.open(folder, profile())
        (folder / "rows.jsonl").write_text(f'{good}\n{{"check":"0000000000000000","row":{text}}}\n', encoding="utf-8")
        try:
            found = LatencyTable.read(folder)
        except NasError as e:
            assert f"{folder / 'rows.jsonl'}:2" in str(e)
            assert any(p.place.endswith("rows.jsonl:2") for p in verify_table(folder))
            return
        assert found.row_ms(LAYERS[1].key) == row(LAYERS[1]).latency_ms
        for m in (*found.rows.values(), *(m for group in found.fixed.values() for m in group)):
            assert (m.latency_ms is None) == (m.error is not None)
            assert m.latency_ms is None or 1e-4 <= m.latency_ms < 1e4
            samples = [s for r in m.rounds_ms for s in r]
            assert m.latency_ms is None or not samples or 0.99 * min(samples) <= m.latency_ms <= 1.01 * max(samples)


ROUNDS = st.lists(st.lists(st.floats(0.01, 0.02), min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def possible_rows(draw: st.DrawFn) -> Measurement:
    layer = draw(st.sampled_from(LAYERS))
    if draw(st.booleans()):
        text = draw(st.text(min_size=1, max_size=40))
        return replace(measured(layer.key, "row", layer.precision, None, error=text), source=draw(st.text(max_size=20)))
    rounds = tuple(map(tuple, draw(ROUNDS)))
    value = min(min(r) for r in rounds)
    return Measurement(
        key=layer.key,
        kind="row",
        precision=layer.precision,
        latency_ms=value,
        rounds_ms=rounds,
        accepted=tuple(draw(st.booleans()) for _ in rounds),
        clock="thread_cpu",
        measured_at=draw(st.text(max_size=25)),
        sequence=1,
        temperature_c=draw(st.none() | st.floats(-40, 120)),
        clock_mhz=draw(st.none() | st.floats(1, 1e4)),
        session_ms=(value,),
    )


@settings(max_examples=40, deadline=None)
@given(added=st.lists(possible_rows(), min_size=1, max_size=6), data=st.data())
def test_what_was_added_is_read_back_whatever_the_texts_and_dates_and_the_order_of_lines(
    added: list[Measurement], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = LatencyTable.open(folder, profile())
        with table.writing():
            stored = [table.add(m) for m in added]
        assert [m.sequence for m in stored] == list(range(1, len(added) + 1))
        found = LatencyTable.read(folder)
        assert found.rows == table.rows and found.edited == () and verify_of_lines(folder) == []
        if all(m.is_stable for m in added if m.latency_ms is not None):
            lines = (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            shuffled = data.draw(st.permutations(lines))
            (folder / "rows.jsonl").write_text("\n".join(shuffled) + "\n", encoding="utf-8")
            again = LatencyTable.read(folder).rows
            assert {k: m.latency_ms for k, m in again.items()} == {k: m.latency_ms for k, m in table.rows.items()}


def verify_of_lines(folder: Path) -> list[str]:
    """What is wrong with single lines; rows that contradict each other are made up here on purpose."""
    return [p.what for p in verify_table(folder) if "further apart" not in p.what]


# Found by looking for what no test covered


@pytest.mark.parametrize("field", ["latency_ms", "temperature_c", "rounds_ms"])
@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_hundreds_of_digits_is_an_error_with_its_line(tmp_path: Path, field: str, digits: int) -> None:
    filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])["row"]
    row[field] = [["BIG", 1], [1], [1]] if field == "rounds_ms" else "BIG"
    lines[2] = json.dumps({"check": "0" * 16, "row": row}).replace('"BIG"', "1" * digits)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match=r"rows.jsonl:3"):
        LatencyTable.read(tmp_path)
    assert [p.place for p in verify_table(tmp_path)] == [f"{path}:3"]


def test_a_table_of_a_newer_program_says_so_before_its_unknown_fields(tmp_path: Path) -> None:
    LatencyTable.open(tmp_path, profile())
    path = tmp_path / "device.json"
    data = json.loads(path.read_text())
    data["version"], data["profile"]["fan"] = 2, "on"
    path.write_text(json.dumps(data))
    with pytest.raises(RecordError, match="table version 2, this program reads 1"):
        LatencyTable.read(tmp_path)


def test_a_state_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    path = tmp_path / "device.json"
    path.write_text(path.read_text().replace("governor=host", "15W"))
    assert verify_table(tmp_path)
    assert LatencyTable.read(tmp_path).warnings


def test_rows_of_another_table_put_under_this_state_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path / "a", [candidate()])
    filled(tmp_path / "b", [candidate()], power_mode="15W")
    (tmp_path / "a/rows.jsonl").write_bytes((tmp_path / "b/rows.jsonl").read_bytes())
    assert verify_table(tmp_path / "a")


@pytest.mark.parametrize("sessions", [[-5.0, 1.0], [1e308, 1.0]])
def test_impossible_sessions_are_refused(tmp_path: Path, sessions: list[float]) -> None:
    filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])["row"]
    row["session_ms"] = sessions
    lines[2] = json.dumps(line_of(row, profile().fingerprint))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match=r"rows.jsonl:3.*session"):
        LatencyTable.read(tmp_path)


def test_a_torn_line_is_told(tmp_path: Path) -> None:
    filled(tmp_path, [candidate()])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert any("torn" in line for line in LatencyTable.read(tmp_path).warnings)
