"""All calls to Optuna: samplers that propose genotypes inside the budget, and the study that users can open.

The working study lives in memory and is rebuilt from the run's own trial records: one durable line per trial costs
microseconds where 30 suggest calls on SQLite cost 84 ms, and a killed process leaves no RUNNING trial behind.
Finished trials are mirrored into `study.db` for dashboards and Optuna's own plots.

Over-budget proposals are told PRUNED and never trained: at equal trainings this beats constrained sampling for TPE and
NSGA-II alike (Optuna's default univariate TPE loses to random search on such spaces and is not offered).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from nas.core.errors import StorageError
from nas.core.run import Importance
from nas.search.settings import SamplerName
from nas.space.layout import Gene
from nas.space.space import SearchSpace

Genotype = tuple[int, ...]

TPE_MAX_TRIALS = 300  # multivariate TPE costs 40 ms a trial at 1,000 trials and 160 at 5,000; NSGA-II 2-5 ms
MAX_ASKS_PER_PROPOSAL = 60
METRICS = ("top1", "latency_ms")

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Scored:
    """What the sampler learns of a scored candidate: share of right answers (maximised), milliseconds (minimised)."""

    genotype: Genotype
    top1: float
    latency_ms: float
    excess_ms: float
    label: str


def choose_sampler(name: SamplerName, trials: int) -> tuple[str, str]:
    """The sampler that `auto` stands for, and the reason in words."""
    if name != "auto":
        return name, "asked for"
    if trials <= TPE_MAX_TRIALS:
        return "tpe", f"multivariate TPE inside the budget leads up to {TPE_MAX_TRIALS} trials"
    return (
        "nsga2",
        f"NSGA-II with a small population: more than {TPE_MAX_TRIALS} trials, and TPE's cost per trial grows",
    )


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """One distribution per gene that has a choice: integers in equal steps stay numbers, all else is categorical."""
    return {gene.name: _distribution(gene) for gene in space.genes if len(gene.choices) > 1}


def _distribution(gene: Gene) -> BaseDistribution:
    choices = gene.choices
    if all(isinstance(c, int) and not isinstance(c, bool) for c in choices):
        numbers = [int(c) for c in choices if c is not None]
        steps = {b - a for a, b in pairwise(numbers)}
        if len(steps) == 1 and (step := steps.pop()) > 0:
            return IntDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(choices)


def to_params(space: SearchSpace, genotype: Genotype) -> dict[str, Any]:
    """Optuna's parameters of a genotype."""
    return {
        gene.name: gene.choices[index]
        for gene, index in zip(space.genes, genotype, strict=True)
        if len(gene.choices) > 1
    }


def to_genotype(space: SearchSpace, params: dict[str, Any]) -> Genotype:
    """Canonical genotype of Optuna's parameters."""
    return space.canonical(tuple(gene.choices.index(params.get(gene.name, gene.choices[0])) for gene in space.genes))


