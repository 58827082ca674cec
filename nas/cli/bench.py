"""`nas bench`: a package, an ONNX classifier or a published network, measured by the protocol of the latency tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from nas.cli.options import Milliseconds, common_options
from nas.cli.output import Console
from nas.core.errors import BudgetError, DeviceError, UsageError
from nas.core.records import LatencyFigures, Measurement, Precision
from nas.core.run import LatencyKind, StreamLatency, latency_of
from nas.core.units import format_ms

if TYPE_CHECKING:
    from nas.devices.base import Device
    from nas.export.manifest import Manifest, PathLatency

MAX_ONNX_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured: one path per exit that an image can leave at, and the figures over all of them.

    `stream`: test images of a run that passed the package one by one, where that was asked for.
    `figures` are of undisturbed runs, `medians` of the median of the runs in calm rounds, which
    a budget is compared with.
    """

    figures: LatencyFigures
    medians: LatencyFigures
    paths: tuple[PathLatency, ...]
    manifest: Manifest | None
    stream: StreamLatency | None = None


@click.command(short_help="Measure an exported package; fail when it misses a budget.")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--budget-ms", "--budget", type=Milliseconds(), help="Exit with 3 when it takes longer, such as 5 or 800us."
)
@click.option("--of", "of", type=click.Choice(["expected", "worst", "p99"]), help="Latency that the budget limits.")
@click.option(
    "--stream",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Also time the test images of this run one by one, and compare with the expected latency.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    help="Of an .onnx file or a published network: what the runtime builds [fp32]; a package says its own.",
)
@click.option("--device", default="cpu", show_default=True, help="Where: cpu, cpu:N, tensorrt, ssh:USER@HOST.")
@common_options
@click.pass_obj
def command(
    console: Console,
    package: Path,
    budget_ms: float | None,
    of: LatencyKind | None,
    stream: Path | None,
    precision: Precision | None,
    device: str,
) -> None:
    """Measures PACKAGE (a folder that `nas export` made, or an .onnx file) at batch 1.

    PACKAGE may also be mobilenetv3-small-224 or mobilenetv3-large-224: the published network with random weights, whose
    latency on many devices others have told.

    A package is checked first: its files against the manifest, and its answers to the images that it carries. Each exit
    is measured on its own; the expected latency weights them by the share of images that left there.
    """
    from nas.devices import open_device
    from nas.devices.boards import unlocked_warning
    from nas.export.dialect import dialect_for
    from nas.measure.stream import stream_line, warn_if_off

    if precision is not None and package.is_dir():
        raise UsageError(f"--precision goes with an .onnx file or a published network; {package} has its own")
    target = open_device(device, console.warn)
    if precision is not None and precision not in target.profile.precisions:
        raise UsageError(f"--precision {precision}: this device offers {', '.join(target.profile.precisions)}")
    unlocked = unlocked_warning(target.profile, device)
    if unlocked is not None:
        console.warn(unlocked)
    with console.reporter() as reporter:
        measured = _bench(target, package, stream, precision, lambda share: reporter.progress("measuring", share, 1.0))
    figures = measured.figures
    kind = of or (measured.manifest.budget_of if measured.manifest is not None else "worst")
    console.say(f"{package} on {target.profile.name}, batch 1")
    rows = [[_path_name(measured, path), f"{100 * path.share:.0f} %", *_cells(path)] for path in measured.paths]
    console.table(("path", "images", "latency", "median", "p95", "samples", "calm"), rows)
    shown = {"expected": figures.expected_ms, "worst": figures.worst_ms, "p99": figures.p99_ms, "std": figures.std_ms}
    console.say(", ".join(f"{name} {format_ms(value)}" for name, value in shown.items()))
    if measured.manifest is not None:
        card = measured.manifest.latency
        if card is not None:
            console.say(f"its card: expected {format_ms(card.figures.expected_ms)} on {card.device.name}")
        written_for, reads = measured.manifest.dialect, dialect_for(target.profile).name
        if written_for != reads:
            console.warn(
                f"its graphs are written for {written_for}; a time on {target.profile.name} says nothing of a device "
                "that reads them"
            )
    if measured.stream is not None:
        console.say(stream_line(measured.stream, figures.expected_ms))
        warn_if_off(str(package), measured.stream, figures.expected_ms, console.warn)
    elif measured.manifest is not None and measured.manifest.stream is not None and measured.manifest.latency:
        card_ms = measured.manifest.latency.figures.expected_ms
        console.say(f"its card: {stream_line(measured.manifest.stream, card_ms)}")
    if not all(path.is_stable for path in measured.paths):
        console.warn("the machine was never calm while this was measured; end other programs and try again")
    value = latency_of(measured.medians, kind)
    missed = budget_ms is not None and value > budget_ms
    document = {
        "package": str(package),
        "device": target.profile,
        "figures": figures,
        "median_figures": measured.medians,
        "paths": measured.paths,
        "stream": measured.stream,
        "budget_ms": budget_ms,
        "budget_of": kind,
        "keeps_budget": None if budget_ms is None else not missed,
    }
    if budget_ms is not None:
        console.say(
            f"budget {format_ms(budget_ms)} ({kind}): {'MISSED' if missed else 'kept'} with median {format_ms(value)}"
        )
    console.result(document)
    if missed:
        click.get_current_context().exit(BudgetError.exit_code)


