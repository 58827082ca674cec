"""Batches of candidates: rungs on tiny students that really train, one rung with inherited weights, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_examples import InProcessPool, Notes, Prepared

from nas.core.errors import InterruptedRunError
from nas.core.jsonio import content_hash
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.recipe.context import open_context
from nas.recipe.pool import J, JobResult, R
from nas.recipe.records import ScoredStudent, read_logits, read_scored, soft_top1
from nas.recipe.score import ScoreJob
from nas.search.scoring import Result, ScoredCandidate, ScoreFailure, ScoringPlan, score_batch
from nas.train.loop import read_checkpoint, write_checkpoint
from nas.train.settings import DistillSettings

LATENCY_MS = [1.0, 2.0, 3.0, 4.0]
RUNGS = (1, 2, 4)
Whole = tuple[ScoringPlan, dict[int, Result]]


class NotingPool(InProcessPool):
    """Remembers its jobs. It does not fork: torch cannot differentiate in a copy of a process that has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[ScoreJob] = []

    def feed(
        self,
        function: Callable[[J], R],
        next_job: Callable[[], J | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        def noted() -> J | None:
            job = next_job()
            if isinstance(job, ScoreJob):
                self.jobs.append(job)
            return job

        yield from super().feed(function, noted, should_stop)

    @property
    def epochs(self) -> list[int]:
        """Rung of each job, in order."""
        return [job.epochs for job in self.jobs]


def candidate(width: int) -> Candidate:
    first = BlockConfig(4, 8, width, stride=2)
    second = BlockConfig(width, 2 * width, width)
    return Candidate(
        16, 10, StemConfig(4), (StageConfig((first,)), StageConfig((second,))), HeadConfig(), (ExitConfig(0),)
    )


FOUR = [candidate(width) for width in (4, 8, 12, 16)]


def rungs_plan(prepared: Prepared, folder: Path, rungs: tuple[int, ...] = RUNGS) -> ScoringPlan:
    """Half of the students go on from each rung."""
    return ScoringPlan(
        "standalone",
        prepared.context,
        str(folder / "students"),
        "",
        str(folder / "stop"),
        DistillSettings(epochs=rungs[-1], variants=2, batch_size=20, recalibration_images=20),
        rungs,
        0.5,
        0,
        20,
    )


def supernet_plan(prepared: Prepared, folder: Path) -> ScoringPlan:
    plan = rungs_plan(prepared, folder, (1,))
    return replace(plan, source="supernet", supernet=str(prepared.supernet), rungs=(0,))


def batch(
    plan: ScoringPlan,
    candidates: Sequence[Candidate] = FOUR,
    latency_ms: Sequence[float] = LATENCY_MS,
    *,
    pool: NotingPool | None = None,
    notes: Notes | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    failed_before: Mapping[int, int] | None = None,
) -> Iterator[tuple[int, Result]]:
    """The batch, told to a pool and a reporter that remember."""
    return score_batch(
        plan,
        pool or NotingPool(),
        candidates,
        [(ms,) for ms in latency_ms],
        notes or Notes(),
        should_stop,
        failed_before=failed_before,
    )


def scored(result: Result) -> ScoredCandidate:
    assert isinstance(result, ScoredCandidate)
    return result


def decisions(results: Iterable[tuple[int, Result]]) -> dict[int, tuple[object, ...]]:
    """What must be the same after a kill: all of a score but its seconds. No index may come twice."""
    decided: dict[int, tuple[object, ...]] = {}
    for i, result in results:
        assert i not in decided
        r = scored(result)
        decided[i] = (r.candidate, r.epochs, r.score, r.is_complete, r.logits.tobytes())
    return decided


def files(plan: ScoringPlan) -> dict[Path, tuple[int, int]]:
    """Every file with what changes when it is written anew."""
    found = (p for p in Path(plan.students).rglob("*") if p.is_file())
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def record(plan: ScoringPlan, of: Candidate, epochs: int, precision: str = "fp32") -> ScoredStudent:
    found = read_scored(Path(plan.students) / of.arch_id, f"standalone-{epochs}-{precision}")
    assert found is not None
    return found


def trained_epochs(plan: ScoringPlan, of: Candidate) -> int:
    """Epochs in the checkpoint of a student."""
    key = open_context(plan.context, of.resolution).targets.key
    identity = content_hash([of.arch_id, plan.distill, key, plan.seed])
    last = max((Path(plan.students) / of.arch_id).glob("score-*.ckpt"), key=lambda p: int(p.stem[len("score-") :]))
    content = read_checkpoint(last, identity)
    assert content is not None
    return len(content["epochs"])


def give_foreign_checkpoint(plan: ScoringPlan, to: Candidate) -> None:
    """Makes the next training of a candidate fail."""
    for epochs in plan.rungs:
        write_checkpoint(Path(plan.students) / to.arch_id / f"score-{epochs}.ckpt", "of another training", {})


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A batch of four students that nothing disturbed: its plan, and its results in their order."""
    plan = rungs_plan(prepared, tmp_path_factory.mktemp("whole"))
    results = list(batch(plan))
    assert len(results) == 4
    return plan, dict(results)


def test_half_of_the_students_go_on_at_each_rung(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool, notes = rungs_plan(prepared, tmp_path), NotingPool(), Notes()
    results = list(batch(plan, pool=pool, notes=notes))
    assert pool.epochs == [1] * 4 + [2] * 2 + [4]
    assert notes.stages == [f"scoring, rung of {epochs} epochs" for epochs in pool.epochs]
    assert [i for i, _ in results] == [0, 1, 2, 3]
    assert sorted(r.epochs for _, r in results) == [1, 1, 2, 4]
    assert [len(scored(r).rung_scores) for _, r in results] == [RUNGS.index(r.epochs) + 1 for _, r in results]
    assert [trained_epochs(plan, FOUR[i]) for i, _ in results] == [r.epochs for _, r in results]


def test_students_that_are_left_behind_are_decided_when_nobody_can_go_on_any_more(
    prepared: Prepared, tmp_path: Path
) -> None:
    pool = NotingPool()
    results = batch(rungs_plan(prepared, tmp_path), pool=pool)
    assert [len(pool.jobs) for _ in results] == [7] * 4


def test_results_hold_logits_accuracy_and_the_cost_of_all_rungs(prepared: Prepared, whole: Whole) -> None:
    plan, results = whole
    labels = open_context(prepared.context, 16).val_labels
    for i, result in results.items():
        student, folder = scored(result), Path(plan.students) / FOUR[i].arch_id
        assert student.candidate == FOUR[i]
        assert student.logits.shape == (2, len(labels), 10)
        assert np.array_equal(student.logits, read_logits(folder, record(plan, FOUR[i], student.epochs)))
        assert student.score == pytest.approx(soft_top1(student.logits[-1], labels))
        spent = [record(plan, FOUR[i], epochs).cost_s for epochs in RUNGS if epochs <= student.epochs]
        assert student.cost_s == pytest.approx(sum(spent))
        assert min(spent) > 0
        assert student.rung_scores == tuple(record(plan, FOUR[i], e).score for e in RUNGS if e <= student.epochs)


def test_nobody_who_goes_on_is_dominated_by_one_who_does_not(whole: Whole) -> None:
    plan, results = whole
    scores = [record(plan, c, 1).score for c in FOUR]
    left = [i for i, r in results.items() if r.epochs == 1]
    for i in left:
        for j in set(results) - set(left):  # no two latencies are the same
            assert not (scores[i] >= scores[j] and LATENCY_MS[i] < LATENCY_MS[j])


@pytest.mark.parametrize(("latency_ms", "winner"), [([2.0, 1.0], 1), ([1.0, 2.0], 0)])
def test_of_equally_accurate_candidates_the_faster_goes_on(
    prepared: Prepared, tmp_path: Path, latency_ms: list[float], winner: int
) -> None:
    pair = [FOUR[1].with_thresholds([t]) for t in (0.2, 0.8)]
    results = list(batch(rungs_plan(prepared, tmp_path, (1, 2)), pair, latency_ms))
    assert [i for i, r in results if scored(r).is_complete] == [winner]


def test_of_equally_fast_candidates_the_most_accurate_goes_on(prepared: Prepared, tmp_path: Path) -> None:
    plan = replace(rungs_plan(prepared, tmp_path, (6, 7)), keep=0.25)
    results = list(batch(plan, latency_ms=[1.0] * 4))
    assert sorted(r.epochs for _, r in results) == [6, 6, 6, 7]
    scores = [record(plan, c, 6).score for c in FOUR]
    assert len(set(scores)) > 1
    [winner] = [i for i, r in results if r.epochs == 7]
    assert scores[winner] == max(scores)


def test_the_same_call_after_a_kill_trains_nothing_again(whole: Whole) -> None:
    plan, first = whole
    before = files(plan)
    again = list(batch(plan))
    assert [i for i, _ in again] == list(first)
    assert decisions(again) == decisions(first.items())
    assert sum(scored(r).cost_s for _, r in again) == 0.0  # it was counted the first time
    assert files(plan) == before


@pytest.mark.parametrize("jobs_before", [1, 4, 5, 6])
def test_a_batch_that_was_interrupted_goes_on_to_the_same_end(
    prepared: Prepared, whole: Whole, tmp_path: Path, jobs_before: int
) -> None:
    plan, notes = rungs_plan(prepared, tmp_path), Notes()
    with pytest.raises(InterruptedRunError, match="stopped"):
        list(batch(plan, notes=notes, should_stop=lambda: len(notes.stages) == jobs_before))
    expected = decisions(whole[1].items())
    scores = {p: v for p, v in files(plan).items() if p.suffix in (".json", ".npy")}
    assert len(scores) == 2 * jobs_before
    assert decisions(batch(plan)) == expected
    assert scores.items() <= files(plan).items()


def test_a_worker_that_is_told_to_stop_keeps_its_epoch_and_ends_the_batch(
    prepared: Prepared, whole: Whole, tmp_path: Path
) -> None:
    plan = rungs_plan(prepared, tmp_path)
    stop = Path(plan.stop_file)
    stop.touch()
    with pytest.raises(InterruptedRunError, match="stopped at the end of an epoch"):
        list(batch(plan))
    assert [p.name for p in files(plan)] == ["score-1.ckpt"]
    assert trained_epochs(plan, FOUR[0]) == 1
    stop.unlink()
    assert decisions(batch(plan)) == decisions(whole[1].items())


def test_a_failed_candidate_keeps_its_reason_and_the_others_go_on(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path), NotingPool()
    give_foreign_checkpoint(plan, FOUR[2])
    results = dict(batch(plan, pool=pool))
    failure = results.pop(2)
    assert isinstance(failure, ScoreFailure)
    assert "this checkpoint belongs to another network, seed, teacher, data set or settings" in failure.reason
    assert failure.epochs == 1
    assert sorted(results) == [0, 1, 3]
    assert sorted(scored(r).epochs for r in results.values()) == [1, 1, 4]
    assert pool.epochs == [1] * 4 + [2] + [4]  # of the three that were scored one goes on

    pool = NotingPool()
    assert decisions(batch(plan, pool=pool, failed_before={2: 1})) == decisions(results.items())
    assert pool.epochs == [1] * 3 + [2] + [4]


def test_a_candidate_that_failed_on_a_later_rung_is_compared_before_it_but_does_not_come_again(
    prepared: Prepared, whole: Whole, tmp_path: Path
) -> None:
    plan, pool = rungs_plan(prepared, tmp_path), NotingPool()
    [second] = [i for i, r in whole[1].items() if r.epochs == 2]
    [third] = [i for i, r in whole[1].items() if r.epochs == 4]
    last = str(Path(plan.students) / FOUR[second].arch_id / "score-2.ckpt")
    # Its checkpoint of the first rung is there and whole; that of the second is foreign.
    write_checkpoint(Path(last), "of another training", {})
    results = dict(batch(plan, pool=pool))
    failure, winner = results.pop(second), scored(results[third])
    assert isinstance(failure, ScoreFailure)
    assert (failure.epochs, len(failure.rung_scores)) == (2, 1)
    assert (winner.epochs, winner.is_complete) == (4, True)

    pool = NotingPool()
    assert decisions(batch(plan, pool=pool, failed_before={second: 2})) == decisions(results.items())
    assert pool.epochs == [1] * 4 + [2] + [4]


def test_a_batch_of_failures_ends(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path), NotingPool()
    for each in FOUR[:2]:
        give_foreign_checkpoint(plan, each)
    results = list(batch(plan, FOUR[:2], LATENCY_MS[:2], pool=pool))
    assert [(i, r.epochs) for i, r in results if isinstance(r, ScoreFailure)] == [(0, 1), (1, 1)]
    assert pool.epochs == [1, 1]
    assert list(batch(plan, [], [])) == []


def test_precisions_of_an_architecture_share_its_training(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path, (2,)), NotingPool()
    three = [FOUR[1], FOUR[1].with_precision("int8"), FOUR[2]]
    checkpoint = Path(plan.students) / FOUR[1].arch_id / "score-2.ckpt"
    results: dict[int, Result] = {}
    written = {}
    for i, result in batch(plan, three, [1.0] * 3, pool=pool):
        results[i] = result
        written[i] = files(plan)[checkpoint]
    assert {job.candidate for job in pool.jobs} == set(three)
    assert written[1] == written[0]
    fp32, int8 = scored(results[0]).logits, scored(results[1]).logits
    assert not np.array_equal(fp32, int8)
    assert np.linalg.norm(fp32 - int8) < 0.3 * np.linalg.norm(fp32)
    assert not np.array_equal(fp32, scored(results[2]).logits)


def test_precisions_of_an_architecture_go_on_each_on_its_own(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path, (1, 2)), NotingPool()
    pair = [FOUR[1], FOUR[1].with_precision("int8")]
    results = dict(batch(plan, pair, [1.0, 1.0], pool=pool))
    [winner] = [i for i, r in results.items() if r.epochs == 2]
    behind, result = 1 - winner, results[winner]
    assert pool.epochs == [1, 1, 2]
    folder, precisions = Path(plan.students) / pair[0].arch_id, ("fp32", "int8")
    assert read_scored(folder, f"standalone-2-{precisions[behind]}") is None
    last = record(plan, pair[winner], 2, precisions[winner])
    assert np.array_equal(scored(result).logits, read_logits(folder, last))


def test_candidates_that_differ_in_thresholds_have_one_score(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path, (2,)), NotingPool()
    pair = [FOUR[1].with_thresholds([t]) for t in (0.2, 0.8)]
    results = dict(batch(plan, pair, [1.0, 1.0], pool=pool))
    assert [scored(results[i]).candidate for i in (0, 1)] == pair
    assert np.array_equal(scored(results[0]).logits, scored(results[1]).logits)
    assert sorted(p.name for p in files(plan)) == [
        "score-2.ckpt",
        "standalone-2-fp32-e0002.npy",
        "standalone-2-fp32.json",
    ]
    assert len(pool.jobs) == 1
    assert sum(scored(r).cost_s for r in results.values()) == pytest.approx(record(plan, FOUR[1], 2).cost_s)


def test_the_same_candidate_twice_is_one_job_whose_cost_is_shared(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool = rungs_plan(prepared, tmp_path, (1,)), NotingPool()
    results = dict(batch(plan, [FOUR[0], FOUR[0]], [1.0, 1.0], pool=pool))
    assert pool.epochs == [1]
    assert [scored(results[i]).cost_s for i in (0, 1)] == [record(plan, FOUR[0], 1).cost_s / 2] * 2


def test_with_the_supernet_a_batch_is_one_rung(prepared: Prepared, tmp_path: Path) -> None:
    plan, pool, notes = supernet_plan(prepared, tmp_path), NotingPool(), Notes()
    space, rng = prepared.inputs.space, np.random.default_rng(0)
    candidates = [space.decode(space.sample(rng)) for _ in range(3)]
    candidates += [candidates[0].with_precision("int8"), candidates[0].with_precision("fp32")]
    latency = [1.0, 2.0, 3.0, 4.0, 5.0]
    results = list(batch(plan, candidates, latency, pool=pool, notes=notes))
    assert len(pool.jobs) == len(set(candidates))
    assert notes.stages == ["scoring"] * len(set(candidates))
    assert sorted(i for i, _ in results) == list(range(5))
    assert all(scored(r).is_complete and r.epochs == 0 for _, r in results)
    assert [scored(r).candidate for _, r in results] == [candidates[i] for i, _ in results]
    before = files(plan)
    assert not any(p.suffix == ".ckpt" for p in before)
    assert decisions(batch(plan, candidates, latency)) == decisions(results)
    assert files(plan) == before


def test_with_the_supernet_failures_of_before_are_passed_over(prepared: Prepared, tmp_path: Path) -> None:
    plan = supernet_plan(prepared, tmp_path)
    space = prepared.inputs.space
    inside = [space.decode(g) for g in (space.smallest(), space.largest())]
    outside = replace(inside[0], num_classes=11)
    three = [inside[0], outside, inside[1]]
    results = dict(batch(plan, three, [1.0] * 3))
    failure = results.pop(1)
    assert isinstance(failure, ScoreFailure)
    assert failure.epochs == 0
    assert "is outside the supernet's" in failure.reason
    pool = NotingPool()
    assert decisions(batch(plan, three, [1.0] * 3, pool=pool, failed_before={1: 0})) == decisions(results.items())
    assert [job.candidate.arch_id for job in pool.jobs] == [c.arch_id for c in inside]
