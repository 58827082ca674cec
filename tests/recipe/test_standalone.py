"""Successive halving: the promotion rule on arrays, then the real thing on four tiny students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import InterruptedRunError, RecordError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.data import Dataset, DataSettings, load_dataset
from nas.recipe.context import write_context
from nas.recipe.pool import JobFailure, JobResult
from nas.recipe.records import ScoredStudent, read_logits
from nas.recipe.score import ScoreJob, score
from nas.recipe.settings import StandaloneSettings
from nas.recipe.standalone import promoted, rung_job, successive_halving
from nas.train.settings import DistillSettings
from nas.train.targets import make_targets
from nas.train.teacher import Teacher

Results = Iterator[JobResult[ScoreJob, ScoredStudent]]
RUNGS = StandaloneSettings(rungs=(1, 2, 4), keep=0.5)


def test_better_fronts_go_on_first() -> None:
    accuracy = [0.9, 0.8, 0.7, 0.85, 0.6]
    latency = [2.0, 1.0, 0.5, 2.5, 3.0]
    assert set(promoted(accuracy, latency, 3)) == {0, 1, 2}
    assert list(promoted(accuracy, latency, 4))[3] == 3
    assert list(promoted(accuracy, latency, 9))[3:] == [3, 4]


def test_of_a_front_that_is_too_large_the_crowded_students_are_left_out() -> None:
    accuracy = [0.90, 0.80, 0.795, 0.60]
    latency = [4.0, 2.0, 1.99, 1.0]
    assert set(promoted(accuracy, latency, 3)) == {0, 1, 3} or set(promoted(accuracy, latency, 3)) == {0, 2, 3}
    assert {0, 3} <= set(promoted(accuracy, latency, 3))


def test_units_do_not_change_who_goes_on() -> None:
    rng = np.random.default_rng(0)
    accuracy, latency = rng.random(20), rng.random(20)
    assert list(promoted(accuracy, latency, 7)) == list(promoted(accuracy * 100, latency * 1000, 7))


def test_equal_students_go_on_by_their_order() -> None:
    assert list(promoted([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], 2)) == [0, 1]
    assert list(promoted([], [], 2)) == []


def test_nobody_who_goes_on_is_dominated_by_one_who_does_not() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        accuracy, latency = rng.integers(0, 6, 15) / 5, rng.integers(1, 6, 15) / 5
        kept = set(promoted(accuracy, latency, 6).tolist())
        for i in kept:
            for j in set(range(15)) - kept:
                better = accuracy[j] >= accuracy[i] and latency[j] <= latency[i]
                assert not (better and (accuracy[j] > accuracy[i] or latency[j] < latency[i]))


def test_a_score_that_is_not_a_number_is_named() -> None:
    with pytest.raises(RecordError, match="student 1 has a value that is not finite"):
        promoted([0.5, float("nan")], [1.0, 2.0], 1)
    with pytest.raises(RecordError, match="one accuracy and one latency per student"):
        promoted([0.5, 0.6], [1.0], 1)


def candidate(width: int) -> Candidate:
    first = BlockConfig(4, 8, width, stride=2)
    second = BlockConfig(width, 2 * width, width)
    return Candidate(
        16, 10, StemConfig(4), (StageConfig((first,)), StageConfig((second,))), HeadConfig(), (ExitConfig(0),)
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)


@pytest.fixture(scope="module")
def context(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arrays of a run, under a teacher that tells the mean colour."""
    folder = tmp_path_factory.mktemp("context")
    weights = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)

    def predict(images: np.ndarray) -> np.ndarray:
        return (images / 255.0).mean((1, 2)).astype(np.float32) @ weights

    teacher = Teacher("colours", "a" * 64, "fp32", 0.5, 0.5, 0.0, None, None, 16, predict, lambda: b"")
    targets = make_targets(teacher, dataset, 2, folder)
    write_context(folder / "context.json", (dataset,), targets, folder, 0)
    return folder / "context.json"


