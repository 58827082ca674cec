"""The verbs of a run: search (or resume), view, export. What the command line calls.

`run_search` goes through phases; each one keeps its results, so the same call after any stop goes on where it was.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote

import numpy as np

from nas.core.errors import BudgetError, InterruptedRunError, StorageError, UsageError
from nas.core.jsonio import read_record, read_text, write_record
from nas.core.records import Candidate
from nas.core.run import (
    FOREIGN_MARK,
    INTERPOLATED_MARK,
    BudgetPick,
    CommonPick,
    DatasetView,
    FailedCandidate,
    LatencyKind,
    PackageView,
    PipelineTimes,
    Point,
    RunView,
    TeacherView,
    latency_of,
)
from nas.core.units import format_duration, rounded_up
from nas.devices import open_device
from nas.devices.base import Device
from nas.export.dialect import Dialect, dialect_for
from nas.export.manifest import Manifest
from nas.export.package import Package
from nas.latency.exits import ExitTarget
from nas.latency.fitting import table_changes
from nas.latency.table import LatencyTable, difference_lines
from nas.measure.fill import pace_of
from nas.recipe.architecture import SpaceLatency
from nas.recipe.context import ContextFile, open_context
from nas.recipe.pool import JobPool, StartMethod, WorkerPool
from nas.recipe.supernet import train_supernet
from nas.search.assistants import teach
from nas.search.exit_targets import solved_point
from nas.search.experiment import Experiment, resolved_yaml, with_deadline
from nas.search.finals import DevicePoints, build_points, choose_finalists, finish
from nas.search.folder import RunFolder, TrialRecord, fork_run, kept_fingerprint, open_run
from nas.search.packages import export_point, package_view, source_of
from nas.search.plan import DeviceWork, missing_rows, phases_of, score_seconds
from nas.search.predictor import Predictor
from nas.search.prepare import (
    Inputs,
    borrowed_marks,
    fingerprint,
    load_inputs,
    open_table,
    pipeline_times,
    prepare_training,
    scoring_plan,
    teacher_latency,
    worker_count,
)
from nas.search.progress import (
    Reporter,
    RunClock,
    StopFlag,
    StoppableReporter,
    kept_clock,
    stop_on_signals,
)
from nas.search.robustness import robustness_table
from nas.search.rounds import SearchParts, Target, check_budget, current_figures, run_rounds, write_study
from nas.search.seeds import resolve
from nas.search.select import closest_to_budget, pick_for_all, pick_for_budget
from nas.search.shared_storage import redacted
from nas.search.shared_study import SharedPool, SharedSettings, SharedStudy, labels, shared_study, worker_command
from nas.search.view import (
    CLOCK_FILE,
    OUTCOME_SCHEMA,
    PIPELINE_FILE,
    Outcome,
    PointSource,
    experiment_of,
    failed_candidates,
    further_name,
    load_outcome,
    load_view,
)
from nas.train.compute import check_accelerator, gpu_count
from nas.train.teacher import Teacher


def run_search(
    experiment: Experiment,
    reporter: Reporter,
    *,
    fork: bool = False,
    device: Device | None = None,
    others: Sequence[Device] | None = None,
    start_workers: StartMethod = "spawn",
    shared: SharedSettings | None = None,
) -> RunView:
    """Searches, or resumes the search of the experiment's run folder, to its end.

    Args:
        experiment: from `load_experiment`.
        reporter: what is told to the user.
        fork: starts a new run folder from the experiment's one, keeping the scores that stay valid.
        device: measures; by default the one that the experiment names.
        others: the further devices; by default those that the experiment names.
        start_workers: how worker processes come to life, see `WorkerPool`.
        shared: where workers of other machines find the jobs; None: processes of this machine do them.

    Raises:
        NasError: with what to do next; a stopped run raises InterruptedRunError.
    """
    stop = StopFlag()
    told = StoppableReporter(reporter, stop)
    run_dir = experiment.run_dir
    try:
        with stop_on_signals(stop, reporter):
            inputs = load_inputs(experiment, told, device, others)
            marks = fingerprint(inputs)
            if fork:
                inputs = _forked(inputs, marks, reporter)
                run_dir = inputs.experiment.run_dir
            space_yaml = read_text(Path(inputs.experiment.space))
            with open_run(run_dir, marks, resolved_yaml(inputs.experiment), space_yaml) as folder:
                stop.tell_workers(folder.path / "stop")
                return _run(_within_pipeline(inputs, folder, reporter), folder, told, stop, start_workers, shared)
    except (InterruptedRunError, KeyboardInterrupt) as e:
        # The folder's own file holds every setting that was given, those of the command line too.
        again = run_dir / "experiment.yaml"
        command = f"nas search {quote(str(again))}" if again.exists() else "the same command"
        if shared is not None and again.exists():
            command += f" --storage {quote(redacted(shared.storage))}"
            command += f" --artifacts {quote(shared.artifacts)}" if shared.artifacts else ""
        raise InterruptedRunError(f"stopped; finished work is kept. Go on with: {command}") from e


def _within_pipeline(inputs: Inputs, folder: RunFolder, reporter: Reporter) -> Inputs:
    """The same with the network's own deadline; what else a pipeline takes is measured once and kept with the run."""
    file = folder.path / PIPELINE_FILE
    if not file.exists():
        times = pipeline_times(inputs)
        if times is None:
            return inputs
        write_record(file, times)
    times = read_record(PipelineTimes, file)
    reporter.say(
        f"of {times.total_ms:g} ms: capture {times.capture_ms:g}, preprocess {times.preprocess_ms:.3g}, postprocess "
        f"{times.postprocess_ms:.3g}; {times.network_ms:.4g} ms are left for the network"
    )
    return replace(inputs, experiment=with_deadline(inputs.experiment, times))


