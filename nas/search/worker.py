"""What a worker does: takes a waiting job of a shared study, trains in a process of its own, gives the result back.

The waiting process trains nothing: between two looks at its job it counts the job's beat up and uploads a checkpoint
that has changed, so that another worker goes on from there if this one dies. While it waits for files, a thread counts
the beat up: they may take longer than a lease.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from nas.core.errors import InterruptedRunError, RecordError, RunMismatchError, StorageError
from nas.core.jsonio import content_hash, file_sha256, from_plain
from nas.core.units import format_duration
from nas.recipe.finish import finish_student
from nas.recipe.pool import JobFailure, JobPool, JobResult
from nas.recipe.score import ScoreJob, score, student_folder
from nas.search.artifacts import FileRef, open_artifacts
from nas.search.progress import Reporter, StopFlag
from nas.search.shared_jobs import (
    Bundle,
    Job,
    SharedJob,
    SharedResult,
    head_score,
    in_order,
    job_folder,
    place_bundle,
    program,
    program_differences,
    student_files,
    unpacked,
)
from nas.search.shared_storage import Connection, Patience, connect, meanwhile
from nas.search.shared_study import BEATS_PER_LEASE, FINALS, JobQueue, QueuedJob, SharedStudy, bundle_attribute

FIRST_LOOK_S, LAST_LOOK_S = 0.5, 5.0  # between two looks for a job, on average: more while there is none
START_LIMIT_S = 60.0  # a wrong password should not be tried for longer
RUN_WAIT_S = 5.0  # between two looks for a run that is not there yet
TRANSFER_LIMIT_S = 3600.0  # a store that never answers must not hold a job for ever


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker joins.

    Fields:
        run: name of the run in the storage.
        storage: its address, see `connect`.
        cache: folder of this machine for images and shared weights.
        artifacts: the artifact store where it has another name here than where the search runs.
        idle_exit_s: ends the worker when there was nothing to do for so long; None: it waits for the end of the run.
        name: of the worker; by default that of the machine and the number of the process.
    """

    run: str
    storage: str
    cache: Path
    artifacts: str | None = None
    idle_exit_s: float | None = None
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """What a worker did: jobs with a result, jobs that failed, jobs given back or lost; and why it ended."""

    done: int = 0
    failed: int = 0
    given_back: int = 0
    ended: str = ""


def run_worker(settings: WorkerSettings, reporter: Reporter, stop: StopFlag, pool: JobPool) -> WorkerSummary:
    """Works until the run is over, there was nothing to do for `idle_exit_s`, or the stop flag is set.

    Args:
        settings: where and as whom.
        reporter: told of every job.
        stop: ends the job at its next epoch, which is then given back with its checkpoint.
        pool: runs one job at a time, in another process.

    Raises:
        RunMismatchError: this program or its libraries are others than where the search runs.
        StorageError: the storage stayed away, or a file cannot be had; a job that was begun is given back.
        UsageError: an address that cannot be used.
    """
    try:
        with closing(_connected(settings.storage, reporter, stop)) as connection:
            patience = Patience(connection, reporter, lambda: stop.is_set)
            joined = join(settings, connection, patience, reporter, stop)
            if joined is None:
                return WorkerSummary(ended=f"no run {settings.run!r} appeared")
            with tempfile.TemporaryDirectory(prefix="nas-worker-") as scratch:
                reporter.say(f"worker {settings.name} joined {settings.run}")
                return Worker(settings, joined, Path(scratch), reporter, stop, pool).run()
    except InterruptedRunError:  # while the storage was away: the search takes the job back by itself
        return WorkerSummary(ended="stopped")


def _connected(url: str, reporter: Reporter, stop: StopFlag) -> Connection:
    """The open storage; a worker that is started during an outage waits for its end.

    Raises:
        StorageError: it cannot be opened for `START_LIMIT_S`.
    """
    began = time.monotonic()
    is_told = False
    while True:
        try:
            return connect(url, connections=1)
        except StorageError as e:
            if stop.is_set:
                raise InterruptedRunError("stopped before it could join") from e
            if time.monotonic() - began > START_LIMIT_S:
                raise
            if not is_told:
                reporter.warn(f"{e}; trying again for {format_duration(START_LIMIT_S)}")
                is_told = True
        _sleep(FIRST_LOOK_S * random.uniform(1, 3), stop)


