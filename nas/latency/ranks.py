"""Rank correlation (Spearman 1904), equal values sharing the mean of their ranks; scipy.stats takes long to load."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0, shape [N]; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    found: NDArray[np.float64] = ((2 * np.cumsum(counts) - counts - 1) / 2)[place]
    return found


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Correlation of the ranks of two equally long lists; 0 where all values of one are equal."""
    first, second = ranks(a), ranks(b)
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size > 0 else 0.0
