"""One search on many machines: its training jobs are waiting trials of an Optuna study, taken by workers.

`nas search` stays the only one that proposes, estimates, measures and decides, so its sampler sees the same as on one
machine, and its run folder stays the truth to resume from. Here it puts jobs into the study and takes results out.

A job is a trial. It is WAITING until one worker makes it RUNNING, which the database allows once; COMPLETE with values
and the references of its files, or FAIL with the reason (`ended`). A worker counts `beat` up while it works. Whether
that still moves is judged by the clock of the search alone: clocks of different machines need not agree, and while the
storage is away no beat can be missed. (Optuna's heartbeat works inside `Study.optimize` on a database only: not with
trials that are handed out, not through the gRPC proxy.)

A trial whose beat stands still is told FAIL first, and only then is its job queued anew, with the checkpoint that its
worker had uploaded last. The database refuses the one if the other has just come, so a job never has two results; and a
search that dies between the two loses nothing, as it asks for every job that its run folder lacks. (The other order is
needed where the queue is the only memory.) Only the search creates trials: caches of Optuna pass over a trial that
appears with a lower number than one that was seen finished.
"""

from __future__ import annotations

import socket
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.trial import TrialState

from nas.core.errors import InterruptedRunError, RunMismatchError, UsageError
from nas.core.jsonio import content_hash, file_sha256, from_plain, read_record, to_plain, write_record
from nas.core.records import Candidate
from nas.recipe.pool import J, JobFailure, JobResult, R
from nas.recipe.score import ScoreJob
from nas.search.artifacts import Artifacts, FileRef, open_artifacts
from nas.search.progress import Reporter
from nas.search.shared_jobs import (
    Bundle,
    Job,
    Result,
    SharedJob,
    SharedResult,
    context_bundle,
    context_key,
    in_order,
    job_folder,
    job_inputs,
    known_result,
    packed,
    program,
    read_result,
    supernet_bundle,
    supernet_key,
)
from nas.search.shared_storage import Connection, Patience, connect, redacted
from nas.search.study import distributions, to_params
from nas.space.space import SearchSpace

SHARED_FILE = "shared.json"
FINALS = ".finals"  # ending of the name of the second study: full distillations, whose accuracy is another thing
LEASE_S = 60.0
BEATS_PER_LEASE = 4
MAX_DEATHS = 5  # of the workers of one job, then the job is to blame; under frequent kills three are chance
POLL_S = 0.5
NOBODY_S = 15.0  # without a worker before the user is told how to start one

Ended = Literal["failure", "returned", "broken", "expired", "twice", "outdated"]


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """How a search is shared.

    Fields:
        storage: address of the storage, see `connect`.
        artifacts: folder or `s3://BUCKET/PREFIX`; None: `artifacts` in the run folder.
        lease_s: a worker that was not heard of for so long is taken for dead.
    """

    storage: str
    artifacts: str | None = None
    lease_s: float = LEASE_S

    def __post_init__(self) -> None:
        if not self.lease_s > 0:
            raise UsageError(f"--lease: must be above 0 seconds, got {self.lease_s:g}")


@dataclass(frozen=True, slots=True)
class SharedRun:
    """`shared.json` of a run folder: which study belongs to it. Addresses are without passwords."""

    study: str
    run_id: str
    storage: str
    artifacts: str


