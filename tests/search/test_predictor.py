"""Predicted latencies: lazily measured rows, honest predictions beside measurements, budgets, the fastest network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_examples import SPACE, Notes, filled_tables, open_folder

from nas.core.records import Candidate, Measurement
from nas.core.run import LatencyKind
from nas.core.walk import expand
from nas.devices.base import MeasureJob, OnProgress, OnResult
from nas.latency.interpolate import family_of
from nas.latency.lines import network_key
from nas.latency.table import LatencyTable
from nas.search.predictor import BudgetFilter, Predictor, deployed_form, lost_choices
from nas.search.rounds import check_budget
from nas.search.settings import BudgetSettings
from nas.space.space import SearchSpace, space_from_plain
from nas.space.yamlio import parse_yaml
from nas.testing import SimulatedDevice

Genotype = tuple[int, ...]


class Asked(SimulatedDevice):
    """Remembers the keys of rows and networks that it was asked for; those with a text in their key fail."""

    def __init__(self, broken: str = "nothing") -> None:
        super().__init__()
        self.broken = broken
        self.asked: list[str] = []

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        self.asked += [j.key for j in jobs if j.kind != "overhead"]
        jobs = [replace(j, model=b"\x00") if self.broken in j.key else j for j in jobs]
        return super().measure(jobs, on_result, progress)


class SlowNetworks(Asked):
    """Whole networks take 1.3 times the work of their rows, exactly; work counts a hundred times as much as else."""

    def latency_ms(self, job: MeasureJob) -> float:
        work = job.macs / 2e5 * (1.0 if job.kind == "row" else 1.3)
        return super().latency_ms(job) if job.kind == "overhead" else 0.003 + work


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(parse_yaml(SPACE, "space"), "space", 4)


@pytest.fixture(scope="module")
def tables(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows of the simulated device."""
    return filled_tables(tmp_path_factory.mktemp("tables"), space, SimulatedDevice())


