"""Successive halving of trainings: which share of the front is left, for which share of the training seconds?

    python -m benchmarks.halving [--folder DIR] [--seeds 3] [--trials 36] [--rungs 2 4 8] [--keep 0.5]
        [--experiment FILE] [--set KEY=VALUE] [--simulated N] [--json]

For each seed there is one search without halving, as `nas search` does it: the grey-box sampler proposes batches, every
candidate is trained to the last rung, and DIR keeps its score on search validation after each epoch, its accuracy on
test after the last one, and the CPU seconds of each epoch. Every policy is then replayed on these curves. That is
exact, because a training that stops at a rung is the beginning of the same training without a stop (one schedule, one
order of images, a checkpoint at every epoch), and a policy sees nothing else. So all policies have the same candidates,
and what they cost is the sum of CPU seconds of the epochs that they would have trained and of the evaluations at their
rungs. What the sampler would have proposed, had it seen fewer complete trainings, is not part of the comparison; what
it learns is: `model` says how well the sampler's model, taught by one policy on one seed, predicts the accuracies
of the candidates of the other seeds.

The hypervolume is that of the candidates that reached the last rung, as a share of that without halving: on validation
as `nas search` reports it (above guessing) and above `REFERENCE_TOP1`; on test that of the front on validation.

Calls with the same DIR go on where the last one stopped, and train nothing twice. With `--simulated N` the policies are
replayed on made-up curves of N seeds instead.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks import common
from nas.cli.output import Console
from nas.core.jsonio import append_line, content_hash, read_lines
from nas.recipe.context import open_context
from nas.recipe.pool import JobFailure, WorkerPool
from nas.recipe.records import read_scored, top1_per_exit
from nas.recipe.score import ScoreJob, deployed_answers, score, student_folder
from nas.recipe.standalone import TOGETHER, Halving, foreseen, promoted
from nas.search.experiment import load_experiment
from nas.search.folder import RunFolder
from nas.search.greybox import (
    GreyBoxProblem,
    encoded,
    fit_hyperparameters,
    fit_model,
    latencies,
    predict_accuracy,
)
from nas.search.greybox import Scored as Observed
from nas.search.greybox_sampler import is_ordered
from nas.search.predictor import BudgetFilter, Predictor
from nas.search.prepare import Inputs, load_inputs, open_table, prepare_training, scoring_plan, worker_count
from nas.search.progress import Reporter
from nas.search.scoring import ScoringPlan
from nas.search.select import front_indices, hypervolume
from nas.search.study import KnownLatency, Proposer, Scored
from nas.train.loop import epochs_from_plain, read_checkpoint

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
REFERENCE_TOP1 = 0.5  # the stricter of two references of the hypervolume
WORKERS = (2, 4, 8)  # of the simulated searches
DIGITS = 4

Genotype = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One candidate, trained to the end.

    Fields:
        number: in the order of proposal.
        genotype: of the space.
        arch_id: candidates that share it share a training.
        latency_ms: predicted worst case.
        val_top1: right answers of the head in its deployed precision on search validation, after each epoch.
        test_top1: the same on test after the last one.
        train_s: CPU seconds of each epoch.
        look_s: CPU seconds of each evaluation with what belongs to it (batch norm, int8 ranges, checkpoint).
        val_score: what `nas search` ranks by, after each epoch; empty in curves from before 2026-11-29, when that was
            the share of right answers.
    """

    number: int
    genotype: Genotype
    arch_id: str
    latency_ms: float
    val_top1: tuple[float, ...]
    test_top1: float
    train_s: tuple[float, ...]
    look_s: tuple[float, ...]
    val_score: tuple[float, ...] = ()

    @property
    def scores(self) -> tuple[float, ...]:
        """What candidates are compared by, after each epoch."""
        return self.val_score or self.val_top1


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a worker gives for one candidate."""

    val_top1: tuple[float, ...]
    test_top1: float
    train_s: tuple[float, ...]
    look_s: tuple[float, ...]
    val_score: tuple[float, ...]


def learning_curve(job: ScoreJob) -> Learnt:
    """Trains a candidate epoch by epoch through the search's own score jobs; those that are there are read."""
    folder = student_folder(job.students, job.candidate.arch_id)
    context = open_context(job.context, job.candidate.resolution)
    records = []
    for epochs in range(1, job.epochs + 1):
        each = replace(job, epochs=epochs)
        score(each)
        record = read_scored(folder, each.name)
        if record is None:
            raise RuntimeError(f"{folder}: the score after {epochs} epochs was not kept")
        records.append(record)
    identity = content_hash([job.candidate.arch_id, job.distill, context.targets.key, job.seed])
    checkpoint = folder / f"score-{job.epochs}.ckpt"
    content = read_checkpoint(checkpoint, identity)
    if content is None:
        raise RuntimeError(f"{checkpoint}: was not kept")
    train_s = tuple(e.cpu_s for e in epochs_from_plain(content["epochs"]))
    test = top1_per_exit(deployed_answers(job, context, context.test), np.asarray(context.test_labels))[-1]
    # Of twins only the first one was trained: the other's score has no training in it.
    look_s = tuple(r.cost_s - t if r.cost_s > t else r.cost_s for r, t in zip(records, train_s, strict=True))
    return Learnt(tuple(r.top1[-1] for r in records), test, train_s, look_s, tuple(r.score for r in records))


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all searches share."""

    inputs: Inputs
    predictor: Predictor
    pool: WorkerPool
    reporter: Reporter
    folder: Path
    context: str
    epochs: int
    trials: int

    @property
    def batch(self) -> int:
        return self.inputs.experiment.search.batch

    def known(self, genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latency of genotypes and its deviation, ms [N, 1]."""
        worst, std = self.predictor.known_worst(genotypes)
        return worst[:, None], std[:, None]


