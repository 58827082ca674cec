"""The latency table of one device state: append-only rows, measured networks, the correction, all in one folder.

    latency_tables/<device>/
        device.json       the state that the numbers hold for
        rows.jsonl        one measured layer per line, with every sample; never rewritten
        networks.jsonl    one measured network per line, with its architecture
        correction.json   what the networks taught about the rows
        README.md         written by the program, for people

Lines are described in `nas.latency.lines`. A later line of the same key replaces an earlier one when read; a failure
never replaces a number, nor a disturbed measurement a smaller one. Order is the sequence number, never the clock.
"""

from __future__ import annotations

import os
import socket
import time
from bisect import bisect_left
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any

import filelock
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.core.errors import DeviceError, MissingRowError, RecordError, StorageError
from nas.core.jsonio import (
    append_line,
    from_plain,
    parse_json,
    read_record,
    read_text,
    sync_file,
    write_record,
    write_text,
)
from nas.core.records import MEASURING_PROTOCOL, PROFILE_STATE_FIELDS, Candidate, DeviceProfile, LayerSpec, Measurement
from nas.latency.correction import CORRECTION_VERSION, Correction
from nas.latency.interpolate import InterpolatedRow, interpolate_rows
from nas.latency.lines import (
    COVERING,
    FIXED_KEYS,
    GATE_KEY,
    OVERHEAD_KEY,
    REFERENCE_KEY,
    STREAMING_MB,
    MeasuredNetwork,
    NetworkForm,
    check_network,
    check_row,
    content_of,
    line_of,
    network_of,
    row_of,
    streaming_key,
)

TABLE_VERSION = 1

