"""Accuracy of the finished students on corrupted test images: one row for each of them, as it would be deployed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.core.errors import InterruptedRunError
from nas.core.jsonio import content_hash, read_record, write_record
from nas.core.run import Point, RobustnessRow
from nas.data.corruptions import CORRUPTIONS, corrupted
from nas.export.dialect import dialect_for
from nas.latency.exits import evaluate_thresholds
from nas.recipe.context import open_context
from nas.recipe.deployed import deployed_logits
from nas.recipe.finish import deployed_student
from nas.search.rounds import SearchParts
from nas.search.view import Outcome

SEED = 0  # of what is random in a corruption: the same images for every student and every run
VERSION = 1  # raise it when a change of the corruptions or of this module changes a figure


def robustness_table(parts: SearchParts, outcome: Outcome, severities: Sequence[int]) -> tuple[RobustnessRow, ...]:
    """One row for each finished student on the device of `parts`, the pick first, then the most accurate.

    Rows are kept in the students' folders, so a run that was killed goes on with the next student.

    Args:
        parts: folder, context and device.
        outcome: points, sources and the pick.
        severities: 1 to 5.

    Raises:
        InterruptedRunError: the run was asked to stop.
    """
    chosen = representatives(outcome)
    rows = []
    for number, point in enumerate(chosen):
        if parts.stop.is_set:
            raise InterruptedRunError("stopped; finished work is kept")
        parts.reporter.progress("robustness", number, len(chosen), "students on corrupted test images")
        source = outcome.sources[point.id]
        folder = parts.folder.student(source.student.candidate.arch_id)
        dialect = dialect_for(parts.predictor.device.profile)
        key = content_hash([VERSION, point.id, point.candidate, list(severities), dialect.name], 12)
        file = folder / f"robustness-{key}.json"
        if not file.exists():
            write_record(file, _row(parts, outcome, point, severities))
        rows.append(read_record(RobustnessRow, file))
    parts.reporter.progress("robustness", len(chosen), len(chosen), "students on corrupted test images")
    return tuple(rows)


def representatives(outcome: Outcome) -> list[Point]:
    """A point of each finished student: the pick; of the others the whole network without exits in the precision of the
    pick, else their most accurate one.
    """
    pick = next((p for p in outcome.points if p.id == outcome.pick_id), None)
    by_student: dict[str, list[Point]] = {}
    for point in outcome.points:
        by_student.setdefault(outcome.sources[point.id].student.candidate.arch_id, []).append(point)

    def rank(p: Point) -> tuple[bool, bool, float]:
        whole = outcome.sources[p.id].cut is None and not p.candidate.exits
        is_alike = pick is not None and whole and p.precision == pick.precision
        return p is pick, is_alike, p.accuracy.top1

    best = [max(points, key=rank) for points in by_student.values()]
    return sorted(best, key=lambda p: (p is not pick, -p.accuracy.top1))


def _row(parts: SearchParts, outcome: Outcome, point: Point, severities: Sequence[int]) -> RobustnessRow:
    candidate, source = point.candidate, outcome.sources[point.id]
    context = open_context(parts.plan.context, candidate.resolution)
    trained = source.student.candidate
    folder = parts.folder.student(trained.arch_id)
    weights, quant = deployed_student(folder, trained, candidate, source.precisions, source.cut)
    dialect = dialect_for(parts.predictor.device.profile)
    labels = np.asarray(context.test_labels)

    def top1(images: np.ndarray) -> float:
        logits = deployed_logits(candidate, weights, quant, context.mean, context.std, images, dialect)
        return evaluate_thresholds(logits, labels, point.thresholds, np.arange(1.0, len(logits) + 1))[0]

    images = np.asarray(context.test)
    found = {
        name: tuple(
            top1(corrupted(images, name, severity, np.random.default_rng([SEED, kind, severity])))
            for severity in severities
        )
        for kind, name in enumerate(CORRUPTIONS)
    }
    return RobustnessRow(point.id, len(labels), tuple(severities), top1(images), found)
