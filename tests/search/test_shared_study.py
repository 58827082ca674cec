"""Jobs of a search through a shared study: taken once, given back, queued anew, with the same scores as on one machine.

Search and workers take turns in one process on an in-memory storage, and time is told: nothing here depends on chance.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from search_examples import InProcessPool, Notes, Prepared

from nas.core.errors import InterruptedRunError, RecordError, RunMismatchError, StorageError
from nas.core.jsonio import canonical_json, from_plain, parse_json
from nas.core.records import Candidate
from nas.recipe.context import open_context
from nas.recipe.finish import FinishJob, finish_student, finished_logits
from nas.recipe.pool import J, JobFailure, JobResult, R
from nas.recipe.records import ScoredStudent, read_logits, read_scored
from nas.recipe.score import ScoreJob, score, student_folder
from nas.search.artifacts import Artifacts, FileRef
from nas.search.progress import StopFlag
from nas.search.scoring import ScoringPlan
from nas.search.shared_jobs import SharedJob, SharedResult, packed, program, program_differences, unpacked
from nas.search.shared_storage import Connection, Patience
from nas.search.shared_study import (
    MAX_DEATHS,
    QueuedJob,
    SharedPool,
    SharedSettings,
    SharedStudy,
    Watch,
    labels,
    open_study,
)
from nas.search.worker import JobProgress, Worker, WorkerSettings, join

LEASE_S = 60.0


class FailingPool(InProcessPool):
    """Every job diverges."""

    def map(
        self, function: Callable[[J], R], jobs: Sequence[J], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[JobResult[J, R]]:
        del function, should_stop
        yield from (JobResult(job, JobFailure("training diverged in epoch 2")) for job in jobs)


@dataclass
class StoppedPool(InProcessPool):
    """The worker is told to stop while the job is in its first epoch."""

    stop: StopFlag

    def map(
        self, function: Callable[[J], R], jobs: Sequence[J], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[JobResult[J, R]]:
        assert not should_stop()
        self.stop.set()
        assert should_stop()  # which tells the job by its file
        yield from InProcessPool().map(function, jobs)


@dataclass
class Scene:
    """A search and its workers around one storage."""

    folder: Path
    storage: optuna.storages.BaseStorage = field(default_factory=optuna.storages.InMemoryStorage)
    now_s: float = 0.0
    notes: Notes = field(default_factory=Notes)
    turns: list[Callable[[], object]] = field(default_factory=list)

    @property
    def connection(self) -> Connection:
        return Connection(self.storage, "memory", (ConnectionError,), lambda _: True)

    @property
    def patience(self) -> Patience:
        return Patience(self.connection, self.notes)

    def study(self, name: str = "run") -> SharedStudy:
        """The study of a run folder, as its search opens it."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        settings = SharedSettings("memory", lease_s=LEASE_S)
        opened = open_study(self.connection, settings, self.folder / name, (), {"data": "x"}, self.patience, self.notes)
        return opened.__enter__()

    def pool(self, study: SharedStudy, prepared: Prepared) -> SharedPool:
        """The search's pool; whenever it waits, the next of `turns` happens."""
        label = labels(prepared.inputs.space, lambda _: (1.5,))
        return SharedPool(study, label, self.notes, lambda: self.now_s, self._turn)

    def _turn(self, _: float) -> None:
        assert self.turns, "the search waits for a worker that does not come"
        self.turns.pop(0)()

    def worker(
        self,
        name: str,
        pool: InProcessPool | None = None,
        stop: StopFlag | None = None,
        idle_exit_s: float | None = None,
    ) -> Worker:
        """A worker that joined."""
        settings = WorkerSettings("run", "memory", self.folder / "cache", None, idle_exit_s, name)
        flag = stop or StopFlag()
        joined = join(settings, self.connection, self.patience, self.notes, flag)
        assert joined is not None
        scratch = self.folder / f"scratch-{name}"
        scratch.mkdir()
        return Worker(settings, joined, scratch, self.notes, flag, pool or InProcessPool())

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def plan(prepared: Prepared, folder: Path, rungs: tuple[int, ...] = (0,)) -> ScoringPlan:
    """Jobs with inherited weights, or with a training of their own where there are rungs."""
    e = prepared.inputs.experiment
    source = "supernet" if rungs == (0,) else "standalone"
    distill = replace(e.distill, epochs=max(rungs[-1], 1))
    students, stop = str(folder / "run" / "students"), str(folder / "run" / "stop")
    return ScoringPlan(
        source,
        prepared.context,
        students,
        str(prepared.supernet),
        stop,
        distill,
        rungs,
        0.5,
        0,
        16,  # type: ignore[arg-type]
    )


