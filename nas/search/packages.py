"""A point of the front becomes a package: the file is written, measured and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nas.core.errors import UsageError
from nas.core.records import Measurement
from nas.core.run import PackageView, Point, RunView, StreamLatency
from nas.data import evenly
from nas.devices.agent import packed_agent
from nas.devices.base import Device, MeasureJob
from nas.devices.boards import why_no_answers
from nas.devices.onnxruntime_cpu import op_counts
from nas.export.dialect import ORT, Dialect, dialect_for
from nas.export.forms import Artefact, exits_form
from nas.export.manifest import ArtefactAccuracy, Manifest
from nas.export.package import Instruments, Package, PackagePlan, export_package, measured_accuracy
from nas.latency.exits import NEVER, evaluate_thresholds
from nas.latency.lines import network_key
from nas.measure.stream import measured_stream
from nas.recipe.context import Context, open_context
from nas.recipe.deployed import host_run
from nas.recipe.finish import deployed_rows, deployed_student, finished_logits
from nas.search.view import PointSource

PARITY_IMAGES = 16


def export_point(
    view: RunView,
    run_dir: Path,
    point: Point,
    source: PointSource,
    device: Device,
    folder: Path,
    *,
    max_loss: float,
    margin_std: float = 0.0,
    overwrite: bool = False,
    accept: Callable[[Manifest], bool] = lambda _: True,
    dialect: Dialect | None = None,
    stream_images: int = 0,
) -> Package:
    """Writes and measures the package of one finished point.

    Args:
        view: the run.
        run_dir: its folder.
        point: a finished point.
        source: where its weights come from.
        device: measures the exported file.
        folder: the package.
        max_loss: accuracy (ratio, test split) that the file may lose against the fp32 student with the same exits.
        margin_std: standard deviations of its measurement by which the file must stay below the budget.
        overwrite: replaces an existing package.
        accept: looks at what was measured; False leaves the folder as it was.
        dialect: to write for; None: that of the device. For another one the latency stays open.
        stream_images: test images whose stream is measured where the file has exits; 0: none.

    Raises:
        UsageError, DeviceError, StorageError: from `export_package`.
    """
    trained = source.student.candidate
    home = run_dir / "students" / trained.arch_id
    weights, quant = deployed_student(home, trained, point.candidate, source.precisions, source.cut)
    context = open_context(str((run_dir / "context.json").resolve()), point.candidate.resolution)
    full = finished_logits(home, "test", ("fp32",))
    full = full[deployed_rows(trained, point.candidate, source.cut)]
    # The same exits and thresholds in fp32: what exits give up was chosen, what the file loses on top was not.
    thresholds = tuple(NEVER if t is None else t for t in point.thresholds)
    reference, _, _ = evaluate_thresholds(full, np.asarray(context.test_labels), thresholds, np.zeros(len(full)))
    written_for = dialect or dialect_for(device.profile)
    plan = PackagePlan(
        name=point.id,
        candidate=point.candidate,
        form=exits_form(written_for) if point.candidate.exits else "plain",
        class_names=context.class_names,
        mean=context.mean,
        std=context.std,
        budget_ms=view.budget_ms,
        budget_of=view.budget_of,
        margin_std=margin_std,
        reference_top1=reference,
        max_loss=max_loss,
        provenance={
            **view.provenance,
            "run": view.name,
            "student": point.id,
            **(
                {"steps": "; ".join(s.name + f" ({s.note})" * bool(s.note) for s in point.steps)} if point.steps else {}
            ),
            "data set": "unnamed" if view.dataset is None else view.dataset.name,
        },
        dialect=written_for,
    )
    return export_package(
        folder,
        plan,
        weights,
        quant,
        np.asarray(context.test[:PARITY_IMAGES]),
        _instruments(device, context, point, written_for, stream_images),
        overwrite=overwrite,
        accept=accept,
    )


def _instruments(device: Device, context: Context, point: Point, dialect: Dialect, stream_images: int) -> Instruments:
    is_here = dialect is dialect_for(device.profile)
    is_answering = is_here and not why_no_answers(device)
    run = device.run if is_answering else host_run(dialect, point.candidate.precisions)

    def accuracy(model: Artefact) -> ArtefactAccuracy:
        return measured_accuracy(
            run,
            model,
            np.asarray(context.test),
            np.asarray(context.test_labels),
            exits=len(point.candidate.exits),
        )

    def latency(models: Sequence[bytes]) -> Sequence[Measurement]:
        key = network_key(point.candidate, "if" if point.candidate.exits else "plain")
        label = point.candidate.precision_label
        return device.measure([MeasureJob(f"{key}#{i}", "network", label, m, point.macs) for i, m in enumerate(models)])

    def stream(model: Artefact, exit_ms: Sequence[float]) -> StreamLatency | None:
        return measured_stream(device, point.id, model, evenly(context.test, stream_images), exit_ms)

    return Instruments(
        run,
        accuracy,
        latency if is_here else None,
        device.profile,
        op_counts if dialect is ORT else None,
        None if dialect is ORT else packed_agent().data,
        stream if stream_images else None,
    )


def package_view(package: Package) -> PackageView:
    """What the report says of a package, and which student of the run it is."""
    m = package.manifest
    if m.latency is None:
        raise UsageError(f"{package.folder}: its latency was not measured. Run: nas deploy {package.folder}")
    figures = m.latency.figures
    shown = {"expected": figures.expected_ms, "worst": figures.worst_ms, "p99": figures.p99_ms}[m.budget_of]
    return PackageView(
        str(package.folder),
        m.candidate_id,
        m.is_good,
        "; ".join(m.reasons),
        m.accuracy.top1,
        shown,
        package.sha256,
        m.name,
    )


def source_of(sources: Mapping[str, PointSource], point: Point) -> PointSource:
    """The source of a point.

    Raises:
        UsageError: the point was not finished, so there is nothing to export.
    """
    if point.id not in sources:
        raise UsageError(f"student {point.id} was not distilled in full; choose a point of: nas pareto RUN")
    return sources[point.id]
