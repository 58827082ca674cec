"""Latency of proposals during a search: rows measured when they are needed, the correction refitted when networks are.

Measuring and training never run at the same time: the caller asks only while no worker is busy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from nas.core.errors import DeviceError
from nas.core.records import Candidate, LatencyEstimate, LayerSpec, Measurement, Precision
from nas.core.run import PredictedMeasured
from nas.core.walk import expand
from nas.devices.base import Device
from nas.latency.correction import Correction
from nas.latency.estimate import Estimator, VectorEstimator, fit_correction
from nas.latency.lines import NetworkForm
from nas.latency.table import LatencyTable
from nas.measure.fill import FillProgress, FillReport, fill
from nas.measure.networks import measure_networks
from nas.search.progress import Reporter
from nas.space.space import SearchSpace

# A whole table of this many rows takes 20-60 s; larger spaces are filled row by row as candidates need them.
WHOLE_TABLE_ROWS = 1200

Genotype = tuple[int, ...]


def deployed_form(candidate: Candidate) -> NetworkForm:
    """How a candidate is deployed on ONNX Runtime: `if` where it has exits, else `plain`."""
    return "if" if candidate.exits else "plain"


class Predictor:
    """Predicted latency of genotypes and candidates of one space on one device."""

    def __init__(self, space: SearchSpace, table: LatencyTable, device: Device, reporter: Reporter) -> None:
        self.space = space
        self.table = table
        self.device = device
        self._reporter = reporter
        self._correction: Correction | None = table.correction()
        self._vector: VectorEstimator | None = None

    @property
    def is_whole(self) -> bool:
        """True when the whole table of the space is filled at once."""
        return len(self.space.layers()) <= WHOLE_TABLE_ROWS

    @property
    def correction(self) -> Correction | None:
        return self._correction

    def prepare(self) -> None:
        """Fills the whole table where it is small; a larger one as needed."""
        self.fill(self.space.layers() if self.is_whole else ())

    def fill(self, layers: Sequence[LayerSpec]) -> FillReport:
        """Measures the rows that the table lacks.

        Raises:
            InterruptedRunError: the user stopped the run; measured rows are kept.
        """

        def show(p: FillProgress) -> None:
            self._reporter.progress("latency table", p.done, p.total, p.message)

        report = fill(self.table, self.device, layers, progress=show)
        for warning in report.warnings:
            self._reporter.warn(warning)
        if report.measured or self._vector is None:
            self._vector = VectorEstimator(self.space, self.table, self._correction)
        return report

    def refit(self) -> None:
        """Corrects the estimate from all networks that the table holds."""
        correction = fit_correction(self.table)
        self._correction = correction if correction.fits else None
        if self._correction is not None:
            with self.table.writing():
                self.table.save_correction(self._correction)
        self._vector = VectorEstimator(self.space, self.table, self._correction)

    def worst(self, genotypes: Sequence[Genotype]) -> tuple[np.ndarray, np.ndarray]:
        """Worst-case latency of canonical genotypes and its standard deviation, ms [N]; missing rows are measured."""
        estimate = self._vector_estimator().estimate(np.asarray(genotypes, np.int64), allow_missing=True)
        unknown = np.isnan(estimate.worst_ms)
        if unknown.any():
            rows = [genotypes[i] for i in np.flatnonzero(unknown)]
            self.fill(self._vector_estimator().layers(np.asarray(rows, np.int64)))
            estimate = self._vector_estimator().estimate(np.asarray(genotypes, np.int64))
        return estimate.worst_ms, estimate.worst_std_ms

    def known_worst(self, genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `worst`, with NaN where a row is missing: nothing is measured."""
        estimate = self._vector_estimator().estimate(genotypes, allow_missing=True)
        return estimate.worst_ms, estimate.worst_std_ms

    def first_exit(self, genotypes: Sequence[Genotype]) -> np.ndarray:
        """Latency of an image that leaves as early as it can, ms [N]."""
        self.worst(genotypes)
        estimate = self._vector_estimator().estimate(np.asarray(genotypes, np.int64))
        return np.nanmin(estimate.exit_ms, axis=1)

    def estimate(self, candidate: Candidate) -> LatencyEstimate:
        """Latency per exit of any candidate; missing rows are measured first."""
        layers = expand(candidate)
        if self.table.missing(layer.key for layer in layers):
            self.fill(layers)
        return Estimator(self.table, self._correction).estimate(layers)

    def measure(self, candidates: Sequence[Candidate], round_number: int) -> tuple[PredictedMeasured, ...]:
        """Builds and measures whole networks, then refits; what had been predicted stands beside what was measured.

        Args:
            candidates: networks; those measured before are not repeated.
            round_number: kept with the result.

        Raises:
            DeviceError: not one of them could be measured.
        """
        before = [self.estimate(c) for c in candidates]
        results: dict[int, Measurement] = {}
        for form in ("if", "plain"):
            chosen = [i for i, c in enumerate(candidates) if deployed_form(c) == form]
            if chosen:
                measured = measure_networks(
                    self.table,
                    self.device,
                    [candidates[i] for i in chosen],
                    form=form,
                    progress=lambda p: self._reporter.progress("networks on the device", p.done, p.total, ""),
                )
                results.update(zip(chosen, measured, strict=True))
        pairs = [
            PredictedMeasured(
                candidates[i].id,
                _label(candidates[i]),
                before[i].worst_ms,
                before[i].worst_std_ms,
                m.latency_ms,
                round_number,
            )
            for i, m in sorted(results.items())
            if m.latency_ms is not None
        ]
        if candidates and not pairs:
            raise DeviceError(f"none of {len(candidates)} networks could be measured, the first: {results[0].error}")
        self.refit()
        return tuple(pairs)

    def _vector_estimator(self) -> VectorEstimator:
        if self._vector is None:
            self._vector = VectorEstimator(self.space, self.table, self._correction)
        return self._vector


def _label(candidate: Candidate) -> Precision | Literal["mixed"]:
    names = set(candidate.precisions)
    return names.pop() if len(names) == 1 else "mixed"


def in_budget_filter(predictor: Predictor, budget_ms: float, of: str, margin_std: float) -> Callable[[Genotype], bool]:
    """Whether a genotype may be trained: its prediction plus the margin keeps the budget.

    Worst case: known before training. Expected and p99 depend on the exits taken, which are known after scoring: here
    only candidates are refused that miss the budget even when every image leaves at the first exit.
    """

    def keeps(genotype: Genotype) -> bool:
        worst, std = predictor.worst([genotype])
        if of == "worst":
            return bool(worst[0] + margin_std * std[0] <= budget_ms)
        return bool(predictor.first_exit([genotype])[0] <= budget_ms)

    return keeps
