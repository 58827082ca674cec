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

Trials that ask at the same time take turns, in threads by a lock, in processes by the storage: each marks that it asks,
waits for those with a lower number that ask too, so that it sees their networks as pending, and looks after it has
stored its own proposal whether another trial has the same network. If so it withdraws and begins again. Because each
stores before it looks, at least one of two sees the other: no network is trained twice, even where nobody was waited
for.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.core.errors import BudgetError, ConfigError
from nas.search.greybox import (
    MAX_FIT_POINTS,
    Effort,
    GreyBoxProblem,
    Hyperparameters,
    Scored,
    fit_hyperparameters,
    latencies,
    propose,
    spread_rows,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Latency = Callable[[IntArray], tuple[FloatArray, FloatArray]]

PROPOSAL = "greybox:genotype"  # system attribute: other workers see a proposal before its parameters are stored
ASKING: list[int] = []  # its value while the proposal is not known yet
FIXED = "fixed_params"  # Optuna's system attribute of a queued trial
MAX_CHOICES = 256
KNOWN_LATENCIES = 32_768  # that one of the two generations of `for_each` has; an ask looks at some thousands
PATIENCE_S = 10.0  # a first ask in a study of 10,000 trials, which reads and fits, takes a few seconds
TURN_S = 0.05  # of one ask ahead, about


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

    A proposal looks at some thousands of networks. Those that were looked at lately are not computed again, some 30,000
    to 65,000 of them; where the function takes longer than some microseconds, give `GreyBoxSampler` one that takes
    arrays.

    Args:
        latency: parameters to milliseconds, one number or one for each device; NaN where unknown.
        search_space: as given to the sampler.
    """
    choices = {name: choices_of(name, distribution) for name, distribution in search_space.items()}
    # Two generations instead of a queue: what is looked at again moves to the young one, which becomes the old one when
    # it is full. Replacing them is all that threads could see of each other.
    young: dict[bytes, float | tuple[float, ...]] = {}
    old: dict[bytes, float | tuple[float, ...]] = {}

    def one(key: bytes) -> float | tuple[float, ...]:
        params = {name: values[i] for (name, values), i in zip(choices.items(), key, strict=True)}
        ms = latency(params)
        return tuple(map(float, ms)) if isinstance(ms, Sequence | np.ndarray) else float(ms)

    def many(genotypes: IntArray) -> tuple[FloatArray, FloatArray]:
        nonlocal young, old
        rows = []
        for key in map(bytes, genotypes.astype(np.uint8)):
            ms = young.get(key)
            if ms is None:
                ms = old.get(key)
                young[key] = ms = one(key) if ms is None else ms
                if len(young) >= KNOWN_LATENCIES:
                    young, old = {}, young
            rows.append(ms)
        ms = np.array(rows, np.float64).reshape(len(genotypes), -1)
        return ms, np.zeros_like(ms)

    return many


@dataclass(frozen=True, slots=True, eq=False)
class _Finished:
    """What a finished trial tells: `accuracy` is signed, None where the network is only not to be proposed again."""

    row: IntArray
    accuracy: float | None
    is_eligible: bool


@dataclass(slots=True, eq=False)
class _Memory:
    """What a sampler remembers of one study; all of it can be found out again."""

    finished: dict[int, _Finished | None] = field(default_factory=dict)  # by number; None: its network is not known
    ahead: tuple[bytes, list[list[int]]] = (b"", [])  # with their basis: proposals that nobody has asked for yet
    fitted: tuple[bytes, Hyperparameters] | None = None
    silent: set[int] = field(default_factory=set)  # trials that were waited for in vain


class GreyBoxSampler(optuna.samplers.BaseSampler):
    """Proposes complete networks within a latency budget; see `nas.search.greybox` for the method.

    Complete trials teach it; of those that break a constraint only the accuracy. Running and queued trials count as
    pending, and no network is proposed twice, however many threads and processes ask. Pruned and failed trials teach
    nothing, and their networks are not proposed again: repeat one with `enqueue_trial`. A complete trial that cannot
    teach, because the search space lacks one of its values, is warned about. The values of latency objectives are not
    looked at, because the latency function knows them, for trained networks too when a table was corrected since.

    Args:
        search_space: distributions by name, the same in all trials: categories, integers, or floats with a step.
        latency: genotypes int64 [N, G] in the order of `search_space`, as indices of the values, to milliseconds [N, D]
            and their standard deviations [N, D]; NaN where unknown. Limits that are known beforehand, such as memory,
            belong here too: NaN for a network that must not be trained. See `for_each`.
        budgets_ms: largest latency on each device, [D]; a network has to keep at least one.
        canonical: genotypes [N, G] to the one that stands for each network, for spaces in which some parameters do not
            count beside some values of others, such as the kernels of absent blocks; None: all genotypes differ. What
            a trial did not suggest counts as it was proposed, and as its first value where it was not.
        accuracy: which objective of the study is the accuracy; its direction is the study's.
        margin: standard deviations that the latency has to stay below the budget.
        reference_accuracy: value of the objective from which on a network counts; None: from the first trials.
        seed: together with the trial's number it decides the proposal.
        batch: networks that are proposed together, for searches that tell results in batches: the asks until the next
            result share the work of one. More than the batch are proposed one by one.
        effort: what a proposal may cost.
        patience_s: how long an ask waits for one of another process that is at it and may have died there.

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
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._space = dict(search_space)
        self._choices = {name: choices_of(name, distribution) for name, distribution in self._space.items()}
        self._index = {name: {_key(v): i for i, v in enumerate(c)} for name, c in self._choices.items()}
        self._is_canonical_given = canonical is not None
        self._canonical = canonical or np.copy
        self._accuracy = accuracy
        self._reference = reference_accuracy
        self._seed = seed
        self._batch = max(1, batch)
        self._effort = effort or Effort()
        self._problem = GreyBoxProblem(
            tuple(map(len, self._choices.values())),
            tuple(map(is_ordered, self._choices.values())),
            self._canonical,
            latency,
            tuple(budgets_ms),
            margin=margin,
        )
        self._patience_s = patience_s
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        # Numbers of studies and trials are those of one storage: every database counts from the beginning.
        self._memories: WeakKeyDictionary[BaseStorage, dict[int, _Memory]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_memories")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

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
        with self._lock:
            memory = self._memories.setdefault(study._storage, {}).setdefault(study._study_id, _Memory())
            genotype = None
            try:
                while genotype is None:
                    genotype = self._turn(study, trial, fixed, memory)
            except BaseException:
                _show(study, trial, None)  # nobody is to wait for it
                raise
        return self._params(genotype)

    def _turn(
        self, study: optuna.Study, trial: FrozenTrial, fixed: Mapping[str, Any], memory: _Memory
    ) -> list[int] | None:
        """A proposal that is stored and nobody else's; None where another trial came first."""
        _show(study, trial, ASKING)
        trials = self._after_others(study, trial, memory)
        scored, pending, excluded = self._state(study, trial, trials, memory)
        known = set(map(tuple, np.concatenate([pending, excluded]).tolist()))
        basis, ahead = memory.ahead
        if fixed or basis != _basis(self._problem, scored, ahead):
            ahead = []
        ahead = [g for g in ahead if tuple(g) not in known]
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
                hyperparameters=partial(_remembered, memory),
            )
            ahead = genotypes.tolist()
        if not ahead:
            raise BudgetError(
                f"trial {trial.number}: no network is left within {_shown(self._problem.budgets_ms)} ms that was not "
                "proposed before. Raise the budget, widen the space, or stop the study"
            )
        genotype, *rest = ahead
        if not fixed:
            memory.ahead = _basis(self._problem, scored, rest), rest
        _show(study, trial, genotype)
        return None if self._is_taken(study, trial, genotype, memory) else genotype

    def _after_others(self, study: optuna.Study, trial: FrozenTrial, memory: _Memory) -> list[FrozenTrial]:
        """All trials, once those with a lower number that ask too have their networks, or have been silent for long."""
        waited_s = 0.0
        while True:
            trials = study._get_trials(deepcopy=False)
            first = {
                t.number
                for t in trials
                if t.state == TrialState.RUNNING
                and t.number < trial.number
                and t.system_attrs.get(PROPOSAL) == ASKING
                and t.number not in memory.silent
            }
            if not first:
                return trials
            if waited_s >= self._patience_s * len(first):
                memory.silent |= first
                return trials
            pause_s = TURN_S * len(first)
            time.sleep(pause_s)
            waited_s += pause_s

    def _is_taken(self, study: optuna.Study, trial: FrozenTrial, genotype: list[int], memory: _Memory) -> bool:
        """Whether a trial that was not known to the proposal has the same network."""
        for other in study._get_trials(deepcopy=False):
            if other.number == trial.number or other.number in memory.finished:
                continue
            row = self._row(other)
            if row is not None and row.tolist() == genotype:
                return True
        return False

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

    def _state(
        self, study: optuna.Study, current: FrozenTrial, trials: Sequence[FrozenTrial], memory: _Memory
    ) -> tuple[Scored, IntArray, IntArray]:
        """What was scored, what is pending and what is not to be proposed again, in the order of the trials."""
        sign = self._sign(study)
        scored: list[_Finished] = []
        pending: list[IntArray] = []
        excluded: list[IntArray] = []
        unread: list[FrozenTrial] = []
        for trial in trials:
            if trial.number == current.number:
                continue
            if not trial.state.is_finished():
                row = self._row(trial)
                if row is not None:
                    pending.append(row)
                continue
            if trial.number not in memory.finished:
                memory.finished[trial.number] = self._finished(trial, sign)
                unread.append(trial)
            finished = memory.finished[trial.number]
            if finished is not None and finished.accuracy is not None:
                scored.append(finished)
            elif finished is not None:
                excluded.append(finished.row)
        self._warn(unread, memory)
        genes = len(self._choices)

        def stacked(rows: list[IntArray]) -> IntArray:
            return np.array(rows, np.int64).reshape(-1, genes)

        known = Scored(
            stacked([f.row for f in scored]),
            np.array([f.accuracy for f in scored], np.float64),
            np.array([f.is_eligible for f in scored], bool),
        )
        return known, stacked(pending), stacked(excluded)

    def _finished(self, trial: FrozenTrial, sign: float) -> _Finished | None:
        row = self._row(trial)
        if row is None:
            return None
        if trial.state != TrialState.COMPLETE or not np.isfinite(trial.values[self._accuracy]):
            return _Finished(row, None, False)
        return _Finished(row, sign * trial.values[self._accuracy], all(v <= 0 for v in trial.constraints.values()))

    def _warn(self, unread: Sequence[FrozenTrial], memory: _Memory) -> None:
        """Says once for each fault what complete trials, read for the first time, have that a search should not."""
        complete = [t for t in unread if t.state == TrialState.COMPLETE]
        foreign = [t for t in complete if memory.finished[t.number] is None]
        if foreign and "foreign" not in self._warned:
            self._warned.add("foreign")
            warnings.warn(
                f"{len(foreign)} of {len(complete)} complete trials teach the sampler nothing: "
                f"{self._foreign(foreign[0])}. Widen search_space to what was trained, or begin a new study",
                stacklevel=2,
            )
        if self._is_canonical_given or "absent" in self._warned:
            return
        known = [t for t in complete if memory.finished[t.number] is not None]
        absent = [(t.number, n) for t in known for n in self._choices if n not in t.params]
        if absent:
            self._warned.add("absent")
            number, name = absent[0]
            warnings.warn(
                f"trial {number} has no {name}: without `canonical` networks that differ only in "
                "parameters which do not count are proposed and trained again. Give GreyBoxSampler a `canonical` that "
                "sets those to their first value, or suggest all parameters of search_space in every trial",
                stacklevel=2,
            )

    def _foreign(self, trial: FrozenTrial) -> str:
        """What of a trial is not in the search space."""
        for name, value in trial.params.items():
            if name in self._index and _key(value) not in self._index[name]:
                choices = self._choices[name]
                shown = ", ".join(map(repr, choices[:8])) + (", ..." if len(choices) > 8 else "")
                return f"trial {trial.number} has {name}={value!r}, search_space has {shown}"
        return f"trial {trial.number} has none of the parameters of search_space"

    def _row(self, trial: FrozenTrial) -> IntArray | None:
        """Canonical genotype of a trial; None where it has none of our parameters, or a value that we do not know."""
        # What was proposed stands for parameters that are not stored yet, or that the objective had no use for.
        proposal = trial.system_attrs.get(PROPOSAL)
        params = {**self._params(proposal), **trial.system_attrs.get(FIXED, {}), **trial.params}
        is_queued = not trial.state.is_finished() and not proposal and FIXED in trial.system_attrs
        if is_queued and not self._choices.keys() <= params.keys():
            return None  # the rest is not proposed yet
        known = {n: self._index[n].get(_key(v)) for n, v in params.items() if n in self._index}
        if not known or None in known.values():
            return None
        indices = np.array([[known.get(name, 0) for name in self._choices]], np.int64)
        row: IntArray = self._canonical(indices)[0]
        return row

    def _params(self, genotype: Sequence[int] | None) -> dict[str, Any]:
        sizes = self._problem.cardinalities
        if genotype is None or len(genotype) != len(sizes) or any(i >= n for i, n in zip(genotype, sizes, strict=True)):
            return {}  # also of trials that were imported from a study with another space
        return {name: values[i] for (name, values), i in zip(self._choices.items(), genotype, strict=True)}


def _show(study: optuna.Study, trial: FrozenTrial, proposal: list[int] | None) -> None:
    study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, proposal)


