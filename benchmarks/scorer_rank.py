"""How well does each scorer rank students as they end? Rank correlation with finished accuracy on the test split.

Truth: students of the space, at equal ranks of multiply-adds among random ones, each distilled in full with several
seeds; the mean of their test accuracies. A scorer with seeds is scored with each of them; the interval is a bootstrap
over students. Each scorer ranks by what a search ranks by, the mean probability of the right label, and for comparison
by the share of right answers. `within thirds` is the mean correlation inside thirds by multiply-adds: a search under a
deadline compares networks of similar cost.

Run: python -m benchmarks.scorer_rank [--students 24] [--seeds 3] [--scorers supernet] [--folder DIR] [--json]
The same command goes on.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

from benchmarks import common
from nas.core.jsonio import read_record
from nas.core.records import Candidate, DeviceProfile
from nas.core.walk import total_macs
from nas.data import load_dataset
from nas.latency.estimate import Estimator
from nas.latency.table import LatencyTable
from nas.recipe.context import open_context, write_context
from nas.recipe.finish import FinishJob, finish_student, finished_logits
from nas.recipe.pool import JobFailure, WorkerPool
from nas.recipe.records import read_scored
from nas.recipe.score import ScoreJob, score, student_folder
from nas.recipe.supernet import train_supernet
from nas.search.experiment import Experiment, load_experiment
from nas.search.prepare import SCORE_IMAGES
from nas.search.select import stratified
from nas.space.space import SearchSpace, load_space
from nas.train.contributors import prepare_targets
from nas.train.evaluate import top1

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
RANDOM_POOL = 2048  # random networks of which the students are taken
RESAMPLES = 2000
SCORERS = ("supernet", "standalone")
CALIBRATION_IMAGES = 16  # of finishing; int8 is not looked at here

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all jobs share; `students` are architectures in fp32, by rising multiply-adds."""

    experiment: Experiment
    space: SearchSpace
    students: tuple[Candidate, ...]
    folder: Path
    context: str
    pool: WorkerPool
    seeds: int

    @property
    def stop_file(self) -> str:
        return str(self.folder / "stop")

    def run(self, title: str, function: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        """All jobs; those that an earlier call finished cost nothing."""
        for done, result in enumerate(self.pool.map(function, jobs), start=1):
            if isinstance(result.value, JobFailure):
                raise SystemExit(f"error: {title}: {result.job.candidate.arch_id}: {result.value.reason}")
            print(
                f"\r{title}: {done} of {len(jobs)}", end="\n" if done == len(jobs) else "", file=sys.stderr, flush=True
            )


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """Scores [S, N] of every student with each seed, CPU seconds per student, and those spent once on all of them."""

    name: str
    scores: Scores
    cpu_s: float = 0.0
    once_cpu_s: float = 0.0


def truths(bench: Bench) -> tuple[Scores, float]:
    """Test accuracy [S, N] of every student distilled in full with every seed, and CPU seconds of one."""
    e = bench.experiment
    folders = [[bench.folder / f"finals-{s}" / c.arch_id for c in bench.students] for s in range(bench.seeds)]
    jobs = [
        FinishJob(c, bench.context, str(folder), bench.stop_file, e.distill, seed, CALIBRATION_IMAGES, ())
        for seed, row in enumerate(folders)
        for c, folder in zip(bench.students, row, strict=True)
    ]
    results: dict[str, float] = {}
    for done, result in enumerate(bench.pool.map(finish_student, jobs), start=1):
        if isinstance(result.value, JobFailure):
            raise SystemExit(f"error: {result.job.candidate.arch_id}: {result.value.reason}")
        results[result.job.folder] = result.value.cost_s
        print(f"full distillation: {done} of {len(jobs)}", file=sys.stderr)
    labels = np.asarray(open_context(bench.context, max(bench.space.resolution)).test_labels)
    found = [[top1(finished_logits(f, "test", ("fp32",))[-1], labels) for f in row] for row in folders]
    return np.array(found), statistics.fmean(results.values())


def standalone(bench: Bench) -> list[Scorer]:
    """Scores after each rung of the standalone scorer's schedule; a longer one goes on from a shorter one."""
    e = bench.experiment
    rungs = e.standalone.rungs
    distill = replace(e.distill, epochs=rungs[-1])
    found = {rung: np.zeros((2, bench.seeds, len(bench.students))) for rung in rungs}
    cost = dict.fromkeys(rungs, 0.0)
    for rung in rungs:
        jobs = [
            ScoreJob(
                c, "standalone", bench.context, str(bench.folder / f"standalone-{seed}"), "", bench.stop_file, distill,
                rung, seed, SCORE_IMAGES,
            )
            for seed in range(bench.seeds)
            for c in bench.students
        ]  # fmt: skip
        bench.run(f"{rung} epochs", score, jobs)
        for i, job in enumerate(jobs):
            known = _known(job)
            found[rung][:, *divmod(i, len(bench.students))] = known[:2]
            for longer in (r for r in rungs if r >= rung):
                cost[longer] += known[2] / len(jobs)
    return [s for rung in rungs for s in _both(f"standalone, {rung} of {rungs[-1]} epochs", found[rung], cost[rung])]


def supernet(bench: Bench, cpu_seconds: float, images: int) -> list[Scorer]:
    """Scores with inherited weights of a supernet of so many CPU seconds, batch norm from so many images."""
    e = bench.experiment
    targets = {side: open_context(bench.context, side).targets for side in bench.space.resolution}
    found = np.zeros((2, bench.seeds, len(bench.students)))
    cost = once = 0.0
    for seed in range(bench.seeds):
        home = bench.folder / f"supernet-{cpu_seconds:g}-{seed}"
        settings = replace(e.supernet, steps=None, cpu_seconds=cpu_seconds, seed=seed)
        print(f"supernet of {cpu_seconds:g} CPU s, seed {seed}", file=sys.stderr)
        trained = train_supernet(bench.space, targets, e.distill, settings, home, workers=bench.pool.workers)
        once += trained.cpu_s / bench.seeds
        jobs = [
            ScoreJob(
                c, "supernet", bench.context, str(home / f"students-{images}"), str(home), bench.stop_file, e.distill,
                0, seed, images,
            )
            for c in bench.students
        ]  # fmt: skip
        bench.run(f"supernet of {cpu_seconds:g} CPU s, {images} images, seed {seed}", score, jobs)
        for i, job in enumerate(jobs):
            *found[:, seed, i], cpu_s = _known(job)
            cost += cpu_s / (len(jobs) * bench.seeds)
    return _both(f"supernet of {cpu_seconds:g} CPU s, {images} images", found, cost, once)


def _both(name: str, found: Scores, cpu_s: float, once_cpu_s: float = 0.0) -> list[Scorer]:
    """Scores [2, S, N] by probability and by right answers."""
    soft, right = found
    return [Scorer(name, soft, cpu_s, once_cpu_s), Scorer(f"{name}, right answers", right, cpu_s, once_cpu_s)]


def _known(job: ScoreJob) -> tuple[float, float, float]:
    """Score of the head, its share of right answers, and CPU seconds of a score that is there."""
    scored = read_scored(student_folder(job.students, job.candidate.arch_id), job.name)
    if scored is None:
        raise SystemExit(f"error: no score of {job.candidate.arch_id}")
    return scored.score, scored.top1[-1], scored.cost_s


def rank_sum(name: str, a: Scorer, b: Scorer) -> Scorer:
    """The sum of the ranks that two scorers give, seed by seed."""
    count = max(len(a.scores), len(b.scores))
    ranks = [rankdata(np.broadcast_to(s.scores, (count, s.scores.shape[1])), axis=1) for s in (a, b)]
    return Scorer(name, ranks[0] + ranks[1], a.cpu_s + b.cpu_s, a.once_cpu_s + b.once_cpu_s)


def spearman(scores: Scores, truth: Scores) -> float:
    """Mean over seeds of Spearman's rank correlation of scores [S, N] with the truth [N]."""
    a, b = rankdata(scores, axis=1), rankdata(truth)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean()
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum())
    return float(np.mean(a @ b / np.where(norm > 0, norm, 1.0)))


