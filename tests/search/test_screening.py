"""Proposals from very many candidates: rules that every proposal keeps, and that the best of them are found."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from search_examples import Notes
from test_rounds import make, proposed, space, tables  # noqa: F401

import nas.search.screening as screening
from nas.latency.pareto import hypervolume
from nas.search.greybox import GreyBoxProblem, Scored
from nas.search.rounds import SearchParts, run_rounds
from nas.search.screening import screened

SIZES = (4,) * 8


def latency(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ms = 1.0 + genotypes.sum(axis=1, keepdims=True) / 4
    return ms, np.zeros_like(ms)


PROBLEM = GreyBoxProblem(SIZES, (True,) * 8, np.copy, latency, (4.0,))


def accuracy(genotypes: np.ndarray) -> np.ndarray:
    """The first genes are worth more than they cost."""
    return 0.5 + (genotypes * np.array([8, 7, 6, 5, 1, 1, 1, 1])).sum(axis=1) / 200


def known(count: int = 24) -> Scored:
    genotypes = np.unique(np.random.default_rng(0).integers(0, SIZES, size=(3 * count, 8)), axis=0)
    genotypes = genotypes[latency(genotypes)[0][:, 0] <= 4.0][:count]
    return Scored(genotypes, accuracy(genotypes), np.ones(len(genotypes), bool))


@pytest.mark.parametrize("is_with_local", [True, False])
def test_proposals_are_new_distinct_and_in_budget_and_the_same_for_a_seed(is_with_local: bool) -> None:
    seen = known()
    excluded = screened(PROBLEM, seen, 2000, count=3, is_with_local=is_with_local)
    one, two = (
        screened(PROBLEM, seen, 2000, count=6, excluded=excluded, seed=(5,), is_with_local=is_with_local)
        for _ in range(2)
    )
    assert one.tolist() == two.tolist()
    assert len({tuple(row) for row in one.tolist()}) == 6
    assert not {tuple(r) for r in one.tolist()} & {tuple(r) for r in (*seen.genotypes.tolist(), *excluded.tolist())}
    assert (latency(one)[0] <= 4.0).all()


def test_many_candidates_find_the_networks_with_the_best_trade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "CHUNK", 1000)  # several chunks, of which few candidates are kept
    monkeypatch.setattr(screening, "KEPT", 8)
    seen = known()
    found = screened(PROBLEM, seen, 8000, count=4, is_with_local=False)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, SIZES, size=(8000, 8))
    drawn = drawn[latency(drawn)[0][:, 0] <= 4.0]
    luck = [reached(seen.genotypes, drawn[rng.integers(len(drawn), size=4)]) for _ in range(300)]
    assert reached(seen.genotypes, found) > max(luck)


def reached(*parts: np.ndarray) -> float:
    genotypes = np.concatenate(parts)
    points = np.column_stack([accuracy(genotypes), latency(genotypes)[0][:, 0]])
    return hypervolume(points, (0.5, 4.0), (True, False))


def test_batch_of_candidates_is_spread_over_latency() -> None:
    found = screened(PROBLEM, known(), 4000, count=8)
    assert np.ptp(latency(found)[0]) > 0.7


def test_search_screens_once_two_batches_are_scored(
    make: Callable[..., SearchParts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []

    def noted(problem: GreyBoxProblem, scored: Scored, draws: int, **given: object) -> np.ndarray:
        sizes.append((len(scored.genotypes), draws))
        return screened(problem, scored, draws, **given)  # type: ignore[arg-type]

    monkeypatch.setattr("nas.search.study.screened", noted)
    parts = make(trials=18, rounds=1, batch=4, sampler="greybox", predictor_candidates=500)
    run_rounds(parts)
    assert sizes == [(8, 500), (12, 500), (16, 500)]
    assert len(set(proposed(parts))) == 18


def test_other_samplers_say_that_they_do_not_screen(make: Callable[..., SearchParts]) -> None:
    notes = Notes()
    run_rounds(make(notes=notes, trials=4, rounds=1, batch=4, predictor_candidates=500))
    assert notes.warned == [
        "search.predictor_candidates: not used by the sampler random. Take: --set search.sampler=greybox"
    ]
