"""The run folder: fingerprint, lock, trial records and events. The same command on the same folder goes on.

```
<run.dir>/
  experiment.yaml    resolved settings            fingerprint.json   what must not change between two calls
  trials.jsonl       scored candidates            events.jsonl       rounds, measured networks, phases
  students/<arch_id>/  scores, checkpoints, finished weights and logits
  supernet/          shared weights               study.db           the same trials for Optuna's tools
  outcome.json       finished students            report/  packages/
```
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from nas.core.errors import RunMismatchError, StorageError
from nas.core.jsonio import append_line, parse_json, read_lines, read_text, write_record, write_text
from nas.core.records import Candidate
from nas.core.run import PredictedMeasured

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One candidate that was scored, stopped early or failed; written once, when it is decided.

    `exit_shares` and `exit_top1` are of the search validation split under the candidate's thresholds. `latency_ms` is
    what was predicted when it was proposed (worst case); later estimates are computed anew from the candidate.
    """

    number: int
    round: int
    genotype: tuple[int, ...]
    candidate: Candidate
    state: Literal["complete", "stopped", "failed"]
    proposer: str
    latency_ms: float
    top1: float | None = None
    exit_top1: tuple[float, ...] = ()
    exit_shares: tuple[float, ...] = ()
    epochs: int = 0
    cost_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A step of the run that is over: `kind` names it, `values` holds its figures, `pairs` networks measured in it."""

    kind: str
    at_s: float
    values: dict[str, float | int | str | None] = field(default_factory=dict)
    pairs: tuple[PredictedMeasured, ...] = ()


class RunFolder:
    """Paths and append-only records of one run; made by `open_run`, which holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def students(self) -> Path:
        return self.path / "students"

    def student(self, arch_id: str) -> Path:
        """Folder of one architecture's scores and weights."""
        return self.students / arch_id

    def trials(self) -> tuple[TrialRecord, ...]:
        """All decided trials, in order."""
        return tuple(read_lines(TrialRecord, self.path / "trials.jsonl"))

    def add_trial(self, record: TrialRecord) -> None:
        """Appends a trial durably."""
        append_line(self.path / "trials.jsonl", record)

    def events(self) -> tuple[Event, ...]:
        """All events, in order."""
        return tuple(read_lines(Event, self.path / "events.jsonl"))

    def add_event(self, event: Event) -> None:
        """Appends an event durably."""
        append_line(self.path / "events.jsonl", event)


@contextmanager
def open_run(path: Path, fingerprint: dict[str, str], resolved_yaml: str) -> Iterator[RunFolder]:
    """The run folder, locked for this process; made when it does not exist.

    Args:
        path: run folder.
        fingerprint: readable key -> value of everything that decides what a score means.
        resolved_yaml: the settings, kept beside the results.

    Raises:
        RunMismatchError: the folder belongs to a run with another fingerprint; the message lists key by key.
        StorageError: another process holds the folder, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Asked for now, not after the teacher has been trained.
        write_text(path / ".writable", "")
        (path / ".writable").unlink()
    except OSError as e:
        raise StorageError(f"{path}: cannot be used as run folder: {e}. Choose another: --set run.dir=DIR") from e
    owner = path / "run.owner.json"
    lock = FileLock(path / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise StorageError(
            f"{path}: another search is using this run folder ({_owner_text(owner)}). "
            "Wait for it, or choose another folder: --set run.dir=DIR"
        ) from e
    try:
        write_record(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        _check_fingerprint(path, fingerprint)
        write_text(path / "experiment.yaml", resolved_yaml)
        (path / "stop").unlink(missing_ok=True)
        yield RunFolder(path)
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner_text(owner: Path) -> str:
    if not owner.exists():
        return "owner unknown"
    data = parse_json(read_text(owner), str(owner))
    return f"process {data.get('pid')} on {data.get('host')}"


def _check_fingerprint(path: Path, fingerprint: dict[str, str]) -> None:
    file = path / "fingerprint.json"
    now = {"schema": str(SCHEMA), **fingerprint}
    if not file.exists():
        write_record(file, now)
        return
    stored = parse_json(read_text(file), str(file))
    lines = fingerprint_diff(stored, now)
    if lines:
        raise RunMismatchError(
            f"{path}: this folder holds a run with other settings:\n"
            + "\n".join(lines)
            + "\nGo on with the old settings, start anew in another folder (--set run.dir=DIR), or copy what is still "
            "valid into a new run: --fork"
        )


def fingerprint_diff(stored: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line per key that differs: `  key: stored -> now`."""
    return [
        f"  {key}: {stored.get(key, '(absent)')} -> {now.get(key, '(absent)')}"
        for key in sorted({*stored, *now})
        if stored.get(key) != now.get(key)
    ]


SCORE_KEYS = ("schema", "data", "teacher", "distillation", "scorer", "seed")


def fork_run(old: Path, new: Path, fingerprint: dict[str, str]) -> list[str]:
    """Starts a new run folder from an old one: scores stay valid when data, teacher and training are the same.

    Trained students are copied by architecture, so a candidate that the new space contains is not trained again;
    trials, rounds and outcomes start anew under the new space and budget.

    Returns:
        What was copied, in words.

    Raises:
        StorageError: the new folder exists already, or the old one is not a run.
    """
    stored_file = old / "fingerprint.json"
    if not stored_file.exists():
        raise StorageError(f"{old}: not a run folder (no fingerprint.json)")
    if new.exists() and any(new.iterdir()):
        raise StorageError(f"{new}: exists already; choose another folder: --set run.dir=DIR")
    stored = parse_json(read_text(stored_file), str(stored_file))
    now = {"schema": str(SCHEMA), **fingerprint}
    changed = [key for key in SCORE_KEYS if stored.get(key) != now.get(key)]
    if changed:
        return [f"nothing copied: {', '.join(changed)} changed, so old scores mean something else"]
    notes = []
    # The supernet holds the weights of one space; finished and scored students stand for themselves.
    parts = ["students"] + (["supernet"] if stored.get("space") == now.get("space") else [])
    for part in parts:
        if (old / part).is_dir():
            shutil.copytree(old / part, new / part)
            notes.append(f"{part}: {sum(1 for _ in (new / part).iterdir())} entries")
    return notes
