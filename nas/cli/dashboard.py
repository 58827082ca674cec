"""`nas dashboard`: the study of a run in optuna-dashboard, on this machine only."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import click

from nas.cli.options import common_options
from nas.cli.output import Console
from nas.cli.runs import find_run, run_argument
from nas.core.errors import StorageError, UsageError


@click.command(short_help="Open the study of a run in optuna-dashboard.")
@run_argument
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1 [a free one].")
@click.option(
    "--storage",
    metavar="URL",
    help="Studies of a database that several machines share, such as postgresql://USER@HOST/NAME, in place of RUN.",
)
@common_options
@click.pass_obj
def command(console: Console, run: Path | None, port: int, storage: str | None) -> None:
    """Shows the study of RUN (a run folder or experiment file; the newest run where it is absent) in a browser.

    A copy is shown, read only, on 127.0.0.1; the note of each trial is the card of its candidate. Ctrl-C ends it.
    Needs optuna-dashboard: pip install 'nas[dashboard]'
    """
    from nas.search.dashboard import require_dashboard

    if storage is not None and run is not None:
        raise UsageError("RUN and --storage exclude each other; give one of them")
    require_dashboard()
    if storage is None:
        _show_run(console, find_run(run), port)
    else:
        _show_shared(console, storage, port)


def _show_run(console: Console, run_dir: Path, port: int) -> None:
    from nas.report.redact import redacted
    from nas.report.study_figure import Score, study_figure
    from nas.search.dashboard import add_figure, add_notes, opened, serve, study_copy
    from nas.search.notes import FIGURE_TITLE, candidate_note, study_note
    from nas.search.progress import interrupted_by_signals
    from nas.search.view import load_view

    view = load_view(run_dir)
    with tempfile.TemporaryDirectory(prefix="nas-dashboard-") as scratch, interrupted_by_signals():
        copy = Path(scratch) / "study.db"
        trials = study_copy(run_dir, view, copy)
        notes = {number: redacted(candidate_note(trial, view)) for number, trial in enumerate(trials)}
        now = datetime.now().isoformat(sep=" ", timespec="minutes")
        add_notes(copy, redacted(study_note(view, now)), notes)
        scores = [
            Score(t.record.score, t.latency_ms[0], t.excess <= 0, f"trial {t.record.number}, {t.record.proposer}")
            for t in trials
        ]
        add_figure(copy, study_figure(view, scores, FIGURE_TITLE))

        def tell(url: str) -> None:
            console.say(f"{view.name} ({view.status}): {len(trials)} scored candidates, a copy, read only: {url}")
            console.say("Ctrl-C ends it")
            console.result({"run": view.name, "status": view.status, "trials": len(trials), "url": url})

        with opened(f"sqlite:///{copy}") as storage, suppress(KeyboardInterrupt):
            serve(storage, port, tell)
    console.say("ended")


def _show_shared(console: Console, url: str, port: int) -> None:
    from nas.report.redact import redacted
    from nas.search.dashboard import serve, shared, study_names
    from nas.search.progress import interrupted_by_signals

    shown = redacted(url)
    try:
        with interrupted_by_signals(), shared(url) as storage:
            names = study_names(storage)
            if not names:
                raise UsageError(f"{shown}: no study in it. Run: nas search EXPERIMENT.yaml")

            def tell(address: str) -> None:
                console.say(f"{shown}: {len(names)} studies, read only: {address}")
                console.say("Ctrl-C ends it")
                console.result({"storage": shown, "studies": names, "url": address})

            with suppress(KeyboardInterrupt):
                serve(storage, port, tell)
    except StorageError as e:
        raise StorageError(f"{shown}: {redacted(str(e))}") from e
    console.say("ended")
