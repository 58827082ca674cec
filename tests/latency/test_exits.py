"""The threshold sweep against one-by-one evaluation, at its corners and on bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.latency.exits import (
    ALWAYS,
    NEVER,
    ThresholdSetting,
    ThresholdSweep,
    answers,
    confidences,
    evaluate_thresholds,
    exit_taken,
    solve_for_expected,
    solve_for_loss,
    solve_for_tail,
    sweep,
)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def made(exits: int, images: int, seed: int, classes: int = 4, ties: bool = False) -> tuple[Floats, Ints]:
    """Logits whose later exits are surer and more often right; `ties` rounds them so that confidences repeat."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(0, 1.5, (exits, images, classes))
    logits[:, np.arange(images), labels] += np.linspace(0.5, 3.0, exits)[:, None]
    return (np.round(logits) if ties else logits).astype(np.float32), labels


def one_by_one(
    logits: Floats, labels: Ints, thresholds: tuple[float, ...], cost: list[float]
) -> tuple[int, float, list[float]]:
    """The rule as a person would write it: image after image."""
    right, total, shares = 0, 0.0, [0] * len(logits)
    for n in range(logits.shape[1]):
        for k in range(len(logits)):
            row = logits[k, n].astype(np.float64)
            probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            if k == len(logits) - 1 or probability.max() >= thresholds[k]:
                right += int(row.argmax() == labels[n])
                total += cost[k]
                shares[k] += 1
                break
    return right, total / logits.shape[1], [s / logits.shape[1] for s in shares]


def assert_equals_one_by_one(swept: ThresholdSweep, logits: Floats, labels: Ints, cost: list[float]) -> None:
    for flat, thresholds in enumerate(itertools.product(*swept.grids)):
        setting = swept.setting(flat)
        right, expected, shares = one_by_one(logits, labels, thresholds, cost)
        assert setting.thresholds == thresholds
        assert setting.right == right
        assert setting.expected_ms == pytest.approx(expected, abs=1e-12)
        assert setting.shares == pytest.approx(shares)


