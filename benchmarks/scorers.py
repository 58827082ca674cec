"""Standalone against supernet at equal CPU seconds: whose finalists cover more of the test split?

Each scorer searches the same space with the same simple evolutionary proposals until its budget is spent (the training
of the supernet counts), its finalists are chosen in the same way, and all finalists get the same full distillation.
`random` is the baseline without any score: architectures spread over the cost. Run it on idle cores: budgets are CPU
seconds, but a busy machine makes each of them worth less.

Run: python -m benchmarks.scorers --cpu-seconds 150 --seeds 3 --json
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks import common
from nas.core.records import Candidate
from nas.core.walk import total_macs
from nas.data import DataSettings, load_dataset
from nas.latency.estimate import Estimator
from nas.latency.table import LatencyTable
from nas.recipe.context import open_context, write_context
from nas.recipe.finish import FinishJob, finish_student, finished_logits
from nas.recipe.pool import JobFailure, WorkerPool
from nas.recipe.records import top1_per_exit
from nas.recipe.score import ScoreJob, score
from nas.recipe.settings import StandaloneSettings, SupernetSettings
from nas.recipe.standalone import promoted
from nas.recipe.supernet import train_supernet
from nas.search.select import hypervolume, spread_choice, stratified
from nas.space.space import SearchSpace, load_space
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import make_targets
from nas.train.teacher import prepare_teacher
from nas.train.trainer import new_student, train_student

SCORERS = ("standalone", "supernet", "random")
SPACES = Path(__file__).parents[1] / "search_spaces"
REFERENCE_TOP1 = 0.5  # accuracy below it covers nothing
BATCH = 12  # proposals between two looks at the scores
SCORE_IMAGES = 256
RANDOM_POOL = 200  # of which the baseline takes some at equal steps of cost


@dataclass(frozen=True, slots=True)
class Setup:
    """What all searches share; `costs` says where a candidate's cost comes from (`table`: a folder, else MACs)."""

    space: SearchSpace
    context: str
    table: str | None
    distill: DistillSettings
    supernet: SupernetSettings
    standalone: StandaloneSettings
    cpu_seconds: float
    train_share: float
    finals: int
    folder: str