def curves_of(bench: Bench, seed: int) -> list[Curve]:
    """The curves of one search without halving: those that are kept, and the rest of them trained now."""
    file = bench.folder / f"curves-{seed}.jsonl"
    e = bench.inputs.experiment
    standalone = replace(e.standalone, rungs=(bench.epochs,))
    mine = replace(e, search=replace(e.search, scorer="standalone", seed=seed), standalone=standalone)
    plan = scoring_plan(replace(bench.inputs, experiment=mine), RunFolder(bench.folder / f"seed-{seed}"), bench.context)
    curves = sorted(read_lines(Curve, file), key=lambda c: c.number)
    for first in range(0, bench.trials, bench.batch):
        genotypes = _proposed(bench, seed, [c for c in curves if c.number < first], first)
        known = {c.number: c for c in curves}
        missing = {first + i: g for i, g in enumerate(genotypes) if first + i not in known}
        for number, genotype, learnt in _trained(bench, plan, missing):
            candidate = bench.inputs.space.decode(genotype)
            worst = float(bench.predictor.worst([genotype])[0][0])
            curve = Curve(
                number,
                genotype,
                candidate.arch_id,
                worst,
                learnt.val_top1,
                learnt.test_top1,
                learnt.train_s,
                learnt.look_s,
                learnt.val_score,
            )
            append_line(file, curve)
            curves.append(curve)
            bench.reporter.progress(f"seed {seed}: trainings", len(curves), bench.trials)
        curves.sort(key=lambda c: c.number)
    return curves[: bench.trials]


def _proposed(bench: Bench, seed: int, curves: Sequence[Curve], first: int) -> list[Genotype]:
    """The next batch, a function of the curves before it: a call that goes on proposes the same."""
    space, budget = bench.inputs.space, bench.inputs.experiment.budget
    limit = BudgetFilter(bench.predictor, budget.ms, "worst", budget.margin_std)
    scored = [
        Scored(c.genotype, c.scores[-1], (c.latency_ms,), c.latency_ms / budget.ms - 1, c.arch_id) for c in curves
    ]
    wanted = min(bench.batch, bench.trials - first)
    latency = KnownLatency(bench.known, (budget.ms,), budget.margin_std, wanted)
    proposer = Proposer(
        space, "greybox", (seed, first), bench.trials, limit.keeps, limit.known, scored, latency=latency
    )
    found = [g for g in (space.smallest(), space.largest()) if first == 0 and limit.keeps(g)][:wanted]
    proposer.mark(found)
    while len(found) < wanted and (proposal := proposer.ask()) is not None:
        found.append(proposal[1])
    return found