def figures(scorer: Scorer, truth: Scores) -> dict[str, Any]:
    """Correlations of a scorer with the truth [N]; students are in order of multiply-adds."""
    count = len(truth)
    rng = np.random.default_rng(0)
    again = [spearman(scorer.scores[:, i], truth[i]) for i in rng.integers(0, count, (RESAMPLES, count))]
    thirds = [spearman(scorer.scores[:, i], truth[i]) for i in np.array_split(np.arange(count), 3)]
    best = [float(truth[row.argmax()]) for row in scorer.scores]
    return {
        "scorer": scorer.name,
        "spearman": spearman(scorer.scores, truth),
        "spearman_by_seed": [spearman(row[None], truth) for row in scorer.scores],
        "spearman_90": [float(q) for q in np.quantile(again, (0.05, 0.95))],
        "kendall": statistics.fmean(float(kendalltau(row, truth).statistic) for row in scorer.scores),
        "within_thirds": statistics.fmean(thirds),
        "regret_points": 100 * (float(truth.max()) - statistics.fmean(best)),
        "cpu_s_per_student": scorer.cpu_s,
        "cpu_s_once": scorer.once_cpu_s,
    }


def between_seeds(truth: Scores) -> float:
    """Mean correlation of one seed's truth with the mean of the others': no scorer can be expected to do better."""
    if len(truth) < 2:
        return float("nan")
    others = [np.delete(truth, s, axis=0).mean(axis=0) for s in range(len(truth))]
    return statistics.fmean(spearman(truth[s][None], others[s]) for s in range(len(truth)))


