"""Correction of the sum of rows from measured whole networks: scale, constant, price per megabyte and per early exit.

Bayesian ridge in relative residuals. Why these terms: isolated blocks find their weights in the cache, whole networks
stream them; the sum contains what the device's own measurement of that says, but how much of it is hidden behind the
work differs between networks and chains of convolutions (12-16 us per MB in fp32 in all on a quiet x86-64 machine); an
`If` between blocks costs
1-3 us more than one that is measured alone, because tensors change their layout there; a scale and a constant take the
rest. With a table of the same device nothing richer was better up to 20 networks. Where no network in the evidence
decides at exits, the last term stays at zero.

One fit per precision label (fp32, int8, mixed, ...): their errors have different causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError

Method = Literal["scale", "full", "borrowed"]

CORRECTION_VERSION = 3
TERMS = 4

NOISE = 0.03  # relative error of one measured network against the corrected sum, before anything is known
NOISE_WEIGHT = 4.0  # how many networks that prior counts for
UNSTABLE_NOISE_FACTOR = 3.0  # a network without one calm round says less
FEATURE_MS = 0.1  # all features but the first are in units of 0.1 ms (per MB, per gate), so that all are near 1
# Scale +-0.1; constant +-0.1 ms; weights +-0.02 ms per MB; early exits +-0.005 ms each.
PRIOR_STD = np.array([0.1, 1.0, 0.2, 0.05])
_UNITS = np.array([1.0, FEATURE_MS, FEATURE_MS, FEATURE_MS])
MIN_RATIO, MAX_RATIO = 0.1, 10.0  # a correction never moves an estimate further than this

# Error of the plain sum of rows against a measured network: about 5 % (fp32) and 3 % (int8) on x86-64, random mixes of
# both 3.6 %. Other precisions get the larger one until they are measured.
RAW_ERROR = {"fp32": 0.05, "int8": 0.03, "mixed": 0.04}
RAW_ERROR_UNKNOWN = 0.05


@dataclass(frozen=True, slots=True)
class NetworkEvidence:
    """A measured network in a fit: plain sum, weights, early exits that decide (gates), what was measured.

    `left_out_ms` is the estimate of a fit without it.
    """

    key: str
    sum_ms: float
    weight_mb: float
    gates: int
    measured_ms: float
    stable: bool
    left_out_ms: float | None = None

    def __post_init__(self) -> None:
        if not (self.sum_ms > 0 and self.measured_ms > 0 and self.weight_mb >= 0):
            raise RecordError(f"network {self.key}: times must be positive and weights not negative")


@dataclass(frozen=True, slots=True)
class PrecisionFit:
    """Correction of one precision label.

    estimate_ms = scale * sum_ms + constant_ms + ms_per_mb * weight_mb + ms_per_gate * gates. `covariance` is that of
    the four numbers in the same units; `error` is the relative standard deviation of a network around the estimate.
    `borrowed`: taken from the fits of the other precisions.
    """

    precision: str
    method: Method
    scale: float
    constant_ms: float
    ms_per_mb: float
    ms_per_gate: float
    covariance: tuple[tuple[float, ...], ...]
    error: float
    networks: tuple[NetworkEvidence, ...] = ()

    def __post_init__(self) -> None:
        if len(self.covariance) != TERMS or any(len(row) != TERMS for row in self.covariance):
            raise RecordError(f"fit {self.precision}: covariance must be {TERMS} x {TERMS}")
        if not self.scale > 0:
            raise RecordError(f"fit {self.precision}: scale must be positive, got {self.scale}")
        if not self.error >= 0:
            raise RecordError(f"fit {self.precision}: error must not be negative, got {self.error}")

    @property
    def left_out_mape(self) -> float | None:
        """Mean |estimate / measured - 1| of each network by a fit without it, or None below two networks."""
        errors = [abs(n.left_out_ms / n.measured_ms - 1) for n in self.networks if n.left_out_ms is not None]
        return float(np.mean(errors)) if errors else None

    @property
    def label(self) -> str:
        """What was done, in a few words."""
        if self.method == "borrowed":
            return "borrowed from other precisions"
        terms = "scale" if self.method == "scale" else "scale, constant, weights, exits"
        return f"{terms} from {len(self.networks)} networks"


@dataclass(frozen=True, slots=True)
class Correction:
    """All fits of one device state, with their evidence. `skipped` names networks that could not be used, and why.

    `streaming` is what the table said of streamed weights: with another curve the fits do not hold.
    """

    fingerprint: str
    fits: tuple[PrecisionFit, ...]
    skipped: tuple[str, ...] = ()
    version: int = CORRECTION_VERSION
    streaming: tuple[tuple[float, float], ...] = ()

    def fit_for(self, precision: str) -> PrecisionFit | None:
        """The fit of a precision label, or None: the plain sum."""
        return next((fit for fit in self.fits if fit.precision == precision), None)


def fit_precision(precision: str, networks: Sequence[NetworkEvidence]) -> PrecisionFit:
    """Fits one precision label: 1-2 networks give a scale only, 3 or more all terms.

    Args:
        precision: fp32, int8, mixed, ...
        networks: at least one measured network.
    """
    if not networks:
        raise RecordError(f"a correction of {precision} needs at least one measured network")
    method: Method = "scale" if len(networks) < 3 else "full"
    theta, covariance, error = _posterior(networks, method)
    evidence = []
    for i, network in enumerate(networks):
        rest = [*networks[:i], *networks[i + 1 :]]
        left_out = None
        if rest:
            other, _, _ = _posterior(rest, "scale" if len(rest) < 3 else "full")
            left_out = float(_features([network])[0] @ other)
            left_out = min(max(left_out, MIN_RATIO * network.sum_ms), MAX_RATIO * network.sum_ms)
        evidence.append(replace(network, left_out_ms=left_out))
    return _fit(precision, method, theta, covariance, error, tuple(evidence))


def borrowed_fit(precision: str, others: Sequence[PrecisionFit]) -> PrecisionFit:
    """A correction for a precision without measured networks: the mean of the others, as uncertain as they differ.

    A network in mixed precision consists of layers that the fits of the single precisions describe.
    """
    if not others:
        raise RecordError(f"a correction of {precision} cannot be borrowed from nothing")
    thetas = np.array([[f.scale, f.constant_ms, f.ms_per_mb, f.ms_per_gate] for f in others])
    covariance = np.mean([np.array(f.covariance) for f in others], axis=0) + np.cov(thetas.T, bias=True)
    units = _UNITS
    error = max(f.error for f in others)
    return _fit(precision, "borrowed", thetas.mean(axis=0) / units, covariance / np.outer(units, units), error, ())


def corrected(
    fit: PrecisionFit | None,
    precision: str,
    sum_ms: NDArray[np.float64],
    weight_mb: NDArray[np.float64],
    gates: NDArray[np.float64],
    row_var: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimates and their standard deviations, milliseconds, any shape.

    Args:
        fit: correction of this precision label, or None: the plain sum.
        precision: the label.
        sum_ms: plain sums of rows, with overhead, decisions at exits and streamed weights.
        weight_mb: weights on the way, MB.
        gates: early exits that decide on the way.
        row_var: sum of the squared standard deviations of the rows, ms^2; used where there is no fit (a fit's error
            contains it already).
    """
    if fit is None:
        error = RAW_ERROR.get(precision, RAW_ERROR_UNKNOWN)
        return sum_ms, np.sqrt(row_var + (error * sum_ms) ** 2)
    mean = fit.scale * sum_ms + fit.constant_ms + fit.ms_per_mb * weight_mb + fit.ms_per_gate * gates
    mean = np.clip(mean, MIN_RATIO * sum_ms, MAX_RATIO * sum_ms)
    features = (sum_ms, 1.0, weight_mb, gates)
    var = np.zeros_like(sum_ms)
    for i, row in enumerate(fit.covariance):
        var += row[i] * features[i] * features[i]
        for j in range(i):
            var += 2 * row[j] * features[i] * features[j]
    return mean, np.sqrt(np.maximum(var, 0.0) + (fit.error * mean) ** 2)