# Rows repeat within 0.4-0.6 % (median) and 1.7-3.1 % (90 %) in fresh sessions; a row without a calm round says less.
ROW_STD = 0.015
UNSTABLE_ROW_STD = 0.05
LEAST_NET_SHARE = 0.05  # a row keeps at least this share of its time when the overhead is taken off
FOREIGN_ROW_STD = 0.3  # of a row that another device state has, after scaling by the reference network
SYNC_EVERY_S = 0.5  # at most so much measuring is lost when the machine loses power; nothing when the process dies
BEGIN_WAIT_S = 30.0  # for another process that begins the same table, which takes milliseconds
SLOW_STATE = 1.05  # a reference network this much slower than at best shows a machine in another state


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """Content of device.json."""

    profile: DeviceProfile
    created_at: str
    version: int = TABLE_VERSION


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who writes to a table: written beside the lock, read by whoever has to wait."""

    pid: int
    host: str
    boot_id: str
    since: str


class LatencyTable:
    """Rows and networks of one device state. Open with `open` (to measure) or `read` (to estimate only)."""

    def __init__(self, folder: Path, profile: DeviceProfile, *, writable: bool) -> None:
        """Use `open` or `read`."""
        self.looked_at_s: float | None = None  # monotonic time when this process last measured the reference network
        self._folder = folder
        self._profile = profile
        self._writable = writable
        self._rows: dict[str, Measurement] = {}
        self._networks: dict[str, MeasuredNetwork] = {}
        self._fixed: dict[str, list[Measurement]] = {key: [] for key in FIXED_KEYS}
        self._std: dict[str, float] = {}  # of rows that were asked for: thousands of quantiles take a while
        self._tried: dict[str, int] = {}  # sequence number of the last measurement of each row and network
        self._least: dict[str, float] = {}  # of the fixed rows: looked up for every row
        self._edited: list[str] = []
        self._other_protocol = 0  # networks that were measured in another way
        self._torn: dict[str, int] = {}  # file -> bytes of a last line that was not written to its end
        self._read_to: dict[str, tuple[int, int]] = {}  # file -> bytes and lines read so far
        self._sequence = 0
        self._unsynced: set[str] = set()  # files with lines that a power failure could take
        self._synced_s = -SYNC_EVERY_S
        self._foreign: LatencyTable | None = None
        self._guessed: dict[str, InterpolatedRow] = {}
        self._foreign_scale = 1.0  # how much slower this device runs the reference network than the foreign one
        self._lock = filelock.FileLock(str(folder / ".lock"), thread_local=False)
        self.refresh()

    @classmethod
    def open(cls, folder: Path, profile: DeviceProfile) -> LatencyTable:
        """The table in a folder, begun when the folder is new.

        Args:
            folder: usually latency_tables/<profile.name>.
            profile: state of the device that will be measured or estimated for.

        Raises:
            DeviceError: the table belongs to another device state; the message shows each field that differs.
            StorageError: the folder cannot be read or written.
            RecordError: a line of the table is damaged or impossible, named by file and line number.
        """
        path = folder / "device.json"
        if not path.exists():
            cls._begin(folder, profile)
        stored = _device_file(path)
        lines = difference_lines(stored.profile, profile)
        if lines:
            raise DeviceError(
                f"{folder} was measured in another device state:\n  "
                + "\n  ".join(lines)
                + "\nIts numbers do not hold here."
                + way_back(stored.profile, profile)
                + " Begin another table: nas search FILE --set run.tables=DIR,"
                " or nas measure --space NAME --table DIR. A search may borrow its rows, and then says so:"
                f" --set run.tables=DIR --allow-foreign-table {quote(str(folder))}"
            )
        return cls(folder, stored.profile, writable=True)

    @staticmethod
    def _begin(folder: Path, profile: DeviceProfile) -> None:
        """Writes device.json where there is none; of two processes that begin one table the first one decides."""
        leftover = [n for n in ("rows.jsonl", "networks.jsonl") if (folder / n).exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(str(folder / ".lock"), timeout=BEGIN_WAIT_S):
                if (folder / "device.json").exists():
                    return
                if leftover:
                    raise RecordError(
                        f"{folder}: {leftover[0]} is there but device.json is missing, so nobody knows what its numbers"
                        " hold for. Restore device.json or choose another folder"
                    )
                write_text(folder / "README.md", _readme(profile))
                write_record(folder / "device.json", DeviceFile(profile, _now()))
        except filelock.Timeout as e:
            raise StorageError(f"{folder}: another process begins a table here and does not come to an end") from e
        except OSError as e:
            raise StorageError(f"{folder}: cannot be written: {e.strerror or e}. Choose another folder") from e

    @classmethod
    def read(cls, folder: Path) -> LatencyTable:
        """The table in a folder, to estimate from; nothing can be added.

        Raises:
            StorageError: there is no table.
            RecordError: a line of the table is damaged or impossible, named by file and line number.
        """
        path = folder / "device.json"
        if not path.exists():
            raise StorageError(
                f"{folder}: no latency table here (device.json is missing). Run: nas measure --space NAME"
            )
        return cls(folder, _device_file(path).profile, writable=False)

    @property
    def folder(self) -> Path:
        """Where the table lies."""
        return self._folder

    @property
    def profile(self) -> DeviceProfile:
        """The device state that the rows hold for."""
        return self._profile

    def borrow(self, folder: Path) -> None:
        """Answers for rows that this table lacks with those of a table of another device state, until it is closed.

        They are scaled by what the reference network takes on the two devices and count as uncertain
        (`FOREIGN_ROW_STD`); none is copied, and no correction that rests on them is stored.

        Raises:
            StorageError: there is no table.
            DeviceError: it is a table of this very device state.
            RecordError: a line of the table is damaged or impossible, named by file and line number.
        """
        other = LatencyTable.read(folder)
        if not state_differences(other.profile, self._profile):
            raise DeviceError(
                f"{folder} holds for this very device state, so it is not foreign. Search with it:"
                f" --set run.tables={quote(str(folder.parent))}"
            )
        self._foreign = other
        self._foreign_scale = self._scale_to(other)

    def interpolate(self, layers: Iterable[LayerSpec]) -> None:
        """Answers for rows that were not measured with estimates from those that were, until it is closed.

        They are as uncertain as measured rows are when they are left out; none is stored. Called again after more rows
        were measured, all are estimated anew.

        Args:
            layers: the rows that are asked for; those that were measured, failed or are borrowed stay as they are.
        """
        asked = [x for x in dict.fromkeys(layers) if x.key not in self._rows and not self._borrows(x.key)]
        known = {k: self.net_ms(k) for k, row in self._rows.items() if row.latency_ms is not None}
        self._guessed = interpolate_rows(known, asked) if asked else {}

    @property
    def interpolated(self) -> frozenset[str]:
        """Keys of the rows that are estimated from measured ones."""
        return frozenset(k for k in self._guessed if k not in self._rows)

    @property
    def foreign(self) -> LatencyTable | None:
        """The table of another device state that answers for rows which this one lacks."""
        return self._foreign

    @property
    def borrowed(self) -> frozenset[str]:
        """Keys of the rows that the foreign table answers for."""
        return frozenset() if self._foreign is None else frozenset(k for k in self._foreign.rows if self._borrows(k))

    @property
    def rows(self) -> Mapping[str, Measurement]:
        """The newest measurement of each row; a row that was never measured successfully has an error.

        Rows of a foreign table are among them, as they were measured there.
        """
        if self._foreign is None:
            return MappingProxyType(self._rows)
        return MappingProxyType(ChainMap(self._rows, self._foreign._rows))

    @property
    def networks(self) -> Mapping[str, MeasuredNetwork]:
        """The newest measurement of each network; one that was never measured successfully has an error."""
        return MappingProxyType(self._networks)

    @property
    def fixed(self) -> Mapping[str, tuple[Measurement, ...]]:
        """Every measurement of each fixed row (overhead, gate, reference, streamed weights), in order; known ones."""
        return {key: tuple(found) for key, found in self._fixed.items() if found}

    def fixed_ms(self, key: str) -> float | None:
        """The time that counts of a fixed row, ms: the least of its calm measurements, else of all; None where unknown.

        The reference network's is that of good sessions (`reference_ms`).
        """
        return self.reference_ms if key == REFERENCE_KEY else self._least.get(key)

    @property
    def edited(self) -> tuple[str, ...]:
        """`file:line` of entries that are valid but were changed after they were measured."""
        return tuple(self._edited)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before trusting the numbers, a line each."""
        others = [
            f"{self._folder / name}: the last line is torn after {count} bytes, because writing it was interrupted. It"
            " is left out; nothing else is lost"
            for name, count in self._torn.items()
            if count
        ]
        if self._other_protocol:
            others.insert(
                0,
                f"{self._folder}: {self._other_protocol} networks were measured by another protocol than today's, and"
                " are left out. They are measured again when a search needs them; rows stay valid",
            )
        if self._edited:
            others.insert(
                0,
                f"{len(self._edited)} entries of the table are not as measured, or not in this device state, the first:"
                f" {self._edited[0]}. They are used; take the lines out to have them measured again",
            )
        return tuple(others)

    @property
    def has_overhead(self) -> bool:
        """Whether the costs of an empty call and of an early exit's decision have been measured."""
        return OVERHEAD_KEY in self._least and GATE_KEY in self._least

    @property
    def overhead_ms(self) -> float:
        """Time of a call that does nothing; contained in every row, counted once in an estimate.

        The least of all that was measured of it: disturbance only adds, and every row depends on this number. An
        imported table has no such row, and nothing is taken off its numbers.

        Raises:
            MissingRowError: it has not been measured.
        """
        if OVERHEAD_KEY not in self._least:
            if self._profile.kind == "imported":
                return 0.0
            raise MissingRowError(f"{self._folder}: the overhead of a call has not been measured. {self._command()}")
        return self._least[OVERHEAD_KEY]

    @property
    def gate_ms(self) -> float:
        """Time of the decision at an early exit, its head not included; 0 where it has not been measured."""
        return max(self._least[GATE_KEY] - self._least[OVERHEAD_KEY], 0.0) if self.has_overhead else 0.0

    @property
    def streaming(self) -> tuple[tuple[float, float], ...]:
        """What it costs (ms) that so many megabytes of weights do not stay in the cache; rising, from (0, 0).

        The difference of two chains of convolutions that do the same work. Empty where it has not been measured.
        """
        points: list[tuple[float, float]] = []
        for megabytes in STREAMING_MB:
            there, cached = (self._least.get(streaming_key(megabytes, cached=c)) for c in (False, True))
            if there is not None and cached is not None:
                points.append((float(megabytes), max(there - cached, points[-1][1] if points else 0.0)))
        return ((0.0, 0.0), *points) if points else ()

    def streaming_ms(self, weight_mb: ArrayLike) -> NDArray[np.float64]:
        """What it costs (ms) that weights of these megabytes do not stay in the cache, any shape; 0 if not measured.

        Rows are measured alone and find their weights in the cache; those of a whole network drive each other out.
        Between the sizes that were measured the cost is taken as linear, beyond the largest as going on so.
        """
        mb = np.asarray(weight_mb, dtype=np.float64)
        points = np.array(self.streaming)
        if not len(points):
            return np.zeros_like(mb)
        sizes, costs = points.T
        slope = (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
        cost: NDArray[np.float64] = np.interp(mb, sizes, costs) + slope * np.maximum(mb - sizes[-1], 0.0)
        return cost

    @property
    def reference_ms(self) -> float | None:
        """Time of the reference network in good sessions (20 % of them were faster), or None."""
        values = [m.latency_ms for m in self._fixed[REFERENCE_KEY] if m.latency_ms is not None and m.is_stable]
        return float(np.quantile(values, 0.2)) if values else None

    @property
    def is_slow_now(self) -> bool:
        """Whether the reference network, when it was last measured, was slower than in good sessions."""
        looks, best = self._looks(), self.reference_ms
        return bool(looks) and best is not None and looks[-1][1] > SLOW_STATE * best

    def has_row(self, key: str) -> bool:
        """Whether a row has a latency: measured on this device, borrowed, or interpolated."""
        row = self._rows.get(key)
        return self._borrows(key) or key in self._guessed if row is None else row.latency_ms is not None

    def row_ms(self, key: str) -> float:
        """Latency of a row as measured, overhead included.

        Raises:
            MissingRowError: it was never measured, or measuring failed; the message names the next command.
        """
        row = self._rows.get(key)
        if row is None and (self._borrows(key) or key in self._guessed):
            return self.net_ms(key) + self.overhead_ms
        if row is None:
            raise MissingRowError(f"{key} has no row in {self._folder} ({len(self._rows)} rows). {self._command()}")
        if row.latency_ms is None:
            raise MissingRowError(
                f"{key} could not be measured for {self._folder}: {row.error}. Leave it out of the search space, or try"
                f" again: {self.again}"
            )
        return row.latency_ms

    def net_ms(self, key: str) -> float:
        """Latency of a row without the overhead of its call.

        Raises:
            MissingRowError: the row or the overhead is missing.
        """
        if self._foreign is not None and self._borrows(key):
            return self._foreign.net_ms(key) * self._foreign_scale
        if key not in self._rows and key in self._guessed:
            return self._guessed[key].latency_ms
        value = self.row_ms(key)
        return max(value - self.overhead_ms, LEAST_NET_SHARE * value)

    def row_std_ms(self, key: str) -> float:
        """Standard deviation of a row (`deviation_ms`); borrowed and interpolated ones are far more uncertain.

        Raises:
            MissingRowError: the row is missing.
        """
        value = self.row_ms(key)
        if self._borrows(key):
            return FOREIGN_ROW_STD * value
        if key not in self._rows:
            return self._guessed[key].std_ms
        if key not in self._std:
            self._std[key] = deviation_ms(self._rows[key])
        return self._std[key]

    def missing(self, keys: Iterable[str], *, again: bool = False, interpolated: bool = False) -> list[str]:
        """Keys without a row, each once, in the order given.

        Args:
            keys: row keys.
            again: also those whose measuring failed, and those without a calm round.
            interpolated: also those that are estimated from measured ones.
        """
        result = []
        for key in dict.fromkeys(keys):
            row = self._rows.get(key)
            if row is None and (self._borrows(key) or (key in self._guessed and not interpolated)):
                continue
            if row is None or (again and (row.latency_ms is None or not row.is_stable)):
                result.append(key)
        return result

    def outdated(self, keys: Iterable[str]) -> list[str]:
        """Keys of rows and networks that were measured while the machine was slower than it is known to be, each once.

        A table that is begun on a busy machine cannot know; later sessions show it.
        """
        looks, best = self._looks(), self.reference_ms
        if best is None:
            return []
        numbers = [sequence for sequence, _ in looks]
        result = []
        for key in dict.fromkeys(keys):
            network = self._networks.get(key)
            m = self._rows.get(key) if network is None else network.measurement
            if m is not None and m.latency_ms is not None:
                before = bisect_left(numbers, self._tried[key])
                if before and looks[before - 1][1] > SLOW_STATE * best:
                    result.append(key)
        return result

    def add(
        self, measurement: Measurement, candidate: Candidate | None = None, form: NetworkForm = "logits"
    ) -> Measurement:
        """Appends a measurement durably; the sequence number is given here.

        Args:
            measurement: a row, an overhead, or a network.
            candidate: the network's architecture; needed for networks only.
            form: how the network was written.

        Returns:
            The measurement with its sequence number.

        Raises:
            StorageError: the table was opened to read only, is held by another process, or cannot be written.
            RecordError: the measurement is impossible or is not one of a row, overhead or network.
        """
        with self.writing():
            stored = replace(measurement, sequence=self._sequence + 1)
            if stored.kind == "network":
                if candidate is None:
                    raise RecordError(f"network {stored.key}: its candidate must be stored with it")
                unset = candidate.with_thresholds((None,) * len(candidate.exits))
                network = MeasuredNetwork(unset, form, stored)
                check_network(network)
                self._append("networks.jsonl", network)
                self._take_network(network)
            elif stored.kind in ("row", "overhead"):
                check_row(stored)
                self._append("rows.jsonl", stored)
                self._take_row(stored)
            else:
                raise RecordError(f"{stored.key}: a table keeps rows, overheads and networks, not a {stored.kind}")
        return stored

    @contextmanager
    def writing(self, wait_s: float = 0.0, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Holds the table's lock; what other processes added meanwhile is read first. May be nested.

        Args:
            wait_s: how long to wait for another process, seconds.
            on_wait: told once who is waited for.

        Raises:
            StorageError: the table is read only, or another process holds it longer than `wait_s`.
        """
        if not self._writable:
            raise StorageError(f"{self._folder}: this table is open to read only; nothing can be added to it")
        if self._lock.is_locked:  # nested: this process holds it already
            with self._lock:
                yield
            return
        self._acquire(wait_s, on_wait)
        holder = self._folder / ".lock-holder.json"
        try:
            write_record(holder, LockHolder(os.getpid(), socket.gethostname(), _boot_id(), _now()))
            for left in self._folder.glob(".*.tmp-*"):  # half-written by a process that was killed: the lock is held
                left.unlink(missing_ok=True)
            self.refresh()
            yield
        finally:
            try:
                self._sync()
            finally:
                holder.unlink(missing_ok=True)
                self._lock.release()

    def refresh(self) -> None:
        """Reads what was appended since the last look, by this process or another.

        Raises:
            RecordError: a damaged or impossible line, named by file and line number.
        """
        for number, row in self._new_lines("rows.jsonl"):
            self._take_row(row_of(row, f"{self._folder / 'rows.jsonl'}:{number}"))
        for number, row in self._new_lines("networks.jsonl"):
            self._take_network(network_of(row, f"{self._folder / 'networks.jsonl'}:{number}"))

    def correction(self) -> Correction | None:
        """The stored correction, or None where there is none that this program wrote.

        Raises:
            RecordError: the file does not fit.
            DeviceError: it was made for another device state.
        """
        path = self._folder / "correction.json"
        if not path.exists():
            return None
        data = parse_json(read_text(path), str(path))
        if isinstance(data, dict) and data.get("version") != CORRECTION_VERSION:
            return None  # of another program version: it is fitted anew from networks.jsonl
        stored = from_plain(Correction, data, str(path))
        if stored.fingerprint != self._profile.fingerprint:
            raise DeviceError(
                f"{path}: made for device state {stored.fingerprint}, this table is {self._profile.fingerprint}."
                " Delete the file; it is computed anew from networks.jsonl"
            )
        return stored

    def save_correction(self, correction: Correction) -> None:
        """Replaces the stored correction. Raw rows stay as they are.

        Raises:
            StorageError: the table is read only or held by another process.
            DeviceError: the correction is of another device state.
        """
        if correction.fingerprint != self._profile.fingerprint:
            raise DeviceError(
                f"correction of device state {correction.fingerprint} does not belong to {self._folder}"
                f" ({self._profile.fingerprint})"
            )
        with self.writing():
            write_record(self._folder / "correction.json", correction)

    def _borrows(self, key: str) -> bool:
        """Whether the foreign table answers for a row."""
        if self._foreign is None or key in self._rows:
            return False
        row = self._foreign.rows.get(key)
        is_complete = self._foreign.has_overhead or self._foreign.profile.kind == "imported"
        return row is not None and row.latency_ms is not None and is_complete

    def _scale_to(self, other: LatencyTable) -> float:
        here, there = self.reference_ms, other.reference_ms
        return 1.0 if here is None or there is None else here / there

    def _looks(self) -> list[tuple[int, float]]:
        """Sequence number and time of each measurement of the reference network."""
        return [(m.sequence, m.latency_ms) for m in self._fixed[REFERENCE_KEY] if m.latency_ms is not None]

    @property
    def again(self) -> str:
        """The command that measures again what failed or was disturbed in this table."""
        options = f"--device {quote(_device_name(self._profile))} --table {quote(str(self._folder))}"
        counted = [row for row in self._rows.values() if row.latency_ms is not None]
        if counted and all(row.source.startswith(COVERING) for row in counted):  # rows of both ways should not be mixed
            options += " --how covering --space NAME"
        return f"nas measure --again {options}"

    def _command(self) -> str:
        return f"Run: nas measure --table {quote(str(self._folder))} --space NAME"

    def _acquire(self, wait_s: float, on_wait: Callable[[str], None] | None) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                if wait_s > 0 and on_wait is not None:
                    on_wait(f"waiting for {self._folder}, held by {self._holder()}")
            self._lock.acquire(timeout=wait_s, poll_interval=0.05)
        except filelock.Timeout as e:
            raise StorageError(
                f"{self._folder} is being written by {self._holder()}. Two measurements at a time would disturb each"
                " other: wait for it, or stop it"
            ) from e
        except OSError as e:
            raise StorageError(f"{self._folder}: cannot be locked: {e}. Is the folder writable?") from e

    def _holder(self) -> str:
        try:
            holder = read_record(LockHolder, self._folder / ".lock-holder.json")
        except (StorageError, RecordError):
            return "another process"
        here = holder.host == socket.gethostname() and holder.boot_id == _boot_id()
        return f"process {holder.pid} on {'this machine' if here else holder.host} since {holder.since}"

    def _append(self, name: str, value: Measurement | MeasuredNetwork) -> None:
        path = self._folder / name
        append_line(path, line_of(value, self._profile.fingerprint), sync=False)
        self._unsynced.add(name)
        if time.monotonic() - self._synced_s >= SYNC_EVERY_S:  # results that come in bursts share one
            self._sync()
        self._read_to[name] = (path.stat().st_size, self._read_to.get(name, (0, 0))[1] + 1)

    def _sync(self) -> None:
        """Makes the lines that were appended durable."""
        while self._unsynced:
            sync_file(self._folder / self._unsynced.pop())
        self._synced_s = time.monotonic()

    def _new_lines(self, name: str) -> Iterator[tuple[int, Any]]:
        """Number and content of the complete lines that were not read yet; a torn last line is left alone."""
        path = self._folder / name
        start, number = self._read_to.get(name, (0, 0))
        data = _bytes_from(path, start)
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.decode("utf-8", errors="replace").split("\n")[:-1]:
            number += 1
            if line.strip():
                row, as_measured = content_of(line, f"{path}:{number}", self._profile.fingerprint)
                if not as_measured:
                    self._edited.append(f"{path}:{number}")
                yield number, row
        self._read_to[name] = (start + len(whole), number)
        self._torn[name] = len(data) - len(whole)

    def _take_row(self, row: Measurement) -> None:
        self._sequence = max(self._sequence, row.sequence)
        if row.kind == "overhead":
            self._fixed[row.key].append(row)
            self._fixed[row.key].sort(key=lambda m: m.sequence)
            known = [m for m in self._fixed[row.key] if m.latency_ms is not None]
            if known:
                self._least[row.key] = min(m.latency_ms or 0.0 for m in [m for m in known if m.is_stable] or known)
            if row.key == REFERENCE_KEY and self._foreign is not None:
                self._foreign_scale = self._scale_to(self._foreign)
            return
        self._tried[row.key] = max(row.sequence, self._tried.get(row.key, 0))
        if _replaces(row, self._rows.get(row.key)):
            self._rows[row.key] = row
            self._std.pop(row.key, None)

    def _take_network(self, network: MeasuredNetwork) -> None:
        self._sequence = max(self._sequence, network.measurement.sequence)
        m = network.measurement
        if m.protocol != MEASURING_PROTOCOL:
            self._other_protocol += 1
            return
        self._tried[m.key] = max(m.sequence, self._tried.get(m.key, 0))
        before = self._networks.get(m.key)
        if _replaces(m, before.measurement if before is not None else None):
            self._networks[m.key] = network


def state_differences(a: DeviceProfile, b: DeviceProfile) -> list[tuple[str, object, object]]:
    """Name, value in the first and in the second of each field of the device state that differs."""
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in PROFILE_STATE_FIELDS]
    return [(name, first, second) for name, first, second in pairs if first != second]


def difference_lines(stored: DeviceProfile, given: DeviceProfile) -> list[str]:
    """`field: the table has ..., this device has ...` for each field of the state that differs."""
    return [f"{f}: the table has {a!r}, this device has {b!r}" for f, a, b in state_differences(stored, given)]


def way_back(stored: DeviceProfile, given: DeviceProfile) -> str:
    """A sentence with the commands that bring a Jetson back into the state of its table; empty for other devices.

    Args:
        stored: state that the table holds for.
        given: the device's state now.
    """
    differing = {name for name, *_ in state_differences(stored, given)}
    if not differing & {"power_mode", "clocks_locked", "locked_mhz"} or not given.details.get("soc"):
        return ""
    steps = []
    if "power_mode" in differing:
        steps.append(f"sudo nvpmodel -m ID (the id of {stored.power_mode} in /etc/nvpmodel.conf)")
    if stored.clocks_locked:
        steps.append("sudo jetson_clocks")  # also after a change of the mode, which has clocks of its own
    elif given.clocks_locked:
        steps.append("boot it, which unlocks the clocks")
    return f" To bring the board back into the state of the table, on it: {'; then '.join(steps)}." if steps else ""


def deviation_ms(m: Measurement) -> float:
    """The larger of the spread of the calm rounds and the error of the sessions, at least a share of the latency.

    0 for one that failed.
    """
    value = m.latency_ms or 0.0
    calm = [float(np.quantile(r, 0.2)) for r, ok in zip(m.rounds_ms, m.accepted, strict=True) if ok and r]
    spread = float(np.std(calm)) if len(calm) > 1 else 0.0
    return max((ROW_STD if calm else UNSTABLE_ROW_STD) * value, spread, m.std_ms)


def _replaces(new: Measurement, old: Measurement | None) -> bool:
    """Whether a measurement takes the place of another: the later one, but a failure never that of a number.

    Disturbance only adds: a later value without a calm round takes the place of a greater one only.
    """
    if old is None or old.latency_ms is None or new.latency_ms is None:
        return old is None or old.latency_ms is None
    return new.sequence >= old.sequence and (new.is_stable or new.latency_ms <= old.latency_ms)


def _device_file(path: Path) -> DeviceFile:
    data = parse_json(read_text(path), str(path))
    version = data.get("version") if isinstance(data, dict) else None
    if version is not None and version != TABLE_VERSION:  # before its fields, which may be others
        raise RecordError(f"{path}: table version {version}, this program reads {TABLE_VERSION}")
    return from_plain(DeviceFile, data, str(path))


def _bytes_from(path: Path, start: int) -> bytes:
    if not path.exists():
        return b""
    try:
        with path.open("rb") as f:
            if f.seek(0, os.SEEK_END) < start:
                raise StorageError(
                    f"{path} became shorter while it was in use: rows are only ever appended. Start again"
                )
            f.seek(start)
            return f.read()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e}") from e


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _device_name(profile: DeviceProfile) -> str:
    """What `--device` was when the table was begun; DEVICE where nobody knows."""
    name = profile.details.get("device_name")  # of a board
    if name is not None or "address" in profile.details or profile.kind == "imported":
        return name or "DEVICE"
    if profile.runtime == "ort":
        return "cpu" if profile.threads == 1 else f"cpu:{profile.threads}"
    return "tensorrt" if profile.runtime == "tensorrt" else "DEVICE"


def _readme(profile: DeviceProfile) -> str:
    state = "\n".join(f"| {name} | {value} |" for name, value in profile.state.items())
    details = "\n".join(f"| {name} | {value} |" for name, value in sorted(profile.details.items()))
    return f"""# Latency table: {profile.name}

Written by the program; the numbers hold for one device state only.

| state | |
|---|---|
{state}

| when the table was begun | |
|---|---|
{details}

- `rows.jsonl`: one measured layer (a block with its activation, squeeze-and-excitation, projection and skip) per line,
  with every sample. `latency_ms` contains the overhead of one call, which the row `overhead` gives; the row `gate` is
  the decision at an early exit, and the rows `weights-...` what it costs that weights do not stay in the cache. Lines
  are only appended; the newest of a key counts, unless it was disturbed and is slower. `check` is the start of the
  SHA-256 of the state's fingerprint, a blank and the text of `row`.
- `networks.jsonl`: whole networks that were measured, with their architecture.
- `correction.json`: what those networks taught about sums of rows, with the evidence. It is computed from the other two
  files and may be deleted.
- All times are milliseconds. `clock` says which clock: `thread_cpu` is the CPU time of the one thread that computes,
  `wall` the time that passes, where several threads do.
- `accepted` says which rounds were calm. A row without a calm round is still used, and counts as less certain.
- Protocol: rounds of runs, interleaved with those of other rows; before each round a small reference network (row
  `reference`) shows whether the machine is calm, before one of a network of more than 1 MB a chain that reads 8 MB of
  weights, too; the value of a round is the 20th percentile of its samples, the value of a row the minimum over its
  rounds, of a network the lower quartile of that over four to fifteen fresh sessions: they end when the four fastest
  agree.
"""