def candidates(prepared: Prepared, count: int) -> list[Candidate]:
    space = prepared.inputs.space
    rng = np.random.default_rng(3)
    found = {space.decode(space.sample(rng)).architecture.arch_id: space.decode(space.sample(rng)) for _ in range(40)}
    return list({c.arch_id: c for c in found.values()}.values())[:count]


def logits_of(job: ScoreJob, result: JobResult[ScoreJob, ScoredStudent]) -> bytes:
    assert isinstance(result.value, ScoredStudent)
    return read_logits(student_folder(job.students, job.candidate.arch_id), result.value).tobytes()


def local(job: ScoreJob, folder: Path) -> bytes:
    """The logits that this machine computes by itself."""
    alone = replace(job, students=str(folder / "alone"))
    return logits_of(alone, JobResult(alone, score(alone)))


def states(study: SharedStudy) -> list[str]:
    return [job.state.name for job in study.scores.jobs()]


def test_two_workers_share_the_jobs_and_the_scores_are_those_of_one_machine(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(c, 0) for c in candidates(prepared, 3)]
    first, second = scene.worker("a"), scene.worker("b")
    scene.turns = [first.one, second.one, first.one]
    results = {r.job: r for r in scene.pool(study, prepared).map(score, jobs)}
    assert set(results) == set(jobs)
    for job in jobs:
        assert logits_of(job, results[job]) == local(job, scene.folder)
        value = results[job].value
        assert isinstance(value, ScoredStudent) and value.cost_s > 0
    assert [job.worker for job in study.scores.jobs()] == ["a", "b", "a"]
    assert not first.one() and not second.one()


