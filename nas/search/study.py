"""All calls to Optuna: samplers that propose genotypes inside the budget, and the study that users can open.

The working study lives in memory and is rebuilt from the run's own trial records: one durable line per trial costs
microseconds where 30 suggest calls on SQLite cost 84 ms, and a killed process leaves no RUNNING trial behind.
Finished trials are mirrored into `study.db` for dashboards and Optuna's own plots.

Over-budget proposals are told PRUNED and never trained: at equal trainings this beats constrained sampling for TPE and
NSGA-II alike (Optuna's default univariate TPE loses to random search on such spaces and is not offered).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, distribution_to_json
from optuna.trial import TrialState

from nas.core.errors import BudgetError, StorageError
from nas.core.run import Importance
from nas.search import greybox
from nas.search.greybox_sampler import GreyBoxSampler, is_ordered
from nas.search.screening import FEWEST, screened
from nas.space.layout import Gene
from nas.space.space import SearchSpace

Genotype = tuple[int, ...]

MAX_ASKS_PER_PROPOSAL = 30
MAX_REFUSED_PER_SCORE = 2  # proposals over the budget that the sampler is told of, per scored candidate
RANDOM_DRAWS = 2048  # looked at together where the sampler finds nothing: 10 ms
CONSTRAINT = "over_budget"
STOPPED = "stopped_early"  # broken by candidates whose accuracy is an estimate
GENERATION = "NSGAIISampler:generation"  # Optuna's key of a trial's generation
RDB_SCHEMA = 12  # layout of Optuna's database that `mirror` writes

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Scored:
    """What the sampler learns of a scored candidate.

    `score` is that of its trial record (maximised), `latency_ms` has the milliseconds on each device (minimised),
    `excess` what it is over the budget, as a share of it; with several devices that of the one where it fits best.
    `is_estimate`: its training was stopped early and `score` is what it would have reached: it teaches the sampler, but
    stands on no front. `energy_mj` is millijoule of an inference on the first device (minimised), where that is an
    objective.
    """

    genotype: Genotype
    score: float
    latency_ms: tuple[float, ...]
    excess: float
    label: str
    is_estimate: bool = False
    energy_mj: float | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """One value for each objective."""
        return (self.score, *self.latency_ms, *(() if self.energy_mj is None else (self.energy_mj,)))


def directions(devices: int, with_energy: bool = False) -> list[str]:
    """Optuna's directions of the score, of the latency on each device, and of energy where that is an objective."""
    return ["maximize", *["minimize"] * (devices + with_energy)]


