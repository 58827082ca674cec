"""`nas export`: one finished student of a run becomes a package, measured as the file that it is."""

from __future__ import annotations

from pathlib import Path

import click

from nas.cli.options import Milliseconds, common_options
from nas.cli.output import Console
from nas.cli.runs import find_run, run_argument
from nas.core.errors import BudgetError, UsageError
from nas.core.run import LatencyKind
from nas.core.units import format_bytes, format_ms


@click.command(short_help="Export one student of a run as a package that was measured as a file.")
@run_argument
@click.option("--student", metavar="ID", help="The student with this id.")
@click.option("--trial", type=int, help="The student that came from this trial.")
@click.option("--best-under", type=Milliseconds(), help="The most accurate below this time (of equals the fastest).")
@click.option("--of", "of", type=click.Choice(["expected", "worst", "p99"]), help="Latency that --best-under limits.")
@click.option(
    "--exits",
    metavar="TARGET",
    help="With --student or --trial: solve its exit thresholds for loss=RATIO, expected=TIME or p99=TIME.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the package [RUN/packages/ID].")
@click.option("--force", is_flag=True, help="Replace an existing package.")
@click.option(
    "--for",
    "target",
    metavar="RUNTIME",
    help="Write for ort or tensorrt:VERSION [the runtime of the device]; of another one the latency stays open.",
)
@click.option("--on", metavar="DEVICE", default="", help="Of a run for several devices: which one [the first].")
@common_options
@click.pass_obj
def command(
    console: Console,
    run: Path | None,
    on: str,
    student: str | None,
    trial: int | None,
    best_under: float | None,
    of: LatencyKind | None,
    exits: str | None,
    output: Path | None,
    force: bool,
    target: str | None,
) -> None:
    """Exports a student of RUN (a run folder or experiment file; the newest run where it is absent).

    Without an option it is the run's pick for its budget. Speed and accuracy are measured on the exported file itself.
    Below a time the next best student is taken when a package misses it. A student that was asked for by name is
    exported as it is, or with --exits with thresholds that are solved exactly for an accuracy loss or a latency on the
    validation images. With --for a package is written for a runtime that is not here, such as a board's TensorRT: its
    accuracy is measured with this machine's ONNX Runtime, its latency by nas deploy. The exit code is 3 where a package
    misses the budget or loses too much accuracy.
    """
    from nas.export.dialect import target_dialect
    from nas.latency.exits import read_target
    from nas.search.exporting import export_student
    from nas.search.folder import RunFolder
    from nas.search.view import experiment_of, further_name

    if sum(value is not None for value in (student, trial, best_under)) > 1:
        raise UsageError("give one of --student, --trial and --best-under")
    if of is not None and best_under is None:
        raise UsageError("--of says which latency --best-under limits; give both, such as: --best-under 5ms --of p99")
    if exits is not None and student is None and trial is None:
        raise UsageError("--exits solves the thresholds of one student; name it: --student ID or --trial NUMBER")
    target_of_exits = None if exits is None else read_target(exits, "--exits")
    folder = find_run(run)
    device_path = RunFolder(folder, further_name(experiment_of(folder), on)).device_path
    place = output or (device_path / "packages" / student if student is not None and exits is None else None)
    if place is not None and place.exists() and not force:
        raise UsageError(f"{place} exists already; choose another folder (--output DIR), or replace it: --force")
    with console.reporter() as reporter:
        package = export_student(
            folder,
            reporter,
            student=student,
            trial=trial,
            best_under_ms=best_under,
            of=of,
            on=on,
            out=output,
            overwrite=force,
            dialect=None if target is None else target_dialect(target),
            exits=target_of_exits,
        )
    manifest = package.manifest
    accuracy = manifest.accuracy
    figures = None if manifest.latency is None else manifest.latency.figures
    size = format_bytes(manifest.model_bytes)
    console.say(f"package {package.folder}: {size}, {manifest.precision}, form {manifest.form}")
    top1 = f"top1 {100 * accuracy.top1:.2f} % on {accuracy.images} {accuracy.split} images"
    if figures is None:
        console.say(f"measured on the file: {top1}; its latency is open, for {manifest.dialect} was not there")
        console.say(f"next: nas deploy {package.folder} --device ssh:USER@BOARD")
    else:
        expected, worst = format_ms(figures.expected_ms), format_ms(figures.worst_ms)
        console.say(f"measured on the file: expected {expected}, worst {worst}, {top1}")
        console.say(f"next: nas bench {package.folder}")
    console.result(
        {
            "run": str(folder),
            "student": manifest.name,
            "package": str(package.folder),
            "sha256": package.sha256,
            "verdict": manifest.verdict,
            "dialect": manifest.dialect,
            "accuracy": accuracy,
            "latency": figures,
            "model_bytes": manifest.model_bytes,
        }
    )
    if not manifest.is_good and manifest.verdict != "unmeasured":
        raise BudgetError(f"{package.folder} is not good: {'; '.join(manifest.reasons)}")