@pytest.fixture
def jobs(context: Path, tmp_path: Path) -> list[ScoreJob]:
    distill = DistillSettings(epochs=24, batch_size=32, recalibration_images=32)
    students, stop = str(tmp_path / "students"), str(tmp_path / "stop")
    return [
        ScoreJob(candidate(width), "standalone", str(context), students, "", stop, distill, 0, 0, 32)
        for width in (4, 8, 12, 16)
    ]


def here(done: list[ScoreJob]) -> Callable[[Sequence[ScoreJob]], Results]:
    """Runs jobs in this process and notes them."""

    def run(given: Sequence[ScoreJob]) -> Results:
        for job in given:
            value = score(job)
            done.append(job)
            yield JobResult(job, value)

    return run


LATENCY_MS = [1.0, 2.0, 3.0, 4.0]


def test_half_of_the_students_go_on_at_each_rung(jobs: list[ScoreJob], dataset: Dataset) -> None:
    done: list[ScoreJob] = []
    results = successive_halving(jobs, LATENCY_MS, RUNGS, here(done))
    assert [job.epochs for job in done] == [1] * 4 + [2] * 2 + [4]
    assert all(job.distill.epochs == 4 for job in done)
    scores = [r for r in results if isinstance(r, ScoredStudent)]
    assert sorted(s.epochs for s in scores) == [1, 1, 2, 4]
    best = next(s for s in scores if s.epochs == 4)
    folder = Path(jobs[0].students) / best.arch_id
    assert read_logits(folder, best).shape == (2, len(dataset.val), 10)
    assert all(s.cost_s > 0 for s in scores)


def test_scores_that_are_there_are_not_computed_again(jobs: list[ScoreJob]) -> None:
    first = successive_halving(jobs, LATENCY_MS, RUNGS, here([]))
    before = {p: p.stat().st_mtime_ns for p in Path(jobs[0].students).rglob("*") if p.is_file()}
    again = successive_halving(jobs, LATENCY_MS, RUNGS, here([]))
    assert again == first
    assert before == {p: p.stat().st_mtime_ns for p in Path(jobs[0].students).rglob("*") if p.is_file()}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(jobs: list[ScoreJob], tmp_path: Path) -> None:
    whole = successive_halving(
        [replace(job, students=str(tmp_path / "other")) for job in jobs], LATENCY_MS, RUNGS, here([])
    )
    stop = Path(jobs[0].stop_file)
    with pytest.raises(InterruptedRunError, match="end of an epoch"):
        done: list[ScoreJob] = []
        for result in here(done)([rung_job(job, RUNGS, 1) for job in jobs[:2]]):
            assert isinstance(result.value, ScoredStudent)
        stop.touch()
        successive_halving(jobs, LATENCY_MS, RUNGS, here(done))
    stop.unlink()
    resumed = successive_halving(jobs, LATENCY_MS, RUNGS, here([]))
    assert [r.top1 for r in resumed if isinstance(r, ScoredStudent)] == [
        r.top1 for r in whole if isinstance(r, ScoredStudent)
    ]


def test_a_failed_student_keeps_its_reason_and_the_others_go_on(jobs: list[ScoreJob]) -> None:
    def run(given: Sequence[ScoreJob]) -> Results:
        for job in given:
            broken = job.candidate == jobs[2].candidate
            yield JobResult(job, JobFailure("diverged") if broken else score(job))

    results = successive_halving(jobs, LATENCY_MS, RUNGS, run)
    assert results[2] == JobFailure("diverged")
    assert sorted(r.epochs for r in results if isinstance(r, ScoredStudent)) == [1, 2, 4]


def test_the_same_student_twice_is_scored_once(jobs: list[ScoreJob]) -> None:
    done: list[ScoreJob] = []
    results = successive_halving([jobs[0], jobs[0]], [1.0, 1.0], StandaloneSettings(rungs=(1,)), here(done))
    assert len(done) == 1
    assert results[0] == results[1]


def test_latencies_that_do_not_fit_are_an_error(jobs: list[ScoreJob]) -> None:
    with pytest.raises(RecordError, match="one latency per job, got 1 for 4"):
        successive_halving(jobs, [1.0], RUNGS, here([]))
