"""Rounds: propose inside the budget, score, measure whole networks, correct the table, re-estimate, go on.

A scored candidate is never scored again; what changes between rounds is the latency that the sampler sees for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.errors import BudgetError, TrainingError
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures
from nas.core.run import LatencyKind, PredictedMeasured, latency_of
from nas.core.walk import total_macs
from nas.latency.estimate import figures
from nas.latency.exits import NEVER, evaluate_thresholds
from nas.latency.lines import network_key
from nas.recipe.pool import JobFailure, WorkerPool
from nas.search.folder import Event, RunFolder, TrialRecord
from nas.search.predictor import Predictor, deployed_form, in_budget_filter
from nas.search.progress import Reporter, StopFlag
from nas.search.scoring import ScoredCandidate, ScoringPlan, score_batch
from nas.search.select import hypervolume, stratified, worth_measuring
from nas.search.settings import BudgetSettings, FeedbackSettings, SearchSettings
from nas.search.study import Proposer, Scored, choose_sampler
from nas.space.space import SearchSpace

Genotype = tuple[int, ...]
POOL_SAMPLES = 2048  # random genotypes from which starts and networks to measure are chosen
FIRST_ROWS_SAMPLES = 48  # where the table is filled lazily: random candidates whose rows come first
FAILURES_IN_A_ROW = 6


@dataclass(frozen=True, slots=True, eq=False)
class SearchParts:
    """What the rounds work with."""

    folder: RunFolder
    space: SearchSpace
    predictor: Predictor
    plan: ScoringPlan
    pool: WorkerPool
    labels: np.ndarray
    budget: BudgetSettings
    search: SearchSettings
    feedback: FeedbackSettings
    reporter: Reporter
    stop: StopFlag

    @property
    def chance(self) -> float:
        """Accuracy of guessing: the reference of the hypervolume."""
        return 1 / self.space.num_classes


def run_rounds(parts: SearchParts) -> None:
    """All rounds that are not over yet.

    Raises:
        InterruptedRunError: the run was asked to stop.
        BudgetError: not one candidate of the space keeps the budget.
        TrainingError: several candidates in a row failed for the same reason.
    """
    events = parts.folder.events()
    if not any(e.kind == "first networks" for e in events):
        _first_networks(parts)
    finished = {e.values["round"] for e in events if e.kind == "round"}
    sampler, reason = choose_sampler(parts.search.sampler, parts.search.trials)
    parts.reporter.say(f"sampler: {sampler} ({reason}); scorer: {parts.search.scorer}")
    for number in range(1, parts.search.rounds + 1):
        if number not in finished:
            _one_round(parts, number, sampler)


def quota(search: SearchSettings, number: int) -> int:
    """Candidates scored by the end of round `number`: the trials spread evenly over the rounds."""
    return round(search.trials * number / search.rounds)


def _first_networks(parts: SearchParts) -> None:
    """Whole networks measured before any training, spread over the predicted latencies inside the budget."""
    started = time.monotonic()
    count = parts.feedback.first_networks
    pairs: tuple[PredictedMeasured, ...] = ()
    if count:
        genotypes, latency = _pool_in_reach(parts, parts.search.seed)
        chosen = [genotypes[i] for i in stratified(latency, count)]
        pairs = parts.predictor.measure([parts.space.decode(g) for g in chosen], 0)
        _say_error(parts, pairs)
    parts.folder.add_event(_round_event("first networks", 0, 0, 0, pairs, None, time.monotonic() - started))


def _pool_in_reach(parts: SearchParts, seed: int) -> tuple[list[Genotype], list[float]]:
    """Distinct random genotypes with known latency up to 1.2 budgets (all of them when hardly any is)."""
    rng = np.random.default_rng((seed, 77))
    space, predictor = parts.space, parts.predictor
    if not predictor.is_whole:
        rows = [space.smallest(), space.largest()]
        rows += [tuple(int(v) for v in row) for row in space.sample_many(rng, FIRST_ROWS_SAMPLES)]
        predictor.worst(rows)
    samples = np.unique(space.sample_many(rng, POOL_SAMPLES), axis=0)
    worst, _ = predictor.known_worst(samples)
    known = ~np.isnan(worst)
    near = known & (worst <= 1.2 * parts.budget.ms)
    kept = near if near.sum() >= 8 else known
    return [tuple(int(v) for v in row) for row in samples[kept]], [float(v) for v in worst[kept]]


def _one_round(parts: SearchParts, number: int, sampler: str) -> None:
    started = time.monotonic()
    records = list(parts.folder.trials())
    known = [to_scored(parts, r) for r in records if r.state == "complete"]
    in_budget = in_budget_filter(parts.predictor, parts.budget.ms, parts.budget.of, parts.budget.margin_std)
    proposer = Proposer(parts.space, sampler, parts.search.seed + number, parts.search.trials, in_budget, known)
    failures: list[str] = []
    goal = quota(parts.search, number)
    while sum(r.state != "failed" for r in records) < goal:
        parts.stop.check()
        wanted = min(parts.search.batch, goal - sum(r.state != "failed" for r in records))
        proposals = _propose(parts, proposer, records, wanted)
        if not proposals:
            parts.reporter.say("no new candidate inside the budget can be found: the space is exhausted there")
            break
        for record, scored in _score(parts, number, proposals, len(records)):
            records.append(record)
            trial = proposals[record.genotype]
            if trial is not None:
                proposer.tell(trial, scored)
            elif scored is not None:
                proposer.learn(scored)
            failures = [*failures, record.reason] if record.state == "failed" else []
            _break_circuit(failures)
    pairs = _measure_chosen(parts, records, number)
    value = search_hypervolume(parts, records)
    parts.folder.add_event(
        _round_event(
            "round",
            number,
            len(records),
            sum(r.state == "failed" for r in records),
            pairs,
            value,
            time.monotonic() - started,
        )
    )
    parts.reporter.say(
        f"round {number} of {parts.search.rounds}: {len(records)} candidates, hypervolume {value:.3f} (scores of "
        "validation images, not final accuracy)"
    )
    _say_error(parts, pairs)


def _break_circuit(failures: Sequence[str]) -> None:
    """Ends the run when candidates keep failing in the same way: the cause is not the candidate."""
    if len(failures) >= FAILURES_IN_A_ROW and len({f.split(":")[0] for f in failures[-FAILURES_IN_A_ROW:]}) <= 2:
        raise TrainingError(f"{len(failures)} candidates in a row failed; the last one: {failures[-1]}")


def _propose(
    parts: SearchParts, proposer: Proposer, records: Sequence[TrialRecord], wanted: int
) -> dict[Genotype, int | None]:
    """New genotypes with their number in the sampler's study; the ends of the space come first, without one."""
    proposals: dict[Genotype, int | None] = {}
    if not records:
        for genotype in _ends(parts):
            if not proposer.seen(genotype) and len(proposals) < wanted:
                proposals[genotype] = None
    while len(proposals) < wanted:
        asked = proposer.ask()
        if asked is None:
            break
        number, genotype = asked
        if genotype not in proposals:
            proposals[genotype] = number
        parts.reporter.progress("proposing", len(proposals), wanted)
    return proposals


