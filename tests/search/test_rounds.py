"""Rounds without training: quotas, first and undecided batches, failures, budgets, what measured networks change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from search_examples import SPACE, Notes, filled_tables, open_folder

from nas.core.errors import BudgetError, DeviceError, InterruptedRunError, TrainingError
from nas.core.records import Candidate, Measurement
from nas.core.run import LatencyKind, latency_of
from nas.core.walk import total_macs
from nas.devices.base import MeasureJob, OnProgress, OnResult
from nas.latency.fitting import fit_correction
from nas.latency.table import LatencyTable
from nas.recipe.pool import JobFailure, JobResult, WorkerPool
from nas.recipe.records import ScoredStudent, read_scored, write_scored
from nas.recipe.score import ScoreJob, student_folder
from nas.search.choice import choose_sampler
from nas.search.folder import Event, RunFolder, TrialRecord
from nas.search.predictor import Predictor
from nas.search.progress import StopFlag, StoppableReporter
from nas.search.rounds import (
    FAILURES_IN_A_ROW,
    SearchParts,
    _measure_chosen,
    check_budget,
    current_figures,
    known_pool,
    quota,
    run_rounds,
    write_study,
)
from nas.search.scoring import ScoringPlan
from nas.search.select import worth_measuring
from nas.search.settings import BudgetSettings, FeedbackSettings, SearchSettings
from nas.space.space import SearchSpace, load_space, space_from_plain
from nas.space.yamlio import parse_yaml
from nas.testing import SimulatedDevice
from nas.train.settings import DistillSettings

CLASSES = 4
LABELS = np.arange(40) % CLASSES
AMPLE = BudgetSettings(ms=0.02, margin_std=1.0)  # the slowest network of the space needs about 0.007 ms
NO_NETWORKS = FeedbackSettings(0, 0)


class Broken(SimulatedDevice):
    """Models whose key contains a text cannot be measured."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        jobs = [replace(j, model=b"\x00") if self.text in j.key else j for j in jobs]
        return super().measure(jobs, on_result, progress)


def accuracy_by_size(candidate: Candidate) -> float:
    """Larger networks are right more often."""
    return min(1.0, 0.4 + total_macs(candidate) / 1e6)


