"""Error figures of predictions against values worked out by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from nas.core.run import PredictedMeasured
from nas.report.estimate import error_figures, spearman


def pair(predicted: float, measured: float, std: float = 0.1) -> PredictedMeasured:
    return PredictedMeasured("c", "fp32", predicted, std, measured)


def test_figures_of_three_predictions() -> None:
    figures = error_figures([pair(1.1, 1.0), pair(1.8, 2.0, std=0.05), pair(4.0, 4.0)])
    assert figures is not None
    assert (figures.n, figures.spearman) == (3, 1.0)
    assert figures.mape == pytest.approx(0.2 / 3)
    assert figures.bias == pytest.approx(0.0, abs=1e-12)
    assert figures.worst == pytest.approx(0.1)
    assert figures.within_2_std == pytest.approx(2 / 3)


def test_no_predictions_have_no_figures() -> None:
    assert error_figures([]) is None


def test_rank_correlation_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15).tolist(), rng.integers(0, 6, 15).tolist()
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_rank_correlation_of_too_little_is_unknown() -> None:
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