@dataclass(frozen=True, slots=True)
class KnownLatency:
    """What is known of latency before any training, for the grey-box sampler.

    Attributes:
        of: canonical genotypes [N, G] to milliseconds and standard deviations on each device, [N, D]; NaN where a
            network must not be proposed, or a row is missing.
        budgets_ms: deadline on each device.
        margin_std: standard deviations that the latency has to stay below it.
        batch: networks that are proposed before any of them is scored.
    """

    of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    budgets_ms: tuple[float, ...]
    margin_std: float
    batch: int


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

    A proposal over the budget is told PRUNED: the sampler learns where the budget ends. A repeated one is told FAIL,
    which samplers pass over: it would count against the best region, where repeats are most frequent.

    Args:
        space: the search space.
        sampler: `tpe`, `nsga2` or `random`.
        seed: numbers that differ between any two calls of one run, so that a resumed run does not repeat its proposals.
        planned: number of trials of the whole search (sets NSGA-II's population).
        in_budget: whether the predicted latency of a genotype keeps the budget.
        known_in_budget: the same for many genotypes [N, G] at once, False where the latency is not known yet.
        known: candidates scored before, with re-estimated latencies.
        seen: candidates that were proposed before, whatever became of them.
        devices: on how many latency is an objective.
        latency: for the grey-box sampler.
        candidates: those that it looks at for each batch beside its own search, once two batches are scored.
        with_energy: whether energy is an objective.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: str,
        seed: Sequence[int],
        planned: int,
        in_budget: Callable[[Genotype], bool],
        known_in_budget: Callable[[np.ndarray], np.ndarray],
        known: Iterable[Scored],
        seen: Iterable[Genotype] = (),
        devices: int = 1,
        latency: KnownLatency | None = None,
        candidates: int = 0,
        with_energy: bool = False,
    ) -> None:
        self.space = space
        self._distributions = distributions(space)
        self._in_budget = in_budget
        self._known_in_budget = known_in_budget
        self._seen: set[Genotype] = set(seen)
        self._asked: dict[int, optuna.trial.Trial] = {}
        self._refused = 0
        self._learnt: list[Scored] = []
        self._latency = latency
        self._candidates = candidates
        self._ahead: list[Genotype] | None = None  # screened for this batch; None: not yet
        self._rng = np.random.default_rng(list(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                directions=directions(devices, with_energy),
                sampler=_sampler(sampler, int(self._rng.integers(2**31)), planned, space, latency),
            )
        for scored in known:
            self.learn(scored)

    def learn(self, scored: Scored) -> None:
        """Adds a scored candidate that did not come from `ask` of this object."""
        self._seen.add(scored.genotype)
        self._learn(scored)
        self._study.add_trial(_frozen(self.space, self._distributions, scored))

    def seen(self, genotype: Genotype) -> bool:
        """True when the genotype was proposed or scored already."""
        return genotype in self._seen

    def mark(self, genotypes: Iterable[Genotype]) -> None:
        """Genotypes that are not to be proposed."""
        self._seen.update(genotypes)

    def ask(self) -> tuple[int, Genotype] | None:
        """Trial number of this study and a new canonical genotype in budget; None when no new one can be found.

        The sampler gets `MAX_ASKS_PER_PROPOSAL` tries; then random candidates inside the budget are taken, and at last
        neighbours of those that were seen.
        """
        found = self._screened()
        if found is not None:
            return self._queued(found)
        for _ in range(MAX_ASKS_PER_PROPOSAL):
            try:
                trial = self._study.ask(self._distributions)
            except BudgetError:  # the grey-box sampler knows of no network that is left
                break
            genotype = to_genotype(self.space, trial.params)
            if genotype not in self._seen and self._in_budget(genotype):
                return self._take(trial, genotype)
            # Far more refusals than scores slow TPE down and teach it nothing new.
            over = genotype not in self._seen and self._refused < MAX_REFUSED_PER_SCORE * (len(self._learnt) + 10)
            self._refused += over
            self._study.tell(trial, state=TrialState.PRUNED if over else TrialState.FAIL)
        found = self._random_in_budget()
        return None if found is None else self._queued(found)

    def _queued(self, genotype: Genotype) -> tuple[int, Genotype]:
        self._study.enqueue_trial(to_params(self.space, genotype))
        return self._take(self._study.ask(self._distributions), genotype)

    def _screened(self) -> Genotype | None:
        """The next of the best candidates among very many; None where that is not asked for, or there is none left."""
        latency = self._latency
        if latency is None or not self._candidates or len(self._learnt) < max(2 * latency.batch, FEWEST):
            return None
        if self._ahead is None:
            taken = sorted(self._seen - {s.genotype for s in self._learnt})
            genotypes = screened(
                greybox_problem(self.space, latency),
                greybox_scored(self._learnt),
                self._candidates,
                count=latency.batch,
                excluded=np.array(taken, np.int64).reshape(-1, len(self.space.genes)),
                seed=(int(self._rng.integers(2**31)), len(self._learnt)),
            )
            self._ahead = [tuple(row) for row in genotypes.tolist()]
        while self._ahead:
            genotype = self._ahead.pop(0)
            if genotype not in self._seen and self._in_budget(genotype):
                return genotype
        return None

    def _learn(self, scored: Scored) -> None:
        self._learnt.append(scored)
        self._ahead = None

    def _take(self, trial: optuna.trial.Trial, genotype: Genotype) -> tuple[int, Genotype]:
        self._seen.add(genotype)
        self._asked[trial.number] = trial
        return trial.number, genotype

    def _random_in_budget(self) -> Genotype | None:
        for draw in (self._drawn, self._neighbours):
            genotypes = draw()
            for row in genotypes[self._known_in_budget(genotypes)].tolist():
                if tuple(row) not in self._seen:
                    return tuple(row)
        for _ in range(MAX_ASKS_PER_PROPOSAL):  # where rows are measured only when a candidate needs them
            genotype = self.space.sample(self._rng)
            if genotype not in self._seen and self._in_budget(genotype):
                return genotype
        return None

    def _drawn(self) -> np.ndarray:
        return self.space.sample_many(self._rng, RANDOM_DRAWS)

    def _neighbours(self) -> np.ndarray:
        """Seen genotypes with one to three genes drawn anew: more of them keep a tight budget than of random ones."""
        drawn = self._drawn()
        if not self._seen:
            return drawn
        parents = np.array(sorted(self._seen))[self._rng.integers(len(self._seen), size=len(drawn))]
        genes = parents.shape[1]
        count = self._rng.integers(1, 4, size=(len(drawn), 1))
        order = self._rng.random(drawn.shape).argsort(axis=1)
        return self.space.canonical_many(np.where(order < np.minimum(count, genes), drawn, parents))

    def tell(self, number: int, scored: Scored | None) -> None:
        """Result of an asked trial; None: it failed or was stopped early."""
        trial = self._asked.pop(number)
        if scored is None:
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        self._learn(scored)
        trial.set_constraint(CONSTRAINT, scored.excess)
        self._study.tell(trial, scored.values)


def _sampler(
    name: str, seed: int, planned: int, space: SearchSpace, latency: KnownLatency | None
) -> optuna.samplers.BaseSampler:
    if name == "greybox" and latency is not None:
        return _greybox(seed, space, latency)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=12, constant_liar=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, planned // 25)))
    return optuna.samplers.RandomSampler(seed=seed)


def greybox_problem(space: SearchSpace, latency: KnownLatency) -> greybox.GreyBoxProblem:
    """What the grey-box model knows of a space before any training."""
    return greybox.GreyBoxProblem(
        space.gene_sizes,
        tuple(is_ordered(gene.choices) for gene in space.genes),
        space.canonical_many,
        latency.of,
        latency.budgets_ms,
        margin=latency.margin_std,
    )


def greybox_scored(known: Sequence[Scored]) -> greybox.Scored:
    """Scored candidates as the grey-box model takes them; those over the budget and foreseen ones only teach it."""
    return greybox.Scored(
        np.array([s.genotype for s in known], np.int64),
        np.array([s.score for s in known], np.float64),
        np.array([s.excess <= 0 and not s.is_estimate for s in known], bool),
    )


def _greybox(seed: int, space: SearchSpace, latency: KnownLatency) -> GreyBoxSampler:
    """The sampler of complete networks, on the genes that have a choice."""
    free = [i for i, gene in enumerate(space.genes) if len(gene.choices) > 1]

    def whole(rows: np.ndarray) -> np.ndarray:
        genotypes = np.zeros((len(rows), len(space.genes)), np.int64)
        genotypes[:, free] = rows
        return genotypes

    return GreyBoxSampler(
        distributions(space),
        lambda rows: latency.of(whole(rows)),
        latency.budgets_ms,
        canonical=lambda rows: space.canonical_many(whole(rows))[:, free],
        margin=latency.margin_std,
        seed=seed,
        batch=latency.batch,
    )


def _frozen(
    space: SearchSpace, known: dict[str, BaseDistribution], scored: Scored, attributes: dict[str, Any] | None = None
) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        values=scored.values,
        params=to_params(space, scored.genotype),
        distributions=known,
        constraints={CONSTRAINT: scored.excess, **({STOPPED: 1.0} if scored.is_estimate else {})},
        user_attrs={"candidate": scored.label, **(attributes or {})},
        # NSGA-II breeds from generations; a trial without one is invisible to it, so earlier rounds would be forgotten.
        system_attrs={GENERATION: 0},
    )


