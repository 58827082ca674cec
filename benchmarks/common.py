"""What benchmark commands share: options, the machine they ran on, a table for people, one JSON object last."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def cpu_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """CPU seconds of each repeat, after one that is not counted."""
    work()
    samples = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        samples.append(time.process_time() - start)
    return samples


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark, `--json` among them.

    Args:
        description: the module's docstring.
    """
    result = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    result.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return result


def conditions() -> dict[str, Any]:
    """The machine and how busy it was: a figure without this says little."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_1min": load,
        "python": platform.python_version(),
    }


class Silent:
    """A reporter that says nothing: what a search tells people costs nothing here."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Nothing."""


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Number, median, smallest and largest of repeated measurements."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], document: Any, as_json: bool) -> None:
    """Prints a table, and with `as_json` the document (plain types) as the last line."""
    cells = [[str(c) for c in columns], *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(title)
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if as_json:
        print(json.dumps(_plain({**conditions(), **document}), allow_nan=False))


def _plain(value: Any) -> Any:
    """The same without numbers that JSON does not have: a figure that is not defined is null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
