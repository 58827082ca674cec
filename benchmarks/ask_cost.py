"""CPU milliseconds of one ask and memory of the process, by number of trained networks in the study.

    python -m benchmarks.ask_cost [--trials 100 300 1000 3000 10000] [--repeats 7] [--json]

The grey-box sampler proposes for the simulated MobileNetV3-like problem (33 genes) in a study in memory, each number of
trials in a process of its own. `first` is the ask of a process that has just come in, with hyper-parameters fitted and
all trials read; `ask` one of those after it, told and asked again; `with refits` adds the share of a first ask that
the refit policy costs each one; `growth` is the exponent of the cost in the number of trials, from the row above. Goal:
60 ms at 300 trials, 250 ms at 3,000, 500 MB at 10,000, growth below 2. Set OPENBLAS_NUM_THREADS=1: threads that wait
for a core count as CPU time.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import optuna

from benchmarks.common import parser, report
from benchmarks.problems import Problem, load_problem
from benchmarks.samplers import distributions, grey_box, random_in_budget
from nas.search.greybox import refit_count


def filled(problem: Problem, count: int) -> optuna.Study:
    """A study with `count` networks within the budget: half random ones, half changed copies of good ones."""
    rng = np.random.default_rng(0)
    rows = random_in_budget(problem, max(count // 2, 1), 0)
    while len(rows) < count:
        best = rows[np.argsort(-problem.accuracy(rows))[: max(20, len(rows) // 5)]]
        parents = best[rng.integers(len(best), size=1000)]
        changed = np.where(rng.random(parents.shape) < 0.08, problem.sample(rng, 1000), parents)
        changed = problem.canonical(changed)
        rows = np.unique(np.concatenate([rows, changed[problem.latency_ms(changed) <= problem.budget_ms]]), axis=0)
        rows = rng.permutation(rows)[:count]
    space = distributions(problem)
    study = optuna.create_study(directions=["maximize", "minimize"])
    values = np.column_stack([problem.train(rows, rng), problem.latency_ms(rows)])
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=dict(zip(space, row, strict=True)),
                distributions=space,
                values=value,
                constraints={"budget": 0.0},
            )
            for row, value in zip(rows.tolist(), values.tolist(), strict=True)
        ]
    )
    return study


def ask_ms(count: int, repeats: int) -> tuple[float, list[float], float]:
    """CPU milliseconds of the first ask and of `repeats` later ones, and the largest memory of the process in MB."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = load_problem("plain")
    rng = np.random.default_rng(1)
    space = distributions(problem)
    study = filled(problem, count)
    study.sampler = grey_box(problem, 0)
    samples = []
    for _ in range(repeats + 1):
        start = time.process_time()
        trial = study.ask(space)
        samples.append(1000 * (time.process_time() - start))
        genotype = np.array([list(trial.params.values())], np.int64)
        trial.set_constraint("budget", 0.0)
        study.tell(trial, (float(problem.train(genotype, rng)[0]), float(problem.latency_ms(genotype)[0])))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return samples[0], samples[1:], peak_mb


def asks_between_refits(count: int) -> int:
    """How many trainings share one fit of the hyper-parameters after `count` of them."""
    start = refit_count(count)
    return next(more for more in range(1, 10_000) if refit_count(start + more) > start)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=int, nargs="+", default=[100, 300, 1000, 3000, 10_000])
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    rows, found = [], {}
    before: tuple[int, float] | None = None
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for count in sorted(args.trials):
            first, later, peak_mb = pool.submit(ask_ms, count, args.repeats).result()
            median = statistics.median(later)
            amortised = median + max(0.0, first - median) / asks_between_refits(count)
            growth = math.nan if before is None else math.log(amortised / before[1]) / math.log(count / before[0])
            before = count, amortised
            rows.append([count, first, median, min(later), max(later), amortised, growth, peak_mb])
            found[count] = {
                "first_ms": first,
                "ask_ms": later,
                "with_refits_ms": amortised,
                "growth": growth,
                "peak_mb": peak_mb,
            }
    columns = ("trials", "first ms", "ask ms", "min", "max", "with refits ms", "growth", "peak MB of the process")
    title = f"one ask of the grey-box sampler, CPU, n {args.repeats}; simulated problem of 33 genes"
    report(title, columns, rows, {"trials": found}, args.json)


if __name__ == "__main__":
    main()