def mirror(
    path: Path,
    name: str,
    space: SearchSpace,
    trials: Sequence[tuple[Scored, dict[str, Any]]],
    devices: Sequence[str] = ("",),
) -> None:
    """Writes all trials as an Optuna study (SQLite), replacing the file when it is whole.

    The latency on the first of `devices` is named `latency_ms`, that on any other one with the device.

    Rows are inserted directly where the database has the layout that this was written for: 30 trials a second are what
    `Study.add_trial` manages with 26 parameters (2026-11, Optuna 5.0), and a search of 1,000 trials would wait half a
    minute for a copy that it does not need itself. Any other layout is filled through `add_trial`.

    Raises:
        StorageError: the database cannot be written.
    """
    known = distributions(space)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
        try:
            energy = any(scored.energy_mj is not None for scored, _ in trials)
            goals = directions(len(devices), energy)
            study = optuna.create_study(storage=storage, study_name=name, directions=goals)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(
                    ["score", "latency_ms", *(f"latency_ms on {d}" for d in devices[1:]), *["energy_mj"] * energy]
                )
        finally:
            storage.engine.dispose()
        frozen = [_frozen(space, known, scored, attributes) for scored, attributes in trials]
        if not _insert_rows(temporary, frozen):
            study.add_trials(frozen)
            storage.engine.dispose()
        temporary.replace(path)
    except Exception as e:  # SQLAlchemy's, sqlite3's and Optuna's errors have no common base
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: the study cannot be written: {e}. Free space, then run the same command") from e