def _trained(bench: Bench, plan: ScoringPlan, genotypes: dict[int, Genotype]) -> Iterator[tuple[int, Genotype, Learnt]]:
    """Curves as they are ready; candidates that share a training come one after the other."""
    left = dict(genotypes)
    while left:
        wave: dict[str, tuple[int, ScoreJob]] = {}
        for number, genotype in left.items():
            candidate = bench.inputs.space.decode(genotype)
            wave.setdefault(candidate.arch_id, (number, plan.job(candidate, bench.epochs)))
        numbers = {job: number for number, job in wave.values()}
        for result in bench.pool.map(learning_curve, list(numbers)):
            number = numbers[result.job]
            if isinstance(result.value, JobFailure):
                raise SystemExit(f"error: {result.job.candidate.arch_id}: {result.value.reason}")
            yield number, left.pop(number), result.value


@dataclass(frozen=True, slots=True)
class Reached:
    """What a policy did: at how many rungs each candidate was compared, by number."""

    rungs: tuple[int, ...]
    compared: dict[int, int]

    @property
    def complete(self) -> set[int]:
        """Candidates that reached the last rung."""
        return {n for n, count in self.compared.items() if count == len(self.rungs)}

    def cpu_s(self, curves: Sequence[Curve]) -> float:
        """CPU seconds; epochs that several candidates share count once."""
        trained: dict[tuple[str, int], float] = {}
        looks = 0.0
        for c in curves:
            for epochs in self.rungs[: self.compared[c.number]]:
                looks += c.look_s[epochs - 1]
                trained |= {(c.arch_id, e): c.train_s[e] for e in range(epochs)}
        return looks + sum(trained.values())


Policy = Callable[[Sequence[Curve], tuple[int, ...], float, int], Reached]


def halving(
    curves: Sequence[Curve], rungs: tuple[int, ...], keep: float, batch: int, together: int = TOGETHER
) -> Reached:
    """What `nas search` does."""
    compared = dict.fromkeys((c.number for c in curves), 0)
    steps = Halving(len(rungs), keep, together)
    for first in range(0, len(curves), batch):
        for c in curves[first : first + batch]:
            steps.join(c.number, (c.latency_ms,))
        while found := steps.open():
            place, number = found[0]
            compared[number] = place + 1
            steps.arrive(number, place, curves[number].scores[rungs[place] - 1])
    return Reached(rungs, compared)


def within_batches(curves: Sequence[Curve], rungs: tuple[int, ...], keep: float, batch: int) -> Reached:
    """Each batch is halved by itself, and a rung waits until it is full (Jamieson and Talwalkar 2016)."""
    compared = dict.fromkeys((c.number for c in curves), 0)
    for first in range(0, len(curves), batch):
        alive = list(curves[first : first + batch])
        for place, epochs in enumerate(rungs):
            for c in alive:
                compared[c.number] = place + 1
            top1, ms = [c.scores[epochs - 1] for c in alive], [c.latency_ms for c in alive]
            alive = [alive[i] for i in promoted(top1, ms, max(1, round(keep * len(alive))))]
    return Reached(rungs, compared)


def _in_turn(is_sent: Callable[[list[int], set[int], Curve], list[int]]) -> Policy:
    """A policy that decides whenever a candidate is compared: who of those seen goes on, by number."""

    def policy(curves: Sequence[Curve], rungs: tuple[int, ...], keep: float, batch: int) -> Reached:  # noqa: ARG001
        compared = dict.fromkeys((c.number for c in curves), 0)
        seen: list[list[Curve]] = [[] for _ in rungs]
        gone: list[set[int]] = [set() for _ in rungs]

        def climb(c: Curve, place: int) -> None:
            compared[c.number] = place + 1
            seen[place].append(c)
            if place + 1 == len(rungs):
                return
            count = max(1, int(keep * len(seen[place]) + 1e-9))
            top1, ms = [s.scores[rungs[place] - 1] for s in seen[place]], [s.latency_ms for s in seen[place]]
            best = [seen[place][i].number for i in promoted(top1, ms, count)]
            for number in is_sent(best, gone[place], c):
                gone[place].add(number)
                climb(curves[number], place + 1)

        for c in curves:
            climb(c, 0)
        return Reached(rungs, compared)

    return policy


