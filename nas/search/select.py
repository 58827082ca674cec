"""Which candidates deserve the expensive steps: whole networks to measure, students to finish, the pick for the budget.

Pure functions over numbers; latency in milliseconds, accuracy as a ratio.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from nas.core.run import LatencyKind, Point, latency_of
from nas.latency import pareto

AIMS = (True, False)  # accuracy upwards, latency downwards
LEAST_GAIN = 1e-12  # of area; below it is rounding
DEADLINES = 24  # below the budget, for which a measurement may decide something
LEAST_WORTH = 1e-5  # of accuracy; a measurement that is expected to add less decides nothing
LEAST_STD_MS = 1e-9
TIE_ERRORS = 0.5  # standard errors of an accuracy within which another one is called equal


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


def as_accuracies(scores: Sequence[float], of: Sequence[tuple[float, float]]) -> list[float]:
    """Scores in the same order on the scale of accuracies: on the straight line through pairs of score and accuracy.

    Scores of half-trained students spread more than their accuracies do. An area over latency would so give more weight
    to accuracy than it has, and the fastest end of the front would be missing among the finalists.

    Args:
        scores: any.
        of: score and accuracy of each candidate that has both; where they tell no rising line, scores stay as they are.
    """
    pairs = np.asarray(of, np.float64).reshape(-1, 2)
    spread = float(pairs[:, 0].var()) if len(pairs) else 0.0
    if spread <= 0:
        return list(scores)
    middle, accuracy = pairs.mean(axis=0)
    slope = float(((pairs[:, 0] - middle) * (pairs[:, 1] - accuracy)).mean()) / spread
    return [float(accuracy + slope * (s - middle)) for s in scores] if slope > 0 else list(scores)


def hypervolume(top1: Sequence[float], latency_ms: Sequence[float], reference_top1: float, budget_ms: float) -> float:
    """Area between the front and the reference (reference_top1, budget_ms), as a share of the whole rectangle.

    1 would be full accuracy at no time. Linear in both axes.
    """
    points = np.column_stack([np.asarray(top1, np.float64), np.asarray(latency_ms, np.float64)])
    return pareto.hypervolume(points, (reference_top1, budget_ms), AIMS) / (budget_ms * (1 - reference_top1))


def spread_choice(
    top1: Sequence[float],
    latency_ms: Sequence[float],
    groups: Sequence[str],
    count: int,
    reference_top1: float,
    budget_ms: float,
    first: Sequence[str] = (),
) -> list[str]:
    """`count` groups (architectures) whose points together cover the most hypervolume, chosen greedily.

    Groups of `first` are taken whatever they add. When nothing more is gained, the remaining places go to the next
    layers of the front, so that `count` different architectures are found wherever there are that many. Latency enters
    as its logarithm: a front over a wide range is covered evenly instead of being ruled by its fastest end.
    """
    low = min(latency_ms, default=budget_ms) / 2
    limit = float(np.log(max(budget_ms, max(latency_ms, default=budget_ms)) * 1.02 / low))
    members: dict[str, list[tuple[float, float]]] = {}
    for accuracy, ms, group in zip(top1, latency_ms, groups, strict=True):
        members.setdefault(group, []).append((accuracy, float(np.log(ms / low))))
    chosen = list(dict.fromkeys(first))[:count]
    kept = [point for group in chosen for point in members.pop(group)]
    while members and len(chosen) < count:
        layer = _greedy_layer(members, kept, count - len(chosen), (reference_top1, limit))
        kept = []
        if not layer:
            layer = [max(members, key=lambda g: max(accuracy for accuracy, _ in members[g]))]
        chosen += layer
        for group in layer:
            del members[group]
    return chosen


def _greedy_layer(
    members: Mapping[str, Sequence[tuple[float, float]]],
    before: Sequence[tuple[float, float]],
    count: int,
    reference: tuple[float, float],
) -> list[str]:
    """Up to `count` groups, each the one that adds most to the area of those before it, while anything is added.

    Lazy: what a group adds can only shrink as others are chosen, so a gain that was computed earlier is an upper bound,
    and only the group with the largest bound is computed anew.
    """
    names = list(members)
    kept = list(before)
    chosen: list[str] = []
    reached = pareto.hypervolume(kept, reference, AIMS)
    queue = [(-float("inf"), number, -1) for number in range(len(names))]  # -gain, order, size of `chosen` it holds for
    while queue and len(chosen) < count:
        negative, number, computed_at = heapq.heappop(queue)
        if computed_at == len(chosen):
            if -negative <= LEAST_GAIN:
                break
            chosen.append(names[number])
            kept += members[names[number]]
            reached -= negative
        else:
            gain = pareto.hypervolume([*kept, *members[names[number]]], reference, AIMS) - reached
            heapq.heappush(queue, (-gain, number, len(chosen)))
    return chosen


def worth_measuring(
    top1: Sequence[float],
    latency_ms: Sequence[float],
    limited_ms: Sequence[float],
    std_ms: Sequence[float],
    budget_ms: float,
    count: int,
    measured: Sequence[int] = (),
) -> list[int]:
    """Indices of the networks whose measurement is expected to decide the most, the most decisive first.

    A measurement is worth what it is expected to add to the accuracy of the best network that is known to keep a
    deadline: (accuracy above the best one known) x (probability that it keeps the deadline), the constrained expected
    improvement of Gardner et al. 2014 (ICML, Bayesian Optimization with Inequality Constraints). Half of the worth is
    that for the budget, the other half the mean over shorter deadlines, which is the expected gain in hypervolume.
    Networks are chosen one by one; those before count with the probability that they keep a deadline, so a network that
    resembles a chosen one adds little. Errors of different networks count as independent. Where no network keeps a
    deadline, the accuracy counts that lies as far below the worst one as that below the best: only differences matter.
    Where nothing more can be gained, the front and the networks near the budget follow in turn: they teach the table.

    Args:
        top1: accuracy, ratio.
        latency_ms: the axis of the front.
        limited_ms: the latency that the budget limits.
        std_ms: deviation of the estimates; of measured networks that of the measurement.
        budget_ms: the deadline.
        count: how many at most.
        measured: indices of networks that have been measured; they are not chosen, and what they reach counts.
    """
    accuracy, ms, limited = (np.asarray(v, np.float64) for v in (top1, latency_ms, limited_ms))
    std = np.maximum(np.asarray(std_ms, np.float64), LEAST_STD_MS)
    is_open = np.ones(len(accuracy), bool)
    is_open[list(measured)] = False
    if not is_open.any():
        return []
    fastest = min(float((ms - std).min()), budget_ms)
    deadlines = fastest + (budget_ms - fastest) * np.arange(1, DEADLINES + 1) / DEADLINES
    keeps = np.column_stack(
        [special.ndtr((deadlines - ms[:, None]) / std[:, None]), special.ndtr((budget_ms - limited) / std)]
    )
    weights = np.append(np.full(DEADLINES, 1 / DEADLINES), 1.0)
    levels, place = np.unique(accuracy, return_inverse=True)
    steps = np.diff(levels, prepend=2 * levels[0] - levels[-1])[:, None]
    # Probability, for each step of accuracy and each deadline, that no network known or chosen reaches that step.
    unreached = np.ones((len(levels), len(weights)))
    for i in measured:
        unreached[: place[i] + 1] *= 1 - keeps[i]
    chosen: list[int] = []
    while len(chosen) < count and is_open.any():
        worth = (keeps * np.cumsum(unreached * steps, axis=0)[place]) @ weights
        best = int(np.argmax(np.where(is_open, worth, -1.0)))
        if worth[best] < LEAST_WORTH:
            break
        chosen.append(best)
        is_open[best] = False
        unreached[: place[best] + 1] *= 1 - keeps[best]
    rest = np.flatnonzero(is_open)
    front = [int(rest[i]) for i in front_indices(accuracy[rest].tolist(), ms[rest].tolist())]
    front.sort(key=lambda i: -std[i] / ms[i])
    near = sorted(rest.tolist(), key=lambda i: abs(limited[i] - budget_ms) / std[i] - accuracy[i])
    in_turn = [i for pair in zip(front + near, near + front, strict=True) for i in pair]
    return list(dict.fromkeys([*chosen, *in_turn]))[:count]


def pick_for_budget(points: Sequence[Point], budget_ms: float, of: LatencyKind) -> list[Point]:
    """Finished points measured within the budget, best first: the pick and its runners-up.

    The most accurate on validation comes first. Accuracies that differ by less than `TIE_ERRORS` standard errors of the
    best one are called equal, and the fastest of them is the pick: a few images more right by chance must not cost the
    user a slower student. The validation split decides; test figures are for the report only.
    """
    within = [
        (p.val.top1, latency_of(p.latency, of), p, p.val.images)
        for p in points
        if p.is_finished
        and p.val is not None
        and p.latency.provenance == "measured"
        and latency_of(p.latency, of) <= budget_ms
    ]
    if not within:
        return []
    best, _, _, images = max(within, key=lambda entry: entry[0])
    least = best - TIE_ERRORS * float(np.sqrt(best * (1 - best) / images)) - 1e-12
    # Equal ones by latency, the others by accuracy; the mean last, so that the pick is never dominated.
    order = sorted(
        within,
        key=lambda e: (e[0] < least, 0.0 if e[0] >= least else -e[0], e[1], -e[0], e[2].latency.expected_ms, e[2].id),
    )
    return [p for _, _, p, _ in order]


def pick_for_all(points: Sequence[Sequence[Point]], budgets_ms: Sequence[float], of: LatencyKind) -> list[Point]:
    """Points of the first device that keep their budget on every device, best first: the pick for all, its runners-up.

    Args:
        points: of each device; one with the same id on two devices is the same student under the same thresholds.
        budgets_ms: of each device.
        of: which latency the budgets limit.
    """
    first, *others = (pick_for_budget(p, ms, of) for p, ms in zip(points, budgets_ms, strict=True))
    kept = set[str].intersection({p.id for p in first}, *({p.id for p in own} for own in others))
    # Chosen anew among those that are left: which accuracies are equal depends on the best one.
    return pick_for_budget([p for p in first if p.id in kept], budgets_ms[0], of)


def closest_to_budget(points: Sequence[Point], of: LatencyKind) -> Point | None:
    """The fastest point: what comes nearest when nothing keeps the budget."""
    return min(points, key=lambda p: latency_of(p.latency, of), default=None)
