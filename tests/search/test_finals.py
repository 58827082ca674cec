"""Finalists and finished students: which are chosen, how each may be deployed, what is measured, what the front is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from search_examples import Prepared

from nas.core.errors import DeviceError, TrainingError
from nas.core.jsonio import write_bytes, write_record
from nas.core.records import (
    BlockConfig,
    Candidate,
    EnergyFigures,
    ExitConfig,
    HeadConfig,
    LatencyEstimate,
    LatencyFigures,
    Measurement,
    Precision,
    StageConfig,
    StemConfig,
)
from nas.core.run import FailedCandidate, FinishStep, LatencyKind, Point, SplitAccuracy
from nas.core.walk import exit_macs
from nas.devices.base import MeasureJob, OnProgress, OnResult, StreamJob, StreamTimes
from nas.export.graph import nominal_quant, random_weights
from nas.latency.estimate import figures
from nas.latency.exits import evaluate_thresholds
from nas.recipe.finish import FINISHED_SCHEMA, FinishedStudent, FinishJob, precision_name
from nas.recipe.pool import JobFailure, JobResult, WorkerPool
from nas.recipe.records import QUANT_FILE, WEIGHTS_FILE, write_scored
from nas.search.finals import (
    _best_settings,
    _measure,
    _points,
    build_points,
    choose_finalists,
    deployments,
    finish,
    mark_front,
    scored_mixes,
    variant_artefact,
    variants,
)
from nas.search.folder import TrialRecord
from nas.search.packages import PointSource
from nas.search.rounds import SearchParts, Target
from nas.search.settings import BudgetSettings, FinishSettings
from nas.testing import SimulatedDevice
from nas.train.settings import DistillSettings

VAL, TEST = 400, 200  # images
Built = tuple[list[Point], list[FailedCandidate], dict[str, PointSource]]


class Working(SimulatedDevice):
    """Latency is nearly all work, int8 twice as fast; remembers networks; those of some candidates fail."""

    def __init__(self) -> None:
        super().__init__()
        self.networks: list[str] = []
        self.broken: set[str] = set()

    def latency_ms(self, job: MeasureJob) -> float:
        if job.kind == "overhead":
            return super().latency_ms(job)
        return 0.003 + job.macs / (4e5 if job.precision == "int8" else 2e5) * (1.0 if job.kind == "row" else 1.02)

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        self.networks += [j.key for j in jobs if j.kind == "network"]
        jobs = [replace(j, model=b"\x00") if self.broken & {j.key, j.key.partition("|")[0]} else j for j in jobs]
        return super().measure(jobs, on_result, progress)


class Disordered(Working):
    """Leaving at the first exit seems to take longer than leaving at the second."""

    def latency_ms(self, job: MeasureJob) -> float:
        return {"#0": 0.2, "#1": 0.1, "#2": 0.3}.get(job.key[-2:], super().latency_ms(job))


@pytest.fixture(autouse=True)
def _rows_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of these tests differ from that of the prepared table: only the rows of a test are measured."""
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 0)


Make = Callable[..., SearchParts]


@pytest.fixture
def make(prepared: Prepared, tmp_path: Path) -> Make:
    """Parts in this test's folder with labels of their own; keywords are settings of the budget."""

    def made(device: SimulatedDevice | None = None, **budget: object) -> SearchParts:
        (tmp_path / "tables").mkdir(exist_ok=True)
        parts = prepared.parts(tmp_path, device=device or Working(), **{"ms": 10.0, **budget})
        return replace(parts, labels=np.arange(VAL) % parts.space.num_classes)

    return made


def network(parts: SearchParts, width: int = 8, *, kernel_size: int = 3, exits: int = 2) -> Candidate:
    """Three stages; up to two exits that take 0.4 and 0.65 of the whole."""
    stages = (
        StageConfig((BlockConfig(4, 8, 4),)),
        StageConfig((BlockConfig(4, 16, width, stride=2),)),
        StageConfig((BlockConfig(width, 48, 24, kernel_size=kernel_size, stride=2),)),
    )
    places = tuple(ExitConfig(k, hidden_channels=4) for k in range(exits))
    return Candidate(16, parts.space.num_classes, StemConfig(4), stages, HeadConfig(), places)


def made_logits(labels: np.ndarray, right: Sequence[float], classes: int, seed: int = 0) -> np.ndarray:
    """Logits [E, N, K] with these shares of right answers; what is hard is hard for all exits, and wrong ones doubt."""
    rng = np.random.default_rng(seed)
    hardness = rng.permutation(len(labels)) / len(labels)
    logits = np.zeros((len(right), len(labels), classes), np.float32)
    for k, share in enumerate(right):
        ok = hardness < share
        margin = np.where(ok, 2 + 5 * (1 - hardness), 1.0) + rng.uniform(0, 2, len(labels))
        logits[k, np.arange(len(labels)), np.where(ok, labels, (labels + 1) % classes)] = margin
    return logits