def test_the_study_shows_genes_score_and_predicted_latency(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    [candidate] = candidates(prepared, 1)
    job = plan(prepared, scene.folder).job(candidate, 0)
    scene.turns = [scene.worker("a").one]
    [result] = scene.pool(study, prepared).map(score, [job])
    assert isinstance(result.value, ScoredStudent)
    shown = optuna.load_study(study_name="run", storage=scene.storage)
    [trial] = shown.trials
    assert shown.metric_names == ["score", "latency_ms"]
    assert trial.values == [result.value.score, 1.5] != [result.value.top1[-1], 1.5]
    assert trial.params["b.width"] == candidate.stages[1].blocks[0].out_channels
    assert not any("threshold" in name for name in trial.params)
    assert trial.user_attrs["candidate"] == candidate.arch_id
    assert trial.user_attrs["worker"] == "a"


def test_a_job_of_a_dead_worker_is_queued_anew_and_its_late_result_refused(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(c, 0) for c in candidates(prepared, 1)]
    second = scene.worker("b")
    claimed: list[QueuedJob] = []

    def claim() -> None:
        [waiting] = study.scores.jobs()
        assert study.scores.claim(waiting.number)
        assert not study.scores.claim(waiting.number)
        study.scores.note(waiting.number, "worker", "a")
        claimed.append(waiting)

    def beat(number: int) -> Callable[[], object]:
        return lambda: (study.scores.note(claimed[0].number, "beat", number), scene.pass_s(0.9 * LEASE_S))

    def late() -> None:
        assert not study.scores.note(claimed[0].number, "result", "too late")
        assert not study.scores.complete(claimed[0].number, (0.9, 1.0))

    scene.turns = [
        claim,
        beat(1),
        beat(2),
        lambda: scene.pass_s(0.9 * LEASE_S),
        lambda: scene.pass_s(0.2 * LEASE_S),
        late,
        second.one,
    ]
    [result] = scene.pool(study, prepared).map(score, jobs)
    assert logits_of(jobs[0], result) == local(jobs[0], scene.folder)
    old, new = study.scores.jobs()
    assert (old.state, old.ended, new.state) == (TrialState.FAIL, "expired", TrialState.COMPLETE)
    assert new.trial.user_attrs["retry_of"] == old.number
    assert scene.notes.warned == ["job 0: nothing was heard of its worker a for 60 s; it is queued anew"]


def test_a_worker_that_is_stopped_gives_its_checkpoint_back_and_another_goes_on(
    scene: Scene, prepared: Prepared
) -> None:
    study = scene.study()
    job = plan(prepared, scene.folder, (3,)).job(candidates(prepared, 1)[0], 3)
    stop = StopFlag()
    first, second = scene.worker("a", StoppedPool(stop), stop), scene.worker("b")
    epochs: list[list[str]] = []

    def note_inputs() -> None:
        epochs.append([ref.name for ref in study.scores.jobs()[-1].inputs])

    scene.turns = [first.one, note_inputs, second.one]
    [result] = scene.pool(study, prepared).map(score, [job])
    old, new = study.scores.jobs()
    assert (old.ended, old.reason) == ("returned", "worker a was stopped")
    assert epochs == [["score-3.ckpt"]]
    assert new.trial.user_attrs["retry_of"] == old.number
    assert logits_of(job, result) == local(job, scene.folder)
    assert (student_folder(job.students, job.candidate.arch_id) / "score-3.ckpt").exists()


def test_a_longer_training_goes_on_from_the_checkpoint_of_the_rung_before(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    candidate = candidates(prepared, 1)[0]
    rungs = plan(prepared, scene.folder, (1, 3))
    scene.turns = [scene.worker("a").one, scene.worker("b").one]
    pool = scene.pool(study, prepared)
    for epochs in rungs.rungs:
        [result] = pool.map(score, [rungs.job(candidate, epochs)])
    assert [[ref.name for ref in job.inputs][:1] for job in study.scores.jobs()] == [[], ["score-1.ckpt"]]
    assert logits_of(rungs.job(candidate, 3), result) == local(rungs.job(candidate, 3), scene.folder)


def test_finalists_are_distilled_by_workers(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    candidate = candidates(prepared, 1)[0].architecture
    layers = len(candidate.stages) + 2
    distill = prepared.inputs.experiment.distill
    folder = scene.folder / "run" / "students" / candidate.arch_id
    job = FinishJob(
        candidate, prepared.context, str(folder), str(scene.folder / "stop"), distill, 0, 16, (("int8",) * layers,)
    )
    scene.turns = [scene.worker("a").one]
    [result] = scene.pool(study, prepared).map(finish_student, [job])
    assert not isinstance(result.value, JobFailure)
    alone = replace(job, folder=str(scene.folder / "alone" / candidate.arch_id))
    assert finish_student(alone).candidate == result.value.candidate
    for split in ("val", "test"):
        for precision in (("fp32",), ("int8",) * layers):
            here, there = (finished_logits(Path(j.folder), split, precision) for j in (job, alone))
            assert np.array_equal(here, there)
    [trial] = optuna.load_study(study_name="run.finals", storage=scene.storage).trials
    scored = read_scored(Path(job.folder), "final-val-fp32")
    assert scored is not None and trial.values == [scored.top1[-1]]  # accuracy: what finished students have
    assert study.scores.jobs() == []
    [again] = scene.pool(study, prepared).map(finish_student, [job])  # no turn is left: it is known
    assert again.value == result.value


def test_a_training_that_fails_is_a_result_and_is_not_tried_again(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)]
    scene.turns = [scene.worker("a", FailingPool()).one]
    [result] = scene.pool(study, prepared).map(score, jobs)
    assert result.value == JobFailure("training diverged in epoch 2")
    assert states(study) == ["FAIL"]
    [again] = scene.pool(study, prepared).map(score, jobs)
    assert again.value == result.value


def test_a_job_that_ends_one_worker_after_the_other_is_a_failure(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)]

    def die() -> None:
        assert study.scores.claim(study.scores.jobs()[-1].number)

    scene.turns = [die, lambda: scene.pass_s(LEASE_S + 1), lambda: None] * MAX_DEATHS
    [result] = scene.pool(study, prepared).map(score, jobs)
    assert isinstance(result.value, JobFailure)
    assert result.value.reason.startswith(
        f"its workers ended {MAX_DEATHS} times; the last: nothing was heard of its worker"
    )
    assert states(study) == ["FAIL"] * MAX_DEATHS


def test_a_search_that_goes_on_takes_what_was_done_meanwhile_and_queues_nothing_twice(
    scene: Scene, prepared: Prepared
) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(c, 0) for c in candidates(prepared, 2)]
    is_stopped: list[bool] = []
    scene.turns = [lambda: is_stopped.append(True)]
    with pytest.raises(InterruptedRunError, match="workers finish what is queued"):
        list(scene.pool(study, prepared).map(score, jobs, lambda: bool(is_stopped)))
    worker = scene.worker("a")
    assert worker.one() and worker.one() and not worker.one()
    again = scene.study()
    assert again.scores.attributes()["state"] == "searching"
    results = list(scene.pool(again, prepared).map(score, jobs))
    assert sorted(r.job.candidate.arch_id for r in results) == sorted(j.candidate.arch_id for j in jobs)
    assert states(again) == ["COMPLETE", "COMPLETE"]


