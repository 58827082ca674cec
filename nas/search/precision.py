"""Precision chosen by the tool: seeds of the study, and for each finalist the mixes worth deploying.

Both come from one solve (`nas.latency.precision`) over the corrected table and a table of what each part loses in each
precision (`nas.recipe.sensitivity`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nas.core.errors import MissingRowError
from nas.core.records import Candidate, Precision
from nas.core.walk import expand
from nas.export.dialect import dialect_for
from nas.latency.precision import Assignments, assignments
from nas.recipe.finish import FinishJob
from nas.recipe.records import FinishedStudent
from nas.recipe.score import candidate_sensitivity
from nas.recipe.sensitivity import Sensitivity, kept_sensitivity
from nas.search.folder import Chosen, Event, TrialRecord
from nas.search.select import front_indices
from nas.search.settings import FinishSettings
from nas.space.space import SearchSpace

if TYPE_CHECKING:
    from nas.search.rounds import SearchParts

Genotype = tuple[int, ...]
Mixes = Mapping[str, Sequence[tuple[Precision, ...]]]

MIXED_NETWORKS = 4  # measured before mixes are chosen: what a change of precision costs shows in no other network
EVENT = "mixed networks"


def mixable(parts: SearchParts) -> tuple[Precision, ...]:
    """Precisions of the space that the parts of one network can have side by side on the first device."""
    offered = dialect_for(parts.predictor.device.profile).mixable
    return tuple(p for p in parts.space.precisions if p in offered)


def chosen_mixes(parts: SearchParts, candidate: Candidate, count: int) -> list[tuple[Precision, ...]]:
    """The mixes of a finished student that are worth deploying on any device of the search, at most `count` on each.

    None where its sensitivity is not known, or where a row cannot be measured.
    """
    table = kept_sensitivity(parts.folder.student(candidate.arch_id))
    if table is None or count < 1:
        return []
    found: dict[tuple[Precision, ...], None] = {}
    for own in parts.each:
        solved = _solved(own, candidate, table)
        if solved is not None:
            found |= dict.fromkeys(solved.ladder(count, own.budget.all_ms, own.budget.margin_std))
    return list(found)


def measure_mixes(parts: SearchParts, candidates: Sequence[Candidate]) -> None:
    """Measures a few mixed networks where the table has hardly any, so that changes of precision are charged.

    The fastest mix of each of the candidates as far as is known: a prediction that is too good to be true is found
    out. Once in a run on each device.
    """
    for own in parts.each:
        events = own.folder.events()
        if any(e.kind == EVENT for e in events):
            continue
        number = own.search.rounds + 1
        chosen = own.folder.chosen(number)
        if chosen is None:
            spent = sum(len(e.pairs) + len(e.failed) for e in events)
            chosen = Chosen(number, (), _fastest_mixes(own, candidates, spent))
            own.folder.add_chosen(chosen)
        pairs, failed = own.predictor.measure(chosen.candidates, own.search.rounds) if chosen.candidates else ((), ())
        own.folder.add_event(Event(EVENT, time.time(), {"measured": len(pairs)}, pairs, failed))


def _fastest_mixes(own: SearchParts, candidates: Sequence[Candidate], spent: int) -> tuple[Candidate, ...]:
    """The fastest mix of each of the first candidates, as many as the table lacks; `spent`: engines of the search."""
    there = sum(n.candidate.precision_label == "mixed" for n in own.predictor.table.networks.values())
    found = []
    for candidate in candidates[: own.feedback.within(max(0, MIXED_NETWORKS - there), spent)]:
        solved = _solved(own, candidate, None)
        if solved is not None:
            mix = candidate.with_precision(solved.precisions(solved.fastest(0.0)))
            found += [mix] if mix.precision_label == "mixed" else []
    return tuple(found)


def _solved(own: SearchParts, candidate: Candidate, table: Sensitivity | None) -> Assignments | None:
    """Every mix of a network on one device; None where it has nothing to choose from, or a row is missing."""
    choices = mixable(own)
    if table is not None:
        choices = tuple(p for p in choices if p in table.choices)
    if len(choices) < 2:
        return None
    own.predictor.fill([layer for p in choices for layer in expand(candidate.with_precision(p))])
    cost = None
    if table is not None:
        cost = np.array([[row[table.choices.index(p)] for p in choices] for row in table.loss])
    try:
        return assignments(candidate, choices, own.predictor.table, own.predictor.fitted, cost)
    except MissingRowError:  # of a row that could not be measured
        return None


def solved_jobs(
    parts: SearchParts, done: Sequence[tuple[FinishJob, FinishedStudent]], settings: FinishSettings
) -> list[FinishJob]:
    """The jobs that add the mixes which are solved for to finished students: that needs their weights."""
    mixes = all_mixes(parts, [student for _, student in done], settings)
    jobs = []
    for job, student in done:
        names = deployments(parts.space, student.candidate, mixes)
        new = [p for p in names if set(p) != {"fp32"} and p not in job.precisions]
        if new:
            jobs.append(replace(job, precisions=(*job.precisions, *new)))
    return jobs


def scored_mixes(records: Sequence[TrialRecord]) -> Mixes:
    """Precisions, layer by layer, in which each architecture was scored to the end; from all trials, read once."""
    found: dict[str, list[tuple[Precision, ...]]] = {}
    for record in records:
        if record.state == "complete":
            found.setdefault(record.candidate.arch_id, []).append(record.candidate.precisions)
    return found


def all_mixes(parts: SearchParts, students: Sequence[FinishedStudent], settings: FinishSettings) -> Mixes:
    """The same, and the mixes that are solved for."""
    found = {arch_id: list(names) for arch_id, names in scored_mixes(parts.folder.trials()).items()}
    for student in students:
        solved = chosen_mixes(parts, student.candidate, settings.precision_ladder)
        found.setdefault(student.candidate.arch_id, []).extend(solved)
    return found


def deployments(space: SearchSpace, architecture: Candidate, mixes: Mixes) -> list[tuple[Precision, ...]]:
    """Precisions in which a finished student is tried: each one throughout, and its mixes."""
    layers = len(architecture.stages) + 2
    uniform: list[tuple[Precision, ...]] = [(p,) * layers for p in space.precisions]
    return list(dict.fromkeys([*uniform, *mixes.get(architecture.arch_id, ())]))


def precision_seeds(
    parts: SearchParts, complete: Sequence[TrialRecord], latency_ms: Sequence[float], count: int
) -> list[Genotype]:
    """Genotypes of scored architectures in other mixes of precisions, solved for the deadline; the best first.

    The architectures are the most accurate `count` of the front of scores; each gives the mix that loses least within
    the deadline, then the fastest one, on the first device.

    Args:
        parts: of the search.
        complete: scored candidates.
        latency_ms: of each of them, in the sense of the budget.
        count: architectures.
    """
    choices = mixable(parts)
    if parts.space.precision.per != "stage" or len(choices) < 2 or not complete:
        return []
    front = front_indices([r.score for r in complete], latency_ms)
    best = {complete[i].candidate.arch_id: complete[i] for i in sorted(front, key=lambda i: complete[i].score)}
    first: list[Genotype] = []
    second: list[Genotype] = []
    for record in list(best.values())[::-1][:count]:
        parts.stop.check()
        checkpoint = parts.folder.student(record.candidate.arch_id) / f"score-{record.epochs}.ckpt"
        if parts.plan.source == "standalone" and not checkpoint.exists():
            continue  # it was trained on another machine
        table = candidate_sensitivity(parts.plan.job(record.candidate, record.epochs), choices)
        solved = _solved(parts, record.candidate, table)
        if solved is None:
            continue
        kept = solved.cheapest_within(parts.budget.ms, parts.budget.margin_std)
        for i, names in ((kept, first), (solved.fastest(), second)):
            if i is not None:
                names.append(parts.space.encode(record.candidate.with_precision(solved.precisions(i))))
    return list(dict.fromkeys([*first, *second]))