def join(
    settings: WorkerSettings, connection: Connection, patience: Patience, reporter: Reporter, stop: StopFlag
) -> SharedStudy | None:
    """The run, when it is there and ready; None where it did not come in time.

    Args:
        settings, reporter, stop: as in `run_worker`.
        connection: the open storage.
        patience: with it.

    Raises:
        RunMismatchError: this program or its libraries are others than where the search runs.
    """
    began = time.monotonic()
    told = False
    while not stop.is_set:
        try:
            scores = JobQueue(connection, settings.run, patience)
            finals = JobQueue(connection, settings.run + FINALS, patience)
            attributes = scores.attributes()
            if "state" in attributes:
                break
        except KeyError:
            pass
        if settings.idle_exit_s is not None and time.monotonic() - began > settings.idle_exit_s:
            return None
        if not told:
            reporter.say(f"{connection.where} holds no run {settings.run!r} yet; waiting for its nas search")
            told = True
        _sleep(RUN_WAIT_S, stop)
    else:
        return None
    differences = program_differences(searched_by(settings.run, attributes))
    if differences:
        raise RunMismatchError(
            f"run {settings.run}: this worker is not the same program as its search (search -> worker):\n"
            + "\n".join(differences)
            + "\nInstall the same version here (make setup in the same checkout), then start the worker again"
        )
    place = settings.artifacts or from_plain(str, attributes.get("artifacts"), f"{settings.run}: artifacts")
    lease_s = from_plain(float, attributes.get("lease_s"), f"{settings.run}: lease_s")
    return SharedStudy(connection, patience, scores, finals, open_artifacts(place, connection.storage), lease_s)


def searched_by(run: str, attributes: Mapping[str, Any]) -> dict[str, str]:
    """The program that searches, from the attributes of its study."""
    return from_plain(dict[str, str], attributes.get("program"), f"{run}: program")


def _sleep(seconds: float, stop: StopFlag) -> None:
    end = time.monotonic() + seconds
    while not stop.is_set and (left := end - time.monotonic()) > 0:
        time.sleep(min(0.2, left))


