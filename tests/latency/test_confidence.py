"""Temperatures and calibration errors against what they are known to be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.core.errors import ConfigError, RecordError
from nas.latency.confidence import calibration_error, fit_temperature
from nas.latency.exits import confidences, read_target


def honest(images: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits whose softmax is the probability with which each class is drawn."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits, (p.cumsum(axis=1) < rng.random((images, 1))).sum(axis=1)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_factor_and_confidences_become_honest(factor: float) -> None:
    logits, labels = honest(20_000)
    temperature = fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor, rel=0.04)
    assert calibration_error(factor * logits / temperature, labels) < 0.02
    if factor != 1.0:
        assert calibration_error(factor * logits, labels) > 0.05


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    # four images at confidence 0.5 of which one is right, four at nearly 1 of which all are
    logits = np.log(np.array([[0.5, 0.25, 0.25]] * 4 + [[1.0, 1e-9, 1e-9]] * 4))
    labels = np.array([0, 1, 1, 2, 0, 0, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx((0.25 * 4 + 0.0) / 8, abs=1e-6)


def test_more_than_two_classes_may_change_their_order_under_a_temperature() -> None:
    """Why the curve of thresholds is nearly, and not exactly, that of the raw logits."""
    logits = np.array([[2.0, 1.4, -9.0, -9.0], [2.0, 0.9, 0.9, 0.9]])
    raw, cool = confidences(logits), confidences(logits / 4)
    assert raw[0] > raw[1] or cool[0] > cool[1]
    two = np.array([[2.0, 1.0], [3.0, 1.5]])
    assert (np.diff(confidences(two)) > 0) == (np.diff(confidences(two / 4)) > 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecordError, match=r"a temperature needs logits \[N, K\] and labels \[N\], got \(3, 2\)"):
        fit_temperature(np.zeros((3, 2)), np.zeros(2, np.int64))


def test_targets_are_read_from_text() -> None:
    assert (read_target("loss=0.02", "x").kind, read_target("loss=0.02", "x").value) == ("loss", 0.02)
    assert (read_target("p99=900us", "x").kind, read_target("p99=900us", "x").value) == ("p99", pytest.approx(0.9))
    assert read_target("expected=0.4", "x").value == 0.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss=2", "--exits: loss=2: a ratio from 0 to 1"),
        ("loss=much", "--exits: loss=much: a ratio from 0 to 1"),
        ("p99=-1", "--exits: p99: '-1' is not a positive"),
        ("worst=1ms", "--exits: 'worst=1ms' is no target; give loss=RATIO"),
    ],
)
def test_other_targets_are_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_target(text, "--exits")
