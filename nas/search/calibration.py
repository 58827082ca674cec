"""How far the model of accuracy can be trusted: its predictions of scored candidates that it was not shown.

Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, section 5.4.2 (leave-one-out predictions
in closed form). The kernel's few numbers were fitted to all candidates, the one that is left out among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from nas.core.run import AccuracyFit
from nas.latency.ranks import rank_correlation
from nas.search.greybox import (
    GreyBoxProblem,
    Model,
    Scored,
    fit_hyperparameters,
    fit_model,
    least_ceiling,
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
        Mean and deviation of the standardised accuracy that a training shows, noise included, [N] each; `model.scale`
        makes accuracies of them.
    """
    half = solve_triangular(model.factor, np.eye(len(observed)), lower=True, check_finite=False)
    precision = np.square(half).sum(axis=0)  # the diagonal of the inverse covariance
    mean = observed - model.weights / precision
    return mean, 1 / np.sqrt(precision)


def accuracy_fit(problem: GreyBoxProblem, scored: Scored) -> AccuracyFit | None:
    """The leave-one-out errors of the grey-box sampler's model; None where too few candidates were scored.

    Args:
        problem: what is known of the genes and of latency.
        scored: candidates, with accuracies from 0 to 1.
    """
    rows = spread_rows(len(scored.accuracies), MOST)
    shown = scored.at(rows)
    if len(rows) < FEWEST or float(np.ptp(shown.accuracies)) == 0:
        return None
    chosen = fit_hyperparameters(problem, shown)
    model = fit_model(problem, shown, chosen)
    observed = standardised(shown.accuracies, chosen.headroom, least_ceiling(problem))[0]
    mean, deviation = leave_one_out(model, observed)
    told = model.scale.accuracy(mean)
    within = np.abs(mean - observed) <= WITHIN_90 * deviation  # a rising scale keeps what is within
    rank = rank_correlation(told, shown.accuracies)
    return AccuracyFit(len(rows), rank, float(np.abs(told - shown.accuracies).mean()), float(within.mean()))