@dataclass(frozen=True, slots=True)
class SearchJob:
    """One scorer with one seed."""

    setup: Setup
    scorer: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.setup.folder) / f"{self.scorer}-{self.seed}"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What one scorer found: its finalists, how many candidates it scored, CPU seconds spent."""

    finalists: tuple[Candidate, ...]
    scored: int
    cpu_s: float


class Costs:
    """Cost of candidates: milliseconds from a latency table, or millions of multiply-adds."""

    def __init__(self, table: str | None) -> None:
        self._estimator = None
        if table is not None:
            opened = LatencyTable.read(Path(table))
            self._estimator = Estimator(opened, opened.correction())
        self.unit = "M MACs" if table is None else "ms"

    def of(self, candidate: Candidate) -> float:
        """Worst-case cost: no early exit is taken."""
        if self._estimator is None:
            return total_macs(candidate) / 1e6
        return self._estimator.estimate(candidate).worst_ms


def search(job: SearchJob) -> SearchResult:
    """One search inside its budget; runs in a worker process."""
    setup, costs = job.setup, Costs(job.setup.table)
    started = time.thread_time()
    if job.scorer == "random":
        rng = np.random.default_rng([job.seed, 9])
        pool = [setup.space.decode(setup.space.sample(rng)) for _ in range(RANDOM_POOL)]
        pool += [setup.space.decode(g) for g in (setup.space.smallest(), setup.space.largest())]
        chosen = stratified([costs.of(c) for c in pool], setup.finals)
        return SearchResult(tuple(pool[i] for i in chosen), 0, time.thread_time() - started)
    if job.scorer == "supernet":
        settings = replace(setup.supernet, cpu_seconds=setup.train_share * setup.cpu_seconds, seed=job.seed)
        targets = {side: open_context(setup.context, side).targets for side in setup.space.resolution}
        train_supernet(setup.space, targets, setup.distill, settings, job.folder / "supernet")
    known: dict[Candidate, float] = {}
    scored, longest = 0, 0.0
    for batch in proposals(setup.space, costs, known, np.random.default_rng([job.seed, 3])):
        before = time.thread_time()
        known.update(score_batch(job, batch, costs))
        scored += len(batch)
        longest = max(longest, time.thread_time() - before)
        if time.thread_time() - started + longest / 2 > setup.cpu_seconds:
            break
    candidates = list(known)
    chosen_ids = spread_choice(
        list(known.values()),
        [costs.of(c) for c in candidates],
        [c.arch_id for c in candidates],
        setup.finals,
        0.0,
        max(costs.of(c) for c in candidates),
    )
    by_id = {c.arch_id: c for c in candidates}
    return SearchResult(tuple(by_id[i] for i in chosen_ids), scored, time.thread_time() - started)


def proposals(
    space: SearchSpace, costs: Costs, known: Mapping[Candidate, float], rng: np.random.Generator
) -> Iterator[list[Candidate]]:
    """Batches of new candidates without end: both extremes first, then random ones and changed members of the front.

    Args:
        space: where they come from.
        costs: the second objective.
        known: scores so far, by candidate; the caller adds to it between batches.
        rng: draws.
    """
    seen: set[str] = set()
    batch = [space.decode(g) for g in (space.smallest(), space.largest())]
    while True:
        best = front(known, costs)
        tries = 0
        while len(batch) < BATCH and tries < 100 * BATCH:
            tries += 1
            if best and rng.random() < 0.75:
                parent = np.array(space.encode(best[int(rng.integers(len(best)))]))
                other = np.array(space.sample(rng))
                change = rng.random(len(parent)) < 2 / len(parent)
                candidate = space.decode(np.where(change, other, parent).tolist())
            else:
                candidate = space.decode(space.sample(rng))
            if candidate.arch_id not in seen:
                seen.add(candidate.arch_id)
                batch.append(candidate)
        if not batch:
            return
        yield batch
        batch = []


def front(known: Mapping[Candidate, float], costs: Costs) -> list[Candidate]:
    """Non-dominated candidates so far."""
    best, result = -1.0, []
    for candidate in sorted(known, key=lambda c: (costs.of(c), -known[c])):
        if known[candidate] > best:
            best = known[candidate]
            result.append(candidate)
    return result


def score_batch(job: SearchJob, batch: Sequence[Candidate], costs: Costs) -> dict[Candidate, float]:
    """Accuracy of the head on search validation; standalone: of those that reached the last rung."""
    rungs = job.setup.standalone.rungs if job.scorer == "standalone" else (0,)
    alive, top1 = list(batch), [0.0] * len(batch)
    for rung, epochs in enumerate(rungs):
        top1 = [score(score_job(job, c, epochs)).top1[-1] for c in alive]
        if rung + 1 < len(rungs):
            count = max(1, round(job.setup.standalone.keep * len(alive)))
            kept = promoted(top1, [costs.of(c) for c in alive], count)
            alive = [alive[int(k)] for k in kept]
    return dict(zip(alive, top1, strict=True))


def score_job(job: SearchJob, candidate: Candidate, epochs: int) -> ScoreJob:
    """The job that scores a candidate as this scorer does; the schedule has the length of the last rung."""
    setup = job.setup
    return ScoreJob(
        candidate,
        "supernet" if job.scorer == "supernet" else "standalone",
        setup.context,
        str(job.folder / "students"),
        str(job.folder / "supernet"),
        str(job.folder / "stop"),
        replace(setup.distill, epochs=setup.standalone.rungs[-1]),
        epochs,
        job.seed,
        SCORE_IMAGES,
    )


@dataclass(frozen=True, slots=True)
class LateScoreJob:
    """A finalist of any scorer, scored by one scorer after all searches, outside the budgets."""

    search: SearchJob
    candidate: Candidate


def late_score(job: LateScoreJob) -> float:
    """The score of a finalist for the rank correlation; runs in a worker process."""
    rungs = job.search.setup.standalone.rungs if job.search.scorer == "standalone" else (0,)
    return score(score_job(job.search, job.candidate, rungs[-1])).top1[-1]


def final_job(setup: Setup, candidate: Candidate, seed: int) -> FinishJob:
    """Full distillation of a finalist; the same student and seed are trained once, whoever found it."""
    folder = Path(setup.folder) / f"finals-{seed}" / candidate.arch_id
    stop = str(Path(setup.folder) / "stop")
    return FinishJob(candidate.architecture, setup.context, str(folder), stop, setup.distill, seed, 128, ())


def final_top1(setup: Setup, candidate: Candidate, seed: int) -> float:
    """Accuracy of a finished student's head on the test split."""
    folder = Path(final_job(setup, candidate, seed).folder)
    logits = finished_logits(folder, "test", ("fp32",))
    labels = open_context(setup.context, candidate.resolution).test_labels
    return top1_per_exit(logits, np.asarray(labels))[-1]