# MO-ASHA as published promotes; Syne Tune's class decides once for each, when it is compared.
POLICIES: dict[str, Policy] = {
    "halving": halving,
    "within batches": within_batches,
    "promotion without limit": _in_turn(lambda best, gone, _: [n for n in best if n not in gone]),
    "stopping": _in_turn(lambda best, _, c: [c.number] if c.number in best else []),
}


def idle_share(
    curves: Sequence[Curve], rungs: tuple[int, ...], keep: float, batch: int, workers: int, *, has_barriers: bool
) -> float:
    """Share of the workers' time without work, in a simulated search whose batches follow each other."""
    clock = busy = 0.0
    for first in range(0, len(curves), batch):
        mine = curves[first : first + batch]
        if has_barriers:
            reached = within_batches([replace(c, number=i) for i, c in enumerate(mine)], rungs, keep, batch)
            for place in range(len(rungs)):
                jobs = [_segment_s(c, rungs, place) for i, c in enumerate(mine) if reached.compared[i] > place]
                ends = [clock] * workers
                for seconds in jobs:
                    heapq.heappush(ends, heapq.heappop(ends) + seconds)
                clock, busy = max(ends), busy + sum(jobs)
    if has_barriers:
        return 1 - busy / (workers * clock)
    steps = Halving(len(rungs), keep, TOGETHER)
    for first in range(0, len(curves), batch):
        for c in curves[first : first + batch]:
            steps.join(c.number, (c.latency_ms,))
        running: list[tuple[float, int, int]] = []
        while True:
            begun = {(place, number) for _, place, number in running}
            for place, number in [pair for pair in steps.open() if pair not in begun][: workers - len(running)]:
                seconds = _segment_s(curves[number], rungs, place)
                heapq.heappush(running, (clock + seconds, place, number))
                busy += seconds
            if not running:
                break
            clock, place, number = heapq.heappop(running)
            steps.arrive(number, place, curves[number].scores[rungs[place] - 1])
    return 1 - busy / (workers * clock)


def _segment_s(c: Curve, rungs: tuple[int, ...], place: int) -> float:
    """CPU seconds from one rung to the next."""
    before = rungs[place - 1] if place else 0
    return sum(c.train_s[before : rungs[place]]) + c.look_s[rungs[place] - 1]


def volumes(curves: Sequence[Curve], complete: set[int], budget_ms: float, chance: float) -> dict[str, float]:
    """Hypervolumes of the candidates that were trained to the end."""
    kept = [c for c in curves if c.number in complete]
    val, ms = [c.scores[-1] for c in kept], [c.latency_ms for c in kept]
    front = [kept[i] for i in front_indices(val, ms)]
    test, test_ms = [c.test_top1 for c in front], [c.latency_ms for c in front]
    return {
        "val": hypervolume(val, ms, chance, budget_ms),
        "val_strict": hypervolume(val, ms, REFERENCE_TOP1, budget_ms),
        "test": hypervolume(test, test_ms, chance, budget_ms),
        "test_strict": hypervolume(test, test_ms, REFERENCE_TOP1, budget_ms),
        "best_val": max(val),
        "best_test": max(test),
    }


