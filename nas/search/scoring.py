"""Batches of proposals scored by worker processes: with the supernet at once, standalone through successive halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.records import Candidate
from nas.recipe.pool import JobFailure, WorkerPool
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
    """What all score jobs of a run share. `rungs`: epochs after which the worse half stops; (0,) with the supernet."""

    source: Source
    context: str
    students: str
    supernet: str
    stop_file: str
    distill: DistillSettings
    rungs: tuple[int, ...]
    seed: int
    images: int

    def job(self, candidate: Candidate, epochs: int) -> ScoreJob:
        """The job that scores a candidate after so many epochs."""
        return ScoreJob(
            candidate,
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


Result = ScoredCandidate | JobFailure


def score_batch(
    plan: ScoringPlan,
    pool: WorkerPool,
    candidates: Sequence[Candidate],
    latency_ms: Sequence[float],
    reporter: Reporter,
    should_stop: Callable[[], bool],
    note: str = "",
) -> Iterator[tuple[int, Result]]:
    """Index and result of each candidate as it is decided; every candidate comes exactly once.

    Candidates that differ in thresholds or precision only share their training. With several rungs, those that are not
    promoted are decided early (`is_complete` False): multi-objective successive halving on accuracy and latency.

    Raises:
        InterruptedRunError: the run was asked to stop; scores and checkpoints are kept.
    """
    alive = list(range(len(candidates)))
    cost = dict.fromkeys(alive, 0.0)
    for number, epochs in enumerate(plan.rungs):
        jobs = list(dict.fromkeys(plan.job(candidates[i], epochs) for i in alive))
        scored: dict[int, ScoredCandidate] = {}
        members: dict[ScoreJob, list[int]] = {}
        for i in alive:
            members.setdefault(plan.job(candidates[i], epochs), []).append(i)
        done = 0
        last = number == len(plan.rungs) - 1
        for result in pool.map(score, jobs, should_stop):
            done += 1
            stage = "scoring" if len(plan.rungs) == 1 else f"scoring, rung of {epochs} epochs"
            reporter.progress(stage, done, len(jobs), note)
            for i in members[result.job]:
                if isinstance(result.value, JobFailure):
                    yield i, result.value
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
        keep = promoted(
            [scored[i].top1 for i in order],
            [latency_ms[i] for i in order],
            (len(order) + 1) // 2,
        )
        kept = {order[k] for k in keep}
        for i in order:
            if i not in kept:
                yield i, scored[i]
        alive = [i for i in order if i in kept]


def _logits(plan: ScoringPlan, candidate: Candidate, scored: ScoredStudent) -> np.ndarray:
    return read_logits(student_folder(plan.students, candidate.arch_id), scored)
