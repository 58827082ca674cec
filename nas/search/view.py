"""What a run folder shows: its view for tables and the report, and the outcome record of a finished run.

Nothing here imports torch or a runtime, so `nas pareto` and `nas report` answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote

from nas.core.errors import RunMismatchError, UsageError
from nas.core.jsonio import from_plain, parse_json, read_record, read_text
from nas.core.records import DeviceProfile, Precision
from nas.core.run import (
    FOREIGN_MARK,
    AccuracyFit,
    BudgetPick,
    CommonPick,
    DatasetView,
    FailedCandidate,
    Importance,
    PackageView,
    PipelineTimes,
    Point,
    RobustnessRow,
    RoundSummary,
    RunView,
    TableChange,
    TeacherView,
    TrialPoint,
)
from nas.recipe.records import FinishedStudent
from nas.search.experiment import Experiment, load_experiment, with_deadline
from nas.search.folder import SPACE_FILE, Event, RunFolder, TrialRecord, is_running
from nas.search.progress import time_spent
from nas.search.proposers import proposer_summaries
from nas.space.space import load_space

OUTCOME_SCHEMA = 1
CLOCK_FILE = "clock.json"
PIPELINE_FILE = "pipeline.json"


@dataclass(frozen=True, slots=True)
class PointSource:
    """Which trained student a point comes from, and behind which of its exits it was cut (None: not cut).

    `precisions` are those of the whole student, before the cut: they name its weights.
    """

    student: FinishedStudent
    cut: int | None
    precisions: tuple[Precision, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`outcome.json`: the finished students and everything that a view shows beside them."""

    schema: int
    status: str
    points: tuple[Point, ...]
    sources: dict[str, PointSource]
    failed: tuple[FailedCandidate, ...]
    teacher: TeacherView
    dataset: DatasetView
    device: DeviceProfile
    pick_id: str | None
    pick_reason: str
    next_id: str | None
    next_reason: str
    closest_id: str | None
    closest_reason: str
    wall_s: float
    cpu_s: float
    provenance: dict[str, str]
    changes: tuple[TableChange, ...] = ()
    also: tuple[BudgetPick, ...] = ()
    common: CommonPick | None = None
    robustness: tuple[RobustnessRow, ...] = ()


def load_view(run_dir: Path, on: str = "") -> RunView:
    """The run as its report shows it; also while it is running or after it was stopped.

    Args:
        run_dir: the run.
        on: the device, as the experiment names it; without a name the first one, with the views of the others.

    Raises:
        UsageError: the folder holds no run, or it is not for this device.
    """
    file = run_dir / "fingerprint.json"
    if not file.exists():
        raise UsageError(f"{run_dir}: not a run folder (no fingerprint.json). Run: nas search EXPERIMENT.yaml")
    experiment = experiment_of(run_dir)
    budget = experiment.budget_on(on)
    folder = RunFolder(run_dir).on(further_name(experiment, on))
    place = [other.device for other in experiment.also_on].index(on) if folder.device else None
    pipeline = run_dir / PIPELINE_FILE
    marks = parse_json(read_text(file), str(file))
    records, events = folder.trials(), folder.events()
    outcome_file = folder.device_path / "outcome.json"
    outcome = _read_outcome(outcome_file) if outcome_file.exists() else None
    latencies = [_latency_ms(r, place) for r in records]
    points = () if outcome is None else outcome.points
    importance_file = run_dir / "importances.json"
    view = RunView(
        name=run_dir.name,
        status="finished"
        if (run_dir / "outcome.json").exists()
        else ("running" if is_running(run_dir) else "interrupted"),
        created_at=_created(file),
        budget_ms=budget.ms,
        budget_of=budget.of,
        pipeline=read_record(PipelineTimes, pipeline) if pipeline.exists() and not folder.device else None,
        space_name=Path(experiment.space).stem,
        space_size=_space_size(experiment, run_dir),
        scorer=experiment.search.scorer,
        trials=tuple(_trial_point(r, place) for r in records if r.state != "failed"),
        failed=failed_candidates(records, events),
        predictions=tuple(pair for e in events for pair in e.pairs),
        rounds=tuple(_round_summary(e) for e in events if e.kind == "round"),
        proposers=proposer_summaries(records, latencies, points, budget.ms),
        wall_s=time_spent(run_dir / CLOCK_FILE).wall_s,
        provenance={k: str(v) for k, v in marks.items() if not folder.device or k != FOREIGN_MARK},
        commands=(f"nas search {quote(str(run_dir / 'experiment.yaml'))}",),
        device_name=folder.device or experiment.device,
        others=() if folder.device else tuple(load_view(run_dir, other.device) for other in experiment.also_on),
    )
    if outcome is None or view.status != "finished":
        return view
    package = folder.device_path / "package.json"
    named = quote(str(run_dir)) + (f" --on {quote(folder.device)}" if folder.device else "")
    return replace(
        view,
        device=outcome.device,
        teacher=outcome.teacher,
        dataset=outcome.dataset,
        points=tuple(replace(p, export_command=f"nas export {named} --student {p.id}") for p in outcome.points),
        failed=outcome.failed,
        importances=_importances(importance_file) if importance_file.exists() else (),
        pick_id=outcome.pick_id,
        pick_reason=outcome.pick_reason,
        next_id=outcome.next_id,
        next_reason=outcome.next_reason,
        closest_id=outcome.closest_id,
        closest_reason=outcome.closest_reason,
        also=outcome.also,
        package=read_record(PackageView, package) if package.exists() else None,
        wall_s=outcome.wall_s,
        cpu_s=outcome.cpu_s,
        provenance=outcome.provenance,
        changes=outcome.changes,
        robustness=outcome.robustness,
        commands=(f"nas pareto {named}", f"nas export {named} --best-under {budget.ms:g}ms"),
        common=load_outcome(run_dir).common if folder.device else outcome.common,
    )


