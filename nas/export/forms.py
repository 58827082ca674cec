"""What an exported network consists of: the paths that an image can take, their latencies, the layers it holds.

Form `if` leaves at an exit; form `plain` has none; form `segments` is a chain of models between which the host decides.
An `If` costs the exit heads, and its branches are optimised one by one, so only measuring tells which is faster: a
search measures both for finished students near the front. On TensorRT a conditional may cost more than its branch, so
exits are deployed as segments there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures, LayerSpec, Measurement
from nas.core.run import LatencyKind
from nas.core.walk import expand
from nas.export.dialect import ORT, Dialect
from nas.export.graph import Segment, forced_exit
from nas.export.manifest import PackageForm, PathLatency, calm_runs
from nas.latency.estimate import figures
from nas.latency.table import deviation_ms

MeasureLatency = Callable[[Sequence[bytes]], Sequence[Measurement]]
Run = Callable[[bytes, NDArray[np.float32]], Sequence[NDArray[Any]]]
Artefact = bytes | tuple[Segment, ...]  # what is deployed: one model, or the chain of form "segments"


def exits_form(dialect: Dialect) -> PackageForm:
    """The form in which a network with exits is deployed on a runtime."""
    return "if" if dialect is ORT else "segments"


def answers(
    run: Run, artefact: Artefact, images: NDArray[np.float32], head: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Logits [N, K] and the exits [N] that the images took; `head` stands for the head.

    A chain is run segment by segment, each for the images that are left.

    Args:
        run: executes a model on images or feature maps [N, C, H, W].
        artefact: one model, or a chain.
        images: raw pixels float32 [N, C, H, W].
        head: number of exits of the candidate.
    """
    if isinstance(artefact, bytes):
        outputs = [np.asarray(output) for output in run(artefact, images)]
        exits = outputs[1] if len(outputs) > 1 else np.full(len(images), head)
        return outputs[0], exits.astype(np.int64)
    left = np.arange(len(images))
    features: NDArray[Any] = images
    logits: NDArray[Any] | None = None
    taken = np.full(len(images), head, np.int64)
    for segment in artefact:
        outputs = [np.asarray(output) for output in run(segment.model, features)]
        if logits is None:
            logits = np.empty((len(images), outputs[0].shape[1]), outputs[0].dtype)
        logits[left], taken[left] = outputs[0], segment.exit_index
        if segment.threshold is None:
            break
        # decided in float32, in which the exported graphs compare
        stays = outputs[1].astype(np.float32) < np.float32(segment.threshold)
        left, features = left[stays], outputs[2][stays]
        if not len(left):
            break
    if logits is None:
        raise UsageError("a chain without segments answers nothing")
    return logits, taken


def measured_paths(
    candidate: Candidate, form: PackageForm, artefact: Artefact, measure: MeasureLatency
) -> tuple[tuple[int, ...], list[Measurement]]:
    """Measures an artefact: the exits that an image can take, the head last, and the latency of each path.

    A chain is measured segment by segment; a path is the sum of what it passes. The host's decision between two
    segments is not in it.

    Raises:
        DeviceError: the device gave another number of results, or could not measure a segment.
    """
    if isinstance(artefact, bytes):
        models = path_models(candidate, form, artefact)
        return tuple(models), _all_measured(measure, list(models.values()))
    found = _all_measured(measure, [segment.model for segment in artefact])
    paths = [in_series(found[: i + 1]) for i in range(len(found))]
    return tuple(segment.exit_index for segment in artefact), paths


def in_series(measurements: Sequence[Measurement]) -> Measurement:
    """What is executed one after the other as one measurement.

    The sample at each quantile is the sum of the samples at that quantile, and so with sessions: exact for the sum when
    disturbances hit all parts together, and an upper bound of its spread otherwise.

    Raises:
        DeviceError: one of them is an error.
    """
    for m in measurements:
        if m.latency_ms is None:
            raise DeviceError(f"{m.key}: the exported network could not be measured: {m.error}")
    if len(measurements) == 1:
        return measurements[0]
    last = measurements[-1]
    calm = [calm_runs(m) for m in measurements]
    count = min(len(runs) for runs in calm)
    places = np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5])
    runs = sum(np.quantile(values, places) for values in calm) if count else np.empty(0)
    sessions = min(len(m.session_ms) for m in measurements)
    copies = [m.transfer_ms for m in measurements]
    ranks = np.linspace(0.0, 1.0, sessions)
    by_rank = [np.quantile(m.session_ms, ranks).tolist() for m in measurements] if sessions else []
    return replace(
        last,
        latency_ms=sum(m.latency_ms or 0.0 for m in measurements),
        rounds_ms=(tuple(np.asarray(runs).tolist()),),
        accepted=(all(m.is_stable for m in measurements),),
        session_ms=tuple(sum(values) for values in zip(*by_rank, strict=True)),
        transfer_ms=None if None in copies else sum(ms for ms in copies if ms is not None),
    )


def _all_measured(measure: MeasureLatency, models: Sequence[bytes]) -> list[Measurement]:
    measurements = list(measure(models))
    if len(measurements) != len(models):
        raise DeviceError(f"{len(models)} models were to be measured, {len(measurements)} results came back")
    return measurements


def reachable_exits(candidate: Candidate) -> tuple[int, ...]:
    """Exits where an image can leave a form with exits, in order; the number of exits stands for the head.

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
