"""Standalone against supernet at equal CPU seconds: whose finalists cover more of the test split?

Each scorer searches with the sampler, the batches and the score jobs of `nas search` until its budget of CPU seconds is
spent (training the supernet counts), finalists are chosen in one way, and all of them get the same full distillation.
`random` is the baseline without any score: architectures spread over the latencies inside the budget.

Run: python -m benchmarks.scorers [--experiment FILE] [--set KEY=VALUE] [--cpu-seconds 120] [--seeds 3] [--json]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks import common
from nas.cli.output import Console, Reporter
from nas.core.records import Candidate
from nas.recipe.context import open_context
from nas.recipe.finish import FinishJob, finish_student, finished_logits
from nas.recipe.pool import JobFailure, WorkerPool
from nas.recipe.records import top1_per_exit
from nas.recipe.score import score
from nas.recipe.supernet import train_supernet
from nas.search.choice import choose_sampler
from nas.search.experiment import Experiment, load_experiment
from nas.search.folder import RunFolder
from nas.search.predictor import BudgetFilter, Predictor
from nas.search.prepare import Inputs, load_inputs, open_table, prepare_training, scoring_plan, worker_count
from nas.search.scoring import ScoredCandidate, ScoringPlan, score_batch
from nas.search.select import hypervolume, spread_choice, stratified
from nas.search.settings import ScorerName
from nas.search.study import Proposer, Scored

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
SCORERS: tuple[ScorerName, ...] = ("supernet", "standalone")
RANDOM = "random"
REFERENCE_TOP1 = 0.5  # accuracy below it covers nothing
RANDOM_POOL = 2048  # of which the baseline takes some at equal ranks of latency

Genotype = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all searches share; `folder` holds a sub-folder per search, `context` the data of the workers."""

    inputs: Inputs
    predictor: Predictor
    pool: WorkerPool
    reporter: Reporter
    folder: Path
    context: str
    cpu_seconds: float
    train_share: float
    finals: int

    @property
    def experiment(self) -> Experiment:
        return self.inputs.experiment

    def worst_ms(self, candidates: Sequence[Candidate]) -> list[float]:
        """Predicted worst case of each: the second axis of every comparison here."""
        return [self.predictor.estimate(c).worst_ms for c in candidates]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What one search found: its finalists, how many candidates it scored to the end, CPU seconds spent."""

    scorer: str
    seed: int
    finalists: tuple[Candidate, ...]
    scored: int
    cpu_s: float
    plan: ScoringPlan | None


def search(bench: Bench, scorer: ScorerName, seed: int) -> Found:
    """One search inside its CPU seconds, batch by batch as a round does it."""
    e = bench.experiment
    mine = replace(bench.inputs, experiment=replace(e, search=replace(e.search, scorer=scorer, seed=seed)))
    plan = scoring_plan(mine, RunFolder(bench.folder / f"{scorer}-{seed}"), bench.context)
    spent = 0.0
    if scorer == "supernet":
        settings = replace(e.supernet, steps=None, cpu_seconds=bench.train_share * bench.cpu_seconds, seed=seed)
        targets = {side: open_context(bench.context, side).targets for side in bench.inputs.space.resolution}
        folder, cores = Path(plan.supernet), bench.pool.workers
        spent = train_supernet(bench.inputs.space, targets, e.distill, settings, folder, workers=cores).cpu_s
    limit = BudgetFilter(bench.predictor, e.budget.ms, "worst", e.budget.margin_std)
    sampler, _ = choose_sampler(e.search.sampler, e.search.trials, is_latency_known=False)
    proposer = Proposer(bench.inputs.space, sampler, (seed, 3), e.search.trials, limit.keeps, limit.known, [])
    known: dict[Candidate, tuple[float, float]] = {}  # accuracy of the head, predicted worst case
    first = [g for g in (bench.inputs.space.smallest(), bench.inputs.space.largest()) if limit.keeps(g)]
    proposer.mark(first)
    while True:
        asked: list[tuple[int | None, Genotype]] = [(None, g) for g in first]
        first = []
        while len(asked) < e.search.batch and (proposal := proposer.ask()) is not None:
            asked.append(proposal)
        if not asked:
            break
        before = spent
        spent += _score(bench, plan, proposer, asked, known)
        if spent + (spent - before) / 2 > bench.cpu_seconds:
            break
    candidates = list(known)
    scored, latency = (list(values) for values in zip(*known.values(), strict=True))
    ids = [c.arch_id for c in candidates]
    best = ids[max(range(len(ids)), key=lambda i: (scored[i], -latency[i]))]
    chosen = spread_choice(scored, latency, ids, bench.finals, 1 / bench.inputs.space.num_classes, e.budget.ms, [best])
    by_id = {c.arch_id: c.architecture for c in candidates}
    return Found(scorer, seed, tuple(by_id[i] for i in chosen), len(known), spent, plan)


def _score(
    bench: Bench,
    plan: ScoringPlan,
    proposer: Proposer,
    asked: Sequence[tuple[int | None, Genotype]],
    known: dict[Candidate, tuple[float, float]],
) -> float:
    """Scores a batch as the search does, tells the sampler, and gives the CPU seconds that it cost."""
    genotypes = [g for _, g in asked]
    candidates = [bench.inputs.space.decode(g) for g in genotypes]
    worst = bench.predictor.worst(genotypes)[0].tolist()
    spent = 0.0
    outcomes: dict[int, Scored | None] = {}
    for i, result in score_batch(plan, bench.pool, candidates, [(ms,) for ms in worst], bench.reporter, lambda: False):
        outcomes[i] = None
        if not isinstance(result, ScoredCandidate):
            continue
        spent += result.cost_s
        if result.is_complete:
            known[candidates[i]] = (result.score, worst[i])
            excess = worst[i] / bench.experiment.budget.ms - 1
            outcomes[i] = Scored(genotypes[i], result.score, (worst[i],), excess, candidates[i].id)
    for i, (number, _) in enumerate(asked):
        scored = outcomes[i]
        if number is not None:
            proposer.tell(number, scored)
        elif scored is not None:
            proposer.learn(scored)
    return spent


def without_scores(bench: Bench, seed: int) -> Found:
    """The baseline: random architectures inside the budget, at equal ranks of predicted latency."""
    space, e = bench.inputs.space, bench.experiment
    samples = space.sample_many(np.random.default_rng([seed, 9]), RANDOM_POOL)
    kept = samples[BudgetFilter(bench.predictor, e.budget.ms, "worst", e.budget.margin_std).known(samples)]
    worst, _ = bench.predictor.known_worst(kept)
    chosen = stratified(worst.tolist(), bench.finals)
    return Found(RANDOM, seed, tuple(space.decode(tuple(kept[i].tolist())).architecture for i in chosen), 0, 0.0, None)


def finish_job(bench: Bench, candidate: Candidate, seed: int) -> FinishJob:
    """Full distillation of a finalist; the same student and seed are trained once, whoever found it."""
    home = bench.folder / f"finals-{seed}" / candidate.arch_id
    e = bench.experiment
    stop = str(bench.folder / "stop")
    return FinishJob(candidate, bench.context, str(home), stop, e.distill, seed, e.finish.calibration_images, ())


def finish_all(bench: Bench, found: Sequence[Found]) -> None:
    """Every finalist of every search, each architecture once per seed."""
    jobs = list({j.folder: j for f in found for c in f.finalists for j in [finish_job(bench, c, f.seed)]}.values())
    for done, result in enumerate(bench.pool.map(finish_student, jobs), start=1):
        if isinstance(result.value, JobFailure):
            raise SystemExit(f"error: finalist {result.job.candidate.arch_id}: {result.value.reason}")
        bench.reporter.progress("full distillation", done, len(jobs))


def test_top1(bench: Bench, candidate: Candidate, seed: int) -> float:
    """Accuracy of a finished student's head on the test split."""
    logits = finished_logits(Path(finish_job(bench, candidate, seed).folder), "test", ("fp32",))
    return top1_per_exit(logits, np.asarray(open_context(bench.context, candidate.resolution).test_labels))[-1]


