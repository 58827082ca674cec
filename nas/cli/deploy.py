"""`nas deploy`: a package on its device: answers checked, measured, judged, and the device's table taught."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nas.cli.options import Milliseconds, common_options
from nas.cli.output import Console
from nas.core.errors import BudgetError, UsageError
from nas.core.run import LatencyKind
from nas.core.units import format_ms

if TYPE_CHECKING:
    from nas.measure.deploy import Deployment


@click.command(short_help="Put a package on its device: check its answers, measure it, teach the table.")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--device", required=True, metavar="DEVICE", help="cpu, or ssh:USER@HOST for a board.")
@click.option(
    "--budget-ms", "--budget", type=Milliseconds(), help="Deadline, such as 5 or 800us [that of the package]."
)
@click.option("--of", "of", type=click.Choice(["expected", "worst", "p99"]), help="Latency that the deadline limits.")
@click.option("--table", type=click.Path(path_type=Path), help="Folder of the table [latency_tables/<device state>].")
@click.option("--to", metavar="FOLDER", help="Where the package goes on a board [~/nas-packages/NAME].")
@click.option("--no-copy", is_flag=True, help="Only measure it on the board; leave no folder there.")
@common_options
@click.pass_obj
def command(
    console: Console,
    package: Path,
    device: str,
    budget_ms: float | None,
    of: LatencyKind | None,
    table: Path | None,
    to: str | None,
    no_copy: bool,
) -> None:
    """Deploys PACKAGE (a folder that `nas export` made) on a device.

    Its files are checked, then its answers to the images that it carries, on the device. It is measured there by the
    protocol of the latency tables; the result goes into the table of the device, which corrects later predictions, and
    into a package that had no latency yet. On a board the folder is copied, its engines are built there, and its own
    parity.py and bench.py are run.

    \b
    Exit codes: 0 good; 2 no package, or written for another runtime; 3 it misses the deadline or loses too much
    accuracy; 4 the device cannot run it, answers otherwise, or is in another state than its table; 6 a file or the
    table cannot be written.
    """
    from nas.devices import open_device
    from nas.devices.agent import packed_agent
    from nas.devices.boards import unlocked_warning
    from nas.devices.remote import RemoteDevice
    from nas.export.package import check_scripts, verify_package
    from nas.latency.table import LatencyTable
    from nas.measure.deploy import board_folder, deploy, run_on_board

    if not package.is_dir():
        raise UsageError(f"{package}: not a package folder. Packages are made by: nas export")
    is_board = device.startswith("ssh:")
    if (to is not None or no_copy) and not is_board:
        raise UsageError("--to and --no-copy are for a board: --device ssh:USER@HOST")
    if is_board and "," in device:
        raise UsageError(f"--device {device}: a package is deployed on one board at a time")
    with console.reporter() as reporter:
        target = open_device(device, console.warn)
        unlocked = unlocked_warning(target.profile, device)
        if unlocked is not None:
            console.warn(unlocked)
        if is_board and not no_copy:  # before anything is measured
            check_scripts(verify_package(package).package, packed_agent().data)
        opened = LatencyTable.open(table or Path("latency_tables") / target.profile.name, target.profile)
        for line in opened.warnings:
            console.warn(line)
        done = deploy(
            package,
            target,
            opened,
            budget_ms=budget_ms,
            of=of,
            progress=lambda what, share: reporter.progress(f"deploying: {what}", share, 1.0),
        )
        if isinstance(target, RemoteDevice):
            if not no_copy:
                done = run_on_board(done, target, to or board_folder(done.package.manifest), reporter.say)
            target.close()
    _show(console, done, str(opened.folder))
    if not done.is_good:
        raise BudgetError(f"{package} is not good on {done.device.name}: {'; '.join(done.reasons)}")


def _show(console: Console, done: Deployment, table: str) -> None:
    manifest, device = done.package.manifest, done.device
    console.say(f"{done.package.folder} on {device.board}, {device.runtime} {device.runtime_version}, batch 1")
    head = len(manifest.candidate.exits)
    rows = []
    for path in done.latency.paths:
        times = (format_ms(value) for value in (path.latency_ms, path.p50_ms, path.p95_ms))
        name = "all layers" if path.exit_index == head else f"exit {path.exit_index}"
        rows.append([name, f"{100 * path.share:.0f} %", *times, str(path.samples), "yes" if path.is_stable else "no"])
    console.table(("path", "images", "latency", "median", "p95", "samples", "calm"), rows)
    if done.transfer_ms is not None:
        console.say(f"copying inputs and outputs takes another {format_ms(done.transfer_ms)}, which is in no latency")
    found = done.parity
    console.say(
        f"answers: same exit {100 * found.exit_agreement:.1f} %, same class {100 * found.top1_agreement:.1f} %, logits "
        f"differ by {found.relative_l2:.2g} (allowed {manifest.parity.tolerance.relative_l2:.2g})"
    )
    if done.budget_ms is not None:
        shown = {"expected": done.medians.expected_ms, "worst": done.medians.worst_ms, "p99": done.medians.p99_ms}
        word = "MISSED" if done.verdict == "over_budget" else "kept"
        console.say(
            f"deadline {format_ms(done.budget_ms)} ({done.budget_of}): {word} with median "
            f"{format_ms(shown[done.budget_of])}"
        )
    for run in done.scripts:
        if run.script == "bench.py":
            times = ", ".join(f"{name} {format_ms(ms)}" for name, ms in run.told["figures_ms"].items())
            console.say(f"its own bench.py there: {times}")
    if done.folder:
        console.say(f"it lies on the board in {done.folder}; there: python3 {done.folder}/infer.py PHOTO")
    console.say(f"table {table} learnt {done.stored}")
    if not all(path.is_stable for path in done.latency.paths):
        console.warn("the device was never calm while this was measured; end other programs and deploy it again")
    console.result(
        {
            "package": str(done.package.folder),
            "sha256": done.package.sha256,
            "device": device,
            "parity": done.parity,
            "tolerance": manifest.parity.tolerance,
            "figures": done.latency.figures,
            "median_figures": done.medians,
            "paths": done.latency.paths,
            "transfer_ms": done.transfer_ms,
            "budget_ms": done.budget_ms,
            "budget_of": done.budget_of,
            "margin_ms": done.margin_ms,
            "verdict": done.verdict,
            "reasons": done.reasons,
            "table": table,
            "stored": done.stored,
            "folder": done.folder,
            "scripts": done.scripts,
        }
    )
