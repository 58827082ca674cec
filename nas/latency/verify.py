"""Every line of a table looked at, not only up to the first that is wrong: each problem with its place and its fix.

`LatencyTable` refuses a damaged table at the first line, because no number may come out of it; this is for the person
who has to repair it, and also looks for what a reader cannot refuse: repeated rows that contradict each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.core.errors import NasError, RecordError, StorageError
from nas.core.jsonio import from_plain, parse_json, read_record, read_text
from nas.core.records import Measurement
from nas.latency.correction import CORRECTION_VERSION, Correction
from nas.latency.entries import SourceEntry
from nas.latency.lines import REFERENCE_KEY, content_of, network_of, row_of
from nas.latency.table import SLOW_STATE, TABLE_VERSION, DeviceFile, deviation_ms

CONTRADICTION = 4.0  # standard deviations between two measurements of one row
ENTRIES_FILE = "entries.jsonl"
IMPORT_FILE = "import.json"
SOURCES_FOLDER = "sources"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: where (`file:line`), what, and what to do."""

    place: str
    what: str
    fix: str


def verify_table(folder: Path) -> tuple[Problem, ...]:
    """Everything that is wrong with the table in a folder, and with the tables inside it; empty when nothing is.

    Raises:
        StorageError: there is no table, or a file cannot be read.
    """
    path = folder / "device.json"
    if not path.exists():
        raise StorageError(f"{folder}: no latency table here (device.json is missing). Run: nas measure --space NAME")
    problems = [*_device_problems(path)]
    looked = _Lines(None if problems else read_record(DeviceFile, path).profile.fingerprint)
    for name in ("rows.jsonl", "networks.jsonl"):
        problems += looked.read(folder / name, is_network=name == "networks.jsonl")
    problems += looked.contradictions()
    problems += [*_correction_problems(folder / "correction.json"), *_entry_problems(folder)]
    if (folder / SOURCES_FOLDER).is_dir():
        for inner in sorted(p for p in (folder / SOURCES_FOLDER).iterdir() if p.is_dir()):
            problems += verify_table(inner)
    return tuple(problems)


def _device_problems(path: Path) -> Iterator[Problem]:
    try:
        data = parse_json(read_text(path), str(path))
    except RecordError as e:
        yield Problem(
            str(path), _without(str(e), path), "restore the file: without it nobody knows what the rows hold for"
        )
        return
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > TABLE_VERSION:
        yield Problem(
            str(path),
            f"table version {version}, this program reads {TABLE_VERSION}",
            "it was written by a newer program: update this one",
        )
        return
    try:
        stored = from_plain(DeviceFile, data, str(path))
    except RecordError as e:
        yield Problem(str(path), _without(str(e), path), "restore the file, or correct the field that is named")
        return
    if stored.version != TABLE_VERSION:
        yield Problem(str(path), f"table version {stored.version}, this program reads {TABLE_VERSION}", "measure anew")


class _Lines:
    """Lines of rows.jsonl and networks.jsonl as they are read, for what shows in several of them only."""

    def __init__(self, state: str | None) -> None:
        """`state`: fingerprint of the table's device state; None where that cannot be read, and no checksum either."""
        self._state = state
        self._sequences: dict[int, str] = {}
        self._rows: dict[str, list[tuple[str, Measurement]]] = {}

    def read(self, path: Path, *, is_network: bool) -> Iterator[Problem]:
        """Problems of single lines, and of lines that repeat others."""
        for number, line, is_whole in _numbered_lines(path):
            place = f"{path}:{number}"
            if not is_whole:
                yield Problem(
                    place,
                    f"the last line is torn after {len(line)} bytes: writing it was interrupted",
                    "nothing is lost but that row: the next nas measure moves it to a .torn file, or delete it",
                )
                continue
            yield from self._line(line, place, is_network)

    def _line(self, line: bytes, place: str, is_network: bool) -> Iterator[Problem]:
        try:
            data, as_measured = content_of(line.decode(), place, self._state or "")
            measurement = network_of(data, place).measurement if is_network else row_of(data, place)
        except UnicodeDecodeError as e:
            yield Problem(place, f"byte {e.start} is not UTF-8", "delete the line; the row is measured again")
            return
        except RecordError as e:
            newer = "unknown field" in str(e)
            fix = "update this program if a newer one wrote the line, else " if newer else ""
            yield Problem(place, _without(str(e), place), f"{fix}delete the line; the row is measured again")
            return
        if not as_measured and self._state is not None:
            yield Problem(
                place,
                f"{measurement.key} was changed after it was measured, or is of another device state (checksum)",
                "delete the line to have it measured again, or restore it",
            )
        before = self._sequences.setdefault(measurement.sequence, place)
        if before != place:
            yield Problem(
                place,
                f"{measurement.key} has sequence number {measurement.sequence}, which {before} has too",
                "delete one of the two lines: two tables were joined by hand; join tables by: nas table merge",
            )
        self._rows.setdefault(measurement.key, []).append((place, measurement))

    def contradictions(self) -> Iterator[Problem]:
        """Rows that were measured several times on the calm machine, with values further apart than their spreads."""
        found_looks = self._rows.get(REFERENCE_KEY, [])
        looks = sorted((m.sequence, m.latency_ms) for _, m in found_looks if m.latency_ms is not None)
        best = float(np.quantile([value for _, value in looks], 0.2)) if looks else None
        for key, found in self._rows.items():
            calm = [
                (place, m.latency_ms, deviation_ms(m))
                for place, m in found
                if m.kind != "overhead" and m.latency_ms and m.is_stable and not _was_slow(m, looks, best)
            ]
            if len(calm) < 2:
                continue
            low, high = min(calm, key=lambda c: c[1]), max(calm, key=lambda c: c[1])
            if high[1] - low[1] > CONTRADICTION * math.hypot(low[2], high[2]):
                later = max(low, high, key=lambda c: int(c[0].rpartition(":")[2]))
                yield Problem(
                    later[0],
                    f"{key}: {high[1]:.4g} ms and {low[1]:.4g} ms were measured ({high[0]}, {low[0]}), further apart"
                    " than their spreads explain",
                    "delete the lines that are wrong, or all of the key, and measure it again",
                )


