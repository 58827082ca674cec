"""Choices of the search against brute force on small grids, where everything is exact."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.records import BlockConfig, Candidate, HeadConfig, LatencyFigures, StageConfig, StemConfig
from nas.core.run import Point, SplitAccuracy
from nas.search.select import (
    DEADLINES,
    as_accuracies,
    closest_to_budget,
    front_indices,
    hypervolume,
    pick_for_budget,
    spread_choice,
    stratified,
    worth_measuring,
)

GRID = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=9)


def counted_area(points: list[tuple[int, int]], budget: int) -> float:
    """Share of the unit cells of accuracy 0..8 x latency 0..budget that a point (accuracy, latency) covers."""
    cells = itertools.product(range(8), range(budget))
    return sum(any(a > row and t <= column for a, t in points) for row, column in cells) / (8 * budget)


@settings(max_examples=80, deadline=None)
@given(GRID, st.integers(1, 9))
def test_hypervolume_is_the_share_of_cells_below_the_front(points: list[tuple[int, int]], budget: int) -> None:
    top1, latency = [a / 8 for a, _ in points], [float(t) for _, t in points]
    assert hypervolume(top1, latency, 0.0, float(budget)) == pytest.approx(counted_area(points, budget))


def test_hypervolume_of_nothing_is_zero_and_of_everything_is_one() -> None:
    assert hypervolume([], [], 0.1, 2.0) == 0
    assert hypervolume([0.1, 0.9], [1.0, 2.0], 0.1, 2.0) == 0  # not better than guessing; not faster than the budget
    assert hypervolume([1.0], [0.0], 0.1, 2.0) == pytest.approx(1)


@settings(max_examples=80, deadline=None)
@given(GRID)
def test_front_holds_each_undominated_value_once_by_latency(points: list[tuple[int, int]]) -> None:
    chosen = front_indices([a for a, _ in points], [float(t) for _, t in points])
    expected = {(a, t) for a, t in points if not any((b >= a and u <= t) and (b, u) != (a, t) for b, u in points)}
    assert [points[i] for i in chosen] == sorted(expected, key=lambda p: p[1])


def _plain_greedy(top1: list[float], latency: list[float], groups: list[str], count: int, limit: float) -> list[str]:
    """The same choice, every gain of every group computed anew at each step."""
    low = min(latency) / 2
    cost = [float(np.log(t / low)) for t in latency]
    edge = float(np.log(max(limit, *latency) * 1.02 / low))
    chosen: list[str] = []
    kept: list[int] = []
    layer_start = 0
    while len(chosen) < min(count, len(set(groups))):
        reached = hypervolume([top1[i] for i in kept], [cost[i] for i in kept], 0.1, edge)
        best, best_gain = None, 1e-9
        for group in dict.fromkeys(groups):
            if group not in chosen:
                trial = kept + [i for i, g in enumerate(groups) if g == group]
                gain = hypervolume([top1[i] for i in trial], [cost[i] for i in trial], 0.1, edge) - reached
                if gain > best_gain + 1e-9:
                    best, best_gain = group, gain
        if best is None and layer_start < len(chosen):
            kept, layer_start = [], len(chosen)  # the next layer of the front
            continue
        if best is None:
            left = [i for i, g in enumerate(groups) if g not in chosen]
            best = groups[max(left, key=lambda i: top1[i])]
            layer_start = len(chosen) + 1
        chosen.append(best)
        kept += [i for i, g in enumerate(groups) if g == best]
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_spread_choice_is_the_greedy_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 16))
    top1 = rng.random(count).tolist()
    latency = rng.uniform(0.1, 2.0, count).tolist()
    groups = [f"g{i}" for i in rng.integers(0, max(1, count // 2), count)]
    assert spread_choice(top1, latency, groups, 4, 0.1, 1.5) == _plain_greedy(top1, latency, groups, 4, 1.5)


def test_spread_choice_fills_its_places_with_dominated_groups_and_with_guesses() -> None:
    chosen = spread_choice([0.9, 0.8, 0.05, 0.02], [1.0, 1.0, 1.0, 1.0], ["a", "b", "c", "d"], 9, 0.1, 2.0)
    assert chosen == ["a", "b", "c", "d"]
    assert spread_choice([], [], [], 3, 0.1, 2.0) == []


def test_spread_choice_spreads_evenly_in_the_logarithm_of_latency() -> None:
    latency = np.geomspace(0.01, 10, 13).tolist()
    top1 = np.linspace(0.3, 0.9, 13).tolist()
    places = sorted(int(c) for c in spread_choice(top1, latency, [str(i) for i in range(13)], 4, 0.1, 10.0))
    steps = [b - a for a, b in itertools.pairwise([0, *places, 12])]
    assert max(steps) <= 4


def test_spread_choice_begins_with_the_groups_that_it_is_given() -> None:
    top1, latency, groups = [0.3, 0.6, 0.61, 0.2], [0.1, 1.0, 1.9, 0.05], ["a", "b", "c", "d"]
    assert "c" not in spread_choice(top1, latency, groups, 2, 0.1, 2.0)
    assert spread_choice(top1, latency, groups, 2, 0.1, 2.0, ["c"])[0] == "c"
    assert spread_choice(top1, latency, groups, 1, 0.1, 2.0, ["c", "d"]) == ["c"]
    assert sorted(spread_choice(top1, latency, groups, 9, 0.1, 2.0, ["d"])) == groups


def test_stratified_includes_both_ends_and_equal_steps_of_rank() -> None:
    latency = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [latency[i] for i in stratified(latency, 3)] == [1.0, 3.0, 5.0]
    assert sorted(stratified(latency, 9)) == [0, 1, 2, 3, 4]
    assert stratified([], 3) == []


def test_networks_worth_measuring_are_those_of_the_front_and_near_the_budget() -> None:
    top1 = [0.9, 0.5, 0.4, 0.3]
    latency = [9.0, 2.0, 4.9, 7.0]
    std = [0.1, 0.2, 0.1, 0.1]
    assert worth_measuring(top1, latency, latency, std, 5.0, 2) == [1, 2]
    assert sorted(worth_measuring(top1, latency, latency, [0.1] * 4, 5.0, 10)) == [0, 1, 2, 3]
    assert worth_measuring([], [], [], [], 5.0, 3) == []
    assert worth_measuring([0.9, 0.5, 0.4], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.1] * 3, 1.0, 2) == [0, 1]
    worst = [9.0, 8.0, 7.0, 5.0]  # what is near the budget is decided by the latency that it limits
    assert worth_measuring(top1, latency, worst, std, 5.0, 2) == [1, 3]


def _expected_best(top1: list[float], keeps: list[float], none: float) -> float:
    """Accuracy of the best network that keeps a deadline (`none` where there is none), the mean over all outcomes."""
    total = 0.0
    for outcome in itertools.product((False, True), repeat=len(top1)):
        chance = float(np.prod([p if kept else 1 - p for p, kept in zip(keeps, outcome, strict=True)]))
        total += chance * max((a for a, kept in zip(top1, outcome, strict=True) if kept), default=none)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_networks_worth_measuring_add_most_to_the_expected_best(seed: int) -> None:
    """Against all outcomes of all networks, for the budget and the deadlines below it."""
    rng = np.random.default_rng(seed)
    top1 = rng.uniform(0.3, 0.9, 6).tolist()
    ms, std = rng.uniform(0.5, 1.1, 6), rng.uniform(0.01, 0.2, 6)
    limited = 1.1 * ms
    none = min(top1) - (max(top1) - min(top1))
    deadlines = np.linspace((ms - std).min(), 1.0, DEADLINES + 1)[1:]

    def worth(chosen: list[int]) -> float:
        def best(deadline: float, axis: np.ndarray) -> float:
            keeps = [NormalDist(axis[i], std[i]).cdf(deadline) for i in chosen]
            return _expected_best([top1[i] for i in chosen], keeps, none)

        return float(np.mean([best(d, ms) for d in deadlines])) + best(1.0, limited)

    known = [0]
    chosen = worth_measuring(top1, ms.tolist(), limited.tolist(), std.tolist(), 1.0, 3, known)
    for n in range(3):
        left = [i for i in range(1, 6) if i not in chosen[:n]]
        assert worth([*known, *chosen[: n + 1]]) == pytest.approx(max(worth([*known, *chosen[:n], i]) for i in left))


def test_measured_networks_are_not_chosen_and_what_they_reach_is_not_worth_finding_again() -> None:
    top1, ms, std = [0.9, 0.89, 0.91, 0.5], [0.8, 0.85, 1.0, 0.5], [0.01] * 4
    assert worth_measuring(top1, ms, ms, std, 1.0, 1) == [0]
    assert worth_measuring(top1, ms, ms, std, 1.0, 4, [0]) == [3, 2, 1]
    assert worth_measuring(top1, ms, ms, std, 1.0, 4, [0, 1, 2, 3]) == []


@pytest.mark.parametrize("seed", range(4))
def test_only_differences_of_accuracy_decide_what_is_worth_measuring(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top1, ms = rng.uniform(0.2, 0.9, 20), rng.uniform(0.5, 1.2, 20).tolist()
    std = rng.uniform(0.01, 0.1, 20).tolist()
    chosen = worth_measuring(top1.tolist(), ms, ms, std, 1.0, 5, [3])
    assert worth_measuring((0.5 + 0.5 * top1).tolist(), ms, ms, std, 1.0, 5, [3]) == chosen


def test_network_that_resembles_a_chosen_one_waits() -> None:
    top1, ms, std = [0.9, 0.899, 0.91, 0.5], [0.7, 0.71, 1.0, 0.4], [0.01] * 4
    assert worth_measuring(top1, ms, ms, std, 1.0, 3) == [0, 3, 2]


def test_network_that_may_keep_the_budget_comes_before_one_that_cannot_and_one_that_gains_nothing() -> None:
    top1, ms, std = [0.80, 0.99, 0.85, 0.79], [0.90, 1.50, 1.01, 0.95], [0.02] * 4
    assert worth_measuring(top1, ms, ms, std, 1.0, 1, [0]) == [2]


def _point(
    name: str, top1: float, worst_ms: float, *, expected_ms: float | None = None, measured: bool = True
) -> Point:
    candidate = Candidate(16, 3, StemConfig(4), (StageConfig((BlockConfig(4, 8, 4),)),), HeadConfig())
    expected = worst_ms if expected_ms is None else expected_ms
    latency = LatencyFigures(expected, worst_ms, worst_ms, 0.0, "measured" if measured else "predicted")
    return Point(name, candidate, latency, val=SplitAccuracy(top1, 100), is_finished=True)


def test_pick_is_the_most_accurate_measured_point_within_the_budget() -> None:
    points = [
        _point("slow", 0.99, 1.01),
        _point("pick", 0.9, 0.99),
        _point("next", 0.9, 1.0),
        _point("predicted", 0.95, 0.5, measured=False),
    ]
    assert [p.id for p in pick_for_budget(points, 1.0, "worst")] == ["pick", "next"]


def test_of_students_that_are_equal_by_chance_the_fastest_is_the_pick() -> None:
    points = [
        _point("best", 0.95, 0.9),  # of 100 images: half a standard error is 1.1 points
        _point("equal", 0.94, 0.5),
        _point("equal but slower", 0.94, 0.7),
        _point("worse", 0.93, 0.1),
        _point("worst", 0.60, 0.05),
    ]
    names = ["equal", "equal but slower", "best", "worse", "worst"]
    assert [p.id for p in pick_for_budget(points, 1.0, "worst")] == names
    assert pick_for_budget([], 1.0, "worst") == []


def test_budget_limits_the_kind_of_latency_that_it_names() -> None:
    points = [_point("exits", 0.9, 2.0, expected_ms=0.8), _point("plain", 0.8, 0.9)]
    assert [p.id for p in pick_for_budget(points, 1.0, "worst")] == ["plain"]
    assert [p.id for p in pick_for_budget(points, 1.0, "expected")] == ["exits", "plain"]


def test_closest_to_the_budget_is_the_fastest_in_the_kind_that_it_limits() -> None:
    points = [_point("exits", 0.9, 2.0, expected_ms=0.8), _point("plain", 0.8, 0.9)]
    worst, expected = closest_to_budget(points, "worst"), closest_to_budget(points, "expected")
    assert worst is not None
    assert expected is not None
    assert (worst.id, expected.id) == ("plain", "exits")
    assert closest_to_budget([], "worst") is None


def test_scores_on_the_scale_of_accuracies_keep_their_order_and_lose_their_larger_spread() -> None:
    scores = [0.45, 0.50, 0.60]
    pairs = [(0.45, 0.70), (0.50, 0.73), (0.60, 0.79)]
    assert as_accuracies(scores, pairs) == pytest.approx([0.70, 0.73, 0.79])
    assert as_accuracies([0.55], pairs) == pytest.approx([0.76])
    for useless in ([], [(0.5, 0.7)], [(0.5, 0.7), (0.5, 0.8)], [(0.4, 0.8), (0.6, 0.7)]):
        assert as_accuracies(scores, useless) == scores