@dataclass(frozen=True, slots=True)
class JobLabel:
    """What a dashboard shows of a candidate: Optuna's parameters, and predicted milliseconds on each device."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    latency_ms: tuple[float, ...]


def labels(space: SearchSpace, latency_ms: Callable[[Candidate], tuple[float, ...]]) -> Callable[[Candidate], JobLabel]:
    """What gives the label of a candidate that is to be scored.

    Args:
        space: of the search.
        latency_ms: worst case of a candidate on each device, as it is predicted now.
    """
    # Jobs have no thresholds: all settings of them share a score.
    thresholds = {space.genes[e.threshold.gene].name for e in space.layout.exits if e.threshold.gene is not None}
    known = {name: d for name, d in distributions(space).items() if name not in thresholds}

    def label(candidate: Candidate) -> JobLabel:
        whole = candidate.with_thresholds(space.thresholds[:1] * len(candidate.exits))
        params = to_params(space, space.encode(whole))
        return JobLabel({name: params[name] for name in known}, known, latency_ms(candidate))

    return label


@dataclass(frozen=True, slots=True, eq=False)
class QueuedJob:
    """A trial of the study as it was read."""

    trial: optuna.trial.FrozenTrial

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def state(self) -> TrialState:
        return self.trial.state

    @property
    def key(self) -> str:
        return str(self.trial.user_attrs.get("key", ""))

    @property
    def worker(self) -> str:
        return str(self.trial.user_attrs.get("worker", ""))

    @property
    def beat(self) -> int:
        return int(self.trial.user_attrs.get("beat", -1))

    @property
    def ended(self) -> str:
        return str(self.trial.user_attrs.get("ended", ""))

    @property
    def program(self) -> str:
        """Hash of what queued it, see `program`."""
        return str(self.trial.user_attrs.get("program", ""))

    @property
    def reason(self) -> str:
        return str(self.trial.user_attrs.get("reason", ""))

    @property
    def job(self) -> SharedJob:
        """Raises RecordError when it does not fit."""
        return from_plain(SharedJob, self.trial.user_attrs.get("job"), f"trial {self.number}: job")

    @property
    def inputs(self) -> tuple[FileRef, ...]:
        """Files of the student to go on from; its worker replaces them as it gets further."""
        data = self.trial.user_attrs.get("inputs", [])
        return from_plain(tuple[FileRef, ...], data, f"trial {self.number}: inputs")

    @property
    def result(self) -> SharedResult:
        return from_plain(SharedResult, self.trial.user_attrs.get("result"), f"trial {self.number}: result")

    @property
    def latency_ms(self) -> tuple[float, ...]:
        data = self.trial.user_attrs.get("latency_ms", [])
        return from_plain(tuple[float, ...], data, f"trial {self.number}: latency_ms")


class JobQueue:
    """The trials of one study, as jobs; every operation waits for a storage that is away.

    Args:
        connection: the open storage.
        name: of the study, which is there.
        patience: repeats operations.
    """

    def __init__(self, connection: Connection, name: str, patience: Patience) -> None:
        self.name = name
        self._storage = connection.storage
        self._patience = patience
        self._study_id = patience(lambda: self._storage.get_study_id_from_name(name))
        self._ids: dict[int, int] = {}

    def attributes(self) -> dict[str, Any]:
        """What the study says of itself."""
        return self._patience(lambda: self._storage.get_study_user_attrs(self._study_id))

    def say(self, key: str, value: Any) -> None:
        """Sets an attribute of the study."""
        self._patience(lambda: self._storage.set_study_user_attr(self._study_id, key, to_plain(value)))

    def jobs(self) -> list[QueuedJob]:
        """All jobs, in the order in which they were queued."""
        trials = self._patience(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))
        return [QueuedJob(t) for t in trials if "job" in t.user_attrs]

    def add(self, trial: optuna.trial.FrozenTrial) -> None:
        """Queues a job. After an outage in the middle of it the job may be there twice; the search notices."""
        self._patience(lambda: self._storage.create_new_trial(self._study_id, trial))

    def claim(self, number: int) -> bool:
        """Makes a waiting job one's own; False where another worker was faster, or the search took it back."""
        trial = self._id(number)
        try:
            return self._patience(lambda: self._storage.set_trial_state_values(trial, TrialState.RUNNING))
        except UpdateFinishedTrialError:
            return False

    def note(self, number: int, key: str, value: Any) -> bool:
        """Sets an attribute of a job that is not over; False where it is."""
        trial = self._id(number)
        try:
            self._patience(lambda: self._storage.set_trial_user_attr(trial, key, to_plain(value)))
        except UpdateFinishedTrialError:
            return False
        return True

    def note_once(self, number: int, key: str, value: Any) -> bool:
        """The same without patience.

        Raises:
            One of the connection's errors: the storage is away.
        """
        try:
            self._storage.set_trial_user_attr(self._id(number), key, to_plain(value))
        except UpdateFinishedTrialError:
            return False
        return True

    def complete(self, number: int, values: Sequence[float]) -> bool:
        """Ends a job well; False where it was over already, after an outage perhaps by an earlier try of this."""
        trial = self._id(number)
        try:
            return self._patience(lambda: self._storage.set_trial_state_values(trial, TrialState.COMPLETE, values))
        except UpdateFinishedTrialError:
            return False

    def fail(self, number: int, ended: Ended, reason: str) -> bool:
        """Ends a job without a result; False where it was over already."""
        trial = self._id(number)
        try:
            self._patience(lambda: self._storage.set_trial_user_attr(trial, "ended", ended))
            self._patience(lambda: self._storage.set_trial_user_attr(trial, "reason", reason))
            return self._patience(lambda: self._storage.set_trial_state_values(trial, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False

    def read(self, number: int) -> QueuedJob:
        """A job as it is now."""
        trial = self._id(number)
        return QueuedJob(self._patience(lambda: self._storage.get_trial(trial)))

    def _id(self, number: int) -> int:
        if number not in self._ids:
            find = self._storage.get_trial_id_from_study_id_trial_number
            self._ids[number] = self._patience(lambda: find(self._study_id, number))
        return self._ids[number]


@dataclass(frozen=True, slots=True, eq=False)
class SharedStudy:
    """An open study of a run, with its files: `scores` has the search's jobs, `finals` the full distillations."""

    connection: Connection
    patience: Patience
    scores: JobQueue
    finals: JobQueue
    artifacts: Artifacts
    lease_s: float

    @property
    def name(self) -> str:
        return self.scores.name

    def upload(self, path: Path) -> FileRef:
        """Keeps a file that no single job made; it is listed with the study."""

        def send() -> FileRef:
            owner = optuna.load_study(study_name=self.name, storage=self.connection.storage)
            return self.artifacts.upload(path, owner)

        return self.patience(send)


@contextmanager
def shared_study(
    settings: SharedSettings,
    run_dir: Path,
    devices: Sequence[str],
    marks: Mapping[str, str],
    reporter: Reporter,
    should_stop: Callable[[], bool],
) -> Iterator[SharedStudy]:
    """`open_study` at the storage that the settings name.

    Raises:
        RunMismatchError: the study belongs to another run folder.
        StorageError, UsageError: see `connect` and `open_artifacts`.
    """
    with closing(connect(settings.storage)) as connection:
        patience = Patience(connection, reporter, should_stop)
        with open_study(connection, settings, run_dir, devices, marks, patience, reporter) as study:
            yield study


@contextmanager
def open_study(
    connection: Connection,
    settings: SharedSettings,
    run_dir: Path,
    devices: Sequence[str],
    marks: Mapping[str, str],
    patience: Patience,
    reporter: Reporter,
) -> Iterator[SharedStudy]:
    """The study of a run folder, made where it is new; workers are told when the search is over.

    Args:
        connection: the open storage.
        settings: where files go, and the lease.
        run_dir: the run folder; its name is that of the study.
        devices: name of each further device; the objectives are the score and the latency on each.
        marks: the run's fingerprint, to be shown.
        patience: with the storage.
        reporter: told when jobs of another version are taken back.

    Raises:
        RunMismatchError: the study belongs to another run folder.
        StorageError, UsageError: see `open_artifacts`.
    """
    place = settings.artifacts or str(run_dir.resolve() / "artifacts")
    artifacts = open_artifacts(place, connection.storage)
    name = run_dir.name
    file = run_dir / SHARED_FILE
    old = read_record(SharedRun, file) if file.exists() else None
    run = SharedRun(name, uuid.uuid4().hex if old is None else old.run_id, connection.where, artifacts.where)
    write_record(file, run)
    latencies = ["latency_ms", *(f"latency_ms on {device}" for device in devices)]
    _make_study(connection, patience, name, ["score", *latencies])
    _make_study(connection, patience, name + FINALS, ["top1"])
    scores, finals = JobQueue(connection, name, patience), JobQueue(connection, name + FINALS, patience)
    owner = scores.attributes().get("run_id")
    if owner is None:
        scores.say("run_id", run.run_id)
        owner = scores.attributes()["run_id"]
    if owner != run.run_id:
        raise RunMismatchError(
            f"{connection.where}: the study {name!r} belongs to another run folder. Choose another name "
            f"(--set run.dir=DIR; the folder's name is that of the study), or delete it with that of the finalists: "
            f"optuna delete-study --storage URL --study-name {quote(name)} (and {quote(name + FINALS)})"
        )
    mine = program()
    for queue in (scores, finals):  # before this program is named: no worker of it meets a job of another one
        _take_back(queue, content_hash(mine), reporter)
    for key, value in (
        ("program", mine),
        ("lease_s", settings.lease_s),
        ("artifacts", artifacts.where),
        ("fingerprint", dict(marks)),
        ("host", socket.gethostname()),
        ("state", "searching"),
    ):
        scores.say(key, value)
    yield SharedStudy(connection, patience, scores, finals, artifacts, settings.lease_s)
    scores.say("state", "finished")


def _take_back(queue: JobQueue, mine: str, reporter: Reporter) -> None:
    """Ends waiting jobs that another version of the program had queued: no worker of this one may take them.

    Whatever of them is still wanted is queued anew, with the checkpoint that it had got to. Jobs that are running are
    left to their workers: a result is a result, as one that lies in the run folder.
    """
    old = [job for job in queue.jobs() if job.state == TrialState.WAITING and job.program != mine]
    taken = sum(queue.fail(job.number, "outdated", "queued by another version of the program") for job in old)
    if taken:
        reporter.say(f"{queue.name}: jobs of another version of the program that nobody had begun, taken back: {taken}")


def _make_study(connection: Connection, patience: Patience, name: str, objectives: Sequence[str]) -> None:
    directions = ["maximize", *["minimize"] * (len(objectives) - 1)]

    def make() -> None:
        study = optuna.create_study(
            storage=connection.storage, study_name=name, directions=directions, load_if_exists=True
        )
        if len(study.directions) != len(objectives):
            raise RunMismatchError(
                f"{connection.where}: the study {name!r} has {len(study.directions)} objectives, this run "
                f"{len(objectives)}. Choose another name: --set run.dir=DIR"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))

    try:
        patience(make)
    except DuplicatedStudyError as e:
        raise RunMismatchError(f"{connection.where}: the study {name!r} was made by another process just now") from e


class Watch:
    """Tells which running jobs were not heard of for a lease.

    Args:
        lease_s: the lease.
        clock: seconds, of this process alone.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._heard: dict[tuple[str, int], tuple[int, float]] = {}

    def is_silent(self, queue: str, job: QueuedJob) -> bool:
        """Whether a running job's beat has stood still for a lease, as far as this was asked."""
        beat, since_s = self._heard.get((queue, job.number), (None, 0.0))
        if beat != job.beat:
            self._heard[queue, job.number] = (job.beat, self._clock())
            return False
        return self._clock() - since_s > self._lease_s

    def forget(self) -> None:
        """Begins anew: nobody could be heard for a while."""
        self._heard.clear()


class SharedPool:
    """Runs jobs by the workers of a shared study; what `WorkerPool` is on one machine.

    When a search is stopped it does not stop its workers: they do what is queued, and the same search finds the results
    when it goes on.

    Args:
        study: open.
        label: what the study is to show of a candidate that is scored.
        reporter: told of dead workers, and that there are none.
        clock, sleep: seconds.
    """

    def __init__(
        self,
        study: SharedStudy,
        label: Callable[[Candidate], JobLabel],
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._study, self._label, self._reporter = study, label, reporter
        self._clock, self._sleep = clock, sleep
        self._watch = Watch(study.lease_s, clock)
        self._outages = study.patience.outages
        self._keys: dict[str, str] = {}
        self._has_worker = False
        self._program = content_hash(program())

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Results in the order in which they are ready; arguments and errors as for `feed`."""
        todo = deque(jobs)
        yield from self.feed(function, lambda: todo.popleft() if todo else None, should_stop)

    def feed(
        self,
        function: Callable[[J], R],  # noqa: ARG002 - what a worker does follows from the type of the job
        next_job: Callable[[], J | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        """Results, as they are ready, of jobs that results may lead to. All jobs that there are now are queued at once.

        Args:
            function: what a job asks for: `score` or `finish_student`.
            next_job: the next job; None while there is none. It is asked again after every result, and the loop ends
                when no job is open and there is none.
            should_stop: asked while waiting.

        Raises:
            InterruptedRunError: `should_stop` said so.
            StorageError: the storage stayed away, or a file that a worker sent is not in the artifact store.
        """
        open_jobs: dict[str, tuple[J, SharedJob]] = {}
        started = self._clock()
        while True:
            while (job := next_job()) is not None:
                known = known_result(cast(Job, job))
                if known is not None:
                    yield JobResult(job, cast(R, known))
                    continue
                shared = self._packed(cast(Job, job))
                open_jobs[shared.key] = (job, shared)
            if not open_jobs:
                return
            if should_stop():
                raise InterruptedRunError("stopped; workers finish what is queued, and the next call takes it")
            decided = self._look(open_jobs)
            for key, value in decided:
                job, _ = open_jobs.pop(key)
                yield JobResult(job, cast(R, value))
            if open_jobs and not decided:
                self._tell_if_alone(started)
                self._sleep(POLL_S)

    def _look(self, open_jobs: Mapping[str, tuple[Any, SharedJob]]) -> list[tuple[str, Result | JobFailure]]:
        """What is decided by now; what is not there is queued, what has died is queued anew."""
        found: list[tuple[str, Result | JobFailure]] = []
        queues = {id(q): q for q in (self._queue(shared) for _, shared in open_jobs.values())}
        for queue in queues.values():
            jobs = queue.jobs()
            if self._study.patience.outages != self._outages:
                self._outages = self._study.patience.outages
                self._watch.forget()
            by_key: dict[str, list[QueuedJob]] = {}
            for queued in jobs:
                by_key.setdefault(queued.key, []).append(queued)
            for key, (job, shared) in open_jobs.items():
                if self._queue(shared) is queue:
                    value = self._decided(queue, job, shared, by_key.get(key, []))
                    if value is not None:
                        found.append((key, value))
        return found

    def _queue(self, shared: SharedJob) -> JobQueue:
        return self._study.scores if shared.score is not None else self._study.finals

    def _decided(
        self, queue: JobQueue, job: Job, shared: SharedJob, tries: Sequence[QueuedJob]
    ) -> Result | JobFailure | None:
        done = next((t for t in tries if t.state == TrialState.COMPLETE), None)
        alive = [t for t in tries if not t.state.is_finished()]
        if done is not None:
            for other in alive:
                queue.fail(other.number, "twice", f"trial {done.number} has the result")
            return self._taken(job, done)
        refused = next((t for t in tries if t.ended == "failure"), None)
        if refused is not None and not alive:
            return JobFailure(refused.reason)
        for number, other in enumerate(alive):
            if number > 0 and other.state == TrialState.WAITING:
                queue.fail(other.number, "twice", f"trial {alive[0].number} is the same job")
            elif other.state == TrialState.RUNNING:
                self._has_worker = True
                if self._watch.is_silent(queue.name, other):
                    reason = (
                        f"nothing was heard of its worker {other.worker or '(unknown)'} for {self._study.lease_s:g} s"
                    )
                    if queue.fail(other.number, "expired", reason):
                        self._reporter.warn(f"job {other.number}: {reason}; it is queued anew")
        if alive:
            return None
        deaths = [t for t in tries if t.ended in ("expired", "broken")]
        if len(deaths) >= MAX_DEATHS:
            return JobFailure(f"its workers ended {len(deaths)} times; the last: {deaths[-1].reason}")
        self._put(queue, job, shared, tries[-1] if tries else None)
        return None

    def _put(self, queue: JobQueue, job: Job, shared: SharedJob, before: QueuedJob | None) -> None:
        """Queues a job, with what the student's folder or the job's last worker has got to."""
        if before is None:
            inputs = tuple(self._study.upload(path) for path in job_inputs(job))
        else:
            inputs = before.inputs
        attributes: dict[str, Any] = {
            "candidate": job.candidate.arch_id,
            "precision": job.candidate.precision_label,
            "key": shared.key,
            "program": self._program,
            "job": to_plain(shared),
            "inputs": to_plain(inputs),
        }
        if before is not None:
            attributes["retry_of"] = before.number
        label = JobLabel({}, {}, ())
        if isinstance(job, ScoreJob):
            label = self._label(job.candidate)
            attributes |= {"epochs": job.epochs, "latency_ms": list(label.latency_ms)}
        queue.add(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=label.params,
                distributions=label.distributions,
                user_attrs=attributes,
            )
        )

    def _taken(self, job: Job, done: QueuedJob) -> Result:
        """Brings the files of a result into the student's folder, the record last."""
        self._has_worker = True
        folder = job_folder(job)
        for ref in in_order(done.result.files):
            target = folder / ref.name
            if not target.exists() or file_sha256(target) != ref.sha256:
                self._study.artifacts.fetch(ref, target)
        return read_result(job)

    def _packed(self, job: Job) -> SharedJob:
        return packed(job, self._context(job.context), self._supernet(job))

    def _context(self, path: str) -> str:
        file = Path(path)
        return self._bundled(path, lambda: context_key(file), lambda: context_bundle(file, self._study.upload))

    def _supernet(self, job: Job) -> str:
        if not isinstance(job, ScoreJob) or job.source != "supernet":
            return ""
        folder = Path(job.supernet)
        upload = partial(supernet_bundle, folder, self._study.upload)
        return self._bundled(job.supernet, lambda: supernet_key(folder), upload)

    def _bundled(self, path: str, key_of: Callable[[], str], upload: Callable[[], Bundle]) -> str:
        """Key of the bundle at a path; uploaded where the study does not have it."""
        if path not in self._keys:
            key = key_of()
            if bundle_attribute(key) not in self._study.scores.attributes():
                self._reporter.say(f"uploading {path} to {self._study.artifacts.where}")
                self._study.scores.say(bundle_attribute(key), upload())
            self._keys[path] = key
        return self._keys[path]

    def _tell_if_alone(self, started: float) -> None:
        if not self._has_worker and self._clock() - started > NOBODY_S:
            self._has_worker = True  # said once
            self._reporter.warn(f"no worker has taken a job yet. Start some: {worker_command(self._study)}")


def bundle_attribute(key: str) -> str:
    """Attribute of the study that holds a bundle."""
    return f"bundle:{key}"


def worker_command(study: SharedStudy) -> str:
    """What starts a worker, without the password."""
    return f"nas worker {quote(study.name)} --storage {quote(redacted(study.connection.where))}"
