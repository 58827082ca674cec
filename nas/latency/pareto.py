"""Pareto sets and exact hypervolume of two or three objectives.

Every function takes points as an array [N, D] and one flag per objective that says whether more is better. A point
dominates another when it is at least as good in every objective and better in one; equal points do not dominate each
other. The hypervolume is the part of the box between the points and a reference (the worst acceptable value of each
objective) that the points dominate; the 3-D one is summed over slices of the third objective, as in Beume et al. 2009
(IEEE TEC 13(5)); differs: the 2-D front of a slice is kept in sorted lists, O(N^2) at worst, enough for some thousands.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.core.errors import RecordError

FloatArray = NDArray[np.float64]


def non_dominated(points: ArrayLike, maximize: Sequence[bool]) -> NDArray[np.bool_]:
    """Which points no other point dominates, shape [N]; equal points are kept together.

    Args:
        points: shape [N, D], any D.
        maximize: per objective, whether more is better.

    Raises:
        RecordError: shapes that do not fit, or a value that is not finite.
    """
    costs = _costs(points, maximize)
    keep = np.zeros(len(costs), dtype=bool)
    if not len(costs):
        return keep
    order = np.lexsort(
        costs.T[::-1]
    )  # by the first objective, then the second, ...: nothing dominates what is before it
    if costs.shape[1] == 2:
        first, second = costs[order, 0], costs[order, 1]
        best = np.minimum.accumulate(second)
        before = np.append(np.inf, best[:-1])
        same = np.append(False, (first[1:] == first[:-1]) & (second[1:] == second[:-1]))
        on = second < before
        keep[order] = on[np.maximum.accumulate(np.where(same, 0, np.arange(len(on))))]
        return keep
    front: list[int] = []
    for i in order:
        others = costs[front]
        beaten = (others <= costs[i]).all(axis=1) & (others < costs[i]).any(axis=1)
        if not beaten.any():
            front.append(int(i))
    keep[front] = True
    return keep


def hypervolume(points: ArrayLike, reference: Sequence[float], maximize: Sequence[bool]) -> float:
    """Exact hypervolume; points that are not better than the reference in every objective add nothing.

    Args:
        points: shape [N, D], D from 1 to 3.
        reference: the worst acceptable value of each objective, shape [D].
        maximize: per objective, whether more is better.

    Raises:
        RecordError: shapes that do not fit, more than 3 objectives, or a value that is not finite.
    """
    return _volume(_gains(points, reference, maximize))


def hypervolume_contributions(points: ArrayLike, reference: Sequence[float], maximize: Sequence[bool]) -> FloatArray:
    """What the hypervolume loses without each point, shape [N]; 0 for dominated and for repeated points.

    Raises:
        RecordError: as `hypervolume`.
    """
    gains = _gains(points, reference, maximize)
    result = np.zeros(len(gains))
    whole = _volume(gains)
    candidates = np.flatnonzero((gains > 0).all(axis=1))
    if len(candidates):
        on_front = candidates[non_dominated(gains[candidates], [True] * gains.shape[1])]
        for i in on_front:
            # All others, not only those of the front: without this point a point that it dominates comes forward.
            others = candidates[candidates != i]
            result[i] = max(0.0, whole - _volume(gains[others]))
    return result


class Front2D:
    """A front of two objectives that grows point by point, with its exact hypervolume.

    Args:
        reference: the worst acceptable value of each objective.
        maximize: per objective, whether more is better.
    """

    def __init__(self, reference: tuple[float, float], maximize: tuple[bool, bool]) -> None:
        self._reference = reference
        self._signs = tuple(1.0 if up else -1.0 for up in maximize)
        # Gains over the reference: the first rising, the second falling.
        self._first: list[float] = []
        self._second: list[float] = []
        self.hypervolume = 0.0

    def __len__(self) -> int:
        return len(self._first)

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The points of the front that beat the reference, by rising gain in the first objective."""
        (a, b), (sa, sb) = self._reference, self._signs
        return tuple((a + sa * x, b + sb * y) for x, y in zip(self._first, self._second, strict=True))

    def add(self, first: float, second: float) -> bool:
        """Adds a point and drops those that it dominates; True when it joins the front.

        Raises:
            RecordError: a value that is not finite.
        """
        if not (np.isfinite(first) and np.isfinite(second)):
            raise RecordError(f"objectives must be finite, got ({first}, {second})")
        return self._insert(
            self._signs[0] * (first - self._reference[0]), self._signs[1] * (second - self._reference[1])
        )

    def _insert(self, x: float, y: float) -> bool:
        xs, ys = self._first, self._second
        if x <= 0 or y <= 0:
            return False
        place = bisect_left(xs, x)
        if place < len(xs) and ys[place] >= y:
            return False  # a point at least as good in both
        # Points from `start` on, up to the new one, are dominated: not better in the first, nor in the second.
        start = place
        while start > 0 and ys[start - 1] <= y:
            start -= 1
        end = place + 1 if place < len(xs) and xs[place] == x else place
        # New area: above the staircase that was there, from the last point that stays to the new point.
        left = xs[start - 1] if start else 0.0
        for i in range(start, end):
            self.hypervolume += (xs[i] - left) * (y - ys[i])
            left = xs[i]
        floor = ys[end] if end < len(ys) else 0.0
        self.hypervolume += (x - left) * (y - floor)
        xs[start:end] = [x]
        ys[start:end] = [y]
        return True