def foreseen_error(curves: Sequence[Curve], reached: Reached) -> dict[str, float | int | None]:
    """How far the foreseen accuracies of stopped candidates are from those that they reach when trained to the end."""
    complete = [[c.scores[e - 1] for e in reached.rungs] for c in curves if c.number in reached.complete]
    stopped = [c for c in curves if c.number not in reached.complete]
    places = [reached.compared[c.number] - 1 for c in stopped]
    there = [c.scores[reached.rungs[place] - 1] for c, place in zip(stopped, places, strict=True)]
    guess = [foreseen(complete, place, top1) for place, top1 in zip(places, there, strict=True)]
    truth = [c.scores[-1] for c in stopped]
    return {
        "n": len(stopped),
        "mean_abs_error": float(np.mean(np.abs(np.subtract(guess, truth)))),
        "bias": float(np.mean(np.subtract(guess, truth))),
        "mean_abs_error_of_rung_accuracy": float(np.mean(np.abs(np.subtract(there, truth)))),
        "spearman": _spearman(guess, truth),
        "spearman_of_rung_accuracy": _spearman(there, truth),
    }


def model_quality(
    bench: Bench, curves: Sequence[Curve], others: Sequence[Curve], reached: Reached
) -> dict[str, dict[str, float | None]]:
    """How well the sampler's model predicts the candidates of other seeds, by what it was taught."""
    complete = [c for c in curves if c.number in reached.complete]
    taught = {c.number: c.scores[-1] for c in complete}
    rung_curves = [[c.scores[e - 1] for e in reached.rungs] for c in complete]
    guessed, raw = dict(taught), dict(taught)
    for c in curves:
        if c.number not in taught:
            place = reached.compared[c.number] - 1
            raw[c.number] = c.scores[reached.rungs[place] - 1]
            guessed[c.number] = foreseen(rung_curves, place, raw[c.number])
    own = {c.genotype for c in curves}
    strangers = [c for c in others if c.genotype not in own]
    everything = {c.number: c.scores[-1] for c in curves}
    kinds = {
        "complete only": taught,
        "complete and foreseen": guessed,
        "complete and rung accuracy": raw,
        "all trained to the end": everything,
    }
    return {kind: _predicts(bench, curves, strangers, accuracies) for kind, accuracies in kinds.items()}


def _predicts(
    bench: Bench, curves: Sequence[Curve], strangers: Sequence[Curve], taught: dict[int, float]
) -> dict[str, float | None]:
    space, budget = bench.inputs.space, bench.inputs.experiment.budget
    ordinal = tuple(is_ordered(gene.choices) for gene in space.genes)
    problem = GreyBoxProblem(space.gene_sizes, ordinal, space.canonical_many, bench.known, (budget.ms,))
    numbers = sorted(taught)
    genotypes = np.array([curves[n].genotype for n in numbers], np.int64)
    observed = Observed(genotypes, np.array([taught[n] for n in numbers]), np.ones(len(numbers), bool))
    model = fit_model(problem, observed, fit_hyperparameters(problem, observed))
    asked = np.array([c.genotype for c in strangers], np.int64)
    mean = predict_accuracy(model, encoded(problem, asked, model.hyperparameters, latencies(problem, asked).ms))
    truth = np.array([c.scores[-1] for c in strangers])
    return {
        "n": len(truth),
        "taught": len(numbers),
        "spearman": _spearman(mean.tolist(), truth.tolist()),
        "rmse": float(np.sqrt(np.mean((mean - truth) ** 2))),
        "rmse_without_bias": float(np.std(mean - truth)),
    }


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def replayed(
    bench: Bench, curves: Sequence[Curve], policy: Policy, rungs: tuple[int, ...], keep: float
) -> dict[str, Any]:
    """Shares of seconds and hypervolumes of one policy on the curves of one seed."""
    budget_ms, chance = bench.inputs.experiment.budget.ms, 1 / bench.inputs.space.num_classes
    last = (bench.epochs,)
    whole = Reached(last, dict.fromkeys((c.number for c in curves), 1))
    reached = policy(curves, rungs, keep, bench.batch)
    before = volumes(curves, whole.complete, budget_ms, chance)
    after = volumes(curves, reached.complete, budget_ms, chance)
    shares = {f"{name}_share": after[name] / before[name] for name in before if not name.startswith("best")}
    lost = {f"{name}_lost": before[name] - after[name] for name in before if name.startswith("best")}
    cpu_s = reached.cpu_s(curves)
    return {
        "cpu_s": cpu_s,
        "cpu_s_without": whole.cpu_s(curves),
        "cpu_share": cpu_s / whole.cpu_s(curves),
        **shares,
        **lost,
        "complete": len(reached.complete),
        "without": before,
        "foreseen": foreseen_error(curves, reached),
    }