def test_a_job_that_was_queued_twice_is_done_once(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)]

    def queue_again() -> None:  # what an outage in the middle of a write can leave
        [waiting] = study.scores.jobs()
        copy = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=waiting.trial.user_attrs)
        study.scores.add(copy)

    scene.turns = [queue_again, lambda: None, scene.worker("a").one]
    assert len(list(scene.pool(study, prepared).map(score, jobs))) == 1
    assert [(j.state.name, j.ended) for j in study.scores.jobs()] == [("COMPLETE", ""), ("FAIL", "twice")]


def test_while_the_storage_is_away_no_worker_is_taken_for_dead() -> None:
    now = [0.0]
    watch = Watch(LEASE_S, lambda: now[0])
    job = QueuedJob(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"beat": 4}))
    assert not watch.is_silent("run", job)
    now[0] += 0.9 * LEASE_S
    assert not watch.is_silent("run", job)
    watch.forget()
    now[0] += 10 * LEASE_S
    assert not watch.is_silent("run", job)
    now[0] += LEASE_S + 1
    assert watch.is_silent("run", job)


def test_a_worker_of_another_program_is_refused_with_the_difference(scene: Scene) -> None:
    study = scene.study()
    study.scores.say("program", {**program(), "torch": "2.6.0", "code": "0123456789ab"})
    with pytest.raises(RunMismatchError, match="this worker is not the same program") as e:
        scene.worker("a")
    assert f"torch: 2.6.0 -> {program()['torch']}" in str(e.value)
    assert "code: 0123456789ab -> " in str(e.value)
    assert "numpy" not in str(e.value)
    assert program_differences(program()) == []


def test_the_program_is_what_was_loaded_not_what_lies_on_the_disk_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = program()
    monkeypatch.setattr(sys.modules["nas"], "__file__", str(tmp_path / "__init__.py"))  # as if its files were replaced
    assert program() == before


def test_a_worker_is_refused_when_the_search_goes_on_with_another_version(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    worker = scene.worker("a")
    [candidate] = candidates(prepared, 1)
    shared = packed(plan(prepared, scene.folder).job(candidate, 0), "x", "y")
    attributes = {"job": parse_json(canonical_json(shared), ""), "program": "another"}
    study.scores.add(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes))
    assert not worker.one()  # the search is still the same: it is the job that is older
    study.scores.say("program", {**program(), "torch": "2.6.0"})
    with pytest.raises(RunMismatchError, match="begun again by another version") as e:
        worker.one()
    assert f"torch: 2.6.0 -> {program()['torch']}" in str(e.value)
    assert states(study) == ["WAITING"]


