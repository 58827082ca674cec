"""The exact solve of two sums: against all networks one by one, and as candidates of a search."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from search_examples import SPACE, Notes
from test_rounds import ScriptedPool, make, tables  # noqa: F401

from nas.core.errors import RecordError
from nas.core.records import LayerSpec
from nas.core.walk import expand
from nas.search.ladder import Part, best_for_each_cost, choice_scores, network_parts, rungs
from nas.search.rounds import SearchParts, run_rounds
from nas.space.space import SearchSpace, space_from_plain
from nas.space.yamlio import parse_yaml
from nas.testing import SimulatedDevice

Make = Callable[..., SearchParts]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(parse_yaml(SPACE, "space"), "space", 4)


def _sums(parts: tuple[Part, ...], genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cost = sum(p.cost[tuple(genotypes[:, g] for g in p.genes)] for p in parts)
    score = sum(p.score[tuple(genotypes[:, g] for g in p.genes)] for p in parts)
    return np.asarray(cost), np.asarray(score)


@pytest.mark.parametrize("seed", range(5))
def test_best_network_of_every_cost_is_that_of_looking_at_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (3, 2, 3, 2, 3)
    scopes = ((0,), (0, 1, 2), (2, 3), (0, 3, 4), (4,))  # gene 0 lives through all of them
    shapes = [tuple(sizes[g] for g in scope) for scope in scopes]
    parts = tuple(
        Part(scope, rng.integers(0, 9, shape).astype(float), rng.normal(size=shape))
        for scope, shape in zip(scopes, shapes, strict=True)
    )
    everything = np.array(list(itertools.product(*map(range, sizes))))
    cost, score = _sums(parts, everything)
    found = best_for_each_cost(parts, sizes, 40.0, 40)
    found_cost, found_score = _sums(parts, found)
    assert (np.diff(found_cost) > 0).all()
    assert (np.diff(found_score) > 0).all()
    for limit in range(int(cost.min()), 41):
        below = found_score[found_cost <= limit]
        assert below.max() == pytest.approx(score[cost <= limit].max())


def test_networks_that_cost_more_than_the_limit_are_left_out() -> None:
    part = Part((0,), np.array([1.0, 50.0]), np.array([0.0, 9.0]))
    assert best_for_each_cost((part,), (2,), 10.0).tolist() == [[0]]
    assert best_for_each_cost((part,), (2,), 100.0).tolist() == [[0], [1]]


def test_part_needs_an_axis_for_each_gene() -> None:
    with pytest.raises(RecordError, match=r"part of genes \(0, 1\): cost \(2,\) and score \(2,\)"):
        Part((0, 1), np.zeros(2), np.zeros(2))


def _cost(layer: LayerSpec) -> float:
    return layer.macs / 1e4 + 0.1


def test_parts_of_a_space_have_the_sums_of_its_networks(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=n) for n in space.gene_sizes]
    parts = network_parts(space, _cost, scores)
    exits = {g for place in space.layout.exits for g in (place.present, place.threshold.gene)}
    drawn = rng.integers(0, space.gene_sizes, size=(50, len(space.genes)))  # not canonical: as the solve walks them
    drawn[:, [g for g in exits if g is not None]] = 0
    cost, score = _sums(parts, drawn)
    for i, canonical in enumerate(space.canonical_many(drawn).tolist()):
        assert cost[i] == pytest.approx(sum(map(_cost, expand(space.decode(canonical)))))
        assert score[i] == pytest.approx(
            sum(s[c] for g, (s, c) in enumerate(zip(scores, canonical, strict=True)) if g not in exits)
        )


def test_scores_order_the_choices_of_an_additive_accuracy() -> None:
    rng = np.random.default_rng(0)
    sizes, ordered = (3, 3, 2, 4), (True, True, False, True)
    truth = [np.sort(rng.uniform(0, 1, n)) for n in sizes]
    genotypes = rng.integers(0, sizes, size=(40, 4))
    accuracies = 0.5 + 0.1 * sum(t[genotypes[:, g]] for g, t in enumerate(truth))
    for given, found in zip(truth, choice_scores(genotypes, np.asarray(accuracies), sizes, ordered), strict=True):
        assert np.ptp(found - 0.1 * given) < 0.01


def test_scores_of_noise_are_drawn_towards_nothing() -> None:
    rng = np.random.default_rng(1)
    genotypes = rng.integers(0, 3, size=(30, 8))
    scores = choice_scores(genotypes, rng.normal(size=30), (3,) * 8, (True,) * 8)
    assert max(float(np.ptp(s)) for s in scores) < 0.5


def test_rungs_take_the_best_below_each_latency_and_none_twice() -> None:
    latency = np.array([1.0, 2.0, 3.0, 3.9])  # by rising score
    assert rungs(latency, 4.0, 3) == [3, 2, 1]
    assert rungs(latency, 40.0, 3) == [3, 2, 1]
    assert rungs(np.array([1.0]), 4.0, 3) == [0]


def test_second_batch_has_the_ladder_and_no_other_one_has(make: Make, space: SearchSpace) -> None:
    parts = make(ScriptedPool(), trials=18, rounds=2, batch=6, ladder=3)
    run_rounds(parts)
    batches = parts.folder.batches()
    assert [name == "additive" for name in batches[1].proposers] == [True] * 3 + [False] * (
        len(batches[1].proposers) - 3
    )
    assert not {"additive"} & {name for b in (*batches[:1], *batches[2:]) for name in b.proposers}
    found = batches[1].genotypes[:3]
    worst, std = parts.predictor.worst(found)
    assert (worst + std <= parts.budget.ms).all()
    assert worst[0] == max(worst)
    genes = [p.present for p in space.layout.exits]
    assert not np.array(found)[:, genes].any()


def test_search_that_measures_rows_as_needed_says_that_it_has_no_ladder(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 1)
    notes = Notes()
    parts = make(device=SimulatedDevice(), notes=notes, trials=8, rounds=1, batch=4, ladder=3)
    run_rounds(parts)
    assert any(w.startswith("search.ladder: not used") for w in notes.warned)
    assert "additive" not in {name for b in parts.folder.batches() for name in b.proposers}
