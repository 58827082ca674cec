"""The benchmark of exits: which sessions count, and when enough of them are measured."""

from __future__ import annotations

import pytest

from benchmarks.exits import Session, agree, expected, least

SHARES = (0.5, 0.5)


def session(image_ms: float, exit_ms: float = 1.0, single_ms: float | None = 3.0) -> Session:
    """Two images of this latency."""
    return Session((image_ms, image_ms), (exit_ms, 2 * exit_ms), single_ms, True)


def test_every_image_and_exit_counts_with_its_least_run() -> None:
    slow, fast = Session((1.0, 9.0), (1.0, 5.0), 4.0, False), Session((7.0, 2.0), (3.0, 2.0), 3.0, True)
    assert least([slow, fast]) == Session((1.0, 2.0), (1.0, 2.0), 3.0, True)


def test_no_student_without_exits_stays_none() -> None:
    assert least([session(1.0, single_ms=None)]).single_ms is None


def test_an_exit_behind_another_is_never_expected_to_take_less() -> None:
    assert expected(SHARES, (2.0, 1.0)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("sessions", "is_enough"),
    [
        ([session(1.0)], False),
        ([session(1.0), session(1.005)], True),
        ([session(1.0), session(1.05)], False),
        ([session(2.0), session(2.001), session(1.0)], False),  # two that were disturbed alike
        ([session(1.0), session(1.0, exit_ms=1.05)], False),  # the estimate moved
        ([session(1.0), session(1.0, single_ms=3.2)], False),  # the student it is compared with moved
        ([session(1.0), session(2.0), session(1.001)], True),
    ],
)
def test_the_two_fastest_sessions_must_agree_in_everything(sessions: list[Session], is_enough: bool) -> None:
    assert agree(sessions, SHARES) is is_enough
