"""How far the model of accuracy can be trusted: its predictions of scored candidates that it was not shown.

Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, section 5.4.2 (leave-one-out predictions
in closed form). The kernel's few numbers were fitted to all candidates, the one that is left out among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from nas.core.run import AccuracyFit
from nas.search.greybox import (
    GreyBoxProblem,
    Model,
    Scored,
    fit_hyperparameters,
    fit_model,
    spread_rows,
    standardised,
)

FloatArray = NDArray[np.float64]

FEWEST = 8  # scored candidates, below which nothing can be said
MOST = 700  # scored candidates that the model sees
WITHIN_90 = 1.6449  # standard deviations on either side that hold 90 % of a normal distribution


def leave_one_out(model: Model, observed: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What the model says of each candidate that taught it when all others taught it alone.

    Args:
        model: without pending candidates.
        observed: standardised accuracies that it was given, [N].

    Returns:
        Mean and deviation of the accuracy that a training shows, noise included, in units of accuracy, [N] each.
    """
    half = solve_triangular(model.factor, np.eye(len(observed)), lower=True, check_finite=False)
    precision = np.square(half).sum(axis=0)  # the diagonal of the inverse covariance
    mean = observed - model.weights / precision
    return model.mean + model.deviation * mean, model.deviation / np.sqrt(precision)


def accuracy_fit(problem: GreyBoxProblem, scored: Scored) -> AccuracyFit | None:
    """The leave-one-out errors of the grey-box sampler's model; None where too few candidates were scored.

    Args:
        problem: what is known of the genes.
        scored: candidates, with accuracies from 0 to 1.
    """
    rows = spread_rows(len(scored.accuracies), MOST)
    shown = scored.at(rows)
    if len(rows) < FEWEST or float(np.ptp(shown.accuracies)) == 0:
        return None
    model = fit_model(problem, shown, fit_hyperparameters(problem, shown))
    mean, deviation = leave_one_out(model, standardised(shown.accuracies)[0])
    error = np.abs(mean - shown.accuracies)
    rank = rank_correlation(mean, shown.accuracies)
    return AccuracyFit(len(rows), rank, float(error.mean()), float((error <= WITHIN_90 * deviation).mean()))


def rank_correlation(a: FloatArray, b: FloatArray) -> float:
    """Spearman's, equal values sharing the mean of their ranks; 0 where all values of one are equal."""
    first, second = _ranks(a), _ranks(b)
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size > 0 else 0.0


def _ranks(values: FloatArray) -> FloatArray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return ((2 * np.cumsum(counts) - counts - 1) / 2)[place]
