"""Batches of proposals scored by worker processes: with the supernet at once, standalone through successive halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.records import Candidate
from nas.export.dialect import ORT
from nas.recipe.pool import JobFailure, JobPool
from nas.recipe.records import ScoredStudent, read_logits
from nas.recipe.score import ScoreJob, Source, score, student_folder
from nas.recipe.standalone import TOGETHER, Halving, Standing
from nas.search.progress import Reporter
from nas.train.settings import DistillSettings


@dataclass(frozen=True, slots=True, eq=False)
class ScoredCandidate:
    """A candidate with its score: logits float32 [E, N, K] on search validation, CPU seconds of all its rungs.

    `rung_scores`: of the head at each rung that it has reached; `is_complete`: the last one is among them.
    """

    candidate: Candidate
    logits: np.ndarray
    epochs: int
    cost_s: float
    rung_scores: tuple[float, ...]
    is_complete: bool

    @property
    def score(self) -> float:
        """What it is ranked by."""
        return self.rung_scores[-1]


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """What all score jobs of a run share.

    `rungs`: epochs after which students are compared, (0,) with the supernet; `keep`: share that goes on from each.
    `dialect`: of the runtime of the first device, in whose graphs the accuracy of precisions is measured.
    """

    source: Source
    context: str
    students: str
    supernet: str
    stop_file: str
    distill: DistillSettings
    rungs: tuple[int, ...]
    keep: float
    seed: int
    images: int
    dialect: str = ORT.name

    @property
    def is_halving(self) -> bool:
        """Whether candidates are compared before they are trained to the end."""
        return len(self.rungs) > 1

    def job(self, candidate: Candidate, epochs: int) -> ScoreJob:
        """The job that scores a candidate after so many epochs; one for all its threshold settings."""
        return ScoreJob(
            candidate.with_thresholds((None,) * len(candidate.exits)),
            self.source,
            self.context,
            self.students,
            self.supernet,
            self.stop_file,
            self.distill,
            epochs,
            self.seed,
            self.images,
            self.dialect,
        )


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """A candidate that could not be scored: why, in the training up to how many epochs, and what it had reached."""

    reason: str
    epochs: int
    rung_scores: tuple[float, ...] = ()


Result = ScoredCandidate | ScoreFailure


@dataclass(frozen=True, slots=True)
class Earlier:
    """A candidate of an earlier batch that was compared at some rungs; stopped, it may go on now from its checkpoint.

    `rung_scores`: of the head at each rung that it has reached; `latency_ms` as it was compared, on each device;
    `has_failed`: in the training for the next rung.
    """

    number: int
    candidate: Candidate
    latency_ms: tuple[float, ...]
    rung_scores: tuple[float, ...]
    cost_s: float = 0.0
    has_failed: bool = False

    @property
    def standing(self) -> Standing:
        """The same for the halving."""
        went_on = len(self.rung_scores) - (not self.has_failed)
        return Standing(self.number, self.rung_scores, self.latency_ms, went_on)


def score_batch(
    plan: ScoringPlan,
    pool: JobPool,
    candidates: Sequence[Candidate],
    latency_ms: Sequence[Sequence[float]],
    reporter: Reporter,
    should_stop: Callable[[], bool],
    before: int = 0,
    planned: int = 0,
    failed_before: Mapping[int, int] | None = None,
    earlier: Sequence[Earlier] = (),
) -> Iterator[tuple[int, Result]]:
    """Number and result of each candidate that is decided; every candidate of the batch comes exactly once.

    With several rungs a candidate goes on when it is in the best share of all that have reached its rung, in this batch
    or before (`nas.recipe.standalone.Halving`): multi-objective successive halving on accuracy and latency, in
    groups of `TOGETHER`. So one of an earlier batch may come again, with a higher rung. What was decided comes when
    the batch is over, earlier candidates first, because until then a stopped one may go on (`is_complete` False: it
    did not); failures come at once. With one rung all comes as it is ready.

    Candidates that differ in thresholds or precision only share their training. Scores that are there are read, and who
    goes on does not depend on the order in which workers are ready, so the same call after a kill decides the same.

    Args:
        plan: what all jobs share.
        pool: runs them.
        candidates: the batch.
        latency_ms: predicted worst case of each on every device [N, D].
        reporter: told how far it is; its `progress` must not raise, the pool looks at `should_stop`.
        should_stop: True ends the batch after the jobs that are running.
        before: number of the first candidate: so many were proposed before it.
        planned: number of candidates of the whole search.
        failed_before: numbers of candidates that failed in an earlier call and after how many epochs; they do not come
            again.
        earlier: candidates of earlier batches, as they were before this one began.

    Raises:
        InterruptedRunError: the run was asked to stop; scores and checkpoints are kept.
    """
    batch = _Batch(plan, candidates, latency_ms, before, failed_before or {}, earlier)
    distinct = len({plan.job(c, plan.rungs[0]) for c in candidates})
    note = f"candidates {before + 1} to {before + len(candidates)} of {planned}" if plan.is_halving and planned else ""
    done = [0] * len(plan.rungs)
    for result in pool.feed(score, batch.next_job, should_stop):
        place, numbers = batch.ended(result.job)
        done[place] += 1
        if not plan.is_halving:
            reporter.progress("scoring", before + done[0], max(planned, before + distinct))
        if isinstance(result.value, JobFailure):
            for n in numbers:
                yield n, batch.failed(n, place, result.value.reason)
        else:
            for n in numbers:
                batch.scored(n, place, result.value, len(numbers))
                if not plan.is_halving:
                    yield n, batch.results.pop(n)
        if plan.is_halving:
            left = len(batch.needed(place))
            reporter.progress(f"scoring, rung of {plan.rungs[place]} epochs", done[place], done[place] + left, note)
    yield from sorted(batch.results.items())


class _Batch:
    """The jobs of a batch: which is next, and what came of those that ended."""

    def __init__(
        self,
        plan: ScoringPlan,
        candidates: Sequence[Candidate],
        latency_ms: Sequence[Sequence[float]],
        before: int,
        failed_before: Mapping[int, int],
        earlier: Sequence[Earlier],
    ) -> None:
        self.results: dict[int, ScoredCandidate] = {}
        self._plan = plan
        self._failed_before = failed_before
        self._candidates = {e.number: e.candidate for e in earlier} | dict(enumerate(candidates, start=before))
        self._rung_scores = {e.number: e.rung_scores for e in earlier}
        self._cost_s = {e.number: e.cost_s for e in earlier}
        self._running: dict[ScoreJob, tuple[int, list[int]]] = {}
        self._jobs: dict[tuple[int, int], ScoreJob] = {}
        self._halving = Halving(len(plan.rungs), plan.keep, TOGETHER, (e.standing for e in earlier))
        for number, ms in enumerate(latency_ms, start=before):
            self._halving.join(number, ms)
        self._pass_over()

    def next_job(self) -> ScoreJob | None:
        """The next score that can be computed now; None while all that are needed wait for running ones.

        An architecture is trained once: its other precisions, and its next rung, wait for that.
        """
        begun = {n for _, numbers in self._running.values() for n in numbers}
        trained = {job.candidate.arch_id for job in self._running if self._plan.source == "standalone"}
        for place, number in self._halving.open():
            job = self._job(number, place)
            if number not in begun and job not in self._running and job.candidate.arch_id not in trained:
                self._running[job] = place, [n for n in self.needed(place) if self._job(n, place) == job]
                return job
        return None

    def needed(self, place: int) -> list[int]:
        """Candidates whose score at a rung is needed and is not there yet."""
        return [n for rung, n in self._halving.open() if rung == place]

    def ended(self, job: ScoreJob) -> tuple[int, list[int]]:
        """Rung of a job, and the candidates whose score it is."""
        return self._running.pop(job)

    def failed(self, number: int, place: int, reason: str) -> ScoreFailure:
        """A candidate is not compared at a rung; what it reached before is no result, but the others keep theirs."""
        self.results.pop(number, None)
        self._halving.arrive(number, place, None)
        self._pass_over()
        return ScoreFailure(reason, self._plan.rungs[place], self._rung_scores.get(number, ()))

    def scored(self, number: int, place: int, record: ScoredStudent, shared_by: int) -> None:
        """Keeps what a candidate has reached, and lets it be compared; its seconds are shared by so many."""
        candidate = self._candidates[number]
        self._rung_scores[number] = (*self._rung_scores.get(number, ()), record.score)
        self._cost_s[number] = self._cost_s.get(number, 0.0) + record.cost_s / shared_by
        self.results[number] = ScoredCandidate(
            candidate,
            read_logits(student_folder(self._plan.students, candidate.arch_id), record),
            self._plan.rungs[place],
            self._cost_s[number],
            self._rung_scores[number],
            place + 1 == len(self._plan.rungs),
        )
        self._halving.arrive(number, place, record.score)
        self._pass_over()

    def _job(self, number: int, place: int) -> ScoreJob:
        if (number, place) not in self._jobs:
            self._jobs[number, place] = self._plan.job(self._candidates[number], self._plan.rungs[place])
        return self._jobs[number, place]

    def _pass_over(self) -> None:
        """Those that failed in an earlier call fail again without being trained, which may open further places."""
        while found := [(k, n) for k, n in self._halving.open() if self._failed_before.get(n) == self._plan.rungs[k]]:
            for place, number in found:
                self.results.pop(number, None)
                self._halving.arrive(number, place, None)
