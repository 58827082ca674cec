"""From the measured networks of a table to a correction: what each network consists of, for `nas.latency.feedback`.

The entries of the fit are the rows, one call and the streamed weights; its groups are those of the layers
(`LayerSpec.group` and the precision). What no row contains is charged by counting: calls, layers, megabytes of weights,
decisions at exits, changes of precision between layers. The smooth rest may depend on the share of weights and on the
input size.

One fit per precision label. A label with one precision uses its own networks; `mixed` uses all, since a network in
mixed precision consists of layers that the others contain too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from nas.core.records import LayerSpec, Precision
from nas.core.run import TableChange
from nas.core.walk import expand
from nas.latency import feedback
from nas.latency.correction import Correction, Finding, NetworkEvidence, PrecisionFit
from nas.latency.feedback import Compact, Feedback, Networks, Prior, SingleArray, Sums
from nas.latency.keys import layer_of_key
from nas.latency.lines import MeasuredNetwork
from nas.latency.table import LatencyTable

FloatArray = NDArray[np.float64]

MOST_NETWORKS = 100  # of a fit, the newest; more cost seconds and teach little
DISTURBED = 3.0  # times noisier is a network without one calm round
BYTES_PER_MB = 1e6
MIXED = "mixed"

CALL, STREAMING = "call", "streaming"
LAYER_GROUPS = ("stem", "inverted_residual", "inverted_residual_se", "exit_head", "head")  # further ones as they come
COSTS = ("call", "layer", "MB of weights", "MB of feature maps", "decision at an exit", "change of precision")

# Units in which the smooth rest sees a network: a doubling of the weights per ms, or of the input size, is two of them.
LOG_WEIGHTS, LOG_SIDE, SIDE = 0.5, 0.35, 64.0


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """Sums over the layers of M paths through networks, from the input up to an exit or the head; shapes [M].

    Attributes:
        rows_ms: of the rows without their calls, decisions included.
        weight_mb: weights on the way, 10^6 bytes.
        feature_mb: feature maps written on the way, 10^6 bytes.
        gates: decisions on the way.
        variance: of the rows, ms^2.
        layers: how many.
        changes: of precision between layers that follow each other.
        side: pixels of the input.
    """

    rows_ms: FloatArray
    weight_mb: FloatArray
    feature_mb: FloatArray
    gates: FloatArray
    variance: FloatArray
    layers: FloatArray
    changes: FloatArray
    side: FloatArray

    def __len__(self) -> int:
        return len(self.rows_ms)


@dataclass(frozen=True, slots=True, eq=False)
class LabelFit:
    """The correction of one precision label, ready for use.

    Attributes:
        record: what is stored of it.
        feedback: the fit.
        groups: number of each group in it.
        entries: number of each row in it; any other row moves with its group only.
    """

    record: PrecisionFit
    feedback: Feedback
    groups: Mapping[str, int]
    entries: Mapping[str, int]

    @property
    def width(self) -> int:
        """Columns that are added up over the layers of a path: groups, and the measured networks."""
        return len(self.groups) + len(self.feedback.shares)

    def knows(self, layer: LayerSpec) -> bool:
        """Whether the fit is for layers in this precision."""
        return _group(layer) in self.groups

    def column(self, layer: LayerSpec) -> FloatArray:
        """What one ms of a layer adds to each of the columns."""
        return self._column(self.groups[_group(layer)], self.entries.get(layer.key))

    @property
    def own_columns(self) -> FloatArray:
        """What one ms of a call, and of streaming, adds to each of the columns, shape [2, width]."""
        return np.stack([self._column(self.groups[name], self.entries[name]) for name in (CALL, STREAMING)])

    def finished(self, columns: FloatArray, squares: FloatArray, call_ms: float, streaming_ms: FloatArray) -> Sums:
        """The sums of paths with one call and their streamed weights added to those of the layers.

        Args:
            columns: shape [M, width].
            squares: of the milliseconds of each different row, shape [M].
            call_ms: one call.
            streaming_ms: shape [M].
        """
        call, streaming = self.own_columns
        return Sums(
            columns + call_ms * call + streaming_ms[:, None] * streaming, squares + call_ms**2 + streaming_ms**2
        )

    def _column(self, group: int, entry: int | None) -> FloatArray:
        column = np.zeros(self.width)
        column[group] = 1.0
        if entry is not None:
            column[len(self.groups) :] = self.feedback.shares[:, entry]
        return column


@dataclass(frozen=True, slots=True, eq=False)
class CompactFit:
    """A `LabelFit` multiplied out: its outputs are sums over the rows of a path.

    Attributes:
        compact: predicts from the sums.
        rows: what each row adds, shape [R, L].
        others: what a call, a millisecond of streaming, a change of precision, and a millisecond in all add, [4, L].
    """

    compact: Compact
    rows: SingleArray
    others: SingleArray

    @classmethod
    def of(cls, fit: LabelFit, layers: Sequence[LayerSpec | None], paths: Paths, call_ms: float) -> CompactFit:
        """Multiplies a fit out.

        Args:
            fit: of any label.
            layers: of each row, R; None adds nothing.
            paths: each row as a path of its own, NaN where it is missing.
            call_ms: one call.
        """
        columns = np.zeros((len(layers), fit.width))
        for i, layer in enumerate(layers):
            if layer is not None and fit.knows(layer):
                columns[i] = fit.column(layer)
        compact = feedback.compact(fit.feedback)
        rows = paths.rows_ms[:, None] * (columns @ compact.by_column) + _counts(paths, calls=0) @ compact.by_overhead
        call, streaming = fit.own_columns @ compact.by_column
        a_call, *_, a_change = compact.by_overhead
        others = np.stack([call_ms * call + a_call, streaming, a_change, compact.by_total])
        return cls(compact, rows.astype(np.float32), others.astype(np.float32))

    def predict(
        self, sums: SingleArray, paths: Paths, squares: FloatArray, call_ms: float, streaming_ms: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of M paths, milliseconds, shape [M] each; that of a normal with the interval.

        Args:
            sums: of the rows of each path, shape [M, L].
            paths: shape [M].
            squares: of the milliseconds of each different row, shape [M].
            call_ms: one call.
            streaming_ms: shape [M].
        """
        total_ms = call_ms + paths.rows_ms + streaming_ms
        amounts = np.column_stack([np.ones(len(paths)), streaming_ms, paths.changes, total_ms]).astype(np.float32)
        squares = squares + call_ms**2 + streaming_ms**2
        all_sums = amounts @ self.others
        all_sums += sums
        descriptors = _descriptors(paths, total_ms)
        mean, std = feedback.predict_compact(self.compact, total_ms, all_sums, squares, descriptors)
        return mean, std * self.compact.normal_factor


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A correction ready for use: what is stored of it, and the fit of each precision label."""

    correction: Correction
    fits: Mapping[str, LabelFit]


def fit_correction(table: LatencyTable, networks: Iterable[MeasuredNetwork] | None = None) -> Fitted:
    """Fits the correction of each precision label from measured whole networks.

    Args:
        table: rows and overhead; `table.save_correction` stores the record.
        networks: which networks to use; by default all of the table.

    Raises:
        MissingRowError: the overhead has not been measured.
    """
    usable: list[MeasuredNetwork] = []
    skipped = []
    for network in table.networks.values() if networks is None else networks:
        m = network.measurement
        unknown = [x.key for x in layers_of(network) if not table.has_row(x.key)]
        if m.latency_ms is None:
            skipped.append(f"{m.key}: {m.error}")
        elif unknown:
            more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
            skipped.append(f"{m.key}: no row for {unknown[0]}{more}")
        else:
            usable.append(network)
    by_label: dict[str, list[MeasuredNetwork]] = {}
    for network in usable:
        by_label.setdefault(network.candidate.precision_label, []).append(network)
    if len(by_label) > 1:
        by_label[MIXED] = usable
    fits = {label: _fit_label(table, label, found) for label, found in sorted(by_label.items())}
    record = Correction(table.profile.fingerprint, tuple(fit.record for fit in fits.values()), tuple(skipped))
    return Fitted(record, fits)


def fit_again(table: LatencyTable, stored: Correction) -> Fitted:
    """The correction that a stored record tells of: fitted to the networks that it names."""
    named = {n.key for fit in stored.fits for n in fit.networks}
    fitted = fit_correction(table, [n for key, n in table.networks.items() if key in named])
    return replace(fitted, correction=replace(fitted.correction, skipped=stored.skipped))


def layers_of(network: MeasuredNetwork) -> tuple[LayerSpec, ...]:
    """The layers that a measured network executes: form `plain` has no exit heads."""
    layers = expand(network.candidate)
    return tuple(x for x in layers if network.form != "plain" or x.kind != "exit_head")


def describe(paths: Paths, total_ms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Counts of what no row contains (in the order of COSTS), shape [M, 6], and what the rest depends on, [M, 2]."""
    return _counts(paths, calls=1), _descriptors(paths, total_ms)


