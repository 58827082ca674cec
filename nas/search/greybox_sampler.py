"""The grey-box proposer as an Optuna sampler, for ask and tell or `optimize` in anyone's study.

    sampler = GreyBoxSampler(
        {"depth": IntDistribution(2, 4), "kernel": CategoricalDistribution((3, 5, 7))},
        for_each(lambda params: table[params["depth"], params["kernel"]], space),
        budgets_ms=(5.0,),
        seed=0,
    )
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=100)

The whole network is proposed when a trial asks for its first parameter, from what the storage holds at that moment and
a seed made of the sampler's and the trial's number: processes that share a study need nothing else in common, and a
resumed search does not repeat itself. What the sampler remembers between asks saves time and changes nothing, unless it
is asked to propose in batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.core.errors import BudgetError, ConfigError
from nas.search.greybox import (
    Effort,
    GreyBoxProblem,
    Hyperparameters,
    Scored,
    fit_hyperparameters,
    propose,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Latency = Callable[[IntArray], tuple[FloatArray, FloatArray]]

PROPOSAL = "greybox:genotype"  # system attribute: other workers see a proposal before its parameters are stored
FIXED = "fixed_params"  # Optuna's system attribute of a queued trial
MAX_CHOICES = 256


def choices_of(name: str, distribution: BaseDistribution) -> tuple[Any, ...]:
    """The values of a parameter, in the order of its gene's indices.

    Raises:
        ConfigError: it has no finite list of values, or more than `MAX_CHOICES`.
    """
    if isinstance(distribution, CategoricalDistribution):
        found: tuple[Any, ...] = distribution.choices
    elif isinstance(distribution, IntDistribution) and not distribution.log:
        found = tuple(range(distribution.low, distribution.high + 1, distribution.step))
    elif isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = int(np.floor((distribution.high - distribution.low) / distribution.step + 1e-8)) + 1
        found = tuple(distribution.low + i * distribution.step for i in range(count))
    else:
        raise ConfigError(
            f"search_space: {name}: {distribution}; allowed: categories, integers, and floats with a step, not on a "
            "logarithmic scale. Give the values as categories"
        )
    if len(found) > MAX_CHOICES:
        raise ConfigError(f"search_space: {name}: {len(found)} values; allowed: {MAX_CHOICES}. Use a larger step")
    return found


def is_ordered(choices: Sequence[Any]) -> bool:
    """Whether neighbouring choices are alike: numbers that rise or fall."""
    if not all(isinstance(c, int | float) and not isinstance(c, bool) for c in choices):
        return False
    steps = np.sign(np.diff(np.array(choices, float)))
    return bool((steps > 0).all() or (steps < 0).all())


def for_each(
    latency: Callable[[dict[str, Any]], float | Sequence[float]], search_space: Mapping[str, BaseDistribution]
) -> Latency:
    """The latency of many genotypes from a function of one network's parameters, without deviation.

    A proposal looks at some thousands of networks, of which each is computed once; where the function takes longer than
    some microseconds, give `GreyBoxSampler` one that takes arrays.

    Args:
        latency: parameters to milliseconds, one number or one for each device; NaN where unknown.
        search_space: as given to the sampler.
    """
    choices = {name: choices_of(name, distribution) for name, distribution in search_space.items()}
    known: dict[tuple[int, ...], Any] = {}

    def many(genotypes: IntArray) -> tuple[FloatArray, FloatArray]:
        rows = []
        for key in map(tuple, genotypes.tolist()):
            if key not in known:
                params = {name: values[i] for (name, values), i in zip(choices.items(), key, strict=True)}
                known[key] = latency(params)
            rows.append(known[key])
        ms = np.array(rows, np.float64).reshape(len(genotypes), -1)
        return ms, np.zeros_like(ms)

    return many


class GreyBoxSampler(optuna.samplers.BaseSampler):
    """Proposes complete networks within a latency budget; see `nas.search.greybox` for the method.

    Complete trials teach it; of those that break a constraint only the accuracy. Running and queued trials count as
    pending. Pruned and failed trials teach nothing, and their networks are not proposed again: repeat one with
    `enqueue_trial`. The values of latency objectives are not looked at, because the latency function knows them, for
    trained networks too when a table was corrected since.

    Args:
        search_space: distributions by name, the same in all trials: categories, integers, or floats with a step.
        latency: genotypes int64 [N, G] in the order of `search_space`, as indices of the values, to milliseconds [N, D]
            and their standard deviations [N, D]; NaN where unknown. Limits that are known beforehand, such as memory,
            belong here too: NaN for a network that must not be trained. See `for_each`.
        budgets_ms: largest latency on each device, [D]; a network has to keep at least one.
        canonical: genotypes [N, G] to the one that stands for each network; None: all of them differ.
        accuracy: which objective of the study is the accuracy; its direction is the study's.
        margin: standard deviations that the latency has to stay below the budget.
        reference_accuracy: value of the objective from which on a network counts; None: from the first trials.
        seed: together with the trial's number it decides the proposal.
        batch: networks that are proposed together, for searches that tell results in batches: the asks until the next
            result share the work of one. More than the batch are proposed one by one.
        effort: what a proposal may cost.

    Raises:
        ConfigError: a parameter without a finite list of values, or budgets that are not above 0.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution],
        latency: Latency,
        budgets_ms: Sequence[float],
        *,
        canonical: Callable[[IntArray], IntArray] | None = None,
        accuracy: int = 0,
        margin: float = 1.0,
        reference_accuracy: float | None = None,
        seed: int = 0,
        batch: int = 1,
        effort: Effort | None = None,
    ) -> None:
        self._space = dict(search_space)
        self._choices = {name: choices_of(name, distribution) for name, distribution in self._space.items()}
        self._index = {name: {_key(v): i for i, v in enumerate(c)} for name, c in self._choices.items()}
        self._canonical = canonical or np.copy
        self._accuracy = accuracy
        self._reference = reference_accuracy
        self._seed = seed
        self._batch = max(1, batch)
        self._ahead: tuple[bytes, list[list[int]]] = (b"", [])  # proposals that nobody has asked for yet
        self._effort = effort or Effort()
        self._problem = GreyBoxProblem(
            tuple(map(len, self._choices.values())),
            tuple(map(is_ordered, self._choices.values())),
            self._canonical,
            latency,
            tuple(budgets_ms),
            margin=margin,
        )
        self._rows: dict[int, IntArray | None] = {}  # genotype of each finished trial, by its identity in the storage
        self._fitted: tuple[bytes, Hyperparameters] | None = None

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002 - the interface of samplers
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """The search space as given."""
        return dict(self._space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value of a parameter that is not in the search space."""
        rng = np.random.default_rng([self._seed, trial.number, *param_name.encode()])
        sampler = optuna.samplers.RandomSampler(seed=int(rng.integers(2**31)))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The parameters of the network to train; of a queued trial those that were left open.

        Raises:
            BudgetError: no network is left that keeps the budget and was not proposed before.
            ConfigError: the study has no objective of that number.
        """
        fixed = {n: v for n, v in trial.system_attrs.get(FIXED, {}).items() if n in search_space}
        if len(fixed) == len(search_space):
            return {}
        scored, pending, excluded = self._state(study, trial)
        digest = _digest(scored)
        known = set(map(tuple, np.concatenate([pending, excluded]).tolist()))
        ahead = [g for g in self._ahead[1] if tuple(g) not in known] if self._ahead[0] == digest and not fixed else []
        if not ahead:
            problem = self._given(self._oriented_problem(study), fixed)
            genotypes = propose(
                problem,
                scored,
                pending=pending,
                excluded=excluded,
                count=1 if fixed else self._batch,
                seed=(self._seed, trial.number),
                effort=self._effort,
                hyperparameters=self._remembered,
            )
            ahead = genotypes.tolist()
        if not ahead:
            raise BudgetError(
                f"trial {trial.number}: no network is left within {_shown(self._problem.budgets_ms)} ms that was not "
                "proposed before. Raise the budget, widen the space, or stop the study"
            )
        genotype, *rest = ahead
        if not fixed:
            self._ahead = digest, rest
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, genotype)
        return {name: values[i] for (name, values), i in zip(self._choices.items(), genotype, strict=True)}

    def _oriented_problem(self, study: optuna.Study) -> GreyBoxProblem:
        reference = None if self._reference is None else self._sign(study) * self._reference
        return replace(self._problem, reference_accuracy=reference)

    def _sign(self, study: optuna.Study) -> float:
        if not 0 <= self._accuracy < len(study.directions):
            raise ConfigError(f"accuracy={self._accuracy}: the study has {len(study.directions)} objectives, from 0 on")
        return -1.0 if study.directions[self._accuracy] == StudyDirection.MINIMIZE else 1.0

    def _given(self, problem: GreyBoxProblem, fixed: Mapping[str, Any]) -> GreyBoxProblem:
        """The problem in which some genes are what a queued trial says."""
        known = {n: self._index[n][_key(v)] for n, v in fixed.items() if _key(v) in self._index[n]}
        if not known:
            return problem
        genes = [i for i, name in enumerate(self._choices) if name in known]
        values = [known[name] for name in self._choices if name in known]

        def canonical(genotypes: IntArray) -> IntArray:
            given = genotypes.copy()
            given[:, genes] = values
            return self._canonical(given)

        return replace(problem, canonical=canonical)

    def _state(self, study: optuna.Study, current: FrozenTrial) -> tuple[Scored, IntArray, IntArray]:
        """What was scored, what is pending and what is not to be proposed again, in the order of the trials."""
        scored: list[IntArray] = []
        accuracies: list[float] = []
        eligible: list[bool] = []
        pending: list[IntArray] = []
        excluded: list[IntArray] = []
        sign = self._sign(study)
        for trial in study._get_trials(deepcopy=False, use_cache=True):
            row = None if trial.number == current.number else self._row(trial)
            if row is None:
                continue
            if trial.state == TrialState.COMPLETE:
                value = sign * trial.values[self._accuracy]
                if np.isfinite(value):
                    scored.append(row)
                    accuracies.append(value)
                    eligible.append(all(v <= 0 for v in trial.constraints.values()))
                else:
                    excluded.append(row)
            elif trial.state in (TrialState.RUNNING, TrialState.WAITING):
                pending.append(row)
            else:
                excluded.append(row)
        genes = len(self._choices)

        def stacked(rows: list[IntArray]) -> IntArray:
            return np.array(rows, np.int64).reshape(-1, genes)

        known = Scored(stacked(scored), np.array(accuracies, np.float64), np.array(eligible, bool))
        return known, stacked(pending), stacked(excluded)

    def _row(self, trial: FrozenTrial) -> IntArray | None:
        """Canonical genotype of a trial; None where it has none of our parameters, or a value that we do not know."""
        finished = trial.state.is_finished()
        if finished and trial._trial_id in self._rows:
            return self._rows[trial._trial_id]
        params = trial.params
        if not finished:
            proposal = trial.system_attrs.get(PROPOSAL)
            params = {**self._params(proposal), **trial.system_attrs.get(FIXED, {}), **params}
        row = None
        known = {n: self._index[n].get(_key(v)) for n, v in params.items() if n in self._index}
        if known and None not in known.values():
            indices = np.array([[known.get(name, 0) for name in self._choices]], np.int64)
            row = self._canonical(indices)[0]
        if finished:
            self._rows[trial._trial_id] = row
        return row

    def _params(self, genotype: Sequence[int] | None) -> dict[str, Any]:
        if genotype is None or len(genotype) != len(self._choices):
            return {}
        return {name: values[i] for (name, values), i in zip(self._choices.items(), genotype, strict=True)}

    def _remembered(self, problem: GreyBoxProblem, scored: Scored) -> Hyperparameters:
        """`fit_hyperparameters`, which is not computed twice in a row for the same networks."""
        digest = _digest(scored)
        remembered = self._fitted
        if remembered is None or remembered[0] != digest:
            remembered = digest, fit_hyperparameters(problem, scored)
            self._fitted = remembered
        return remembered[1]


def _digest(scored: Scored) -> bytes:
    return hashlib.sha256(scored.genotypes.tobytes() + scored.accuracies.tobytes()).digest()


def _key(value: Any) -> Any:
    """Values that Optuna gives back unequal to what it was given, NaN apart, compare by this; True is not 1."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__, value
    return round(float(value), 9)


def _shown(budgets_ms: Sequence[float]) -> str:
    return " or ".join(f"{b:g}" for b in budgets_ms)
