"""Scoring by short training of each candidate, with successive halving on two objectives so that bad ones stop early.

Sources: Jamieson and Talwalkar 2016, arXiv 1502.07943: rungs of rising length, a share goes on at each. Li et al. 2020,
arXiv 1810.05934 (ASHA): no rung waits until it is full, whoever is in the top share of all that were seen there goes
on. Schmucker et al. 2021, arXiv 2106.12639 (MO-ASHA): the same by non-dominated rank. Ties in a rank by hypervolume
contribution, as in Emmerich, Beume and Naujoks 2005 (SMS-EMOA).

Differs from these:
- Students are compared in the order in which they were proposed, not in that in which workers are done with them. A
  score that is early waits, its worker does not. So who goes on is a function of the scores alone: any number of
  workers decides the same, and so does a run that was killed.
- Whoever is in the top share goes on, as in ASHA, but that is looked at once for `TOGETHER` new students and all before
  them, not at every one: the best of one or two is no choice, and costs a tenth of the seconds
  (`benchmarks.halving`). Most of the workers' waiting is for the last students of a batch, whatever happens before.
  Later students are better, since a sampler learns, so that more than the share has gone on in the end; a limit to
  the share lost the best of them.
- The learning rate follows the schedule of the last rung from the start, so a student that goes on continues from its
  checkpoint. One that was stopped goes on later, when it is the best of those that were left behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.core.errors import RecordError
from nas.latency.pareto import hypervolume_contributions, non_dominated

TOGETHER = 12  # new students of a rung after whom it is decided who goes on: a batch of the default size
LEAST_ERROR = 1e-3  # a share of wrong answers below it counts as it: one image of a thousand
PRIOR_STUDENTS, PRIOR_SPREAD = 4.0, 0.2  # weight of the slope 1: so many students, spread so far in log error


@dataclass(frozen=True, slots=True)
class Standing:
    """A student that was compared in an earlier batch.

    `top1`: accuracy at each rung that it has reached; `latency_ms` on each device; `went_on`: from how many rungs.
    """

    number: int
    top1: tuple[float, ...]
    latency_ms: tuple[float, ...]
    went_on: int


@dataclass(slots=True, eq=False)
class _Rung:
    """One rung: who was compared there, who went on from it, and who is still to be compared, in this order."""

    seen: dict[int, tuple[float, tuple[float, ...]]] = field(default_factory=dict)
    went_on: set[int] = field(default_factory=set)
    line: deque[int] = field(default_factory=deque)
    fresh: int = 0  # compared since it was last decided who goes on
    early: dict[int, float | None] = field(default_factory=dict)  # scores of those in the line; None: it failed


class Halving:
    """Who is trained up to which rung: decisions only, no training.

    Args:
        rungs: how many there are.
        keep: the best share of the students seen at a rung goes on, at least one.
        together: so many are compared before it is decided who of all that were seen goes on; fewer when nobody else
            can come to the rung.
        before: students of earlier batches.
    """

    def __init__(self, rungs: int, keep: float, together: int, before: Iterable[Standing] = ()) -> None:
        self._keep = keep
        self._together = together
        self._latency_ms: dict[int, tuple[float, ...]] = {}
        self._rungs = [_Rung() for _ in range(rungs)]
        for standing in before:
            self._latency_ms[standing.number] = standing.latency_ms
            for place, (rung, top1) in enumerate(zip(self._rungs, standing.top1, strict=False)):
                rung.seen[standing.number] = top1, standing.latency_ms
                if place < standing.went_on:
                    rung.went_on.add(standing.number)

    def join(self, number: int, latency_ms: Sequence[float]) -> None:
        """A new student, compared after all that joined before it."""
        self._latency_ms[number] = tuple(latency_ms)
        self._rungs[0].line.append(number)

    def open(self) -> list[tuple[int, int]]:
        """(rung, number) of every score that is needed now, the highest rung first."""
        places = reversed(range(len(self._rungs)))
        return [(place, n) for place in places for n in self._rungs[place].line if n not in self._rungs[place].early]

    def arrive(self, number: int, place: int, top1: float | None) -> None:
        """The accuracy of a student at a rung, None where its training failed; whoever may go on is `open` then."""
        self._rungs[place].early[number] = top1
        is_closed = True  # nobody can come to this rung any more
        for rung, following in zip(self._rungs, [*self._rungs[1:], None], strict=True):
            while rung.line and rung.line[0] in rung.early:
                self._compare(rung, following)
            is_closed = is_closed and not rung.line
            if is_closed and rung.fresh:
                self._promote(rung, following)

    def _compare(self, rung: _Rung, following: _Rung | None) -> None:
        """Takes the first of the line."""
        number = rung.line.popleft()
        top1 = rung.early.pop(number)
        if top1 is None:
            return
        rung.seen[number] = top1, self._latency_ms[number]
        rung.fresh += 1
        if rung.fresh == self._together:
            self._promote(rung, following)

    def _promote(self, rung: _Rung, following: _Rung | None) -> None:
        rung.fresh = 0
        if following is None:
            return
        numbers = list(rung.seen)
        top1, latency_ms = zip(*rung.seen.values(), strict=True)
        for i in promoted(top1, latency_ms, max(1, int(self._keep * len(numbers) + 1e-9))):
            if numbers[i] not in rung.went_on:
                rung.went_on.add(numbers[i])
                following.line.append(numbers[i])


def promoted(accuracy: ArrayLike, latency_ms: ArrayLike, count: int) -> NDArray[np.int64]:
    """Indices of the `count` students that go on, better fronts first.

    Students are taken front by front (non-dominated rank). Of the front that does not fit as a whole, those with the
    largest hypervolume contribution are taken, best first, the contributions of the rest being computed anew after
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
        front = [int(i) for i in rest[on_front]]
        rest = rest[~on_front]
        if len(front) > count - len(chosen):
            front = _by_contribution(points, front)
        chosen.extend(front[: count - len(chosen)])
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


def _by_contribution(points: NDArray[np.float64], front: Sequence[int]) -> list[int]:
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
        removed.append(left.pop(worst))
    return left + removed[::-1]


def foreseen(curves: Sequence[Sequence[float]], place: int, top1: float) -> float:
    """Accuracy that a student would have reached at the last rung, from those that went all the way.

    The share of wrong answers is taken to shrink between two rungs as that of the others did: a straight line between
    the logarithms of both shares, whose slope is drawn towards 1 as if by `PRIOR_STUDENTS` further students.

    Args:
        curves: accuracy at every rung of each student that went all the way, [N, R], at least one.
        place: rung at which the student was stopped.
        top1: its accuracy there.
    """
    errors = np.log(np.maximum(1 - np.asarray(curves, dtype=np.float64), LEAST_ERROR))
    here, last = errors[:, place], errors[:, -1]
    centred = here - here.mean()
    prior = PRIOR_STUDENTS * PRIOR_SPREAD**2
    slope = (centred @ last + prior) / (centred @ centred + prior)
    error = last.mean() + slope * (np.log(max(1 - top1, LEAST_ERROR)) - here.mean())
    return float(1 - np.exp(min(error, 0.0)))
