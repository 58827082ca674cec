"""Batches of proposals scored by worker processes: with the supernet at once, standalone through successive halving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.records import Candidate
from nas.recipe.pool import JobFailure, JobPool
from nas.recipe.records import ScoredStudent, read_logits
from nas.recipe.score import ScoreJob, Source, score, student_folder
from nas.recipe.standalone import promoted
from nas.search.progress import Reporter
from nas.train.settings import DistillSettings


@dataclass(frozen=True, slots=True, eq=False)
class ScoredCandidate:
    """A candidate with its score: logits float32 [E, N, K] on search validation, `top1` of the head, CPU seconds."""

    candidate: Candidate
    logits: np.ndarray
    epochs: int
    cost_s: float
    top1: float
    is_complete: bool


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """What all score jobs of a run share.

    `rungs`: epochs after which students are compared, (0,) with the supernet; `keep`: share that goes on from each.
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
        )


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """A candidate that could not be scored: why, and in the training up to how many epochs it happened."""

    reason: str
    epochs: int


Result = ScoredCandidate | ScoreFailure


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
) -> Iterator[tuple[int, Result]]:
    """Index and result of each candidate as it is decided; every candidate comes exactly once.

    Candidates that differ in thresholds or precision only share their training. With several rungs, those that are not
    promoted are decided early (`is_complete` False): multi-objective successive halving on accuracy and latency.
    Scores that are there are read, so the same call after a kill decides the same.

    Args:
        plan: what all jobs share.
        pool: runs them.
        candidates: the batch.
        latency_ms: predicted worst case of each on every device [N, D].
        reporter: told how far it is; its `progress` must not raise, the pool looks at `should_stop`.
        should_stop: True ends the batch after the jobs that are running.
        before: candidates of earlier batches, of `planned` in all: with the supernet progress counts them too.
        planned: number of candidates of the whole search.
        failed_before: candidates that failed in an earlier call and after how many epochs; they do not come again.

    Raises:
        InterruptedRunError: the run was asked to stop; scores and checkpoints are kept.
    """
    failed_at = dict(failed_before or {})
    alive = list(range(len(candidates)))
    cost = dict.fromkeys(alive, 0.0)
    for number, epochs in enumerate(plan.rungs):
        alive = [i for i in alive if failed_at.get(i) != epochs]
        members: dict[ScoreJob, list[int]] = {}
        for i in alive:
            members.setdefault(plan.job(candidates[i], epochs), []).append(i)
        scored: dict[int, ScoredCandidate] = {}
        done = 0
        last = number == len(plan.rungs) - 1
        is_single = len(plan.rungs) == 1
        stage = "scoring" if is_single else f"scoring, rung of {epochs} epochs"
        note = "" if is_single or not planned else f"candidates {before + 1} to {before + len(candidates)} of {planned}"
        shown_before, shown_all = (before, max(planned, before + len(members))) if is_single else (0, len(members))
        for result in (r for wave in _waves(plan, members) for r in pool.map(score, wave, should_stop)):
            done += 1
            reporter.progress(stage, shown_before + done, shown_all, note)
            for i in members[result.job]:
                if isinstance(result.value, JobFailure):
                    yield i, ScoreFailure(result.value.reason, epochs)
                    continue
                cost[i] += result.value.cost_s / len(members[result.job])
                logits = _logits(plan, candidates[i], result.value)
                entry = ScoredCandidate(candidates[i], logits, epochs, cost[i], result.value.top1[-1], last)
                if last:
                    yield i, entry
                else:
                    scored[i] = entry
        if last:
            return
        order = sorted(scored)
        count = max(1, round(plan.keep * len(order)))
        keep = promoted([scored[i].top1 for i in order], [latency_ms[i] for i in order], count)
        kept = {order[k] for k in keep}
        for i in order:
            if i not in kept:
                yield i, scored[i]
        alive = [i for i in order if i in kept]


def _waves(plan: ScoringPlan, jobs: Iterable[ScoreJob]) -> list[list[ScoreJob]]:
    """Jobs that may run side by side. An architecture is trained once: its other precisions wait for that."""
    if plan.source == "supernet":
        return [list(jobs)]
    waves: list[list[ScoreJob]] = []
    seen: Counter[str] = Counter()
    for job in jobs:
        arch_id = job.candidate.arch_id
        if seen[arch_id] == len(waves):
            waves.append([])
        waves[seen[arch_id]].append(job)
        seen[arch_id] += 1
    return waves


def _logits(plan: ScoringPlan, candidate: Candidate, scored: ScoredStudent) -> np.ndarray:
    return read_logits(student_folder(plan.students, candidate.arch_id), scored)