def finished(
    parts: SearchParts, candidate: Candidate, right: Sequence[float], int8: Sequence[float] | None = None
) -> FinishedStudent:
    """A student with these shares of right answers on validation, per exit; ten points less on test. Not trained."""
    folder = parts.folder.student(candidate.arch_id)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS_FILE, save(random_weights(candidate, 0)))
    write_record(folder / QUANT_FILE, nominal_quant(candidate))
    classes = parts.space.num_classes
    for precision, shares in (("fp32", right), ("int8", int8 or right)):
        for split, labels, less in (("val", parts.labels, 0.0), ("test", np.arange(TEST) % classes, 0.1)):
            logits = made_logits(labels, [share - less for share in shares], classes)
            name = f"final-{split}-{precision}"
            write_scored(folder, candidate, epochs=1, cost_s=0.0, logits=logits, labels=labels, name=name)
    return FinishedStudent(FINISHED_SCHEMA, candidate, 2, 7.5)


def built(parts: SearchParts, students: Sequence[FinishedStudent], settings: FinishSettings | None = None) -> Built:
    labels = parts.labels, np.arange(TEST) % parts.space.num_classes
    (found,), sources = build_points(parts, students, settings or FinishSettings(), labels, {})
    return found.points, found.failed, sources


def networks(parts: SearchParts) -> list[str]:
    device = parts.predictor.device
    assert isinstance(device, Working)
    return device.networks


# Finalists


