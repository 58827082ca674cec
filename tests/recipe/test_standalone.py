"""Successive halving: the promotion rule, who is trained up to which rung, what stopped students would reach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nas.core.errors import RecordError
from nas.recipe.standalone import Halving, Standing, foreseen, promoted


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


Scores = dict[int, tuple[float, ...]]


def climbed(halving: Halving, scores: Scores, choose: Callable[[list[tuple[int, int]]], tuple[int, int]]) -> list[int]:
    """Gives every score that is asked for, in an order of choice; numbers of those that reached the last rung."""
    last = []
    while found := halving.open():
        place, number = choose(found)
        halving.arrive(number, place, scores[number][place])
        if place == 2:
            last.append(number)
    return sorted(last)


def made_scores(count: int, seed: int) -> tuple[Scores, np.ndarray]:
    """Accuracies at three rungs that rise, and latencies."""
    rng = np.random.default_rng(seed)
    rising = np.sort(rng.random((count, 3)), axis=1)
    return {n: tuple(row) for n, row in enumerate(rising.tolist())}, rng.random(count)


@pytest.mark.parametrize("together", [1, 4, 100])
def test_who_goes_on_does_not_depend_on_which_score_is_ready_first(together: int) -> None:
    for seed in range(10):
        scores, latency = made_scores(24, seed)
        found = set()
        for order in range(6):
            rng, halving = np.random.default_rng(order), Halving(3, 0.5, together)
            for number in scores:
                halving.join(number, (latency[number],))
            last = climbed(halving, scores, lambda pairs, rng=rng: pairs[rng.integers(len(pairs))])  # type: ignore[misc]
            found.add(tuple(last))
        assert len(found) == 1


def test_whoever_enters_the_best_share_goes_on_however_many_went_before() -> None:
    rising = {n: (0.1 + n / 100, 0.2 + n / 100, 0.3 + n / 100) for n in range(40)}
    for scores, expected in ((rising, [40, 38, 34]), ({n: rising[39 - n] for n in rising}, [40, 20, 10])):
        halving, asked = Halving(3, 0.5, 4), [0, 0, 0]
        for number in scores:
            halving.join(number, (1.0,))
        while found := halving.open():
            place, number = found[-1]  # the lowest rung first
            asked[place] += 1
            halving.arrive(number, place, scores[number][place])
        assert asked == expected


def test_a_student_goes_on_before_the_others_of_its_batch_are_scored() -> None:
    halving = Halving(2, 0.5, 1)
    for number in range(4):
        halving.join(number, (1.0 + number,))
    halving.arrive(1, 0, 0.9)
    assert halving.open() == [(0, 0), (0, 2), (0, 3)]  # a score that is early waits for those before it
    halving.arrive(0, 0, 0.5)
    assert halving.open()[0] == (1, 0)  # of the first one alone the best is itself
    halving.arrive(2, 0, 0.1)
    halving.arrive(3, 0, 0.1)
    assert [n for place, n in halving.open() if place == 1] == [0, 1]


def test_places_are_given_away_among_so_many_or_when_nobody_else_can_come() -> None:
    halving = Halving(2, 0.5, 2)
    for number in range(3):
        halving.join(number, (1.0,))
    halving.arrive(0, 0, 0.5)
    assert halving.open() == [(0, 1), (0, 2)]
    halving.arrive(1, 0, 0.9)
    assert halving.open() == [(1, 1), (0, 2)]
    halving.arrive(2, 0, None)
    halving.join(3, (0.1,))
    halving.arrive(3, 0, 0.1)  # one of three: the next place would be that of the fourth
    assert halving.open() == [(1, 1)]
    halving.join(4, (2.0,))
    halving.arrive(4, 0, 0.8)
    assert halving.open() == [(1, 1), (1, 3)]


def test_the_best_of_those_that_were_left_behind_goes_on_with_a_later_batch() -> None:
    before = [
        Standing(0, (0.9, 0.95), (1.0,), 1),
        Standing(1, (0.8,), (0.5,), 0),
        Standing(2, (0.3,), (2.0,), 0),
    ]
    halving = Halving(2, 0.5, 1, before)
    assert halving.open() == []
    halving.join(3, (3.0,))
    halving.arrive(3, 0, 0.2)
    assert halving.open() == [(1, 1)]


def test_a_ladder_that_is_built_anew_between_batches_decides_as_one_that_was_not() -> None:
    scores, latency = made_scores(30, 5)
    whole, reached = Halving(3, 0.5, 4), dict.fromkeys(scores, 0)
    resumed: dict[int, int] = dict.fromkeys(scores, 0)
    for first in range(0, 30, 6):
        before = [Standing(n, scores[n][: resumed[n]], (latency[n],), resumed[n] - 1) for n in range(first)]
        anew = Halving(3, 0.5, 4, before)
        for halving, count in ((whole, reached), (anew, resumed)):
            for number in range(first, first + 6):
                halving.join(number, (latency[number],))
            while found := halving.open():
                place, number = found[0]
                count[number] = place + 1
                halving.arrive(number, place, scores[number][place])
    assert resumed == reached
    late = [n for n in range(30) if reached[n] == 3]
    assert len(late) == 11  # more than a quarter: later ones were better


def test_a_student_that_fails_is_not_compared_and_holds_nobody_up() -> None:
    halving = Halving(2, 0.5, 2)
    for number in range(3):
        halving.join(number, (1.0,))
    halving.arrive(1, 0, 0.9)
    halving.arrive(2, 0, 0.5)
    halving.arrive(0, 0, None)
    assert halving.open() == [(1, 1)]
    halving.arrive(1, 1, None)
    assert halving.open() == []


def test_foreseen_accuracy_follows_the_students_that_went_all_the_way() -> None:
    errors = np.array([0.4, 0.3, 0.2])
    curves = np.column_stack([1 - errors, 1 - errors / 2])
    assert foreseen(curves, 0, 0.5) == pytest.approx(0.75)
    assert foreseen(curves, 1, 0.8) == pytest.approx(0.8)  # it is at the last rung already
    alone = [[0.6, 0.9]]
    assert foreseen(alone, 0, 0.6) == pytest.approx(0.9)
    assert foreseen(alone, 0, 0.2) == pytest.approx(0.8)


def test_foreseen_accuracy_rises_with_the_accuracy_at_the_rung_and_stays_below_one() -> None:
    curves = [[0.5, 0.9], [0.6, 0.91], [0.7, 0.95]]
    found = [foreseen(curves, 0, top1) for top1 in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert found == sorted(found)
    assert 0 <= found[0] < found[-1] < 1