def open_bench(options: Any, pool: WorkerPool) -> Bench:
    """Data, teacher's answers and students."""
    e = load_experiment(options.experiment, options.sets)
    draft = load_space(Path(e.space), 2)
    datasets = tuple(load_dataset(e.data, side) for side in sorted(draft.resolution))
    space = replace(draft, num_classes=datasets[-1].num_classes)
    cache = options.folder / "cache"
    taught = prepare_targets(datasets[-1], e.teacher, e.distill.variants, cache, seed=e.data.seed, distill=e.distill)
    context = options.folder / "context.json"
    write_context(context, datasets, taught.targets, cache, e.data.seed)
    samples = space.sample_many(np.random.default_rng(0), RANDOM_POOL)
    distinct = list({c.arch_id: c for row in samples for c in [space.decode(row).architecture]}.values())
    chosen = stratified([total_macs(c) for c in distinct], options.students)
    students = tuple(distinct[i] for i in chosen)
    return Bench(e, space, students, options.folder, str(context.resolve()), pool, options.seeds)


def main(arguments: list[str]) -> int:
    """Scores and finishes all students, then prints the correlations; gives the exit code."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data, teacher and recipe")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--students", type=int, default=24, help="of the space (default 24)")
    options.add_argument("--seeds", type=int, default=3, help="of truth and of scorers (default 3)")
    options.add_argument(
        "--supernet-cpu", type=float, nargs="+", default=[40.0], metavar="S", help="CPU s of supernets"
    )
    options.add_argument("--images", type=int, nargs="+", default=[SCORE_IMAGES], help="for batch norm of a subnet")
    options.add_argument(
        "--scorers", nargs="+", choices=SCORERS, default=SCORERS, help="beside multiply-adds; a standalone one is dear"
    )
    options.add_argument("--table", type=Path, help="folder of a latency table with all rows")
    options.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options.add_argument("--folder", type=Path, default=Path("runs/bench-scorer-rank"), help="kept, and gone on with")
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with WorkerPool(chosen.workers) as pool:
        bench = open_bench(chosen, pool)
        by_macs = Scorer("multiply-adds", np.array([[total_macs(c) for c in bench.students]], np.float64))
        scorers = [by_macs]
        if chosen.table is not None:
            table = LatencyTable.open(chosen.table, read_record(DeviceProfile, chosen.table / "device.json"))
            estimator = Estimator(table)
            scorers.append(
                Scorer("table latency", np.array([[estimator.estimate(c).worst_ms for c in bench.students]]))
            )
        budgets = product(chosen.supernet_cpu, chosen.images) if "supernet" in chosen.scorers else ()
        nets = [x for cpu_s, images in budgets for x in supernet(bench, cpu_s, images)]
        alone = standalone(bench) if "standalone" in chosen.scorers else []
        scorers += [*nets, *alone]
        scorers += [rank_sum(f"ranks of {s.name} + multiply-adds", s, by_macs) for s in (*nets, *alone)]
        scorers += [rank_sum(f"ranks of {net.name} + {s.name}", net, s) for net in nets[:1] for s in alone]
        by_seed, finish_cpu_s = truths(bench)
    truth = by_seed.mean(axis=0)
    found = [figures(s, truth) for s in scorers]
    keys = ("scorer", "spearman", "spearman_90", "kendall", "within_thirds", "regret_points", "cpu_s_per_student")
    rows = [[_shown(f[k]) for k in keys] for f in found]
    ceiling = between_seeds(by_seed)
    title = (
        f"{len(truth)} students, {bench.experiment.distill.epochs} epochs, {chosen.seeds} seeds, test accuracy "
        f"{100 * truth.min():.1f} to {100 * truth.max():.1f} %; one seed against the others: {ceiling:.2f}"
    )
    document = {
        "students": [{"arch_id": c.arch_id, "macs": total_macs(c)} for c in bench.students],
        "test_top1": by_seed.tolist(),
        "between_seeds": ceiling,
        "finish_cpu_s": finish_cpu_s,
        "figures": found,
    }
    columns = ("scorer", "Spearman", "90 %", "Kendall", "within thirds", "lost points", "CPU s per student")
    common.report(title, columns, rows, document, chosen.json)
    return 0


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return " .. ".join(f"{v:.2f}" for v in value)
    return f"{value:.2f}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
