"""A run from its first phase to its last, begun or gone on with.

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

from nas.core.errors import BudgetError, InterruptedRunError, UsageError
from nas.core.jsonio import read_record, read_text, write_record
from nas.core.records import Candidate
from nas.core.run import (
    FOREIGN_MARK,
    INTERPOLATED_MARK,
    CommonPick,
    DatasetView,
    FailedCandidate,
    PipelineTimes,
    RunView,
    TeacherView,
    latency_of,
)
from nas.core.units import format_duration, rounded_up
from nas.devices.base import Device
from nas.latency.fitting import table_changes
from nas.latency.table import LatencyTable, difference_lines
from nas.measure.fill import pace_of
from nas.recipe.architecture import SpaceLatency
from nas.recipe.context import open_context
from nas.recipe.pool import JobPool, StartMethod, WorkerPool
from nas.recipe.supernet import train_supernet
from nas.search.assistants import teach
from nas.search.experiment import Experiment, resolved_yaml, with_deadline
from nas.search.exporting import export_common, export_others, export_pick
from nas.search.finals import DevicePoints, build_points, choose_finalists, finish
from nas.search.folder import RunFolder, TrialRecord, fork_run, kept_fingerprint, open_run
from nas.search.picks import closest_measured, closest_reason, next_reason, pick_for, pick_reason
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
from nas.search.select import pick_for_all, pick_for_budget
from nas.search.shared_storage import redacted
from nas.search.shared_study import SharedPool, SharedSettings, SharedStudy, labels, shared_study, worker_command
from nas.search.view import (
    CLOCK_FILE,
    OUTCOME_SCHEMA,
    PIPELINE_FILE,
    Outcome,
    PointSource,
    failed_candidates,
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
            export_pick(folder.on(name), device, reporter)
            export_others(folder.on(name), device, reporter)
        export_common(folder, inputs.each, reporter)
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
    closest = closest_measured(points, budget.of)
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
        pick_reason=pick_reason(picks, budget.ms, budget.of) if picks else "",
        next_id=picks[1].id if len(picks) > 1 else None,
        next_reason=next_reason(picks[0], picks[1], budget.of) if len(picks) > 1 else "",
        closest_id=None if picks or closest is None else closest.id,
        closest_reason="" if picks or closest is None else closest_reason(closest, budget.ms, budget.of),
        wall_s=0.0,
        cpu_s=0.0,
        provenance=_provenance(inputs, teacher, parts.predictor.table)
        | _interpolated(parts)
        | borrowed_marks(inputs, parts.predictor.device.profile),
        also=tuple(pick_for(points, ms, budget.of) for ms in budget.all_ms[1:]),
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