class Worker:
    """The loop of one worker; made by `run_worker`.

    Args:
        settings: as given.
        joined: the open run.
        scratch: folder for the student of the current job.
        reporter, stop, pool: as in `run_worker`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        joined: SharedStudy,
        scratch: Path,
        reporter: Reporter,
        stop: StopFlag,
        pool: JobPool,
    ) -> None:
        self._settings, self._joined, self._scratch = settings, joined, scratch
        self._reporter, self._stop, self._pool = reporter, stop, pool
        self._students = scratch / "students"
        self._places: dict[str, str] = {}
        self._program = content_hash(program())
        self._summary = WorkerSummary()

    def run(self) -> WorkerSummary:
        """Job after job; see `run_worker`."""
        idle_since, pause_s = time.monotonic(), FIRST_LOOK_S
        while not self._stop.is_set:
            if self.one():
                idle_since, pause_s = time.monotonic(), FIRST_LOOK_S
                continue
            if self._joined.scores.attributes().get("state") == "finished":
                return replace(self._summary, ended="the run is finished")
            idle_s = time.monotonic() - idle_since
            if self._settings.idle_exit_s is not None and idle_s > self._settings.idle_exit_s:
                return replace(self._summary, ended=f"nothing to do for {format_duration(idle_s)}")
            _sleep(pause_s * random.uniform(0.5, 1.5), self._stop)  # workers that began together look apart
            pause_s = min(1.5 * pause_s, LAST_LOOK_S)
        return replace(self._summary, ended="stopped")

    def one(self) -> bool:
        """Does one job; False where there is none."""
        for queue in (self._joined.finals, self._joined.scores):
            for waiting in queue.jobs():
                if waiting.state == TrialState.WAITING:
                    if waiting.program != self._program:
                        self._check_program()
                        continue  # left by another version; the search takes it back
                    job = waiting.job
                    self._place(job)  # before it is taken: images may take longer than a lease
                    if queue.claim(waiting.number):
                        self._do(queue, waiting, job)
                        return True
        return False

    def _check_program(self) -> None:
        """Raises:
        RunMismatchError: the search is not the program any more that it was when this worker joined.
        """
        differences = program_differences(searched_by(self._settings.run, self._joined.scores.attributes()))
        if differences:
            raise RunMismatchError(
                f"run {self._settings.run}: its search was begun again by another version of the program (search -> "
                "worker):\n" + "\n".join(differences) + "\nInstall that here, then start the worker again"
            )

    def _place(self, job: SharedJob) -> None:
        for key in job.bundles:
            if key not in self._places:
                name = bundle_attribute(key)
                bundle = from_plain(Bundle, self._joined.scores.attributes().get(name), name)
                self._places[key] = place_bundle(bundle, key, self._joined.artifacts, self._settings.cache)

    def _do(self, queue: JobQueue, claimed: QueuedJob, job: SharedJob) -> None:
        """One job that is this worker's own."""
        number = claimed.number
        queue.note(number, "worker", self._settings.name)
        for part in (self._students, self._scratch / "snapshots"):
            shutil.rmtree(part, ignore_errors=True)
        stop_file = self._scratch / "stop"
        stop_file.unlink(missing_ok=True)
        folder = student_folder(str(self._students), job.candidate.arch_id)
        folder.mkdir(parents=True)
        supernet = self._places.get(job.supernet, "")
        local = unpacked(job, self._places[job.context], self._students, supernet, stop_file)
        progress = JobProgress(queue, claimed, folder, self._scratch, self._joined, self._stop, self._reporter)
        try:
            with progress.alive():
                for ref in in_order(claimed.inputs):
                    self._joined.artifacts.fetch(ref, folder / ref.name)
            self._finish(queue, claimed, local, self._result(local, progress), progress)
        except InterruptedRunError:
            progress.upload(patiently=True)
            if queue.fail(number, "returned", f"worker {self._settings.name} was stopped"):
                self._reporter.say(f"job {number}: given back")
            self._summary = replace(self._summary, given_back=self._summary.given_back + 1)
        except (StorageError, RecordError) as e:
            queue.fail(number, "broken", f"{self._settings.name}: {e}")
            raise

    def _result(self, local: Job, progress: JobProgress) -> JobResult[Any, Any]:
        """What comes of a job; InterruptedRunError where it was told to stop."""
        if isinstance(local, ScoreJob):
            return next(iter(self._pool.map(score, [local], progress.tick)))
        return next(iter(self._pool.map(finish_student, [local], progress.tick)))

    def _finish(
        self, queue: JobQueue, claimed: QueuedJob, local: Job, result: JobResult[Any, Any], progress: JobProgress
    ) -> None:
        number, name = claimed.number, claimed.trial.user_attrs.get("candidate", "")
        if isinstance(result.value, JobFailure):
            queue.fail(number, "failure", result.value.reason)
            self._summary = replace(self._summary, failed=self._summary.failed + 1)
            self._reporter.warn(f"job {number} ({name}): {result.value.reason}")
            return
        folder = job_folder(local)
        head = head_score(local)
        value = head.score if isinstance(local, ScoreJob) else head.top1[-1]  # a finished student is not compared here
        kind = "score" if isinstance(local, ScoreJob) else "accuracy"
        files = progress.uploaded(student_files(folder), patiently=True)
        is_taken = (
            files is not None
            and queue.note(number, "result", SharedResult(files, head.top1[-1]))
            and queue.complete(number, (value, *claimed.latency_ms))
        )
        if is_taken or queue.read(number).state == TrialState.COMPLETE:
            self._summary = replace(self._summary, done=self._summary.done + 1)
            self._reporter.say(f"job {number} ({name}): {kind} {100 * value:.1f} %")
        else:
            self._summary = replace(self._summary, given_back=self._summary.given_back + 1)
            self._reporter.warn(f"job {number} ({name}): the search had given it to another worker; result dropped")


