"""Which run and which of its students a command is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nas.core.errors import BudgetError, UsageError
from nas.core.run import LatencyKind, Point, RunView, latency_of
from nas.core.units import format_ms

F = TypeVar("F", bound=Callable[..., Any])

RUNS = Path("runs")
MARK = "fingerprint.json"  # every run folder has it


def run_argument(function: F) -> F:
    """The argument RUN: a run folder or an experiment file; the newest run where it is absent."""
    return click.argument("run", required=False, type=click.Path(path_type=Path))(function)


def find_run(run: Path | None) -> Path:
    """The run folder that is meant.

    Args:
        run: a run folder, an experiment file, or None for the newest folder below `runs`.

    Raises:
        UsageError: there is none; the message names those that exist.
    """
    if run is None:
        folders = sorted((p for p in RUNS.glob("*") if (p / MARK).is_file()), key=lambda p: p.stat().st_mtime)
        if not folders:
            raise UsageError(f"no run in {RUNS}. Run: nas search EXPERIMENT.yaml, or name the run's folder")
        return folders[-1]
    if run.suffix in (".yaml", ".yml") and run.is_file():
        from nas.search.experiment import load_experiment

        run = load_experiment(run).run_dir
    if not (run / MARK).is_file():
        names = ", ".join(str(p) for p in sorted(RUNS.glob("*")) if (p / MARK).is_file())
        raise UsageError(
            f"{run}: not a run folder{f'; runs: {names}' if names else ''}. Run: nas search EXPERIMENT.yaml"
        )
    return run


def best_under(view: RunView, limit_ms: float, kind: LatencyKind) -> list[Point]:
    """Finished students below a latency: the one to take, then its runners-up. The validation split decides.

    Raises:
        UsageError: nothing is finished yet.
        BudgetError: none is below it; the message names the closest.
    """
    from nas.search.select import closest_to_budget, pick_for_budget

    finished = [p for p in view.points if p.is_finished]
    measured = [p for p in finished if p.latency.provenance == "measured"]
    closest = closest_to_budget(measured or finished, kind)
    if closest is None:
        command = view.commands[0] if view.commands else "nas search EXPERIMENT.yaml"
        raise UsageError(f"run {view.name} has no finished student yet ({view.status}). Run: {command}")
    picks = pick_for_budget(finished, limit_ms, kind)
    if not picks:
        ms = latency_of(closest.latency, kind)
        raise BudgetError(
            f"no finished student is below {format_ms(limit_ms)} ({kind}); the closest is {closest.id} with "
            f"{format_ms(ms)}, {100 * (ms / limit_ms - 1):.0f} % over. Allow more time, or search with this budget: "
            f"nas search EXPERIMENT.yaml --set budget.ms={limit_ms:g} --fork"
        )
    return picks