def covered(top1: Sequence[float], cost: Sequence[float], low: float, high: float, *, log: bool) -> float:
    """Hypervolume between the front and (accuracy 0.5, largest cost), as a share of the whole.

    With `log` the cost axis is the logarithm, from the smallest to the largest network of the space.
    """
    if log:
        cost = [float(np.log(c / low) / np.log(high / low)) for c in cost]
        high = 1.0
    return hypervolume(top1, cost, REFERENCE_TOP1, high * (1 + 1e-9))


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where it is not defined."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def epoch_seconds(setup: Setup) -> float:
    """CPU seconds of one epoch of a middle network, measured once."""
    rng = np.random.default_rng(0)
    pool = sorted((setup.space.decode(setup.space.sample(rng)) for _ in range(31)), key=total_macs)
    middle = pool[15].architecture
    targets = open_context(setup.context, middle.resolution).targets
    history = train_student(new_student(middle, 0), targets, setup.distill, seed=0, stop_epoch=1)
    return history.cpu_s


def prepare(args: Any, folder: Path) -> Setup:
    """Data, teacher and its cached answers, as in a run."""
    cache = Path(args.cache)
    space = load_space(Path(args.space) if Path(args.space).exists() else SPACES / f"{args.space}.yaml", 2, ("fp32",))
    data = DataSettings(train_images=args.train_images)
    datasets = tuple(load_dataset(data, side) for side in sorted(space.resolution))
    space = replace(space, num_classes=datasets[-1].num_classes)
    distill = DistillSettings(epochs=args.final_epochs)
    teacher = prepare_teacher(datasets[-1], TeacherSettings(epochs=args.teacher_epochs), cache)
    targets = make_targets(teacher, datasets[-1], distill.variants, cache)
    write_context(folder / "context.json", datasets, targets, cache, 0)
    print(f"teacher {teacher.name}: {100 * teacher.val_accuracy:.1f} % on search validation", flush=True)
    return Setup(
        space=space,
        context=str(folder / "context.json"),
        table=args.table,
        distill=distill,
        supernet=SupernetSettings(),
        standalone=StandaloneSettings(),
        cpu_seconds=args.cpu_seconds,
        train_share=args.train_share,
        finals=args.finals,
        folder=str(folder),
    )


