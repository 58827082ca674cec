"""Scoring by short training of each candidate, with successive halving on two objectives so that bad ones stop early.

Jamieson & Talwalkar 2016, arXiv 1502.07943: rungs of rising length, a share goes on at each. Promotion by non-dominated
rank, ties in the last rank by hypervolume contribution, as in Emmerich, Beume & Naujoks 2005 (SMS-EMOA). Differs: the
learning rate follows the schedule of the last rung from the start, so a candidate that goes on continues from its
checkpoint instead of starting anew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.core.errors import RecordError
from nas.latency.pareto import hypervolume_contributions, non_dominated


def promoted(accuracy: ArrayLike, latency_ms: ArrayLike, count: int) -> NDArray[np.int64]:
    """Indices of the `count` students that go on, best first.

    Students are taken front by front (non-dominated rank). Of the front that does not fit as a whole, those with the
    largest hypervolume contribution are taken, one at a time, the contributions of the rest being computed anew after
    the one with the smallest has left. Both axes are scaled to the range of that front, so that neither unit rules, and
    the reference lies one range behind both worst ends. Ties go to the lower index. With the latencies on several
    devices the contributions to the front of each device add up.

    Args:
        accuracy: [N], more is better.
        latency_ms: [N], less is better; [N, D] on D devices.
        count: how many go on; all do when there are fewer.

    Raises:
        RecordError: shapes that differ, or a value that is not finite.
    """
    points = _points(accuracy, latency_ms)
    chosen: list[int] = []
    rest = np.arange(len(points))
    while len(chosen) < count and len(rest):
        on_front = non_dominated(points[rest], (True, *(False,) * (points.shape[1] - 1)))
        front = rest[on_front]
        rest = rest[~on_front]
        front = _by_contribution(points, front)
        chosen.extend(int(i) for i in front[: count - len(chosen)])
    return np.array(chosen, dtype=np.int64)


def _points(accuracy: ArrayLike, latency_ms: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(accuracy, dtype=np.float64), np.asarray(latency_ms, dtype=np.float64)
    if a.ndim != 1 or b.ndim not in (1, 2) or len(a) != len(b):
        raise RecordError(f"promotion needs one accuracy and one latency per student, got {a.shape} and {b.shape}")
    points = np.column_stack([a, b])
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise RecordError(f"promotion: student {row} has a value that is not finite: {points[row].tolist()}")
    return points


def _by_contribution(points: NDArray[np.float64], front: NDArray[np.int64]) -> list[int]:
    """Members of a front in the order in which they should be kept, the least contributing last."""
    removed: list[int] = []
    left = list(front)
    while len(left) > 1:
        scaled = points[left]
        low, high = scaled.min(axis=0), scaled.max(axis=0)
        scaled = (scaled - low) / np.where(high > low, high - low, 1.0)
        # One range behind the worst ends: an end contributes its lead over the next one, times a whole range.
        axes = range(1, scaled.shape[1])
        each = [hypervolume_contributions(scaled[:, [0, axis]], (-1.0, 2.0), (True, False)) for axis in axes]
        contribution = np.sum(each, axis=0)
        worst = max(range(len(left)), key=lambda i: (-contribution[i], left[i]))
        removed.append(int(left.pop(worst)))
    return [int(i) for i in left] + removed[::-1]
