"""Rounds: propose inside the budget, score, measure whole networks, correct the table, re-estimate, go on.

A scored candidate is never scored again; what changes between rounds is the latency that the sampler sees for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nas.core.errors import BudgetError, DeviceError, TrainingError
from nas.core.jsonio import to_plain, write_record
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures
from nas.core.run import AccuracyFit, FailedCandidate, PredictedMeasured, latency_of
from nas.core.units import rounded_up
from nas.core.walk import total_macs
from nas.latency.energy import EnergyEstimator, has_energy
from nas.latency.energy import figures as energy_figures
from nas.latency.estimate import figures
from nas.latency.exits import NEVER, answers, evaluate_thresholds
from nas.latency.lines import network_key
from nas.recipe.pool import JobPool
from nas.recipe.records import soft_top1, top1_per_exit
from nas.recipe.standalone import foreseen
from nas.search.calibration import accuracy_fit
from nas.search.choice import choose_sampler
from nas.search.folder import Batch, Chosen, ChosenSampler, Event, RunFolder, TrialRecord, latest
from nas.search.greybox_sampler import is_ordered
from nas.search.ladder import best_for_each_cost, choice_scores, network_parts, rungs
from nas.search.precision import mixable, precision_seeds
from nas.search.predictor import AnyBudget, BudgetFilter, Predictor
from nas.search.progress import StopFlag, StoppableReporter
from nas.search.scoring import Earlier, Result, ScoreFailure, ScoringPlan, score_batch
from nas.search.seeds import Seed
from nas.search.select import hypervolume, stratified, worth_measuring
from nas.search.settings import BudgetSettings, FeedbackSettings, SearchSettings
from nas.search.study import (
    KnownLatency,
    Proposer,
    Scored,
    greybox_problem,
    greybox_scored,
    importances,
    mirror,
)
from nas.space.space import SearchSpace

Genotype = tuple[int, ...]
POOL_SAMPLES = 2048  # random genotypes from which starts and networks to measure are chosen
FIRST_ROWS_SAMPLES = 48  # where the table is filled lazily: candidates whose rows come first,
FIRST_ROWS_DRAWN = 512  # spread over the multiply-adds of so many random ones
FAILURES_IN_A_ROW = 6
STAYING = 0.5  # share of images taken to reach the head of a network with exits before any was scored
MEASURED_STD = 0.25  # of the deviation of an estimate: what is left of it for a network that corrected the table itself
LADDER_FEWEST = 6  # scored candidates that teach what each choice is worth
LADDER_REACH = 1.25  # times the budget: the plain sums that the ladder looks at, which a correction may bring inside
CLEAR_MISS = 1.25  # times the budget: further than any correction of the plain sum moves an estimate


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A further device of a search: its records in the run folder, its predictor, its deadline."""

    folder: RunFolder
    predictor: Predictor
    budget: BudgetSettings


