"""Halving through whole rounds: any number of workers and any stop give the same run, and stopped candidates count."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_examples import Prepared

from nas.core.errors import InterruptedRunError
from nas.core.jsonio import content_hash
from nas.core.walk import total_macs
from nas.recipe.pool import JobFailure, JobResult, WorkerPool
from nas.recipe.records import ScoredStudent, read_scored, write_scored
from nas.recipe.score import ScoreJob, student_folder
from nas.recipe.standalone import foreseen, promoted
from nas.search.folder import TrialRecord
from nas.search.rounds import SearchParts, run_rounds
from nas.search.study import Proposer, Scored

RUNGS = (1, 2, 4)
TRIALS = 20


class LearningCurves(WorkerPool):
    """Workers that are ready in a random order. Larger networks are right more often, and all learn with the epochs.

    `stop_after` jobs the run is stopped; `failing` says which jobs have no result.
    """

    def __init__(
        self,
        labels: np.ndarray,
        workers: int = 1,
        seed: int = 0,
        stop_after: int | None = None,
        failing: Callable[[ScoreJob], bool] = lambda _: False,
    ) -> None:
        super().__init__(workers)
        self.trained: list[tuple[str, str]] = []
        self.most = 0
        self._labels, self._rng = labels, np.random.default_rng(seed)
        self._stop_after, self._failing = stop_after, failing

    def feed(  # type: ignore[override]
        self,
        function: object,  # noqa: ARG002
        next_job: Callable[[], ScoreJob | None],
        should_stop: Callable[[], bool] = lambda: False,  # noqa: ARG002
    ) -> Iterator[JobResult[ScoreJob, ScoredStudent]]:
        running: list[ScoreJob] = []
        while True:
            while len(running) < self.workers and (job := next_job()) is not None:
                running.append(job)
            if not running:
                return
            self.most = max(self.most, len(running))
            assert len({job.candidate.arch_id for job in running}) == len(running), "one checkpoint, two trainings"
            job = running.pop(int(self._rng.integers(len(running))))
            if len(self.trained) == self._stop_after:
                raise InterruptedRunError("stopped")
            known = read_scored(student_folder(job.students, job.candidate.arch_id), job.name)
            yield JobResult(job, self._train(job) if known is None else replace(known, cost_s=0.0))

    def _train(self, job: ScoreJob) -> ScoredStudent | JobFailure:
        self.trained.append((job.candidate.arch_id, job.name))
        if self._failing(job):
            return JobFailure("diverged: loss is NaN")
        luck = int(content_hash([job.candidate.arch_id, job.epochs])[:8], 16) / 16**8
        size = min(1.0, total_macs(job.candidate) / 1.5e5)
        share = (0.3 + 0.6 * size) * job.epochs / (job.epochs + 1) + 0.1 * luck
        right = np.arange(len(self._labels)) < round(share * len(self._labels))
        logits = np.zeros((len(job.candidate.exits) + 1, len(self._labels), 10), np.float32)
        logits[:, np.arange(len(self._labels)), np.where(right, self._labels, (self._labels + 1) % 10)] = 8.0
        folder = student_folder(job.students, job.candidate.arch_id)
        return write_scored(
            folder, job.candidate, epochs=job.epochs, cost_s=1.0, logits=logits, labels=self._labels, name=job.name
        )


def with_rungs(prepared: Prepared, folder: Path, sampler: str = "greybox", **pool: Any) -> SearchParts:
    """Parts of a search with three rungs."""
    settings = {"trials": TRIALS, "rounds": 2, "batch": 5, "first_networks": 0, "networks_per_round": 0}
    parts = prepared.parts(folder, sampler=sampler, ms=0.02, **settings)
    plan = replace(parts.plan, source="standalone", rungs=RUNGS, keep=0.5)
    return replace(parts, plan=plan, pool=LearningCurves(parts.labels, **pool))


Make = Callable[..., SearchParts]


@pytest.fixture
def make(prepared: Prepared, tmp_path: Path) -> Make:
    """Parts of a search in a folder of this test."""

    def made(name: str = "a", **settings: Any) -> SearchParts:
        return with_rungs(prepared, tmp_path / name, **settings)

    return made


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> SearchParts:
    """A search with one worker that nothing disturbed."""
    parts = with_rungs(prepared, tmp_path_factory.mktemp("whole"))
    run_rounds(parts)
    return parts


def pool_of(parts: SearchParts) -> LearningCurves:
    assert isinstance(parts.pool, LearningCurves)
    return parts.pool


def free(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Without seconds: what an interrupted call has spent is not known to the next."""
    return [replace(r, cost_s=0.0) for r in records]


def reached(records: Iterable[TrialRecord]) -> list[int]:
    """How many candidates have reached each rung."""
    counts = [len(r.rung_scores) for r in records]
    return [sum(count > place for count in counts) for place in range(len(RUNGS))]


def test_the_best_half_of_all_candidates_of_the_search_goes_on_at_each_rung(whole: SearchParts) -> None:
    records = whole.folder.trials()
    first, second, last = reached(records)
    assert first == 20 and second >= 10 and second // 2 <= last < first
    best = promoted([r.rung_scores[0] for r in records], [r.latency_ms for r in records], 10)
    assert {records[i].number for i in best} <= {r.number for r in records if len(r.rung_scores) > 1}
    assert sum(r.cost_s for r in records) == pytest.approx(len(pool_of(whole).trained))
    for r in records:
        assert r.epochs == RUNGS[len(r.rung_scores) - 1]
        assert r.state == ("complete" if r.epochs == 4 else "stopped")
        assert r.score == pytest.approx(r.rung_scores[-1])


