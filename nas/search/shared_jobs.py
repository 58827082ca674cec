"""Training jobs as they travel between machines: strict JSON records, files by reference, nothing that is executed.

A job is the record that a worker process of one machine gets, without its paths. What many jobs need (images with the
teacher's answers, shared weights) is a bundle, uploaded once; what one student has (a checkpoint) goes along as inputs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from filelock import FileLock

from nas.core.errors import RecordError, StorageError
from nas.core.jsonio import content_hash, file_sha256, read_record
from nas.core.records import Candidate
from nas.recipe.context import ContextFile, context_parts, place_context
from nas.recipe.finish import FinishJob, precision_name
from nas.recipe.pruning import IMPORTANCE_FILE, importance_file
from nas.recipe.records import RECORD_FILE, SENSITIVITY_FILE, FinishedStudent, ScoredStudent, read_scored
from nas.recipe.score import ScoreJob, student_folder
from nas.recipe.supernet import RECORD_FILE as SUPERNET_RECORD
from nas.recipe.supernet import WEIGHTS_FILE as SUPERNET_WEIGHTS
from nas.search.artifacts import Artifacts, FileRef
from nas.search.folder import FINISHED_FILES, fingerprint_diff

SHARED_SCHEMA = 1
LIBRARIES = ("torch", "numpy", "onnxruntime", "optuna")  # what decides a score, and how it travels

Job = ScoreJob | FinishJob
Result = ScoredStudent | FinishedStudent


@dataclass(frozen=True, slots=True)
class Bundle:
    """Files that many jobs need: those of a context (its record with plain file names), or of a supernet."""

    files: tuple[FileRef, ...]
    context: ContextFile | None = None


@dataclass(frozen=True, slots=True)
class SharedJob:
    """A job on its way: `score` or `finish` with empty paths, and the keys of the bundles that it needs."""

    score: ScoreJob | None
    finish: FinishJob | None
    context: str
    supernet: str = ""

    def __post_init__(self) -> None:
        if (self.score is None) == (self.finish is None):
            raise RecordError("shared job: needs either score or finish")

    @property
    def plain(self) -> Job:
        """The job itself, without paths."""
        return cast("Job", self.score or self.finish)  # one of them is there: see above

    @property
    def candidate(self) -> Candidate:
        return self.plain.candidate

    @property
    def key(self) -> str:
        """Equal for the same work, whoever asks for it."""
        return content_hash(self, 24)

    @property
    def bundles(self) -> tuple[str, ...]:
        """Keys of what has to be there before the job can begin."""
        return tuple(key for key in (self.context, self.supernet) if key)


@dataclass(frozen=True, slots=True)
class SharedResult:
    """What a worker gives back: the files that the job made in the student's folder; `top1`: its right answers."""

    files: tuple[FileRef, ...]
    top1: float

    def __post_init__(self) -> None:
        if not 0 <= self.top1 <= 1:
            raise RecordError(f"shared result: top1 must be a share 0-1, got {self.top1}")


def packed(job: Job, context: str, supernet: str) -> SharedJob:
    """A job without the paths of this machine.

    Args:
        job: as the pool of one machine gets it.
        context, supernet: keys of its bundles; the latter is empty where the job needs no shared weights.
    """
    if isinstance(job, ScoreJob):
        return SharedJob(replace(job, context="", students="", supernet="", stop_file=""), None, context, supernet)
    return SharedJob(None, replace(job, context="", folder="", stop_file=""), context)


def unpacked(job: SharedJob, context: str, students: Path, supernet: str, stop_file: Path) -> Job:
    """The job with paths of this machine.

    Args:
        job: from `packed`.
        context, supernet: where its bundles were placed.
        students: folder in which the student gets a folder of its own.
        stop_file: its presence ends the job at its next epoch.
    """
    plain = job.plain
    if isinstance(plain, ScoreJob):
        return replace(plain, context=context, students=str(students), supernet=supernet, stop_file=str(stop_file))
    folder = student_folder(str(students), plain.candidate.arch_id)
    return replace(plain, context=context, folder=str(folder), stop_file=str(stop_file))


def job_folder(job: Job) -> Path:
    """Folder of the job's student."""
    return student_folder(job.students, job.candidate.arch_id) if isinstance(job, ScoreJob) else Path(job.folder)


def job_inputs(job: Job) -> list[Path]:
    """Files of the student's folder from which the job goes on."""
    folder = job_folder(job)
    if isinstance(job, FinishJob):
        return sorted({p for pattern in FINISHED_FILES for p in folder.glob(pattern)})
    lengths = {int(p.stem.partition("-")[2]): p for p in folder.glob("score-*.ckpt")}
    usable = [epochs for epochs in lengths if epochs <= job.epochs]
    return [lengths[max(usable)]] if usable else []


