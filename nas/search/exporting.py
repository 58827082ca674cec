"""A student of a finished run as a package: one that is named, or the best whose own file keeps the deadline.

At the end of a run these are the picks for its deadlines on each device and the student for all devices; each is
recorded as soon as it is there, so that a run which was stopped goes on with the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from nas.core.errors import BudgetError, StorageError, UsageError
from nas.core.jsonio import read_record, write_record
from nas.core.run import CommonPick, LatencyKind, PackageView, Point, RunView, latency_of
from nas.devices import open_device
from nas.devices.base import Device
from nas.export.dialect import Dialect, dialect_for
from nas.export.manifest import Manifest
from nas.export.package import Package
from nas.latency.exits import ExitTarget
from nas.recipe.context import ContextFile, open_context
from nas.search.exit_targets import solved_point
from nas.search.experiment import Experiment
from nas.search.folder import RunFolder
from nas.search.packages import export_point, package_view, source_of
from nas.search.picks import closest_measured, closest_reason
from nas.search.prepare import load_inputs, prepare_training
from nas.search.progress import Reporter
from nas.search.select import pick_for_all, pick_for_budget
from nas.search.view import experiment_of, further_name, load_outcome, load_view


def export_pick(folder: RunFolder, device: Device, reporter: Reporter) -> None:
    """The package of the pick; where its own file misses the budget, the next student becomes the pick."""
    outcome = load_outcome(folder.path, folder.device)
    if outcome.pick_id is None:
        return
    file = folder.device_path / "package.json"
    if not file.exists():
        reporter.say(f"exporting the pick {outcome.pick_id}{_on(folder)}")
    try:
        exported = read_record(PackageView, file) if file.exists() else _exported_pick(folder, device, reporter)
    except BudgetError as e:
        reporter.warn(str(e))
        reason = "its exported file, and those of all others, were measured above the budget"
        changed = replace(outcome, pick_id=None, pick_reason="", next_id=None, next_reason="")
        changed = replace(changed, closest_id=outcome.pick_id, closest_reason=reason)
        write_record(folder.device_path / "outcome.json", changed)
        return
    if exported.student != outcome.pick_id:  # also where an earlier call was killed between the two files
        reason = f"the best student whose exported file keeps the budget; that of {outcome.pick_id} did not"
        changed = replace(outcome, pick_id=exported.student, pick_reason=reason, next_id=None, next_reason="")
        write_record(folder.device_path / "outcome.json", changed)


def _on(folder: RunFolder) -> str:
    return f" on {folder.device}" if folder.device else ""


def export_others(folder: RunFolder, device: Device, reporter: Reporter) -> None:
    """The packages of the picks for shorter deadlines; each is recorded as soon as it is there."""
    outcome = load_outcome(folder.path, folder.device)
    for i, pick in enumerate(outcome.also):
        if pick.student is None or pick.package is not None:
            continue
        reporter.say(f"exporting the pick for {pick.budget_ms:g} ms, {pick.student}")
        try:
            package = export_student(
                folder.path, reporter, best_under_ms=pick.budget_ms, on=folder.device, device=device
            )
            exported = package_view(package)
        except BudgetError as e:
            reporter.warn(str(e))
            reason = "the exported files of all students that keep it by their own measurement were measured above it"
            done = replace(pick, student=None, reason=reason)
        else:
            reason = f"the best student whose exported file keeps the budget; that of {pick.student} did not"
            is_same = exported.student == pick.student
            done = replace(pick, package=exported, student=exported.student, reason=pick.reason if is_same else reason)
        outcome = replace(outcome, also=(*outcome.also[:i], done, *outcome.also[i + 1 :]))
        write_record(folder.device_path / "outcome.json", outcome)


def export_common(folder: RunFolder, devices: Sequence[tuple[str, Device]], reporter: Reporter) -> None:
    """The student for all devices, as a package on each; where a file misses a deadline, the next student is taken."""
    outcome = load_outcome(folder.path)
    if outcome.common is None or outcome.common.student is None or outcome.common.packages:
        return
    views = [load_view(folder.path, name) for name, _ in devices]
    points = [view.points for view in views]
    budgets = [view.budget_ms or 0.0 for view in views]
    candidates = [p.id for p in pick_for_all(points, budgets, views[0].budget_of)]
    tried: list[str] = []
    miss_ms = [float("inf")] * len(views)  # on each device; what is slower than a file that missed there misses too
    for student in candidates:
        times_ms = [latency_of(view.point(student).latency, view.budget_of) for view in views]
        if any(ms >= limit for ms, limit in zip(times_ms, miss_ms, strict=True)):
            continue
        reporter.say(f"exporting {student} for all devices")
        packages = []
        for i, (view, (name, device)) in enumerate(zip(views, devices, strict=True)):
            made = view.package if view.package is not None and view.package.student == student else None
            package = made or _package_for_all(folder, name, device, student, reporter)
            if isinstance(package, str):
                tried.append(package)
                miss_ms[i] = times_ms[i]
                reporter.say(f"taking the next one: {package}")
                break
            packages.append(package)
        else:
            reason = outcome.common.reason
            if student != outcome.common.student:
                times = zip(packages, views, strict=True)
                reason = (
                    f"the best student whose exported file keeps every deadline; that of {candidates[0]} did not: "
                    + ", ".join(f"{p.latency_ms:.4f} of {v.budget_ms:g} ms on {v.device_name}" for p, v in times)
                )
            break
    else:
        student, packages = None, []
        reason = f"no exported file keeps the deadline of every device; tried: {'; '.join(tried)}"
        reporter.warn(reason)
    common = CommonPick(student, reason, tuple(packages))
    write_record(folder.path / "outcome.json", replace(outcome, common=common))


def _package_for_all(
    folder: RunFolder, name: str, device: Device, student: str, reporter: Reporter
) -> PackageView | str:
    """The package of a student on one device, or why its file misses the deadline there."""
    try:
        package = export_student(folder.path, reporter, only=student, on=name, device=device)
    except BudgetError as e:
        return f"{e}"
    return package_view(package)


def _exported_pick(folder: RunFolder, device: Device, reporter: Reporter) -> PackageView:
    found = package_view(export_student(folder.path, reporter, on=folder.device, device=device))
    write_record(folder.device_path / "package.json", found)
    return found


def export_student(
    run_dir: Path,
    reporter: Reporter,
    *,
    student: str | None = None,
    trial: int | None = None,
    best_under_ms: float | None = None,
    of: LatencyKind | None = None,
    only: str | None = None,
    on: str = "",
    out: Path | None = None,
    overwrite: bool = False,
    device: Device | None = None,
    dialect: Dialect | None = None,
    exits: ExitTarget | None = None,
) -> Package:
    """Exports a student of a finished run: a named one, the best of a trial, or the best that keeps a latency.

    With `best_under_ms` (or nothing: the run's own budget) a package that misses it when its own file is measured is
    not kept: the next student is taken. Only latency decides that: the accuracy of a package is of the test split,
    which must not choose. A package that loses too much accuracy is kept, and is not called good.

    Args:
        run_dir: a finished run.
        reporter: what is told.
        student: id of a point.
        trial: number of a trial whose architecture was finished.
        best_under_ms: budget, ms.
        only: id of a point that is exported only if its file keeps the run's deadline.
        on: the device of the run that it is for, as the experiment names it; by default the first one.
        of: which latency it limits; None: that of the run's budget.
        out: folder of the package; default `<run>/packages/<student>`, with the budget where it is not the run's.
        overwrite: replaces an existing package.
        device: measures; by default the one that is named by `on`.
        dialect: to write for; None: that of the device. For another one the latency of the package stays open.
        exits: for what the thresholds of a student that is named are solved anew.

    Raises:
        BudgetError: no student keeps the latency; the message names the closest.
        UsageError: nothing fits the selection.
    """
    experiment = experiment_of(run_dir)
    budget = experiment.budget_on(on)
    folder = RunFolder(run_dir, further_name(experiment, on))
    outcome = load_outcome(run_dir, folder.device)
    view = load_view(run_dir, on)
    if best_under_ms is not None:
        view = replace(view, budget_ms=best_under_ms, budget_of=of or view.budget_of)
    candidates = [view.point(only)] if only is not None else _selected(view, run_dir, student, trial)
    device = device or open_device(on or experiment.device, reporter.say)
    if device.profile.fingerprint != outcome.device.fingerprint:
        reporter.warn(
            f"this device ({device.profile.name}) is in another state than the run's ({outcome.device.name}): "
            "the package is measured here and now"
        )
    is_named = student is not None or trial is not None

    def accept(manifest: Manifest) -> bool:
        return is_named or manifest.verdict != "over_budget"

    _rebuild_arrays(run_dir, experiment, reporter)
    sources = dict(outcome.sources)
    if exits is not None:
        found = source_of(sources, candidates[0])
        candidates = [solved_point(run_dir, candidates[0], found, exits, experiment.budget.margin_std)]
        sources[candidates[0].id] = found
    own_budget = (view.budget_ms, view.budget_of) == (budget.ms, budget.of)
    suffix = "" if own_budget else f"-{view.budget_of}-under-{view.budget_ms:g}ms"
    if dialect is not None and dialect is not dialect_for(device.profile):
        suffix += f"-{dialect.name}"
    missed: list[str] = []
    fastest_miss_ms = float("inf")
    for point in candidates:
        if latency_of(point.latency, view.budget_of) >= fastest_miss_ms:
            continue  # slower than one whose file missed the budget
        place = out or folder.device_path / "packages" / f"{point.id}{suffix}"
        package = export_point(
            view,
            run_dir,
            point,
            source_of(sources, point),
            device,
            place,
            max_loss=experiment.finish.int8_loss,
            margin_std=experiment.budget.package_margin_std,
            overwrite=overwrite or (out is None and not is_named),
            accept=accept,
            dialect=dialect,
            stream_images=experiment.finish.stream_images,
        )
        if accept(package.manifest):
            return package
        fastest_miss_ms = latency_of(point.latency, view.budget_of)
        missed.append(f"{point.id}: {package.manifest.reasons[0]}")
        reporter.say(f"taking the next one: {missed[-1]}")
    raise BudgetError(f"no exported package keeps {view.budget_ms:g} ms; tried:\n  " + "\n  ".join(missed))


def _rebuild_arrays(run_dir: Path, experiment: Experiment, reporter: Reporter) -> None:
    """Makes the arrays that the test split is read from anew, where the cache was cleared since the run."""
    path = run_dir / "context.json"
    try:
        for side in read_record(ContextFile, path).resolutions:
            open_context(str(path.resolve()), side.resolution)
    except StorageError as e:
        reporter.say(f"the cache of this run is not there any more ({e}): making it anew")
        prepare_training(load_inputs(experiment, reporter), RunFolder(run_dir), reporter)


def _selected(view: RunView, run_dir: Path, student: str | None, trial: int | None) -> list[Point]:
    if student is not None:
        return [view.point(student)]
    if trial is not None:
        # Points name the first trial of their architecture; later ones of it differ in thresholds or precision.
        built = {t.number: t.arch_id for t in view.trials}
        of_trial = [
            p
            for p in view.points
            if p.trial is not None
            and p.latency.provenance == "measured"
            and (p.trial == trial or (trial in built and built.get(p.trial) == built[trial]))
        ]
        if not of_trial:
            measured = [p for p in view.points if p.latency.provenance == "measured"]
            finished = sorted({p.trial for p in measured if p.trial is not None})
            raise UsageError(
                f"trial {trial} was not finished; finished trials: {', '.join(map(str, finished))}. "
                f"See: nas pareto {quote(str(run_dir))}"
            )
        return [max(of_trial, key=lambda p: (p.val.top1 if p.val else 0.0, -p.latency.expected_ms))]
    if view.budget_ms is None:
        raise UsageError("give --student, --trial or --best-under")
    picks = pick_for_budget(view.points, view.budget_ms, view.budget_of)
    if not picks:
        closest = closest_measured(view.points, view.budget_of)
        known = "" if closest is None else f"; {closest_reason(closest, view.budget_ms, view.budget_of)} ({closest.id})"
        raise BudgetError(f"no finished student keeps {view.budget_ms:g} ms ({view.budget_of}){known}")
    return picks