@pytest.mark.parametrize(("workers", "sampler"), [(2, "greybox"), (5, "greybox"), (8, "random")])
def test_the_number_of_workers_and_their_order_change_nothing(
    make: Make, whole: SearchParts, workers: int, sampler: str
) -> None:
    alone = whole
    if sampler != "greybox":
        alone = make("alone", sampler=sampler)
        run_rounds(alone)
    several = make("several", sampler=sampler, workers=workers, seed=workers)
    run_rounds(several)
    assert pool_of(several).most == min(workers, 5)
    assert free(several.folder.trials()) == free(alone.folder.trials())


def test_nothing_is_scored_twice_and_a_stopped_candidate_may_go_on_in_a_later_batch(make: Make) -> None:
    parts = make(sampler="random")
    run_rounds(parts)
    trained = pool_of(parts).trained
    assert len(trained) == len(set(trained))
    lines = parts.folder.decisions()
    late = [r for r in lines if r.decided_in > r.number]
    assert late
    for r in late:
        [first] = [line for line in lines if line.number == r.number and line.decided_in <= r.number]
        assert first.state == "stopped"
        assert r.rung_scores[: len(first.rung_scores)] == first.rung_scores
        assert len(r.rung_scores) > len(first.rung_scores)
        assert (r.round, r.proposer, r.latency_ms) == (first.round, first.proposer, first.latency_ms)
    assert len(parts.folder.trials()) == TRIALS < len(lines)


@pytest.mark.parametrize("stop_after", [1, 8, 15, 20, 24])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(make: Make, whole: SearchParts, stop_after: int) -> None:
    parts = make("stopped", workers=2, stop_after=stop_after)
    with pytest.raises(InterruptedRunError):
        run_rounds(parts)
    again = make("stopped", workers=3, seed=7)
    run_rounds(again)
    assert not set(pool_of(again).trained) & set(pool_of(parts).trained)
    assert free(again.folder.trials()) == free(whole.folder.trials())


def test_a_run_that_was_killed_while_it_recorded_a_batch_goes_on_to_the_same_end(make: Make, tmp_path: Path) -> None:
    whole = make("whole", sampler="random")
    run_rounds(whole)
    decisions = whole.folder.decisions()
    last = whole.folder.batches()[-1].first
    begun = next(i for i, r in enumerate(decisions) if r.decided_in == last)
    assert decisions[begun].number < last, "one of an earlier batch comes first"
    for left in range(1, len(decisions) - begun):
        shutil.copytree(whole.folder.path, tmp_path / str(left) / "run")
        again = make(str(left), sampler="random")
        for name, count in (("trials.jsonl", begun + left), ("events.jsonl", -1)):  # the round is not over
            file = again.folder.path / name
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
        run_rounds(again)
        assert pool_of(again).trained == []
        assert free(again.folder.decisions()) == free(decisions)


def test_a_candidate_that_fails_on_its_way_up_is_not_tried_again(make: Make) -> None:
    def is_bad(job: ScoreJob) -> bool:
        return job.epochs == 2 and int(content_hash(job.candidate.arch_id)[:4], 16) % 3 == 0

    whole = make("whole", failing=is_bad)
    run_rounds(whole)
    failed = [r for r in whole.folder.trials() if r.state == "failed"]
    assert failed
    assert {(r.epochs, len(r.rung_scores), r.top1) for r in failed} == {(2, 1, None)}
    assert sum(r.state != "failed" for r in whole.folder.trials()) == TRIALS  # each is replaced
    parts = make("stopped", failing=is_bad, workers=2, stop_after=24)
    with pytest.raises(InterruptedRunError):
        run_rounds(parts)
    again = make("stopped", failing=is_bad)
    run_rounds(again)
    assert not set(pool_of(again).trained) & set(pool_of(parts).trained)
    assert free(again.folder.trials()) == free(whole.folder.trials())


def test_the_sampler_is_taught_what_stopped_candidates_would_have_reached(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[list[Scored]] = []

    class Watched(Proposer):
        def __init__(self, *given: Any) -> None:
            taught.append(list(given[6]))
            super().__init__(*given)

    monkeypatch.setattr("nas.search.rounds.Proposer", Watched)
    parts = make()
    run_rounds(parts)
    records = {r.genotype: r for r in parts.folder.trials()}
    last = taught[-1]
    assert {s.genotype for s in last} == set(records)
    complete = [s for s in last if not s.is_estimate]
    assert {s.genotype for s in complete} == {g for g, r in records.items() if r.state == "complete"}
    assert all(s.score == records[s.genotype].score for s in complete)
    curves = [r.rung_scores for r in records.values() if r.state == "complete"]
    stopped = [(records[s.genotype], s.score) for s in last if s.is_estimate]
    for r, guess in stopped:
        assert guess == pytest.approx(foreseen(curves, len(r.rung_scores) - 1, r.score))
    assert np.mean([guess - r.score for r, guess in stopped]) > 0.0  # they would have gone on learning
    assert [len(known) for known in taught] == [0, 5, 10, 10, 15, 20]


def test_other_samplers_are_taught_complete_candidates_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Scored] = []
    learn, tell = Proposer.learn, Proposer.tell

    def noted_learn(self: Proposer, scored: Scored) -> None:
        learnt.append(scored)
        learn(self, scored)

    def noted_tell(self: Proposer, number: int, scored: Scored | None) -> None:
        learnt.extend([scored] if scored is not None else [])
        tell(self, number, scored)

    monkeypatch.setattr(Proposer, "learn", noted_learn)
    monkeypatch.setattr(Proposer, "tell", noted_tell)
    parts = make(sampler="tpe")
    run_rounds(parts)
    complete = {r.genotype for r in parts.folder.trials() if r.state == "complete"}
    assert {s.genotype for s in learnt} == complete
    assert not any(s.is_estimate for s in learnt)
