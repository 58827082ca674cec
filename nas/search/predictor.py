"""Latency of proposals during a search: rows measured when they are needed, the correction refitted when networks are.

Measuring and training never run at the same time: the caller asks only while no worker is busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.records import Candidate, LatencyEstimate, LayerSpec, Measurement
from nas.core.run import FailedCandidate, LatencyKind, PredictedMeasured
from nas.core.units import format_ms
from nas.core.walk import expand
from nas.devices.base import Device
from nas.export.dialect import ORT, Dialect, dialect_for
from nas.latency.correction import Correction
from nas.latency.estimate import Estimator, VectorEstimate, VectorEstimator
from nas.latency.fitting import Fitted, LabelFit, fit_again, fit_correction
from nas.latency.interpolate import spread_rows
from nas.latency.lines import NetworkForm, network_key
from nas.latency.table import LatencyTable
from nas.measure.fill import WAIT_S, FillProgress, FillReport, fill, fp32_mb, measure_streaming
from nas.measure.networks import NetworkProgress, measure_networks
from nas.search.progress import Reporter
from nas.space.slots import extreme_genotype
from nas.space.space import SearchSpace

# A whole table of this many rows takes 20-60 s; larger spaces are filled row by row as candidates need them.
WHOLE_TABLE_ROWS = 1200
DRIFT_STDS = 3.0  # deviations between a measured network and its prediction that contradict the table,
PROVEN_NETWORKS = 5  # where so many networks of that precision agreed with it before
UNKNOWN_MS = 1e6  # cost of a layer without a row, where the fastest or the best network is looked for
LOST_SAMPLES = 4096  # random networks among which choices are looked for that no network runs with
LOST_LEAST = 16  # of these have a choice at least; fewer say little

Genotype = tuple[int, ...]


def row_count(space: SearchSpace) -> int:
    """Rows that the networks of a space can need."""
    return len({x.key for x in space.layers()})


def fills_whole(space: SearchSpace) -> bool:
    """Whether the whole table of a space is filled at once; else row by row, as candidates need them."""
    return row_count(space) <= WHOLE_TABLE_ROWS


def knows_every_row(space: SearchSpace, max_rows: int | None) -> bool:
    """Whether every row of a space has an answer before candidates are proposed: measured, or interpolated from some.

    Args:
        space: the search space.
        max_rows: `feedback.max_rows`.
    """
    return fills_whole(space) or (max_rows is not None and row_count(space) > max_rows)


def deployed_form(candidate: Candidate, dialect: Dialect = ORT) -> NetworkForm:
    """The form in which a candidate is measured as a whole network.

    `plain` without exits, `if` with them on ONNX Runtime. On other runtimes exits are deployed as a chain of segments;
    the whole network with every exit (`logits`) corrects the table there, and finished students are measured as chains.
    """
    if not candidate.exits:
        return "plain"
    return "if" if dialect is ORT else "logits"


class Predictor:
    """Predicted latency of genotypes and candidates of one space on one device."""

    def __init__(
        self,
        space: SearchSpace,
        table: LatencyTable,
        device: Device,
        reporter: Reporter,
        max_rows: int | None = None,
    ) -> None:
        """Measures nothing yet.

        Args:
            space: of the genotypes.
            table: opened for the device's state.
            device: measures.
            reporter: is told about measuring.
            max_rows: rows that `prepare` measures at most; the others are interpolated.
        """
        self.space = space
        self._max_rows = max_rows
        self.table = table
        self.device = device
        self._reporter = reporter
        # What is stored was fitted on this device's own rows; what is fitted on borrowed ones is not stored.
        stored = table.correction() if table.foreign is None else None
        self._fitted: Fitted | None = None if stored is None or not stored.fits else fit_again(table, stored)
        self._vector: VectorEstimator | None = None

    @property
    def is_whole(self) -> bool:
        """True when every row of the space has an answer once it is prepared."""
        return knows_every_row(self.space, self._max_rows)

    @property
    def _is_limited(self) -> bool:
        return self._max_rows is not None and row_count(self.space) > self._max_rows

    @property
    def fitted(self) -> Fitted | None:
        """The correction ready for use, None where no network was measured."""
        return self._fitted

    @property
    def correction(self) -> Correction | None:
        """What the measured networks taught, None where there are none."""
        return None if self._fitted is None else self._fitted.correction

    def prepare(self) -> None:
        """Fills the whole table where it is small; a larger one as needed, or in part, with the rest interpolated.

        Also measures what streaming the weights costs.
        """
        measure_streaming(
            self.table, self.device, fp32_mb(self.space.decode(self.space.largest())), progress=self._show_rows
        )
        if self._is_limited:
            self.fill(spread_rows(self.space.layers(), self._max_rows or 0))
            self._interpolate()
            self._reporter.say(
                f"{len(self.table.interpolated)} of {row_count(self.space)} rows are interpolated from measured ones; "
                "those of networks that are measured are measured too"
            )
        else:
            self.fill(self.space.layers() if self.is_whole else ())
        if self.is_whole:
            for choice in lost_choices(self.space, self.table):
                self._reporter.say(f"{self.device.profile.name} cannot run {choice}: dropped")
        if self._fitted is not None:  # the networks as stored, so that a killed run goes on; the rows as they are now
            self._fitted = fit_again(self.table, self._fitted.correction)
            self._vector = None
        elif self.table.foreign is not None and self.table.networks:
            self._fit()

    def fill(self, layers: Sequence[LayerSpec], *, again: bool = False, anew: bool = False) -> FillReport:
        """Measures the rows that the table lacks.

        Args:
            layers: whose rows are needed.
            again: also rows that failed, or had no calm round.
            anew: all of these rows, whatever the table has.

        Raises:
            InterruptedRunError: the user stopped the run; measured rows are kept.
        """

        report = fill(self.table, self.device, layers, again=again, anew=anew, progress=self._show_rows)
        for warning in report.warnings:
            self._reporter.warn(warning)
        if report.measured or self._vector is None:
            self._vector = VectorEstimator(self.space, self.table, self._fitted)
        return report

    def refit(self) -> None:
        """Corrects the estimate from all networks that the table holds.

        Raises:
            StorageError: the table cannot be written, or another process keeps it for very long.
        """
        if self._is_limited:  # the rows of the networks were measured too, and say more of the others
            self._interpolate()
        self._fit()
        if self._fitted is not None and self.table.foreign is None:
            with self.table.writing(WAIT_S, self._reporter.say):
                self.table.save_correction(self._fitted.correction)

    def _interpolate(self) -> None:
        self.table.interpolate(self.space.layers())
        self._vector = None

    def _fit(self) -> None:
        fitted = fit_correction(self.table)
        self._fitted = fitted if fitted.fits else None
        self._vector = VectorEstimator(self.space, self.table, self._fitted)

    def worst(self, genotypes: Sequence[Genotype]) -> tuple[np.ndarray, np.ndarray]:
        """Worst-case latency of canonical genotypes and its standard deviation, ms [N]; missing rows are measured.

        NaN where a row of the genotype could not be measured.
        """
        estimate = self._filled(genotypes)
        return estimate.worst_ms, estimate.worst_std_ms

    def known_worst(self, genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `worst`, with NaN where a row is missing: nothing is measured."""
        estimate = self._vector_estimator().estimate(genotypes, allow_missing=True)
        return estimate.worst_ms, estimate.worst_std_ms

    def first_exit(self, genotypes: Sequence[Genotype]) -> np.ndarray:
        """Latency of an image that leaves as early as it can, ms [N]; NaN as in `worst`."""
        return _least(self._filled(genotypes))

    def known_first_exit(self, genotypes: np.ndarray) -> np.ndarray:
        """As `first_exit`, with NaN where a row is missing: nothing is measured."""
        return _least(self._vector_estimator().estimate(genotypes, allow_missing=True))

    def estimates(self, genotypes: Sequence[Genotype]) -> list[LatencyEstimate]:
        """Latency per exit of many canonical genotypes whose rows are there: as `estimate`, a hundred times faster.

        Raises:
            MissingRowError: a row is missing.
        """
        if not genotypes:
            return []
        found = self._vector_estimator().estimate(np.asarray(genotypes, np.int64))
        result = []
        for exit_ms, std_ms in zip(found.exit_ms, found.exit_std_ms, strict=True):
            there = ~np.isnan(exit_ms)
            result.append(LatencyEstimate(tuple(exit_ms[there].tolist()), tuple(std_ms[there].tolist()), 0, "vector"))
        return result

    def _filled(self, genotypes: Sequence[Genotype]) -> VectorEstimate:
        rows = np.asarray(genotypes, np.int64)
        estimate = self._vector_estimator().estimate(rows, allow_missing=True)
        unknown = np.isnan(estimate.worst_ms)
        if unknown.any():
            missing = self._vector_estimator().layers(rows[unknown])
            if self.fill(missing).measured:
                estimate = self._vector_estimator().estimate(rows, allow_missing=True)
        return estimate

    def estimate(self, candidate: Candidate) -> LatencyEstimate:
        """Latency per exit of any candidate; missing rows are measured first.

        Raises:
            MissingRowError: a row could not be measured.
        """
        layers = expand(candidate)
        if self.table.missing(layer.key for layer in layers):
            self.fill(layers)
        return Estimator(self.table, self._fitted).estimate(layers)

    def row_ms(self, layer: LayerSpec) -> float:
        """What a layer adds to the plain sum, ms; `UNKNOWN_MS` where its row is missing."""
        return self.table.net_ms(layer.key) if self.table.has_row(layer.key) else UNKNOWN_MS

    def fastest(self) -> tuple[Genotype, float] | None:
        """The genotype with the least sum of rows and its predicted worst case, ms; None while rows are missing.

        Exact for the plain sum; a correction may prefer another one by the error of the sum.
        """
        if not self.is_whole:
            return None

        _, found = extreme_genotype(self.space.slots(), self.space.gene_sizes, self.row_ms, {}, largest=False)
        genotype = self.space.canonical(found)
        worst = float(self.known_worst(np.array([genotype]))[0][0])
        return None if np.isnan(worst) else (genotype, worst)

    def measure(
        self, candidates: Sequence[Candidate], round_number: int
    ) -> tuple[tuple[PredictedMeasured, ...], tuple[FailedCandidate, ...]]:
        """Builds and measures whole networks, then refits.

        A prediction that stands beside a measurement comes from the correction without these very networks, also where
        the table had them already: from an earlier run, or from one that was killed here. Networks that contradict a
        table which has proven itself are told as drift; they and their rows are measured anew.

        Args:
            candidates: networks; those measured before are not measured again.
            round_number: kept with the result.

        Returns:
            What was measured, and what could not be.
        """
        keys = [network_key(c, self.form(c)) for c in candidates]
        others = [n for key, n in self.table.networks.items() if key not in keys]
        held_out = fit_correction(self.table, others)
        # Rows that noise spoiled would be taken for an error of the sum: they get another chance before it is judged.
        self.fill([layer for c in candidates for layer in expand(c)], again=True)
        estimator = Estimator(self.table, held_out)
        before = [estimator.estimate(c) for c in candidates]
        results = self._measured(candidates)
        drifted = [
            i
            for i, m in enumerate(results)
            if contradicts(m, before[i], held_out.fits.get(candidates[i].precision_label))
        ]
        if drifted and not self.table.is_slow_now:  # a slow machine is the cause itself, and is told by the fill
            self._tell_drift([(candidates[i], before[i], results[i]) for i in drifted], len(candidates))
            borrowed = self.table.borrowed
            known = [x for i in drifted for x in expand(candidates[i]) if x.key not in borrowed]
            self.fill(known, anew=True)
            for i, m in zip(drifted, self._measured([candidates[i] for i in drifted], again=True), strict=True):
                results[i] = m
        pairs = tuple(
            PredictedMeasured(
                candidates[i].id,
                candidates[i].precision_label,
                before[i].worst_ms,
                before[i].worst_std_ms,
                m.latency_ms,
                round_number,
            )
            for i, m in enumerate(results)
            if m.latency_ms is not None
        )
        failed = tuple(
            FailedCandidate(candidates[i].id, "measuring", m.error or "no latency", round_number)
            for i, m in enumerate(results)
            if m.latency_ms is None
        )
        if pairs:
            self.refit()
        return pairs, failed

    def form(self, candidate: Candidate) -> NetworkForm:
        """The form in which this device measures a candidate as a whole network."""
        return deployed_form(candidate, dialect_for(self.device.profile))

    def _measured(self, candidates: Sequence[Candidate], *, again: bool = False) -> list[Measurement]:
        """Measurements of whole networks in the form that is deployed, in order."""
        results: dict[int, Measurement] = {}

        def show(p: NetworkProgress) -> None:
            done = len(results) + len(chosen) * p.done / max(1, p.total)
            self._reporter.progress("networks on the device", done, len(candidates), p.message)

        for form in ("if", "logits", "plain"):
            chosen = [i for i, c in enumerate(candidates) if self.form(c) == form]
            if chosen:
                networks = [candidates[i] for i in chosen]
                measured = measure_networks(self.table, self.device, networks, form=form, again=again, progress=show)
                results.update(zip(chosen, measured, strict=True))
        return [results[i] for i in range(len(candidates))]

    def _tell_drift(self, drifted: Sequence[tuple[Candidate, LatencyEstimate, Measurement]], count: int) -> None:
        candidate, estimate, m = max(drifted, key=lambda d: abs((d[2].latency_ms or 0) / d[1].worst_ms - 1))
        self._reporter.warn(
            f"drift: {len(drifted)} of {count} measured networks contradict the table by more than {DRIFT_STDS:g} "
            f"deviations, most of all {candidate.id}: {format_ms(m.latency_ms or 0)}, predicted "
            f"{format_ms(estimate.worst_ms)} +- {format_ms(estimate.worst_std_ms)}. They and their rows are measured "
            "anew"
        )

    def _show_rows(self, p: FillProgress) -> None:
        self._reporter.progress("latency table", p.done, p.total, p.message)

    def _vector_estimator(self) -> VectorEstimator:
        if self._vector is None:
            self._vector = VectorEstimator(self.space, self.table, self._fitted)
        return self._vector


