"""Latency of a candidate from the table: overhead of one call plus its rows without theirs, corrected, per exit.

An image that leaves at exit k has passed every layer up to and including exit head k and k + 1 decisions (gates), so
estimates are cumulative over exits and the last one is the worst case. Two paths give the same numbers: `Estimator` for
one candidate or list of layers, `VectorEstimator` for many genotypes of a space at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from nas.core.errors import MissingRowError, RecordError
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures, LayerSpec
from nas.core.walk import expand
from nas.latency.feedback import Sums, predict_sums
from nas.latency.fitting import BYTES_PER_MB, MIXED, CompactFit, Fitted, LabelFit, Paths, describe, joined, paths_of
from nas.latency.ranks import ranks
from nas.latency.table import LatencyTable

CHUNK = 1024  # genotypes at a time: the arrays stay in the cache

# Error of the plain sum of rows against a measured network: about 5 % (fp32) and 3 % (int8) on x86-64, random mixes of
# both 3.6 %. Other precisions get the larger one until they are measured.
RAW_ERROR = {"fp32": 0.05, "int8": 0.03, "mixed": 0.04}
RAW_ERROR_UNKNOWN = 0.05
# Of the call that is taken off each row: a row alone hides a little more of it, or of its own work, than in a network.
# Sums for networks of tiny-32 (0.03 ms) are 0.6 us a layer too large, those of larger ones by too little to be seen.
RAW_LAYER_CALLS = 0.2

_CODES = {"fp32": 1, "fp16": 2, "int8": 4, "bf16": 8}
_LABELS = {code: name for name, code in _CODES.items()}

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
RowArray = NDArray[np.int32]


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
        self._slots = _Slots.of(space.slots())
        self._layers = self._slots.layers
        self._numbers = np.array([_row_numbers(table, layer) for layer in self._layers])
        self._codes = np.array([0 if x is None else _CODES[x.precision] for x in self._layers], np.uint8)
        self._compact: dict[str, CompactFit] = {}

    @property
    def exits(self) -> int:
        """Columns of an estimate: exits of the space + 1."""
        return len(self._slots.ends)

    def estimate(
        self, genotypes: ArrayLike, *, allow_missing: bool = False, label: str | None = None
    ) -> VectorEstimate:
        """Latencies of canonical genotypes.

        Args:
            genotypes: integers [N, G], one index per gene.
            allow_missing: gives NaN to genotypes that need a row which was not measured, instead of an error.
            label: whose correction is used for all of them; None: each that of its own precision.

        Raises:
            MissingRowError: a row is missing.
            RecordError: genotypes of another shape, or an index outside its gene.
        """
        rows = self._slots.rows_of(_as_genotypes(genotypes))
        codes = np.bitwise_or.reduce(self._codes.take(rows), axis=1)
        mean = np.full((self.exits, len(rows)), np.nan)
        std = np.full((self.exits, len(rows)), np.nan)
        if label is not None:
            groups = [(label, np.arange(len(rows)))]
        else:
            groups = [(_LABELS.get(int(code), MIXED), np.flatnonzero(codes == code)) for code in np.unique(codes)]
        for name, chosen in groups:
            for start in range(0, len(chosen), CHUNK):
                part = chosen[start : start + CHUNK]
                exits, candidates, exit_ms, exit_std = self._estimate(name, rows[part])
                mean[exits, part[candidates]], std[exits, part[candidates]] = exit_ms, exit_std
        if not allow_missing and np.isnan(mean[-1]).any():
            raise self._missing_error(rows[np.isnan(mean[-1])])
        # fmax passes over exits that are absent; they stay NaN because only values that are there are replaced.
        mean = np.where(np.isnan(mean), mean, np.fmax.accumulate(mean, axis=0))
        return VectorEstimate(np.ascontiguousarray(mean.T), np.ascontiguousarray(std.T))

    def _estimate(self, label: str, rows: RowArray) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
        """Exit and candidate of every path through candidates, its mean and deviation; NaN where it lacks a row.

        Args:
            label: precision of these candidates.
            rows: of each slot, shape [M, S].
        """
        is_end = np.zeros(rows.shape, np.bool_)
        is_end[:, self._slots.ends] = rows[:, self._slots.ends] > 0
        is_end[:, -1] = True
        ends = np.flatnonzero(is_end)
        candidates, slots = np.divmod(ends, rows.shape[1])
        # A path is the one before it in its candidate and the rows since: each row is looked up once.
        once, since = np.ones(rows.size, np.float32), np.concatenate([[0], ends + 1]).astype(np.int32)
        rows_since = csr_array((once, rows.ravel(), since), shape=(len(ends), len(self._layers)))
        nth = np.arange(len(ends)) - np.searchsorted(candidates, candidates)

        def add_before(sums: NDArray[Any]) -> None:
            for n in range(1, len(self._slots.ends)):
                later = np.flatnonzero(nth == n)
                sums[later] += sums[later - 1]

        numbers = rows_since @ self._numbers
        cells, squares = self._repeated(rows)
        np.add.at(numbers[:, _SQUARES], np.searchsorted(ends, cells), squares)
        if label == MIXED:
            np.add.at(numbers[:, _CHANGES], np.searchsorted(ends, self._changes(rows)), 1.0)
        add_before(numbers)
        paths = Paths(*np.ascontiguousarray(numbers[:, :_SQUARES].T))
        streaming_ms = self._streaming_ms(paths.weight_mb)
        fit = self._compact_fit(label)
        if fit is None:
            found = _plain(label, paths, self._overhead_ms, streaming_ms)
        else:
            sums = rows_since @ fit.rows
            add_before(sums)
            found = fit.predict(sums, paths, numbers[:, _SQUARES], self._overhead_ms, streaming_ms)
        return np.searchsorted(self._slots.ends, slots), candidates, *found

    def _repeated(self, rows: RowArray) -> tuple[IntArray, FloatArray]:
        """Where a row repeats an earlier one, as cells of the array [M, S], and what the squares lack for each.

        It is wrong twice, not independently: (2 c)^2 and not 2 c^2.
        """
        before, after = rows[:, self._slots.alike[0]], rows[:, self._slots.alike[1]]
        candidates, pairs = np.divmod(np.flatnonzero((before == after) & (after > 0)), after.shape[1])
        slots = self._slots.alike[1][pairs]
        return candidates * rows.shape[1] + slots, 2 * self._numbers[rows[candidates, slots], _SQUARES]

    def _changes(self, rows: RowArray) -> IntArray:
        """Where the precision is not that of the layer before, exit heads aside, as cells of the array [M, S]."""
        changed = np.zeros(rows.shape, np.bool_)
        last = np.zeros(len(rows), np.uint8)
        for s, code in enumerate(self._codes.take(rows).T):
            changed[:, s] = (code > 0) & (last > 0) & (code != last)
            if s not in self._slots.ends[:-1]:
                last = np.where(code > 0, code, last)
        return np.flatnonzero(changed)

    def _compact_fit(self, label: str) -> CompactFit | None:
        """The fit of a label, prepared when it is first asked for."""
        fit = _fit_for(self._fitted, label)
        if fit is not None and label not in self._compact:
            paths = Paths(*self._numbers[:, :_SQUARES].T)
            self._compact[label] = CompactFit.of(fit, self._layers, paths, self._overhead_ms)
        return self._compact.get(label)

    def layers(self, genotypes: ArrayLike) -> tuple[LayerSpec, ...]:
        """The distinct layers that these genotypes need rows for, in execution order.

        Args:
            genotypes: integers [N, G], canonical.
        """
        return tuple(self._used(self._slots.rows_of(_as_genotypes(genotypes))).values())

    def _used(self, rows: RowArray) -> dict[int, LayerSpec]:
        """The layers of rows [N, S], in execution order."""
        numbers = (int(row) for of_slot in rows.T for row in np.unique(of_slot))
        return {row: layer for row in numbers if (layer := self._layers[row]) is not None}

    def _missing_error(self, rows: RowArray) -> MissingRowError:
        missing = [layer.key for row, layer in self._used(rows).items() if np.isnan(self._numbers[row, 0])]
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
        "spearman": float(np.corrcoef(ranks(estimated), ranks(measured))[0, 1]),
        "within_5": float((np.abs(ratio) <= 0.05).mean()),
        "within_10": float((np.abs(ratio) <= 0.10).mean()),
        "n": float(len(ratio)),
    }


_CHANGES, _SQUARES = 6, 8  # columns of the numbers of a row: those of Paths in their order, then squares of rows_ms


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """The slots of a space over one list of its different layers.

    Attributes:
        layers: each once, the first None; their place in the list is the number of their row.
        rows: of the layers of each slot, one slot after the other.
        first: where each slot begins in them, shape [S].
        strides: how far one step of a gene moves in each slot, shape [G, S].
        sizes: of the genes that slots depend on, the largest number for others, shape [G].
        ends: slots after which an image may leave, the last one included.
        alike: pairs of slots, the earlier ones and the later ones, that have a row in common, shape [2, pairs].
    """

    layers: tuple[LayerSpec | None, ...]
    rows: RowArray
    first: FloatArray
    strides: FloatArray
    sizes: NDArray[np.int64]
    ends: IntArray
    alike: IntArray

    @classmethod
    def of(cls, slots: Sequence[SlotLike]) -> _Slots:
        """Numbers the layers."""
        numbers: dict[str, int] = {}
        layers: list[LayerSpec | None] = [None]
        rows = [np.zeros(len(slot.layers), np.int32) for slot in slots]
        genes = 1 + max(gene for slot in slots for gene in slot.genes)
        strides, sizes = np.zeros((genes, len(slots))), np.full(genes, np.iinfo(np.int64).max)
        for s, slot in enumerate(slots):
            for i, layer in enumerate(slot.layers):
                if layer is not None:
                    if layer.key not in numbers:
                        numbers[layer.key] = len(layers)
                        layers.append(layer)
                    rows[s][i] = numbers[layer.key]
            sizes[list(slot.genes)] = slot.shape
            strides[list(slot.genes), s] = np.cumprod((1, *slot.shape[:0:-1]))[::-1]
        of_slot = [set(r.tolist()) - {0} for r in rows]
        alike = [(i, j) for j in range(len(slots)) for i in range(j) if of_slot[i] & of_slot[j]]
        return cls(
            layers=tuple(layers),
            rows=np.concatenate(rows),
            first=np.cumsum([0.0, *map(len, rows[:-1])]),
            strides=strides,
            sizes=sizes,
            ends=np.array([s for s, slot in enumerate(slots) if slot.kind == "exit_head"] + [len(slots) - 1]),
            alike=np.array(alike, np.intp).reshape(-1, 2).T,
        )

    def rows_of(self, genotypes: NDArray[np.int64]) -> RowArray:
        """The row in each slot, 0 where there is no layer, shape [N, S].

        Raises:
            RecordError: fewer genes than slots depend on, or an index outside its gene.
        """
        genes = len(self.sizes)
        if genotypes.shape[1] < genes:
            raise RecordError(
                f"genotypes do not fit the space: they have {genotypes.shape[1]} genes, slots need {genes}"
            )
        result = np.empty((len(genotypes), len(self.first)), np.int32)
        for start in range(0, len(genotypes), CHUNK):
            g = genotypes[start : start + CHUNK, :genes]
            outside = (g < 0) | (g >= self.sizes)
            if outside.any():
                n, gene = (int(i[0]) for i in np.nonzero(outside))
                allowed = f"allowed are 0 to {self.sizes[gene] - 1}"
                raise RecordError(f"genotypes do not fit the space: gene {gene} is {g[n, gene]}, {allowed}")
            cells = g @ self.strides + self.first  # whole numbers below 2^53 are exact
            self.rows.take(cells.astype(np.intp), out=result[start : start + CHUNK], mode="clip")
        return result


def _row_numbers(table: LatencyTable, layer: LayerSpec | None) -> FloatArray:
    """The numbers of a layer; NaN where its row is missing."""
    if layer is None:
        return np.zeros(_SQUARES + 1)
    if not table.has_row(layer.key):
        return np.full(_SQUARES + 1, np.nan)
    is_exit = layer.kind == "exit_head"
    ms = table.net_ms(layer.key) + (table.gate_ms if is_exit else 0.0)
    side = layer.in_size if layer.kind == "stem" else 0
    variance = table.row_std_ms(layer.key) ** 2
    weight_mb, feature_mb = layer.weight_bytes / BYTES_PER_MB, layer.feature_bytes / BYTES_PER_MB
    return np.array([ms, weight_mb, feature_mb, is_exit, variance, 1, 0, side, ms**2], dtype=np.float64)


def _plain(label: str, paths: Paths, call_ms: float, streaming_ms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The plain sum: its error before any network was measured, and those of its rows."""
    total = call_ms + paths.rows_ms + streaming_ms
    error = RAW_ERROR.get(label, RAW_ERROR_UNKNOWN)
    unknown_ms = RAW_LAYER_CALLS * call_ms * paths.layers
    return total, np.sqrt(paths.variance + (error * total) ** 2 + unknown_ms**2)


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