def run_searches(pool: WorkerPool, setup: Setup, scorers: Sequence[str], seeds: int) -> dict[SearchJob, SearchResult]:
    """All searches, in parallel where there are cores."""
    jobs = [SearchJob(setup, scorer, seed) for seed in range(seeds) for scorer in scorers]
    found: dict[SearchJob, SearchResult] = {}
    for result in pool.map(search, jobs):
        if isinstance(result.value, JobFailure):
            raise SystemExit(f"error: {result.job.scorer}, seed {result.job.seed}: {result.value.reason}")
        job, value = result.job, result.value
        found[job] = value
        over = value.cpu_s > 1.2 * setup.cpu_seconds
        note = f"; more than the budget: one batch of {BATCH} is the least a search does" if over else ""
        print(f"seed {job.seed} {job.scorer}: {value.scored} scored in {value.cpu_s:.1f} CPU s{note}", flush=True)
    return {job: found[job] for job in jobs}


def run_finals(pool: WorkerPool, setup: Setup, found: Mapping[SearchJob, SearchResult]) -> None:
    """Full distillation of every finalist, each architecture once per seed."""
    jobs = {
        final_job(setup, c, job.seed).folder: final_job(setup, c, job.seed)
        for job in found
        for c in found[job].finalists
    }
    for done, result in enumerate(pool.map(finish_student, list(jobs.values())), start=1):
        if isinstance(result.value, JobFailure):
            raise SystemExit(f"error: finalist {result.job.candidate.arch_id}: {result.value.reason}")
        print(f"finalist {done} of {len(jobs)}: {result.value.cost_s:.1f} CPU s", flush=True)


def rank_correlations(
    pool: WorkerPool, setup: Setup, found: Mapping[SearchJob, SearchResult], seed: int, costs: Costs
) -> dict[str, Any]:
    """Spearman of each score, and of the cost alone, with the final test accuracy, over all finalists of a seed."""
    finalists = list({c.arch_id: c for job in found if job.seed == seed for c in found[job].finalists}.values())
    truth = [final_top1(setup, c, seed) for c in finalists]
    result: dict[str, Any] = {"n": len(finalists), "cost": correlation([costs.of(c) for c in finalists], truth)}
    for job in found:
        if job.seed == seed and job.scorer != "random":
            scores: dict[Candidate, float] = {}
            for late in pool.map(late_score, [LateScoreJob(job, c) for c in finalists]):
                if isinstance(late.value, JobFailure):
                    raise SystemExit(f"error: {late.job.candidate.arch_id}: {late.value.reason}")
                scores[late.job.candidate] = late.value
            result[job.scorer] = correlation([scores[c] for c in finalists], truth)
    return result


def figures_of(setup: Setup, job: SearchJob, result: SearchResult, costs: Costs) -> dict[str, Any]:
    """Figures of one search on the test split."""
    ends = sorted(costs.of(setup.space.decode(g)) for g in (setup.space.smallest(), setup.space.largest()))
    cost = [costs.of(c) for c in result.finalists]
    top1 = [final_top1(setup, c, job.seed) for c in result.finalists]
    order = np.argsort(cost)
    return {
        "scorer": job.scorer,
        "seed": job.seed,
        "scored": result.scored,
        "cpu_s": result.cpu_s,
        "hypervolume_log": covered(top1, cost, *ends, log=True),
        "hypervolume_linear": covered(top1, cost, *ends, log=False),
        "finalists": [{"cost": cost[i], "test_top1": top1[i]} for i in order],
    }


