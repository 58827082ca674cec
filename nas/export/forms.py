"""What an exported network consists of: the paths that an image can take, their latencies, the layers it holds.

Form `if` leaves at an exit; form `plain` has none. An `If` costs the exit heads, and its branches are optimised one by
one, so only measuring tells which is faster: a search measures both for finished students near the front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures, LayerSpec, Measurement
from nas.core.run import LatencyKind
from nas.core.walk import expand
from nas.export.graph import forced_exit
from nas.export.manifest import PackageForm, PathLatency
from nas.latency.estimate import figures
from nas.latency.table import deviation_ms

MeasureLatency = Callable[[Sequence[bytes]], Sequence[Measurement]]


def reachable_exits(candidate: Candidate) -> tuple[int, ...]:
    """Exits where an image can leave the "if" form, in order; the number of exits stands for the head.

    Thresholds above 1 take nothing, thresholds of at most 0 everything.
    """
    result = []
    for k, place in enumerate(candidate.exits):
        if place.threshold is None:
            raise UsageError(f"exits[{k}] has no threshold; give candidate.with_thresholds(...)")
        if place.threshold <= 1.0:
            result.append(k)
        if place.threshold <= 0.0:
            return tuple(result)
    return (*result, len(candidate.exits))


def deployed_layers(candidate: Candidate, form: PackageForm) -> tuple[LayerSpec, ...]:
    """Layers that a model in this form holds: without exits where it has none, and nothing behind the last way out."""
    head = len(candidate.exits)
    reachable = (head,) if form == "plain" else reachable_exits(candidate)
    return tuple(
        layer
        for layer in expand(candidate)
        if layer.segment <= reachable[-1] and (layer.kind not in ("exit_head", "head") or layer.segment in reachable)
    )


def path_models(candidate: Candidate, form: PackageForm, model: bytes) -> dict[int, bytes]:
    """Models whose latencies describe an exported one: by exit index, each forced to leave there."""
    head = len(candidate.exits)
    if form == "plain":
        return {head: model}
    return {k: forced_exit(model, k) for k in reachable_exits(candidate)}


def measured_figures(measurements: Sequence[Measurement], shares: Sequence[float]) -> LatencyFigures:
    """Expected, worst-case and 99 % latency from one measurement and one share of images per path, in order.

    Raises:
        DeviceError: a measurement failed.
    """
    values: list[float] = []
    deviations: list[float] = []
    for m in measurements:
        if m.latency_ms is None:
            raise DeviceError(f"{m.key}: the exported network could not be measured: {m.error}")
        values.append(m.latency_ms)
        deviations.append(deviation_ms(m))
    estimate = LatencyEstimate(tuple(values), tuple(deviations), rows_used=0, correction="measured")
    return replace(figures(estimate, shares), worst_ms=max(values), provenance="measured")


def median_figures(measurements: Sequence[Measurement], paths: Sequence[PathLatency]) -> LatencyFigures:
    """The same from the median of the runs of each path (`PathLatency`): what a deadline is judged by.

    The protocol's value is the latency of an undisturbed run.
    """
    medians = [replace(m, latency_ms=path.p50_ms) for m, path in zip(measurements, paths, strict=True)]
    return measured_figures(medians, tuple(path.share for path in paths))


def limited_deviation_ms(measurements: Sequence[Measurement], shares: Sequence[float], of: LatencyKind) -> float:
    """Standard deviation with which the latency that a budget limits comes out when the file is measured once more.

    Of the mean over the images for `expected` (what disturbs one path disturbs all), else that of the worst path.
    """
    deviations = [deviation_ms(m) for m in measurements]
    if of == "expected":
        return float(sum(share * std for share, std in zip(shares, deviations, strict=True)))
    return max(deviations)


def path_shares(candidate: Candidate, form: PackageForm, exit_shares: Sequence[float]) -> dict[int, float]:
    """Share of images of each path, by exit index.

    Args:
        candidate: with thresholds for form "if".
        form: of the model.
        exit_shares: one per exit, the head last; ignored for "plain".

    Raises:
        UsageError: another number of shares, or a share where no image can leave.
    """
    head = len(candidate.exits)
    if form == "plain":
        return {head: 1.0}
    if len(exit_shares) != head + 1:
        raise UsageError(f"expected {head + 1} exit shares (exits, then the head), got {len(exit_shares)}")
    reachable = reachable_exits(candidate)
    for k, share in enumerate(exit_shares):
        if share > 0 and k not in reachable:
            raise UsageError(f"{100 * share:.1f} % of the images leave at exit {k}, which its threshold forbids")
    return {k: exit_shares[k] for k in reachable}
