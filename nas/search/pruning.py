"""Narrower students of finished ones: how wide each block becomes, from importance and from rows measured for it.

Latency does not fall evenly with the width: a device computes channels in groups, and groups differ by layer and
precision. So the widths are those at which the measured latency of the block steps, found by halving the intervals of
the width in which it changes the most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from nas.compress.prune import LEAST_KEPT, choose_widths, prunable, removed_share, with_widths
from nas.core.errors import MissingRowError
from nas.core.records import Candidate, LayerSpec, Precision
from nas.core.units import format_ms
from nas.recipe.finish import FinishJob, adopt_parent
from nas.recipe.pruning import importance_file, read_importance
from nas.recipe.records import FinishedStudent
from nas.search.predictor import Predictor
from nas.search.rounds import SearchParts
from nas.search.settings import FinishSettings

Costs = dict[str, dict[int, float]]


def pruned_jobs(
    parts: SearchParts, finished: Sequence[tuple[FinishJob, FinishedStudent]], settings: FinishSettings
) -> list[FinishJob]:
    """A job for each share of every finished student; of those that equal a finalist, or each other, a line is said.

    Args:
        parts: of the search; rows are measured on its first device.
        finished: the finalists with the jobs that they came from.
        settings: which shares, and how.

    Raises:
        StorageError: the files of a finished student cannot be read.
    """
    taken = {student.candidate.arch_id for _, student in finished}
    jobs: list[FinishJob] = []
    for job, student in finished:
        parent = student.candidate
        importance = read_importance(parts.folder.student(parent.arch_id) / importance_file(settings.prune_importance))
        precision = fastest_precision(parts.predictor, parent, parts.space.precisions)
        costs = width_costs(parts.predictor, parent.with_precision(precision), settings.prune_rows)
        for share in settings.prune:
            narrow = with_widths(parent, choose_widths(importance, costs, share))
            if narrow.arch_id in taken:
                parts.reporter.say(
                    f"finish.prune {share:g} makes no student of {parent.arch_id}: {_why(narrow, parent)}"
                )
                continue
            taken.add(narrow.arch_id)
            parts.reporter.say(_what(parts.predictor, parent, narrow, precision))
            folder = parts.folder.student(narrow.arch_id)
            adopt_parent(parts.folder.student(parent.arch_id), folder, settings.prune_importance)
            jobs.append(
                replace(
                    job,
                    candidate=narrow,
                    folder=str(folder),
                    importance=None,
                    parent=parent.arch_id,
                    prune=settings.pruning,
                )
            )
    return jobs


def _why(narrow: Candidate, parent: Candidate) -> str:
    """Why a network that is there already came out."""
    if not prunable(parent):
        return "none of its blocks expands"
    if narrow.arch_id == parent.arch_id:
        return "no narrower width of its blocks was measured as faster"
    return f"{narrow.arch_id}, which comes out, is there already"


def _what(predictor: Predictor, parent: Candidate, narrow: Candidate, precision: Precision) -> str:
    gone = f"{parent.arch_id} without {100 * removed_share(parent, narrow):.0f} % of its expansion channels"
    try:
        before, after = (predictor.estimate(c.with_precision(precision)).worst_ms for c in (parent, narrow))
    except MissingRowError:
        return f"{gone}: {narrow.arch_id}"
    return f"{gone}: {narrow.arch_id}, {format_ms(before)} -> {format_ms(after)} in {precision} (predicted)"


def fastest_precision(predictor: Predictor, candidate: Candidate, precisions: Sequence[Precision]) -> Precision:
    """The precision that is predicted to be the fastest throughout; the first one where none has all rows."""
    found: dict[Precision, float] = {}
    for precision in precisions:
        try:
            found[precision] = predictor.estimate(candidate.with_precision(precision)).worst_ms
        except MissingRowError:
            continue
    return min(found, key=lambda p: found[p]) if found else precisions[0]


def width_costs(predictor: Predictor, candidate: Candidate, rows: int) -> Costs:
    """Latency in ms by expanded channels of each block that can be narrowed, as far as it was measured.

    Rows are those of the narrowest and the full width, then, again and again, of the middle of the two neighbours whose
    latencies differ the most. A block whose full width could not be measured is left out.

    Args:
        predictor: measures what its table lacks.
        candidate: in the precision that counts.
        rows: of each block, the two ends among them.
    """
    layers = prunable(candidate)
    asked = {name: [layer.expanded_channels, _least(layer)] for name, layer in layers.items()}
    for _ in range(rows - 1):
        predictor.fill([_at(layers[name], width) for name, widths in asked.items() for width in widths])
        costs = {name: _known(predictor, layers[name], widths) for name, widths in asked.items()}
        more = {name: _middle(costs[name], layers[name]) for name in asked}
        if all(width is None for width in more.values()):
            break
        asked = {name: [*w, more[name]] if more[name] is not None else w for name, w in asked.items()}
    return {name: found for name, found in costs.items() if layers[name].expanded_channels in found}


def _at(layer: LayerSpec, width: int) -> LayerSpec:
    return replace(layer, expanded_channels=width)


def _least(layer: LayerSpec) -> int:
    """The fewest channels that a block may keep; as many as its input has would mean that nothing is expanded."""
    width = max(1, math.ceil(LEAST_KEPT * layer.expanded_channels))
    return width + 1 if width == layer.in_channels else width


def _known(predictor: Predictor, layer: LayerSpec, widths: Sequence[int]) -> dict[int, float]:
    rows = {width: _at(layer, width) for width in widths}
    return {width: predictor.row_ms(row) for width, row in rows.items() if predictor.table.has_row(row.key)}


def _middle(costs: Mapping[int, float], layer: LayerSpec) -> int | None:
    """The width that is measured next: between the two neighbours whose latencies differ the most, None: none is left.

    A width that failed is not asked for again: its middle would be the same, and the block is as known as it will be.
    """
    gaps = [(abs(costs[b] - costs[a]), a, b) for a, b in pairwise(sorted(costs)) if b - a > 1]
    for _, a, b in sorted(gaps, reverse=True):
        for width in ((a + b) // 2, (a + b) // 2 + 1):
            if a < width < b and width != layer.in_channels:
                return width
    return None
