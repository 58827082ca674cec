"""Which candidates deserve the expensive steps: whole networks to measure, students to finish, the pick for the budget.

Pure functions over numbers; latency in milliseconds, accuracy as a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.core.run import LatencyKind, Point, latency_of


def stratified(latency_ms: Sequence[float], count: int) -> list[int]:
    """Indices of `count` candidates at equal ranks of predicted latency, both ends included.

    A spread start beats a random one below 20 measured networks.
    """
    order = np.argsort(np.asarray(latency_ms), kind="stable")
    if count >= len(order):
        return [int(i) for i in order]
    places = np.unique(np.round(np.linspace(0, len(order) - 1, count)).astype(int))
    return [int(order[i]) for i in places]


def front_indices(top1: Sequence[float], latency_ms: Sequence[float]) -> list[int]:
    """Indices of the non-dominated candidates, fastest first; of equals the first one counts."""
    order = sorted(range(len(top1)), key=lambda i: (latency_ms[i], -top1[i], i))
    best = -1.0
    result = []
    for i in order:
        if top1[i] > best:
            best = top1[i]
            result.append(i)
    return result


def hypervolume(top1: Sequence[float], latency_ms: Sequence[float], reference_top1: float, budget_ms: float) -> float:
    """Area between the front and the reference (reference_top1, budget_ms), as a share of the whole rectangle.

    1 would be full accuracy at no time. Linear in both axes.
    """
    area = 0.0
    kept = [i for i in front_indices(top1, latency_ms) if latency_ms[i] < budget_ms and top1[i] > reference_top1]
    for place, i in enumerate(kept):
        until = latency_ms[kept[place + 1]] if place + 1 < len(kept) else budget_ms
        area += (until - latency_ms[i]) * (top1[i] - reference_top1)
    return area / (budget_ms * (1 - reference_top1))


def spread_choice(
    top1: Sequence[float],
    latency_ms: Sequence[float],
    groups: Sequence[str],
    count: int,
    reference_top1: float,
    budget_ms: float,
) -> list[str]:
    """`count` groups (architectures) whose points together cover the most hypervolume, chosen greedily.

    When nothing more is gained, the remaining places go to the next layers of the front, so that `count` different
    architectures are found wherever there are that many. Latency enters as its logarithm: a front over a wide range is
    covered evenly instead of being ruled by its fastest end.
    """
    remaining = list(range(len(top1)))
    low = min(latency_ms, default=budget_ms) / 2
    scaled = [float(np.log(t / low)) for t in latency_ms]
    limit = float(np.log(max(budget_ms, max(latency_ms, default=budget_ms)) * 1.02 / low))
    chosen: list[str] = []
    while remaining and len(chosen) < count:
        layer = _greedy_layer(top1, scaled, groups, remaining, count - len(chosen), reference_top1, limit)
        chosen += layer
        taken = set(chosen)
        remaining = [i for i in remaining if groups[i] not in taken]
        if not layer and remaining:
            best = max(remaining, key=lambda i: top1[i])
            chosen.append(groups[best])
            remaining = [i for i in remaining if groups[i] != groups[best]]
    return chosen


def _greedy_layer(
    top1: Sequence[float],
    cost: Sequence[float],
    groups: Sequence[str],
    candidates: list[int],
    count: int,
    reference_top1: float,
    limit: float,
) -> list[str]:
    kept: list[int] = []
    chosen: list[str] = []
    reached = 0.0
    while len(chosen) < count:
        best_gain, best_group, best_members = 1e-12, None, []
        for group in dict.fromkeys(groups[i] for i in candidates if groups[i] not in chosen):
            members = [i for i in candidates if groups[i] == group]
            trial = kept + members
            gain = hypervolume([top1[i] for i in trial], [cost[i] for i in trial], reference_top1, limit) - reached
            if gain > best_gain:
                best_gain, best_group, best_members = gain, group, members
        if best_group is None:
            break
        chosen.append(best_group)
        kept += best_members
        reached += best_gain
    return chosen


def worth_measuring(
    top1: Sequence[float], latency_ms: Sequence[float], std_ms: Sequence[float], budget_ms: float, count: int
) -> list[int]:
    """Indices of the networks whose measurement decides the most: on the front and near the budget, in turn."""
    front = front_indices(top1, latency_ms)
    front.sort(key=lambda i: -std_ms[i] / latency_ms[i])
    near = sorted(range(len(top1)), key=lambda i: abs(latency_ms[i] - budget_ms) / max(std_ms[i], 1e-9) - top1[i])
    result: list[int] = []
    for pair in zip(front + near, near + front, strict=True):
        result += [i for i in pair if i not in result]
    return result[:count]


def pick_for_budget(points: Sequence[Point], budget_ms: float, of: LatencyKind) -> list[Point]:
    """Finished points that keep the budget, best validation accuracy first, then fastest: the pick and its runners-up.

    The validation split decides; test figures are for the report only.
    """
    within = [p for p in points if p.is_finished and p.val is not None and latency_of(p.latency, of) <= budget_ms]
    return sorted(within, key=lambda p: (-(p.val.top1 if p.val else 0.0), latency_of(p.latency, of), p.id))


def closest_to_budget(points: Sequence[Point], of: LatencyKind) -> Point | None:
    """The fastest point: what comes nearest when nothing keeps the budget."""
    return min(points, key=lambda p: latency_of(p.latency, of), default=None)