def _forked(inputs: Inputs, marks: dict[str, str], reporter: Reporter) -> Inputs:
    old = inputs.experiment.run_dir
    for number in range(2, 1000):
        new = old.with_name(f"{old.name}-{number}")
        if not new.exists():
            for note in fork_run(old, new, marks):
                reporter.say(f"copied from {old}: {note}")
            reporter.say(f"new run folder: {new}; go on with it later: --set run.dir={quote(str(new))}")
            break
        if kept_fingerprint(new) == marks:
            reporter.say(f"going on with {new}: an earlier --fork with the same settings")
            break
    else:
        raise UsageError(f"{old}: has 999 forks already; name a folder: --set run.dir=DIR")
    run = replace(inputs.experiment.run, dir=str(new))
    return replace(inputs, experiment=replace(inputs.experiment, run=run))


def _run(
    inputs: Inputs,
    folder: RunFolder,
    told: StoppableReporter,
    stop: StopFlag,
    start_workers: StartMethod,
    shared: SharedSettings | None,
) -> RunView:
    e = inputs.experiment
    with kept_clock(folder.path / CLOCK_FILE) as clock:
        reporter = StoppableReporter(told.plain, stop, clock)
        if (folder.path / "outcome.json").exists():
            reporter.say(f"{folder.path}: this run is finished; showing its result")
        else:
            for _, device in inputs.each:
                reporter.say(f"device {device.profile.name}")
            if shared is None:
                check_accelerator(e.search.accelerator)
                with WorkerPool(worker_count(e), start_workers, gpu_count(e.search.accelerator)) as pool:
                    _search(inputs, folder, reporter, stop, pool, clock)
            else:
                names, marks = [name for name, _ in inputs.each[1:]], fingerprint(inputs)
                with shared_study(shared, folder.path, names, marks, told.plain, lambda: stop.is_set) as study:
                    reporter.say(f"workers join from any machine with: {worker_command(study)}")
                    _search(inputs, folder, reporter, stop, study, clock)
        for name, device in inputs.each:
            _export_pick(folder.on(name), device, reporter)
            _export_others(folder.on(name), device, reporter)
        _export_common(folder, inputs.each, reporter)
    return load_view(folder.path)


