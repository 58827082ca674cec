"""Stopping at safe points, and time that is counted over several sessions."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from search_examples import Notes

from nas.core.errors import InterruptedRunError
from nas.search.progress import (
    TICK_S,
    RunClock,
    Spent,
    StopFlag,
    StoppableReporter,
    kept_clock,
    stop_on_signals,
    time_spent,
)


def test_first_signal_sets_the_flag_and_the_second_ends_the_process(tmp_path: Path) -> None:
    flag, notes = StopFlag(), Notes()
    flag.tell_workers(tmp_path / "stop")
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(flag, notes):
        flag.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.is_set
        assert (tmp_path / "stop").exists()
        with pytest.raises(InterruptedRunError, match="finished work is kept"):
            flag.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert notes.warned == ["SIGTERM: finishing or checkpointing the current step; once more to end now"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_are_told_also_when_the_signal_came_before_there_were_any(tmp_path: Path) -> None:
    flag = StopFlag()
    flag.set()
    flag.tell_workers(tmp_path / "stop")
    assert (tmp_path / "stop").exists()


def test_signal_in_the_middle_of_a_print_still_sets_the_flag() -> None:
    class Busy(Notes):
        def warn(self, text: str) -> None:  # noqa: ARG002
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    flag = StopFlag()
    with stop_on_signals(flag, Busy()):
        os.kill(os.getpid(), signal.SIGINT)
    assert flag.is_set


def test_progress_is_a_safe_point_and_its_plain_reporter_is_not() -> None:
    flag, notes = StopFlag(), Notes()
    told = StoppableReporter(notes, flag)
    told.progress("teacher", 1, 2)
    flag.set()
    with pytest.raises(InterruptedRunError):
        told.progress("teacher", 2, 2)
    told.plain.progress("scoring", 1, 2)
    told.say("x")
    told.warn("y")
    assert (notes.stages, notes.said, notes.warned) == (["teacher", "teacher", "scoring"], ["x"], ["y"])


class _Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_clock_counts_earlier_sessions(tmp_path: Path) -> None:
    file, wall, cpu = tmp_path / "clock.json", _Time(), _Time()
    first = RunClock(file, wall, cpu)
    wall.now_s, cpu.now_s = 103.0, 101.0
    first.tick()
    assert time_spent(file) == Spent()  # kept now and then only
    wall.now_s += TICK_S
    first.tick()
    assert time_spent(file) == Spent(3 + TICK_S, 1.0)
    wall.now_s += 1.0  # and then it is killed
    second = RunClock(file, wall, cpu)
    wall.now_s, cpu.now_s = wall.now_s + 10, cpu.now_s + 4
    assert second.spent == Spent(13 + TICK_S, 5.0)


def test_clock_is_kept_however_the_session_ends(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError), kept_clock(tmp_path / "clock.json"):
        raise InterruptedRunError("stopped")
    assert time_spent(tmp_path / "clock.json").wall_s > 0


def test_clock_that_cannot_be_kept_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError), kept_clock(tmp_path / "file" / "clock.json"):
        (tmp_path / "file").write_text("in the way")
        raise InterruptedRunError("stopped")