def _ends(parts: SearchParts) -> list[Genotype]:
    """The smallest network and the largest one inside the budget.

    Raises:
        BudgetError: the fastest one that is known misses the budget.
    """
    space, predictor, budget = parts.space, parts.predictor, parts.budget
    keeps = in_budget_filter(predictor, budget.ms, budget.of, budget.margin_std)
    smallest, largest = space.smallest(), space.largest()
    genotypes, latency = _pool_in_reach(parts, parts.search.seed + 1)
    inside = [(g, t) for g, t in zip(genotypes, latency, strict=True) if keeps(g)]
    if not inside and not keeps(smallest):
        fastest = float(predictor.worst([smallest])[0][0])
        if latency:
            fastest = min(fastest, min(latency))
        raise BudgetError(
            f"no candidate of space {space.name} keeps {budget.ms:g} ms ({budget.of}) on "
            f"{predictor.device.profile.name}: the fastest known one needs about {fastest:.4g} ms. "
            f"Raise the budget (--set budget.ms={_rounded_up(fastest * 1.1)}) or take a smaller space"
        )
    ends = [smallest] if keeps(smallest) else []
    if keeps(largest):
        ends.append(largest)
    elif inside:
        ends.append(max(inside, key=lambda pair: total_macs(space.decode(pair[0])))[0])
    return list(dict.fromkeys(ends))


def _rounded_up(value: float) -> str:
    return f"{value:.2g}" if float(f"{value:.2g}") >= value else f"{value * 1.06:.2g}"


def _score(
    parts: SearchParts, number: int, proposals: dict[Genotype, int | None], first: int
) -> list[tuple[TrialRecord, Scored | None]]:
    genotypes = list(proposals)
    candidates = [parts.space.decode(g) for g in genotypes]
    estimates = [parts.predictor.estimate(c) for c in candidates]
    decided = []
    note = f"{first} of {parts.search.trials} candidates before"
    results = score_batch(
        parts.plan,
        parts.pool,
        candidates,
        [e.worst_ms for e in estimates],
        parts.reporter,
        lambda: parts.stop.is_set,
        note,
    )
    for i, result in results:
        record = _record(
            parts,
            first + len(decided),
            number,
            genotypes[i],
            candidates[i],
            proposals[genotypes[i]],
            estimates[i],
            result,
        )
        parts.folder.add_trial(record)
        decided.append((record, to_scored(parts, record) if record.state == "complete" else None))
    return decided