def further_name(experiment: Experiment, on: str) -> str:
    """The name of a device as run folders take it: empty for the first one."""
    return "" if on == experiment.device else on


def experiment_of(run_dir: Path) -> Experiment:
    """The settings of a run; where its deadline is that of a whole pipeline, with what is left for the network."""
    file = run_dir / PIPELINE_FILE
    times = read_record(PipelineTimes, file) if file.exists() else None
    return with_deadline(load_experiment(run_dir / "experiment.yaml"), times)


def _created(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _space_size(experiment: Experiment, run_dir: Path) -> int:
    """Number of candidates; from the run's own copy of the space, because the file may have been edited or moved."""
    kept = run_dir / SPACE_FILE
    return load_space(kept if kept.exists() else Path(experiment.space), 2).size


def _latency_ms(record: TrialRecord, place: int | None) -> float:
    """Predicted latency of a trial on the first device, or on the further device of this place."""
    return record.latency_ms if place is None else record.elsewhere_ms[place]


def _trial_point(record: TrialRecord, place: int | None) -> TrialPoint:
    """A trial with its latency on the first device, or on the further device of this place."""
    return TrialPoint(
        record.number,
        record.candidate.arch_id,
        min(max(record.score, 0.0), 1.0),  # with exits it is a sum, which may leave the range a little
        _latency_ms(record, place),
        record.candidate.precision_label,
        record.epochs,
        record.round,
        record.proposer,
    )


def _round_summary(event: Event) -> RoundSummary:
    v = event.values

    def number(name: str) -> float | None:
        value = v.get(name)
        return None if value is None else float(value)

    return RoundSummary(
        int(number("round") or 0),
        int(number("trials") or 0),
        int(number("failed") or 0),
        int(number("measured") or 0),
        number("hypervolume"),
        number("mape"),
        number("wall_s") or 0.0,
        _accuracy_fit(event),
    )


def _accuracy_fit(event: Event) -> AccuracyFit | None:
    """How far the model of accuracy could be trusted; None where there was no model, or a version that kept no word."""
    values = [event.values.get(f"model_{field.name}") for field in fields(AccuracyFit)]
    if None in values:
        return None
    networks, *shares = (float(v) for v in values if v is not None)
    return AccuracyFit(int(networks), *shares)


def _importances(file: Path) -> tuple[Importance, ...]:
    return from_plain(tuple[Importance, ...], parse_json(read_text(file), str(file)), str(file))


def load_outcome(run_dir: Path, device: str = "") -> Outcome:
    """The finished students of a run on its first device, or on the further device of this name.

    Raises:
        UsageError: the run is not finished.
        RunMismatchError: another version of the program wrote it.
    """
    file = RunFolder(run_dir, device).device_path / "outcome.json"
    if not (run_dir / "outcome.json").exists():  # written last
        view = load_view(run_dir)
        raise UsageError(f"{run_dir}: this run is not finished. Go on with it: {view.commands[0]}")
    return _read_outcome(file)


def _read_outcome(file: Path) -> Outcome:
    """Raises RunMismatchError when another version of the program wrote it."""
    data = parse_json(read_text(file), str(file))
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != OUTCOME_SCHEMA:  # before its fields, which may be others
        raise RunMismatchError(
            f"{file}: written in form {schema}, this program reads form {OUTCOME_SCHEMA}. Use the program that wrote "
            "it, or search again in another folder: nas search FILE --set run.dir=DIR"
        )
    return from_plain(Outcome, data, str(file))


def failed_candidates(records: Sequence[TrialRecord], events: Sequence[Event]) -> tuple[FailedCandidate, ...]:
    """Candidates that could not be scored, and networks that could not be measured."""
    scoring = (FailedCandidate(r.candidate.id, "scoring", r.reason, r.round) for r in records if r.state == "failed")
    return (*scoring, *(failed for event in events for failed in event.failed))
