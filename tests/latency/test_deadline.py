"""Thresholds solved for a deadline: against brute force over every setting, and on images that were not swept."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.core.run import LatencyKind
from nas.latency.exits import (
    ALWAYS,
    NEVER,
    ThresholdSetting,
    ThresholdSweep,
    evaluate_thresholds,
    solve_for_deadline,
    sweep,
)

COST = (1.0, 2.0, 4.0)
STD = (0.02, 0.05, 0.12)


def made(images: int, seed: int, exits: int = 3, classes: int = 4) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits whose later exits are surer and more often right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(0, 1.5, (exits, images, classes))
    logits[:, np.arange(images), labels] += np.linspace(0.5, 3.0, exits)[:, None]
    return logits.astype(np.float32), labels


@dataclass(frozen=True)
class Outcome:
    """What one setting does, image by image."""

    thresholds: tuple[float, ...]
    right: int
    times: NDArray[np.float64]
    std_ms: float

    @property
    def expected_ms(self) -> float:
        return float(self.times.mean())

    def needed_ms(self, margin: float) -> float:
        """Mean of as many other images, `margin` deviations up: sampling of both, and the latency's own."""
        return self.expected_ms + margin * math.hypot(math.sqrt(2 * self.times.var() / len(self.times)), self.std_ms)

    def late(self, limit_ms: float) -> float:
        return float((self.times > limit_ms).mean())


def outcomes(logits: NDArray[np.float32], labels: NDArray[np.int64], grids: tuple[NDArray, ...]) -> list[Outcome]:
    """Every setting of the grids, evaluated without the sweep."""
    shown = np.exp(logits.astype(np.float64))
    conf = (shown / shown.sum(axis=2, keepdims=True)).max(axis=2)
    correct = logits.argmax(axis=2) == labels
    images = np.arange(len(labels))
    result = []
    for thresholds in itertools.product(*(grid.tolist() for grid in grids)):
        leaves = np.vstack([conf[:-1] >= np.array(thresholds)[:, None], np.ones(len(labels), bool)])
        taken = leaves.argmax(axis=0)
        right = int(correct[taken, images].sum())
        result.append(Outcome(thresholds, right, np.array(COST)[taken], float(np.array(STD)[taken].mean())))
    return result


@pytest.fixture(scope="module")
def every() -> tuple[ThresholdSweep, list[Outcome]]:
    """A sweep of 20 x 20 settings, and the same one by one."""
    logits, labels = made(300, seed=1)
    swept = sweep(logits, labels, COST, 20)
    return swept, outcomes(logits, labels, swept.grids)


def found(every: tuple[ThresholdSweep, list[Outcome]], setting: ThresholdSetting | None) -> Outcome:
    assert setting is not None
    return next(o for o in every[1] if o.thresholds == setting.thresholds)


DEADLINES = tuple(float(d) for d in np.linspace(1.0003, 4.2003, 33))  # no sum of shares and costs ends on one


def test_without_margin_it_is_the_most_accurate_in_time_and_of_equals_the_fastest(
    every: tuple[ThresholdSweep, list[Outcome]],
) -> None:
    for deadline in DEADLINES:
        inside = [o for o in every[1] if o.expected_ms <= deadline]
        best = max(inside, key=lambda o: (o.right, -o.expected_ms))
        chosen = found(every, solve_for_deadline(every[0], deadline, "expected", STD))
        assert (chosen.right, chosen.expected_ms) == (best.right, pytest.approx(best.expected_ms))


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_margin_of_the_mean_is_kept_and_costs_no_more_than_it_must(
    every: tuple[ThresholdSweep, list[Outcome]], margin: float
) -> None:
    solved = 0
    for deadline in DEADLINES:
        inside = [o for o in every[1] if o.needed_ms(margin) <= deadline]
        setting = solve_for_deadline(every[0], deadline, "expected", STD, margin)
        if not inside:
            assert setting is None
            continue
        assert setting is not None
        solved += 1
        chosen = found(every, setting)
        assert chosen.needed_ms(margin) <= deadline + 1e-12
        assert chosen.right == max(o.right for o in inside)
    assert solved >= 25