def main() -> None:
    """Prints the estimate, then a line per finished part, then the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--cpu-seconds", type=float, default=150.0, help="budget of each search (default 150)")
    parser.add_argument("--seeds", type=int, default=3, help="searches per scorer (default 3)")
    parser.add_argument("--finals", type=int, default=6, help="finalists per search (default 6)")
    parser.add_argument("--final-epochs", type=int, default=24, help="full distillation of each (default 24)")
    parser.add_argument("--train-share", type=float, default=0.75, help="of the supernet's budget (default 0.75)")
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS))
    parser.add_argument("--space", default="tiny-32", help="name or file (default tiny-32)")
    parser.add_argument("--table", help="folder of a latency table; without it cost is multiply-adds")
    parser.add_argument("--train-images", type=int, default=4000, help="of the embedded set (default 4000)")
    parser.add_argument("--teacher-epochs", type=int, default=TeacherSettings().epochs)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--cache", default=".nas-cache", help="teacher and cached answers (default .nas-cache)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nas-scorers-") as folder, WorkerPool(args.workers) as pool:
        setup, costs = prepare(args, Path(folder)), Costs(args.table)
        _print_estimate(args, setup)
        found = run_searches(pool, setup, args.scorers, args.seeds)
        run_finals(pool, setup, found)
        rows = [figures_of(setup, job, result, costs) for job, result in found.items()]
        ranks = [rank_correlations(pool, setup, found, seed, costs) for seed in range(args.seeds)]
        _report(args, costs, rows, ranks)


def _print_estimate(args: Any, setup: Setup) -> None:
    epoch_s = epoch_seconds(setup)
    budgeted = sum(scorer != "random" for scorer in args.scorers)
    finals = len(args.scorers) * args.finals * args.final_epochs * epoch_s
    late = "standalone" in args.scorers and len(args.scorers) * args.finals * setup.standalone.rungs[-1] * epoch_s
    total = args.seeds * (budgeted * args.cpu_seconds + finals + late)
    print(
        f"estimate: {total:.0f} CPU s, {total / max(1, args.workers) / 60:.1f} minutes on {args.workers} idle cores "
        f"(one epoch of a middle network: {epoch_s:.2f} CPU s)",
        flush=True,
    )


def _report(args: Any, costs: Costs, rows: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]) -> None:
    summary = {}
    for scorer in args.scorers:
        own = [r for r in rows if r["scorer"] == scorer]
        rhos = [r[scorer] for r in ranks if r.get(scorer) is not None]
        summary[scorer] = {
            "hypervolume_log": common.spread([r["hypervolume_log"] for r in own]),
            "hypervolume_log_mean": statistics.fmean(r["hypervolume_log"] for r in own),
            "hypervolume_linear_mean": statistics.fmean(r["hypervolume_linear"] for r in own),
            "cpu_s_mean": statistics.fmean(r["cpu_s"] for r in own),
            "rank_correlation_mean": statistics.fmean(rhos) if rhos else None,
        }
    cost_rhos = [r["cost"] for r in ranks if r["cost"] is not None]
    table = [
        (
            r["scorer"],
            r["seed"],
            r["scored"],
            round(r["cpu_s"], 1),
            round(r["hypervolume_log"], 4),
            round(r["hypervolume_linear"], 4),
            ranks[r["seed"]].get(r["scorer"]),
            " ".join(f"{f['cost']:.2f}:{100 * f['test_top1']:.1f}" for f in r["finalists"]),
        )
        for r in rows
    ]
    means = [
        (
            scorer,
            "mean",
            "",
            round(s["cpu_s_mean"], 1),
            round(s["hypervolume_log_mean"], 4),
            round(s["hypervolume_linear_mean"], 4),
            s["rank_correlation_mean"],
            "",
        )
        for scorer, s in summary.items()
    ]
    columns = ("scorer", "seed", "scored", "CPU s", "HV log", "HV linear", "rho", f"finalists ({costs.unit}:test %)")
    title = (
        f"{args.space}, budget {args.cpu_seconds:g} CPU s, {args.finals} finalists of {args.final_epochs} epochs, "
        f"{args.seeds} seeds; hypervolume on test above {REFERENCE_TOP1:g}; rho: Spearman of the score with final test "
        f"accuracy over all finalists of the seed (cost alone: {_shown(cost_rhos)})"
    )
    document = {"options": vars(args), "summary": summary, "searches": list(rows), "rank_correlations": list(ranks)}
    common.report(title, columns, table + means, document, args.json)


def _shown(rhos: Sequence[float]) -> str:
    return f"{statistics.fmean(rhos):.2f}" if rhos else "undefined"


if __name__ == "__main__":
    sys.exit(main())