def _counts(paths: Paths, calls: int) -> FloatArray:
    return np.column_stack(
        [np.full(len(paths), calls), paths.layers, paths.weight_mb, paths.feature_mb, paths.gates, paths.changes]
    )


def _descriptors(paths: Paths, total_ms: FloatArray) -> FloatArray:
    per_ms = np.maximum(paths.weight_mb, 1e-6) / total_ms
    return np.column_stack([np.log(per_ms) / LOG_WEIGHTS, np.log(paths.side / SIDE) / LOG_SIDE])


def written_back(table: LatencyTable, correction: Correction) -> dict[str, Finding]:
    """What the rows of a table become, ms without the overhead of their calls, with standard deviations.

    With a call, the streamed weights and the decisions at exits times their own factors (in `PrecisionFit.rows`; a
    decision has that of its exit head), and the `costs` of the fit, the sum of the rows of a network is the linear part
    of its corrected estimate. Rows that no measured network contains move with their group. A row is corrected by the
    fit of its own precision, else by that of mixed networks; where there is neither it is left out.

    Args:
        table: that the correction belongs to.
        correction: as stored.
    """
    rows = {fit.precision: {f.name: f for f in fit.rows} for fit in correction.fits}
    result = {}
    for key in table.rows:
        layer = layer_of_key(key)
        fit = correction.fit_for(layer.precision) or correction.fit_for(MIXED)
        if fit is not None and table.has_row(key):
            factor = rows[fit.precision].get(key) or group_factor(fit, _group(layer))
            result[key] = Finding(key, table.net_ms(key) * factor.value, table.net_ms(key) * factor.std)
    return result