def simulated(seed: int, count: int, is_learning: bool, epochs: int = 8) -> list[Curve]:
    """Made-up curves with the shape of trained ones, for choices that need more seeds than trainings can pay for.

    Final accuracy rises with latency and a quality that differs between candidates; an epoch shows it below that, by an
    amount that differs between candidates, and with noise. With `is_learning` later candidates are better, as those of
    a sampler that learns. They are no measurements, and latencies in ms and CPU seconds are in proportion only.
    """
    rng = np.random.default_rng(seed)
    ms, quality = 0.02 + 0.025 * rng.random(3 * count), rng.normal(size=3 * count)
    chosen = np.arange(count)
    if is_learning:
        best = np.argsort(quality + rng.normal(0, 1.5, 3 * count))[-count:]
        chosen = best[np.argsort(quality[best] + rng.normal(size=count))]
    final = 0.80 + 0.12 * np.sqrt((ms - 0.018) / 0.027) + 0.02 * quality
    left = (1 - np.arange(1, epochs + 1) / epochs) ** 1.3
    curves = []
    for number, i in enumerate(chosen.tolist()):
        slow = 2.2 + 0.8 * rng.normal()
        top1 = np.clip(1 - (1 - final[i]) * (1 + slow * left) + rng.normal(0, 0.008, epochs), 0, 1)
        top1[-1] = final[i]
        train_s = (1 + 20 * float(ms[i]),) * epochs
        curves.append(
            Curve(number, (i,), str(i), float(ms[i]), tuple(top1.tolist()), float(final[i]), train_s, (0.1,) * epochs)
        )
    return curves


def _simulated_report(seeds: int, count: int, batch: int, settings: Sequence[tuple[tuple[int, ...], float]]) -> None:
    """Policies, and numbers of students that are compared together, on simulated curves; prints two tables."""

    def group(together: int) -> Policy:
        return lambda curves, rungs, keep, batch: halving(curves, rungs, keep, batch, together)

    tried = POLICIES | {f"halving, together {n}": group(n) for n in (1, 4, 6, 12)}
    rows = []
    for is_learning in (False, True):
        all_curves = [simulated(seed, count, is_learning) for seed in range(seeds)]
        for rungs, keep in settings:
            for name, policy in tried.items():
                cpu, volume = [], []
                for curves in all_curves:
                    reached = policy(curves, rungs, keep, batch)
                    everyone = dict.fromkeys(reached.compared, 1)
                    cpu.append(reached.cpu_s(curves) / Reached(rungs[-1:], everyone).cpu_s(curves))
                    covered = [
                        hypervolume([curves[i].test_top1 for i in n], [curves[i].latency_ms for i in n], 0.8, 0.045)
                        for n in (sorted(reached.complete), list(everyone))
                    ]
                    volume.append(covered[0] / covered[1])
                rows.append([name, " ".join(map(str, rungs)), keep, is_learning, _cell(cpu), _cell(volume)])
    title = f"simulated curves, {count} candidates, batches of {batch}, n {seeds}; median (min to max)"
    columns = ("policy", "rungs", "keep", "later ones are better", "cpu share", "hypervolume share")
    common.report(title, columns, rows, {}, False)


