"""Syne Tune's multi-objective searchers (Salinas et al. 2022), to compare samplers with; not a dependency.

Install it beside the project to run them: `pip install syne-tune botorch` in an environment that sees the project's.
They know no constraints, so a proposal over the budget is told its latency and an error above the largest that was
seen, the more the more it is over: every network within the budget beats it, and it costs no training. A repeated
network is told what was seen.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import numpy as np

from benchmarks.problems import Genotypes, Problem

FOLDER = "syne_tune.optimizer.schedulers.multiobjective"


@dataclass(frozen=True, slots=True)
class Searcher:
    """One of its searchers.

    Attributes:
        name: in tables.
        module: that has it.
        class_name: in the module.
        needs: package beside Syne Tune.
        population: its `population_size`, if it has one.
        is_dear: whether an ask costs a tenth of a second and more.
    """

    name: str
    module: str
    class_name: str
    needs: str = "syne_tune"
    population: int | None = None
    is_dear: bool = False


SEARCHERS = (
    # A population as large as that of Optuna's NSGA-II here; its default is 100.
    Searcher(
        "MO-REA", f"{FOLDER}.multi_objective_regularized_evolution", "MultiObjectiveRegularizedEvolution", population=20
    ),
    Searcher(
        "EHVI",
        f"{FOLDER}.expected_hyper_volume_improvement",
        "ExpectedHyperVolumeImprovement",
        needs="botorch",
        is_dear=True,
    ),
)


def installed() -> tuple[Searcher, ...]:
    """Those that can be imported here; none without Syne Tune."""
    return tuple(s for s in SEARCHERS if all(importlib.util.find_spec(name) for name in ("syne_tune", s.needs)))


def search(searcher: Searcher, problem: Problem, count: int, seed: int) -> Genotypes:
    """The networks that were trained, in their order, [<= count, G].

    Args:
        searcher: one of `installed()`.
        problem: what to search.
        count: trainings.
        seed: decides all draws.
    """
    spaces = importlib.import_module("syne_tune.config_space")
    genes = [f"g{i:02d}" for i in range(len(problem.cardinalities))]
    space = {
        gene: spaces.randint(0, size - 1) if ordered else spaces.choice(list(range(size)))
        for gene, size, ordered in zip(genes, problem.cardinalities, problem.ordinal, strict=True)
    }
    settings = {} if searcher.population is None else {"population_size": searcher.population}
    kind = getattr(importlib.import_module(searcher.module), searcher.class_name)
    found = kind(space, points_to_evaluate=[], random_seed=seed, **settings)
    rng = np.random.default_rng([seed, 1])
    trained: dict[tuple[int, ...], list[float]] = {}
    for trial in range(200 * count):
        config = found.suggest()
        genotype = problem.canonical(np.array([[int(config[gene]) for gene in genes]], np.int64))
        key = tuple(genotype[0].tolist())
        ms = float(problem.latency_ms(genotype)[0])
        if ms > problem.budget_ms:
            worst = max((error for error, _ in trained.values()), default=100.0)
            told = [worst + 10 * (ms / problem.budget_ms - 1), ms]
        else:
            if key not in trained:
                trained[key] = [100 - float(problem.train(genotype, rng)[0]), ms]
            told = trained[key]
        found.on_trial_complete(trial, config, told)
        if len(trained) == count:
            break
    return np.array(list(trained))
