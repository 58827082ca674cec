"""`nas measure`: fills the latency table of a device with the rows that a space needs, or with rows by key."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from nas.cli.options import common_options
from nas.cli.output import Console, Reporter
from nas.core.errors import DeviceError, UsageError
from nas.core.records import LayerSpec, Precision
from nas.core.units import format_duration, format_ms

if TYPE_CHECKING:
    from nas.latency.table import LatencyTable
    from nas.measure.fill import FillProgress, FillReport
    from nas.space.space import SearchSpace

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SHOWN_ROWS = 10  # of those that failed; --json tells all


@click.command(short_help="Fill the latency table of a device, for a space or a list of rows.")
@click.option("--space", metavar="NAME|FILE", help="Measure every row that a network of this space can need.")
@click.option("--rows", "--row", multiple=True, metavar="KEY", help="Measure the row with this key; may be repeated.")
@click.option("--classes", type=click.IntRange(min=1), default=10, show_default=True, help="Classes of the data set.")
@click.option("--precision", multiple=True, type=click.Choice(PRECISIONS), help="Only these; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Where: cpu, cpu:N, tensorrt, ssh:USER@HOST.")
@click.option("--table", type=click.Path(path_type=Path), help="Folder of the table [latency_tables/<device state>].")
@click.option(
    "--how",
    type=click.Choice(("isolated", "covering")),
    default="isolated",
    show_default=True,
    help="Each row alone, or all of them from few whole networks whose layers are profiled.",
)
@click.option(
    "--engine-s",
    type=click.FloatRange(min=0, min_open=True),
    help="With --how covering --dry-run: seconds that one network takes there, builds included.",
)
@click.option("--again", is_flag=True, help="Also rows that failed or were disturbed; alone: those of the table.")
@click.option("--dry-run", is_flag=True, help="Only say what is missing and about how long it takes.")
@common_options
@click.pass_obj
def command(
    console: Console,
    space: str | None,
    rows: tuple[str, ...],
    classes: int,
    precision: tuple[Precision, ...],
    device: str,
    table: Path | None,
    how: str,
    engine_s: float | None,
    again: bool,
    dry_run: bool,
) -> None:
    """Measures rows on a device. Every result is stored at once: after a stop the same command goes on.

    A search fills the rows that it needs by itself; this fills a table beforehand, or on another machine.
    """
    from nas.devices import open_device
    from nas.devices.boards import unlocked_warning
    from nas.latency.table import LatencyTable
    from nas.measure.covering import fill_covering, mixed_ways
    from nas.measure.fill import fill, measure_streaming, pace_of

    if how == "covering" and space is None:
        raise UsageError("--how covering goes with --space NAME: the networks are from it")
    if engine_s is not None and not (how == "covering" and dry_run):
        raise UsageError("--engine-s goes with --how covering --dry-run")
    target = open_device(device, console.warn)
    unlocked = unlocked_warning(target.profile, device)
    if unlocked is not None:
        console.warn(unlocked)
    folder = table or Path("latency_tables") / target.profile.name
    if again and space is None and not rows:
        if not (folder / "device.json").exists():
            raise UsageError(f"{folder}: no table here whose rows could be measured again. Give --space NAME")
        rows = tuple(LatencyTable.open(folder, target.profile).rows)
    offered = target.profile.precisions
    if how == "covering" and dry_run and precision:  # how many networks there are depends on no device
        offered = tuple(dict.fromkeys([*offered, *precision]))
    layers, weight_mb = _layers(space, rows, classes, precision, offered)
    keys = list(dict.fromkeys(layer.key for layer in layers))
    is_new = not (folder / "device.json").exists()
    missing = keys
    if not (dry_run and is_new):  # opening begins a new table
        opened = LatencyTable.open(folder, target.profile)
        missing = opened.missing(keys, again=again)
        for line in opened.warnings:
            console.warn(line)
    document = {"table": str(folder), "device": target.profile, "rows": len(keys), "missing": missing}
    console.say(f"table {folder}: {len(keys) - len(missing)} of {len(keys)} rows are there")
    if how == "covering":
        loaded = _space(str(space), classes, precision, offered)
        if dry_run:
            _covering_plan(console, document, loaded, missing, engine_s)
            return
    if dry_run:
        row_s = pace_of(target.profile.runtime, None if is_new else opened).row_s
        about_s = None if row_s is None else len(missing) * row_s
        about = "an engine for each" if about_s is None else f"about {format_duration(about_s)} on a calm machine"
        console.say(f"{len(missing)} rows to measure, {about}")
        console.result({**document, "about_s": about_s})
        return
    options: list[str] = []
    with console.reporter() as reporter:
        measure_streaming(opened, target, weight_mb, progress=_shown(reporter))
        if how == "covering":
            report = fill_covering(opened, target, loaded, layers, again=again, progress=_shown(reporter))
            options = ["--space", str(space), "--classes", str(classes)]
            options += [part for p in precision for part in ("--precision", p)]
            options += ["--device", device, "--table", str(folder)]
            report = replace(report, again=shlex.join(["nas", "measure", "--again", "--how", "covering", *options]))
        else:
            report = fill(opened, target, layers, again=again, progress=_shown(reporter))
    for line in (*report.warnings, *_alone(report, options), *filter(None, [mixed_ways(tuple(opened.rows.values()))])):
        console.warn(line)
    console.say(f"measured {report.measured} rows in {format_duration(report.seconds)}, {len(report.failed)} failed")
    _summary(console, opened, layers)
    document |= {
        "missing": opened.missing(keys),
        "measured": report.measured,
        "failed": [{"key": key, "reason": reason} for key, reason in report.failed],
        "unstable": report.unstable,
        "drift": report.drift,
        "seconds": report.seconds,
        "overhead_ms": opened.overhead_ms,
        "streaming_ms": dict(opened.streaming),
        "latency_ms": {k: opened.rows[k].latency_ms for k in sorted(keys) if k in opened.rows},
    }
    if report.failed and len(report.failed) == report.measured:
        raise DeviceError(f"none of {report.measured} rows could be measured. Run: nas doctor")
    console.result(document)


def _layers(
    space: str | None,
    rows: Sequence[str],
    classes: int,
    precision: Sequence[Precision],
    offered: Sequence[Precision],
) -> tuple[tuple[LayerSpec, ...], float]:
    """Layers whose rows are asked for, and the weights of the largest network of them (MB; 0 for single rows)."""
    from nas.latency.keys import layer_of_key
    from nas.measure.fill import fp32_mb

    if (space is None) == (not rows):
        raise UsageError(
            "give either --space NAME or --rows KEY, or --again for the rows of a table that failed or were disturbed. "
            "Such as: nas measure --space tiny-32"
        )
    refused = [p for p in precision if p not in offered]
    if refused:
        raise UsageError(f"--precision {refused[0]}: this device offers {', '.join(offered)}")
    if space is None:
        if precision:
            raise UsageError("--precision goes with --space; the key of a row ends in its precision")
        layers = tuple(layer_of_key(key) for key in rows)
        wrong = [layer for layer in layers if layer.precision not in offered]
        if wrong:
            raise UsageError(f"--rows {wrong[0].key}: this device offers {', '.join(offered)}")
        return layers, 0.0
    loaded = _space(space, classes, precision, offered)
    return loaded.layers(), fp32_mb(loaded.decode(loaded.largest()))


def _space(space: str, classes: int, precision: Sequence[Precision], offered: Sequence[Precision]) -> SearchSpace:
    from nas.search.experiment import space_file
    from nas.space.space import load_space

    return load_space(space_file(space, "--space"), classes, precision or offered)


def _covering_plan(
    console: Console, document: dict[str, Any], space: SearchSpace, missing: Sequence[str], engine_s: float | None
) -> None:
    """Says how many covering networks there are to measure, and how long that takes where one is known."""
    from nas.measure.covering import covering_plan

    plan = covering_plan(space, missing)
    console.say(
        f"{plan.rows} rows to measure in {len(plan.networks)} covering networks; no choice of networks needs fewer "
        f"than {plan.least}. Where engines are built, each has three: two are measured, one is profiled"
    )
    if engine_s is None:
        console.say("give --engine-s SECONDS, what one network takes there, builds included, for the hours of all")
    else:
        console.say(f"{plan.hours(engine_s):.1f} hours at {engine_s:g} s for each")
    hours = None if engine_s is None else plan.hours(engine_s)
    console.result({**document, "networks": len(plan.networks), "least_networks": plan.least, "hours": hours})


def _alone(report: FillReport, options: Sequence[str]) -> Iterator[str]:
    """What to do about rows that no covering network gives; they are missing, so the other way measures just them."""
    if report.failed and options:
        names = "\n  ".join(key for key, _ in report.failed[:SHOWN_ROWS])
        more = len(report.failed) - SHOWN_ROWS
        yield (
            f"no covering network gives these rows:\n  {names}{f' and {more} more' if more > 0 else ''}\n"
            f"Measure what is missing row by row: {shlex.join(['nas', 'measure', '--how', 'isolated', *options])}"
        )


def _shown(reporter: Reporter) -> Callable[[FillProgress], None]:
    def show(now: FillProgress) -> None:
        reporter.progress("rows", now.done, now.total, now.message)

    return show


def _summary(console: Console, table: LatencyTable, layers: Sequence[LayerSpec]) -> None:
    """One line per kind of layer and precision: how many rows, and from where to where."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for layer in layers:
        row = table.rows.get(layer.key)
        if row is not None and row.latency_ms is not None:
            groups.setdefault((layer.group, layer.precision), {})[layer.key] = row.latency_ms
    lines = []
    for (group, precision), found in sorted(groups.items()):
        values = sorted(found.values())
        shown = (values[0], statistics.median(values), values[-1])
        lines.append([group, precision, str(len(values)), *(format_ms(value) for value in shown)])
    console.table(("layer", "precision", "rows", "fastest", "median", "slowest"), lines)