def _remembered(memory: _Memory, problem: GreyBoxProblem, scored: Scored) -> Hyperparameters:
    """`fit_hyperparameters`, which is not computed twice in a row for the same networks with the same latency."""
    fitted_to = spread_rows(len(scored.accuracies), MAX_FIT_POINTS)
    basis = _basis(problem, scored, scored.genotypes[fitted_to])
    if memory.fitted is None or memory.fitted[0] != basis:
        memory.fitted = basis, fit_hyperparameters(problem, scored)
    return memory.fitted[1]


def _basis(problem: GreyBoxProblem, scored: Scored, genotypes: Sequence[Sequence[int]] | IntArray) -> bytes:
    """What is remembered of scored networks rests on these and on latencies, which a correction of the table changes.

    Args:
        genotypes: whose latencies.
    """
    rows = np.array(genotypes, np.int64).reshape(len(genotypes), len(problem.cardinalities))
    known = latencies(problem, rows)
    networks = hashlib.sha256(scored.genotypes.tobytes() + scored.accuracies.tobytes()).digest()
    return networks + known.ms.tobytes() + known.keeping.tobytes()


def _key(value: Any) -> Any:
    """Values that Optuna gives back unequal to what it was given, NaN apart, compare by this; True is not 1."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__, value
    return round(float(value), 9)


def _shown(budgets_ms: Sequence[float]) -> str:
    return " or ".join(f"{b:g}" for b in budgets_ms)