def plain_records(parts: SearchParts, count: int) -> list[TrialRecord]:
    """Scored candidates without exits, one per architecture, fastest first; all equally accurate."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[tuple[int, ...], Candidate]] = {}
    while len(found) < count:
        genotype = parts.space.sample(rng)
        candidate = parts.space.decode(genotype)
        if not candidate.exits:
            found.setdefault(candidate.arch_id, (genotype, candidate))
    ms = {a: parts.predictor.estimate(c).worst_ms for a, (_, c) in found.items()}
    return [
        TrialRecord(i, 1, *found[a], "complete", "random", ms[a], top1=0.5, exit_top1=(0.5,), exit_shares=(1.0,))
        for i, a in enumerate(sorted(found, key=lambda a: ms[a]))
    ]


def test_most_accurate_one_in_budget_is_a_finalist_although_it_is_slow(make: Make) -> None:
    parts = make()
    fast, *middle, slow, over = plain_records(parts, 8)
    parts = replace(parts, budget=BudgetSettings(ms=(slow.latency_ms + over.latency_ms) / 2))
    records = [replace(fast, top1=0.8), *middle, replace(slow, top1=0.81), replace(over, top1=0.99)]
    assert choose_finalists(parts, records, 1) == [slow.candidate.architecture]
    assert choose_finalists(parts, records, 2) == [slow.candidate.architecture, fast.candidate.architecture]


def test_finalists_are_different_architectures_inside_the_budget(make: Make) -> None:
    parts = make()
    *inside, over, far = plain_records(parts, 8)
    parts = replace(parts, budget=BudgetSettings(ms=(inside[-1].latency_ms + over.latency_ms) / 2))
    twins = [
        replace(r, number=20 + r.number, candidate=r.candidate.architecture.with_precision("int8")) for r in inside
    ]
    undecided = [replace(over, state="stopped", latency_ms=0.1), replace(far, state="failed", top1=None)]
    chosen = choose_finalists(parts, [*inside, *twins, *undecided], 5)
    assert len(chosen) == len(set(chosen)) == 5
    assert set(chosen) <= {r.candidate.architecture for r in inside}
    assert len(choose_finalists(parts, [*inside, *twins], 50)) == len(inside)
    assert choose_finalists(parts, [], 3) == []


@pytest.mark.parametrize("of", ["expected", "p99"])
def test_candidate_that_keeps_the_deadline_with_solved_thresholds_is_a_finalist(make: Make, of: LatencyKind) -> None:
    """Under the thresholds that were sampled no image leaves early, which misses the deadline."""
    parts = make()
    candidate = network(parts, exits=1).with_thresholds((0.99,))
    exit_ms = parts.predictor.estimate(candidate).exit_ms
    parts = replace(parts, budget=BudgetSettings(ms=0.8 * exit_ms[0] + 0.2 * exit_ms[1], of=of))
    record = TrialRecord(0, 1, (0,), candidate, "complete", "random", 1.0, 0.9, (0.6, 0.9), (0.0, 1.0))
    assert choose_finalists(parts, [record], 3) == []
    logits = made_logits(parts.labels, (0.6, 0.9), parts.space.num_classes)
    folder = parts.folder.student(candidate.arch_id)
    name = parts.plan.job(candidate, 0).name
    write_scored(folder, candidate, epochs=0, cost_s=0.0, logits=logits, labels=parts.labels, name=name)
    assert choose_finalists(parts, [record], 3) == [candidate.architecture]
    worst = replace(parts, budget=replace(parts.budget, of="worst"))
    assert choose_finalists(worst, [record], 3) == [candidate.architecture]  # cut behind its exit
    tight = replace(parts, budget=BudgetSettings(ms=0.99 * exit_ms[0], of="worst"))
    assert choose_finalists(tight, [record], 3) == []


def test_a_candidate_whose_cut_network_is_the_fastest_of_the_front_is_a_finalist(make: Make) -> None:
    parts = make()
    with_exit = network(parts, exits=1).with_thresholds((0.99,))
    exit_ms = parts.predictor.estimate(with_exit).exit_ms
    others = [r for r in plain_records(parts, 12) if r.latency_ms > 1.05 * exit_ms[0]][:6]
    parts = replace(parts, budget=BudgetSettings(ms=2 * max(r.latency_ms for r in others)))
    record = TrialRecord(90, 1, (0,), with_exit, "complete", "random", 1.0, 0.4, (0.4, 0.4), (0.0, 1.0))
    folder, name = parts.folder.student(with_exit.arch_id), parts.plan.job(with_exit, 0).name
    records = [*(replace(r, top1=0.5) for r in others), record]
    assert with_exit.architecture not in choose_finalists(parts, records, 2)
    logits = made_logits(parts.labels, (0.4, 0.4), parts.space.num_classes)
    write_scored(folder, with_exit, epochs=0, cost_s=0.0, logits=logits, labels=parts.labels, name=name)
    assert with_exit.architecture in choose_finalists(parts, records, 2)


def test_a_cut_network_may_be_the_best_that_keeps_the_deadlines_of_all_devices(make: Make) -> None:
    parts = make()
    with_exit = network(parts, exits=1).with_thresholds((0.99,))
    exit_ms = parts.predictor.estimate(with_exit).exit_ms
    plain = next(r for r in plain_records(parts, 12) if r.latency_ms < exit_ms[0])
    parts = replace(parts, budget=BudgetSettings(ms=1.01 * exit_ms[0]))
    parts = replace(parts, others=(Target(parts.folder, parts.predictor, parts.budget),))
    record = TrialRecord(90, 1, (0,), with_exit, "complete", "random", 1.0, 0.9, (0.8, 0.9), (0.0, 1.0))
    logits = made_logits(parts.labels, (0.8, 0.9), parts.space.num_classes)
    folder, name = parts.folder.student(with_exit.arch_id), parts.plan.job(with_exit, 0).name
    write_scored(folder, with_exit, epochs=0, cost_s=0.0, logits=logits, labels=parts.labels, name=name)
    assert choose_finalists(parts, [replace(plain, top1=0.3), record], 1) == [with_exit.architecture]


# Full distillation


class Distilled(WorkerPool):
    """Finishes at once, or fails where the candidate is in `failing`."""

    def __init__(self, failing: Sequence[Candidate]) -> None:
        super().__init__(1)
        self.failing = failing
        self.jobs: list[FinishJob] = []

    def map(  # type: ignore[override]
        self,
        function: object,  # noqa: ARG002
        jobs: Sequence[FinishJob],
        should_stop: Callable[[], bool] = lambda: False,  # noqa: ARG002
    ) -> Iterator[JobResult[FinishJob, FinishedStudent]]:
        for job in jobs:
            self.jobs.append(job)
            bad = job.candidate in self.failing
            yield JobResult(job, JobFailure("diverged") if bad else FinishedStudent(1, job.candidate, 3, 1.0))


def test_finalist_that_cannot_be_trained_is_a_failed_row(make: Make) -> None:
    parts = make()
    finalists = [network(parts, width) for width in (8, 16, 12)]
    pool = Distilled(finalists[1:2])
    students, failed = finish(replace(parts, pool=pool), finalists, DistillSettings(epochs=3), FinishSettings())
    assert [s.candidate for s in students] == [finalists[2], finalists[0]]
    assert failed == [FailedCandidate(finalists[1].id, "full distillation", "diverged")]
    assert [j.candidate for j in pool.jobs] == [finalists[i] for i in (1, 2, 0)]  # the longest first
    assert {j.precisions for j in pool.jobs} == {(("int8",) * 5,)}
    with pytest.raises(TrainingError, match="not one of 3 finalists could be trained; the first: diverged"):
        finish(replace(parts, pool=Distilled(finalists)), finalists, DistillSettings(), FinishSettings())


# Threshold settings

ESTIMATE = LatencyEstimate((1.0, 2.0, 4.0), (0.05, 0.08, 0.2), 0, "measured")


def settings_for(of: LatencyKind, ms: float, right: Sequence[float] = (0.5, 0.55, 0.95)) -> list[tuple[float, ...]]:
    labels = np.arange(4000) % 5
    budget = BudgetSettings(ms=ms, of=of, margin_std=1.0)
    found = _best_settings(made_logits(labels, right, 5), labels, ESTIMATE, FinishSettings(), budget)
    assert all(s.shares[-1] > 0 for s in found)
    return [(s.top1, s.expected_ms, *s.shares) for s in found]


def test_deadline_on_the_worst_case_changes_no_threshold() -> None:
    found = settings_for("worst", 1.5)
    assert found == settings_for("worst", 9.0)
    assert found[0][0] >= 0.95  # no accuracy is lost
    assert all(top1 >= 0.95 - 0.08 for top1, *_ in found)


def test_a_setting_that_costs_points_of_accuracy_is_a_real_step_on_the_front() -> None:
    found = settings_for("worst", 9.0, (0.8, 0.85, 0.95))
    assert any(top1 < 0.935 for top1, *_ in found)
    for before, now in pairwise(found):
        assert now[1] < (0.9 if found[0][0] - now[0] > 0.011 else 0.97) * before[1]


def test_setting_for_a_deadline_on_the_mean_keeps_it_with_margin() -> None:
    usual = settings_for("worst", 1.5)
    assert min(s[1] for s in usual) > 1.5
    (solved,) = [s for s in settings_for("expected", 1.5) if s not in usual]
    top1, expected_ms, *shares = solved
    variance = sum(share * (ms - expected_ms) ** 2 for share, ms in zip(shares, ESTIMATE.exit_ms, strict=True))
    own = sum(share * std for share, std in zip(shares, ESTIMATE.exit_std_ms, strict=True))
    assert 1.4 < expected_ms + math.hypot(math.sqrt(2 * variance / 4000), own) <= 1.5
    assert 0.5 < top1 < 0.94
    assert settings_for("expected", 9.0) == usual  # kept already
    assert settings_for("expected", 0.9) == usual  # nothing keeps it


def test_setting_for_a_deadline_on_the_tail_keeps_it_with_margin() -> None:
    usual = settings_for("worst", 2.3)
    (solved,) = [s for s in settings_for("p99", 2.3) if s not in usual]
    late = solved[-1]
    assert 0 < late <= 0.01 - math.sqrt(2 * 0.99 * 0.01 / 4000) + 1e-9
    assert figures(ESTIMATE, solved[2:]).p99_ms == 2.0
    (tight,) = [s for s in settings_for("p99", 2.15) if s not in usual]
    assert tight[2] >= 0.99  # 2.0 ms and the deviation of the least certain exit is later than that


def test_setting_that_never_reaches_the_head_is_left_out() -> None:
    """The second exit knows all that the head knows: what is worth having is the network cut there."""
    assert settings_for("worst", 9.0, right=(0.5, 0.9, 0.9)) == []
    labels = np.arange(50) % 5
    plain = _best_settings(
        made_logits(labels, (0.8,), 5),
        labels,
        LatencyEstimate((3.0,), (0.1,), 0, ""),
        FinishSettings(),
        BudgetSettings(),
    )
    assert [(s.thresholds, s.top1, s.expected_ms, s.shares) for s in plain] == [((), 0.8, 3.0, (1.0,))]


# Ways to deploy a student


def test_student_can_be_deployed_with_any_of_its_exits_and_cut_behind_each(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts), (0.5, 0.7, 0.9))
    found, refused = variants(parts, student, 0.02, {})
    assert refused == []
    kinds = [(v.candidate.precision_label, v.cut, len(v.candidate.stages), len(v.candidate.exits)) for v in found]
    ways = [(None, 3, 0), (None, 3, 1), (None, 3, 1), (None, 3, 2), (0, 1, 0), (1, 2, 0), (1, 2, 1)]
    assert kinds == [(precision, *way) for precision in ("fp32", "int8") for way in ways]
    for v in found:
        assert v.form == ("if" if v.candidate.exits else "plain")
        last = 2 if v.cut is None else v.cut
        assert len(v.val_logits) == len(v.test_logits) == len(v.candidate.exits) + 1
        assert (v.val_logits[-1].argmax(1) == parts.labels).mean() == pytest.approx((0.5, 0.7, 0.9)[last], abs=0.003)
    assert found[6].candidate == student.candidate.truncated(1)
    assert [found[i].candidate.exits[0].after_stage for i in (1, 2)] == [0, 1]


def test_int8_that_loses_too_much_is_refused_with_the_loss(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts), (0.5, 0.7, 0.9), int8=(0.5, 0.7, 0.875))
    found, refused = variants(parts, student, 0.02, {})
    assert {v.candidate.precision_label for v in found if v.cut is None} == {"fp32"}
    assert {v.candidate.precision_label for v in found if v.cut is not None} == {"fp32", "int8"}  # they lose nothing
    whole = student.candidate.with_precision("int8")
    reason = "int8 loses 2.5 points on 400 validation images (limit 2.0)"
    assert refused == [FailedCandidate(whole.id, "quantization", reason)]
    assert variants(parts, student, 0.03, {})[1] == []
    points, failed, sources = built(parts, [student], FinishSettings(int8_loss=0.02))
    assert failed == refused
    assert {p.precision for p in points if sources[p.id].cut is None} == {"fp32"}


def test_mixes_that_the_search_scored_are_finished_too(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts), (0.5, 0.7, 0.9))
    mix = student.candidate.with_precision(["fp32", *["int8"] * len(student.candidate.stages), "fp32"])
    uniform = deployments(parts.space, student.candidate, scored_mixes(parts.folder.trials()))
    assert [set(names) for names in uniform] == [{"fp32"}, {"int8"}]
    genotype = parts.space.smallest()
    parts.folder.add_trial(TrialRecord(0, 1, genotype, mix, "complete", "tpe", 1.0, top1=0.5))
    assert deployments(parts.space, student.candidate, scored_mixes(parts.folder.trials())) == [
        *uniform,
        mix.precisions,
    ]


def test_when_every_precision_is_refused_the_message_says_what_to_change(make: Make) -> None:
    parts = make()
    parts = replace(parts, space=parts.space.restricted(("int8",)))
    student = finished(parts, network(parts, exits=0), (0.9,), int8=(0.5,))
    with pytest.raises(TrainingError, match=r"every precision .* int8 loses 40\.0 points .*--set finish\.int8_loss"):
        built(parts, [student], FinishSettings(int8_loss=0.02))


# Points


def test_point_has_measured_latency_and_accuracy_of_both_splits(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts, exits=0), (0.9,))
    points, failed, sources = built(parts, [student])
    assert failed == []
    assert [p.precision for p in points] == ["fp32", "int8"]
    whole = points[1]
    assert whole.val is not None
    assert whole.test is not None
    assert (whole.val.top1, whole.val.images, whole.val.exit_top1) == (0.9, VAL, (0.9,))
    assert (whole.test.top1, whole.test.images) == (0.8, TEST)
    assert (whole.latency.provenance, whole.is_finished, whole.cost_s) == ("measured", True, 7.5)
    assert whole.latency.worst_ms == pytest.approx(0.003 + 1.02 * exit_macs(whole.candidate)[-1] / 4e5, rel=1e-6)
    assert whole.prediction is not None
    assert whole.prediction.provenance == "predicted"
    assert whole.prediction.worst_ms == pytest.approx(parts.predictor.estimate(whole.candidate).worst_ms)
    assert sources[whole.id] == PointSource(student, None, whole.candidate.precisions)


def test_each_precision_is_deployed_with_the_weights_that_were_trained_for_it(make: Make) -> None:
    parts = make()
    trained = FinishStep("QAT", 1, 0.9, 1.0, "kept", "int8")
    student = replace(
        finished(parts, network(parts, exits=0), (0.9,)), steps=(FinishStep("distil", 2, 0.9, 6.5), trained)
    )
    folder = parts.folder.student(student.candidate.arch_id)
    (fp32, int8), _ = variants(parts, student, 0.02, {})
    before = [variant_artefact(parts, v, v.candidate) for v in (fp32, int8)]
    write_bytes(folder / "weights-int8.safetensors", save(random_weights(student.candidate, 1)))
    write_record(folder / "quant-int8.json", nominal_quant(student.candidate))
    assert variant_artefact(parts, fp32, fp32.candidate) == before[0]
    assert variant_artefact(parts, int8, int8.candidate) != before[1]
    points, _, _ = built(parts, [student])
    assert [[s.name for s in p.steps] for p in points] == [["distil"], ["distil", "QAT"]]


def test_of_mixes_that_are_alike_up_to_a_cut_the_better_one_is_deployed(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts, exits=1), (0.7, 0.9))
    folder, classes = parts.folder.student(student.candidate.arch_id), parts.space.num_classes
    mix: tuple[Precision, ...] = ("int8", "int8", "int8", "int8", "fp32")
    for split, labels in (("val", parts.labels), ("test", np.arange(TEST) % classes)):
        logits = made_logits(labels, (0.8, 0.9), classes)
        name = f"final-{split}-{precision_name(mix)}"
        write_scored(folder, student.candidate, epochs=1, cost_s=0.0, logits=logits, labels=labels, name=name)
    found, _ = variants(parts, student, 0.02, {student.candidate.arch_id: [mix]})
    (cut,) = (v for v in found if v.cut == 0 and v.candidate.precision_label == "int8")
    assert cut.precisions == mix


def test_point_with_exits_has_the_latency_of_the_exits_that_images_take(make: Make) -> None:
    parts = make()
    points, _, sources = built(parts, [finished(parts, network(parts), (0.5, 0.7, 0.9))])
    assert len({p.id for p in points}) == len(points) == len(sources)
    found = [p for p in points if len(p.candidate.exits) == 2 and p.latency.provenance == "measured"]
    best = max(found, key=lambda p: p.val.top1 if p.val else 0.0)
    assert best.val is not None
    assert best.val.top1 >= 0.9  # nothing is lost
    assert best.latency.expected_ms == pytest.approx(np.dot(best.exit_ms, best.exit_shares))
    assert best.latency.expected_ms < 0.9 * best.latency.worst_ms
    assert None not in best.thresholds
    assert best.threshold_curve[-1] == pytest.approx((best.latency.expected_ms, best.val.top1))


class Streaming(Working):
    """Tells that a stream took twice the time; counts its streams."""

    streams = 0
    no_stream = ""

    def stream_times(self, job: StreamJob, _: OnProgress | None = None) -> StreamTimes:
        self.streams += 1
        times = tuple(0.1 + 0.01 * i for i in range(len(job.images)))
        return StreamTimes(times, times, True, tuple(i % len(job.models) for i in range(len(job.images))))


def test_front_students_with_exits_have_a_stream_measured_once_and_one_that_is_off_is_told(make: Make) -> None:
    device = Streaming()
    parts = make(device)
    student = finished(parts, network(parts), (0.5, 0.7, 0.9))
    points, _, _ = built(parts, [student], FinishSettings(stream_images=12))
    wanted = [p for p in points if p.on_front and p.candidate.exits]
    assert wanted and {p.id for p in points if p.stream is not None} == {p.id for p in wanted}
    stream = wanted[0].stream
    assert stream is not None
    assert (stream.images, stream.mean_ms, stream.is_calm) == (12, pytest.approx(0.155), True)
    assert stream.sum_ms == pytest.approx(np.dot(stream.shares, wanted[0].exit_ms))
    count = device.streams
    again, _, _ = built(parts, [student], FinishSettings(stream_images=12))
    assert device.streams == count == len(wanted)  # kept in the run folder
    assert [p.stream for p in again] == [p.stream for p in points]


def test_a_device_that_times_no_streams_after_all_is_told_once(make: Make) -> None:
    device = Streaming()
    device.no_stream = "trtexec takes no images one by one"
    parts = make(device)
    points, _, _ = built(parts, [finished(parts, network(parts), (0.5, 0.7, 0.9))], FinishSettings(stream_images=12))
    assert [p for p in points if p.on_front and p.candidate.exits]
    assert device.streams == 0 and all(p.stream is None for p in points)
    said = [line for line in parts.reporter.plain.said if "stream" in line]
    assert said == [
        "simulated-0: no stream of test images is measured (trtexec takes no images one by one): the expected latency "
        "of students with exits rests on the sum over their exits"
    ]


def test_exit_targets_become_points_of_their_own(make: Make) -> None:
    parts = make()
    student = finished(parts, network(parts, exits=1), (0.6, 0.95))

    def lowest(*targets: str) -> float:
        points = built(parts, [student], FinishSettings(exit_targets=targets))[0]
        return min(p.val.top1 for p in points if len(p.candidate.exits) == 1 and p.val)

    assert lowest() >= 0.94 - 1e-9
    assert lowest("loss=0.1") == pytest.approx(0.85, abs=0.003)


def test_thresholds_are_solved_on_images_of_their_own_where_there_are_any(make: Make) -> None:
    """What is chosen on these is judged, shares and accuracy, on the others."""
    parts = make()
    student = finished(parts, network(parts, exits=1), (0.6, 0.95))
    plain = next(v for v in variants(parts, student, 0.02, {})[0] if v.candidate.exits)
    labels = np.arange(60) % parts.space.num_classes
    apart = replace(plain, solve_logits=made_logits(labels, (0.9, 0.95), 10, seed=9), solve_labels=labels)
    estimate = LatencyEstimate((1.0, 3.0), (0.0, 0.0), 0, "")
    chosen = _best_settings(apart.solve_logits, apart.solve_labels, estimate, FinishSettings(), BudgetSettings())
    (point,) = _points(apart, chosen[:1], estimate, None, None, (parts.labels, np.arange(TEST) % 10), {})
    assert point.val is not None
    top1, shares, _ = evaluate_thresholds(plain.val_logits, parts.labels, chosen[0].thresholds, (1.0, 3.0))
    assert (point.val.top1, point.val.images, point.exit_shares) == (top1, VAL, tuple(shares.tolist()))
    assert chosen[0].images == 60 and chosen[0].shares != point.exit_shares


def test_network_whose_head_is_not_reached_is_a_point_cut_there_with_its_other_exits(make: Make) -> None:
    parts = make()
    points, _, sources = built(parts, [finished(parts, network(parts), (0.6, 0.9, 0.9))])
    assert not [p for p in points if len(p.candidate.stages) == 3 and 1 in [e.after_stage for e in p.candidate.exits]]
    cut = [p for p in points if len(p.candidate.stages) == 2 and len(p.candidate.exits) == 1]
    assert {sources[p.id].cut for p in cut} == {1}
    assert max(p.val.top1 for p in cut if p.val) == 0.9
    assert all(p.exit_shares[-1] > 0 for p in points)


@pytest.mark.parametrize("of", ["expected", "p99"])
def test_deadline_is_among_the_points_where_thresholds_can_keep_it(make: Make, of: LatencyKind) -> None:
    parts = make()
    student = finished(parts, network(parts, exits=1), (0.6, 0.95))
    exit_ms = parts.predictor.estimate(student.candidate.with_precision("int8")).exit_ms
    deadline = {"expected": 0.7 * exit_ms[0] + 0.3 * exit_ms[1], "p99": 1.2 * exit_ms[0]}[of]

    def whole(kind: LatencyKind) -> list[Point]:
        limited = replace(parts, budget=BudgetSettings(ms=deadline, of=kind, margin_std=0.5))
        points = built(limited, [student])[0]
        return [p for p in points if p.candidate.exits and p.latency.provenance == "measured" and p.precision == "int8"]

    assert min(p.latency.expected_ms for p in whole("worst")) > deadline
    inside = [p for p in whole(of) if {"expected": p.latency.expected_ms, "p99": p.latency.p99_ms}[of] <= deadline]
    assert len(inside) == 1
    assert inside[0].val is not None
    assert inside[0].val.top1 > 0.6  # better than leaving at once


def test_finished_students_are_measured_once_also_when_the_run_goes_on(make: Make) -> None:
    parts = make()
    students = [finished(parts, network(parts, width), (0.5, 0.7, 0.9)) for width in (8, 12)]
    points, _, sources = built(parts, students)
    assert len(networks(parts)) == len(set(networks(parts))) > 5
    cut = [sources[p.id].student.candidate for p in points if sources[p.id].cut == 0 and p.precision == "fp32"]
    assert cut == [s.candidate for s in students]  # one network, measured once, and a point of either student
    resumed = make()
    again, _, _ = built(resumed, students)
    assert networks(resumed) == []
    assert again == points


def test_student_that_cannot_be_measured_is_a_failed_row_and_the_rest_goes_on(make: Make) -> None:
    device = Working()
    parts = make(device)
    good, bad = (finished(parts, network(parts, width), (0.5, 0.7, 0.9)) for width in (8, 12))
    cut = {v.candidate.id for v in variants(parts, good, 0.1, {})[0]}
    device.broken = {v.candidate.id for v in variants(parts, bad, 0.1, {})[0]} - cut
    points, failed, sources = built(parts, [good, bad])
    assert failed
    assert {f.id for f in failed} <= device.broken
    assert {f.stage for f in failed} == {"measuring"}
    assert all(f.reason.startswith("not an ONNX model") for f in failed)
    of_bad = [p for p in points if p.candidate.with_thresholds((None,) * len(p.candidate.exits)).id in device.broken]
    assert of_bad
    assert {p.latency.provenance for p in of_bad} == {"predicted"}
    assert not any(p.on_front for p in of_bad)
    assert any(p.on_front and sources[p.id].student == good for p in points)


def test_device_that_measures_no_finished_student_ends_the_run(make: Make) -> None:
    device = Working()
    parts = make(device)
    student = finished(parts, network(parts), (0.5, 0.7, 0.9))
    device.broken = {v.candidate.id for v in variants(parts, student, 0.1, {})[0]}
    with pytest.raises(
        DeviceError, match=r"not one finished student could be measured; the first: not an ONNX model.*Run: nas doctor"
    ):
        built(parts, [student])


def test_student_with_a_row_that_cannot_be_measured_is_a_failed_row(make: Make) -> None:
    device = Working()
    parts = make(device)
    good, bad = network(parts), network(parts, kernel_size=7)
    layers = [f"ir|in=8x4x4|out=24x2x2|k=7|s=2|e=48|se=0|act=relu|{p}" for p in ("fp32", "int8")]
    students = [finished(parts, candidate, (0.5, 0.7, 0.9)) for candidate in (good, bad)]
    device.broken = set(layers)
    points, failed, _ = built(parts, students)
    assert {f.id for f in failed} == {
        replace(bad, exits=exits).with_precision(p).id
        for exits in ((), bad.exits[:1], bad.exits[1:], bad.exits)
        for p in ("fp32", "int8")
    }
    assert all("k=7" in f.reason and "could not be measured" in f.reason for f in failed)
    assert any(p.on_front for p in points)


def test_leaving_later_never_takes_less_time(make: Make) -> None:
    parts = make(Disordered())
    found, _ = variants(parts, finished(parts, network(parts), (0.5, 0.7, 0.9)), 0.02, {})
    whole = next(i for i, v in enumerate(found) if len(v.candidate.exits) == 2)
    times, failed = _measure(parts, found, [whole])
    assert (times[whole].exit_ms, failed) == ((0.2, 0.2, 0.3), [])


# The front


def point(name: str, top1: float, expected: float, worst: float, p99: float, is_measured: bool = True) -> Point:
    candidate = Candidate(16, 4, StemConfig(4), (StageConfig((BlockConfig(4, 8, 4),)),), HeadConfig())
    latency = LatencyFigures(expected, worst, p99, 0.0, "measured" if is_measured else "predicted")
    # On the test split all are alike: it decides nothing.
    return Point(name, candidate, latency, val=SplitAccuracy(top1, 100), test=SplitAccuracy(0.5, 100))


FRONT = [
    point("best on the mean", 0.9, 1.0, 3.0, 3.0),
    point("best at worst", 0.9, 2.0, 2.0, 2.0),
    point("most accurate", 0.95, 2.5, 3.5, 3.5),
    point("beaten by the first", 0.89, 1.1, 3.1, 3.1),
    point("best on the tail", 0.9, 2.1, 3.05, 1.5),
    point("not measured", 0.99, 0.1, 0.1, 0.1, is_measured=False),
]


@pytest.mark.parametrize("of", ["expected", "worst", "p99"])
def test_front_has_what_nothing_beats_on_mean_worst_case_and_accuracy(of: LatencyKind) -> None:
    marked = mark_front(FRONT, of)
    assert [p.id for p in marked] == [p.id for p in FRONT]
    expected = {"best on the mean", "best at worst", "most accurate"} | ({"best on the tail"} if of == "p99" else set())
    assert {p.id for p in marked if p.on_front} == expected
    assert mark_front(marked, of) == marked


def test_a_student_that_takes_the_least_energy_is_on_the_front_where_energy_counts() -> None:
    energies = {"beaten by the first": 1.0}
    points = [replace(p, energy=EnergyFigures(energies.get(p.id, 2.0), 2.0, 0.1, "measured")) for p in FRONT]
    plain = {p.id for p in mark_front(points, "worst") if p.on_front}
    assert {p.id for p in mark_front(points, "worst", True) if p.on_front} == {*plain, "beaten by the first"}
    points[0] = replace(points[0], energy=None)
    assert {p.id for p in mark_front(points, "worst", True) if p.on_front} == plain, "not all have one"


def test_front_of_points_that_were_not_measured_is_empty() -> None:
    assert mark_front(FRONT[-1:], "worst") == FRONT[-1:]
    assert mark_front([], "worst") == []


def test_failed_measurement_is_repeated_when_the_run_goes_on(make: Make) -> None:
    device = Working()
    parts = make(device)
    student = finished(parts, network(parts), (0.5, 0.7, 0.9))
    device.broken = {v.candidate.id for v in variants(parts, student, 0.1, {})[0]}
    with pytest.raises(DeviceError, match="Run: nas doctor"):
        built(parts, [student])
    points, failed, _ = built(make(), [student])  # the device is well again
    assert failed == []
    assert any(p.on_front for p in points)


def test_rows_that_cannot_be_measured_for_any_student_end_the_run_with_their_reason(make: Make) -> None:
    device = Working()
    parts = make(device)
    student = finished(parts, network(parts, kernel_size=7, exits=0), (0.9,))
    device.broken = {f"ir|in=8x4x4|out=24x2x2|k=7|s=2|e=48|se=0|act=relu|{p}" for p in ("fp32", "int8")}
    with pytest.raises(DeviceError, match=r"k=7.*could not be measured"):
        built(parts, [student])
