"""Thresholds of a finished student solved anew for a target, from the logits that the run has kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from nas.core.errors import BudgetError, UsageError
from nas.core.records import LatencyEstimate
from nas.core.run import Point, SplitAccuracy
from nas.latency.estimate import figures
from nas.latency.exits import ExitTarget, evaluate_thresholds, sweep
from nas.recipe.context import open_context
from nas.recipe.finish import deployed_rows, finished_logits
from nas.search.view import PointSource


def solved_point(run_dir: Path, point: Point, source: PointSource, target: ExitTarget, margin_std: float) -> Point:
    """The same student with the thresholds that reach a target on the validation split.

    Args:
        run_dir: folder of the run.
        point: a finished point with exits; its latencies of each exit count.
        source: where its weights come from.
        target: what is solved for.
        margin_std: standard deviations that are kept free below a latency.

    Raises:
        UsageError: the point has no exits.
        BudgetError: no thresholds reach the target.
    """
    if not point.candidate.exits:
        raise UsageError(f"student {point.id} has no early exits, so there are no thresholds to solve (--exits)")
    names, home = source.precisions, run_dir / "students" / source.student.candidate.arch_id
    context = open_context(str((run_dir / "context.json").resolve()), point.candidate.resolution)
    trained = source.student.candidate
    rows = deployed_rows(trained, point.candidate, source.cut)
    std = (point.latency.std_ms,) * len(rows)
    logits = {split: finished_logits(home, split, names)[rows] for split in context.splits}
    solve_labels = np.asarray(context.solve_labels)
    swept = sweep(logits.get("solve", logits["val"]), solve_labels, point.exit_ms)
    setting = target.solve(swept, std, margin_std)
    if setting is None:
        fastest = min(point.exit_ms)
        raise BudgetError(
            f"student {point.id}: no thresholds keep {target.kind}={target.value:g} ms on {len(solve_labels)} images "
            f"with a margin of {margin_std:g} deviations; leaving at the first exit takes {fastest:.4g} ms"
        )
    labels = {split: np.asarray(known) for split, (_, known) in context.splits.items()}
    found = {
        split: evaluate_thresholds(logits[split], labels[split], setting.thresholds, point.exit_ms)
        for split in ("val", "test")
    }
    shares = tuple(found["val"][1].tolist())
    candidate = point.candidate.with_thresholds(setting.thresholds)
    latency = figures(LatencyEstimate(point.exit_ms, std, 0, "measured"), shares)
    return replace(
        point,
        id=point.id.replace(point.candidate.id, candidate.id),
        candidate=candidate,
        latency=replace(latency, provenance=point.latency.provenance),
        prediction=None,
        val=SplitAccuracy(found["val"][0], len(labels["val"]), () if point.val is None else point.val.exit_top1),
        test=SplitAccuracy(found["test"][0], len(labels["test"]), () if point.test is None else point.test.exit_top1),
        exit_shares=shares,
        on_front=False,
        energy=None,
        stream=None,
    )