def _search(
    inputs: Inputs,
    folder: RunFolder,
    reporter: StoppableReporter,
    stop: StopFlag,
    workers: WorkerPool | SharedStudy,
    clock: RunClock,
) -> None:
    """Everything up to `outcome.json`."""
    e = inputs.experiment
    # The table comes first: a budget that nothing can keep shows before hours of training.
    table = open_table(e, inputs.device.profile)
    if table.foreign is not None:
        _tell_foreign(inputs, table, table.foreign, reporter)
    tables = [table, *(LatencyTable.open(Path(e.run.tables) / d.profile.name, d.profile) for d in inputs.others)]
    _tell_duration(inputs, tables, folder, reporter)
    targets: list[Target] = []
    for (name, device), rows in zip(inputs.each, tables, strict=True):
        told = reporter.on(name)
        for warning in rows.warnings:
            told.warn(warning)
        predictor = Predictor(inputs.space, rows, device, told, e.feedback.max_rows)
        predictor.prepare()
        targets.append(Target(folder.on(name), predictor, e.budget_on(name)))
        check_budget(predictor, targets[-1].budget, e.search.seed, name)
    teacher, _, context = prepare_training(inputs, folder, reporter)
    teacher_ms = [teacher_latency(teacher, device, folder.on(name)) for name, device in inputs.each]
    first, *others = targets
    pool = _shared_pool(inputs, workers, targets, reporter) if isinstance(workers, SharedStudy) else workers
    parts = SearchParts(
        folder,
        inputs.space,
        first.predictor,
        scoring_plan(inputs, folder, context),
        pool,
        inputs.dataset.val.labels,
        first.budget,
        e.search,
        e.feedback,
        reporter,
        stop,
        tuple(others),
        score_seconds(inputs),
        resolve(e.search.enqueue, inputs.space),
    )
    _prepare_scorer(inputs, parts)
    run_rounds(parts)
    outcomes, students_s = _finish(inputs, parts, teacher, teacher_ms)
    write_study(parts)
    spent = clock.spent
    cpu_s = spent.cpu_s + sum(r.cost_s for r in folder.trials()) + students_s
    for own, outcome in reversed(list(zip(parts.each, outcomes, strict=True))):  # that of the first device: all is done
        write_record(own.folder.device_path / "outcome.json", replace(outcome, wall_s=spent.wall_s, cpu_s=cpu_s))


def _shared_pool(inputs: Inputs, study: SharedStudy, targets: Sequence[Target], reporter: StoppableReporter) -> JobPool:
    """Workers of other machines; they are shown what each candidate is, and its latency as it is predicted now."""

    def latency_ms(candidate: Candidate) -> tuple[float, ...]:
        return tuple(t.predictor.estimate(candidate).worst_ms for t in targets)

    return SharedPool(study, labels(inputs.space, latency_ms), reporter.plain)


def _tell_foreign(inputs: Inputs, table: LatencyTable, other: LatencyTable, reporter: Reporter) -> None:
    keys = {x.key for x in inputs.space.layers()}
    differences = "; ".join(difference_lines(other.profile, table.profile))
    reporter.warn(
        f"{len(keys & table.borrowed)} of {len(keys)} rows are borrowed from {other.folder}, measured in another device"
        f" state ({differences}). Predicted latencies rest on them; whole networks are measured here and correct them"
    )


def _tell_duration(inputs: Inputs, tables: Sequence[LatencyTable], folder: RunFolder, reporter: Reporter) -> None:
    e = inputs.experiment
    work = [
        DeviceWork(
            len(missing_rows(inputs.space, t, e.search.trials, e.feedback.max_rows)), pace_of(t.profile.runtime, t)
        )
        for t in tables
    ]
    scored = sum(record.state != "failed" for record in folder.trials())
    phases = phases_of(inputs, work, scored)
    about_s = sum(phase.about_s or 0.0 for phase in phases)
    engines = "" if all(p.about_s is not None for p in phases) else " and the engines, whose time nobody knows yet"
    reporter.say(f"roughly {format_duration(about_s)}{engines} in all, less where results are cached; parts: --dry-run")


def _export_pick(folder: RunFolder, device: Device, reporter: Reporter) -> None:
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


def _export_others(folder: RunFolder, device: Device, reporter: Reporter) -> None:
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


def _export_common(folder: RunFolder, devices: Sequence[tuple[str, Device]], reporter: Reporter) -> None:
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


def _prepare_scorer(inputs: Inputs, parts: SearchParts) -> None:
    e = inputs.experiment
    if e.search.scorer == "supernet":
        train_supernet(
            inputs.space,
            {side: open_context(parts.plan.context, side).targets for side in inputs.space.resolution},
            e.distill,
            e.supernet,
            Path(parts.plan.supernet),
            workers=worker_count(e),
            progress=lambda s: parts.reporter.progress("supernet", s.step, s.steps, "steps"),
            latency=SpaceLatency.of(parts.space.unpruned, parts.predictor.row_ms, parts.budget.ms)
            if e.supernet.latency_weight and parts.predictor.is_whole
            else None,
            accelerator=e.search.accelerator,
        )


