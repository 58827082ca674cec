"""`nas report`: a run as one HTML page that works offline."""

from __future__ import annotations

from pathlib import Path

import click

from nas.cli.options import common_options
from nas.cli.output import Console
from nas.cli.runs import find_run, run_argument


@click.command(short_help="Write the HTML report of a run.")
@run_argument
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write to [RUN/report].")
@common_options
@click.pass_obj
def command(console: Console, run: Path | None, output: Path | None) -> None:
    """Writes the report of RUN (a run folder or experiment file; the newest run where it is absent).

    The page works offline; it needs the script file that is written beside it. A running search can be reported too.
    """
    from nas.report.html import write_report
    from nas.search.view import load_view

    folder = find_run(run)
    view = load_view(folder)
    page = write_report(view, output or folder / "report")
    console.say(f"report of {view.name} ({view.status}): {page}")
    console.result({"run": view.name, "status": view.status, "report": str(page)})
