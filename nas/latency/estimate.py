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
from nas.latency.feedback import Sums, predict_sums
from nas.latency.fitting import BYTES_PER_MB, MIXED, Fitted, LabelFit, Paths, describe, joined, paths_of
from nas.latency.table import LatencyTable

CHUNK = 2048  # genotypes at a time: the arrays stay in the cache

# Error of the plain sum of rows against a measured network: about 5 % (fp32) and 3 % (int8) on x86-64, random mixes of
# both 3.6 %. Other precisions get the larger one until they are measured.
RAW_ERROR = {"fp32": 0.05, "int8": 0.03, "mixed": 0.04}
RAW_ERROR_UNKNOWN = 0.05

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


class Estimator:
    """Estimates single candidates."""

    def __init__(self, table: LatencyTable, fitted: Fitted | None = None, *, gated: bool = True) -> None:
        """Reads rows when it estimates.

        Args:
            table: rows and overhead.
            fitted: the correction; None means the plain sum.
            gated: early exits are deployed as decisions; False: every exit is computed and none decides.
        """
        self._table = table
        self._gated = gated
        self._fitted = fitted

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
        fit = _fit_for(self._fitted, label)
        paths = joined(paths_of(self._table, layers, gated=self._gated))
        call_ms, streaming_ms = self._table.overhead_ms, self._table.streaming_ms(paths.weight_mb)
        if fit is None:
            mean, std = _plain(label, paths, call_ms, streaming_ms)
        else:
            sums = fit.finished(*self._sums(fit, layers), call_ms, streaming_ms)
            mean, std = _corrected(fit, paths, sums, call_ms, streaming_ms)
        return LatencyEstimate(
            exit_ms=tuple(float(v) for v in np.maximum.accumulate(mean)),
            exit_std_ms=tuple(float(v) for v in std),
            rows_used=len(layers),
            correction="raw table" if fit is None else fit.record.label,
        )

    def _sums(self, fit: LabelFit, layers: Sequence[LayerSpec]) -> tuple[FloatArray, FloatArray]:
        """Columns of the fit and sums of squares along the way, for the path to each exit."""
        columns, squares, column = [], [], np.zeros(fit.width)
        spent: dict[str, float] = {}
        for x, after in zip(layers, (*layers[1:], None), strict=True):
            gate_ms = self._table.gate_ms if x.kind == "exit_head" and self._gated else 0.0
            ms = self._table.net_ms(x.key) + gate_ms
            spent[x.key] = spent.get(x.key, 0.0) + ms
            column = column + ms * fit.column(x)
            if after is None or after.segment != x.segment:
                columns.append(column)
                squares.append(sum(v**2 for v in spent.values()))
        return np.array(columns), np.array(squares)


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

    def __init__(self, space: SpaceLike, table: LatencyTable, fitted: Fitted | None = None) -> None:
        """Prepares the look-up tables.

        Args:
            space: gives the slots, in execution order.
            table: rows and overhead.
            fitted: the correction; None means the plain sum.

        Raises:
            MissingRowError: the overhead has not been measured.
        """
        self._overhead_ms = table.overhead_ms
        self._streaming_ms = table.streaming_ms if table.streaming else np.zeros_like
        self._folder = table.folder
        self._fitted = fitted
        self._slots = tuple(space.slots())
        known: dict[str, tuple[int, FloatArray]] = {}
        self._tables = [_SlotTable.of(slot, table, known) for slot in self._slots]
        # Slots that may repeat a row of an earlier one: what is wrong with it is wrong twice, not independently.
        keys = [set(t.rows[t.rows >= 0].tolist()) for t in self._tables]
        self._alike = [[j for j in range(i) if keys[i] & keys[j]] for i in range(len(keys))]
        self._columns: dict[str, list[FloatArray]] = {}
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
        index = [self._index(slot, g) for slot in self._slots]
        codes = np.zeros(len(g), np.uint8)
        for i, table in zip(index, self._tables, strict=True):
            codes |= table.codes.take(i)
        mean = np.full((self._exits, len(g)), np.nan)
        std = np.full((self._exits, len(g)), np.nan)
        for code in np.unique(codes):
            label = _LABELS.get(int(code), MIXED)
            chosen = np.flatnonzero(codes == code)
            for start in range(0, len(chosen), CHUNK):
                part = chosen[start : start + CHUNK]
                self._estimate(label, part, [i[part] for i in index], mean, std)
        if not allow_missing and np.isnan(mean[-1]).any():
            raise self._missing_error(g[np.isnan(mean[-1])])
        # fmax passes over exits that are absent; they stay NaN because only values that are there are replaced.
        mean = np.where(np.isnan(mean), mean, np.fmax.accumulate(mean, axis=0))
        return VectorEstimate(np.ascontiguousarray(mean.T), np.ascontiguousarray(std.T))

    def _estimate(
        self, label: str, where: NDArray[np.intp], index: list[NDArray[np.intp]], mean: FloatArray, std: FloatArray
    ) -> None:
        """Fills in the estimates of the genotypes at `where`, whose slots hold `index`."""
        fit = _fit_for(self._fitted, label)
        columns = self._columns_of(label, fit)
        sums = np.zeros((len(where), columns[0].shape[1]))
        last = np.zeros(len(where), np.uint8)
        ends: list[tuple[int, NDArray[np.intp], FloatArray]] = []  # exit, genotypes that have it, their sums up to it
        for s, slot in enumerate(self._slots):
            table = self._tables[s]
            code = table.codes.take(index[s])
            sums += columns[s].take(index[s], axis=0)
            if label == MIXED:
                sums[:, _CHANGES] += (code > 0) & (last > 0) & (code != last)
            for before in self._alike[s]:
                other = self._tables[before]
                repeats = np.flatnonzero(table.rows.take(index[s]) == other.rows.take(index[before]))  # -1: adds 0
                sums[repeats, _SQUARES] += 2 * table.numbers[index[s][repeats], _SQUARES]
            if slot.kind == "exit_head":
                ends.append((len(ends), np.flatnonzero((code > 0) & ~np.isnan(sums[:, 0])), sums.copy()))
            else:
                last = np.where(code > 0, code, last)
        ends.append((self._exits - 1, np.flatnonzero(~np.isnan(sums[:, 0])), sums))
        found = self._predicted(label, fit, np.concatenate([at_end[there] for _, there, at_end in ends]))
        cuts = np.cumsum([len(there) for _, there, _ in ends])[:-1]
        for (row, there, _), exit_ms, exit_std in zip(ends, *(np.split(f, cuts) for f in found), strict=True):
            mean[row, where[there]], std[row, where[there]] = exit_ms, exit_std

    def _predicted(self, label: str, fit: LabelFit | None, sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        paths = Paths(*sums[:, :_SQUARES].T)
        streaming_ms = self._streaming_ms(paths.weight_mb)
        if fit is None or not len(sums):
            return _plain(label, paths, self._overhead_ms, streaming_ms)
        whole = fit.finished(sums[:, _SQUARES + 1 :], sums[:, _SQUARES], self._overhead_ms, streaming_ms)
        return _corrected(fit, paths, whole, self._overhead_ms, streaming_ms)

    def _columns_of(self, label: str, fit: LabelFit | None) -> list[FloatArray]:
        """What each layer of each slot adds to the sums; with a fit, prepared when its label is first asked for."""
        if fit is None:
            return [table.numbers for table in self._tables]
        if label not in self._columns:
            known: dict[str, FloatArray] = {}
            result = []
            for slot, table in zip(self._slots, self._tables, strict=True):
                columns = np.zeros((len(slot.layers), fit.width))
                for i, layer in enumerate(slot.layers):
                    if layer is not None and not np.isnan(table.numbers[i, 0]) and fit.knows(layer):
                        if layer.key not in known:
                            known[layer.key] = fit.column(layer)
                        columns[i] = table.numbers[i, 0] * known[layer.key]
                result.append(np.hstack([table.numbers, columns]))
            self._columns[label] = result
        return self._columns[label]

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

    def _missing_error(self, g: NDArray[np.int64]) -> MissingRowError:
        missing = []
        for slot, table in zip(self._slots, self._tables, strict=True):
            for i in np.unique(self._index(slot, g)):
                layer = slot.layers[int(i)]
                if layer is not None and np.isnan(table.numbers[i, 0]):
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


_CHANGES, _SQUARES = 5, 7  # columns of a slot's numbers: those of Paths in their order, then squares of rows_ms


@dataclass(frozen=True, slots=True, eq=False)
class _SlotTable:
    """What the layers of one slot add up to: numbers [L, 8], precision codes [L], row numbers [L].

    No layer has zeros and the row number -1.
    """

    numbers: FloatArray
    codes: NDArray[np.uint8]
    rows: NDArray[np.intp]

    @classmethod
    def of(cls, slot: SlotLike, table: LatencyTable, known: dict[str, tuple[int, FloatArray]]) -> _SlotTable:
        """Reads the table; `known` has the rows that were read for other slots."""
        count = len(slot.layers)
        made = cls(np.zeros((count, _SQUARES + 1)), np.zeros(count, np.uint8), np.full(count, -1, np.intp))
        for i, layer in enumerate(slot.layers):
            if layer is not None:
                if layer.key not in known:
                    known[layer.key] = (len(known), _row_numbers(table, layer))
                made.rows[i], made.numbers[i] = known[layer.key]
                made.codes[i] = _CODES[layer.precision]
        return made


def _row_numbers(table: LatencyTable, layer: LayerSpec) -> FloatArray:
    """The numbers of a layer; NaN where its row is missing."""
    if not table.has_row(layer.key):
        return np.full(_SQUARES + 1, np.nan)
    is_exit = layer.kind == "exit_head"
    ms = table.net_ms(layer.key) + (table.gate_ms if is_exit else 0.0)
    side = layer.in_size if layer.kind == "stem" else 0
    variance = table.row_std_ms(layer.key) ** 2
    return np.array([ms, layer.weight_bytes / BYTES_PER_MB, is_exit, variance, 1, 0, side, ms**2], dtype=np.float64)


def _plain(label: str, paths: Paths, call_ms: float, streaming_ms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The plain sum: its error before any network was measured, and those of its rows."""
    total = call_ms + paths.rows_ms + streaming_ms
    error = RAW_ERROR.get(label, RAW_ERROR_UNKNOWN)
    return total, np.sqrt(paths.variance + (error * total) ** 2)


def _corrected(
    fit: LabelFit, paths: Paths, sums: Sums, call_ms: float, streaming_ms: FloatArray
) -> tuple[FloatArray, FloatArray]:
    counts, descriptors = describe(paths, call_ms + paths.rows_ms + streaming_ms)
    found = predict_sums(fit.feedback, sums, counts, descriptors)
    return found.mean_ms, found.std_ms * fit.feedback.normal_factor


def _fit_for(fitted: Fitted | None, label: str) -> LabelFit | None:
    return None if fitted is None else fitted.fits.get(label)


def _precision_label(precisions: set[str]) -> str:
    return next(iter(precisions)) if len(precisions) == 1 else MIXED


def _as_genotypes(genotypes: ArrayLike) -> NDArray[np.int64]:
    g = np.asarray(genotypes)
    if g.ndim != 2 or not np.issubdtype(g.dtype, np.integer):
        raise RecordError(f"genotypes must be integers [N, G], got {g.dtype} {list(g.shape)}")
    return g.astype(np.int64, copy=False)