def hypervolume_growth(points: ArrayLike, reference: tuple[float, float], maximize: tuple[bool, bool]) -> FloatArray:
    """Hypervolume of the first 1, 2, ..., N points of two objectives, shape [N].

    Raises:
        RecordError: shapes that do not fit, or a value that is not finite.
    """
    front = Front2D((0.0, 0.0), (True, True))
    result = []
    for x, y in _gains(points, reference, maximize):
        front._insert(float(x), float(y))
        result.append(front.hypervolume)
    return np.array(result)


def _volume(gains: FloatArray) -> float:
    """Volume of the union of boxes from the origin to each row of `gains`."""
    gains = gains[(gains > 0).all(axis=1)]
    if not len(gains):
        return 0.0
    dimensions = gains.shape[1]
    if dimensions == 1:
        return float(gains.max())
    front = Front2D((0.0, 0.0), (True, True))
    if dimensions == 2:
        for x, y in gains:
            front._insert(float(x), float(y))
        return front.hypervolume
    gains = gains[np.argsort(-gains[:, 2], kind="stable")]
    volume = 0.0
    for i, (x, y, z) in enumerate(gains):
        front._insert(float(x), float(y))
        below = gains[i + 1, 2] if i + 1 < len(gains) else 0.0
        volume += front.hypervolume * float(z - below)
    return volume


def _gains(points: ArrayLike, reference: Sequence[float], maximize: Sequence[bool]) -> FloatArray:
    """Distance of each point to the reference, positive where it is better, shape [N, D]."""
    costs = _costs(points, maximize)
    limit = _costs([list(reference)], maximize)
    if not 1 <= costs.shape[1] <= 3:
        raise RecordError(f"hypervolume is exact for 1 to 3 objectives, got {costs.shape[1]}")
    result: FloatArray = limit - costs
    return result


def _costs(points: ArrayLike, maximize: Sequence[bool]) -> FloatArray:
    """Points with every objective to be minimised, shape [N, D]."""
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, len(maximize)))
    if array.ndim != 2 or array.shape[1] != len(maximize):
        raise RecordError(f"points must have shape [N, {len(maximize)}] (one column per objective), got {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise RecordError(f"point {row} has a value that is not finite: {array[row].tolist()}")
    return np.where(np.asarray(maximize, dtype=bool), -array, array)
