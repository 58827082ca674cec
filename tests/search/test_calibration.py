"""How far the model of accuracy is trusted: leave-one-out against leaving out one by one."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from search_examples import Notes
from test_rounds import make, space, tables  # noqa: F401

from nas.core.errors import RecordError
from nas.core.run import AccuracyFit
from nas.latency.ranks import rank_correlation
from nas.search.calibration import FEWEST, accuracy_fit, leave_one_out
from nas.search.greybox import (
    GreyBoxProblem,
    Hyperparameters,
    Scored,
    encode,
    fit_model,
    kernel,
    standardised,
)
from nas.search.rounds import SearchParts, run_rounds
from nas.search.view import _round_summary

SIZES = (3,) * 6
PROBLEM = GreyBoxProblem(SIZES, (True,) * 6, np.copy, lambda g: (np.ones((len(g), 1)), np.zeros((len(g), 1))), (2.0,))


def scored(count: int, noise: float, seed: int = 0) -> Scored:
    rng = np.random.default_rng(seed)
    genotypes = np.unique(rng.integers(0, SIZES, size=(2 * count, 6)), axis=0)[:count]
    rng.shuffle(genotypes)
    accuracies = 0.5 + 0.03 * genotypes.sum(axis=1) + noise * rng.normal(size=len(genotypes))
    return Scored(genotypes, accuracies, np.ones(len(genotypes), bool))


def test_leave_one_out_is_what_leaving_out_each_gives() -> None:
    seen, h = scored(15, 0.02), Hyperparameters(0.7, 0.1, 0.4, 0.6, 0.05)
    model = fit_model(PROBLEM, seen, h)
    observed, scale, *_ = standardised(seen.accuracies)
    assert model.scale == scale
    features = encode(seen.genotypes, SIZES, PROBLEM.ordinal)
    covariance = kernel(features, features, 6, h) + (h.noise + 1e-8) * np.eye(15)
    mean, deviation = leave_one_out(model, observed)
    for i in range(15):
        others = np.delete(np.arange(15), i)
        row = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, i])
        assert mean[i] == pytest.approx(row @ observed[others])
        assert deviation[i] == pytest.approx(np.sqrt(covariance[i, i] - row @ covariance[others, i]))


def test_accuracy_that_genes_decide_is_predicted_and_noise_is_not() -> None:
    good, bad = accuracy_fit(PROBLEM, scored(60, 0.01)), accuracy_fit(PROBLEM, scored(60, 0.3))
    assert good is not None
    assert bad is not None
    assert good.networks == bad.networks == 60
    assert good.rank > 0.9
    assert abs(bad.rank) < 0.5
    assert 0.005 < good.mae < 0.02  # the noise itself has a mean size of 0.008
    assert good.within_90 > 0.8


def test_few_or_equal_scores_say_nothing() -> None:
    assert accuracy_fit(PROBLEM, scored(FEWEST - 1, 0.1)) is None
    equal = scored(20, 0.1)
    assert accuracy_fit(PROBLEM, Scored(equal.genotypes, np.full(20, 0.5), equal.eligible)) is None


def test_rank_correlation_shares_the_ranks_of_equal_values() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 1.0])) == pytest.approx(-1)
    assert rank_correlation(np.ones(3), np.arange(3.0)) == 0


def test_shares_of_a_fit_are_ratios() -> None:
    with pytest.raises(RecordError, match="accuracy model: within_90 is a ratio from 0 to 1, got 90"):
        AccuracyFit(10, 0.5, 0.1, 90)


def test_each_round_of_the_grey_box_sampler_says_how_far_its_model_is_to_be_trusted(
    make: Callable[..., SearchParts],
) -> None:
    notes = Notes()
    parts = make(notes=notes, trials=20, rounds=2, batch=5, sampler="greybox")
    run_rounds(parts)
    fits = [_round_summary(e).model for e in parts.folder.events() if e.kind == "round"]
    assert [f.networks for f in fits if f is not None] == [10, 20]
    last = fits[-1]
    assert last is not None
    assert last.rank > 0.6  # accuracy grows with size, but what leaves early is right less often
    told = [s for s in notes.said if s.startswith("accuracy model, each of ")]
    assert len(told) == 2
    assert f"rank correlation {last.rank:.2f}, mean error {100 * last.mae:.1f} points" in told[-1]


def test_round_of_another_sampler_has_no_model(make: Callable[..., SearchParts]) -> None:
    parts = make(trials=10, rounds=1, batch=5, sampler="random")
    run_rounds(parts)
    assert [_round_summary(e).model for e in parts.folder.events() if e.kind == "round"] == [None]
