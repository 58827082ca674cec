"""`nas pareto`: the front of a run as a table, CSV or JSON, and the student to take below a time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from nas.cli.options import Milliseconds, common_options
from nas.cli.output import Console
from nas.cli.runs import best_under, find_run, run_argument
from nas.core.errors import UsageError
from nas.core.run import FOREIGN_MARK, LatencyKind, RunView
from nas.core.units import format_ms

RUNNERS_UP = 3
LESS_IMPORTANT = (
    "trial",
    "proposer",
    "params",
    "MACs",
    "split",
    "size",
    "exits used %",
    "latency is",
    "+- ms",
    "precision",
)


@click.command(short_help="Show the front of a run, and the student to take below a time.")
@run_argument
@click.option(
    "--best-under",
    "limit",
    type=Milliseconds(),
    help="The most accurate below this time (of equals the fastest).",
)
@click.option("--of", "of", type=click.Choice(["expected", "worst", "p99"]), help="Latency that --best-under limits.")
@click.option("--all", "show_all", is_flag=True, help="All students, not only those on the front.")
@click.option(
    "--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True, help="Form."
)
@click.option("--on", metavar="DEVICE", default="", help="Of a run for several devices: which one [the first].")
@common_options
@click.pass_obj
def command(
    console: Console,
    run: Path | None,
    on: str,
    limit: float | None,
    of: LatencyKind | None,
    show_all: bool,
    form: Literal["table", "csv", "json"],
) -> None:
    """Shows the Pareto front of RUN (a run folder or experiment file; the newest run where it is absent).

    With --best-under the student to take below that time is shown, with its runners-up.
    """
    from nas.report.tables import front_csv, front_records, front_table
    from nas.search.view import load_view

    if console.as_json and form == "csv":
        raise UsageError("--json and --format csv exclude each other; give one of them")
    if of is not None and limit is None:
        raise UsageError("--of says which latency --best-under limits; give both, such as: --best-under 5ms --of p99")
    if form == "json":
        console.as_json = True
    view = load_view(find_run(run), on)
    points = [*view.front, *(p for p in view.points if show_all and not p.on_front)]
    chosen, reason = None, ""
    if limit is not None:
        kind = of or view.budget_of
        points = best_under(view, limit, kind)[: 1 + RUNNERS_UP]
        chosen, reason = points[0], f"best on validation below {format_ms(limit)} ({kind}), of equals the fastest"
    if form == "csv":
        click.echo(front_csv(view, points), nl=False)
        return
    columns, rows = front_table(view, points)
    if chosen is None:
        show_front(console, view, (columns, rows))
        show_common(console, view)
    else:
        console.table(columns, rows, LESS_IMPORTANT)
        console.say(f"take {chosen.id}: {reason}")
        console.say(f"next: {chosen.export_command}")
    console.result(
        {
            "run": view.name,
            "status": view.status,
            "budget_ms": view.budget_ms,
            "budget_of": view.budget_of,
            "pipeline": view.pipeline,
            "points": front_records(view, points),
            "proposers": view.proposers,
            "foreign_table": view.provenance.get(FOREIGN_MARK),
            "chosen": None if chosen is None else chosen.id,
            "reason": reason,
            "pick": view.pick_id,
            "pick_reason": view.pick_reason,
            "closest": view.closest_id,
            "also": view.also,
            "device": view.device_name,
            "common": view.common,
        }
    )


def show_common(console: Console, view: RunView) -> None:
    """The student for all devices of a run for several, and why it is this one."""
    if view.common is not None:
        console.say(f"for all devices: {view.common.student or 'none'}: {view.common.reason}")


def show_front(console: Console, view: RunView, table: tuple[tuple[str, ...], list[tuple[str, ...]]]) -> None:
    """The front with the pick and the reason; where nothing is finished yet, how far the run is."""
    from nas.report.tables import front_notes, proposer_table

    columns, rows = table
    budget = "no budget" if view.budget_ms is None else f"budget {view.budget_ms:g} ms ({view.budget_of})"
    console.say(f"run {view.name}: {view.status}, {len(view.trials)} trials scored, {budget}")
    if not rows:
        console.say("no finished student yet")
        if view.proposers:
            console.table(*proposer_table(view))
        for line in view.commands:
            console.say(f"next: {line}")
        return
    console.table(columns, rows, LESS_IMPORTANT)
    for line in front_notes(view):
        console.say(line)
    if view.proposers:
        console.table(*proposer_table(view))
    if view.pick_id is not None:
        console.say(f"pick: {view.pick_id}: {view.pick_reason}")
    for other in view.also:
        console.say(f"pick for {other.budget_ms:g} ms: {other.student or 'none'}: {other.reason}")
    if view.next_id is not None:
        console.say(f"next best: {view.next_id}: {view.next_reason}")
    if view.closest_id is not None:
        console.say(f"nothing keeps the budget; closest: {view.closest_id}: {view.closest_reason}")
