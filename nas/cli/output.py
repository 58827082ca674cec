"""What commands print: results on stdout, progress on stderr, colour and live lines on a terminal only.

With `--json` stdout carries exactly one JSON document and everything for people goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from nas.core.jsonio import to_plain
from nas.core.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# A command of this program inside a sentence or on a line of its own.
COMMAND = re.compile(
    r"(?<![\w./-])nas "
    r"(?=(?:init|doctor|measure|table|search|pareto|report|dashboard|export|bench|worker|storage-proxy)\b)"
)
PLAIN_INTERVAL_S = 10.0  # at most one line in this time and stage where nobody watches a terminal


def is_fancy(stream: TextIO) -> bool:
    """True where colours and live lines may go: a terminal that can do them, and no NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def typed(text: str) -> str:
    """The same text with commands of this program as the user can type them, also where `nas` is not on the PATH.

    After `make setup` it lies in `.venv/bin`, and a shell that did not activate that environment does not find it.
    """
    if shutil.which("nas") is not None:
        return text
    called = Path(sys.argv[0])
    if called.name == "nas":
        program = quote(_short(called))
    elif called.name == "__main__.py" and called.parent.name == "nas":
        program = f"{quote(_short(Path(sys.executable)))} -m nas"
    else:
        return text
    return COMMAND.sub(lambda _: f"{program} ", text)


def _short(path: Path) -> str:
    """A path as it is typed from here: relative where that does not climb."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path.absolute())


class Console:
    """The output of one command.

    Args:
        as_json: whether stdout is for one JSON document.
        debug: whether an error shows its traceback.
    """

    def __init__(self, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug
        self._has_result = False

    def say(self, text: str = "") -> None:
        """One line (or more) for people."""
        print(typed(text), file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def warn(self, text: str) -> None:
        """A warning, on stderr."""
        print(f"warning: {typed(text)}", file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str] = ()) -> None:
        """A table for people; numbers (cells that start with a digit) are aligned to the right.

        Args:
            columns: their names.
            rows: one text per column.
            optional: columns that are left out, in this order, while the table is wider than the terminal.
        """
        stream = sys.stderr if self.as_json else sys.stdout
        if not is_fancy(stream):
            self.say(plain_table(columns, rows))
            return
        width = shutil.get_terminal_size().columns
        left_out: list[str] = []
        for name in optional:
            if _width(columns, rows) <= width:
                break
            if name in columns:
                left_out.append(name)
                place = list(columns).index(name)
                columns = [*columns[:place], *columns[place + 1 :]]
                rows = [[*row[:place], *row[place + 1 :]] for row in rows]
        _rich_table(columns, rows, stream)
        if left_out:
            self.say(f"(left out, the terminal is too narrow: {', '.join(left_out)})")

    def result(self, document: Any) -> None:
        """The one JSON document of the command, printed with `--json` only.

        Args:
            document: records and plain types, as `nas.core.jsonio.to_plain` takes them.
        """
        if self.as_json and not self._has_result:
            self._has_result = True
            print(json.dumps(to_plain(document), indent=2, ensure_ascii=False, allow_nan=False), flush=True)

    def reporter(self) -> Reporter:
        """Progress and messages of long work: `with console.reporter() as reporter: work(reporter)`."""
        return Reporter(self, sys.stderr)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, one line per row, no frame: readable in a log and easy to cut."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(cell.lstrip("+-")[:1].isdigit() for cell in filled)


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that the table takes: cells and three between each two of them."""
    return sum(max(map(len, cells)) + 3 for cells in zip(columns, *rows, strict=True))


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        is_number = _is_numeric([row[i] for row in rows])
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # As wide as it is: an id that is cut or folded cannot be copied.
    RichConsole(file=stream, markup=False, highlight=False, width=_width(columns, rows)).print(table)


class Reporter:
    """What long work tells while it runs: `say` and `warn` lines, and `progress(stage, done, total, note)`.

    `done` and `total` are in any unit of the stage. The time that is left is estimated from the pace since the stage
    was first heard of, so work that an earlier run had done does not make it look faster. On a terminal each stage is
    a live line; elsewhere a stage prints a line at its start, at most every `PLAIN_INTERVAL_S` seconds, and at its end.
    """

    def __init__(self, console: Console, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._stream = stream
        self._clock = clock
        self._stages: dict[str, _Stage] = {}
        self._live: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        if is_fancy(self._stream):
            self._live = _rich_progress(self._stream)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line for people; live lines stay below it."""
        self._console.say(text)

    def warn(self, text: str) -> None:
        """A line that must not be overlooked."""
        self._console.warn(text)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """`done` of `total` in a named stage; may be called often."""
        now = self._clock()
        is_done = done >= total
        state = self._stages.get(stage)
        is_new = state is None or done < state.done or (state.is_over and not is_done)
        if state is None or is_new:
            state = self._stages[stage] = _Stage(now, done)
        was_over = state.is_over
        state.done, state.is_over = done, is_done
        left_s = None if is_done else state.left_s(now, total)
        if self._live is not None:
            self._show_live(stage, done, total, _joined(note, left_s))
        elif is_new or (is_done and not was_over) or now - state.shown_s >= PLAIN_INTERVAL_S:
            state.shown_s = now
            share = f"{100 * done / total:3.0f} %" if total > 0 else "100 %"
            ending = f"done in {format_duration(now - state.start_s)}" if is_done and not is_new else ""
            text = "  ".join(part for part in (f"{stage}:", share, _joined(note, left_s), ending) if part)
            print(text, file=self._stream, flush=True)

    def _show_live(self, stage: str, done: float, total: float, note: str) -> None:
        live = self._live
        if live is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = live.add_task(stage, total=total, note="")
        live.update(self._tasks[stage], completed=done, total=max(total, 1e-9), note=note)


class _Stage:
    """What is known of one stage: when it was first heard of, with how much done, and when it was last shown."""

    def __init__(self, start_s: float, start_done: float) -> None:
        self.start_s = self.shown_s = start_s
        self.start_done = self.done = start_done
        self.is_over = False

    def left_s(self, now_s: float, total: float) -> float | None:
        """Seconds left at the pace since the start; None before there is a pace."""
        gained = self.done - self.start_done
        return (now_s - self.start_s) * (total - self.done) / gained if gained > 0 else None


def _joined(note: str, left_s: float | None) -> str:
    left = "" if left_s is None else f"about {format_duration(left_s)} left"
    return ", ".join(part for part in (note, left) if part)


def _rich_progress(stream: TextIO) -> RichProgress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=RichConsole(file=stream, highlight=False),
        refresh_per_second=4,
    )