def group_factor(fit: PrecisionFit, group: str) -> Finding:
    """Corrected / raw time of the rows of an operator group that no measured network contains."""
    found = next((f for f in fit.groups if f.name == group), Finding(group, 0.0, 0.0))
    value = fit.scale * (1 + fit.constant.value + found.value)
    return Finding(group, value, fit.scale * float(np.hypot(fit.constant.std, found.std)))


def table_changes(correction: Correction) -> tuple[TableChange, ...]:
    """What the measured networks changed: each operator group that they contain, then each cost that rows lack."""
    result = []
    for fit in correction.fits:
        label, networks = fit.precision, len(fit.networks)
        by_group: dict[str, list[float]] = {}
        for row in fit.rows:
            group = row.name if row.name in (CALL, STREAMING) else _group(layer_of_key(row.name))
            by_group.setdefault(group, []).append(row.value)
        for group, values in by_group.items():
            f = group_factor(fit, group)
            found = TableChange(label, group, "rows", f.value, f.std, networks, len(values), min(values), max(values))
            result.append(found)
        result += [TableChange(label, f"each {c.name}", "cost", c.value, c.std, networks) for c in fit.costs if c.value]
    return tuple(result)


def _fit_label(table: LatencyTable, label: str, networks: Sequence[MeasuredNetwork]) -> LabelFit:
    networks = sorted(networks, key=lambda n: n.measurement.sequence)[-MOST_NETWORKS:]
    precisions = get_args(Precision) if label == MIXED else (label,)
    # Of the table too: a group that no measured network contains is estimated by what all groups have in common.
    further = {layer_of_key(key).group for key in (*table.rows, *table.interpolated)}
    further = (further | {x.group for network in networks for x in layers_of(network)}).difference(LAYER_GROUPS)
    layer_groups = (*LAYER_GROUPS, *sorted(further))
    names = (CALL, *(f"{group} {p}" for p, group in product(precisions, layer_groups)), STREAMING)
    groups = {name: i for i, name in enumerate(names)}
    entries = {CALL: 0, STREAMING: 1}
    group_of = [groups[CALL], groups[STREAMING]]
    contributions: list[dict[int, float]] = []
    paths = []
    for network in networks:
        layers = layers_of(network)
        gate_ms = table.gate_ms if network.form == "if" else 0.0
        found: dict[int, float] = {entries[CALL]: table.overhead_ms}
        for x in layers:
            if x.key not in entries:
                entries[x.key] = len(entries)
                group_of.append(groups[_group(x)])
            entry = entries[x.key]
            found[entry] = found.get(entry, 0.0) + table.net_ms(x.key) + (gate_ms if x.kind == "exit_head" else 0.0)
        path = whole_path(table, layers, gated=network.form == "if")
        found[entries[STREAMING]] = float(table.streaming_ms(path.weight_mb)[0])
        contributions.append(found)
        paths.append(path)
    matrix = np.zeros((len(networks), len(entries)))
    for i, found in enumerate(contributions):
        matrix[i, list(found)] = list(found.values())
    counts, descriptors = describe(joined(paths), matrix.sum(axis=1))
    is_own = table.profile.kind != "imported" and table.foreign is None
    prior: Prior = "same device" if is_own else "other"
    measured = np.array([n.measurement.latency_ms or 0.0 for n in networks])
    doubt = [1.0 if n.measurement.is_stable else DISTURBED for n in networks]
    fit = feedback.fit(Networks(matrix, counts, descriptors), measured, group_of, prior=prior, doubt=doubt)
    return LabelFit(_record(label, fit, groups, entries, networks, matrix), fit, groups, entries)