class Proposer:
    """Proposes new genotypes inside the budget, from what was scored so far.

    Args:
        space: the search space.
        sampler: `tpe`, `nsga2` or `random`.
        seed: of this run; the number of known trials is mixed in, so a resumed run does not repeat its proposals.
        planned: number of trials of the whole search (sets NSGA-II's population).
        in_budget: True for a genotype whose predicted latency keeps the budget.
        known: candidates scored before, with re-estimated latencies.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: str,
        seed: int,
        planned: int,
        in_budget: Callable[[Genotype], bool],
        known: Iterable[Scored],
    ) -> None:
        self.space = space
        self._distributions = distributions(space)
        self._in_budget = in_budget
        self._seen: set[Genotype] = set()
        known = list(known)
        self._rng = np.random.default_rng((seed, len(known)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                directions=["maximize", "minimize"],
                sampler=_sampler(sampler, int(self._rng.integers(2**31)), planned),
            )
        for scored in known:
            self.learn(scored)

    def learn(self, scored: Scored) -> None:
        """Adds a scored candidate that did not come from `ask` of this object."""
        self._seen.add(scored.genotype)
        self._study.add_trial(_frozen(self.space, self._distributions, scored))

    def seen(self, genotype: Genotype) -> bool:
        """True when the genotype was proposed or scored already."""
        return genotype in self._seen

    def ask(self) -> tuple[int, Genotype] | None:
        """Trial number of this study and a new canonical genotype in budget; None when no new one can be found.

        The sampler gets `MAX_ASKS_PER_PROPOSAL` tries; then random candidates inside the budget are taken.
        """
        for _ in range(MAX_ASKS_PER_PROPOSAL):
            trial = self._study.ask(self._distributions)
            genotype = to_genotype(self.space, trial.params)
            if genotype not in self._seen and self._in_budget(genotype):
                self._seen.add(genotype)
                return trial.number, genotype
            self._study.tell(trial, state=TrialState.PRUNED)
        for _ in range(MAX_ASKS_PER_PROPOSAL * 20):
            genotype = self.space.sample(self._rng)
            if genotype not in self._seen and self._in_budget(genotype):
                self._seen.add(genotype)
                self._study.enqueue_trial(to_params(self.space, genotype))
                return self._study.ask(self._distributions).number, genotype
        return None

    def tell(self, number: int, scored: Scored | None) -> None:
        """Result of an asked trial; None: it failed or was stopped early."""
        if scored is None:
            self._study.tell(number, state=TrialState.PRUNED)
            return
        trial = optuna.trial.Trial(
            self._study, self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        )
        trial.set_constraint("over_budget_ms", scored.excess_ms)
        self._study.tell(number, (scored.top1, scored.latency_ms))


def _sampler(name: str, seed: int, planned: int) -> optuna.samplers.BaseSampler:
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=12, constant_liar=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, planned // 25)))
    return optuna.samplers.RandomSampler(seed=seed)


def _frozen(
    space: SearchSpace, known: dict[str, BaseDistribution], scored: Scored, attributes: dict[str, Any] | None = None
) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        values=(scored.top1, scored.latency_ms),
        params=to_params(space, scored.genotype),
        distributions=known,
        constraints={"over_budget_ms": scored.excess_ms},
        user_attrs={"candidate": scored.label, **(attributes or {})},
    )


def mirror(path: Path, name: str, space: SearchSpace, trials: Sequence[tuple[Scored, dict[str, Any]]]) -> None:
    """Adds to the study on disk (`study.db`, SQLite) the trials that it does not have yet, in order.

    Raises:
        StorageError: the database cannot be written.
    """
    known = distributions(space)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        present = len(study.get_trials(deepcopy=False))
        if present == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(METRICS))
        for scored, attributes in trials[present:]:
            study.add_trial(_frozen(space, known, scored, attributes))
    except Exception as e:  # SQLAlchemy's and Optuna's errors have no common base
        raise StorageError(f"{path}: the study cannot be written: {e}") from e


def importances(space: SearchSpace, trials: Sequence[Scored]) -> tuple[Importance, ...]:
    """Share of each gene in the spread of accuracy and latency over the trials (PED-ANOVA); empty below 10 trials.

    Source: Watanabe et al. 2023, arXiv 2304.10255, as in Optuna.
    """
    if len(trials) < 10:
        return ()
    known = distributions(space)
    study = optuna.create_study(directions=["maximize", "minimize"])
    for scored in trials:
        study.add_trial(_frozen(space, known, scored))
    shares: list[dict[str, float]] = []
    for axis, sign in ((0, -1.0), (1, 1.0)):

        def target(trial: optuna.trial.FrozenTrial, axis: int = axis, sign: float = sign) -> float:
            return sign * trial.values[axis]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            shares.append(optuna.importance.get_param_importances(study, evaluator=evaluator, target=target))
    genes = sorted(known, key=lambda g: -(shares[0].get(g, 0.0) + shares[1].get(g, 0.0)))
    return tuple(Importance(gene, shares[0].get(gene, 0.0), shares[1].get(gene, 0.0)) for gene in genes)
