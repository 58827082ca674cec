"""The run folder: fingerprint, lock, trial records and events. The same command on the same folder goes on.

```
<run.dir>/
  experiment.yaml    resolved settings            fingerprint.json   what must not change between two calls
  batches.jsonl      proposed candidates          trials.jsonl       what became of each of them
  chosen.jsonl       networks to be measured      events.jsonl       rounds, with the networks that were measured
  measured.jsonl     finished students on the device, exit by exit
  streams.jsonl      finished students with exits on the device, under a stream of test images
  pipeline.json      what of a deadline of the whole pipeline is not the network's
  sampler.json       which sampler `auto` stood for at the first call
  clock.json         time spent so far            study.db           the same trials for Optuna's tools
  students/<arch_id>/  scores, checkpoints, finished weights and logits          supernet/  shared weights
  outcome.json       finished students            space.yaml   the search space as it was
  report/  packages/                              package.json the package of the pick
  shared.json        the study by which workers of other machines are reached, artifacts/ their files
  devices/<name>/    of each further device: its chosen, events, measured, outcome, package and packages
```
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from nas.core.errors import RunMismatchError, StorageError
from nas.core.jsonio import append_line, parse_json, read_lines, read_record, read_text, write_record, write_text
from nas.core.records import Candidate
from nas.core.run import FailedCandidate, PredictedMeasured, StreamLatency
from nas.export.dialect import ORT
from nas.recipe.records import FINISHED_FILES, FLOAT_FILES, PARENT, RECORD_FILE, FinishedStudent
from nas.space.yamlio import parse_yaml

SCHEMA = 2
RENAMED = {"rung_top1": "rung_scores"}  # fields of trials in runs of schema 1, which can still be looked at
OWNER_FILE = "run.owner.json"
SPACE_FILE = "space.yaml"
SAMPLER_FILE = "sampler.json"


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a run folder: number, machine, boot of the machine, and start, as numbers come again."""

    pid: int
    host: str
    boot_id: str
    started: str


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One candidate that was scored, stopped early or failed; written when it is decided.

    `exit_shares` and `exit_top1` are of the search validation split under the candidate's thresholds. `latency_ms` is
    what was predicted when it was proposed (worst case), `elsewhere_ms` the same on further devices; later estimates
    are computed anew from the candidate. `rung_scores` are those of the head at each rung of a standalone training.
    `soft_top1` is the mean probability of the right label where `top1` is the share of right answers.

    A candidate that was stopped may go on during a later batch. Then it has a second line, whose `decided_in` is the
    first number of that batch.
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
    elsewhere_ms: tuple[float, ...] = ()
    rung_scores: tuple[float, ...] = ()
    decided_in: int = 0
    soft_top1: float | None = None

    @property
    def score(self) -> float:
        """What candidates are ranked by: sampled, compared and chosen; 0 where there is none."""
        found = self.top1 if self.soft_top1 is None else self.soft_top1
        return 0.0 if found is None else found