class ScriptedPool(WorkerPool):
    """Gives scores without training. What a candidate gets is up to a function: its accuracy, or why it fails.

    Every second image is sure at the exits; all are at the head.
    """

    def __init__(self, outcome: Callable[[Candidate], float | str] = accuracy_by_size) -> None:
        super().__init__(1)
        self.outcome = outcome
        self.trained: list[tuple[str, str]] = []
        self.after_each: Callable[[], None] = lambda: None

    def feed(  # type: ignore[override]
        self,
        function: object,  # noqa: ARG002
        next_job: Callable[[], ScoreJob | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[ScoreJob, ScoredStudent]]:
        while (job := next_job()) is not None:
            if should_stop():
                raise InterruptedRunError("stopped")
            value = read_scored(student_folder(job.students, job.candidate.arch_id), job.name) or self._train(job)
            yield JobResult(job, value)

    def _train(self, job: ScoreJob) -> ScoredStudent | JobFailure:
        self.trained.append((job.candidate.arch_id, job.name))
        outcome = self.outcome(job.candidate)
        self.after_each()
        if isinstance(outcome, str):
            return JobFailure(outcome)
        right = np.arange(len(LABELS)) < round(outcome * len(LABELS))
        logits = np.zeros((len(job.candidate.exits) + 1, len(LABELS), CLASSES), np.float32)
        logits[:, np.arange(len(LABELS)), np.where(right, LABELS, (LABELS + 1) % CLASSES)] = 8.0
        logits[:-1, ::2] /= 16  # a confidence of 0.35
        folder = student_folder(job.students, job.candidate.arch_id)
        return write_scored(folder, job.candidate, epochs=0, cost_s=1.0, logits=logits, labels=LABELS, name=job.name)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(parse_yaml(SPACE, "space"), "space", CLASSES)


@pytest.fixture(scope="module")
def tables(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows of the simulated device."""
    return filled_tables(tmp_path_factory.mktemp("tables"), space, SimulatedDevice())


Make = Callable[..., SearchParts]


@pytest.fixture
def make(space: SearchSpace, tables: Path, tmp_path: Path) -> Make:
    """Parts of a search in this test's folder; called again, those of the next call on the same folder."""
    shutil.copytree(tables, tmp_path / "tables")

    def made(
        pool: ScriptedPool | None = None,
        *,
        budget: BudgetSettings = AMPLE,
        feedback: FeedbackSettings = NO_NETWORKS,
        device: SimulatedDevice | None = None,
        notes: Notes | None = None,
        space: SearchSpace = space,
        **settings: object,
    ) -> SearchParts:
        device = device or SimulatedDevice()
        run = RunFolder(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        stop = StopFlag()
        told = StoppableReporter(notes or Notes(), stop)
        predictor = Predictor(space, open_folder(tmp_path / "tables", device), device, told)
        predictor.prepare()
        plan = ScoringPlan(
            "supernet", "", str(run.students), "", str(run.path / "stop"), DistillSettings(), (0,), 0.5, 0, 16
        )
        chosen = SearchSettings(**{"trials": 8, "rounds": 2, "batch": 3, "sampler": "random", **settings})  # type: ignore[arg-type]
        return SearchParts(
            run, space, predictor, plan, pool or ScriptedPool(), LABELS, budget, chosen, feedback, told, stop
        )

    return made


def _unset(record: TrialRecord) -> Candidate:
    return record.candidate.with_thresholds((None,) * len(record.candidate.exits))


def proposed(parts: SearchParts) -> list[tuple[int, ...]]:
    return [g for batch in parts.folder.batches() for g in batch.genotypes]


@pytest.mark.parametrize(("trials", "rounds"), [(10, 3), (96, 2), (7, 7), (5, 1), (11, 4)])
def test_quotas_spread_all_trials_evenly_over_the_rounds(trials: int, rounds: int) -> None:
    settings = SearchSettings(trials=trials, rounds=rounds)
    each = np.diff([0, *(quota(settings, number) for number in range(1, rounds + 1))])
    assert each.sum() == trials
    assert each.max() - each.min() <= 1


def test_the_sampler_is_told_with_what_a_score_costs_beside_a_proposal(make: Make) -> None:
    notes = Notes()
    run_rounds(replace(make(sampler="auto", trials=2, rounds=1, batch=2, notes=notes), score_s=0.2))
    (line,) = (text for text in notes.said if text.startswith("sampler: "))
    assert line.startswith("sampler: greybox (latency is known before training, ")
    assert "a candidate takes about 200 ms of scoring, and of proposing " in line


def test_every_round_scores_its_share_in_batches_and_nothing_twice(make: Make) -> None:
    parts = make(sampler="tpe", trials=16, rounds=3, batch=4)
    run_rounds(parts)
    records = parts.folder.trials()
    assert [r.number for r in records] == list(range(16))
    assert [sum(r.round == n for r in records) for n in (1, 2, 3)] == [5, 6, 5]
    assert [len(b.genotypes) for b in parts.folder.batches()] == [4, 1, 4, 2, 4, 1]
    assert len(set(proposed(parts))) == 16
    assert [r.genotype for r in records] == proposed(parts)
    assert isinstance(parts.pool, ScriptedPool)
    assert len(parts.pool.trained) == len(set(parts.pool.trained))


def test_record_holds_what_the_logits_say_under_the_candidates_thresholds(make: Make) -> None:
    parts = make(trials=12)
    run_rounds(parts)
    for r in parts.folder.trials():
        assert r.candidate == parts.space.decode(r.genotype)
        right = round(accuracy_by_size(r.candidate) * 40) / 40
        assert r.top1 == right
        assert r.exit_top1 == (right,) * (len(r.candidate.exits) + 1)
        leave = {0.2: 1.0, 0.5: 0.5, 0.9: 0.5}
        early = tuple(leave[e.threshold] for e in r.candidate.exits if e.threshold is not None)
        assert r.exit_shares == (*early, 1 - sum(early))
        assert (r.state, r.cost_s > 0, r.epochs) == ("complete", True, 0)


def test_first_batch_has_the_smallest_and_the_largest_network(make: Make, space: SearchSpace) -> None:
    parts = make(trials=3, rounds=1)
    run_rounds(parts)
    first = parts.folder.batches()[0]
    assert first.genotypes[:2] == (space.with_earliest_exits(space.smallest(), 9), space.largest())
    assert first.proposers == ("first", "first", "random")


def test_the_smallest_network_starts_without_exits_where_only_so_it_keeps_the_budget(
    make: Make, space: SearchSpace
) -> None:
    smallest = space.smallest()
    (plain, longer), (std, more) = make().predictor.worst([smallest, space.with_earliest_exits(smallest, 1)])
    assert longer + more > plain + std
    parts = make(budget=BudgetSettings(ms=float(plain + std + longer + more) / 2), trials=3, rounds=1)
    run_rounds(parts)
    assert parts.folder.batches()[0].genotypes[0] == smallest


def test_the_smallest_network_enters_with_and_without_exits_where_the_budget_is_a_mean(
    make: Make, space: SearchSpace
) -> None:
    smallest = space.smallest()
    parts = make(budget=replace(make().budget, of="expected"), trials=4, rounds=1)
    run_rounds(parts)
    assert parts.folder.batches()[0].genotypes[:2] == (space.with_earliest_exits(smallest, 9), smallest)


def test_first_batch_has_the_ends_of_what_keeps_the_budget(make: Make, space: SearchSpace) -> None:
    everything = np.unique(space.canonical_many(np.array(list(np.ndindex(*space.gene_sizes)))), axis=0)
    worst, std = make().predictor.known_worst(everything)
    smallest = make().predictor.worst([space.smallest()])
    # Below the smallest network, which is fp32 or int8 alike: only faster ones are inside.
    tight = BudgetSettings(ms=float((worst + std).min() * 0.5 + (smallest[0] + smallest[1])[0] * 0.5))
    parts = make(budget=tight, trials=3, rounds=1)
    run_rounds(parts)
    inside = everything[worst + std <= tight.ms]
    assert 10 < len(inside) < len(everything) / 2
    macs = {tuple(g): total_macs(space.decode(g)) for g in inside.tolist()}
    small, large = parts.folder.batches()[0].genotypes[:2]
    found = parts.predictor.fastest()
    assert found is not None
    assert small == found[0]
    assert macs[large] >= np.quantile(list(macs.values()), 0.97)
    assert set(proposed(parts)) <= set(macs)


def test_undecided_batch_is_finished_by_the_next_call(make: Make) -> None:
    pool = ScriptedPool()
    parts = make(pool, trials=9, rounds=2, batch=4)
    pool.after_each = lambda: parts.stop.set() if len(pool.trained) == 6 else None
    with pytest.raises(InterruptedRunError, match="stopped"):
        run_rounds(parts)
    before = proposed(parts)
    decided = [r.number for r in parts.folder.trials()]
    assert len(decided) < len(before)
    again = ScriptedPool()
    resumed = make(again, trials=9, rounds=2, batch=4)
    run_rounds(resumed)
    assert [r.number for r in resumed.folder.trials()] == list(range(9))
    assert proposed(resumed)[: len(before)] == before
    assert [r.genotype for r in resumed.folder.trials()] == proposed(resumed)
    assert len(set(proposed(resumed))) == 9
    assert not set(again.trained) & set(pool.trained)
    assert [e.kind for e in resumed.folder.events()] == ["first networks", "round", "round"]


def test_a_run_that_goes_on_where_scores_cost_more_keeps_its_sampler(make: Make) -> None:
    pool, notes = ScriptedPool(), Notes()
    parts = replace(make(pool, trials=8, batch=1, sampler="auto"), score_s=1e-6)  # as if there were very many cores
    pool.after_each = lambda: parts.stop.set() if len(pool.trained) == 4 else None
    with pytest.raises(InterruptedRunError, match="stopped"):
        run_rounds(parts)
    resumed = replace(make(trials=8, batch=1, sampler="auto", notes=notes), score_s=30.0)
    assert choose_sampler("auto", 8, is_latency_known=True, score_s=30.0, batch=1)[0] == "greybox"
    run_rounds(resumed)
    assert {r.proposer for r in resumed.folder.trials()} == {"first", "nsga2"}
    assert any(s.startswith("sampler: nsga2 (chosen when the run began: of 8 trials") for s in notes.said)


def test_candidate_that_failed_before_the_stop_is_not_tried_again(make: Make) -> None:
    pool = ScriptedPool(lambda _: "diverged: NaN" if len(pool.trained) == 2 else 0.5)
    parts = make(pool, trials=4, rounds=1, batch=4)
    pool.after_each = lambda: parts.stop.set() if len(pool.trained) == 3 else None
    with pytest.raises(InterruptedRunError):
        run_rounds(parts)
    failed = pool.trained[1]
    again = ScriptedPool()
    resumed = make(again, trials=4, rounds=1, batch=4)
    run_rounds(resumed)
    assert failed not in again.trained
    records = resumed.folder.trials()
    assert [r.number for r in records if r.state == "failed"]
    assert sum(r.state == "complete" for r in records) == 4
    assert [r.number for r in records] == list(range(len(records)))


def test_rounds_that_are_over_are_not_done_again(make: Make) -> None:
    run_rounds(make())
    pool = ScriptedPool()
    parts = make(pool)
    before = parts.folder.events()
    run_rounds(parts)
    assert pool.trained == []
    assert parts.folder.events() == before


def test_failed_candidates_are_replaced_and_keep_their_reason(make: Make) -> None:
    pool = ScriptedPool(lambda c: "diverged: loss is NaN" if len(pool.trained) % 3 == 0 else accuracy_by_size(c))
    parts = make(pool, trials=10, rounds=2)
    run_rounds(parts)
    records = parts.folder.trials()
    failed = [r for r in records if r.state == "failed"]
    assert len(records) - len(failed) == 10
    assert failed
    assert {(r.reason, r.top1, r.exit_shares) for r in failed} == {("diverged: loss is NaN", None, ())}
    assert [e.values["failed"] for e in parts.folder.events()][-1] == len(failed)


def _no_memory(candidate: Candidate) -> str:
    return f"cannot allocate: {total_macs(candidate)} bytes"


def _diverged(candidate: Candidate) -> str:
    """As training says it, with the name of the student first."""
    return f"student {candidate.arch_id}: training diverged in epoch 1"


@pytest.mark.parametrize(
    ("why", "reason"),
    [(_no_memory, r"cannot allocate: \d+ bytes"), (_diverged, "student a[0-9a-f]{12}: training diverged in epoch 1")],
)
def test_run_ends_when_candidates_keep_failing_in_the_same_way(
    make: Make, why: Callable[[Candidate], str], reason: str
) -> None:
    parts = make(ScriptedPool(why), trials=20)
    with pytest.raises(TrainingError, match=f"^6 candidates in a row failed; the last one: {reason}"):
        run_rounds(parts)
    assert len(parts.folder.trials()) == FAILURES_IN_A_ROW == 6


def test_a_success_in_between_keeps_the_run_going(make: Make) -> None:
    pool = ScriptedPool(lambda _: 0.5 if len(pool.trained) % FAILURES_IN_A_ROW == 0 else "cannot allocate: 9 bytes")
    parts = make(pool, trials=3, rounds=1)
    run_rounds(parts)
    assert sum(r.state == "complete" for r in parts.folder.trials()) == 3


def test_space_that_is_exhausted_ends_the_rounds(make: Make) -> None:
    plain = parse_yaml(SPACE, "space")
    plain["stages"] = [{**plain["stages"][0], "kernel_size": 3}]
    plain |= {"exits": None, "precision": {"choices": ["fp32"]}}
    notes = Notes()
    parts = make(space=space_from_plain(plain, "space", CLASSES), notes=notes, trials=30)
    run_rounds(parts)
    assert len(parts.folder.trials()) == parts.space.size == 4
    assert any("no new candidate inside the budget can be found" in text for text in notes.said)
    assert [e.values["trials"] for e in parts.folder.events()] == [0, 4, 4]


def test_budget_below_the_fastest_candidate_ends_the_run_before_any_training(make: Make, space: SearchSpace) -> None:
    parts = make()
    found = parts.predictor.fastest()
    assert found is not None
    with pytest.raises(BudgetError) as caught:
        check_budget(parts.predictor, BudgetSettings(ms=found[1] / 1.3), 0)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.startswith(f"no candidate of space mini-16 keeps {found[1] / 1.3:g} ms (worst) on simulated-0; ")
    assert f"the closest, {space.decode(found[0]).id}, needs about {found[1]:.4g} ms" in text
    advice = re.search(r"\(--set budget\.ms=(\S+)\)", text)
    assert advice is not None
    wide = BudgetSettings(ms=float(advice[1]))
    check_budget(parts.predictor, wide, 0)
    run_rounds(make(budget=wide, trials=2, feedback=FeedbackSettings(first_networks=4)))  # what the message says helps


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("of", ["worst", "expected"])
def test_budget_that_nothing_keeps_ends_the_rounds(
    make: Make, monkeypatch: pytest.MonkeyPatch, of: LatencyKind, is_whole: bool
) -> None:
    """What the first look let pass: a miss within the error of the plain sum, the mean, a table filled lazily."""
    found = make().predictor.fastest()
    assert found is not None
    if not is_whole:
        monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 0)
    pool = ScriptedPool()
    parts = make(pool, budget=BudgetSettings(ms=found[1] * (0.9 if of == "worst" else 0.45), of=of))
    check_budget(parts.predictor, parts.budget, 0)
    with pytest.raises(
        BudgetError, match=rf"ms \({of}\) on simulated-0; the closest, r16-\S+, needs about .*--set bud"
    ):
        run_rounds(parts)
    assert (pool.trained, parts.folder.batches()) == ([], ())


def _area(points: Sequence[tuple[float, float]], least: float, budget_ms: float) -> float:
    """Share of the rectangle above `least` and before the budget that lies behind the points (top1, ms)."""
    ordered = sorted((ms, top1) for top1, ms in points if ms < budget_ms)
    area, best = 0.0, least
    for (ms, top1), (following, _) in zip(ordered, [*ordered[1:], (budget_ms, 0.0)], strict=True):
        best = max(best, top1)
        area += (best - least) * (following - ms)
    return area / (budget_ms * (1 - least))


def test_event_of_a_round_has_the_hypervolume_of_all_scores(make: Make) -> None:
    notes = Notes()
    parts = make(budget=replace(AMPLE, ms=0.01), feedback=FeedbackSettings(3, 0), notes=notes, trials=10)
    run_rounds(parts)
    first, *rounds = parts.folder.events()
    assert (first.kind, first.values["hypervolume"], first.values["trials"]) == ("first networks", None, 0)
    records = parts.folder.trials()
    now = current_figures(parts, records)
    for event, count in zip(rounds, (5, 10), strict=True):
        points = [(r.score, f.expected_ms) for r, f in zip(records[:count], now[:count], strict=True)]
        assert event.values["hypervolume"] == pytest.approx(_area(points, 0.25, 0.01))
        assert (event.values["trials"], event.values["measured"], event.values["mape"]) == (count, 0, None)
    assert any(f"hypervolume {rounds[1].values['hypervolume']:.3f}" in text for text in notes.said)


def test_events_have_the_measured_networks_and_the_error_of_their_predictions(make: Make) -> None:
    device, notes = SimulatedDevice(network_factor=1.3), Notes()
    parts = make(feedback=FeedbackSettings(4, 2), device=device, notes=notes)
    run_rounds(parts)
    events = parts.folder.events()
    assert [len(e.pairs) for e in events] == [4, 2, 2]
    assert [{p.round for p in e.pairs} for e in events] == [{0}, {1}, {2}]
    for event in events:
        assert event.values["measured"] == len(event.pairs)
        assert event.values["mape"] == pytest.approx(
            np.mean([abs(p.predicted_ms / p.measured_ms - 1) for p in event.pairs])
        )
        assert any(f"predicted with {100 * float(event.values['mape'] or 0):.1f} % mean error" in t for t in notes.said)
    scored = {_unset(r).id for r in parts.folder.trials()}
    assert {p.candidate_id for e in events[1:] for p in e.pairs} <= scored


def test_first_networks_are_spread_over_the_latencies_inside_the_budget(make: Make, space: SearchSpace) -> None:
    everything = np.unique(space.canonical_many(np.array(list(np.ndindex(*space.gene_sizes)))), axis=0)
    worst, _ = make().predictor.known_worst(everything)
    middle = float(np.quantile(worst, 0.5))
    parts = make(budget=BudgetSettings(ms=middle), feedback=FeedbackSettings(5, 0), trials=2)
    run_rounds(parts)
    predicted = sorted(p.predicted_ms for p in parts.folder.events()[0].pairs)
    inside = worst[worst <= 1.2 * middle]
    assert len(predicted) == 5
    assert predicted[-1] <= 1.2 * middle
    assert predicted[0] <= np.quantile(inside, 0.02)
    assert predicted[-1] >= np.quantile(inside, 0.98)
    assert np.quantile(inside, 0.3) < predicted[2] < np.quantile(inside, 0.7)


def test_device_that_measures_no_network_ends_the_run(make: Make) -> None:
    parts = make(feedback=FeedbackSettings(3, 0), device=Broken("r16-"))
    with pytest.raises(
        DeviceError,
        match=r"not one of 3 networks could be measured on simulated-0, the first: not an ONNX model.*Run: nas doctor",
    ):
        run_rounds(parts)
    assert parts.folder.events() == ()


def test_networks_that_cannot_be_measured_are_rows_of_the_event(make: Make) -> None:
    notes = Notes()
    parts = make(feedback=FeedbackSettings(8, 2), device=Broken("-fp32-"), notes=notes)
    run_rounds(parts)
    first = parts.folder.events()[0]
    assert len(first.pairs) + len(first.failed) == 8
    assert {p.precision for p in first.pairs} == {"int8"}
    assert all("-fp32-" in f.id and f.reason.startswith("not an ONNX model") for f in first.failed)
    assert f"{len(first.failed)} networks could not be measured, the first: {first.failed[0].id}" in notes.warned[0]
    assert len(parts.folder.trials()) == 8


@pytest.mark.parametrize("of", ["worst", "expected", "p99"])
def test_networks_are_chosen_by_the_latency_that_the_budget_limits(
    make: Make, monkeypatch: pytest.MonkeyPatch, of: LatencyKind
) -> None:
    parts = make(trials=40, rounds=1, batch=40)
    run_rounds(parts)
    scored = {_unset(r): r for r in parts.folder.trials()}
    now = current_figures(parts, list(scored.values()))
    calls: list[tuple[Sequence[float], float, int, list[int]]] = []

    def spy(
        top1: Sequence[float],
        latency_ms: Sequence[float],
        limited_ms: Sequence[float],
        std_ms: Sequence[float],
        budget_ms: float,
        count: int,
        measured: Sequence[int],
    ) -> list[int]:
        calls.append((limited_ms, budget_ms, count, list(measured)))
        return worth_measuring(top1, latency_ms, limited_ms, std_ms, budget_ms, count, measured)

    monkeypatch.setattr("nas.search.rounds.worth_measuring", spy)
    limited = replace(parts, budget=BudgetSettings(0.02, of, also_ms=(0.006,)), feedback=FeedbackSettings(0, 3))
    pairs, failed = _measure_chosen(limited, parts.folder.trials(), 1)
    assert failed == () and len(pairs) == 3
    (first, long_ms, long_count, before), (_, short_ms, short_count, then) = calls
    assert first == pytest.approx([latency_of(f, of) for f in now])
    assert (long_ms, long_count, short_ms, short_count) == (0.02, 2, 0.006, 1)
    assert before == [] and len(then) == 2  # what one deadline takes counts for the next
    again, _ = _measure_chosen(limited, parts.folder.trials(), 2)
    assert not {p.candidate_id for p in again} & {p.candidate_id for p in pairs}
    assert {list(scored)[i].id for i in calls[2][3]} == {p.candidate_id for p in pairs}  # known by now


@pytest.mark.parametrize("kind", ["first networks", "round"])
def test_networks_of_a_call_that_ended_before_they_were_recorded_are_recorded_by_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    add_event = RunFolder.add_event

    def dies(folder: RunFolder, event: Event) -> None:
        if event.kind == kind:
            raise InterruptedRunError("between the last measurement and its record")
        add_event(folder, event)

    parts = make(feedback=FeedbackSettings(3, 2), rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add_event", dies)
        with pytest.raises(InterruptedRunError):
            run_rounds(parts)
    measured = set(parts.predictor.table.networks)
    resumed = make(feedback=FeedbackSettings(3, 2), rounds=1)
    run_rounds(resumed)
    first, end = resumed.folder.events()
    assert (len(first.pairs), len(end.pairs)) == (3, 2)
    assert measured <= set(resumed.predictor.table.networks)
    assert len(resumed.predictor.table.networks) == len({p.candidate_id for p in (*first.pairs, *end.pairs)}) == 5


def test_scored_candidates_are_estimated_anew_when_the_correction_changes(make: Make) -> None:
    device = SimulatedDevice(network_factor=40.0)  # the work of a simulated row is small beside an empty call
    parts = make(device=device, trials=12, rounds=1)
    run_rounds(parts)
    records = parts.folder.trials()
    before = current_figures(parts, records)
    parts.predictor.measure([parts.space.decode(r.genotype) for r in records[:8]], 1)
    fits = fit_correction(parts.predictor.table).fits
    assert fits
    after = current_figures(parts, parts.folder.trials())
    assert np.mean([a.worst_ms / b.worst_ms for a, b in zip(after, before, strict=True)]) > 1.1
    assert [r.latency_ms for r in parts.folder.trials()] == pytest.approx([f.worst_ms for f in before])  # as proposed
    for r, f in zip(records, after, strict=True):
        estimate = parts.predictor.estimate(r.candidate)
        assert f.expected_ms == pytest.approx(np.dot(estimate.exit_ms, r.exit_shares))
    write_study(parts)
    path = parts.folder.path / "study.db"
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{path}")
    assert [t.values for t in study.trials] == [[r.score, f.expected_ms] for r, f in zip(records, after, strict=True)]
    assert (parts.folder.path / "importances.json").exists()


@pytest.mark.parametrize(
    ("limit", "each"), [(None, [4, 2, 2]), (8, [4, 2, 2]), (7, [4, 2, 1]), (5, [4, 1, 0]), (3, [3, 0, 0]), (0, [0] * 3)]
)
def test_networks_of_all_rounds_together_keep_their_limit(make: Make, limit: int | None, each: list[int]) -> None:
    feedback = FeedbackSettings(4, 2, max_engines=limit)
    parts = make(feedback=feedback)
    run_rounds(parts)
    assert [len(e.pairs) for e in parts.folder.events()] == each
    assert len(parts.predictor.table.networks) == sum(each) == feedback.engines(2)


def test_rounds_measure_different_networks(make: Make) -> None:
    parts = make(feedback=FeedbackSettings(4, 2))
    run_rounds(parts)
    keys = [p.candidate_id for e in parts.folder.events()[1:] for p in e.pairs]
    assert len(keys) == len(set(keys)) == 4


def test_a_table_filled_row_by_row_still_gives_networks_to_measure_and_both_ends(tmp_path: Path) -> None:
    """A real space of that kind: of 2,048 random candidates not one has all its rows among those that were filled."""
    space = load_space(Path(__file__).parents[2] / "search_spaces" / "mobilenetv3-64.yaml", 10)
    device = SimulatedDevice()
    predictor = Predictor(space, LatencyTable.open(tmp_path, device.profile), device, Notes())
    assert not predictor.is_whole
    predictor.prepare()
    pool = known_pool(predictor, 0, 0)
    worst, _ = predictor.known_worst(pool)
    assert len(pool) >= 40
    assert not np.isnan(worst).any()
    assert np.array_equal(known_pool(predictor, 0, 5), pool)  # nothing new is measured for another seed of the draw
    assert worst.max() > 5 * worst.min()
    rows = len(predictor.table.rows)
    with pytest.raises(BudgetError, match=r"--set budget\.ms="):
        check_budget(predictor, BudgetSettings(ms=float(worst.min()) / 4), 0)
    assert len(predictor.table.rows) == rows
