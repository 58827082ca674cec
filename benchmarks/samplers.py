"""How many trainings does each sampler need for the same front?

    python -m benchmarks.samplers [--problem plain rugged macro accel] [--seeds 10] [--counts 25 50 100 200 500]
        [--methods NAME ...] [--gp] [--data DIR] [--json]

All samplers get the same number of trainings on a problem whose trainings cost nothing, and are scored by the share of
the best known hypervolume of what they trained, without the noise of the trainings. DIR has the published tables; the
other two problems are simulated. `trainings for our 100` is the first count at which the mean share of a sampler
reaches that of the grey-box sampler at 100 trainings.

A proposal that repeats a network is told what was seen and costs nothing. Samplers named `in budget` tell one over the
budget FAIL and do not train it, those with `pruned` PRUNED; all others train it and learn its excess as a constraint.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from benchmarks.common import parser, report
from benchmarks.problems import KINDS, Genotypes, Problem, load_problem
from nas.search.greybox_sampler import GreyBoxSampler

OURS = "grey box"
GP_TRAININGS = 100  # Optuna's GP costs a second an ask
MAX_ASKS = 50  # without a training; then a sampler counts as stuck, and a random network within the budget is trained
Run = Callable[[Problem, int, int], Genotypes]


def _values(problem: Problem, genotype: Genotypes, rng: np.random.Generator) -> tuple[float, float]:
    return float(problem.train(genotype[None], rng)[0]), float(problem.latency_ms(genotype[None])[0])


def random_in_budget(problem: Problem, count: int, seed: int) -> Genotypes:
    """Distinct random networks that keep the budget, [count, G]."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        drawn = problem.sample(rng, 1000)
        found.update(dict.fromkeys(map(tuple, drawn[problem.latency_ms(drawn) <= problem.budget_ms].tolist())))
    return np.array(list(found)[:count])


def with_optuna(make: Callable[[Problem, int, int], optuna.samplers.BaseSampler], over: str) -> Run:
    """A run that asks an Optuna sampler.

    Args:
        make: problem, trainings and seed to a new sampler.
        over: what becomes of a proposal over the budget: `train`, `prune` or `fail`.
    """

    def run(problem: Problem, count: int, seed: int) -> Genotypes:
        rng = np.random.default_rng([seed, 1])
        space = distributions(problem)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(problem, count, seed))
        trained: dict[tuple[int, ...], tuple[float, float]] = {}
        spare = iter(random_in_budget(problem, 2 * count, seed + 1000).tolist())
        asks = 0
        while len(trained) < count:
            asks += 1
            if asks > MAX_ASKS:
                study.enqueue_trial(dict(zip(space, next(spare), strict=True)))
            trial = study.ask(space)
            genotype = problem.canonical(np.array([[trial.params[name] for name in space]], np.int64))[0]
            key = tuple(genotype.tolist())
            excess = float(problem.latency_ms(genotype[None])[0]) / problem.budget_ms - 1
            trial.set_constraint("over_budget", excess)
            if excess > 0 and over != "train":
                states = {"prune": optuna.trial.TrialState.PRUNED, "fail": optuna.trial.TrialState.FAIL}
                study.tell(trial, state=states[over])
                continue
            if key not in trained:
                trained[key] = _values(problem, genotype, rng)
                asks = 0
            study.tell(trial, trained[key])
        return np.array(list(trained))

    return run


def distributions(problem: Problem) -> dict[str, optuna.distributions.BaseDistribution]:
    """One parameter for each gene: its index, a number where the gene is ordered."""
    return {
        f"g{i:02d}": optuna.distributions.IntDistribution(0, size - 1)
        if ordered
        else optuna.distributions.CategoricalDistribution(tuple(range(size)))
        for i, (size, ordered) in enumerate(zip(problem.cardinalities, problem.ordinal, strict=True))
    }