@dataclass(frozen=True, slots=True)
class Event:
    """A step of the run that is over: `kind` names it, `values` holds its figures.

    `pairs` are the networks measured in it, `failed` those that could not be.
    """

    kind: str
    at_s: float
    values: dict[str, float | int | str | None] = field(default_factory=dict)
    pairs: tuple[PredictedMeasured, ...] = ()
    failed: tuple[FailedCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Candidates proposed together, written before they are scored: after a kill the same ones are scored to the end.

    Trial numbers begin at `first` and follow the order of `genotypes`. `latency_ms` is the worst case predicted then,
    `elsewhere_ms` that of each on every further device; `proposers` names what proposed each.
    """

    first: int
    round: int
    genotypes: tuple[tuple[int, ...], ...]
    latency_ms: tuple[float, ...]
    proposers: tuple[str, ...]
    elsewhere_ms: tuple[tuple[float, ...], ...] = ()

    @property
    def numbers(self) -> range:
        """Trial numbers of its candidates."""
        return range(self.first, self.first + len(self.genotypes))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Whole networks that a round measures, written before it does: after a kill the same ones are measured to the end.

    Round 0 stands for those that are measured before anything is trained; the one after the last for the mixed networks
    of the finalists, which are `candidates`, because the space may not contain them.
    """

    round: int
    genotypes: tuple[tuple[int, ...], ...]
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class ChosenSampler:
    """What `search.sampler: auto` stood for at the first call of a run, and why."""

    sampler: str
    reason: str


@dataclass(frozen=True, slots=True)
class MeasuredExit:
    """A finished student's network on the device, leaving at one exit: cumulative latency, or why there is none.

    `std_ms` is its deviation, as `nas.latency.table.deviation_ms`; `energy_mj` that of `Measurement`.
    """

    key: str
    latency_ms: float | None
    error: str = ""
    std_ms: float = 0.0
    energy_mj: float | None = None
    energy_std_mj: float | None = None


@dataclass(frozen=True, slots=True)
class MeasuredStream:
    """A stream of test images through the deployed network of a point."""

    id: str
    stream: StreamLatency


def latest(decisions: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    """The last decision of each trial, by number."""
    known = {r.number: r for r in decisions}
    return tuple(known[number] for number in sorted(known))


def device_folder(name: str) -> str:
    """What a device's files are called, such as `cpu-2`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


class RunFolder:
    """Paths and append-only records of one run as one device sees it; made by `open_run`, which holds its lock.

    Candidates, scores and students are those of the run. What was measured, and what it led to, is the device's own.
    """

    def __init__(self, path: Path, device: str = "") -> None:
        """Args:
        path: the run folder.
        device: name of a further device; the empty name is the first one.
        """
        self.path = path
        self.device = device

    def on(self, device: str) -> RunFolder:
        """The same run as a further device sees it."""
        return RunFolder(self.path, device)

    @property
    def device_path(self) -> Path:
        """Folder of the device's own records: that of the run for the first device."""
        return self.path / "devices" / device_folder(self.device) if self.device else self.path

    @property
    def students(self) -> Path:
        return self.path / "students"

    def student(self, arch_id: str) -> Path:
        """Folder of one architecture's scores and weights."""
        return self.students / arch_id

    def trials(self) -> tuple[TrialRecord, ...]:
        """All decided trials by number, each as it was decided last."""
        return latest(self.decisions())

    def decisions(self) -> tuple[TrialRecord, ...]:
        """Every line of the decided trials, in the order in which they were decided."""
        return tuple(read_lines(TrialRecord, self.path / "trials.jsonl", RENAMED))

    def add_trial(self, record: TrialRecord) -> None:
        """Appends a trial durably."""
        append_line(self.path / "trials.jsonl", record)

    def batches(self) -> tuple[Batch, ...]:
        """All proposed candidates, in order."""
        return tuple(read_lines(Batch, self.path / "batches.jsonl"))

    def add_batch(self, batch: Batch) -> None:
        """Appends a batch durably."""
        append_line(self.path / "batches.jsonl", batch)

    def chosen(self, round_number: int) -> Chosen | None:
        """The networks that a round measures; None where it has not come to choose them."""
        found = read_lines(Chosen, self.device_path / "chosen.jsonl")
        return next((c for c in found if c.round == round_number), None)

    def add_chosen(self, chosen: Chosen) -> None:
        """Appends a choice durably."""
        append_line(self.device_path / "chosen.jsonl", chosen)

    def sampler(self) -> ChosenSampler | None:
        """The sampler that was chosen for the run; None where none was yet, or one is asked for."""
        file = self.path / SAMPLER_FILE
        return read_record(ChosenSampler, file) if file.exists() else None

    def keep_sampler(self, chosen: ChosenSampler) -> None:
        """Keeps the choice of the sampler."""
        write_record(self.path / SAMPLER_FILE, chosen)

    def measured(self) -> dict[str, MeasuredExit]:
        """Measured exits of finished students by key."""
        return {m.key: m for m in read_lines(MeasuredExit, self.device_path / "measured.jsonl")}

    def add_measured(self, measured: MeasuredExit) -> None:
        """Appends a measured exit durably."""
        append_line(self.device_path / "measured.jsonl", measured)

    def streams(self) -> dict[str, StreamLatency]:
        """Measured streams of points by id."""
        found = read_lines(MeasuredStream, self.device_path / "streams.jsonl")
        return {m.id: m.stream for m in found}

    def add_stream(self, id_: str, stream: StreamLatency) -> None:
        """Appends a measured stream durably."""
        append_line(self.device_path / "streams.jsonl", MeasuredStream(id_, stream))

    def events(self) -> tuple[Event, ...]:
        """All events, in order."""
        return tuple(read_lines(Event, self.device_path / "events.jsonl"))

    def add_event(self, event: Event) -> None:
        """Appends an event durably."""
        append_line(self.device_path / "events.jsonl", event)


@contextmanager
def open_run(path: Path, fingerprint: dict[str, str], resolved_yaml: str, space_yaml: str = "") -> Iterator[RunFolder]:
    """The run folder, locked for this process; made when it does not exist.

    Args:
        path: run folder.
        fingerprint: readable key -> value of everything that decides what a score means.
        resolved_yaml: the settings, kept beside the results.
        space_yaml: the search space, kept too: its file may be edited or moved later.

    Raises:
        RunMismatchError: the folder belongs to a run with another fingerprint; the message lists key by key.
        StorageError: another process holds the folder, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Asked for now, not after the teacher has been trained.
        write_text(path / ".writable", "")
        (path / ".writable").unlink()
        lock = FileLock(path / "run.lock")
        lock.acquire(timeout=0)
    except Timeout as e:
        raise StorageError(
            f"{path}: another search is using this run folder ({_owner_text(path / OWNER_FILE)}). "
            "Wait for it, or choose another folder: --set run.dir=DIR"
        ) from e
    except (OSError, NotImplementedError) as e:  # the latter: a file system without locks
        raise StorageError(f"{path}: cannot be used as run folder: {e}. Choose another: --set run.dir=DIR") from e
    owner = path / OWNER_FILE
    try:
        write_record(owner, _this_process())
        _sweep(path)
        _check_fingerprint(path, fingerprint, resolved_yaml, space_yaml)
        (path / "stop").unlink(missing_ok=True)
        yield RunFolder(path)
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _sweep(path: Path) -> None:
    """Removes half-written files that a killed process left; the lock is held, so nobody is writing them."""
    for left in list(path.rglob(".*.tmp-*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _this_process() -> Owner:
    pid = os.getpid()
    return Owner(pid, socket.gethostname(), _boot_id(), _process_start(pid))


def _owner_text(file: Path) -> str:
    if not file.exists():
        return "owner unknown"
    owner = read_record(Owner, file)
    return f"process {owner.pid} on {owner.host}"


def is_running(path: Path) -> bool:
    """Whether a search works in a run folder now; of another machine's search only its note is seen."""
    file = path / OWNER_FILE
    if not file.exists():
        return False
    owner = read_record(Owner, file)
    if owner.host != socket.gethostname():
        return True
    return owner.boot_id == _boot_id() and owner.started == _process_start(owner.pid) != ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """What tells a process from a later one with the same number; empty when there is no such process."""
    try:
        # Field 22 of proc_pid_stat(5): start time; counted behind the name, which may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "unknown"
    return "unknown"


def _check_fingerprint(path: Path, fingerprint: dict[str, str], resolved_yaml: str, space_yaml: str) -> None:
    file = path / "fingerprint.json"
    now = {"schema": str(SCHEMA), **fingerprint}
    settings = path / "experiment.yaml"
    lines = fingerprint_diff(parse_json(read_text(file), str(file)), now) if file.exists() else []
    if lines and is_young(path):  # nothing to protect: the user mended a setting that the first call refused
        file.unlink()
        for name in ("events.jsonl", "chosen.jsonl", "pipeline.json", SAMPLER_FILE):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / "devices", ignore_errors=True)
    elif lines:
        before = read_text(settings) if settings.exists() else ""
        raise RunMismatchError(
            f"{path}: this folder holds a run with other settings:\n"
            + "\n".join([*lines, *settings_diff(before, resolved_yaml), *_space_diff(path, space_yaml)])
            + "\nGo on with the old settings, start anew in another folder (--set run.dir=DIR), or copy what is still "
            "valid into a new run: --fork"
        )
    write_text(settings, resolved_yaml)
    if space_yaml:
        write_text(path / SPACE_FILE, space_yaml)
    if not file.exists():
        write_record(file, now)  # last: with it, the folder is a run that can be looked at


def kept_fingerprint(path: Path) -> dict[str, str] | None:
    """What a run folder was started with, as `open_run` was given it; None where it holds no run of this version."""
    file = path / "fingerprint.json"
    if not file.exists():
        return None
    stored: dict[str, str] = parse_json(read_text(file), str(file))
    return stored if stored.pop("schema", None) == str(SCHEMA) else None


def is_young(path: Path) -> bool:
    """Whether a run folder holds no work that belongs to its settings yet."""
    return not any((path / name).exists() for name in ("batches.jsonl", "trials.jsonl", "students", "supernet"))


def fingerprint_diff(stored: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line per key that differs: `  key: stored -> now`."""
    return [
        f"  {key}: {stored.get(key, '(absent)')} -> {now.get(key, '(absent)')}"
        for key in sorted({*stored, *now})
        if stored.get(key) != now.get(key)
    ]


def _space_diff(path: Path, space_yaml: str) -> list[str]:
    kept = path / SPACE_FILE
    if not space_yaml or not kept.exists():
        return []
    return [line.replace("  ", "  space: ", 1) for line in settings_diff(read_text(kept), space_yaml)]


def settings_diff(before: str, after: str) -> list[str]:
    """One line per setting of two resolved experiment files that differs; folders of results are passed over."""
    old, new = _flat(parse_yaml(before, "experiment.yaml")), _flat(parse_yaml(after, "experiment"))
    return [
        f"  {key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith("run.")
    ]


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, list) and any(isinstance(part, dict) for part in data):
        start = prefix.rstrip(".")
        return {key: value for i, part in enumerate(data) for key, value in _flat(part, f"{start}[{i}].").items()}
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data} if prefix else {}
    return {key: value for name, part in data.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


# What a score means. Of these, a changed space spoils only scores from weights that the space shares.
SCORE_KEYS = ("schema", "data", "augmentation", "teacher", "distillation", "scorer", "seed")
DIALECT = "dialect"  # key of that of the first device's graphs; absent where it is ONNX Runtime's


def fork_run(old: Path, new: Path, fingerprint: dict[str, str]) -> list[str]:
    """Starts a new run folder from an old one: scores stay valid when data, teacher and training are the same.

    Trained students are copied by architecture, so a candidate that the new space contains is not trained again. For
    a device of another dialect they come without what its graphs would not answer: everything but fp32.
    Trials, rounds and outcomes start anew under the new space and budget. The copy appears when it is whole.

    Returns:
        What was copied, in words.

    Raises:
        StorageError: the new folder exists already, the old one is not a run, or the copy cannot be written.
        RecordError: the record of a finished student is damaged.
    """
    stored_file = old / "fingerprint.json"
    if not stored_file.exists():
        raise StorageError(
            f"{old}: not a run folder (no fingerprint.json), so there is nothing to fork. Run without --fork"
        )
    if new.exists() and any(new.iterdir()):
        raise StorageError(f"{new}: exists already; choose another folder: --set run.dir=DIR")
    stored = parse_json(read_text(stored_file), str(stored_file))
    now = {"schema": str(SCHEMA), **fingerprint}
    changed = [key for key in SCORE_KEYS if stored.get(key) != now.get(key)]
    if changed:
        return [f"nothing: {', '.join(changed)} changed, so old scores mean something else"]
    parts, left_out = ["students", "supernet"], [".*"]
    if stored.get("space") != now.get("space"):
        parts.remove("supernet")
        left_out.append("supernet-*")
    if stored.get("calibration") != now.get("calibration"):
        left_out += (*FINISHED_FILES, f"{PARENT}*")
    before, after = stored.get(DIALECT, ORT.name), now.get(DIALECT, ORT.name)
    ignored: Callable[[str, list[str]], set[str]] = shutil.ignore_patterns(*left_out)
    of_students = ignored if before == after else _all_but(FLOAT_FILES, ignored)
    staged = new.with_name(f".{new.name}.tmp-{os.getpid()}")
    try:
        present = [part for part in parts if (old / part).is_dir()]
        for part in present:
            shutil.copytree(old / part, staged / part, ignore=of_students if part == "students" else ignored)
        if before != after:
            for file in staged.glob(f"students/*/{RECORD_FILE}"):
                write_record(file, read_record(FinishedStudent, file).as_distilled())
        if present:
            staged.replace(new)
    except (OSError, shutil.Error) as e:
        raise StorageError(f"{new}: the copy of {old} cannot be written: {e}. Free space, then try again") from e
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    notes = [f"{part}: {sum(1 for _ in (new / part).iterdir())} entries" for part in present]
    if before != after and "students" in present:
        notes[0] += f" without int8 and mixes, which were of graphs of dialect {before}; this device reads {after}"
    return notes or [f"nothing: {old} has no scores yet"]


def _all_but(
    patterns: Sequence[str], ignored: Callable[[str, list[str]], set[str]]
) -> Callable[[str, list[str]], set[str]]:
    """What `copytree` leaves out: files that no pattern names, and those of `ignored`; folders are gone into."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        files = (name for name in names if not (Path(folder) / name).is_dir())
        return ignored(folder, names) | {f for f in files if not any(fnmatch(f, p) for p in patterns)}

    return left_out
