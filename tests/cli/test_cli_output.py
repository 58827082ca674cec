"""Plain output without a terminal, one JSON document, progress with what is left."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from nas.cli.output import PLAIN_INTERVAL_S, Console, Reporter, is_fancy, plain_table, typed


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_plain_without_terminal_with_no_color_and_on_dumb_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_fancy(Terminal())
    assert not is_fancy(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_fancy(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_fancy(Terminal())


def test_commands_are_named_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "no run. Run: nas search FILE, see runs/nas search or nas-tools; then: nas report"
    monkeypatch.chdir(tmp_path)
    program = tmp_path / ".venv" / "bin" / "nas"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", str(program.parent))
    assert typed(text) == text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed(text) == (
        "no run. Run: .venv/bin/nas search FILE, see runs/nas search or nas-tools; then: .venv/bin/nas report"
    )
    monkeypatch.setattr("sys.argv", ["pytest"])  # not started as this program: nothing is known
    assert typed(text) == text


def test_table_aligns_numbers_to_the_right_and_has_no_frame() -> None:
    text = plain_table(["student", "ms"], [["a", "9.5"], ["bcd", "10.25"]])
    assert text == "student     ms\na          9.5\nbcd      10.25"


def test_with_json_people_read_stderr_and_machines_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.say("for people")
    console.table(["a"], [["1"]])
    console.result({"name": "ñ 目录"})
    console.result({"error": "a second document would not be JSON"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"name": "ñ 目录"}
    assert err.splitlines()[0] == "for people"


def test_without_json_there_is_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("for people")
    console.result({"a": 1})
    assert capsys.readouterr().out == "for people\n"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    Console().table(["student", "ms"], [["[red]x", "1.0"]])
    assert "\x1b[" in stream.getvalue()
    assert "[red]x" in stream.getvalue()  # text is never read as markup


def test_a_narrow_terminal_gets_fewer_columns_and_whole_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    name = "r16-d3-x0-int8-1427add71fc8-308d"
    Console().table(["student", "params", "ms", "note"], [[name, "12345", "1.0", "pick"]], ("params", "note", "ms"))
    text = stream.getvalue()
    assert name in text
    assert "12345" not in text and "pick" in text
    assert "(left out, the terminal is too narrow: params)" in text


def test_plain_progress_prints_the_start_rare_lines_and_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Reporter(Console(), stream, clock) as reporter:
        for done in range(101):
            reporter.progress("rows", done, 100, "ir|in=8")
            clock.now_s += 0.5
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rows:    0 %  ir|in=8"
    assert lines[1] == "rows:   20 %  ir|in=8, about 40 s left"
    assert lines[-1] == "rows:  100 %  ir|in=8  done in 50 s"
    assert len(lines) == 6
    assert "\x1b" not in stream.getvalue()
    assert PLAIN_INTERVAL_S == 10


def test_time_left_counts_only_what_this_run_did() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(Console(), stream, clock)
    reporter.progress("train", 80, 100)  # done by an earlier run
    clock.now_s += 10
    reporter.progress("train", 90, 100)
    assert "about 10 s left" in stream.getvalue().splitlines()[-1]


def test_a_stage_may_be_empty_or_start_again() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(Console(), stream, clock)
    reporter.progress("measure", 0, 0)
    reporter.progress("train", 5, 10)
    reporter.progress("train", 0, 10)
    assert stream.getvalue().splitlines() == ["measure:  100 %", "train:   50 %", "train:    0 %"]


def test_the_end_of_a_stage_is_told_once() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(Console(), stream, clock)
    for done in (1, 2, 2, 2):
        reporter.progress("networks", done, 2)
        clock.now_s += 1
    reporter.progress("networks", 0, 2)
    assert stream.getvalue().splitlines() == ["networks:   50 %", "networks:  100 %  done in 1.0 s", "networks:    0 %"]


def test_live_progress_shows_stage_note_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Reporter(Console(), stream) as reporter:
        reporter.progress("teacher", 1, 4, "epoch 1")
        reporter.progress("teacher", 4, 4, "epoch 4")
    text = stream.getvalue()
    assert "teacher" in text and "epoch 4" in text and "100%" in text


def test_messages_go_where_results_go_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().reporter() as reporter:
        reporter.say("teacher: 96 %")
        reporter.warn("two images are equal")
    with Console(as_json=True).reporter() as reporter:
        reporter.say("teacher: 97 %")
    assert capsys.readouterr() == ("teacher: 96 %\n", "warning: two images are equal\nteacher: 97 %\n")