def _was_slow(m: Measurement, looks: list[tuple[int, float]], best: float | None) -> bool:
    before = [value for sequence, value in looks if sequence <= m.sequence]
    return bool(before) and best is not None and before[-1] > SLOW_STATE * best


def _correction_problems(path: Path) -> Iterator[Problem]:
    if not path.exists():
        return
    fix = "delete the file; it is computed anew from networks.jsonl"
    try:
        data = parse_json(read_text(path), str(path))
        if isinstance(data, dict) and data.get("version") != CORRECTION_VERSION:
            return  # of another program version: it is fitted anew, and not used
        stored = from_plain(Correction, data, str(path))
        profile = read_record(DeviceFile, path.with_name("device.json")).profile
        if stored.fingerprint != profile.fingerprint:
            yield Problem(str(path), "it belongs to another device state", fix)
    except (RecordError, StorageError) as e:
        yield Problem(str(path), _without(str(e), path), fix)


def _entry_problems(folder: Path) -> Iterator[Problem]:
    """Of what an import kept beside its rows."""
    path, record = folder / ENTRIES_FILE, folder / IMPORT_FILE
    if not path.exists() and not record.exists():
        return
    fix = "import the source again into another folder"
    if not path.exists() or not record.exists():
        yield Problem(str(folder), f"only one of {ENTRIES_FILE} and {IMPORT_FILE} is there", fix)
        return
    count = 0
    for number, line, is_whole in _numbered_lines(path):
        count += 1
        place = f"{path}:{number}"
        try:
            if not is_whole:
                raise RecordError("the last line is torn")
            from_plain(SourceEntry, parse_json(line.decode(), place), place)
        except (RecordError, UnicodeDecodeError) as e:
            yield Problem(place, _without(str(e), place), fix)
    try:
        said: Any = parse_json(read_text(record), str(record))
        if not isinstance(said, dict) or said.get("entries") != count:
            yield Problem(str(record), f"it does not speak of {count} entries as {ENTRIES_FILE} has", fix)
    except NasError as e:
        yield Problem(str(record), _without(str(e), record), fix)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number (from 1) and bytes of each line that is not blank, and whether it ends as a line does."""
    if not path.exists():
        return
    try:
        data = path.read_bytes()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror or e}") from e
    *lines, last = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line, True
    if last:
        yield len(lines) + 1, last, False


def _without(message: str, place: object) -> str:
    """A message without the place that it begins with."""
    return message.removeprefix(str(place)).lstrip(":. ")


def summary_line(problems: tuple[Problem, ...]) -> str:
    """One sentence for all problems, for the end of a command."""
    files = len({p.place.rpartition(":")[0] or p.place for p in problems})
    first = f"{json.dumps(problems[0].place)}: {problems[0].what}"
    if len(problems) == 1:
        return f"1 problem, at {first}"
    return f"{len(problems)} problems in {files} file{'' if files == 1 else 's'}, the first: {first}"
