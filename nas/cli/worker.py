"""`nas worker`: trains for a search that runs elsewhere, until that is over."""

from __future__ import annotations

from pathlib import Path

import click

from nas.cli.options import common_options, shared_options
from nas.cli.output import Console
from nas.core.errors import InterruptedRunError, UsageError


@click.command(short_help="Train for a shared search from any machine.")
@click.argument("run")
@shared_options
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path(".nas-cache/worker"),
    show_default=True,
    help="Folder of this machine for images and shared weights; its workers share it.",
)
@click.option(
    "--idle-exit",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End when there was nothing to do for so long [wait until the run is over].",
)
@common_options
@click.pass_obj
def command(
    console: Console, run: str, storage: str | None, artifacts: str | None, cache: Path, idle_exit: float | None
) -> None:
    """Does the trainings of RUN, the name of a run folder whose `nas search` was given the same --storage.

    One training at a time on one core; start as many workers as there are cores. Ctrl-C (or SIGTERM) ends the training
    at its next epoch and gives the job back with its checkpoint. A worker that dies is noticed, and another one goes on
    from its last checkpoint. See docs/scale.md.
    """
    if storage is None:
        raise UsageError("--storage: is needed, the same as that of the search: nas worker RUN --storage URL")
    from nas.recipe.pool import WorkerPool
    from nas.search.progress import StopFlag, stop_on_signals
    from nas.search.worker import WorkerSettings, run_worker

    stop = StopFlag()
    settings = WorkerSettings(run, storage, cache, artifacts, idle_exit)
    with console.reporter() as reporter, stop_on_signals(stop, reporter), WorkerPool(1) as pool:
        summary = run_worker(settings, reporter, stop, pool)
    console.say(
        f"{summary.done} jobs done, {summary.failed} failed, {summary.given_back} given back; ended: {summary.ended}"
    )
    console.result(
        {
            "run": run,
            "worker": settings.name,
            "done": summary.done,
            "failed": summary.failed,
            "given_back": summary.given_back,
            "ended": summary.ended,
        }
    )
    if stop.is_set:
        raise InterruptedRunError("stopped; what was begun was given back")
