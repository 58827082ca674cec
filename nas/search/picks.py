"""The pick for a deadline, and in words why it is the one."""

from __future__ import annotations

from collections.abc import Sequence

from nas.core.run import BudgetPick, LatencyKind, Point, latency_of
from nas.search.select import closest_to_budget, pick_for_budget


def pick_for(points: Sequence[Point], budget_ms: float, of: LatencyKind) -> BudgetPick:
    """The pick for a deadline, or the closest student where none keeps it."""
    picks = pick_for_budget(points, budget_ms, of)
    if picks:
        return BudgetPick(budget_ms, picks[0].id, pick_reason(picks, budget_ms, of))
    closest = closest_measured(points, of)
    return BudgetPick(budget_ms, None, "" if closest is None else closest_reason(closest, budget_ms, of))


def closest_measured(points: Sequence[Point], of: LatencyKind) -> Point | None:
    """The fastest student that was measured: what comes nearest when none keeps the deadline."""
    return closest_to_budget([p for p in points if p.latency.provenance == "measured"], of)


def pick_reason(picks: Sequence[Point], budget_ms: float, of: LatencyKind) -> str:
    """Why the first of `picks`, which are the best first, is the pick."""
    accuracies = [p.val.top1 if p.val else 0.0 for p in picks]
    if accuracies[0] == max(accuracies):
        rank = f"best validation accuracy ({100 * accuracies[0]:.1f} %)"
    else:
        rank = (
            f"{100 * accuracies[0]:.1f} % on validation, the fastest of those that equal the best "
            f"({100 * max(accuracies):.1f} %) within half a standard error,"
        )
    return (
        f"{rank} of {len(picks)} measured settings whose {of} latency keeps {budget_ms:g} ms; it needs "
        f"{latency_of(picks[0].latency, of):.4f} ms"
    )


def next_reason(pick: Point, second: Point, of: LatencyKind) -> str:
    """What the second best gives and takes against the pick."""
    if pick.val is None or second.val is None:
        return ""
    points = 100 * (pick.val.top1 - second.val.top1)
    ratio = latency_of(second.latency, of) / latency_of(pick.latency, of)
    sign = "less" if points >= 0 else "more"
    return f"{abs(points):.1f} points {sign} on validation at {ratio:.2f} times the {of} latency"


def closest_reason(point: Point, budget_ms: float, of: LatencyKind) -> str:
    """How far the fastest student is over the deadline."""
    ms = latency_of(point.latency, of)
    return f"fastest measured student: {ms:.4f} ms ({of}), {100 * (ms / budget_ms - 1):.0f} % over the budget"