def contradicts(m: Measurement, estimate: LatencyEstimate, fit: LabelFit | None) -> bool:
    """Whether a measured network lies outside what a table that has proven itself says of it.

    Args:
        m: the network; one that failed contradicts nothing.
        estimate: made without this network.
        fit: that the estimate comes from.
    """
    if m.latency_ms is None or fit is None or len(fit.record.networks) < PROVEN_NETWORKS:
        return False
    return abs(m.latency_ms - estimate.worst_ms) > DRIFT_STDS * float(np.hypot(estimate.worst_std_ms, m.std_ms))


def lost_choices(space: SearchSpace, table: LatencyTable) -> list[str]:
    """Choices of a space without which every network fails on a device, each with the reason of one of its rows.

    Found on random networks: a choice is lost where each network that has it needs a row that could not be measured,
    while others run. Whatever else fails only together with another choice is a failed candidate when it is met.
    """
    failed = {key: m.error for key, m in table.rows.items() if m.latency_ms is None}
    if not any(layer.key in failed for layer in space.layers()):
        return []
    genotypes = np.asarray(space.sample_many(np.random.default_rng(0), LOST_SAMPLES), np.int64)
    runs = ~np.isnan(VectorEstimator(space, table).estimate(genotypes, allow_missing=True).worst_ms)
    result = []
    for number, gene in enumerate(space.genes):
        for place, value in enumerate(gene.choices):
            has = genotypes[:, number] == place
            if has.sum() < LOST_LEAST or runs[has].any() or not runs.any():
                continue
            own = [{x.key for x in expand(space.decode(g))} for g in genotypes[has][:LOST_LEAST].tolist()]
            shared = [key for key in failed if sum(key in keys for keys in own)]
            key = max(shared, key=lambda k: sum(k in keys for keys in own))
            result.append(f"{gene.name} = {value} (row {key}: {failed[key]})")
    return result


