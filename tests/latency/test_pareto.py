"""Pareto sets and hypervolumes against brute force on small integer grids, where everything is exact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.errors import RecordError
from nas.latency.pareto import Front2D, hypervolume, hypervolume_contributions, hypervolume_growth, non_dominated

SIDE = 6


def grids(dimensions: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(0, SIDE)] * dimensions), max_size=12)


def is_dominated(point: Sequence[float], others: Sequence[Sequence[float]], maximize: Sequence[bool]) -> bool:
    def cost(p: Sequence[float]) -> list[float]:
        return [-v if up else v for v, up in zip(p, maximize, strict=True)]

    mine = cost(point)
    return any(cost(o) != mine and all(a <= b for a, b in zip(cost(o), mine, strict=True)) for o in others)


def counted_volume(points: Sequence[Sequence[int]], maximize: Sequence[bool]) -> int:
    """Unit cells of the box 0..SIDE that some point dominates; the reference is the worst corner."""
    count = 0
    for cell in itertools.product(range(SIDE), repeat=len(maximize)):
        for p in points:
            if all(c < v if up else c >= v for c, v, up in zip(cell, p, maximize, strict=True)):
                count += 1
                break
    return count


def worst_corner(maximize: Sequence[bool]) -> list[float]:
    return [0.0 if up else float(SIDE) for up in maximize]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_non_dominated_equals_brute_force(dimensions: int, data: st.DataObject) -> None:
    points = data.draw(grids(dimensions))
    maximize = data.draw(st.tuples(*[st.booleans()] * dimensions))
    expected = [not is_dominated(p, points, maximize) for p in points]
    assert non_dominated(points, maximize).tolist() == expected


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hypervolume_equals_counted_cells(dimensions: int, data: st.DataObject) -> None:
    points = data.draw(grids(dimensions))
    maximize = data.draw(st.tuples(*[st.booleans()] * dimensions))
    assert hypervolume(points, worst_corner(maximize), maximize) == counted_volume(points, maximize)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_contribution_is_what_is_lost_without_the_point(dimensions: int, data: st.DataObject) -> None:
    points = data.draw(grids(dimensions))
    maximize = data.draw(st.tuples(*[st.booleans()] * dimensions))
    whole = counted_volume(points, maximize)
    expected = [whole - counted_volume(points[:i] + points[i + 1 :], maximize) for i in range(len(points))]
    assert hypervolume_contributions(points, worst_corner(maximize), maximize).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(points=grids(2), maximize=st.tuples(st.booleans(), st.booleans()))
def test_growing_front_equals_the_front_of_all_points_so_far(
    points: list[tuple[int, int]], maximize: tuple[bool, bool]
) -> None:
    reference = tuple(worst_corner(maximize))
    front = Front2D((reference[0], reference[1]), maximize)
    for i, p in enumerate(points):
        before = front.points
        joined = front.add(*p)
        seen = points[: i + 1]
        inside = [
            q for q in seen if all(v > r if up else v < r for v, r, up in zip(q, reference, maximize, strict=True))
        ]
        assert set(front.points) == {q for q in inside if not is_dominated(q, inside, maximize)}
        assert joined == (front.points != before)
        assert front.hypervolume == counted_volume(seen, maximize)
    assert len(front) == len(front.points)
    growth = hypervolume_growth(points, (reference[0], reference[1]), maximize)
    assert growth.tolist() == [counted_volume(points[: i + 1], maximize) for i in range(len(points))]


def test_accuracy_up_and_latency_down() -> None:
    points = [[0.90, 2.0], [0.95, 4.0], [0.85, 3.0], [0.95, 5.0]]
    assert non_dominated(points, (True, False)).tolist() == [True, True, False, False]
    assert hypervolume(points, (0.5, 10.0), (True, False)) == pytest.approx(0.4 * 8 + 0.05 * 6)


def test_points_worse_than_the_reference_add_nothing() -> None:
    assert hypervolume([[0.4, 1.0], [0.9, 11.0]], (0.5, 10.0), (True, False)) == 0.0


def test_no_points_have_no_volume() -> None:
    assert hypervolume([], (0.0, 1.0), (True, False)) == 0.0
    assert non_dominated([], (True, False)).tolist() == []
    assert hypervolume_contributions([], (0.0, 1.0), (True, False)).tolist() == []


def test_random_3d_volume_equals_inclusion_and_exclusion() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (8, 3))
    expected = 0.0
    for size in range(1, 9):
        for group in itertools.combinations(points, size):
            expected += (-1) ** (size + 1) * float(np.prod(np.min(group, axis=0)))
    assert hypervolume(points, (0, 0, 0), (True, True, True)) == pytest.approx(expected)


def test_input_that_does_not_fit_is_named() -> None:
    with pytest.raises(RecordError, match=r"shape \[N, 2\] .* got \(1, 3\)"):
        non_dominated([[1, 2, 3]], (True, False))
    with pytest.raises(RecordError, match="point 1 has a value that is not finite"):
        hypervolume([[1.0, 2.0], [float("nan"), 1.0]], (0, 0), (True, True))
    with pytest.raises(RecordError, match="1 to 3 objectives, got 4"):
        hypervolume([[1, 2, 3, 4]], (0, 0, 0, 0), (True,) * 4)
    with pytest.raises(RecordError, match="objectives must be finite"):
        Front2D((0, 0), (True, True)).add(float("inf"), 1)