class JobProgress:
    """Keeps a job alive in the study while it is worked on, and its last checkpoint in the artifact store.

    Args:
        queue: where the job is.
        job: as it was claimed.
        folder: the student's, where checkpoints appear.
        scratch: of the worker; the file `stop` in it ends the job at its next epoch.
        joined: the run.
        stop: of the worker.
        reporter: told when the job is lost.
        clock: seconds.
    """

    def __init__(
        self,
        queue: JobQueue,
        job: QueuedJob,
        folder: Path,
        scratch: Path,
        joined: SharedStudy,
        stop: StopFlag,
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._job, self._folder, self._scratch = queue, job, folder, scratch
        self._joined, self._stop, self._reporter, self._clock = joined, stop, reporter, clock
        self._every_s = joined.lease_s / BEATS_PER_LEASE
        self._beat = 0
        self._due = -1.0
        self._inputs: dict[str, FileRef] = {ref.name: ref for ref in job.inputs}
        self._own: set[str] = set()  # artifacts of this worker, which it may replace
        self._is_lost = False
        self._is_told = False

    def tick(self) -> bool:
        """Called again and again while the job runs: True when it is to be stopped."""
        if self._clock() >= self._due and not self._is_lost:
            try:
                self._count()
                if not self._is_lost:
                    self.upload(patiently=False)
            except self._joined.connection.errors as e:
                if not self._joined.connection.is_away(e):
                    raise
                # The training goes on; the search counts no silence while the storage is away from it, too.
            except StorageError as e:
                if not self._is_told:
                    self._reporter.warn(f"job {self._job.number}: {e}; it goes on, its checkpoint is tried again")
                    self._is_told = True
            self._due = self._clock() + self._every_s
            if self._is_lost:
                self._reporter.warn(f"job {self._job.number}: the search took it back")
        if self._stop.is_set or self._is_lost:
            (self._scratch / "stop").touch()
        return self._stop.is_set or self._is_lost

    def _count(self) -> None:
        """Counts the beat up, or notices that the job is lost."""
        self._beat += 1
        if not self._queue.note_once(self._job.number, "beat", self._beat):
            self._is_lost = True

    def alive(self) -> AbstractContextManager[None]:
        """Meanwhile the beat is counted up by a thread: what is done takes long and cannot be interrupted."""

        def beat(over: Event) -> None:
            end = time.monotonic() + TRANSFER_LIMIT_S
            while not over.wait(self._every_s) and not self._is_lost and time.monotonic() < end:
                # What goes wrong here goes wrong for the waiting thread too, which tells it.
                with suppress(*self._joined.connection.errors):
                    self._count()

        return meanwhile(beat)

    def upload(self, patiently: bool) -> None:
        """Uploads checkpoints that changed, then names them in the study, then removes those they replace.

        Args:
            patiently: whether to wait for a storage that is away.
        """
        if self._is_lost:
            return
        before = dict(self._inputs)
        refs = self.uploaded(self._snapshots(), patiently)
        inputs = before | {ref.name: ref for ref in refs or ()}
        if inputs == before:
            return
        note = self._queue.note if patiently else self._queue.note_once
        if note(self._job.number, "inputs", list(inputs.values())):
            self._inputs = inputs
            replaced = [old for name, old in before.items() if old != inputs[name] and old.artifact in self._own]
            self._joined.artifacts.forget(replaced)

    def _snapshots(self) -> list[Path]:
        """The checkpoints as they are now, under the same names elsewhere: the training goes on replacing its own."""
        folder = self._scratch / "snapshots"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        taken = []
        for path in self._folder.glob("*.ckpt"):
            target = folder / path.name
            try:
                target.hardlink_to(path)
            except FileNotFoundError:  # removed this moment: the job is about to end
                continue
            taken.append(target)
        return taken

    def uploaded(self, paths: Sequence[Path], patiently: bool) -> tuple[FileRef, ...] | None:
        """References of files in the store, those that are there already included; None where the job is lost."""
        known = {(ref.name, ref.sha256): ref for ref in self._inputs.values()}
        refs = []
        with self.alive():
            for path in paths:
                if self._is_lost:
                    return None
                same = known.get((path.name, file_sha256(path)))
                if same is None:
                    send = partial(self._joined.artifacts.upload, path, self._job.trial)
                    try:
                        same = self._joined.patience(send) if patiently else send()
                    except UpdateFinishedTrialError:
                        self._is_lost = True
                        return None
                    self._own.add(same.artifact)
                refs.append(same)
        return tuple(refs)