def known_result(job: Job) -> Result | None:
    """The result that lies in the student's folder, whole, at no cost: what it took was counted then.

    Raises:
        StorageError, RecordError: its record is damaged.
    """
    folder = job_folder(job)
    if isinstance(job, ScoreJob):
        known = read_scored(folder, job.name)
        return None if known is None else replace(known, cost_s=0.0)
    names = [f"final-{split}-{precision_name(p)}.json" for p in job.precisions for split in ("val", "test")]
    names += [SENSITIVITY_FILE] * bool(job.sensitivity)
    if job.importance is not None:
        names.append(importance_file(job.importance))
    if not all((folder / name).exists() for name in (RECORD_FILE, *names)):
        return None
    finished = read_record(FinishedStudent, folder / RECORD_FILE)
    return finished if finished.pruning == job.pruning else None


def read_result(job: Job) -> Result:
    """The result in the student's folder with what it cost, after its files were brought there.

    Raises:
        StorageError: they are not those of this job.
    """
    known = known_result(job)
    folder = job_folder(job)
    if known is None:
        raise StorageError(f"{folder}: the files that a worker sent do not hold the result of its job")
    return read_record(type(known), folder / (f"{job.name}.json" if isinstance(job, ScoreJob) else RECORD_FILE))


def head_score(job: Job) -> ScoredStudent:
    """What the job made of its student on search validation, from the student's folder."""
    scored = read_scored(job_folder(job), job.name if isinstance(job, ScoreJob) else "final-val-fp32")
    if scored is None:
        raise StorageError(f"{job_folder(job)}: the job left no logits of the validation split")
    return scored


def in_order(files: Iterable[FileRef]) -> list[FileRef]:
    """Files in the order in which they may appear in a student's folder: a record after what it describes."""
    return sorted(files, key=lambda f: (f.name.endswith(".json"), f.name == RECORD_FILE, f.name))


def student_files(folder: Path) -> list[Path]:
    """All files of a student's folder that are whole, by name."""
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def context_bundle(path: Path, upload: Callable[[Path], FileRef]) -> Bundle:
    """Uploads what `path`, a context record, names."""
    record, files = context_parts(path)
    return Bundle(_uploaded(files, upload), record)


def supernet_bundle(folder: Path, upload: Callable[[Path], FileRef]) -> Bundle:
    """Uploads trained shared weights."""
    return Bundle(_uploaded({path.name: path for path in _supernet_files(folder)}, upload))


def _supernet_files(folder: Path) -> list[Path]:
    names = (SUPERNET_RECORD, SUPERNET_WEIGHTS, IMPORTANCE_FILE)
    return [folder / name for name in names if name != IMPORTANCE_FILE or (folder / name).exists()]


def _uploaded(files: Mapping[str, Path], upload: Callable[[Path], FileRef]) -> tuple[FileRef, ...]:
    return tuple(replace(upload(path), name=name) for name, path in files.items())


def context_key(path: Path) -> str:
    """Key of a context by the content of everything that it names."""
    record, files = context_parts(path)
    return content_hash([record, {name: file_sha256(file) for name, file in files.items()}])


def supernet_key(folder: Path) -> str:
    """Key of shared weights by their content."""
    return content_hash({path.name: file_sha256(path) for path in _supernet_files(folder)})


def place_bundle(bundle: Bundle, key: str, artifacts: Artifacts, cache: Path) -> str:
    """Brings a bundle to this machine, once for all of its workers.

    Returns:
        What a job names: the path of the context record, or the folder of the shared weights.

    Raises:
        StorageError: a file cannot be had.
    """
    folder = (cache / "bundles" / key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        for ref in bundle.files:
            target = folder / ref.name
            if not target.exists():
                target.unlink(missing_ok=True)  # a link to a file that was deleted from the cache
                target.symlink_to(artifacts.cached(ref, cache).resolve())
        return str(folder if bundle.context is None else place_context(bundle.context, folder))


def program() -> dict[str, str]:
    """What has to be equal on all machines of a search: this program, and the libraries that decide a score."""
    found = {"schema": str(SHARED_SCHEMA), "nas": version_of("nas"), "code": CODE}
    return {**found, **{name: version_of(name) for name in LIBRARIES}}


def version_of(name: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return version(name).partition("+")[0]  # the part after + names the build, such as cpu
    except PackageNotFoundError:
        return "not installed"


def _code() -> str:
    """Hash of this package's sources: two checkouts of one version may differ."""
    root = Path(sys.modules["nas"].__file__ or "").parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


CODE = _code()  # of what was loaded: files may be replaced while this process runs


def program_differences(theirs: Mapping[str, str]) -> Sequence[str]:
    """One line for each part of the program that is another one here than where the search runs: `theirs -> here`."""
    return fingerprint_diff(dict(theirs), program())
