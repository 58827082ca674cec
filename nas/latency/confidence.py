"""Confidences that mean what they say: one temperature per exit, and how far confidence and accuracy are apart.

Guo et al. 2017, arXiv 1706.04599: temperature scaling (section 4.2) divides the logits by T > 0, chosen for the least
negative log-likelihood on held-out images; classes do not change. Expected calibration error: section 2, equation 3.

What it changes: a threshold then means the same at every exit and in every student, and a package's probability can be
believed. What it does not: the trade-off of thresholds that are solved for. With two classes the order of the images at
an exit stays; with more it nearly does (probability that is spread over other classes counts differently).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from nas.core.errors import RecordError
from nas.latency.exits import confidences

BINS = 15  # Guo et al. 2017, section 4
LARGEST = 20.0  # of a temperature; the least is its reciprocal. Beyond it there is nothing to calibrate


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature with the least negative log-likelihood, within 1/20 and 20.

    Args:
        logits: of one exit, [N, K].
        labels: [N].

    Raises:
        RecordError: shapes that do not fit, or no images.
    """
    if logits.ndim != 2 or not len(logits) or labels.shape != (len(logits),):
        raise RecordError(f"a temperature needs logits [N, K] and labels [N], got {logits.shape} and {labels.shape}")
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    right = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float((np.log(np.exp(scale * shifted).sum(axis=1)) - scale * right).mean())

    # The loss is convex in 1 / T, so it has one valley in log T as well.
    limit = math.log(LARGEST)
    return math.exp(float(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))


def calibration_error(logits: NDArray[np.floating], labels: NDArray[np.integer], bins: int = BINS) -> float:
    """Expected calibration error, 0-1: mean distance of confidence and accuracy over bins of confidence.

    Args:
        logits: of one exit, [N, K].
        labels: [N].
        bins: of equal width.
    """
    conf, right = confidences(logits), logits.argmax(axis=1) == labels
    place = np.minimum((conf * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=conf - right, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))