def main() -> None:
    """Trains what is missing, replays all policies, prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data, recipe and budget")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--folder", type=Path, default=Path("runs/halving-curves"), help="keeps the curves")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--trials", type=int, default=36, help="candidates per seed (default 36)")
    options.add_argument("--epochs", type=int, default=8, help="of a training without halving (default 8)")
    options.add_argument("--rungs", type=int, nargs="+", action="append", help="may be given several times")
    options.add_argument("--keep", type=float, nargs="+", help="shares that go on")
    options.add_argument("--simulated", type=int, metavar="N", help="simulated curves of N seeds in place of trainings")
    args = options.parse_args()
    experiment = load_experiment(args.experiment, args.sets)
    rungs = [tuple(r) for r in args.rungs or [list(experiment.standalone.rungs)]]
    settings = [(r, keep) for r in rungs for keep in args.keep or [experiment.standalone.keep] if r[-1] == args.epochs]
    if not settings:
        raise SystemExit(f"error: --rungs: the last one has to be --epochs ({args.epochs}), got {rungs}")
    if args.simulated:
        _simulated_report(args.simulated, args.trials, experiment.search.batch, settings)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    with WorkerPool(worker_count(experiment)) as pool, Console(as_json=True).reporter() as reporter:
        inputs = load_inputs(experiment, reporter)
        predictor = Predictor(inputs.space, open_table(experiment, inputs.device.profile), inputs.device, reporter)
        predictor.prepare()
        _, _, context = prepare_training(inputs, RunFolder(args.folder), reporter)
        bench = Bench(inputs, predictor, pool, reporter, args.folder, context, args.epochs, args.trials)
        curves = {seed: curves_of(bench, seed) for seed in range(args.seeds)}
    _report(bench, curves, settings, args)


def _report(
    bench: Bench, curves: dict[int, list[Curve]], settings: Sequence[tuple[tuple[int, ...], float]], args: Any
) -> None:
    measures = ("cpu_share", "val_share", "val_strict_share", "test_share", "test_strict_share", "best_val_lost")
    rows, document = [], []
    for rungs, keep in settings:
        for name, policy in POLICIES.items():
            each = [replayed(bench, c, policy, rungs, keep) for c in curves.values()]
            cells = [_cell([r[m] for r in each]) for m in measures]
            rows.append([name, " ".join(map(str, rungs)), keep, *cells])
            document.append({"policy": name, "rungs": list(rungs), "keep": keep, "seeds": each})
    rungs, keep = settings[0]
    model = {}
    for seed, own in curves.items():
        others = [c for other, found in curves.items() if other != seed for c in found]
        if others:
            model[str(seed)] = model_quality(bench, own, others, halving(own, rungs, keep, bench.batch))
    idle = {
        f"{workers} workers": {
            kind: [idle_share(c, rungs, keep, bench.batch, workers, has_barriers=has) for c in curves.values()]
            for kind, has in (("halving", False), ("barriers", True))
        }
        for workers in WORKERS
    }
    title = (
        f"{bench.inputs.experiment.name}: {args.trials} candidates a seed, batches of {bench.batch}, n {len(curves)} "
        f"seeds; shares of what {args.epochs} epochs for everyone give; median (min to max)"
    )
    common.report(title, ("policy", "rungs", "keep", *measures), rows, {}, False)
    measured = ("taught", "spearman", "rmse", "rmse_without_bias")
    model_rows = [
        [kind, *(_cell([found[kind][m] for found in model.values()]) for m in measured)]
        for kind in next(iter(model.values()), {})
    ]
    print()
    columns = ("taught by", "n", "spearman", "rmse", "rmse without bias")
    where = f"the sampler's model on candidates of other seeds, halving {rungs} {keep}"
    common.report(where, columns, model_rows, {}, False)
    print()
    idle_rows = [[w, *(_cell(found[kind]) for kind in ("halving", "barriers"))] for w, found in idle.items()]
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    everything = {
        "options": shown,
        "batch": bench.batch,
        "policies": document,
        "model": model,
        "idle_share": idle,
        "cpu_s_of_all_trainings": sum(sum(c.train_s) + sum(c.look_s) for found in curves.values() for c in found),
    }
    common.report(
        "simulated searches: share of the workers' time without work",
        ("", "halving", "barriers"),
        idle_rows,
        everything,
        args.json,
    )


def _cell(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.{DIGITS}g} ({min(known):.{DIGITS}g} to {max(known):.{DIGITS}g})"


if __name__ == "__main__":
    main()