def test_jobs_of_an_older_program_are_taken_back_and_queued_anew_where_they_are_still_wanted(
    scene: Scene, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (plan(prepared, scene.folder, (1,)).job(c, 1) for c in candidates(prepared, 2))
    is_stopped: list[bool] = []
    with monkeypatch.context() as older:
        older.setattr("nas.search.shared_study.program", lambda: {**program(), "torch": "2.6.0"})
        study = scene.study()
        scene.turns = [lambda: is_stopped.append(True)]
        with pytest.raises(InterruptedRunError):
            list(scene.pool(study, prepared).map(score, [first, second], lambda: bool(is_stopped)))
        [_, running] = study.scores.jobs()
        assert study.scores.claim(running.number)  # by a worker that began before the upgrade, and goes on with it
    study = scene.study()
    assert [(j.state.name, j.ended) for j in study.scores.jobs()] == [("FAIL", "outdated"), ("RUNNING", "")]
    scene.turns = [scene.worker("new").one]
    [result] = scene.pool(study, prepared).map(score, [first])
    assert logits_of(first, result) == local(first, scene.folder)
    assert study.scores.jobs()[-1].trial.user_attrs["retry_of"] == 0
    assert "run: jobs of another version of the program that nobody had begun, taken back: 1" in scene.notes.said


def test_a_study_of_another_run_folder_is_refused(scene: Scene) -> None:
    scene.study()
    shutil.rmtree(scene.folder / "run")
    with pytest.raises(RunMismatchError, match="the study 'run' belongs to another run folder") as e:
        scene.study()
    assert "optuna delete-study" in str(e.value)


def test_a_worker_ends_when_the_run_is_over_or_when_it_has_been_idle(scene: Scene) -> None:
    study = scene.study()
    assert scene.worker("a", idle_exit_s=0.0).run().ended.startswith("nothing to do for")
    study.scores.say("state", "finished")
    assert scene.worker("b").run().ended == "the run is finished"


def test_a_worker_that_cannot_write_gives_the_job_back_and_ends(scene: Scene, prepared: Prepared) -> None:
    class Full(InProcessPool):
        def map(
            self, function: Callable[[J], R], jobs: Sequence[J], should_stop: Callable[[], bool] = lambda: False
        ) -> Iterator[JobResult[J, R]]:
            del function, jobs, should_stop
            raise StorageError("students/x: cannot be written: no space left")

    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)]

    def breaks() -> None:
        with pytest.raises(StorageError, match="no space left"):
            scene.worker("a", Full()).one()

    scene.turns = [breaks, lambda: None, scene.worker("b").one]
    [result] = scene.pool(study, prepared).map(score, jobs)
    assert isinstance(result.value, ScoredStudent)
    assert [(j.ended, j.state.name) for j in study.scores.jobs()] == [("broken", "FAIL"), ("", "COMPLETE")]


def test_a_job_without_a_worker_says_how_to_start_one(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    jobs = [plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)]
    scene.turns = [lambda: scene.pass_s(20), lambda: None, scene.worker("a").one]
    assert len(list(scene.pool(study, prepared).map(score, jobs))) == 1
    assert scene.notes.warned == ["no worker has taken a job yet. Start some: nas worker run --storage memory"]


def test_a_job_travels_as_plain_json_without_paths(prepared: Prepared, tmp_path: Path) -> None:
    job = plan(prepared, tmp_path).job(candidates(prepared, 1)[0], 0)
    shared = packed(job, "context-key", "supernet-key")
    text = canonical_json(shared)
    assert str(tmp_path) not in text and prepared.context not in text
    back = from_plain(SharedJob, parse_json(text, "job"), "job")
    assert back == shared and back.key == shared.key
    placed = unpacked(back, prepared.context, Path(job.students), job.supernet, Path(job.stop_file))
    assert placed == job
    assert packed(replace(job, seed=1), "context-key", "supernet-key").key != shared.key


def test_a_job_or_result_that_does_not_fit_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    plain = parse_json(
        canonical_json(packed(plan(prepared, tmp_path).job(candidates(prepared, 1)[0], 0), "c", "s")), ""
    )
    for change, message in (
        ({"run": "rm"}, "unknown field 'run'"),
        ({"score": None}, "needs either score or finish"),
        ({"context": 3}, "expected str"),
    ):
        with pytest.raises(RecordError, match=message):
            from_plain(SharedJob, plain | change, "job")
    with pytest.raises(RecordError, match="must be a share 0-1"):
        SharedResult((), 1.5)


@dataclass
class Held:
    """A job that a worker has just taken."""

    study: SharedStudy
    progress: JobProgress
    number: int
    folder: Path