def _least(estimate: VectorEstimate) -> np.ndarray:
    """Smallest latency of each row; NaN where the worst case is not known."""
    return np.where(np.isnan(estimate.worst_ms), np.nan, np.fmin.reduce(estimate.exit_ms, axis=1))


@dataclass(frozen=True, slots=True)
class BudgetFilter:
    """Which genotypes may be trained: those whose prediction plus the margin keeps the budget.

    Worst case: known before training. Expected and p99 depend on the exits taken, which are known after scoring: here
    only candidates are refused that miss the budget even when every image leaves at the first exit.
    """

    predictor: Predictor
    budget_ms: float
    of: LatencyKind
    margin_std: float

    def keeps(self, genotype: Genotype) -> bool:
        """Whether a genotype may be trained; rows that it needs are measured."""
        if self.of == "worst":
            worst, std = self.predictor.worst([genotype])
            return bool(worst[0] + self.margin_std * std[0] <= self.budget_ms)
        return bool(self.predictor.first_exit([genotype])[0] <= self.budget_ms)

    def known(self, genotypes: np.ndarray) -> np.ndarray:
        """The same for genotypes [N, G] at once; False where a row is missing."""
        if self.of == "worst":
            worst, std = self.predictor.known_worst(genotypes)
            return worst + self.margin_std * std <= self.budget_ms
        return self.predictor.known_first_exit(genotypes) <= self.budget_ms


@dataclass(frozen=True, slots=True)
class AnyBudget:
    """Which genotypes may be trained for several devices: those that keep the deadline of one, and run on each.

    The front of each device then reaches up to its own deadline; which students keep all of them shows in the end.
    """

    filters: tuple[BudgetFilter, ...]

    def keeps(self, genotype: Genotype) -> bool:
        """Whether a genotype may be trained; rows that it needs are measured on every device."""
        kept = [f.keeps(genotype) for f in self.filters]
        return any(kept) and bool(self._runs(np.array([genotype]))[0])

    def known(self, genotypes: np.ndarray) -> np.ndarray:
        """The same for genotypes [N, G] at once; False where a row is missing on any device."""
        return np.any([f.known(genotypes) for f in self.filters], axis=0) & self._runs(genotypes)

    def _runs(self, genotypes: np.ndarray) -> np.ndarray:
        if len(self.filters) == 1:
            return np.ones(len(genotypes), bool)  # what keeps the only deadline has a latency
        return np.all([~np.isnan(f.predictor.known_worst(genotypes)[0]) for f in self.filters], axis=0)