def _insert_rows(path: Path, trials: Sequence[optuna.trial.FrozenTrial]) -> bool:
    """Inserts trials into a new database with one study; False, and nothing is done, where it has another layout."""
    with closing(sqlite3.connect(path)) as database:
        if database.execute("SELECT schema_version FROM version_info").fetchall() != [(RDB_SCHEMA,)]:
            return False
        [(study,)] = database.execute("SELECT study_id FROM studies").fetchall()
        encoded = {n: distribution_to_json(d) for n, d in (trials[0].distributions if trials else {}).items()}
        now = datetime.now().isoformat(sep=" ")
        with database:
            for number, trial in enumerate(trials):
                key = number + 1
                database.execute(
                    "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete) "
                    "VALUES (?, ?, ?, 'COMPLETE', ?, ?)",
                    (key, number, study, now, now),
                )
                database.executemany(
                    "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, ?, ?, 'FINITE')",
                    [(key, objective, value) for objective, value in enumerate(trial.values)],
                )
                database.executemany(
                    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
                    "VALUES (?, ?, ?, ?)",
                    [(key, n, trial.distributions[n].to_internal_repr(v), encoded[n]) for n, v in trial.params.items()],
                )
                for table, attributes in (
                    ("trial_user_attributes", trial.user_attrs),
                    ("trial_system_attributes", trial.system_attrs),
                ):
                    database.executemany(
                        f"INSERT INTO {table} (trial_id, key, value_json) VALUES (?, ?, ?)",
                        [(key, n, json.dumps(v)) for n, v in attributes.items()],
                    )
    return True


def importances(space: SearchSpace, trials: Sequence[Scored]) -> tuple[Importance, ...]:
    """Share of each gene in the spread of score and latency over the trials (PED-ANOVA); empty below 10 trials.

    Of several devices it is the latency on the first one.

    Source: Watanabe et al. 2023, arXiv 2304.10255, as in Optuna.
    """
    if len(trials) < 10:
        return ()
    known = distributions(space)
    study = optuna.create_study(directions=directions(len(trials[0].values) - 1))
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
