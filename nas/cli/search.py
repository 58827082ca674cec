"""`nas search`: searches for the budget of an experiment, or goes on with the search of its run folder."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from nas.cli.options import Milliseconds, common_options, set_option, shared_options
from nas.cli.output import Console
from nas.cli.pareto import show_common, show_front
from nas.core.errors import BudgetError, UsageError
from nas.core.run import FOREIGN_MARK
from nas.core.units import format_duration, format_ms, rounded_up

if TYPE_CHECKING:
    from nas.core.run import PackageView, RunView
    from nas.search.experiment import Experiment
    from nas.search.plan import Plan
    from nas.search.shared_study import SharedSettings


@click.command(short_help="Search for a latency budget; the same command goes on after a stop.")
@click.argument("experiment", type=click.Path(path_type=Path))
@set_option
@click.option("--budget", type=Milliseconds(), help="The deadline, such as 5ms: short for --set budget.ms=5.")
@click.option(
    "--allow-foreign-table",
    "foreign",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Borrow rows from the table of another device state; every result says so.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved settings, the rows to measure and a rough duration.")
@click.option("--fork", is_flag=True, help="New run folder that keeps the scores of the old one which stay valid.")
@shared_options
@click.option(
    "--lease",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --storage: a worker that was not heard of for so long is taken for dead [60].",
)
@common_options
@click.pass_obj
def command(
    console: Console,
    experiment: Path,
    sets: tuple[str, ...],
    budget: float | None,
    foreign: Path | None,
    dry_run: bool,
    fork: bool,
    storage: str | None,
    artifacts: str | None,
    lease: float | None,
) -> None:
    """Searches as EXPERIMENT (a YAML file) says, or resumes: finished work is never repeated.

    Ctrl-C once finishes or checkpoints the current step. At the end the front is shown with the pick for the budget,
    the HTML report and the package.

    With --storage the trainings are done by `nas worker` on any machines; see docs/scale.md.
    """
    from nas.search.experiment import load_experiment

    given = sets if budget is None else (*sets, f"budget.ms={budget!r}")
    given = given if foreign is None else (*given, f"run.foreign_table={foreign}")
    loaded = load_experiment(experiment, given)
    shared = _shared(storage, artifacts, lease)
    if dry_run:
        _dry_run(console, loaded, fork)
        return
    from nas.report.html import write_report
    from nas.report.tables import front_records, front_table
    from nas.search.api import run_search

    with console.reporter() as reporter:
        view = run_search(loaded, reporter, fork=fork, shared=shared)
    folder = loaded.run_dir.with_name(view.name)  # a fork lies beside the old run
    page = write_report(view, folder / "report")
    console.say()
    show_front(console, view, front_table(view))
    console.say(f"report:  {page}")
    if view.package is not None:
        console.say(f"package: {view.package.path} ({_verdict(view.package)})")
    for pick in view.also:
        if pick.package is not None:
            console.say(f"package for {pick.budget_ms:g} ms: {pick.package.path} ({_verdict(pick.package)})")
    for other in view.others:
        _show_device(console, other)
    show_common(console, view)
    if view.common is not None:
        for package in view.common.packages:
            console.say(f"package for all: {package.path} ({_verdict(package)})")
    for line in (*view.commands, *(line for other in view.others for line in other.commands)):
        console.say(f"next:    {line}")
    console.result(
        {
            "run": view.name,
            "run_dir": str(folder),
            "status": view.status,
            "budget_ms": view.budget_ms,
            "budget_of": view.budget_of,
            "pipeline": view.pipeline,
            "pick": view.pick_id,
            "pick_reason": view.pick_reason,
            "closest": view.closest_id,
            "also": view.also,
            "points": front_records(view),
            "proposers": view.proposers,
            "devices": [_device_result(own) for own in (view, *view.others)] if view.others else [],
            "common": view.common,
            "foreign_table": view.provenance.get(FOREIGN_MARK),
            "report": str(page),
            "package": view.package,
            "wall_s": view.wall_s,
            "cpu_s": view.cpu_s,
        }
    )
    _check_packages(view)
    for own in (view, *view.others):
        if own.pick_id is None:
            where = f" on {own.device_name}" if own is not view else ""
            change = f"also_on=[{{device: {own.device_name}, ms: MS}}]" if own is not view else "budget.ms=MS"
            raise BudgetError(
                f"no finished student keeps {format_ms(own.budget_ms or 0)} ({own.budget_of}){where}. "
                f"{own.closest_id}: {own.closest_reason}. Allow more time: --set {quote(change)} --fork"
            )
    for pick in view.also:
        if pick.student is None:
            raise BudgetError(
                f"no finished student keeps {format_ms(pick.budget_ms)} ({view.budget_of}): {pick.reason}. "
                "Allow more time: --set budget.also_ms=[MS] --fork"
            )


def _shared(storage: str | None, artifacts: str | None, lease: float | None) -> SharedSettings | None:
    """How the search is shared; None where it is not. Nothing is opened.

    Raises:
        UsageError: an option without `--storage`, or an address that cannot be used.
    """
    if storage is None:
        if artifacts is not None:
            raise UsageError("--artifacts goes with --storage: it is where the machines of a shared search leave files")
        if lease is not None:
            raise UsageError("--lease goes with --storage: it is about the workers of a shared search")
        return None
    from nas.search.artifacts import check_place
    from nas.search.shared_storage import check_storage
    from nas.search.shared_study import LEASE_S, SharedSettings

    check_storage(storage)
    if artifacts is not None:
        check_place(artifacts)
    return SharedSettings(storage, artifacts, LEASE_S if lease is None else lease)


def _show_device(console: Console, view: RunView) -> None:
    """The front and the package on a further device."""
    from nas.report.tables import front_table

    console.say()
    console.say(f"on {view.device_name}:")
    show_front(console, view, front_table(view))
    if view.package is not None:
        console.say(f"package: {view.package.path} ({_verdict(view.package)})")


def _device_result(view: RunView) -> dict[str, object]:
    from nas.report.tables import front_records

    return {
        "device": view.device_name,
        "budget_ms": view.budget_ms,
        "pick": view.pick_id,
        "pick_reason": view.pick_reason,
        "closest": view.closest_id,
        "points": front_records(view),
        "package": view.package,
    }


def _verdict(package: PackageView) -> str:
    return "good" if package.is_good else f"not good: {package.reason}"


def _check_packages(view: RunView) -> None:
    """Raises:
    BudgetError: a package of the run, on any of its devices, is not good.
    """
    picked = [own.package for own in (view, *view.others)]
    common = () if view.common is None else view.common.packages
    for package in (*picked, *(pick.package for pick in view.also), *common):
        if package is not None and not package.is_good:
            raise BudgetError(f"{package.path} is not good: {package.reason}")


def _dry_run(console: Console, experiment: Experiment, fork: bool) -> None:
    from nas.search.experiment import resolved_yaml
    from nas.search.plan import check_plan, plan_search
    from nas.search.rounds import is_clear_miss

    with console.reporter() as reporter:
        plan = plan_search(experiment, reporter)
    console.say(resolved_yaml(experiment))
    _show_plan(console, plan)
    if not fork:
        check_plan(plan)
    elif plan.differences:
        console.say(f"--fork: in a new run folder beside {plan.run_dir}; what stays valid of that run is kept:")
        console.say("\n".join(plan.differences))
    # Expected and p99 depend on the exits that images take, which is known after scoring only.
    for own in (plan, *plan.others) if experiment.budget.of == "worst" else ():
        if own.fastest_ms is not None and is_clear_miss(own.fastest_ms, own.budget_ms):
            needed = rounded_up(1.1 * own.fastest_ms)
            change = f"--set budget.ms={needed}" if own is plan else f"ms: {needed} in also_on"
            raise BudgetError(
                f"the fastest network of this space is predicted to need {format_ms(own.fastest_ms)} on {own.device}, "
                f"the budget is {format_ms(own.budget_ms)}. Allow more time ({change}), or use a space with smaller "
                "networks (--set space=NAME)"
            )
    console.result({"experiment": experiment, "plan": plan, "about_s": plan.about_s})


def _show_plan(console: Console, plan: Plan) -> None:
    console.say(f"run folder: {plan.run_dir} ({plan.status}{f', {plan.scored} trials scored' if plan.scored else ''})")
    console.say(f"device:     {plan.device}")
    if plan.is_whole_table:
        console.say(f"table:      {plan.table}: {len(plan.missing)} of {plan.rows} rows are to be measured")
        for key in plan.missing[:3]:
            console.say(f"            {key}")
        if len(plan.missing) > 3:
            console.say("            ... all of them with --json")
    elif plan.is_interpolated:
        console.say(
            f"table:      {plan.table}: {len(plan.missing)} rows are to be measured, the others of {plan.rows} "
            "interpolated"
        )
    else:
        console.say(f"table:      {plan.table}: {plan.rows} rows in this space, measured as candidates need them")
    if plan.fastest_ms is not None:
        console.say(f"fastest:    {format_ms(plan.fastest_ms)} predicted, budget {format_ms(plan.budget_ms)}")
    for other in plan.others:
        console.say(f"device:     {other.device}")
        console.say(f"table:      {other.table}: {other.missing} rows are to be measured")
        if other.fastest_ms is not None:
            console.say(f"fastest:    {format_ms(other.fastest_ms)} predicted, budget {format_ms(other.budget_ms)}")
    console.say(f"sampler:    {plan.sampler} ({plan.sampler_reason})")
    if not plan.phases:
        console.say("nothing to do: this run is finished")
        return
    console.say()
    rows = [
        [phase.name, phase.what, "unknown" if phase.about_s is None else f"about {format_duration(phase.about_s)}"]
        for phase in plan.phases
    ]
    console.table(("phase", "work", "roughly"), rows)
    console.say(f"roughly {format_duration(plan.about_s)} in all; other machines differ by a factor of two")
    if plan.unknown:
        console.say(
            f"without: {', '.join(plan.unknown)}. Each is an engine that the board builds for seconds to many minutes; "
            "how long is known after the first few: nas measure --device DEVICE --space NAME, stopped when you like"
        )
