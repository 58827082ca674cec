"""Latency of a candidate from the table: overhead of one call plus its rows without theirs, corrected, per exit.

An image that leaves at exit k has passed every layer up to and including exit head k and k + 1 decisions (gates), so
estimates are cumulative over exits and the last one is the worst case. Two paths give the same numbers: `Estimator` for
one candidate or list of layers, `VectorEstimator` for many genotypes of a space at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.core.errors import MissingRowError, RecordError
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures, LayerSpec
from nas.core.walk import expand
from nas.latency.correction import (
    Correction,
    NetworkEvidence,
    PrecisionFit,
    borrowed_fit,
    corrected,
    fit_precision,
)
from nas.latency.lines import MeasuredNetwork
from nas.latency.table import LatencyTable

BYTES_PER_MB = 1e6

_CODES = {"fp32": 1, "fp16": 2, "int8": 4}
_LABELS = {code: name for name, code in _CODES.items()}

FloatArray = NDArray[np.float64]


class SlotLike(Protocol):
    """What the vectorised path needs of a slot of a search space: a table of layers over a few genes."""

    @property
    def kind(self) -> str: ...

    @property
    def genes(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def layers(self) -> tuple[LayerSpec | None, ...]: ...


class SpaceLike(Protocol):
    """A search space as far as estimating needs it."""

    def slots(self) -> Sequence[SlotLike]:
        """Slots in execution order."""
        ...


def fit_correction(table: LatencyTable, networks: Iterable[MeasuredNetwork] | None = None) -> Correction:
    """Fits the correction of each precision label from measured whole networks.

    Args:
        table: rows and overhead; the fit is stored by `table.save_correction`.
        networks: which networks to use; by default all of the table.

    Raises:
        MissingRowError: the overhead has not been measured.
    """
    evidence: dict[str, list[NetworkEvidence]] = {}
    skipped = []
    for network in table.networks.values() if networks is None else networks:
        m = network.measurement
        if m.latency_ms is None:
            skipped.append(f"{m.key}: {m.error}")
            continue
        layers = [x for x in expand(network.candidate) if network.form != "plain" or x.kind != "exit_head"]
        unknown = [x.key for x in layers if _net_or_none(table, x.key) is None]
        if unknown:
            skipped.append(
                f"{m.key}: no row for {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
            )
            continue
        gates = len(network.candidate.exits) if network.form == "if" else 0
        weight_mb = sum(x.weight_bytes for x in layers) / BYTES_PER_MB
        evidence.setdefault(network.candidate.precision_label, []).append(
            NetworkEvidence(
                m.key,
                table.overhead_ms
                + sum(table.net_ms(x.key) for x in layers)
                + gates * table.gate_ms
                + float(table.streaming_ms(weight_mb)),
                weight_mb,
                gates,
                m.latency_ms,
                m.is_stable,
            )
        )
    fits = {label: fit_precision(label, found) for label, found in sorted(evidence.items())}
    single = [fit for label, fit in fits.items() if label != "mixed"]
    if len(single) > 1 and len(evidence.get("mixed", ())) < 3:
        fits["mixed"] = borrowed_fit("mixed", single)
    return Correction(table.profile.fingerprint, tuple(fits.values()), tuple(skipped), streaming=table.streaming)


class Estimator:
    """Estimates single candidates."""

    def __init__(self, table: LatencyTable, correction: Correction | None = None, *, gated: bool = True) -> None:
        """Reads rows when it estimates.

        Args:
            table: rows and overhead.
            correction: None means the plain sum.
            gated: early exits are deployed as decisions; False: every exit is computed and none decides.
        """
        self._table = table
        self._gated = gated
        self._correction = correction

    def missing(self, layers: Iterable[LayerSpec]) -> list[str]:
        """Keys of layers that have no row yet."""
        return self._table.missing(x.key for x in layers)

    def estimate(self, what: Candidate | Sequence[LayerSpec]) -> LatencyEstimate:
        """Latency per exit with standard deviations.

        Args:
            what: a candidate, or the layers that `expand` gave for it.

        Raises:
            MissingRowError: a row or the overhead is missing; the message names the next command.
        """
        layers = expand(what) if isinstance(what, Candidate) else what
        if not layers:
            raise RecordError("nothing to estimate: no layers were given")
        label = _precision_label({x.precision for x in layers})
        count = layers[-1].segment + 1
        sums, weights, variance = np.zeros(count), np.zeros(count), np.zeros(count)
        gates = np.zeros(count)
        for x in layers:
            sums[x.segment] += self._table.net_ms(x.key)
            if x.kind == "exit_head" and self._gated:
                sums[x.segment] += self._table.gate_ms
                gates[x.segment] += 1
            weights[x.segment] += x.weight_bytes / BYTES_PER_MB
            variance[x.segment] += self._table.row_std_ms(x.key) ** 2
        fit = _fit_for(self._correction, label)
        weights = np.cumsum(weights)
        mean, std = corrected(
            fit,
            label,
            self._table.overhead_ms + np.cumsum(sums) + self._table.streaming_ms(weights),
            weights,
            np.cumsum(gates),
            np.cumsum(variance),
        )
        return LatencyEstimate(
            exit_ms=tuple(float(v) for v in np.maximum.accumulate(mean)),
            exit_std_ms=tuple(float(v) for v in std),
            rows_used=len(layers),
            correction="raw table" if fit is None else fit.label,
        )


@dataclass(frozen=True, slots=True)
class VectorEstimate:
    """Estimates of N genotypes: float64 [N, E], E = exits of the space + 1, the head last.

    An exit that a genotype does not have is NaN; the last column (worst case) never is, except where a row is missing.
    """

    exit_ms: FloatArray
    exit_std_ms: FloatArray

    @property
    def worst_ms(self) -> FloatArray:
        """Latency without leaving early, [N]."""
        return self.exit_ms[:, -1]

    @property
    def worst_std_ms(self) -> FloatArray:
        """Standard deviation of it, [N]."""
        return self.exit_std_ms[:, -1]


class VectorEstimator:
    """Estimates many genotypes of one space at once: a few table look-ups for each slot.

    Early exits are deployed as decisions. The tables are read when it is made; after rows or corrections are added,
    make it anew.
    """

    def __init__(self, space: SpaceLike, table: LatencyTable, correction: Correction | None = None) -> None:
        """Prepares the look-up tables.

        Args:
            space: gives the slots, in execution order.
            table: rows and overhead.
            correction: None means the plain sum.

        Raises:
            MissingRowError: the overhead has not been measured.
        """
        self._overhead_ms = table.overhead_ms
        self._streaming_ms = table.streaming_ms if table.streaming else None
        self._folder = table.folder
        self._correction = correction
        self._slots = tuple(space.slots())
        self._numbers: list[FloatArray] = []
        self._codes: list[NDArray[np.uint8]] = []
        known: dict[str, tuple[float, float, float, float]] = {}
        for slot in self._slots:
            numbers = np.zeros((len(slot.layers), 4))
            codes = np.zeros(len(slot.layers), np.uint8)
            for i, layer in enumerate(slot.layers):
                if layer is not None:
                    key = layer.key
                    if key not in known:
                        known[key] = _row_numbers(table, layer)
                    numbers[i] = known[key]
                    codes[i] = _CODES[layer.precision]
            self._numbers.append(numbers)
            self._codes.append(codes)
        self._exits = 1 + sum(slot.kind == "exit_head" for slot in self._slots)

    @property
    def exits(self) -> int:
        """Columns of an estimate: exits of the space + 1."""
        return self._exits

    def estimate(self, genotypes: ArrayLike, *, allow_missing: bool = False) -> VectorEstimate:
        """Latencies of canonical genotypes.

        Args:
            genotypes: integers [N, G], one index per gene.
            allow_missing: gives NaN to genotypes that need a row which was not measured, instead of an error.

        Raises:
            MissingRowError: a row is missing.
            RecordError: genotypes of another shape, or an index outside its gene.
        """
        g = _as_genotypes(genotypes)
        total = np.zeros((len(g), 4))
        codes = np.zeros(len(g), np.uint8)
        at_exit = np.full((self._exits, len(g), 4), np.nan)
        exit_index = 0
        for slot, numbers, code in zip(self._slots, self._numbers, self._codes, strict=True):
            index = self._index(slot, g)
            total += numbers.take(index, axis=0)
            layer_codes = code.take(index)
            codes |= layer_codes
            if slot.kind == "exit_head":
                present = layer_codes > 0
                at_exit[exit_index, present] = total[present]
                exit_index += 1
        at_exit[-1] = total
        if not allow_missing and np.isnan(total[:, 0]).any():
            raise self._missing_error(g[np.isnan(total[:, 0])])
        return self._corrected(at_exit, codes)

    def layers(self, genotypes: ArrayLike) -> tuple[LayerSpec, ...]:
        """The distinct layers that these genotypes need rows for, in execution order.

        Args:
            genotypes: integers [N, G], canonical.
        """
        g = _as_genotypes(genotypes)
        result: dict[str, LayerSpec] = {}
        for slot in self._slots:
            for i in np.unique(self._index(slot, g)):
                layer = slot.layers[int(i)]
                if layer is not None:
                    result.setdefault(layer.key, layer)
        return tuple(result.values())

    def _index(self, slot: SlotLike, g: NDArray[np.int64]) -> NDArray[np.intp]:
        try:
            columns = tuple(g[:, gene] for gene in slot.genes)
            return np.asarray(np.ravel_multi_index(columns, slot.shape), dtype=np.intp)
        except (ValueError, IndexError) as e:
            raise RecordError(f"genotypes do not fit the space: {e}") from e

    def _corrected(self, at_exit: FloatArray, codes: NDArray[np.uint8]) -> VectorEstimate:
        mean = np.full(at_exit.shape[:2], np.nan)
        std = np.full(at_exit.shape[:2], np.nan)
        for code in np.unique(codes):
            label = _LABELS.get(int(code), "mixed")
            chosen = np.flatnonzero(codes == code)
            part = at_exit[:, chosen]
            fit = _fit_for(self._correction, label)
            sum_ms = self._overhead_ms + part[..., 0]
            if self._streaming_ms is not None:
                sum_ms += self._streaming_ms(part[..., 1])
            mean[:, chosen], std[:, chosen] = corrected(fit, label, sum_ms, part[..., 1], part[..., 2], part[..., 3])
        # fmax passes over exits that are absent; they stay NaN because only values that are there are replaced.
        rising = np.fmax.accumulate(mean, axis=0)
        mean = np.where(np.isnan(mean), mean, rising)
        return VectorEstimate(np.ascontiguousarray(mean.T), np.ascontiguousarray(std.T))

    def _missing_error(self, g: NDArray[np.int64]) -> MissingRowError:
        missing = []
        for slot, numbers in zip(self._slots, self._numbers, strict=True):
            for i in np.unique(self._index(slot, g)):
                layer = slot.layers[int(i)]
                if layer is not None and np.isnan(numbers[i, 0]):
                    missing.append(layer.key)
        return MissingRowError(
            f"{len(missing)} rows are missing in {self._folder}, the first is {missing[0]}."
            f" Run: nas measure --table {quote(str(self._folder))} --rows {quote(missing[0])}"
        )


def figures(estimate: LatencyEstimate, exit_shares: Sequence[float], tail: float = 0.99) -> LatencyFigures:
    """Expected, worst-case and tail latency under an exit distribution.

    Args:
        estimate: latency per exit.
        exit_shares: share of images that leave at each exit, the head last; they sum to 1.
        tail: the quantile of images that `p99_ms` gives, 0-1.

    Raises:
        RecordError: shares of another number, negative, or with another sum.
    """
    shares = np.asarray(exit_shares, dtype=np.float64)
    if shares.shape != (len(estimate.exit_ms),):
        raise RecordError(f"expected {len(estimate.exit_ms)} exit shares (exits and head), got {len(exit_shares)}")
    if not (shares >= 0).all() or abs(float(shares.sum()) - 1) > 1e-6:
        raise RecordError(f"exit shares must be at least 0 and sum to 1, got {tuple(exit_shares)}")
    if not 0 < tail <= 1:
        raise RecordError(f"tail must be above 0 and at most 1, got {tail}")
    reached = np.cumsum(shares) >= tail - 1e-12
    index = int(np.argmax(reached)) if reached.any() else len(shares) - 1
    return LatencyFigures(
        expected_ms=float(shares @ np.asarray(estimate.exit_ms)),
        worst_ms=estimate.worst_ms,
        p99_ms=estimate.exit_ms[index],
        # One error moves all exits of a network the same way, so deviations add up instead of cancelling.
        std_ms=float(shares @ np.asarray(estimate.exit_std_ms)),
        provenance="predicted",
    )


def describe_errors(estimated_ms: ArrayLike, measured_ms: ArrayLike) -> Mapping[str, float]:
    """How estimates compare with measurements: MAPE, bias, Spearman's rank correlation, share within 5 and 10 %.

    Args:
        estimated_ms: estimates [N].
        measured_ms: measurements [N], N at least 2.

    Returns:
        `mape`, `bias` (mean of estimate / measured - 1), `spearman`, `within_5`, `within_10`, `n`; ratios 0-1.
    """
    estimated, measured = np.asarray(estimated_ms, dtype=np.float64), np.asarray(measured_ms, dtype=np.float64)
    if estimated.shape != measured.shape or estimated.ndim != 1 or len(estimated) < 2:
        raise RecordError(f"expected two equal lists of at least 2 times, got {estimated.shape} and {measured.shape}")
    ratio = estimated / measured - 1
    return {
        "mape": float(np.abs(ratio).mean()),
        "bias": float(ratio.mean()),
        "spearman": float(np.corrcoef(_ranks(estimated), _ranks(measured))[0, 1]),
        "within_5": float((np.abs(ratio) <= 0.05).mean()),
        "within_10": float((np.abs(ratio) <= 0.10).mean()),
        "n": float(len(ratio)),
    }


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts - 1) / 2)[place]


def _row_numbers(table: LatencyTable, layer: LayerSpec) -> tuple[float, float, float, float]:
    """Time (ms, with the decision behind an exit head), weights (MB), decisions and variance (ms^2) of a layer."""
    net_ms = _net_or_none(table, layer.key)
    if net_ms is None:
        return (float("nan"),) * 4
    variance = table.row_std_ms(layer.key) ** 2
    if layer.kind == "exit_head":
        return net_ms + table.gate_ms, layer.weight_bytes / BYTES_PER_MB, 1.0, variance
    return net_ms, layer.weight_bytes / BYTES_PER_MB, 0.0, variance


def _net_or_none(table: LatencyTable, key: str) -> float | None:
    row = table.rows.get(key)
    return None if row is None or row.latency_ms is None else table.net_ms(key)


def _fit_for(correction: Correction | None, label: str) -> PrecisionFit | None:
    return None if correction is None else correction.fit_for(label)


def _precision_label(precisions: set[str]) -> str:
    return next(iter(precisions)) if len(precisions) == 1 else "mixed"


def _as_genotypes(genotypes: ArrayLike) -> NDArray[np.int64]:
    g = np.asarray(genotypes)
    if g.ndim != 2 or not np.issubdtype(g.dtype, np.integer):
        raise RecordError(f"genotypes must be integers [N, G], got {g.dtype} {list(g.shape)}")
    return g.astype(np.int64, copy=False)