def whole_path(table: LatencyTable, layers: Sequence[LayerSpec], *, gated: bool) -> Paths:
    """The path through all of these layers, M = 1; with `gated` each exit head is followed by its decision."""
    return paths_of(table, layers, gated=gated)[-1]


def paths_of(table: LatencyTable, layers: Sequence[LayerSpec], *, gated: bool) -> list[Paths]:
    """The paths to each exit and to the head, M = 1 each.

    Raises:
        MissingRowError: a row is missing.
    """
    total = np.zeros(len(fields(Paths)))
    total[-1] = layers[0].in_size
    last: Precision | None = None
    result: list[Paths] = []
    for x, after in zip(layers, (*layers[1:], None), strict=True):
        number_of_gates = float(x.kind == "exit_head" and gated)
        changes = float(last is not None and x.precision != last)
        total += (
            table.net_ms(x.key) + number_of_gates * table.gate_ms,
            x.weight_bytes / BYTES_PER_MB,
            x.feature_bytes / BYTES_PER_MB,
            number_of_gates,
            table.row_std_ms(x.key) ** 2,
            1.0,
            changes,
            0.0,
        )
        if x.kind != "exit_head":
            last = x.precision
        if after is None or after.segment != x.segment:
            result.append(Paths(*total[:, None].copy()))
    return result


def joined(paths: Sequence[Paths]) -> Paths:
    """Several as one."""
    return Paths(*(np.concatenate([getattr(p, f.name) for p in paths]) for f in fields(Paths)))


def _group(layer: LayerSpec) -> str:
    return f"{layer.group} {layer.precision}"


def _record(
    label: str,
    fit: Feedback,
    groups: Mapping[str, int],
    entries: Mapping[str, int],
    networks: Sequence[MeasuredNetwork],
    contributions_ms: FloatArray,
) -> PrecisionFit:
    c = feedback.coefficients(fit)
    alone = len(networks) < 2
    error = float(np.sqrt(fit.prior[-2:].sum())) * fit.calibration
    of_scale = 0.0 if fit.method == "bayes" else error  # few networks: every row is as uncertain as the scale
    sums_ms, used = contributions_ms.sum(axis=1), contributions_ms.sum(axis=0) > 0  # small networks stream no weights
    return PrecisionFit(
        precision=label,
        method="bayes" if fit.method == "bayes" else "scale",
        reason=fit.reason,
        scale=fit.scale,
        constant=Finding("all", c.constant, c.constant_std + of_scale),
        groups=tuple(Finding(name, float(c.group[i]), float(c.group_std[i])) for name, i in groups.items()),
        costs=tuple(
            Finding(name, float(c.overhead_ms[i]), float(c.overhead_std_ms[i])) for i, name in enumerate(COSTS)
        ),
        rows=tuple(
            Finding(key, fit.scale * float(c.factor[i]), fit.scale * (float(c.factor_std[i]) + of_scale))
            for key, i in entries.items()
            if used[i]
        ),
        error=error,
        networks=tuple(
            NetworkEvidence(
                n.measurement.key,
                float(sums_ms[i]),
                float(fit.measured_ms[i]),
                n.measurement.is_stable,
                None if alone else float(fit.left_out_ms[i]),
                None if alone else float(fit.left_out_std_ms[i]),
                float(fit.outlier[i]),
            )
            for i, n in enumerate(networks)
        ),
    )
