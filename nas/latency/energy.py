"""Energy of a candidate from the rows of a table: additive over the same walk as latency, with an error bar.

A row's energy is what the whole board took while that block ran alone, the call included; the call is counted once. It
exists only where the device has power sensors: nothing is derived from MACs or from latency.

Whole networks that were measured correct the sum by one factor, the median of measured over summed energy, and their
spread around it is the error of the sum. Until there are `LEAST_NETWORKS` of them the error is `ASSUMED_ERROR`, and the
estimate says that it is assumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.errors import MissingRowError
from nas.core.records import Candidate, EnergyFigures, LayerSpec
from nas.core.walk import expand
from nas.latency.lines import OVERHEAD_KEY
from nas.latency.table import LEAST_NET_SHARE, LatencyTable

LEAST_NETWORKS = 4
# Of the sum, until networks were measured. Nobody has measured it on a board: wide on purpose, and marked as assumed.
ASSUMED_ERROR = 0.25
NORMAL_MAD = 1.4826  # standard deviation of a normal distribution in median deviations


@dataclass(frozen=True, slots=True)
class EnergyEstimate:
    """Energy of an image that leaves at each exit, everything passed on the way included; the head is the last.

    `networks` measured whole networks corrected it; below `LEAST_NETWORKS` the error is assumed.
    """

    exit_mj: tuple[float, ...]
    exit_std_mj: tuple[float, ...]
    networks: int
    provenance: str = "predicted"

    @property
    def worst_mj(self) -> float:
        return self.exit_mj[-1]


@dataclass(frozen=True, slots=True)
class _Correction:
    factor: float
    error: float
    networks: int


class EnergyEstimator:
    """Estimates the energy of candidates from one table."""

    def __init__(self, table: LatencyTable) -> None:
        """Reads what the measured networks of the table teach.

        Args:
            table: its rows and overhead need an energy.
        """
        self._table = table
        self._call = _call_energy(table)
        self._correction = self._learnt()

    def estimate(self, what: Candidate | Sequence[LayerSpec]) -> EnergyEstimate:
        """Energy per exit, mJ, with standard deviations.

        Args:
            what: a candidate, or the layers that `expand` gave for it.

        Raises:
            MissingRowError: a row, or the overhead, has no energy; the message says why that may be.
        """
        sums, variances = self._sums(expand(what) if isinstance(what, Candidate) else what)
        learnt = self._correction
        means = [learnt.factor * total for total in sums]
        stds = [
            float(np.hypot(learnt.error * mean, learnt.factor * np.sqrt(variance)))
            for mean, variance in zip(means, variances, strict=True)
        ]
        return EnergyEstimate(tuple(means), tuple(stds), learnt.networks)

    def _sums(self, layers: Sequence[LayerSpec]) -> tuple[list[float], list[float]]:
        call_mj, call_std_mj = self._call
        total, variance = call_mj, call_std_mj**2
        sums: list[float] = []
        variances: list[float] = []
        for layer, after in zip(layers, (*layers[1:], None), strict=True):
            row = self._table.rows.get(layer.key)
            if row is None or row.energy_mj is None or row.energy_std_mj is None:
                raise MissingRowError(_missing(layer.key, self._table))
            total += max(row.energy_mj - call_mj, LEAST_NET_SHARE * row.energy_mj)
            variance += row.energy_std_mj**2
            if after is None or after.segment != layer.segment:
                sums.append(total)
                variances.append(variance)
        return sums, variances

    def _learnt(self) -> _Correction:
        ratios = []
        for network in self._table.networks.values():
            measured = network.measurement.energy_mj
            if measured is None:
                continue
            try:
                sums, _ = self._sums(expand(network.candidate))
            except MissingRowError:  # a network of another space, or from before rows had an energy
                continue
            ratios.append(measured / sums[-1])
        if len(ratios) < LEAST_NETWORKS:
            return _Correction(1.0, ASSUMED_ERROR, len(ratios))
        factor = statistics.median(ratios)
        spread = NORMAL_MAD * statistics.median(abs(r - factor) for r in ratios) / factor
        return _Correction(factor, spread, len(ratios))


def has_energy(table: LatencyTable) -> bool:
    """Whether the device of a table measures energy: the overhead of a call has one."""
    return any(m.energy_mj is not None for m in table.fixed.get(OVERHEAD_KEY, ()))


def figures(estimate: EnergyEstimate, exit_shares: Sequence[float]) -> EnergyFigures:
    """Mean over images and worst case.

    Args:
        estimate: per exit, the head last.
        exit_shares: share of images that leave at each, 0-1.
    """
    shares = tuple(exit_shares) or (1.0,)
    return EnergyFigures(
        expected_mj=float(np.dot(shares, estimate.exit_mj)),
        worst_mj=estimate.worst_mj,
        std_mj=float(np.dot(shares, estimate.exit_std_mj)),
        provenance="measured" if estimate.provenance == "measured" else "predicted",
        is_error_assumed=estimate.provenance != "measured" and estimate.networks < LEAST_NETWORKS,
    )


def _call_energy(table: LatencyTable) -> tuple[float, float]:
    """Energy of a call that does nothing, mJ, with its deviation: the least that was measured.

    Raises:
        MissingRowError: there is none.
    """
    found = [
        (m.energy_mj, m.energy_std_mj)
        for m in table.fixed.get(OVERHEAD_KEY, ())
        if m.energy_mj is not None and m.energy_std_mj is not None
    ]
    if not found:
        raise MissingRowError(_missing(OVERHEAD_KEY, table))
    return min(found)


def _missing(key: str, table: LatencyTable) -> str:
    return (
        f"{key} has no energy in {table.folder}: the device has no power sensor, its runtime is trtexec, which "
        "gives it for whole networks only, or it was measured before energy was. Run: nas doctor --device NAME; where "
        "it shows rails, take ssh:...?runner=tensorrt and begin a new table (nas measure --table FOLDER)"
    )
