"""Precision of each part of a network: all assignments by latency and cost, and which of them are worth a try."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from latency_examples import candidate, filled, measured, network

import nas.latency.precision as solver
from nas.core.errors import MissingRowError, RecordError
from nas.core.records import Candidate, Precision
from nas.core.walk import expand
from nas.latency.estimate import Estimator
from nas.latency.fitting import fit_correction
from nas.latency.precision import Assignments, assignments, part_of
from nas.latency.table import LatencyTable

BOTH: tuple[Precision, ...] = ("fp32", "int8")
PLAIN = candidate(exits=False)
# What int8 costs in the stem, two stages and the head: the stem the most.
COST = np.array([[0.0, 9.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])


def mixes(network: Candidate = PLAIN) -> list[tuple[Precision, ...]]:
    return list(itertools.product(BOTH, repeat=len(network.precisions)))


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    """Rows of the network in both precisions; int8 is twice as fast, but for the stem, where it is slower."""
    table = filled(tmp_path / "table", [PLAIN.with_precision(p) for p in BOTH])
    stem = expand(PLAIN.with_precision("int8"))[0]
    with table.writing():
        table.add(measured(stem.key, "row", "int8", 0.05, sequence=9))
    return table


def test_every_assignment_has_the_latency_of_its_network(table: LatencyTable) -> None:
    found = assignments(candidate(), BOTH, table)
    assert [found.precisions(i) for i in range(len(found.ms))] == mixes()
    estimator = Estimator(table)
    for i, names in enumerate(mixes()):
        assert found.ms[i] == pytest.approx(estimator.estimate(PLAIN.with_precision(names)).worst_ms)
    assert {found.precisions(i) for i in found.uniform} == {("fp32",) * 4, ("int8",) * 4}


def test_a_change_of_precision_is_charged_as_measured_networks_say(table: LatencyTable) -> None:
    few, many = ("fp32", "fp32", "int8", "int8"), ("int8", "fp32", "int8", "fp32")
    rng = np.random.default_rng(0)
    with table.writing():
        for names in mixes():
            mix = PLAIN.with_precision(names)
            changes = sum(a != b for a, b in itertools.pairwise(names))
            ms = Estimator(table).estimate(mix).worst_ms + 0.005 * changes
            table.add(network(mix, ms * (1 + 0.001 * rng.normal()), "plain"), mix, "plain")
    plain = assignments(PLAIN, BOTH, table)
    charged = assignments(PLAIN, BOTH, table, fit_correction(table))
    extra = dict(zip(mixes(), charged.ms - plain.ms, strict=True))
    assert extra[many] - extra[few] == pytest.approx(0.010, rel=0.3)


def test_the_fastest_one_leaves_a_uniform_precision_only_for_more_than_the_margin(table: LatencyTable) -> None:
    found = assignments(PLAIN, BOTH, table)
    best = found.fastest(0.0)
    assert found.precisions(best) == ("fp32", "int8", "int8", "int8")  # int8 is slower in the stem
    assert found.ms[best] == found.ms.min()
    uniform = found.ms[found.uniform]
    gain_std = (uniform.min() - found.ms[best]) / found.std_ms[best]
    assert found.fastest(0.99 * gain_std) == best
    assert found.fastest(1.01 * gain_std) == found.uniform[uniform.argmin()]


def test_a_latency_is_kept_at_the_least_cost(table: LatencyTable) -> None:
    found = assignments(PLAIN, BOTH, table, cost=COST)
    for limit in np.quantile(found.ms, (0.1, 0.4, 0.8)):
        i = found.cheapest_within(float(limit), 0.0)
        assert i is not None
        assert found.ms[i] <= limit
        assert found.cost[i] == found.cost[found.ms <= limit].min()
    assert found.cheapest_within(float(found.ms.min()) * 0.99, 0.0) is None
    with_margin = found.cheapest_within(float(found.ms.max()))
    assert with_margin is not None
    assert found.ms[with_margin] + found.std_ms[with_margin] <= found.ms.max()


def test_the_front_is_what_no_other_assignment_beats(table: LatencyTable) -> None:
    found = assignments(PLAIN, BOTH, table, cost=COST)
    front = found.front()
    beaten = [
        any(
            found.ms[j] <= found.ms[i] and found.cost[j] <= found.cost[i] and (found.ms[j], found.cost[j]) != own
            for j in range(len(found.ms))
        )
        for i, own in enumerate(zip(found.ms, found.cost, strict=True))
    ]
    assert sorted(front) == [i for i, is_beaten in enumerate(beaten) if not is_beaten]
    assert list(found.ms[front]) == sorted(found.ms[front])


def test_the_ladder_has_mixes_only_the_fastest_first_and_what_keeps_the_deadline(table: LatencyTable) -> None:
    found = assignments(PLAIN, BOTH, table, cost=COST)
    places = {found.precisions(i): i for i in range(len(found.ms))}
    limit = float(np.quantile(found.ms, 0.3))
    ladder = found.ladder(3, [limit], 0.0)
    assert ladder[0] == found.precisions(found.fastest(0.0))
    kept = found.cheapest_within(limit, 0.0)
    assert kept is not None and ladder[1] == found.precisions(kept)
    assert len(ladder) == len(set(ladder)) == 3
    assert all(len(set(names)) > 1 and places[names] in found.front() for names in ladder)
    assert found.ladder(3, [limit], gain_std=50.0) == []  # no gain is beyond so wide a margin


def test_where_all_are_too_many_those_stay_that_no_other_beats(
    table: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = assignments(PLAIN, BOTH, table, cost=COST)
    monkeypatch.setattr(solver, "MOST", 8)
    fewer = assignments(PLAIN, BOTH, table, cost=COST)
    assert len(fewer.ms) < len(every.ms)

    def front(found: Assignments) -> list[tuple[Precision, ...]]:
        return [found.precisions(i) for i in found.front()]

    assert front(fewer) == front(every)
    assert len(fewer.uniform) == 2


def test_missing_rows_and_costs_that_do_not_fit_are_refused(table: LatencyTable) -> None:
    with pytest.raises(MissingRowError, match="nas measure"):
        assignments(PLAIN, ("fp32", "fp16"), table)
    with pytest.raises(RecordError, match=r"2 precisions and costs \(1, 2\); allowed: .* 4 parts"):
        assignments(PLAIN, BOTH, table, cost=np.zeros((1, 2)))


def test_layers_belong_to_the_stem_a_stage_or_the_head() -> None:
    layers = expand(candidate())
    assert [part_of(x, 4) for x in layers if x.kind != "exit_head"] == [0, 1, 1, 2, 3]