@dataclass(frozen=True, slots=True, eq=False)
class SearchParts:
    """What the rounds work with; `folder`, `predictor` and `budget` are those of the first device.

    `score_s` is the expected wall time of scoring one candidate, None where it is not known.
    `seeds` are the user's own candidates.
    """

    folder: RunFolder
    space: SearchSpace
    predictor: Predictor
    plan: ScoringPlan
    pool: JobPool
    labels: np.ndarray
    budget: BudgetSettings
    search: SearchSettings
    feedback: FeedbackSettings
    reporter: StoppableReporter
    stop: StopFlag
    others: tuple[Target, ...] = ()
    score_s: float | None = None
    seeds: tuple[Seed, ...] = ()

    @property
    def each(self) -> tuple[SearchParts, ...]:
        """The same as each device sees it, the first device first."""
        seen = (
            replace(
                self,
                folder=t.folder,
                predictor=t.predictor,
                budget=t.budget,
                reporter=self.reporter.on(t.folder.device),
                others=(),
            )
            for t in self.others
        )
        return (replace(self, others=()), *seen)

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
        DeviceError: not one network could be measured.
    """
    if parts.search.energy and not has_energy(parts.predictor.table):
        raise DeviceError(
            f"search.energy: {parts.predictor.device.profile.name} tells no energy of an inference: it has no power "
            "sensor, its runtime is trtexec (take ssh:...?runner=tensorrt), or its table is of an older version "
            "(--set run.tables=DIR). Look at its rails: nas doctor --device NAME; or search without energy: "
            "--set search.energy=false"
        )
    for own in parts.each:
        if not any(e.kind == "first networks" for e in own.folder.events()):
            _first_networks(own)
    finished = {e.values["round"] for e in parts.folder.events() if e.kind == "round"}
    is_known = all(own.predictor.is_whole for own in parts.each)
    sampler, reason = _sampler(parts, is_known)
    parts.reporter.say(f"sampler: {sampler} ({reason}); scorer: {parts.search.scorer}")
    _tell_unused(parts, sampler, is_known)
    for number in range(1, parts.search.rounds + 1):
        if number not in finished:
            _one_round(parts, number, sampler)


def _sampler(parts: SearchParts, is_latency_known: bool) -> tuple[str, str]:
    """The sampler of the run and why; what was chosen at its first call is kept with it."""
    search, kept = parts.search, parts.folder.sampler()
    sampler, reason = choose_sampler(
        search.sampler,
        search.trials,
        is_latency_known=is_latency_known,
        with_energy=search.energy,
        score_s=parts.score_s,
        batch=search.batch,
        kept=kept,
    )
    if search.sampler == "auto" and (kept is None or kept.sampler != sampler):
        parts.folder.keep_sampler(ChosenSampler(sampler, reason))
    return sampler, reason


def _tell_unused(parts: SearchParts, sampler: str, is_latency_known: bool) -> None:
    """Warns of settings that do nothing in this search."""
    if parts.search.ladder and not is_latency_known:
        parts.reporter.warn(
            "search.ladder: not used, because rows of this space are measured only as candidates need them. Measure "
            "some and interpolate the others: --set feedback.max_rows=600"
        )
    if parts.search.precision_seeds and (parts.space.precision.per != "stage" or len(mixable(parts)) < 2):
        parts.reporter.warn(
            "search.precision_seeds: not used, because the space has no precision to choose for each stage. Write in "
            "its file: precision: {choices: [fp32, int8], per: stage}"
        )
    if parts.search.predictor_candidates and sampler != "greybox":
        parts.reporter.warn(
            f"search.predictor_candidates: not used by the sampler {sampler}. Take: --set search.sampler=greybox"
        )


def quota(search: SearchSettings, number: int) -> int:
    """Candidates scored by the end of round `number`: the trials spread evenly over the rounds."""
    return round(search.trials * number / search.rounds)


def _first_networks(parts: SearchParts) -> None:
    """Whole networks measured before any training, spread over the predicted latencies inside the budget."""
    started = time.monotonic()
    chosen = parts.folder.chosen(0)
    if chosen is None:
        count = parts.feedback.within(parts.feedback.first_networks, 0)
        genotypes, latency = _pool_in_reach(parts, parts.search.seed) if count else ([], [])
        chosen = _kept(parts, 0, tuple(genotypes[i] for i in stratified(latency, count)) if count else ())
    pairs, failed = _measured(parts, chosen)
    if chosen.genotypes and not pairs:
        raise DeviceError(
            f"not one of {len(chosen.genotypes)} networks could be measured on {parts.predictor.device.profile.name}, "
            f"the first: {failed[0].reason}. Run: nas doctor"
        )
    _tell_measured(parts, pairs, failed)
    parts.folder.add_event(_round_event("first networks", 0, 0, 0, pairs, None, time.monotonic() - started, failed))


def _pool_in_reach(parts: SearchParts, seed: int) -> tuple[list[Genotype], list[float]]:
    """Distinct genotypes with known latency up to 1.2 budgets (all of them when hardly any is)."""
    samples = known_pool(parts.predictor, parts.search.seed, seed)
    worst, _ = parts.predictor.known_worst(samples)
    known = ~np.isnan(worst)
    near = known & (worst <= 1.2 * parts.budget.ms)
    kept = near if near.sum() >= 8 else known
    return [tuple(int(v) for v in row) for row in samples[kept]], [float(v) for v in worst[kept]]


def known_pool(predictor: Predictor, run_seed: int, seed: int) -> np.ndarray:
    """Different random genotypes [N, G] whose rows are there.

    Where the table is filled row by row these are few and spread over the multiply-adds, their rows are measured now,
    and they are the same in all calls of a run: of any other genotype some row would be missing.
    """
    space = predictor.space
    if predictor.is_whole:
        return np.unique(space.sample_many(np.random.default_rng((seed, 77)), POOL_SAMPLES), axis=0)
    drawn = space.sample_many(np.random.default_rng((run_seed, 77)), FIRST_ROWS_DRAWN)
    macs = [total_macs(space.decode(tuple(row))) for row in drawn.tolist()]
    chosen = [tuple(drawn[i].tolist()) for i in stratified(macs, FIRST_ROWS_SAMPLES)]
    rows = list(dict.fromkeys([space.smallest(), *chosen, space.largest()]))
    predictor.worst(rows)
    return np.array(rows, np.int64)


def _one_round(parts: SearchParts, number: int, sampler: str) -> None:
    started = time.monotonic()
    records = list(parts.folder.trials())
    batches = parts.folder.batches()
    proposer = _proposer(parts, number, sampler, records, batches)
    goal = quota(parts.search, number)
    failures: list[TrialRecord] = []
    _tell_seeds(parts, proposer)
    batch = _undecided(batches, records)
    while True:
        if batch is None:
            # A candidate that failed is replaced, one that was stopped early is not.
            wanted = min(parts.search.batch, goal - sum(r.state != "failed" for r in records))
            if wanted <= 0:
                break
            parts.stop.check()
            batch, asked = _proposed(parts, proposer, sampler, number, records, wanted)
            if batch is None:
                parts.reporter.say("no new candidate inside the budget can be found: the space is exhausted there")
                break
            parts.folder.add_batch(batch)
        else:
            asked = {}
        decided = _scored(parts, batch, records)
        # In the order of proposal, not in that of the workers: the next proposals depend on it.
        for record in sorted(decided, key=lambda r: r.number):
            scored = _outcomes(parts, [record])[0] if record.state == "complete" else None
            if record.number in asked:
                proposer.tell(asked[record.number], scored)
            elif scored is not None:
                proposer.learn(scored)
            failures = [*failures, record] if record.state == "failed" else []
        records = list(latest([*records, *decided]))
        if sampler == "greybox" and parts.plan.is_halving:
            # What stopped candidates would have reached is seen anew with every one that was not stopped.
            proposer = _proposer(parts, number, sampler, records, batches)
        batch = None
        _break_circuit(failures)
    fit = _accuracy_fit(parts, records) if sampler == "greybox" else None
    for own in reversed(parts.each):  # the first device last: its event says that the round is over
        if not any(e.kind == "round" and e.values["round"] == number for e in own.folder.events()):
            _end_round(own, number, records, started, fit)
    if fit is not None:
        parts.reporter.say(
            f"accuracy model, each of {fit.networks} candidates predicted from the others: rank correlation "
            f"{fit.rank:.2f}, mean error {100 * fit.mae:.1f} points, {100 * fit.within_90:.0f} % within the 90 % "
            "interval"
        )


def _accuracy_fit(parts: SearchParts, records: Sequence[TrialRecord]) -> AccuracyFit | None:
    complete = [r for r in records if r.state == "complete"]
    if not complete:
        return None
    problem = greybox_problem(parts.space, _known_latency(parts, complete))
    return accuracy_fit(problem, greybox_scored(_outcomes(parts, complete)))


def _end_round(
    parts: SearchParts, number: int, records: Sequence[TrialRecord], started: float, fit: AccuracyFit | None
) -> None:
    """Measures the networks that are worth it on one device, and records the round."""
    pairs, failed = _measure_chosen(parts, records, number)
    value = search_hypervolume(parts, records)
    count = sum(r.state == "failed" for r in records)
    spent = time.monotonic() - started
    event = _round_event("round", number, len(records), count, pairs, value, spent, failed)
    model = {} if fit is None else {f"model_{name}": v for name, v in to_plain(fit).items()}
    parts.folder.add_event(replace(event, values={**event.values, **model}))
    parts.reporter.say(
        f"round {number} of {parts.search.rounds}: {len(records)} candidates, hypervolume {value:.3f} (scores of "
        "validation images, not final accuracy)"
    )
    _tell_measured(parts, pairs, failed)


def _proposer(
    parts: SearchParts, number: int, sampler: str, records: Sequence[TrialRecord], batches: Sequence[Batch]
) -> Proposer:
    complete = [r for r in records if r.state == "complete"]
    budget = _any_budget(parts)
    taught = _with_foreseen(records, complete) if sampler == "greybox" else complete
    return Proposer(
        parts.space,
        sampler,
        (parts.search.seed, number, len(records)),
        parts.search.trials,
        budget.keeps,
        budget.known,
        _outcomes(parts, taught),
        [*(r.genotype for r in records), *(g for batch in batches for g in batch.genotypes)],
        1 + len(parts.others),
        _known_latency(parts, complete) if sampler == "greybox" else None,
        parts.search.predictor_candidates,
        parts.search.energy,
    )


def _with_foreseen(records: Sequence[TrialRecord], complete: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete candidates, and those that were stopped with the accuracy that they would have reached."""
    curves = [r.rung_scores for r in complete if r.rung_scores]
    found = []
    for r in records:
        if r.state == "complete":
            found.append(r)
        elif r.state == "stopped" and r.rung_scores and curves:
            found.append(replace(r, soft_top1=foreseen(curves, len(r.rung_scores) - 1, r.score)))
    return found