def figures_of(bench: Bench, found: Found) -> dict[str, Any]:
    """Figures of one search on the test split; hypervolumes are shares of what full accuracy at no time would cover.

    In `hypervolume_log` latency counts as its logarithm from a tenth of the budget on: halving it is worth the same
    everywhere, while linearly the fastest students rule.
    """
    cost = bench.worst_ms(found.finalists)
    top1 = [test_top1(bench, c, found.seed) for c in found.finalists]
    budget = bench.experiment.budget.ms
    steps = [float(np.log10(ms / (budget / 10))) for ms in cost]
    return {
        "scorer": found.scorer,
        "seed": found.seed,
        "scored": found.scored,
        "cpu_s": found.cpu_s,
        "hypervolume_log": hypervolume(top1, steps, REFERENCE_TOP1, 1.0),
        "hypervolume_linear": hypervolume(top1, cost, REFERENCE_TOP1, budget),
        "best_test_top1": max(top1),
        "finalists": [{"worst_ms": cost[i], "test_top1": top1[i]} for i in np.argsort(cost)],
    }


def rank_correlations(bench: Bench, found: Sequence[Found], seed: int) -> dict[str, Any]:
    """Spearman of each score, and of latency alone, with the final test accuracy, over all finalists of a seed."""
    finalists = list({c.arch_id: c for f in found if f.seed == seed for c in f.finalists}.values())
    truth = [test_top1(bench, c, seed) for c in finalists]
    result: dict[str, Any] = {"n": len(finalists), "latency": _spearman(bench.worst_ms(finalists), truth)}
    for f in found:
        if f.seed == seed and f.plan is not None:
            jobs = {f.plan.job(c, f.plan.rungs[-1]): c.arch_id for c in finalists}
            scores: dict[str, float] = {}
            for late in bench.pool.map(score, list(jobs)):
                if isinstance(late.value, JobFailure):
                    raise SystemExit(f"error: {late.job.candidate.arch_id}: {late.value.reason}")
                scores[jobs[late.job]] = late.value.score
            result[f.scorer] = _spearman([scores[c.arch_id] for c in finalists], truth)
    return result


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def main() -> None:
    """Runs all searches, then all finalists, then prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data, recipe and budget")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--cpu-seconds", type=float, default=120.0, help="of each search (default 120)")
    options.add_argument("--seeds", type=int, default=3, help="searches per scorer (default 3)")
    options.add_argument("--finals", type=int, default=6, help="finalists per search (default 6)")
    options.add_argument("--train-share", type=float, default=0.65, help="of the supernet's budget (default 0.65)")
    options.add_argument("--ranks", action="store_true", help="also score all finalists by every scorer")
    args = options.parse_args()
    experiment = load_experiment(args.experiment, args.sets)
    with (
        tempfile.TemporaryDirectory(prefix="nas-scorers-") as scratch,
        WorkerPool(worker_count(experiment)) as pool,
        Console(as_json=True).reporter() as reporter,
    ):
        folder = Path(scratch)
        inputs = load_inputs(experiment, reporter)
        predictor = Predictor(inputs.space, open_table(experiment, inputs.device.profile), inputs.device, reporter)
        predictor.prepare()
        _, _, context = prepare_training(inputs, RunFolder(folder), reporter)
        bench = Bench(
            inputs, predictor, pool, reporter, folder, context, args.cpu_seconds, args.train_share, args.finals
        )
        found = []
        for seed in range(args.seeds):
            found += [search(bench, scorer, seed) for scorer in SCORERS]
            found.append(without_scores(bench, seed))
            for f in found[-3:]:
                reporter.say(f"seed {seed} {f.scorer}: {f.scored} scored in {f.cpu_s:.1f} CPU s")
        finish_all(bench, found)
        rows = [figures_of(bench, f) for f in found]
        ranks = [rank_correlations(bench, found, seed) for seed in range(args.seeds)] if args.ranks else []
        _report(args, experiment, rows, ranks)


def _report(args: Any, experiment: Experiment, rows: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]) -> None:
    names = ("hypervolume_log", "hypervolume_linear", "best_test_top1", "cpu_s", "scored")
    table = [
        (
            r["scorer"],
            r["seed"],
            *(round(r[name], 4) for name in names),
            " ".join(f"{f['worst_ms']:.3f}:{100 * f['test_top1']:.1f}" for f in r["finalists"]),
        )
        for r in rows
    ]
    summary = {}
    for scorer in (*SCORERS, RANDOM):
        own = [r for r in rows if r["scorer"] == scorer]
        means = {name: statistics.fmean(r[name] for r in own) for name in names}
        rhos = [r[scorer] for r in ranks if r.get(scorer) is not None]
        summary[scorer] = {**means, "rank_correlation": statistics.fmean(rhos) if rhos else None}
        table.append((scorer, "mean", *(round(means[name], 4) for name in names), ""))
    title = (
        f"{experiment.name}, {experiment.budget.ms:g} ms, {args.cpu_seconds:g} CPU s a search, {args.finals} finalists "
        f"of {experiment.distill.epochs} epochs, {args.seeds} seeds; on test, above {REFERENCE_TOP1:g}"
    )
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    document = {"options": shown, "summary": summary, "searches": list(rows), "rank_correlations": list(ranks)}
    common.report(title, ("scorer", "seed", *names, "finalists ms:%"), table, document, args.json)


if __name__ == "__main__":
    sys.exit(main())