def _finish(
    inputs: Inputs, parts: SearchParts, teacher: Teacher, teacher_ms: Sequence[float]
) -> tuple[list[Outcome], float]:
    """The outcome on each device, without its times, and the CPU seconds of the finished students."""
    e = inputs.experiment
    records = parts.folder.trials()
    finalists = choose_finalists(parts, records, e.finish.students)
    if not finalists:
        raise _nothing_in_budget(parts, records)
    lessons = teach(parts, finalists, e.distill, e.finish, teacher.macs)
    students, failed = finish(parts, finalists, e.distill, e.finish, lessons.of)
    trial_of: dict[str, TrialRecord] = {}
    for record in records:
        trial_of.setdefault(record.candidate.arch_id, record)
    context = open_context(parts.plan.context, inputs.dataset.resolution)
    labels = (np.asarray(context.val_labels), np.asarray(context.test_labels))
    found, sources = build_points(parts, students, e.finish, labels, trial_of)
    outcomes = [
        _outcome(inputs, own, points, sources, teacher, ms, (*failed_candidates(records, own.folder.events()), *failed))
        for own, points, ms in zip(parts.each, found, teacher_ms, strict=True)
    ]
    if e.finish.robustness:
        outcomes = [
            replace(outcome, robustness=robustness_table(own, outcome, e.finish.robustness))
            for own, outcome in zip(parts.each, outcomes, strict=True)
        ]
    if parts.others:
        outcomes[0] = replace(outcomes[0], common=_common_pick(inputs, parts, found))
    return outcomes, lessons.cpu_s + sum(s.cost_s for s in students)


def _outcome(
    inputs: Inputs,
    parts: SearchParts,
    found: DevicePoints,
    sources: dict[str, PointSource],
    teacher: Teacher,
    teacher_ms: float,
    failed: tuple[FailedCandidate, ...],
) -> Outcome:
    """What the search found on one device; its times are not known yet."""
    budget, points = parts.budget, found.points
    picks = pick_for_budget(points, budget.ms, budget.of)
    closest = closest_to_budget([p for p in points if p.latency.provenance == "measured"], budget.of)
    return Outcome(
        schema=OUTCOME_SCHEMA,
        status="finished",
        points=tuple(points),
        sources={p.id: sources[p.id] for p in points},
        failed=(*failed, *found.failed),
        teacher=TeacherView(
            teacher.name, teacher.test_accuracy, "test", teacher_ms, teacher.params, teacher.macs, teacher.sha256
        ),
        dataset=_dataset_view(inputs),
        device=parts.predictor.table.profile,  # what the numbers hold for
        pick_id=picks[0].id if picks else None,
        pick_reason=_pick_reason(picks, budget.ms, budget.of) if picks else "",
        next_id=picks[1].id if len(picks) > 1 else None,
        next_reason=_next_reason(picks[0], picks[1], budget.of) if len(picks) > 1 else "",
        closest_id=None if picks or closest is None else closest.id,
        closest_reason="" if picks or closest is None else _closest_reason(closest, budget.ms, budget.of),
        wall_s=0.0,
        cpu_s=0.0,
        provenance=_provenance(inputs, teacher, parts.predictor.table)
        | _interpolated(parts)
        | borrowed_marks(inputs, parts.predictor.device.profile),
        also=tuple(_pick_for(points, ms, budget.of) for ms in budget.all_ms[1:]),
        changes=() if parts.predictor.correction is None else table_changes(parts.predictor.correction),
    )


def _common_pick(inputs: Inputs, parts: SearchParts, found: Sequence[DevicePoints]) -> CommonPick:
    """The student for all devices, before it is exported."""
    budgets = [own.budget for own in parts.each]
    picks = pick_for_all([d.points for d in found], [b.ms for b in budgets], parts.budget.of)
    if not picks:
        return CommonPick(None, "no measured student keeps the deadline of every device")
    names = [inputs.experiment.device, *(t.folder.device for t in parts.others)]
    by_id = [{p.id: p for p in d.points} for d in found]
    times = [
        f"{latency_of(own[picks[0].id].latency, b.of):.4f} of {b.ms:g} ms on {name}"
        for own, b, name in zip(by_id, budgets, names, strict=True)
    ]
    accuracy = 100 * (picks[0].val.top1 if picks[0].val else 0.0)
    reason = f"{accuracy:.1f} % on validation, best of {len(picks)} that keep every deadline: {', '.join(times)}"
    return CommonPick(picks[0].id, reason)


