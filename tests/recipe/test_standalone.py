"""Successive halving: the promotion rule on arrays."""

from __future__ import annotations

import numpy as np
import pytest

from nas.core.errors import RecordError
from nas.recipe.standalone import promoted


def test_better_fronts_go_on_first() -> None:
    accuracy = [0.9, 0.8, 0.7, 0.85, 0.6]
    latency = [2.0, 1.0, 0.5, 2.5, 3.0]
    assert set(promoted(accuracy, latency, 3)) == {0, 1, 2}
    assert list(promoted(accuracy, latency, 4))[3] == 3
    assert list(promoted(accuracy, latency, 9))[3:] == [3, 4]


def test_of_a_front_that_is_too_large_the_crowded_students_are_left_out() -> None:
    accuracy = [0.90, 0.80, 0.795, 0.60]
    latency = [4.0, 2.0, 1.99, 1.0]
    assert set(promoted(accuracy, latency, 3)) == {0, 1, 3} or set(promoted(accuracy, latency, 3)) == {0, 2, 3}
    assert {0, 3} <= set(promoted(accuracy, latency, 3))


def test_units_do_not_change_who_goes_on() -> None:
    rng = np.random.default_rng(0)
    accuracy, latency = rng.random(20), rng.random(20)
    assert list(promoted(accuracy, latency, 7)) == list(promoted(accuracy * 100, latency * 1000, 7))


def test_equal_students_go_on_by_their_order() -> None:
    assert list(promoted([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], 2)) == [0, 1]
    assert list(promoted([], [], 2)) == []


def test_nobody_who_goes_on_is_dominated_by_one_who_does_not() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        accuracy, latency = rng.integers(0, 6, 15) / 5, rng.integers(1, 6, 15) / 5
        kept = set(promoted(accuracy, latency, 6).tolist())
        for i in kept:
            for j in set(range(15)) - kept:
                better = accuracy[j] >= accuracy[i] and latency[j] <= latency[i]
                assert not (better and (accuracy[j] > accuracy[i] or latency[j] < latency[i]))


def test_a_score_that_is_not_a_number_is_named() -> None:
    with pytest.raises(RecordError, match="student 1 has a value that is not finite"):
        promoted([0.5, float("nan")], [1.0, 2.0], 1)
    with pytest.raises(RecordError, match="one accuracy and one latency per student"):
        promoted([0.5, 0.6], [1.0], 1)