def grey_box(problem: Problem, count: int, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001 - as the others
    """Our sampler; the latency table is exact."""

    def latency(genotypes: Genotypes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ms = problem.latency_ms(genotypes)[:, None]
        return ms, np.zeros_like(ms)

    return GreyBoxSampler(distributions(problem), latency, (problem.budget_ms,), canonical=problem.canonical, seed=seed)


def _tpe(multivariate: bool) -> Callable[[Problem, int, int], optuna.samplers.BaseSampler]:
    return lambda problem, count, seed: optuna.samplers.TPESampler(multivariate=multivariate, seed=seed)  # noqa: ARG005


def _nsga2(problem: Problem, count: int, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


METHODS: dict[str, Run] = {
    OURS: with_optuna(grey_box, "train"),
    "random in budget": random_in_budget,
    "random": with_optuna(lambda _, __, seed: optuna.samplers.RandomSampler(seed=seed), "train"),
    "NSGA-II": with_optuna(_nsga2, "train"),
    "NSGA-II in budget": with_optuna(_nsga2, "fail"),
    "TPE": with_optuna(_tpe(False), "train"),
    "TPE multivariate": with_optuna(_tpe(True), "train"),
    "TPE multivariate, pruned": with_optuna(_tpe(True), "prune"),
    "GP": with_optuna(lambda _, __, seed: optuna.samplers.GPSampler(seed=seed), "train"),
}


def shares_of(
    problem: Problem, names: Sequence[str], count: int, seeds: int
) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Per method the share of the best hypervolume after each training, [seeds, trainings], and CPU ms per training."""
    result = {}
    for name in names:
        trainings = min(count, GP_TRAININGS) if name == "GP" else count
        started = time.process_time()
        runs = [METHODS[name](problem, trainings, seed) for seed in range(seeds)]
        cost_ms = 1000 * (time.process_time() - started) / (seeds * trainings)
        result[name] = np.array([problem.shares(run) for run in runs]), cost_ms
    return result


def trainings_for(mean_shares: NDArray[np.float64], level: float) -> str:
    """The first number of trainings at which a mean share reaches a level, in words."""
    reached = np.flatnonzero(mean_shares >= level)
    return str(int(reached[0]) + 1) if len(reached) else f">{len(mean_shares)}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--problem", nargs="+", default=["plain", "rugged"], choices=KINDS)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100, 200, 500])
    options.add_argument("--methods", nargs="+", choices=list(METHODS), help="all but GP unless given")
    options.add_argument("--gp", action="store_true", help=f"Optuna's GP as well, up to {GP_TRAININGS} trainings")
    options.add_argument("--data", type=Path, help="folder of the published tables, for macro and accel")
    args = options.parse_args()
    names = args.methods or [name for name in METHODS if name != "GP" or args.gp]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    document: dict[str, Any] = {"seeds": args.seeds, "counts": args.counts, "problems": {}}
    for kind in args.problem:
        problem = load_problem(kind, args.data)
        rows, found = [], {}
        for name, (shares, cost_ms) in shares_of(problem, names, max(args.counts), args.seeds).items():
            means = shares.mean(axis=0)
            if name == OURS:
                level = means[min(100, len(means)) - 1]
            needed = trainings_for(means, level) if OURS in names else "-"
            cells = [
                f"{means[c - 1]:.3f} +- {shares[:, c - 1].std():.3f}" if c <= len(means) else "-" for c in args.counts
            ]
            rows.append([name, *cells, needed, cost_ms])
            found[name] = {
                "mean": {c: float(means[c - 1]) for c in args.counts if c <= len(means)},
                "sd": {c: float(shares[:, c - 1].std()) for c in args.counts if c <= len(means)},
                "trainings_for_our_100": needed,
                "cpu_ms_per_training": cost_ms,
            }
        document["problems"][kind] = found
        simulated = "simulated" if problem.everything is None else "published table"
        columns = ("sampler", *(f"at {c}" for c in args.counts), "trainings for our 100", "CPU ms per training")
        title = f"{kind} ({simulated}), n {args.seeds}: share of the best known hypervolume, mean +- sd"
        report(title, columns, rows, {}, False)
        print()
    report("conditions", ("seeds", "counts"), [[args.seeds, args.counts]], document, args.json)


if __name__ == "__main__":
    main()
