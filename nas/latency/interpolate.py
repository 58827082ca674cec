"""Rows that were not measured, from measured ones of the same family: never zero, never from multiply-adds alone.

Inside the hull of the known rows the logarithm of the latency is taken as piecewise linear in the logarithms of
channels and size (Delaunay). Outside it is that of the nearest known row, times exp(0.8 * the sum of the logarithmic
ratios, that of the size counted twice). On isolated convolutions of a GPU the median error inside is 2-7 %, where a
formula of multiply-adds and bytes errs by 41-68 % (benchmarks/interpolation.py). The error bar comes from leaving
known rows out.

An interpolated row is a guess that says so: it is the first candidate for measuring, and never written into a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import Delaunay, QhullError, cKDTree

from nas.core.errors import RecordError
from nas.core.records import LayerSpec
from nas.latency.keys import layer_of_key

FloatArray = NDArray[np.float64]

GROWTH = 0.8  # of the latency with the work, outside the hull: below 1, because larger layers use a device better
LEAST_STD = 0.015  # of a row that was measured itself; relative, as all of these
UNKNOWN_STD = 0.3  # inside, where too few rows are known to try it out
OUTSIDE = 2.0  # an estimate outside the hull is at least this much less certain
LEFT_OUT_AT_MOST = 24  # rows that are left out to see how well the others give them
MANY_ROWS = 10  # times that many rows: those that are left out hardly matter for each other, and go all at once
_FLAT = 1e-9

# Exponents of a block's work: both 1x1 convolutions share the middle width, so the outer channels count half each.
_BLOCK_WEIGHTS = {"in": 0.5, "out": 0.5, "wide": 1.0, "hidden": 1.0, "size": 2.0}


@dataclass(frozen=True, slots=True)
class InterpolatedRow:
    """An estimated row: not measured, which is what this type says.

    `is_inside` tells whether known rows surround it; `nearest` is the closest of them, `known` how many the family has.
    """

    key: str
    latency_ms: float
    std_ms: float
    is_inside: bool
    nearest: str
    known: int


@dataclass(frozen=True, slots=True)
class Guess:
    """Log latencies at M wanted places, whether each lies in the hull, its nearest known place and how far that is."""

    log_ms: FloatArray
    is_inside: NDArray[np.bool_]
    nearest: NDArray[np.int64]
    distance: FloatArray


def interpolate_log(known: FloatArray, log_ms: FloatArray, wanted: FloatArray, weights: FloatArray) -> Guess:
    """Piecewise-linear interpolation in log shape, with the nearest neighbour outside the hull.

    Args:
        known: (N, D) logarithms of the shapes that are known, all different.
        log_ms: (N,) logarithms of their latencies.
        wanted: (M, D) logarithms of the shapes that are asked for.
        weights: (D,) how often a coordinate counts in the growth outside the hull.

    Raises:
        RecordError: nothing is known, or arrays that do not fit each other.
    """
    if known.ndim != 2 or not len(known) or log_ms.shape != known.shape[:1] or wanted.shape[1:] != known.shape[1:]:
        raise RecordError(f"cannot interpolate {wanted.shape} from {known.shape} shapes with {log_ms.shape} latencies")
    distance, nearest = cKDTree(known).query(wanted)
    grown = log_ms[nearest] + GROWTH * ((wanted - known[nearest]) @ weights)
    inner = _linear(known, log_ms, wanted)
    same = distance < _FLAT
    inner = np.where(same, log_ms[nearest], inner)
    is_inside = np.isfinite(inner)
    return Guess(np.where(is_inside, inner, grown), is_inside, nearest, distance)


def _linear(known: FloatArray, log_ms: FloatArray, wanted: FloatArray) -> FloatArray:
    """Values inside the hull of the known points, NaN outside; the hull may be flat (a plane, a line, a point)."""
    nothing = np.full(len(wanted), np.nan)
    middle = known.mean(axis=0)
    _, sizes, axes = np.linalg.svd(known - middle, full_matrices=False)
    rank = int((sizes > 1e-7 * max(1.0, float(sizes[0]) if len(sizes) else 1.0)).sum())
    if rank == 0:
        return nothing
    axes = axes[:rank]
    points, places = (known - middle) @ axes.T, (wanted - middle) @ axes.T
    off = np.abs((wanted - middle) - places @ axes).max(axis=1) > 1e-6
    if rank == 1:
        order = points[:, 0].argsort()
        line = np.interp(places[:, 0], points[order, 0], log_ms[order], left=np.nan, right=np.nan)
        return np.where(off, np.nan, line)
    try:
        triangles = Delaunay(points)
    except QhullError:  # points that are flat up to rounding: no triangle to speak of
        return nothing
    found: FloatArray = LinearNDInterpolator(triangles, log_ms)(places)
    return np.where(off, np.nan, found)


def left_out_errors(
    known: FloatArray, log_ms: FloatArray, weights: FloatArray, at_most: int = LEFT_OUT_AT_MOST
) -> tuple[FloatArray, FloatArray]:
    """Errors of the log latency with known rows left out one at a time: of those inside the others' hull, and outside.

    Args:
        known: (N, D) logarithms of shapes.
        log_ms: (N,) logarithms of latencies.
        weights: as for `interpolate_log`.
        at_most: how many are left out, spread evenly over the rows; of a large family all at once, which is as good.
    """
    inside: list[float] = []
    outside: list[float] = []
    count = len(known)
    if count < 2:
        return np.empty(0), np.empty(0)
    chosen = np.unique(np.linspace(0, count - 1, min(at_most, count)).round().astype(np.int64))
    for part in [chosen] if count > MANY_ROWS * at_most else np.split(chosen, len(chosen)):
        rest = np.ones(count, dtype=np.bool_)
        rest[part] = False
        guess = interpolate_log(known[rest], log_ms[rest], known[part], weights)
        for error, is_inside in zip(guess.log_ms - log_ms[part], guess.is_inside, strict=True):
            (inside if is_inside else outside).append(float(error))
    return np.array(inside), np.array(outside)


def deviations(inside: FloatArray, outside: FloatArray) -> tuple[float, float]:
    """Relative standard deviations inside and outside the hull, from errors with rows left out.

    68 % of the errors lie within one and 95 % within two of them (the tails are longer than a normal distribution's),
    with an addition for what few errors do not show.
    """
    within = max(LEAST_STD, _deviation(inside)) if len(inside) >= 3 else UNKNOWN_STD
    beyond = _deviation(outside) if len(outside) >= 3 else OUTSIDE * UNKNOWN_STD
    return within, max(beyond, OUTSIDE * within)


def _deviation(errors: FloatArray) -> float:
    one, two = np.quantile(np.abs(errors), (0.68, 0.95))
    return float(max(one, two / 2)) * (1 + 4 / len(errors))


def interpolate_rows(known: Mapping[str, float], wanted: Iterable[LayerSpec]) -> dict[str, InterpolatedRow]:
    """Estimates of rows from known rows of the same family; a family without a known row has no entry.

    Args:
        known: row key -> latency in ms, positive, overhead included or not but all alike.
        wanted: layers; one that is known is given as it is, with the deviation of a measured row.

    Returns:
        Row key -> estimate, for every wanted layer whose family has at least one known row.

    Raises:
        RecordError: a known latency that is not positive and finite, or a key that is none.
    """
    families: dict[tuple[object, ...], list[tuple[LayerSpec, float]]] = {}
    for key, value in known.items():
        if not (value > 0 and math.isfinite(value)):
            raise RecordError(f"{key}: cannot interpolate from a latency of {value:g} ms")
        layer = layer_of_key(key)
        families.setdefault(family_of(layer), []).append((layer, value))
    asked: dict[tuple[object, ...], dict[str, LayerSpec]] = {}
    for layer in wanted:
        asked.setdefault(family_of(layer), {})[layer.key] = layer
    result: dict[str, InterpolatedRow] = {}
    for family, layers in asked.items():
        rows = families.get(family)
        if rows:
            result |= _family_rows(rows, list(layers.values()))
    return result


def spread_rows(layers: Iterable[LayerSpec], count: int) -> list[LayerSpec]:
    """Rows to measure so that the others can be interpolated: of each family some, spread over its shapes.

    Families get their share of `count`, at least one row each; within a family the corners come first, the largest row
    before all, because estimates outside the hull are poor; then always the row that lies furthest from all before it.

    Args:
        layers: all rows.
        count: how many to choose; more where there are more families.
    """
    families: dict[tuple[object, ...], dict[str, LayerSpec]] = {}
    for layer in layers:
        families.setdefault(family_of(layer), {})[layer.key] = layer
    total = sum(len(family) for family in families.values())
    chosen = []
    for family in families.values():
        rows = list(family.values())
        share = min(len(rows), max(1, round(count * len(rows) / total)))
        shapes = np.array([_shape(layer) for layer in rows])
        varied = shapes[:, np.ptp(shapes, axis=0) > _FLAT]
        corners = [int((varied @ np.array(signs)).argmax()) for signs in product((1, -1), repeat=varied.shape[1])]
        picked = list(dict.fromkeys(corners))[:share]
        distance = np.linalg.norm(shapes[:, None] - shapes[picked], axis=2).min(axis=1)
        while len(picked) < share:
            picked.append(int(distance.argmax()))
            distance = np.minimum(distance, np.linalg.norm(shapes - shapes[picked[-1]], axis=1))
        chosen += [rows[i] for i in picked]
    return chosen


def family_of(layer: LayerSpec) -> tuple[object, ...]:
    """What two layers must share for one to say something of the other: all but channels and size."""
    return (
        layer.kind,
        layer.kernel_size,
        layer.stride,
        layer.use_se,
        layer.activation,
        layer.precision,
        layer.has_residual,
        layer.has_expand,
        layer.expanded_channels > 0,
        layer.hidden_channels > 0,
    )


def _family_rows(rows: Sequence[tuple[LayerSpec, float]], wanted: Sequence[LayerSpec]) -> dict[str, InterpolatedRow]:
    known = np.array([_shape(layer) for layer, _ in rows])
    log_ms = np.log([value for _, value in rows])
    weights = np.array(list(_BLOCK_WEIGHTS.values()))
    guess = interpolate_log(known, log_ms, np.array([_shape(layer) for layer in wanted]), weights)
    within, beyond = deviations(*left_out_errors(known, log_ms, weights))
    result = {}
    for i, layer in enumerate(wanted):
        value, distance = math.exp(float(guess.log_ms[i])), float(guess.distance[i])
        std = within if guess.is_inside[i] else beyond * (1.0 + distance)
        std = LEAST_STD if distance < _FLAT else std
        nearest = rows[int(guess.nearest[i])][0].key
        result[layer.key] = InterpolatedRow(layer.key, value, std * value, bool(guess.is_inside[i]), nearest, len(rows))
    return result


def _shape(layer: LayerSpec) -> list[float]:
    """Logarithms of input, output, middle and hidden channels and of the size; absent parts count as one channel."""
    sizes = (layer.in_channels, layer.out_channels, layer.expanded_channels, layer.hidden_channels, layer.in_size)
    return [math.log(max(size, 1)) for size in sizes]