@pytest.fixture(scope="module")
def slow_tables(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows of a device whose networks are 1.3 times as slow as the sum of their rows."""
    return filled_tables(tmp_path_factory.mktemp("slow"), space, SlowNetworks())


@pytest.fixture
def slow(space: SearchSpace, slow_tables: Path, tmp_path: Path) -> Predictor:
    """As `predictor`, of the device with slow networks."""
    shutil.copytree(slow_tables, tmp_path / "tables")
    device = SlowNetworks()
    return Predictor(space, open_folder(tmp_path / "tables", device), device, Notes())


@pytest.fixture
def predictor(space: SearchSpace, tables: Path, tmp_path: Path) -> Predictor:
    """Knows all rows and no network."""
    shutil.copytree(tables, tmp_path / "tables")
    device = Asked()
    return Predictor(space, open_folder(tmp_path / "tables", device), device, Notes())


def some(space: SearchSpace, count: int, seed: int = 0) -> list[Genotype]:
    """Different random genotypes."""
    rng = np.random.default_rng(seed)
    found = dict.fromkeys(space.sample(rng) for _ in range(10 * count))
    return list(found)[:count]


def asked(predictor: Predictor) -> list[str]:
    """Keys that the device was asked for since the last look."""
    device = predictor.device
    assert isinstance(device, Asked)
    keys, device.asked = device.asked, []
    return keys


def test_small_space_has_its_whole_table_filled_once(space: SearchSpace, tmp_path: Path) -> None:
    device = Asked()
    predictor = Predictor(space, open_folder(tmp_path, device), device, notes := Notes())
    assert predictor.is_whole
    predictor.prepare()
    keys = asked(predictor)
    assert sorted(keys) == sorted({layer.key for layer in space.layers()})
    assert set(notes.stages) == {"latency table"}
    predictor.prepare()
    predictor.worst(some(space, 50))
    Predictor(space, open_folder(tmp_path, device), device, Notes()).prepare()  # a later run with the same table
    assert asked(predictor) == []


def test_with_a_limit_some_rows_are_measured_and_the_others_interpolated(space: SearchSpace, tmp_path: Path) -> None:
    device, notes = Asked(), Notes()
    predictor = Predictor(space, open_folder(tmp_path, device), device, notes, max_rows=30)
    predictor.prepare()
    first, rows = set(asked(predictor)), {x.key for x in space.layers()}
    families = {family_of(x) for x in space.layers()}
    assert len(first) <= 30 + len(families) < len(rows)
    assert predictor.is_whole and predictor.table.interpolated == rows - first
    assert f"{len(rows - first)} of {len(rows)} rows are interpolated from measured ones" in "\n".join(notes.said)
    genotypes = some(space, 40)
    worst, std = predictor.worst(genotypes)
    assert not np.isnan(worst).any() and asked(predictor) == []
    whole = Predictor(space, open_folder(tmp_path / "whole", device), device, Notes())
    whole.prepare()
    asked(whole)
    exact, exact_std = whole.worst(genotypes)
    assert np.abs(worst / exact - 1).mean() < 0.1
    assert (std >= exact_std).all() and std.mean() > exact_std.mean()
    assert len(LatencyTable.read(predictor.table.folder).rows) == len(first)


def test_rows_of_a_measured_network_are_measured_where_they_were_interpolated(
    space: SearchSpace, tmp_path: Path
) -> None:
    device = Asked()
    predictor = Predictor(space, open_folder(tmp_path, device), device, Notes(), max_rows=30)
    predictor.prepare()
    candidate = next(
        c for c in map(space.decode, some(space, 40)) if {x.key for x in expand(c)} & predictor.table.interpolated
    )
    guessed = {x.key for x in expand(candidate)} & predictor.table.interpolated
    asked(predictor)
    predictor.measure([candidate], 1)
    assert guessed <= set(asked(predictor))
    assert not guessed & predictor.table.interpolated
    assert predictor.table.interpolated  # the others still are


def test_rows_of_a_large_space_are_measured_when_a_candidate_needs_them(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", len(space.layers()) - 1)
    device = Asked()
    predictor = Predictor(space, open_folder(tmp_path, device), device, Notes())
    assert not predictor.is_whole
    predictor.prepare()
    assert asked(predictor) == []
    assert predictor.fastest() is None  # nobody knows
    genotype = space.smallest()
    assert np.isnan(predictor.known_worst(np.array([genotype]))[0]).all()
    worst, std = predictor.worst([genotype])
    assert worst[0] > 0 < std[0]
    assert set(asked(predictor)) == {layer.key for layer in expand(space.decode(genotype))}
    assert predictor.worst([genotype])[0] == worst == predictor.known_worst(np.array([genotype]))[0]
    assert asked(predictor) == []
    other = space.decode(space.largest()).with_precision("int8")
    predictor.estimate(other)
    assert set(asked(predictor)) <= {layer.key for layer in expand(other)}


def test_borrowed_rows_are_not_measured_and_networks_correct_them(
    space: SearchSpace, slow_tables: Path, tmp_path: Path
) -> None:
    """Networks take 1.3 times as long as their rows, which are those of another runtime."""
    shutil.copytree(slow_tables, tmp_path / "theirs")
    state = next((tmp_path / "theirs").glob("*/device.json"))
    state.write_text(state.read_text().replace('"runtime_version": "', '"runtime_version": "old '))
    device = SlowNetworks()
    table = open_folder(tmp_path / "mine", device)
    table.borrow(state.parent)
    predictor = Predictor(space, table, device, Notes())
    predictor.prepare()
    check_budget(predictor, BudgetSettings(ms=1e-6), 0)  # times of another device refuse nobody
    assert asked(predictor) == []
    networks = some(space, 24)
    fp32 = [g for g in networks if space.decode(g).precision_label == "fp32"]
    pairs, _ = predictor.measure([space.decode(g) for g in fp32[:-1]], 0)
    assert [p.predicted_ms / p.measured_ms for p in pairs] == pytest.approx([1 / 1.3] * len(pairs), rel=0.1)
    assert not table.borrowed & {*asked(predictor)}
    again, _ = predictor.measure([space.decode(fp32[-1])], 1)
    assert again[0].predicted_ms == pytest.approx(again[0].measured_ms, rel=0.05)
    assert LatencyTable.read(table.folder).correction() is None  # it rests on borrowed rows
    assert not LatencyTable.read(table.folder).rows


def test_many_estimates_equal_those_of_single_candidates(space: SearchSpace, predictor: Predictor) -> None:
    genotypes = some(space, 40)
    predictor.measure([space.decode(g) for g in genotypes[:5]], 0)  # corrected ones too
    assert predictor.correction is not None
    found = predictor.estimates(genotypes)
    worst, worst_std = predictor.worst(genotypes)
    first = predictor.first_exit(genotypes)
    for i, genotype in enumerate(genotypes):
        one = predictor.estimate(space.decode(genotype))
        assert found[i].exit_ms == pytest.approx(one.exit_ms)
        assert found[i].exit_std_ms == pytest.approx(one.exit_std_ms, rel=1e-4)  # single precision
        assert (worst[i], worst_std[i]) == pytest.approx((one.worst_ms, one.worst_std_ms), rel=1e-4)
        assert first[i] == pytest.approx(one.exit_ms[0])
    assert {len(e.exit_ms) for e in found} == {1, 2}
    assert predictor.estimates([]) == []


def test_fastest_is_the_least_of_the_whole_space(space: SearchSpace, predictor: Predictor) -> None:
    everything = space.canonical_many(np.array(list(np.ndindex(*space.gene_sizes))))
    worst, _ = predictor.known_worst(everything)
    found = predictor.fastest()
    assert found is not None
    assert found[1] == pytest.approx(worst.min())
    assert found[1] == pytest.approx(predictor.estimate(space.decode(found[0])).worst_ms)
    assert space.canonical(found[0]) == found[0]


def test_candidates_with_a_row_that_cannot_be_measured_are_refused_not_fatal(
    space: SearchSpace, tmp_path: Path
) -> None:
    notes, device = Notes(), Asked("k=5")
    predictor = Predictor(space, open_folder(tmp_path, device), device, notes)
    predictor.prepare()
    assert any("rows could not be measured, the first: ir|in=4x8x8" in text for text in notes.warned)
    genotypes = some(space, 120)
    fives = [any(b.kernel_size == 5 for s in space.decode(g).stages for b in s.blocks) for g in genotypes]
    assert 0 < sum(fives) < len(fives)
    for of in ("worst", "expected", "p99"):
        limit = BudgetFilter(predictor, 1e9, of, 1.0)
        assert limit.known(np.array(genotypes)).tolist() == [not five for five in fives]
        assert [limit.keeps(g) for g in genotypes[:20]] == [not five for five in fives[:20]]
    found = predictor.fastest()
    assert found is not None
    assert all(b.kernel_size == 3 for s in space.decode(found[0]).stages for b in s.blocks)


def test_prediction_beside_a_measurement_did_not_know_it(space: SearchSpace, slow: Predictor) -> None:
    """Only networks that were measured before may teach how much slower whole networks are."""
    candidates = [space.decode(g).with_precision("fp32") for g in some(space, 8)]
    first, failed = slow.measure(candidates[:4], 0)
    assert failed == ()
    assert [(p.candidate_id, p.precision, p.round) for p in first] == [(c.id, "fp32", 0) for c in candidates[:4]]
    assert all(p.error < -0.15 for p in first)
    second, _ = slow.measure(candidates[4:], 1)
    assert all(abs(p.error) < 0.06 for p in second)
    again, _ = slow.measure(candidates[:4], 2)  # in the table already, as after a kill
    assert [p.measured_ms for p in again] == [p.measured_ms for p in first]
    assert all(abs(p.error) < 0.06 for p in again)  # learnt from the other four
    resumed = Predictor(space, slow.table, slow.device, Notes())
    repeated, _ = resumed.measure(candidates, 3)
    assert all(p.error < -0.15 for p in repeated)  # nothing else is known then
    networks = [key for key in asked(slow) if key.startswith("r16-")]
    assert len(networks) == len(set(networks)) == 8


class Updated(SlowNetworks):
    """As its parent, until an update of the runtime makes everything with 5x5 kernels three times as slow."""

    def __init__(self) -> None:
        super().__init__()
        self.is_updated = False
        self.once = False  # only the first look at each network is slow, as if something had disturbed it

    def latency_ms(self, job: MeasureJob) -> float:
        is_slow = self.is_updated and job.kind != "overhead" and ("k=5" in job.key or job.kind == "network")
        if self.once and (job.kind == "row" or self.asked.count(job.key) > 1):
            is_slow = False
        return super().latency_ms(job) * (3 if is_slow else 1)


@pytest.fixture
def proven(space: SearchSpace, slow_tables: Path, tmp_path: Path) -> tuple[Predictor, Updated, list[Genotype]]:
    """A table that agrees with eight fp32 networks, its device, and further fp32 genotypes."""
    shutil.copytree(slow_tables, tmp_path / "tables")
    device = Updated()
    predictor = Predictor(space, open_folder(tmp_path / "tables", device), device, Notes())
    fp32 = [g for g in some(space, 60) if space.decode(g).precision_label == "fp32"]
    predictor.measure([space.decode(g) for g in fp32[:8]], 0)
    device.asked.clear()
    with_k5 = [g for g in fp32[8:] if any("k=5" in x.key for x in expand(space.decode(g)))]
    return predictor, device, with_k5


def warned(predictor: Predictor) -> list[str]:
    notes = predictor._reporter
    assert isinstance(notes, Notes)
    return notes.warned


def test_networks_that_contradict_a_proven_table_are_told_as_drift_and_their_rows_measured_anew(
    space: SearchSpace, proven: tuple[Predictor, Updated, list[Genotype]]
) -> None:
    predictor, device, genotypes = proven
    candidate = space.decode(genotypes[0])
    slow_key = next(x.key for x in expand(candidate) if "k=5" in x.key)
    before = predictor.table.row_ms(slow_key)
    device.is_updated = True
    pairs, _ = predictor.measure([candidate], 1)
    (message,) = warned(predictor)
    assert message.startswith("drift: 1 of 1 measured networks contradict the table by more than 3 deviations, most")
    assert candidate.id in message and message.endswith("They and their rows are measured anew")
    assert predictor.table.row_ms(slow_key) == pytest.approx(3 * before, rel=0.01)
    assert device.asked.count(network_key(candidate, deployed_form(candidate))) == 2
    assert pairs[0].predicted_ms < 0.5 * pairs[0].measured_ms  # what was said before is what is reported


def test_a_disturbed_network_is_found_out_and_does_not_stay_in_the_table(
    space: SearchSpace, proven: tuple[Predictor, Updated, list[Genotype]]
) -> None:
    predictor, device, genotypes = proven
    device.is_updated = device.once = True
    pairs, _ = predictor.measure([space.decode(genotypes[0])], 1)
    assert len(warned(predictor)) == 1
    assert pairs[0].measured_ms == pytest.approx(pairs[0].predicted_ms, rel=0.1)


def test_networks_that_agree_or_a_table_without_proof_are_no_drift(
    space: SearchSpace, proven: tuple[Predictor, Updated, list[Genotype]]
) -> None:
    predictor, device, genotypes = proven
    predictor.measure([space.decode(genotypes[0])], 1)
    device.is_updated = True
    predictor.measure([space.decode(genotypes[1]).with_precision("int8")], 2)  # no int8 network was measured before
    assert warned(predictor) == []


def test_measuring_networks_corrects_all_later_estimates(space: SearchSpace, slow: Predictor) -> None:
    genotypes = some(space, 12)
    before = np.array([e.worst_ms for e in slow.estimates(genotypes)])
    slow.measure([space.decode(g) for g in genotypes[:6]], 0)
    after = np.array([e.worst_ms for e in slow.estimates(genotypes)])
    assert np.median(after / before) == pytest.approx(1.3, abs=0.05)
    resumed = Predictor(space, open_folder(slow.table.folder.parent, slow.device), slow.device, Notes())
    assert [e.worst_ms for e in resumed.estimates(genotypes)] == pytest.approx(after.tolist())


def test_a_killed_run_goes_on_with_the_networks_that_it_had_fitted(space: SearchSpace, slow: Predictor) -> None:
    """A network that was measured, but not fitted to when the run ended, waits for the next refit."""
    genotypes = some(space, 12)
    slow.measure([space.decode(g) for g in genotypes[:6]], 0)
    before = slow.estimates(genotypes)
    late = space.decode(genotypes[-1])
    form = deployed_form(late)
    another = next(iter(slow.table.networks.values())).measurement
    wrong = 3 * before[-1].worst_ms
    slow.table.add(
        replace(
            another,
            key=network_key(late, form),
            precision=late.precision_label,
            latency_ms=wrong,
            rounds_ms=((wrong,),),
            accepted=(True,),
            session_ms=(),
        ),
        late,
        form,
    )
    resumed = Predictor(space, open_folder(slow.table.folder.parent, slow.device), slow.device, Notes())
    resumed.prepare()
    assert resumed.estimates(genotypes) == before
    resumed.refit()
    assert resumed.estimates(genotypes)[-1].worst_ms > 1.005 * before[-1].worst_ms


def test_networks_are_measured_as_they_are_deployed(space: SearchSpace, predictor: Predictor) -> None:
    """With exits as decisions, else only the head: the worst case of each."""
    candidates = [space.decode(g) for g in some(space, 6)]
    assert {deployed_form(c) for c in candidates} == {"if", "plain"}
    pairs, _ = predictor.measure(candidates, 0)
    by_candidate = {n.candidate: n for n in predictor.table.networks.values()}
    for candidate, pair in zip(candidates, pairs, strict=True):
        network = by_candidate[candidate.with_thresholds((None,) * len(candidate.exits))]
        assert network.form == deployed_form(candidate)
        assert network.measurement.latency_ms == pair.measured_ms


def test_network_that_cannot_be_measured_is_a_result_with_its_reason(
    space: SearchSpace, tables: Path, tmp_path: Path
) -> None:
    shutil.copytree(tables, tmp_path / "tables")
    device = Asked("-fp32-")
    predictor = Predictor(space, open_folder(tmp_path / "tables", device), device, Notes())
    small = space.decode(space.smallest())
    candidates: list[Candidate] = [small.with_precision("fp32"), small.with_precision("int8")]
    pairs, failed = predictor.measure(candidates, 2)
    assert [p.candidate_id for p in pairs] == [candidates[1].id]
    assert [(f.id, f.stage, f.round) for f in failed] == [(candidates[0].id, "measuring", 2)]
    assert failed[0].reason.startswith("not an ONNX model")
    before = predictor.correction
    pairs, failed = predictor.measure(candidates[:1], 3)
    assert (pairs, len(failed), predictor.correction) == ((), 1, before)


KINDS: tuple[LatencyKind, ...] = ("worst", "expected", "p99")


@pytest.mark.parametrize("of", KINDS)
def test_filter_for_one_and_for_many_agree(space: SearchSpace, predictor: Predictor, of: LatencyKind) -> None:
    genotypes = some(space, 60)
    budget_ms = float(np.median(np.add(*predictor.worst(genotypes)))) if of == "worst" else 0.004
    limit = BudgetFilter(predictor, budget_ms, of, 1.0)
    known = limit.known(np.array(genotypes)).tolist()
    assert 0 < sum(known) < len(known)
    assert [limit.keeps(g) for g in genotypes] == known


def test_margin_keeps_candidates_out_that_may_miss_the_budget(space: SearchSpace, predictor: Predictor) -> None:
    genotype = space.largest()
    worst, std = (float(v[0]) for v in predictor.worst([genotype]))
    for margin in (0.0, 0.5, 1.0, 2.5):
        for more, keeps in ((1e-3, True), (-1e-3, False)):
            limit = BudgetFilter(predictor, worst + (margin + more) * std, "worst", margin)
            assert limit.keeps(genotype) is keeps
            assert limit.known(np.array([genotype])).tolist() == [keeps]


@pytest.mark.parametrize("of", ["expected", "p99"])
def test_budget_on_the_mean_or_tail_refuses_only_what_misses_it_at_the_first_exit(
    space: SearchSpace, predictor: Predictor, of: LatencyKind
) -> None:
    genotype = next(g for g in some(space, 20) if len(space.decode(g).exits) == 1)
    first, head = predictor.estimates([genotype])[0].exit_ms
    assert BudgetFilter(predictor, (first + head) / 2, of, 1.0).keeps(genotype)
    assert not BudgetFilter(predictor, (first + head) / 2, "worst", 0.0).keeps(genotype)
    assert BudgetFilter(predictor, first * 1.001, of, 9.0).keeps(genotype)
    assert not BudgetFilter(predictor, first * 0.999, of, 0.0).keeps(genotype)
    plain = next(g for g in some(space, 20) if not space.decode(g).exits)
    head = predictor.estimates([plain])[0].worst_ms
    assert not BudgetFilter(predictor, head * 0.999, of, 0.0).keeps(plain)


def test_candidates_whose_rows_are_missing_are_not_known_to_keep_the_budget(space: SearchSpace, tmp_path: Path) -> None:
    device = Asked()
    predictor = Predictor(space, open_folder(tmp_path, device), device, Notes())
    predictor.fill(expand(space.decode(space.smallest())))
    asked(predictor)
    rows = np.array([space.smallest(), space.largest()])
    for of in KINDS:
        assert BudgetFilter(predictor, 1e9, of, 0.0).known(rows).tolist() == [True, False]
    assert asked(predictor) == []  # looking measures nothing
    assert BudgetFilter(predictor, 1e9, "expected", 0.0).keeps(space.largest())
    assert asked(predictor)


class Noisy(SimulatedDevice):
    """While `is_noisy`, no row has a calm round and all take half as long again."""

    is_noisy = True

    def _measurement(self, job: MeasureJob) -> Measurement:
        m = super()._measurement(job)
        if not self.is_noisy or job.kind != "row" or m.latency_ms is None:
            return m
        return replace(m, latency_ms=1.5 * m.latency_ms, session_ms=(), accepted=(False,) * len(m.accepted))


def test_rows_that_noise_spoiled_are_measured_again_before_a_network_judges_them(
    space: SearchSpace, tmp_path: Path
) -> None:
    device = Noisy()
    predictor = Predictor(space, open_folder(tmp_path, device), device, Notes())
    predictor.prepare()
    assert not any(row.is_stable for row in predictor.table.rows.values())
    device.is_noisy = False
    candidate = space.decode(space.smallest())
    (pair,), _ = predictor.measure([candidate], 1)
    assert all(predictor.table.rows[layer.key].is_stable for layer in expand(candidate))
    assert abs(pair.error) < 0.25  # half as long again would be 0.5


def test_choices_that_no_network_runs_with_are_told_with_the_reason(space: SearchSpace, tmp_path: Path) -> None:
    device, notes = Asked(broken="|k=5|"), Notes()
    table = LatencyTable.open(tmp_path / "table", device.profile)
    Predictor(space, table, device, notes).prepare()
    told = [line for line in notes.said if "dropped" in line]
    assert len(told) == 1, "every other choice has networks that run"
    start = f"{device.profile.name} cannot run a.0.kernel_size = 5 (row ir|in="
    assert re.fullmatch(re.escape(start) + r"\S+\|k=5\|\S+: not an ONNX model: .+\): dropped", told[0])


def test_no_choice_is_told_as_dropped_where_all_rows_are_there(
    space: SearchSpace, tables: Path, tmp_path: Path
) -> None:
    shutil.copytree(tables, tmp_path / "tables")
    device = SimulatedDevice()
    table = LatencyTable.open(tmp_path / "tables" / device.profile.name, device.profile)
    assert lost_choices(space, table) == []