def test_nothing_keeps_a_deadline_before_the_first_exit(every: tuple[ThresholdSweep, list[Outcome]]) -> None:
    assert solve_for_deadline(every[0], 0.99, "expected") is None
    assert solve_for_deadline(every[0], 1.0, "expected", STD, 1.0) is None  # in time only if the latency is exact
    assert solve_for_deadline(every[0], 0.99, "p99") is None
    at_once = solve_for_deadline(every[0], 1.0, "expected", STD, 0.0)
    assert at_once is not None
    assert at_once.thresholds[0] == ALWAYS


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0])
def test_tail_is_the_most_accurate_setting_with_few_late_images(
    every: tuple[ThresholdSweep, list[Outcome]], margin: float
) -> None:
    allowed = 0.01 - margin * math.sqrt(2 * 0.99 * 0.01 / 300)
    for deadline in (*DEADLINES, 1.5, 2.11, 2.3, 4.5):
        limit = deadline - margin * max(STD)
        inside = [o for o in every[1] if o.late(limit) <= max(allowed, 0.0) + 1e-9]
        setting = solve_for_deadline(every[0], deadline, "p99", STD, margin)
        if not inside:
            assert setting is None
            continue
        best = max(inside, key=lambda o: (o.right, -o.expected_ms))
        chosen = found(every, setting)
        assert chosen in inside
        assert (chosen.right, chosen.expected_ms) == (best.right, pytest.approx(best.expected_ms))


def test_worst_case_depends_on_the_head_alone(every: tuple[ThresholdSweep, list[Outcome]]) -> None:
    swept = every[0]
    for deadline, margin in ((4.0, 0.0), (4.13, 1.0)):
        setting = solve_for_deadline(swept, deadline, "worst", STD, margin)
        assert setting is not None
        assert setting.right >= swept.full_right  # no accuracy is given up: it would not make the worst case faster
    assert solve_for_deadline(swept, 3.99, "worst", STD) is None
    assert solve_for_deadline(swept, 4.11, "worst", STD, 1.0) is None


def test_ample_time_gives_the_best_accuracy_of_all(every: tuple[ThresholdSweep, list[Outcome]]) -> None:
    kinds: tuple[LatencyKind, ...] = ("expected", "p99")
    for of in kinds:
        assert found(every, solve_for_deadline(every[0], 99.0, of, STD, 3.0)).right == max(o.right for o in every[1])


def test_network_without_exits_keeps_the_deadline_or_does_not() -> None:
    logits, labels = made(50, seed=2, exits=1)
    swept = sweep(logits, labels, [2.0])
    kinds: tuple[LatencyKind, ...] = ("expected", "p99", "worst")
    for of in kinds:
        setting = solve_for_deadline(swept, 2.2, of, [0.1], 1.0)
        assert setting is not None
        assert setting.thresholds == ()
        assert solve_for_deadline(swept, 2.2, of, [0.1], 3.0) is None


def test_deviations_count_for_the_exits_that_images_take() -> None:
    """Every image is sure and right at once: what the head's latency is uncertain about does not matter."""
    logits = np.zeros((2, 40, 2), np.float32)
    logits[:, :, 0] = 9.0
    swept = sweep(logits, np.zeros(40, np.int64), [1.0, 2.0])
    assert solve_for_deadline(swept, 1.2, "expected", [0.1, 50.0], 2.0) is not None
    assert solve_for_deadline(swept, 1.2, "expected", [0.11, 0.0], 2.0) is None


@pytest.mark.parametrize(("of", "deadline"), [("expected", 2.0), ("p99", 3.0)])
def test_margin_covers_images_that_were_not_swept(of: LatencyKind, deadline: float) -> None:
    """Solved on 400 images and used on 400 others, 60 times: the deadline is missed often without margin, rarely with
    two deviations.
    """
    misses = {0.0: 0, 2.0: 0}
    for seed in range(60):
        logits, labels = made(800, seed, exits=2)
        swept = sweep(logits[:, :400], labels[:400], (1.0, 4.0))
        for margin in misses:
            setting = solve_for_deadline(swept, deadline, of, None, margin)
            assert setting is not None
            _, shares, expected_ms = evaluate_thresholds(
                logits[:, 400:], labels[400:], setting.thresholds, swept.exit_ms
            )
            misses[margin] += int(expected_ms > deadline if of == "expected" else shares[-1] > 0.01)
    assert misses[0.0] >= 12
    assert misses[2.0] <= 3


def test_settings_that_never_leave_are_written_as_never() -> None:
    logits, labels = made(60, seed=3, exits=2)
    logits[0] = 0.0  # an exit that knows nothing
    setting = solve_for_deadline(sweep(logits, labels, [1.0, 2.0]), 2.0, "expected")
    assert setting is not None
    assert setting.thresholds == (NEVER,)


def test_leaving_at_once_is_found_where_only_that_keeps_the_deadline() -> None:
    logits, labels = made(1000, seed=0)
    setting = solve_for_deadline(sweep(logits, labels, COST), 1.01, "expected", None, 2.0)
    assert setting is not None  # everything at the first exit takes 1.0 ms, exactly
