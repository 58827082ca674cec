"""Which part of a network runs in which precision: every assignment by its estimated latency and what it costs.

The parts are the stem, each stage and the head. Latency is the corrected estimate of the whole network, changes of
precision included. What precisions cost is a sum over the parts (LANA, arXiv 2107.10624, scores operators like that;
here there are so few parts that all assignments are looked at, and no solver is needed). Where there are too many,
those stay that no other with the same last precision beats in the sums of both.

All assignments of a network are estimated by one correction, that of mixed networks, so that what is wrong with a row
is wrong for all of them and cancels in the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import Candidate, LayerSpec, Precision
from nas.core.walk import expand
from nas.latency.estimate import VectorEstimator
from nas.latency.fitting import MIXED, Fitted
from nas.latency.table import LatencyTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_State = tuple[float, float, tuple[int, ...]]  # sums of latency and cost, and the choices that lead there
Precisions = tuple[Precision, ...]  # of the stem, each stage and the head

MOST = 2**16  # assignments that are all estimated: some tenths of a second
# Deviations of its estimate by which a mix has to be faster than what it would replace. Of 33 mixes that were faster by
# more than 1 and measured, one was slower than the best uniform precision, at 1.4; none beyond 2 was
# (`benchmarks.precision`).
GAIN_STD = 2.0
EQUAL = 1e-9  # costs closer than this are equal: sums of the same numbers in another order


@dataclass(frozen=True, slots=True, eq=False)
class Assignments:
    """Ways to choose the precision of each part of one network.

    Attributes:
        choices: precisions.
        index: of the precision of each part in them, [A, P].
        ms, std_ms: estimated worst case and its deviation, [A].
        cost: what the precisions cost, the sum over parts, [A]; 0 where nothing was given.
    """

    choices: Precisions
    index: IntArray
    ms: FloatArray
    std_ms: FloatArray
    cost: FloatArray

    def precisions(self, i: int) -> Precisions:
        """Assignment `i` as `Candidate.precisions`."""
        return tuple(self.choices[k] for k in self.index[i].tolist())

    @property
    def uniform(self) -> IntArray:
        """Numbers of the assignments that are in one precision throughout."""
        return np.flatnonzero((self.index == self.index[:, :1]).all(axis=1))

    def fastest(self, gain_std: float = GAIN_STD) -> int:
        """The fastest one; the fastest uniform one where the gain over it is within the error of the estimate.

        Args:
            gain_std: deviations of the estimate that the gain has to exceed.
        """
        best = int(self.ms.argmin())
        uniform = self.uniform
        plain = int(uniform[self.ms[uniform].argmin()])
        gain_ms = self.ms[plain] - self.ms[best]
        return best if gain_ms > gain_std * self.std_ms[best] else plain

    def cheapest_within(self, limit_ms: float, margin_std: float = 1.0) -> int | None:
        """The one that costs least among those that keep a latency with a margin of deviations; of equals the fastest.

        None where none keeps it.
        """
        inside = np.flatnonzero(self.ms + margin_std * self.std_ms <= limit_ms)
        if not len(inside):
            return None
        return int(inside[np.lexsort((self.ms[inside], np.round(self.cost[inside] / EQUAL)))[0]])

    def front(self) -> list[int]:
        """Those that no other beats in latency and cost, the fastest first."""
        found: list[int] = []
        least = np.inf
        for i in np.lexsort((self.cost, self.ms)).tolist():
            if self.cost[i] < least - EQUAL:
                found.append(i)
                least = float(self.cost[i])
        return found

    def ladder(
        self, count: int, limits_ms: Sequence[float] = (), margin_std: float = 1.0, gain_std: float = GAIN_STD
    ) -> list[Precisions]:
        """A few mixed ones worth trying, different from each other.

        The fastest; the one that costs least under each latency limit; then steps of the front, evenly spread in
        latency, then its others. Limits are kept by `margin_std` deviations; those that are not by `gain_std` faster
        than a uniform one that costs no more are left out.
        """
        front = self.front()
        wanted = [self.fastest(gain_std)]
        wanted += [i for ms in limits_ms if (i := self.cheapest_within(ms, margin_std)) is not None]
        for target_ms in np.linspace(self.ms[front[0]], self.ms[front[-1]], count + 1)[1:-1]:
            wanted += [i for i in reversed(front) if self.ms[i] <= target_ms][:1]
        wanted += front
        kept = [i for i in dict.fromkeys(wanted) if i not in self.uniform and self._is_worth_it(i, gain_std)]
        return [self.precisions(i) for i in kept[:count]]

    def _is_worth_it(self, i: int, gain_std: float) -> bool:
        better = self.uniform[self.cost[self.uniform] <= self.cost[i] + EQUAL]
        return not len(better) or bool(self.ms[better].min() - self.ms[i] > gain_std * self.std_ms[i])


@dataclass(frozen=True, slots=True)
class _Slot:
    """One layer of the network in each precision; its only gene is the part that it belongs to."""

    kind: str
    genes: tuple[int, ...]
    shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    """A network as a space of assignments: what the estimator looks up."""

    all_slots: tuple[_Slot, ...]

    def slots(self) -> tuple[_Slot, ...]:
        return self.all_slots


def assignments(
    candidate: Candidate,
    choices: Sequence[Precision],
    table: LatencyTable,
    fitted: Fitted | None = None,
    cost: FloatArray | None = None,
) -> Assignments:
    """Every way to give the parts of a network one of some precisions.

    Args:
        candidate: the network; its own precisions do not matter. Its exits are left out: the ways to deploy it with and
            without them share the assignment.
        choices: at least one.
        table: with all rows of the network in all of them.
        fitted: the correction; None means the plain sum.
        cost: of each part in each precision, [P, choices]; any number that adds up, such as the loss of accuracy.

    Raises:
        MissingRowError: a row is missing; the message names the command.
        RecordError: no choice, or costs of another shape.
    """
    names = tuple(choices)
    network = replace(candidate, exits=())
    parts = len(network.precisions)
    costs = np.zeros((parts, len(names))) if cost is None else np.asarray(cost, np.float64)
    if not names or costs.shape != (parts, len(names)):
        raise RecordError(
            f"assignments: {len(names)} precisions and costs {costs.shape}; allowed: at least one, and costs of "
            f"{parts} parts in each"
        )
    slots = _slots(network, names)
    index = _every(parts, len(names))
    if index is None:
        index = _unbeaten(slots, parts, table, costs)
    estimate = VectorEstimator(_Parts(slots), table, fitted).estimate(index, label=MIXED)
    total = costs[np.arange(parts), index].sum(axis=1)
    return Assignments(names, index, estimate.worst_ms, estimate.worst_std_ms, total)


def part_of(layer: LayerSpec, parts: int) -> int:
    """Which part of a network a layer belongs to: 0 the stem, then its stages, the last the head."""
    if layer.kind == "stem":
        return 0
    return parts - 1 if layer.kind == "head" else 1 + int(layer.name.split(".")[1])


def _slots(network: Candidate, names: Precisions) -> tuple[_Slot, ...]:
    parts = len(network.precisions)
    in_each = [expand(network.with_precision(name)) for name in names]
    return tuple(
        _Slot(layers[0].kind, (part_of(layers[0], parts),), (len(names),), layers)
        for layers in zip(*in_each, strict=True)
    )


def _every(parts: int, count: int) -> IntArray | None:
    """All index vectors [count^parts, parts]; None where they are too many."""
    if count**parts > MOST:
        return None
    return np.stack(np.unravel_index(np.arange(count**parts), (count,) * parts), axis=1).astype(np.int64)


def _unbeaten(slots: Sequence[_Slot], parts: int, table: LatencyTable, costs: FloatArray) -> IntArray:
    """Assignments that no other beats in the plain sum of rows and in cost, uniform ones included, [A, parts]."""
    count = costs.shape[1]
    ms = np.zeros((parts, count))
    for slot in slots:
        ms[slot.genes[0]] += [table.net_ms(layer.key) for layer in slot.layers]
    # Per last precision, because what a change of precision costs depends on it alone.
    alive: list[list[_State]] = [[(0.0, 0.0, ())]]
    for part in range(parts):
        everything = [state for states in alive for state in states]
        alive = []
        for k in range(count):
            grown = sorted((a + ms[part, k], b + costs[part, k], (*before, k)) for a, b, before in everything)
            kept: list[_State] = []
            for state in grown:
                if not kept or state[1] < kept[-1][1] - EQUAL:
                    kept.append(state)
            alive.append(kept)
    found = {before for states in alive for _, _, before in states} | {(k,) * parts for k in range(count)}
    return np.array(sorted(found), np.int64)