def _interpolated(parts: SearchParts) -> dict[str, str]:
    """Says that candidates were proposed by a table that was measured in part."""
    rows = {x.key for x in parts.space.layers()}
    guessed = rows & parts.predictor.table.interpolated
    return {INTERPOLATED_MARK: f"{len(guessed)} of {len(rows)}"} if guessed else {}


def _nothing_in_budget(parts: SearchParts, records: Sequence[TrialRecord]) -> BudgetError:
    complete = [r for r in records if r.state == "complete"]
    needed = [latency_of(now, parts.budget.of) for now in current_figures(parts, complete)]
    if not complete:
        return BudgetError(
            f"not one candidate could be scored inside {parts.budget.ms:g} ms ({parts.budget.of}); {len(records)} were "
            "stopped or failed. Raise the budget (--set budget.ms=MS --fork) or score more "
            "(--set search.trials=N --fork)"
        )
    fastest = min(needed)
    return BudgetError(
        f"none of {len(complete)} scored candidates keeps {parts.budget.ms:g} ms ({parts.budget.of}) after the table "
        f"was corrected; the closest, {complete[needed.index(fastest)].candidate.id}, needs about {fastest:.4g} ms. "
        f"Raise the budget: --set budget.ms={rounded_up(1.1 * fastest)} --fork"
    )


def _pick_for(points: Sequence[Point], budget_ms: float, of: LatencyKind) -> BudgetPick:
    picks = pick_for_budget(points, budget_ms, of)
    if picks:
        return BudgetPick(budget_ms, picks[0].id, _pick_reason(picks, budget_ms, of))
    closest = closest_to_budget([p for p in points if p.latency.provenance == "measured"], of)
    return BudgetPick(budget_ms, None, "" if closest is None else _closest_reason(closest, budget_ms, of))


def _pick_reason(picks: Sequence[Point], budget_ms: float, of: LatencyKind) -> str:
    accuracies = [p.val.top1 if p.val else 0.0 for p in picks]
    if accuracies[0] == max(accuracies):
        rank = f"best validation accuracy ({100 * accuracies[0]:.1f} %)"
    else:
        rank = (
            f"{100 * accuracies[0]:.1f} % on validation, the fastest of those that equal the best "
            f"({100 * max(accuracies):.1f} %) within half a standard error,"
        )
    return (
        f"{rank} of {len(picks)} measured settings whose {of} latency keeps {budget_ms:g} ms; it needs "
        f"{latency_of(picks[0].latency, of):.4f} ms"
    )


def _next_reason(pick: Point, second: Point, of: LatencyKind) -> str:
    if pick.val is None or second.val is None:
        return ""
    points = 100 * (pick.val.top1 - second.val.top1)
    ratio = latency_of(second.latency, of) / latency_of(pick.latency, of)
    sign = "less" if points >= 0 else "more"
    return f"{abs(points):.1f} points {sign} on validation at {ratio:.2f} times the {of} latency"


def _closest_reason(point: Point, budget_ms: float, of: LatencyKind) -> str:
    ms = latency_of(point.latency, of)
    return f"fastest measured student: {ms:.4f} ms ({of}), {100 * (ms / budget_ms - 1):.0f} % over the budget"


def _dataset_view(inputs: Inputs) -> DatasetView:
    d = inputs.dataset
    return DatasetView(d.name, d.class_names, len(d.train), len(d.val), len(d.test), d.sha256, d.warnings)


def _provenance(inputs: Inputs, teacher: Teacher, table: LatencyTable) -> dict[str, str]:
    names = ("torch", "optuna", "onnx", "onnxruntime", "numpy")
    marks = fingerprint(inputs)
    if table.foreign is None:
        marks.pop(FOREIGN_MARK, None)  # only the first device borrows
    return {
        **{f"version of {name}": version(name) for name in names},
        "python": platform.python_version(),
        "teacher's training": f"{teacher.cpu_s:.0f} CPU s",
        **({"teacher's contributors": "; ".join(teacher.contributors)} if teacher.contributors else {}),
        **marks,
    }


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
        closest = closest_to_budget([p for p in view.points if p.latency.provenance == "measured"], view.budget_of)
        known = (
            "" if closest is None else f"; {_closest_reason(closest, view.budget_ms, view.budget_of)} ({closest.id})"
        )
        raise BudgetError(f"no finished student keeps {view.budget_ms:g} ms ({view.budget_of}){known}")
    return picks