def held(scene: Scene, prepared: Prepared, lease_s: float) -> Held:
    study = scene.study()
    job = packed(plan(prepared, scene.folder, (2,)).job(candidates(prepared, 1)[0], 2), "c", "")
    attributes = {"job": parse_json(canonical_json(job), ""), "inputs": []}
    study.scores.add(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes))
    [claimed] = study.scores.jobs()
    assert study.scores.claim(claimed.number)
    folder, scratch = scene.folder / "student", scene.folder / "scratch"
    folder.mkdir()
    scratch.mkdir()
    joined = replace(study, lease_s=lease_s)
    progress = JobProgress(study.scores, claimed, folder, scratch, joined, StopFlag(), scene.notes, lambda: scene.now_s)
    return Held(study, progress, claimed.number, folder)


def test_a_checkpoint_that_changed_replaces_the_one_before(scene: Scene, prepared: Prepared) -> None:
    job = held(scene, prepared, LEASE_S)
    scores = job.study.scores
    kept = []
    for content in (b"one", b"two", b"two"):
        (job.folder / "score-2.ckpt").write_bytes(content)
        assert not job.progress.tick()
        kept.append(scores.read(job.number).inputs)
        scene.pass_s(LEASE_S)
    assert kept[0] != kept[1] == kept[2]
    assert [p.read_bytes() for p in (scene.folder / "run" / "artifacts").iterdir()] == [b"two"]
    assert scores.read(job.number).beat == 3
    assert scores.fail(job.number, "expired", "test")
    assert job.progress.tick()
    assert (scene.folder / "scratch" / "stop").exists()
    assert scene.notes.warned == ["job 0: the search took it back"]


def test_an_upload_that_lasts_longer_than_a_lease_does_not_cost_the_job(
    scene: Scene, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = held(scene, prepared, lease_s=0.2)
    upload = Artifacts.upload

    def slow(self: Artifacts, path: Path, owner: optuna.trial.FrozenTrial) -> FileRef:
        until, before = time.monotonic() + 20, job.study.scores.read(job.number).beat
        while job.study.scores.read(job.number).beat < before + 5:  # more than a lease has of them
            assert time.monotonic() < until, "nobody counts the beat up during the upload"
            time.sleep(0.01)
        return upload(self, path, owner)

    monkeypatch.setattr(Artifacts, "upload", slow)
    (job.folder / "score-2.ckpt").write_bytes(b"content")
    assert not job.progress.tick()
    assert [ref.name for ref in job.study.scores.read(job.number).inputs] == ["score-2.ckpt"]
    (job.folder / "score.json").write_bytes(b"result")
    files = job.progress.uploaded([job.folder / "score.json"], patiently=True)
    assert files is not None
    beat = job.study.scores.read(job.number).beat
    assert beat >= 11  # one of the tick, five of each upload
    time.sleep(0.2)
    assert job.study.scores.read(job.number).beat == beat  # not any longer than it is uploaded


def test_a_checkpoint_that_the_store_refuses_is_tried_again_and_the_training_goes_on(
    scene: Scene, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = held(scene, prepared, LEASE_S)
    (job.folder / "score-2.ckpt").write_bytes(b"content")
    with monkeypatch.context() as broken:

        def refuse(*_: object) -> None:
            raise StorageError("s3://nas: slow down")

        broken.setattr(Artifacts, "upload", refuse)
        for _ in range(2):
            assert not job.progress.tick()
            scene.pass_s(LEASE_S)
    assert scene.notes.warned == ["job 0: s3://nas: slow down; it goes on, its checkpoint is tried again"]
    assert not job.progress.tick()
    assert [ref.name for ref in job.study.scores.read(job.number).inputs] == ["score-2.ckpt"]


def test_a_context_is_the_same_elsewhere(scene: Scene, prepared: Prepared) -> None:
    study = scene.study()
    job = plan(prepared, scene.folder).job(candidates(prepared, 1)[0], 0)
    scene.turns = [scene.worker("a").one]
    list(scene.pool(study, prepared).map(score, [job]))
    [there] = (scene.folder / "cache" / "bundles").glob("*/context.json")
    side = job.candidate.resolution
    for a, b in zip(_arrays(prepared.context, side), _arrays(str(there), side), strict=True):
        assert np.array_equal(a, b)
    assert str(Path(prepared.context).parent) not in there.read_text()


def _arrays(context: str, side: int) -> list[np.ndarray]:
    c = open_context(context, side)
    return [c.val, c.val_labels, c.test, c.test_labels, c.sample, c.targets.images, c.targets.logits, c.targets.labels]
