"""What each sampler of a run contributed: candidates, places on the front, hypervolume that only it reached."""

from __future__ import annotations

from collections.abc import Sequence

from nas.core.run import Point, ProposerSummary
from nas.latency.pareto import hypervolume, non_dominated
from nas.search.folder import TrialRecord

AIMS = (True, False)  # score up, latency down


def proposer_summaries(
    records: Sequence[TrialRecord], latency_ms: Sequence[float], points: Sequence[Point], budget_ms: float
) -> tuple[ProposerSummary, ...]:
    """One summary for each proposer, the one with the most candidates first.

    Only candidates that were scored to the end count for the front and the hypervolume; its reference is score 0 and
    the budget, as in the report's chart of it.

    Args:
        records: all trials.
        latency_ms: predicted latency of each of them on the device that the summary is for.
        points: finished students of that device.
        budget_ms: its deadline.
    """
    scores = [(r.proposer, r.score, ms) for r, ms in zip(records, latency_ms, strict=True) if r.state == "complete"]
    pairs = [(score, ms) for _, score, ms in scores]
    on_front = non_dominated(pairs, AIMS).tolist()
    whole = hypervolume(pairs, (0.0, budget_ms), AIMS)
    proposer_of = {r.number: r.proposer for r in records}
    result = []
    for name in dict.fromkeys(r.proposer for r in records):
        own = [r for r in records if r.proposer == name]
        others = [pair for pair, (n, _, _) in zip(pairs, scores, strict=True) if n != name]
        rest = hypervolume(others, (0.0, budget_ms), AIMS)
        result.append(
            ProposerSummary(
                name,
                sum(r.state != "failed" for r in own),
                sum(r.state == "failed" for r in own),
                sum(on for on, (n, _, _) in zip(on_front, scores, strict=True) if n == name),
                sum(p.on_front and p.trial is not None and proposer_of.get(p.trial) == name for p in points),
                max(0.0, 1 - rest / whole) if whole > 0 else 0.0,
            )
        )
    return tuple(sorted(result, key=lambda s: -s.scored))