def _path_name(measured: Bench, path: PathLatency) -> str:
    is_head = measured.manifest is None or path.exit_index == len(measured.manifest.candidate.exits)
    return "all layers" if is_head else f"exit {path.exit_index}"


def _cells(path: PathLatency) -> tuple[str, ...]:
    times = (format_ms(value) for value in (path.latency_ms, path.p50_ms, path.p95_ms))
    return (*times, str(path.samples), "yes" if path.is_stable else "no")


def _bench(device: Device, package: Path, run: Path | None, precision: Precision | None, progress: Any) -> Bench:
    """Measures a package, a file or a published network; with a run also a stream of a package's test images.

    Raises:
        UsageError: neither; or a package that is not whole or does not answer as it should.
        DeviceError: it cannot be run.
    """
    from nas.devices.base import JobPrecision, MeasureJob
    from nas.export.check import checked_model
    from nas.export.forms import measured_figures, measured_paths, median_figures, path_shares
    from nas.export.manifest import path_latency
    from nas.export.package import read_artefact, verify_package
    from nas.space.published import PUBLISHED

    def measure(models: Sequence[bytes]) -> Sequence[Measurement]:
        jobs = [MeasureJob(f"{package.name}#{i}", "network", label, model, 0) for i, model in enumerate(models)]
        return device.measure(jobs, progress=progress)

    label: JobPrecision = precision or "none"
    if package.is_file() and package.suffix == ".onnx":
        data = _read(package)
        checked_model(data, str(package))
        manifest, exits, shares = None, (0,), {0: 1.0}
        measurements = list(measure([data]))
    elif package.is_dir():
        verification = verify_package(package, device.run)
        manifest = verification.package.manifest
        if not verification.passed:
            raise DeviceError(
                f"{package}: on this device the package does not give the answers that it carries "
                f"({verification.parity}). Its accuracy does not hold here; export it for this device"
            )
        label = manifest.candidate.precision_label
        shares = path_shares(manifest.candidate, manifest.form, manifest.accuracy.exit_shares)
        artefact = read_artefact(package, manifest)
        exits, measurements = measured_paths(manifest.candidate, manifest.form, artefact, measure)
    elif str(package) in PUBLISHED:
        label = precision or "fp32"
        manifest, exits, shares = None, (0,), {0: 1.0}
        measurements = list(measure([_published_model(str(package), precision or "fp32", device)]))
    else:
        raise UsageError(
            f"{package}: neither a package folder nor an .onnx file nor a published network ({', '.join(PUBLISHED)}). "
            "Packages are made by: nas export"
        )
    figures = measured_figures(measurements, tuple(shares.values()))
    paths = tuple(path_latency(m, k, shares[k]) for m, k in zip(measurements, exits, strict=True))
    stream = None
    if run is not None:
        if manifest is None or len(paths) < 2:
            raise UsageError(f"{package}: --stream is for packages with early exits; this one has none")
        stream = _stream(device, package, manifest, paths, run)
    return Bench(figures, median_figures(measurements, paths), paths, manifest, stream)


def _published_model(name: str, precision: Precision, device: Device) -> bytes:
    """A published network with random weights, written for a device."""
    from nas.export.dialect import dialect_for
    from nas.export.graph import network_model, nominal_quant, random_weights
    from nas.space.published import published_network

    candidate = published_network(name).with_precision(precision)
    quant = nominal_quant(candidate) if precision == "int8" else None
    weights, dialect = random_weights(candidate, 0), dialect_for(device.profile)
    return network_model(candidate, weights, (0.5,) * 3, (0.25,) * 3, quant=quant, dialect=dialect)


def _stream(
    device: Device, package: Path, manifest: Manifest, paths: Sequence[PathLatency], run: Path
) -> StreamLatency:
    """A stream of a run's test images through a package.

    Raises:
        UsageError: the device times no stream, or RUN is none.
        StorageError: the images of the run are not in the cache any more.
    """
    from nas.cli.runs import find_run
    from nas.data import evenly
    from nas.export.manifest import exit_latencies
    from nas.export.package import read_artefact
    from nas.measure.stream import STREAM_IMAGES, measured_stream, no_stream
    from nas.recipe.context import open_context

    context = open_context(str((find_run(run) / "context.json").resolve()), manifest.candidate.resolution)
    exit_ms = exit_latencies(paths, len(manifest.candidate.exits))
    images = evenly(context.test, STREAM_IMAGES)
    stream = measured_stream(device, package.name, read_artefact(package, manifest), images, exit_ms)
    if stream is None:
        raise UsageError(f"--stream: {device.profile.name} cannot time a stream of images: {no_stream(device)}")
    return stream


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_ONNX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_ONNX_BYTES} bytes")
    return path.read_bytes()
