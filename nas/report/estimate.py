"""How well latencies were predicted: error figures over measured networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.core.run import PredictedMeasured
from nas.latency.ranks import rank_correlation


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """Errors of n predictions, relative to the measured latency.

    `mape` is the mean absolute error, `bias` the mean error (positive: predicted too slow), `worst` the largest
    absolute one, `spearman` the rank correlation (None below three networks or where all are equal), `within_2_std` the
    share of measured latencies inside the prediction plus or minus two of its standard deviations.
    """

    n: int
    mape: float
    bias: float
    worst: float
    spearman: float | None
    within_2_std: float


def error_figures(predictions: Sequence[PredictedMeasured]) -> ErrorFigures | None:
    """Error figures of these predictions; None when there are none."""
    if not predictions:
        return None
    errors = np.array([p.error for p in predictions])
    inside = [abs(p.predicted_ms - p.measured_ms) <= 2 * p.std_ms for p in predictions]
    return ErrorFigures(
        n=len(errors),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        worst=float(np.abs(errors).max()),
        spearman=spearman([p.predicted_ms for p in predictions], [p.measured_ms for p in predictions]),
        within_2_std=sum(inside) / len(inside),
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation of two equally long sequences; None below three values or where one does not vary."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return rank_correlation(a, b)