@pytest.mark.parametrize(("exits", "grid"), [(1, 5), (2, 9), (3, 6), (4, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_every_setting_equals_one_by_one_evaluation(exits: int, grid: int, ties: bool) -> None:
    logits, labels = made(exits, 37, seed=exits, ties=ties)
    cost = [1.0, 2.5, 3.7, 6.1][:exits]
    swept = sweep(logits, labels, cost, grid)
    assert_equals_one_by_one(swept, logits, labels, cost)


@settings(max_examples=25, deadline=None)
@given(
    exits=st.integers(1, 3),
    images=st.integers(1, 12),
    grid=st.integers(2, 6),
    seed=st.integers(0, 10_000),
    ties=st.booleans(),
)
def test_random_sweeps_equal_one_by_one_evaluation(exits: int, images: int, grid: int, seed: int, ties: bool) -> None:
    logits, labels = made(exits, images, seed, ties=ties)
    cost = list(np.random.default_rng(seed).uniform(0.1, 5, exits))  # not even monotone
    assert_equals_one_by_one(sweep(logits, labels, cost, grid), logits, labels, cost)


def test_evaluate_equals_one_by_one_evaluation() -> None:
    logits, labels = made(3, 200, seed=1)
    right, expected, shares = one_by_one(logits, labels, (0.7, 0.9), [1.0, 2.0, 4.0])
    top1, got_shares, expected_ms = evaluate_thresholds(logits, labels, (0.7, 0.9), [1.0, 2.0, 4.0])
    assert top1 == right / 200
    assert list(got_shares) == pytest.approx(shares)
    assert expected_ms == pytest.approx(expected)


def test_confidence_equal_to_the_threshold_leaves() -> None:
    assert list(exit_taken(np.array([[0.5, 0.4999999], [1.0, 1.0]]), [0.5])) == [0, 1]


def test_confidences_of_huge_logits_do_not_overflow() -> None:
    assert confidences(np.array([[1e4, 0.0], [-1e4, -1e4]], dtype=np.float32)) == pytest.approx([1.0, 0.5])


def test_first_threshold_lets_every_image_leave_and_the_last_none() -> None:
    logits, labels = made(3, 50, seed=2)
    swept = sweep(logits, labels, [1.0, 2.0, 3.0], 8)
    assert all(g[0] == ALWAYS and g[-1] == NEVER for g in swept.grids)
    assert swept.setting(0).shares == (1.0, 0.0, 0.0)
    assert swept.setting(swept.vectors - 1).shares == (0.0, 0.0, 1.0)
    assert swept.full_right == int((logits[-1].argmax(axis=1) == labels).sum())


def test_repeated_confidences_give_no_repeated_thresholds() -> None:
    logits = np.zeros((2, 20, 3), dtype=np.float32)
    swept = sweep(logits, np.zeros(20, dtype=np.int64), [1.0, 2.0], 10)
    assert list(swept.grids[0]) == [ALWAYS, NEVER]


def test_thresholds_survive_rounding_to_float32_and_back() -> None:
    """The deployed graph holds float32 thresholds: they must let the same images leave."""
    logits, labels = made(3, 500, seed=3)
    conf = confidences(logits)
    for k, grid in enumerate(sweep(logits, labels, [1.0, 2.0, 3.0], 40).grids):
        for threshold in grid:
            assert np.array_equal(conf[k] >= threshold, conf[k] >= np.float64(np.float32(threshold)))


def test_confidences_closer_than_float32_are_still_told_apart() -> None:
    logits = np.zeros((2, 3, 2), dtype=np.float32)
    logits[:, :, 0] = [20.0, 20.5, 21.0]  # confidences 1 - 2e-9, 1 - 1e-9, 1 - 8e-10
    labels = np.zeros(3, dtype=np.int64)
    swept = sweep(logits, labels, [1.0, 2.0], 4)
    assert len(swept.grids[0]) == 4
    assert_equals_one_by_one(swept, logits, labels, [1.0, 2.0])


def test_front_is_the_pareto_set_of_all_settings() -> None:
    logits, labels = made(3, 60, seed=4)
    swept = sweep(logits, labels, [1.0, 2.0, 3.0], 7)
    every = [swept.setting(i) for i in range(swept.vectors)]

    def is_beaten(a: ThresholdSetting) -> bool:
        return any(
            b.right >= a.right
            and b.expected_ms <= a.expected_ms
            and (b.right, b.expected_ms) != (a.right, a.expected_ms)
            for b in every
        )

    expected = sorted({(s.expected_ms, s.right) for s in every if not is_beaten(s)})
    assert [(s.expected_ms, s.right) for s in swept.front()] == expected


def test_solve_for_loss_gives_the_fastest_setting_within_it() -> None:
    logits, labels = made(3, 400, seed=5)
    swept = sweep(logits, labels, [1.0, 2.0, 3.0], 20)
    for loss in (0.0, 0.005, 0.01, 0.05, 1.0):
        chosen = solve_for_loss(swept, loss)
        allowed = swept.right >= swept.full_right - loss * 400 - 1e-9
        assert chosen.right >= swept.full_right - loss * 400 - 1e-9
        assert chosen.expected_ms == swept.expected_ms[allowed].min()


def test_loss_is_compared_in_whole_images() -> None:
    """0.57 of 100 images is 57 images, although 0.57 * 100 is 56.99999999999999 in floating point."""
    labels = np.zeros(100, dtype=np.int64)
    logits = np.zeros((2, 100, 2), dtype=np.float32)
    logits[1, :, 0] = 5.0
    logits[0, :43, 0] = 1.0
    logits[0, 43:, 1] = 1.0  # exit 0 is wrong in 57 images, as sure as in the others
    assert solve_for_loss(sweep(logits, labels, [1.0, 2.0]), 0.57).thresholds == (ALWAYS,)
    assert solve_for_loss(sweep(logits, labels, [1.0, 2.0]), 0.569).thresholds == (NEVER,)


def test_solve_for_expected_gives_the_most_accurate_setting_in_time() -> None:
    logits, labels = made(3, 400, seed=6)
    swept = sweep(logits, labels, [1.0, 2.0, 3.0], 20)
    chosen = solve_for_expected(swept, 1.8)
    assert chosen is not None and chosen.expected_ms <= 1.8
    assert chosen.right == swept.right[swept.expected_ms <= 1.8].max()
    assert solve_for_expected(swept, 0.5) is None


def test_solve_for_tail_counts_the_images_that_are_late() -> None:
    logits, labels = made(3, 400, seed=7)
    swept = sweep(logits, labels, [1.0, 2.0, 3.0], 20)
    chosen = solve_for_tail(swept, 2.0, quantile=0.9)
    every = [swept.setting(i) for i in range(swept.vectors)]
    assert chosen is not None and chosen.shares[2] <= 0.1
    assert chosen.right == max(s.right for s in every if s.shares[2] <= 0.1 + 1e-12)
    assert solve_for_tail(swept, 0.5) is None


def test_setting_that_never_reaches_the_head_recommends_truncation() -> None:
    setting = ThresholdSetting((NEVER, ALWAYS, NEVER), 9, 10, 1.0, (0.0, 1.0, 0.0, 0.0))
    assert (setting.last_exit, setting.truncation, setting.unused_exits) == (1, 1, (0,))
    full = ThresholdSetting((0.5, NEVER), 9, 10, 1.0, (0.5, 0.0, 0.5))
    assert (full.last_exit, full.truncation, full.unused_exits) == (2, None, (1,))


def test_of_equal_settings_the_one_that_leaves_later_is_chosen() -> None:
    """Behind an exit where everything leaves, no image decides about the next threshold: it stays at never."""
    labels = np.zeros(30, dtype=np.int64)
    logits = np.zeros((3, 30, 2), dtype=np.float32)
    logits[:, :, 0] = np.random.default_rng(0).uniform(1, 3, (3, 30))
    chosen = solve_for_loss(sweep(logits, labels, [1.0, 2.0, 3.0], 5), 0.0)
    assert chosen.thresholds == (ALWAYS, NEVER)
    assert chosen.truncation == 0


def test_student_without_exits_has_one_setting() -> None:
    logits, labels = made(1, 20, seed=8)
    (only,) = sweep(logits, labels, [2.0]).front()
    assert (only.thresholds, only.shares, only.expected_ms) == ((), (1.0,), 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(3, dtype=np.int64)}, r"labels must have shape \[20\]"),
        ({"labels": np.full(20, 9)}, "labels must be from 0 to 3, got 9 to 9"),
        ({"exit_ms": [1.0]}, "exit_ms needs 2 finite latencies"),
        ({"exit_ms": [1.0, float("nan")]}, "exit_ms needs 2 finite latencies"),
        ({"logits": np.zeros((2, 20), dtype=np.float32)}, "logits must have shape"),
        ({"logits": np.full((2, 20, 4), np.nan, dtype=np.float32)}, "exit 0, image 0: a logit is not finite"),
        ({"grid": 1}, "at least 2 values"),
    ],
)
def test_input_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    logits, labels = made(2, 20, seed=9)
    with pytest.raises(RecordError, match=message):
        sweep(**{"logits": logits, "labels": labels, "exit_ms": [1.0, 2.0], **change})


def test_wrong_thresholds_are_named() -> None:
    logits, labels = made(2, 20, seed=9)
    with pytest.raises(RecordError, match="2 exits need 1 thresholds, got 2"):
        evaluate_thresholds(logits, labels, (0.5, 0.5), [1.0, 2.0])
    with pytest.raises(RecordError, match="thresholds must be numbers"):
        evaluate_thresholds(logits, labels, (float("nan"),), [1.0, 2.0])
    with pytest.raises(RecordError, match="from 0 to 1, got 5"):
        solve_for_loss(sweep(logits, labels, [1.0, 2.0]), 5)


def test_answers_are_the_logits_of_the_exit_where_each_image_leaves() -> None:
    sure, unsure = np.array([4.0, 0.0]), np.array([0.1, 0.0])
    logits = np.stack([[sure, unsure, unsure], [-sure, -sure, unsure], [sure, sure, -sure]])
    assert np.array_equal(answers(logits, (0.9, 0.9)), [sure, -sure, -sure])
    assert np.array_equal(answers(logits, (ALWAYS, 0.9)), logits[0])
    assert np.array_equal(answers(logits, (NEVER, NEVER)), logits[-1])