def _record(
    parts: SearchParts,
    trial: int,
    round_number: int,
    genotype: Genotype,
    candidate: Candidate,
    asked: int | None,
    estimate: LatencyEstimate,
    result: ScoredCandidate | JobFailure,
) -> TrialRecord:
    proposer = "first" if asked is None else choose_sampler(parts.search.sampler, parts.search.trials)[0]
    if isinstance(result, JobFailure):
        return TrialRecord(
            trial,
            round_number,
            genotype,
            candidate,
            "failed",
            proposer,
            estimate.worst_ms,
            reason=result.reason,
        )
    thresholds = tuple(NEVER if e.threshold is None else e.threshold for e in candidate.exits)
    top1, shares, _ = evaluate_thresholds(result.logits, parts.labels, thresholds, estimate.exit_ms)
    return TrialRecord(
        trial,
        round_number,
        genotype,
        candidate,
        "complete" if result.is_complete else "stopped",
        proposer,
        estimate.worst_ms,
        top1=top1,
        exit_top1=tuple(float((row.argmax(1) == parts.labels).mean()) for row in result.logits),
        exit_shares=tuple(float(s) for s in shares),
        epochs=result.epochs,
        cost_s=result.cost_s,
    )


def current_figures(predictor: Predictor, record: TrialRecord) -> LatencyFigures:
    """Latency of a scored candidate as it is estimated now."""
    return figures(predictor.estimate(record.candidate), record.exit_shares)


def to_scored(parts: SearchParts, record: TrialRecord) -> Scored:
    """What the sampler learns of a scored candidate: accuracy and expected latency as estimated now."""
    now = current_figures(parts.predictor, record)
    limit: LatencyKind = parts.budget.of
    return Scored(
        record.genotype,
        record.top1 or 0.0,
        now.expected_ms,
        latency_of(now, limit) - parts.budget.ms,
        record.candidate.id,
    )


def search_hypervolume(parts: SearchParts, records: Sequence[TrialRecord]) -> float:
    """Hypervolume of all scores under today's estimates; reference: accuracy of guessing, and the budget."""
    complete = [r for r in records if r.state == "complete"]
    latency = [current_figures(parts.predictor, r).expected_ms for r in complete]
    return hypervolume([r.top1 or 0.0 for r in complete], latency, parts.chance, parts.budget.ms)


def _measure_chosen(parts: SearchParts, records: Sequence[TrialRecord], number: int) -> tuple[PredictedMeasured, ...]:
    complete = {
        r.candidate.with_thresholds((None,) * len(r.candidate.exits)): r for r in records if r.state == "complete"
    }
    if not complete or not parts.feedback.networks_per_round:
        return ()
    fresh = {c: r for c, r in complete.items() if not _is_measured(parts.predictor, c)}
    candidates = list(fresh)
    if not candidates:
        return ()
    now = [current_figures(parts.predictor, fresh[c]) for c in candidates]
    chosen = worth_measuring(
        [fresh[c].top1 or 0.0 for c in candidates],
        [f.expected_ms for f in now],
        [f.std_ms for f in now],
        parts.budget.ms,
        parts.feedback.networks_per_round,
    )
    return parts.predictor.measure([candidates[i] for i in chosen], number)


def _is_measured(predictor: Predictor, candidate: Candidate) -> bool:
    return network_key(candidate, deployed_form(candidate)) in predictor.table.networks


def _round_event(
    kind: str,
    number: int,
    trials: int,
    failed: int,
    pairs: Sequence[PredictedMeasured],
    value: float | None,
    wall_s: float,
) -> Event:
    mape = float(np.mean([abs(p.error) for p in pairs])) if pairs else None
    return Event(
        kind,
        time.time(),
        {
            "round": number,
            "trials": trials,
            "failed": failed,
            "measured": len(pairs),
            "hypervolume": value,
            "mape": mape,
            "wall_s": wall_s,
        },
        pairs=tuple(pairs),
    )


def _say_error(parts: SearchParts, pairs: Sequence[PredictedMeasured]) -> None:
    if pairs:
        mape = 100 * float(np.mean([abs(p.error) for p in pairs]))
        parts.reporter.say(f"{len(pairs)} networks measured; they had been predicted with {mape:.1f} % mean error")