def _features(networks: Sequence[NetworkEvidence]) -> NDArray[np.float64]:
    rows = [[n.sum_ms, FEATURE_MS, FEATURE_MS * n.weight_mb, FEATURE_MS * n.gates] for n in networks]
    return np.array(rows, dtype=np.float64)


def _posterior(
    networks: Sequence[NetworkEvidence], method: Method
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Mean and covariance of the four numbers (in units of the features) and the relative error around them."""
    y = np.array([n.measured_ms for n in networks])
    noise = np.array([NOISE if n.stable else NOISE * UNSTABLE_NOISE_FACTOR for n in networks])
    weights = NOISE / noise
    x = _features(networks) / y[:, None]
    prior = np.array([1.0, 0.0, 0.0, 0.0])
    std = PRIOR_STD.copy()
    if method == "scale":
        std[1:] = 0.0  # too few networks to tell the terms apart
    else:
        prior[0] = float(np.median(y / np.array([n.sum_ms for n in networks])))
    free = std > 0
    xf = x[:, free] * weights[:, None]
    precision = xf.T @ xf + np.diag((NOISE / std[free]) ** 2)
    residual = (1.0 - x @ prior) * weights
    theta = prior.copy()
    theta[free] += np.linalg.solve(precision, xf.T @ residual)
    left = (1.0 - x @ theta) * weights
    used = free & (x != 0).any(axis=0)  # a term that no network has is not fitted
    degrees = max(len(networks) - int(used.sum()), 0)
    # Inverse-gamma: the prior noise counts as NOISE_WEIGHT networks, so that a few lucky ones claim no error of zero.
    error = float(np.sqrt((NOISE_WEIGHT * NOISE**2 + left @ left) / (NOISE_WEIGHT + degrees)))
    covariance = np.zeros((TERMS, TERMS))
    covariance[np.ix_(free, free)] = np.linalg.inv(precision) * error**2
    return theta, covariance, error


def _fit(
    precision: str,
    method: Method,
    theta: NDArray[np.float64],
    covariance: NDArray[np.float64],
    error: float,
    networks: tuple[NetworkEvidence, ...],
) -> PrecisionFit:
    natural = covariance * np.outer(_UNITS, _UNITS)
    return PrecisionFit(
        precision=precision,
        method=method,
        scale=max(float(theta[0]), 1e-3),
        constant_ms=float(theta[1] * FEATURE_MS),
        ms_per_mb=float(theta[2] * FEATURE_MS),
        ms_per_gate=float(theta[3] * FEATURE_MS),
        covariance=tuple(tuple(float(v) for v in row) for row in natural),
        error=error,
        networks=networks,
    )