def _known_latency(parts: SearchParts, complete: Sequence[TrialRecord]) -> KnownLatency:
    """Latency of any candidate before it is scored, as the objective will be: the mean over the images.

    How many images leave at exits is known after scoring; before, the share is that of the networks with exits that
    were scored. A deadline on the mean or the tail excludes only what misses it when every image leaves as early as it
    can, since thresholds are solved for it afterwards.
    """
    staying = [r.exit_shares[-1] for r in complete if len(r.exit_shares) > 1]
    share = float(np.mean(staying)) if staying else STAYING
    everywhere = parts.each

    def of(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [_before_scoring(own, genotypes, share) for own in everywhere]
        ms, std = (np.column_stack(columns) for columns in zip(*found, strict=True))
        ms[np.isnan(ms).any(axis=1)] = np.nan  # it has to run on every device
        return ms, std

    return KnownLatency(of, tuple(own.budget.ms for own in everywhere), parts.budget.margin_std, parts.search.batch)


def _before_scoring(parts: SearchParts, genotypes: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Latency on one device and its deviation, ms [N]; NaN where it is not known."""
    worst, std = parts.predictor.known_worst(genotypes)
    if parts.budget.of == "worst":
        return worst, std
    first = parts.predictor.known_first_exit(genotypes)
    mean = share * worst + (1 - share) * first
    margin = parts.budget.margin_std * std
    inside = np.minimum(mean, 0.999 * parts.budget.ms - margin)
    return np.where(first <= parts.budget.ms, inside, np.maximum(worst, 2 * parts.budget.ms)), std


def _undecided(batches: Sequence[Batch], records: Sequence[TrialRecord]) -> Batch | None:
    """The batch that an earlier call did not bring to its end."""
    known = {r.number for r in records}
    return next((batch for batch in batches if not known.issuperset(batch.numbers)), None)


def _break_circuit(failures: Sequence[TrialRecord]) -> None:
    """Ends the run when candidates keep failing in the same way: the cause is not the candidate.

    What a reason begins with says the way; the candidate's own name in it does not make it another.
    """
    ways = {f.reason.replace(f.candidate.arch_id, "").split(":")[0] for f in failures[-FAILURES_IN_A_ROW:]}
    if len(failures) >= FAILURES_IN_A_ROW and len(ways) <= 2:
        raise TrainingError(f"{len(failures)} candidates in a row failed; the last one: {failures[-1].reason}")


def _proposed(
    parts: SearchParts,
    proposer: Proposer,
    sampler: str,
    round_number: int,
    records: Sequence[TrialRecord],
    wanted: int,
) -> tuple[Batch | None, dict[int, int]]:
    """A batch of new candidates, and the sampler's number of each trial that it proposed.

    The user's own candidates come first, then the ends of the space, and in the second batch those of the ladder and
    mixes of precisions. None when there is no new candidate inside the budget.
    """
    first = len(records)
    asked: dict[int, int] = {}
    genotypes = [s.genotype for s in parts.seeds if _enters(parts, proposer, s.genotype)][:wanted]
    proposers = ["enqueued"] * len(genotypes)
    proposer.mark(genotypes)
    # Batches full of the user's candidates do not count: what belongs into the first batch waits for one with room.
    begun = sum(not {"enqueued"}.issuperset(batch.proposers) for batch in parts.folder.batches())
    if begun == 0 and len(genotypes) < wanted:
        ends = list(dict.fromkeys(g for own in parts.each for g in _ends(own)))
        runs = np.all([~np.isnan(own.predictor.worst(ends)[0]) for own in parts.each], axis=0)  # on every device
        new = [g for g, can_run in zip(ends, runs, strict=True) if can_run and not proposer.seen(g)]
        new = new[: wanted - len(genotypes)]
        proposers += ["first"] * len(new)
        genotypes += new
        proposer.mark(new)
    elif begun == 1:
        new = _ladder(parts, proposer, records, min(parts.search.ladder, wanted - len(genotypes)))
        proposers += ["additive"] * len(new)
        genotypes += new
        proposer.mark(new)
        new = _precision_seeds(parts, proposer, records, min(parts.search.precision_seeds, wanted - len(genotypes)))
        proposers += ["precision"] * len(new)
        genotypes += new
        proposer.mark(new)
    while len(genotypes) < wanted:
        found = proposer.ask()
        if found is None:
            break
        asked[first + len(genotypes)] = found[0]
        genotypes.append(found[1])
        proposers.append(sampler)
    if not genotypes:
        return None, {}
    worst, *others = (own.predictor.worst(genotypes)[0].tolist() for own in parts.each)
    elsewhere = tuple(zip(*others, strict=True))
    return Batch(first, round_number, tuple(genotypes), tuple(worst), tuple(proposers), elsewhere), asked


def _enters(parts: SearchParts, proposer: Proposer, genotype: Genotype) -> bool:
    """Whether a candidate of the user is still to be trained: not yet proposed, runs, and keeps the budget."""
    return not proposer.seen(genotype) and _any_budget(parts).keeps(genotype)


def _tell_seeds(parts: SearchParts, proposer: Proposer) -> None:
    """Says which of the user's candidates enter, and of each other one why it does not."""
    waiting = [s for s in parts.seeds if not proposer.seen(s.genotype)]
    entering = [s for s in waiting if _enters(parts, proposer, s.genotype)]
    if entering:
        parts.reporter.say(f"enqueued, scored before all others: {', '.join(s.name for s in entering)}")
    for seed in waiting:
        if seed not in entering:
            why = "; ".join(_why_not(own, seed.genotype) for own in parts.each)
            parts.reporter.warn(f"search.enqueue: {seed.name} is not trained: {why}")


def _why_not(parts: SearchParts, genotype: Genotype) -> str:
    """A candidate's latency on one device beside the budget."""
    device, budget = parts.predictor.device.profile.name, parts.budget
    worst, std = (float(v[0]) for v in parts.predictor.worst([genotype]))
    if np.isnan(worst):
        return f"a layer of it cannot be measured on {device}"
    if budget.of == "worst":
        return (
            f"it takes {worst:.4g} +- {std:.2g} ms on {device}, and {budget.ms:g} ms with a margin of "
            f"{budget.margin_std:g} deviations are allowed"
        )
    least = float(parts.predictor.first_exit([genotype])[0])
    return (
        f"it takes {least:.4g} ms on {device} when every image leaves as early as it can, and {budget.ms:g} ms are "
        "allowed"
    )


def _ladder(parts: SearchParts, proposer: Proposer, records: Sequence[TrialRecord], count: int) -> list[Genotype]:
    """New candidates with the best sum of scores under each of `count` budgets, on the first device.

    None of them where rows are missing, or where too few candidates were scored to learn what a choice is worth.
    """
    complete = [r for r in records if r.state == "complete"]
    if count < 1 or len(complete) < LADDER_FEWEST or not parts.predictor.is_whole:
        return []
    space, limit = parts.space, _any_budget(parts)
    scores = choice_scores(
        np.array([r.genotype for r in complete], np.int64),
        np.array([r.score for r in complete]),
        space.gene_sizes,
        [is_ordered(gene.choices) for gene in space.genes],
    )
    terms = network_parts(space, parts.predictor.row_ms, scores)
    best = space.canonical_many(best_for_each_cost(terms, space.gene_sizes, LADDER_REACH * parts.budget.ms))
    best = best[limit.known(best)]  # by the corrected latency and its margin, not by the sum
    new = [row for row in dict.fromkeys(map(tuple, best.tolist())) if not proposer.seen(row)]
    if not new:
        return []
    return [new[i] for i in rungs(parts.predictor.known_worst(np.array(new))[0], parts.budget.ms, count)]


def _precision_seeds(
    parts: SearchParts, proposer: Proposer, records: Sequence[TrialRecord], count: int
) -> list[Genotype]:
    """New mixes of precisions for scored architectures that keep the budget; see `nas.search.precision`."""
    if count < 1:
        return []
    complete = [r for r in records if r.state == "complete"]
    ms = [latency_of(now, parts.budget.of) for now in current_figures(parts, complete)]
    found = precision_seeds(parts, complete, ms, parts.search.precision_seeds)
    return [g for g in found if _enters(parts, proposer, g)][:count]


def check_budget(predictor: Predictor, budget: BudgetSettings, seed: int, device: str = "") -> None:
    """Ends a run that cannot succeed before anything is trained for it.

    The plain sum may be wrong by some percent, so only a clear miss counts here; where the fastest network is not known
    exactly but only the fastest of a sample, the miss must be twice as clear.

    Args:
        predictor: with the rows of the space, or those of a sample that is measured now.
        budget: the deadline.
        seed: of the run.
        device: name of a further device, for the message.

    Raises:
        BudgetError: the fastest candidate of the space misses the budget; the message names it.
    """
    if predictor.table.foreign is not None:
        return  # times of another device are no ground to refuse; whole networks are measured first
    exact = predictor.fastest() if budget.of == "worst" else None
    if exact is not None:
        if is_clear_miss(exact[1], budget.ms):
            raise _budget_error(predictor, budget, *exact, device)
        return
    pool = known_pool(predictor, seed, seed)
    ms = predictor.known_worst(pool)[0] if budget.of == "worst" else predictor.known_first_exit(pool)
    if np.isnan(ms).all():
        return
    best = int(np.nanargmin(ms))
    if is_clear_miss(float(ms[best]), 2 * budget.ms):
        raise _budget_error(predictor, budget, tuple(pool[best].tolist()), float(ms[best]), device)


def is_clear_miss(fastest_ms: float, budget_ms: float) -> bool:
    """Whether a predicted latency is so far over the budget that no correction of the table will bring it below."""
    return fastest_ms > CLEAR_MISS * budget_ms


def _budget_error(
    predictor: Predictor, budget: BudgetSettings, genotype: Genotype, fastest_ms: float, device: str = ""
) -> BudgetError:
    space = predictor.space
    needed = rounded_up(fastest_ms * 1.1)
    change = f'in also_on {{device: "{device}", ms: {needed}}}' if device else f"--set budget.ms={needed}"
    return BudgetError(
        f"no candidate of space {space.name} keeps {budget.ms:g} ms ({budget.of}) on {predictor.device.profile.name}; "
        f"the closest, {space.decode(genotype).id}, needs about {fastest_ms:.4g} ms. Raise the budget "
        f"({change}) or take a space with smaller networks (--set space=NAME)"
    )


def _any_budget(parts: SearchParts) -> AnyBudget:
    return AnyBudget(tuple(_budget_filter(own) for own in parts.each))


def _budget_filter(parts: SearchParts) -> BudgetFilter:
    return BudgetFilter(parts.predictor, parts.budget.ms, parts.budget.of, parts.budget.margin_std)


def _ends(parts: SearchParts) -> list[Genotype]:
    """The smallest network and the largest one inside the budget, the smallest with as many exits as the budget allows.

    Cut behind the first of them it is about the fastest student there can be, with which the front begins. Where the
    budget is not that of the worst case, exits may be slower than it: the smallest network without them comes, too.

    Raises:
        BudgetError: the fastest one that is known misses the budget.
    """
    space, predictor, budget = parts.space, parts.predictor, parts.budget
    limit = _budget_filter(parts)
    smallest, largest = space.smallest(), space.largest()
    with_exits = (space.with_earliest_exits(smallest, n) for n in range(space.exits.max_count, 0, -1))
    shortened = next((g for g in with_exits if limit.keeps(g)), smallest)
    genotypes, latency = _pool_in_reach(parts, parts.search.seed + 1)
    exact = predictor.fastest()
    known = [*zip(genotypes, latency, strict=True), (smallest, float(predictor.worst([smallest])[0][0]))]
    known += [] if exact is None else [exact]
    kept = limit.known(np.array([g for g, _ in known], np.int64))
    inside = [pair for pair, keeps in zip(known, kept, strict=True) if keeps]
    if not inside:
        least = min(known, key=lambda pair: float(np.nan_to_num(pair[1], nan=np.inf)))
        raise _budget_error(predictor, budget, *least, parts.folder.device)
    small = [shortened] if budget.of == "worst" else [shortened, smallest]
    ends = [g for g in small if limit.keeps(g)] or [min(inside, key=lambda pair: pair[1])[0]]
    if limit.keeps(largest):
        ends.append(largest)
    else:
        ends.append(max(inside, key=lambda pair: total_macs(space.decode(pair[0])))[0])
    return list(dict.fromkeys(ends))


def _scored(parts: SearchParts, batch: Batch, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Decides those candidates of a batch that are not decided yet, and earlier ones that go on meanwhile.

    Each is recorded as soon as it is decided.
    """
    mine = {r.number: r for r in records if r.number in batch.numbers or 0 < r.decided_in == batch.first}
    before = {r.number: r for r in _before(parts, batch, records, mine)}
    candidates = [parts.space.decode(g) for g in batch.genotypes]
    proposed = {n: _undecided_trial(batch, i, candidates[i]) for i, n in enumerate(batch.numbers)}
    estimates = dict(zip(batch.numbers, parts.predictor.estimates(batch.genotypes), strict=True))
    results = score_batch(
        parts.plan,
        parts.pool,
        candidates,
        [(ms, *elsewhere) for ms, elsewhere in zip(batch.latency_ms, _elsewhere(batch), strict=True)],
        parts.reporter.plain,
        lambda: parts.stop.is_set,
        batch.first,
        parts.search.trials,
        {n: r.epochs for n, r in mine.items() if r.state == "failed"},
        [
            Earlier(n, r.candidate, (r.latency_ms, *r.elsewhere_ms), r.rung_scores, r.cost_s, r.state == "failed")
            for n, r in before.items()
        ],
    )
    decided = []
    for number, result in results:
        if number not in mine:
            known = before.get(number) or proposed[number]
            estimate = estimates.get(number) or parts.predictor.estimates([known.genotype])[0]
            record = _record(parts, known, estimate, result, batch.first)
            parts.folder.add_trial(record)
            decided.append(record)
    return decided


def _before(
    parts: SearchParts, batch: Batch, records: Sequence[TrialRecord], mine: Mapping[int, TrialRecord]
) -> list[TrialRecord]:
    """Candidates that were compared at some rung before a batch began, as they were then."""
    if not parts.plan.is_halving:
        return []
    lines = parts.folder.decisions() if mine else records  # an earlier call may have decided some of them anew
    earlier = latest(r for r in lines if r.number < batch.first and r.decided_in < batch.first)
    return [r for r in earlier if r.rung_scores]


def _elsewhere(batch: Batch) -> tuple[tuple[float, ...], ...]:
    return batch.elsewhere_ms or ((),) * len(batch.genotypes)


def _undecided_trial(batch: Batch, i: int, candidate: Candidate) -> TrialRecord:
    """What is known of a candidate before it is scored."""
    return TrialRecord(
        batch.first + i,
        batch.round,
        batch.genotypes[i],
        candidate,
        "failed",
        batch.proposers[i],
        batch.latency_ms[i],
        elsewhere_ms=_elsewhere(batch)[i],
    )


def _record(
    parts: SearchParts, known: TrialRecord, estimate: LatencyEstimate, result: Result, decided_in: int
) -> TrialRecord:
    """A trial with its result, in the place of an earlier one where there was one."""
    decided = replace(known, epochs=result.epochs, rung_scores=result.rung_scores, decided_in=decided_in)
    if isinstance(result, ScoreFailure):
        return replace(
            decided, state="failed", reason=result.reason, top1=None, soft_top1=None, exit_top1=(), exit_shares=()
        )
    thresholds = tuple(NEVER if e.threshold is None else e.threshold for e in known.candidate.exits)
    top1, shares, _ = evaluate_thresholds(result.logits, parts.labels, thresholds, estimate.exit_ms)
    return replace(
        decided,
        state="complete" if result.is_complete else "stopped",
        top1=top1,
        soft_top1=soft_top1(answers(result.logits, thresholds), parts.labels),
        exit_top1=top1_per_exit(result.logits, parts.labels),
        exit_shares=tuple(float(s) for s in shares),
        cost_s=result.cost_s,
    )


def current_figures(parts: SearchParts, records: Sequence[TrialRecord]) -> list[LatencyFigures]:
    """Latencies of scored candidates as they are estimated now."""
    estimates = parts.predictor.estimates([r.genotype for r in records])
    return [figures(e, r.exit_shares) for e, r in zip(estimates, records, strict=True)]


def _outcomes(parts: SearchParts, records: Sequence[TrialRecord]) -> list[Scored]:
    """What the sampler learns of candidates: accuracy and expected latency on each device as estimated now."""
    everywhere = parts.each
    energy = EnergyEstimator(parts.predictor.table) if parts.search.energy else None
    return [
        Scored(
            r.genotype,
            r.score,
            tuple(f.expected_ms for f in now),
            min(latency_of(f, own.budget.of) / own.budget.ms - 1 for f, own in zip(now, everywhere, strict=True)),
            r.candidate.id,
            r.state == "stopped",
            None if energy is None else energy_figures(energy.estimate(r.candidate), r.exit_shares).expected_mj,
        )
        for r, *now in zip(records, *(current_figures(own, records) for own in everywhere), strict=True)
    ]


def write_study(parts: SearchParts) -> None:
    """The scored candidates as an Optuna study for dashboards, and the importance of each gene."""
    complete = [r for r in parts.folder.trials() if r.state == "complete"]
    scored = _outcomes(parts, complete)
    notes = [
        {
            "trial": r.number,
            "round": r.round,
            "epochs": r.epochs,
            "exit_top1": list(r.exit_top1),
            "proposer": r.proposer,
            "std_ms": now.std_ms,
        }
        for r, now in zip(complete, current_figures(parts, complete), strict=True)
    ]
    path = parts.folder.path
    names = [own.folder.device for own in parts.each]
    mirror(path / "study.db", path.name, parts.space, list(zip(scored, notes, strict=True)), names)
    write_record(path / "importances.json", importances(parts.space, scored))


def search_hypervolume(parts: SearchParts, records: Sequence[TrialRecord]) -> float:
    """Hypervolume of all scores under today's estimates; reference: accuracy of guessing, and the budget."""
    complete = [r for r in records if r.state == "complete"]
    latency = [now.expected_ms for now in current_figures(parts, complete)]
    return hypervolume([r.score for r in complete], latency, parts.chance, parts.budget.ms)


def _measure_chosen(
    parts: SearchParts, records: Sequence[TrialRecord], number: int
) -> tuple[tuple[PredictedMeasured, ...], tuple[FailedCandidate, ...]]:
    chosen = parts.folder.chosen(number)
    if chosen is None:
        chosen = _kept(parts, number, _choose(parts, records))
    return _measured(parts, chosen)


def _kept(parts: SearchParts, number: int, genotypes: tuple[Genotype, ...]) -> Chosen:
    chosen = Chosen(number, genotypes)
    if genotypes:
        parts.folder.add_chosen(chosen)
    return chosen


def _choose(parts: SearchParts, records: Sequence[TrialRecord]) -> tuple[Genotype, ...]:
    """Scored candidates whose whole network is worth measuring now; thresholds do not make another network.

    Every deadline has its share, the longest first.
    """
    complete = {
        r.candidate.with_thresholds((None,) * len(r.candidate.exits)): r for r in records if r.state == "complete"
    }
    scored = list(complete.values())
    taken = [i for i, c in enumerate(complete) if _is_measured(parts.predictor, c)]
    spent = sum(len(e.pairs) + len(e.failed) for e in parts.folder.events())
    count = parts.feedback.within(parts.feedback.networks_per_round, spent)
    if len(taken) == len(scored) or not count:
        return ()
    now = current_figures(parts, scored)
    known = set(taken)
    std = [MEASURED_STD * f.std_ms if i in known else f.std_ms for i, f in enumerate(now)]
    chosen: list[int] = []
    for left, budget_ms in zip(range(len(parts.budget.all_ms), 0, -1), parts.budget.all_ms, strict=True):
        found = worth_measuring(
            [r.score for r in scored],
            [f.expected_ms for f in now],
            [latency_of(f, parts.budget.of) for f in now],
            std,
            budget_ms,
            -(-(count - len(chosen)) // left),
            taken,
        )
        chosen += found
        taken += found
    return tuple(scored[i].genotype for i in chosen)


def _measured(parts: SearchParts, chosen: Chosen) -> tuple[tuple[PredictedMeasured, ...], tuple[FailedCandidate, ...]]:
    if not chosen.genotypes:
        return (), ()
    candidates = [parts.space.decode(g) for g in chosen.genotypes]
    return parts.predictor.measure([c.with_thresholds((None,) * len(c.exits)) for c in candidates], chosen.round)


def _is_measured(predictor: Predictor, candidate: Candidate) -> bool:
    return network_key(candidate, predictor.form(candidate)) in predictor.table.networks


def _round_event(
    kind: str,
    number: int,
    trials: int,
    failures: int,
    pairs: Sequence[PredictedMeasured],
    value: float | None,
    wall_s: float,
    failed: Sequence[FailedCandidate],
) -> Event:
    mape = float(np.mean([abs(p.error) for p in pairs])) if pairs else None
    values = {
        "round": number,
        "trials": trials,
        "failed": failures,
        "measured": len(pairs),
        "hypervolume": value,
        "mape": mape,
        "wall_s": wall_s,
    }
    return Event(kind, time.time(), values, tuple(pairs), tuple(failed))


def _tell_measured(parts: SearchParts, pairs: Sequence[PredictedMeasured], failed: Sequence[FailedCandidate]) -> None:
    if pairs:
        mape = 100 * float(np.mean([abs(p.error) for p in pairs]))
        parts.reporter.say(f"{len(pairs)} networks measured; they had been predicted with {mape:.1f} % mean error")
    if failed:
        parts.reporter.warn(
            f"{len(failed)} networks could not be measured, the first: {failed[0].id}: {failed[0].reason}"
        )
