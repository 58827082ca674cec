"""Finalists: chosen from the scores, distilled in full, measured as they would be deployed, thresholds solved.

Choices are made on the search validation split; the test split is read once, for the figures of the finished students.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nas.core.errors import DeviceError, MissingRowError, TrainingError
from nas.core.jsonio import content_hash
from nas.core.records import Candidate, LatencyEstimate, LatencyFigures, Measurement, Precision
from nas.core.run import ExitConfidence, FailedCandidate, FinishStep, LatencyKind, Point, SplitAccuracy, latency_of
from nas.core.walk import exit_macs, expand
from nas.data import evenly
from nas.devices.base import HANG_REASON, MeasureJob
from nas.export.dialect import dialect_for
from nas.export.forms import Artefact, exits_form
from nas.export.graph import forced_exit, network_model, segment_models
from nas.latency.energy import EnergyEstimate, EnergyEstimator, has_energy
from nas.latency.energy import figures as energy_figures
from nas.latency.estimate import figures
from nas.latency.exits import (
    ThresholdSetting,
    ThresholdSweep,
    answers,
    evaluate_thresholds,
    read_target,
    solve_for_deadline,
    solve_for_loss,
    sweep,
)
from nas.latency.lines import network_key
from nas.latency.pareto import non_dominated
from nas.latency.table import deviation_ms
from nas.measure.fill import state_check
from nas.measure.stream import measured_stream, no_stream, warn_if_off
from nas.recipe.context import open_context
from nas.recipe.finish import (
    FinishJob,
    deployed_student,
    finish_student,
    finished_confidence,
    finished_logits,
    precision_name,
)
from nas.recipe.pool import JobFailure
from nas.recipe.records import FinishedStudent, read_logits, read_scored, soft_top1
from nas.search.assistants import Lesson
from nas.search.folder import MeasuredExit, TrialRecord
from nas.search.precision import (
    Mixes,
    all_mixes,
    deployments,
    measure_mixes,
    mixable,
    scored_mixes,
    solved_jobs,
)
from nas.search.pruning import pruned_jobs
from nas.search.rounds import SearchParts
from nas.search.select import as_accuracies, front_indices, spread_choice
from nas.search.settings import BudgetSettings, FinishSettings
from nas.search.view import PointSource
from nas.train.settings import DistillSettings

# Accuracy (ratio) given up by the threshold settings that become points, and how much faster than the one before they
# have to be: what costs several points is for those who look at the whole front, and must be a real step on it.
EXIT_STEPS = ((0.0, 1.0), (0.005, 0.97), (0.01, 0.97), (0.02, 0.9), (0.04, 0.9), (0.08, 0.9))
CURVE_POINTS = 40
NEAR_FRONT = 1.25  # a network whose prediction is this much behind the front may still be on it
MAX_MEASURED = 40
MOST_FREE_EXITS = 3  # of these every choice is looked at, of more exits all or none
BEST_EVERYWHERE = 2  # finalists that stand for all devices of a search; one may miss when it is measured


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One way to deploy a finished architecture: precision, and with exits, without, or cut behind one.

    `logits` are float32 [E, N, K] of its own exits on search validation and test; `solve_logits` on the images that
    thresholds are solved on, with their labels. `precisions` are those of the whole student, whose weights these are;
    `confidence` is the calibration of its own exits, the head last, empty where there is none.
    """

    student: FinishedStudent
    candidate: Candidate
    cut: int | None
    val_logits: np.ndarray
    test_logits: np.ndarray
    solve_logits: np.ndarray
    solve_labels: np.ndarray
    precisions: tuple[Precision, ...] = ()
    confidence: tuple[ExitConfidence, ...] = ()

    @property
    def form(self) -> str:
        return "if" if self.candidate.exits else "plain"


@dataclass(frozen=True, slots=True, eq=False)
class DevicePoints:
    """The finished students as one device runs them, and those that it cannot run or measure."""

    points: list[Point]
    failed: list[FailedCandidate]


def choose_finalists(parts: SearchParts, records: Sequence[TrialRecord], count: int) -> list[Candidate]:
    """Architectures whose scores, with every threshold setting, cover the front best; the most accurate among them.

    Of several devices the fronts take turns with the architectures that keep the deadline of each, the best first.
    """
    rankings = [_ranked(own, records, count) for own in parts.each]
    if len(rankings) > 1:
        rankings.insert(0, _best_everywhere(parts, records)[:BEST_EVERYWHERE])
    in_turn = (c for place in itertools.zip_longest(*rankings) for c in place if c is not None)
    return list(dict.fromkeys(in_turn))[:count]


def _best_everywhere(parts: SearchParts, records: Sequence[TrialRecord]) -> list[Candidate]:
    """The architectures whose scores keep the deadline of every device under some thresholds or cut, the best first."""
    best: dict[Candidate, float] = {}
    everywhere = parts.each
    for record in (r for r in records if r.state == "complete"):
        estimates = [own.predictor.estimate(record.candidate) for own in everywhere]
        logits = _score_logits(parts, record)
        for own, estimate in zip(everywhere, estimates, strict=True):
            for accuracy, shares in _score_settings(own, record, estimate, logits):
                each = zip(everywhere, estimates, strict=True)
                if all(latency_of(_figures(e, shares), o.budget.of) <= o.budget.ms for o, e in each):
                    best[record.candidate.architecture] = max(accuracy, best.get(record.candidate.architecture, 0.0))
    return sorted(best, key=lambda candidate: -best[candidate])


def _ranked(parts: SearchParts, records: Sequence[TrialRecord], count: int) -> list[Candidate]:
    """The choice for the front of one device, the most valuable first."""
    top1: list[float] = []
    latency: list[float] = []
    limited: list[float] = []
    groups: list[str] = []
    architectures: dict[str, Candidate] = {}
    for record in records:
        if record.state != "complete":
            continue
        arch_id = record.candidate.arch_id
        architectures.setdefault(arch_id, record.candidate.architecture)
        for accuracy, now in _score_points(parts, record):
            if latency_of(now, parts.budget.of) <= parts.budget.ms:
                limited.append(latency_of(now, parts.budget.of))
                top1.append(accuracy)
                latency.append(now.expected_ms)
                groups.append(arch_id)
    pairs = [(r.score, r.top1) for r in records if r.state == "complete" and r.top1 is not None]
    top1 = as_accuracies(top1, pairs)
    # The last step in accuracy adds little area, but it is the one that a user with time to spare asks for.
    best = [groups[max(inside, key=lambda i: (top1[i], -latency[i]))] for inside in _inside(parts.budget, limited)]
    chosen = spread_choice(top1, latency, groups, count, parts.chance, parts.budget.ms, best)
    return [architectures[a] for a in chosen]


def _inside(budget: BudgetSettings, limited_ms: Sequence[float]) -> list[list[int]]:
    """Numbers of the points that keep each deadline, the longest first; deadlines that none keeps are left out."""
    found = [[i for i, ms in enumerate(limited_ms) if ms <= limit] for limit in budget.all_ms]
    return [inside for inside in found if inside]


def _score_points(parts: SearchParts, record: TrialRecord) -> list[tuple[float, LatencyFigures]]:
    """Score and latency of the sampled thresholds, of the solved ones, and of the networks cut behind each exit."""
    estimate, logits = parts.predictor.estimate(record.candidate), _score_logits(parts, record)
    return [(accuracy, _figures(estimate, s)) for accuracy, s in _score_settings(parts, record, estimate, logits)]


def _figures(estimate: LatencyEstimate, shares: tuple[float, ...]) -> LatencyFigures:
    """Latency of a network whose last exit is that of the last share: fewer shares than exits are a network cut."""
    last = len(shares)
    cut = replace(estimate, exit_ms=estimate.exit_ms[:last], exit_std_ms=estimate.exit_std_ms[:last])
    return figures(cut, shares)


def _score_settings(
    parts: SearchParts, record: TrialRecord, estimate: LatencyEstimate, logits: np.ndarray | None
) -> list[tuple[float, tuple[float, ...]]]:
    """Score and exit shares of the sampled thresholds, of those solved for this device, and of the network cut behind
    each exit, which has no shares of what follows; with `_score_logits`.
    """
    settings = [(record.score, record.exit_shares)]
    if logits is not None:
        swept = sweep(logits, parts.labels, estimate.exit_ms)
        solved = [solve_for_loss(swept, loss) for loss, _ in EXIT_STEPS]
        solved += _for_deadline(swept, estimate, parts.budget)
        settings += [(soft_top1(answers(logits, s.thresholds), parts.labels), s.shares) for s in dict.fromkeys(solved)]
        settings += [(soft_top1(row, parts.labels), (*(0.0,) * k, 1.0)) for k, row in enumerate(logits[:-1])]
    return settings


def _score_logits(parts: SearchParts, record: TrialRecord) -> np.ndarray | None:
    """Logits [E, N, K] of a scored candidate with exits on search validation; None without exits or file."""
    if not record.candidate.exits:
        return None
    folder = parts.folder.student(record.candidate.arch_id)
    scored = read_scored(folder, parts.plan.job(record.candidate, record.epochs).name)
    return None if scored is None else read_logits(folder, scored)


def finish(
    parts: SearchParts,
    finalists: Sequence[Candidate],
    distill: DistillSettings,
    settings: FinishSettings,
    lessons: Mapping[str, Lesson] | None = None,
) -> tuple[list[FinishedStudent], list[FailedCandidate]]:
    """Distils all finalists in worker processes, the longest first; then the narrower students that are cut from them.

    Those in `lessons`, by their `arch_id`, learn from an assistant instead of the teacher.

    Raises:
        InterruptedRunError: the run was asked to stop; every epoch is kept.
        TrainingError: all of them failed.
    """
    mixes = scored_mixes(parts.folder.trials())
    tried = mixable(parts) if settings.precision_ladder else ()
    direct = Lesson(parts.plan.context, ())
    taught = [(candidate, (lessons or {}).get(candidate.arch_id, direct)) for candidate in finalists]
    jobs = [
        FinishJob(
            candidate,
            lesson.context,
            str(parts.folder.student(candidate.arch_id)),
            parts.plan.stop_file,
            distill,
            parts.search.seed,
            settings.calibration_images,
            tuple(names for names in deployments(parts.space, candidate, mixes) if set(names) != {"fp32"}),
            parts.plan.dialect,
            settings.qat,
            settings.prune_importance if settings.prune else None,
            sensitivity=tried if len(tried) > 1 else (),
            before=lesson.steps,
            calibrate_confidence=settings.calibrate_confidence,
        )
        for candidate, lesson in taught
    ]
    done, failed = _finish_all(parts, jobs, "full distillation", distill.epochs)
    if not done:
        raise TrainingError(f"not one of {len(jobs)} finalists could be trained; the first: {failed[0].reason}")
    if settings.prune:
        epochs = distill.epochs if settings.prune_mode == "joint" else settings.prune_epochs
        pruned, lost = _finish_all(parts, pruned_jobs(parts, done, settings), "pruning", epochs)
        done, failed = [*done, *pruned], [*failed, *lost]
    if len(tried) > 1:
        measure_mixes(parts, [student.candidate for _, student in done])
        again, lost = _finish_all(parts, solved_jobs(parts, done, settings), "solved precisions", settings.qat.epochs)
        latest = {student.candidate.arch_id: student for _, student in again}
        broken = {failure.id for failure in lost}
        done = [(j, latest.get(s.candidate.arch_id, s)) for j, s in done if j.candidate.id not in broken]
        failed = [*failed, *lost]
    return [student for _, student in done], failed


def _finish_all(
    parts: SearchParts, jobs: Sequence[FinishJob], stage: str, epochs: int
) -> tuple[list[tuple[FinishJob, FinishedStudent]], list[FailedCandidate]]:
    """Students that came to their end with their jobs, and those that did not."""
    order = sorted(jobs, key=lambda j: -sum(layer for layer in exit_macs(j.candidate)))
    done: list[tuple[FinishJob, FinishedStudent]] = []
    failed: list[FailedCandidate] = []
    parts.reporter.progress(stage, 0, len(jobs), f"{epochs} epochs each")
    for result in parts.pool.map(finish_student, order, lambda: parts.stop.is_set):
        if isinstance(result.value, JobFailure):
            failed.append(FailedCandidate(result.job.candidate.id, stage, result.value.reason))
        else:
            done.append((result.job, result.value))
        parts.reporter.progress(stage, len(done) + len(failed), len(jobs), f"{epochs} epochs each")
    return done, failed


def variants(
    parts: SearchParts, student: FinishedStudent, int8_loss: float, mixes: Mixes
) -> tuple[list[Variant], list[FailedCandidate]]:
    """Every way to deploy a student; what loses more than `int8_loss` at one of its exits against fp32 is refused.

    The loss is counted on search validation.
    """
    folder = parts.folder.student(student.candidate.arch_id)
    labels = parts.labels
    found: dict[tuple[Candidate, int | None], Variant] = {}
    refused: list[FailedCandidate] = []
    full = finished_logits(folder, "val", ("fp32",))
    context = open_context(parts.plan.context, student.candidate.resolution)
    own_solve = "solve" in context.splits
    solve_labels = np.asarray(context.solve_labels) if own_solve else labels

    def add(variant: Variant) -> None:
        """Mixes that are alike up to a cut give the same network, with other weights where one was retrained."""
        known = found.setdefault((variant.candidate, variant.cut), variant)
        if _right(variant.val_logits[-1], labels) > _right(known.val_logits[-1], labels):
            found[variant.candidate, variant.cut] = variant

    for names in deployments(parts.space, student.candidate, mixes):
        candidate = student.candidate.with_precision(names)
        val, test = finished_logits(folder, "val", names), finished_logits(folder, "test", names)
        solve = finished_logits(folder, "solve", names) if own_solve else val
        sure = finished_confidence(folder, names)
        lost = [_right(a, labels) - _right(b, labels) for a, b in zip(full, val, strict=True)]
        kept = [loss <= int8_loss for loss in lost]
        if not kept[-1]:
            reason = (
                f"{candidate.precision_text} loses {100 * lost[-1]:.1f} points on {len(labels)} validation images "
                f"(limit {100 * int8_loss:.1f})"
            )
            refused.append(FailedCandidate(candidate.id, "quantization", reason))
        for cut in (None, *range(len(candidate.exits))):
            last, whole = (len(kept) - 1, candidate) if cut is None else (cut, candidate.truncated(cut))
            for places in _choices_of_exits(last):
                rows = [*places, last]
                if all(kept[k] for k in rows):
                    own = replace(whole, exits=tuple(whole.exits[k] for k in places))
                    answers = (val[rows], test[rows], solve[rows], solve_labels)
                    add(Variant(student, own, cut, *answers, names, tuple(sure[k] for k in rows if sure)))
    return list(found.values()), refused


def _choices_of_exits(count: int) -> list[tuple[int, ...]]:
    """Which of the first exits are deployed: an exit that few images take may cost more than it saves."""
    if count > MOST_FREE_EXITS:
        return [(), tuple(range(count))]
    return [places for size in range(count + 1) for places in itertools.combinations(range(count), size)]


def steps_of(student: FinishedStudent, precisions: tuple[Precision, ...]) -> tuple[FinishStep, ...]:
    """What the weights of one precision of a student went through: its steps without those of other precisions."""
    own = precision_name(precisions)
    return tuple(s for s in student.steps if not s.precision or s.precision == own)


def _right(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def variant_artefact(parts: SearchParts, variant: Variant, candidate: Candidate) -> Artefact:
    """What would be deployed: static batch 1, normalisation inside.

    With exits one model of form `if` on ONNX Runtime, else a chain of segments; without exits one of form `plain`.

    Args:
        variant: gives weights and ranges.
        candidate: the variant's candidate, with thresholds where it has exits.
    """
    trained = variant.student.candidate
    folder = parts.folder.student(trained.arch_id)
    weights, quant = deployed_student(folder, trained, candidate, variant.precisions, variant.cut)
    context = open_context(parts.plan.context, candidate.resolution)
    dialect = dialect_for(parts.predictor.device.profile)
    if candidate.exits and exits_form(dialect) == "segments":
        return segment_models(candidate, weights, context.mean, context.std, quant=quant, dialect=dialect)
    form = "if" if candidate.exits else "plain"
    return network_model(candidate, weights, context.mean, context.std, quant=quant, form=form, dialect=dialect)


def build_points(
    parts: SearchParts,
    students: Sequence[FinishedStudent],
    settings: FinishSettings,
    split_labels: tuple[np.ndarray, np.ndarray],
    trial_of: dict[str, TrialRecord],
) -> tuple[list[DevicePoints], dict[str, PointSource]]:
    """Points of all finished students on each device: predicted first, then measured where they may be on a front.

    What may be on the front of one device is measured on all, under the thresholds that suit any of them: the student
    for all devices is chosen among the same points.

    Args:
        students: finished students.
        settings: how much exits and int8 may cost.
        split_labels: labels of search validation and of the test split, int64 [N].
        trial_of: first trial of each architecture.
    """
    everything: list[Variant] = []
    refused: list[FailedCandidate] = []
    mixes = all_mixes(parts, students, settings)
    for student in students:
        found, bad = variants(parts, student, settings.int8_loss, mixes)
        everything += found
        refused += bad
    if not everything:
        raise TrainingError(
            f"every precision of every finished student is refused; the first: {refused[0].reason}. Allow more "
            "(--set finish.int8_loss=RATIO --fork), or add fp32 to the precisions of the space"
        )
    everywhere = parts.each
    predicted, unknown = zip(*(_predicted(own, everything) for own in everywhere), strict=True)
    chosen: dict[int, None] = {}
    for own, estimates in zip(everywhere, predicted, strict=True):
        chosen |= dict.fromkeys(_worth_measuring(own, everything, estimates, settings))
    measured, broken = zip(*(_measure(own, everything, list(chosen)) for own in everywhere), strict=True)
    energies = [_energies(own, everything) for own in everywhere]
    points: list[dict[str, Point]] = [{} for _ in everywhere]
    sources: dict[str, PointSource] = {}
    owners: dict[str, int] = {}
    for i, variant in enumerate(everything):
        able = [k for k, estimates in enumerate(predicted) if i in estimates]
        by_thresholds: dict[tuple[float, ...], ThresholdSetting] = {}
        for k in able:
            now = measured[k].get(i, predicted[k][i])
            budget = everywhere[k].budget
            for setting in _best_settings(variant.solve_logits, variant.solve_labels, now, settings, budget):
                by_thresholds.setdefault(setting.thresholds, setting)
        for k in able:
            wanted = by_thresholds.values()
            times = (predicted[k][i], measured[k].get(i))
            for point in _points(variant, wanted, *times, energies[k].get(i), split_labels, trial_of):
                points[k][point.id] = point
                sources[point.id] = PointSource(variant.student, variant.cut, variant.precisions)
                owners[point.id] = i
    variant_of = {id_: everything[i] for id_, i in owners.items()}
    result = []
    for at, own, a, b in zip(everywhere, points, unknown, broken, strict=True):
        front = mark_front(list(own.values()), at.budget.of, at.search.energy)
        result.append(DevicePoints(_with_streams(at, front, variant_of, settings.stream_images), [*refused, *a, *b]))
    return result, sources


def _with_streams(
    parts: SearchParts, points: Sequence[Point], variant_of: Mapping[str, Variant], images: int
) -> list[Point]:
    """The same points; those of the front with exits have a stream of test images measured, where the device can.

    Results are kept in the run folder one by one. A device that cannot is told once, with the reason.
    """
    device, reporter = parts.predictor.device, parts.reporter
    wanted = [p for p in points if p.on_front and p.candidate.exits] if images else []
    if wanted and (lacks := no_stream(device)):
        reporter.say(
            f"{device.profile.name}: no stream of test images is measured ({lacks}): the expected latency of students "
            "with exits rests on the sum over their exits"
        )
        wanted = []
    known = parts.folder.streams()
    for number, point in enumerate(wanted):
        reporter.progress("streams of test images", number, len(wanted))
        if point.id not in known:
            context = open_context(parts.plan.context, point.candidate.resolution)
            artefact = variant_artefact(parts, variant_of[point.id], point.candidate)
            stream = measured_stream(device, point.id, artefact, evenly(context.test, images), point.exit_ms)
            if stream is not None:
                known[point.id] = stream
                parts.folder.add_stream(point.id, stream)
        if point.id in known:
            warn_if_off(point.id, known[point.id], point.latency.expected_ms, reporter.warn)
    if wanted:
        reporter.progress("streams of test images", len(wanted), len(wanted))
    return [replace(p, stream=known.get(p.id)) for p in points]


def _predicted(
    parts: SearchParts, everything: Sequence[Variant]
) -> tuple[dict[int, LatencyEstimate], list[FailedCandidate]]:
    """Estimates by the number of the variant, and those that have none because a row could not be measured.

    Raises:
        DeviceError: none of them has one.
    """
    predicted: dict[int, LatencyEstimate] = {}
    failed: list[FailedCandidate] = []
    parts.predictor.fill([layer for variant in everything for layer in expand(variant.candidate)])  # all at once
    for i, variant in enumerate(everything):
        try:
            predicted[i] = parts.predictor.estimate(variant.candidate)
        except MissingRowError as e:
            failed.append(FailedCandidate(variant.candidate.id, "measuring", str(e)))
    if not predicted:
        raise DeviceError(f"not one finished student has a latency; the first: {failed[0].reason}. Run: nas doctor")
    return predicted, failed


def _for_deadline(
    swept: ThresholdSweep, estimate: LatencyEstimate, budget: BudgetSettings
) -> tuple[ThresholdSetting, ...]:
    """The most accurate setting for each deadline on the mean or the tail; none where thresholds cannot change it."""
    if budget.of == "worst":
        return ()
    found = (solve_for_deadline(swept, ms, budget.of, estimate.exit_std_ms, budget.margin_std) for ms in budget.all_ms)
    return tuple(dict.fromkeys(setting for setting in found if setting is not None))


def _best_settings(
    logits: np.ndarray,
    labels: np.ndarray,
    estimate: LatencyEstimate,
    settings: FinishSettings,
    budget: BudgetSettings,
) -> list[ThresholdSetting]:
    """Threshold settings that become points, distinct ones: no loss, the allowed loss and small steps beside them, and
    those for the targets of the settings, and the one that is most accurate within a deadline on the mean or the tail.
    """
    if len(estimate.exit_ms) == 1:
        right = int((logits[-1].argmax(1) == labels).sum())
        return [ThresholdSetting((), right, len(labels), float(estimate.exit_ms[0]), (1.0,))]
    swept = sweep(logits, labels, estimate.exit_ms)
    kept: list[ThresholdSetting] = []
    for loss, ratio in sorted({settings.exit_loss: EXIT_STEPS[1][1], **dict(EXIT_STEPS)}.items()):
        setting = solve_for_loss(swept, loss)
        if not kept or setting.expected_ms < ratio * kept[-1].expected_ms:
            kept.append(setting)
    targets = [read_target(text, "finish.exit_targets") for text in settings.exit_targets]
    wanted = [target.solve(swept, estimate.exit_std_ms, budget.margin_std) for target in targets]
    wanted += _for_deadline(swept, estimate, budget)
    kept += [s for s in dict.fromkeys(wanted) if s is not None and s not in kept]
    # Where no image reaches the head, the network cut behind the last exit that is used is a variant of its own, and
    # where none leaves at an exit, that without it.
    return [s for s in kept if s.truncation is None and not s.unused_exits]


def _worth_measuring(
    parts: SearchParts,
    everything: Sequence[Variant],
    predicted: Mapping[int, LatencyEstimate],
    settings: FinishSettings,
) -> list[int]:
    """Variants whose prediction is on the front or close behind it, those nearest to it first; then the most accurate
    student in every precision, so that what a precision gains or costs on this device is measured and not assumed.
    """
    top1: list[float] = []
    latency: list[LatencyFigures] = []
    owner: list[int] = []
    for i, estimate in predicted.items():
        for setting in _best_settings(
            everything[i].solve_logits, everything[i].solve_labels, estimate, settings, parts.budget
        ):
            top1.append(setting.top1)
            latency.append(figures(estimate, setting.shares))
            owner.append(i)
    behind: dict[int, float] = {}
    kinds: tuple[LatencyKind, ...] = ("expected", parts.budget.of)
    for kind in dict.fromkeys(kinds):
        ms = [latency_of(f, kind) for f in latency]
        front = front_indices(top1, ms)
        for i, accuracy, own in zip(owner, top1, ms, strict=True):
            better = [ms[j] for j in front if top1[j] >= accuracy]
            ratio = own / min(better) if better else 1.0
            behind[i] = min(ratio, behind.get(i, ratio))
    order = sorted(behind, key=lambda i: behind[i])
    near = [i for i in order if behind[i] <= NEAR_FRONT][:MAX_MEASURED]
    best = everything[owner[max(range(len(top1)), key=lambda j: (top1[j], -latency[j].expected_ms))]].student
    whole = [i for i, v in enumerate(everything) if v.student is best and v.cut is None and not v.candidate.exits]
    return list(dict.fromkeys([*near, *whole]))


def _measure(
    parts: SearchParts, everything: Sequence[Variant], chosen: Sequence[int]
) -> tuple[dict[int, LatencyEstimate], list[FailedCandidate]]:
    """Latency per exit of chosen variants with its spread, measured on the file to be deployed; those that failed.

    Results are kept in the run folder one by one. Students that were cut to the same network share them: latency does
    not depend on the values of weights.
    """
    # What failed is tried again: the cause may have been the device, and the user may have mended it. What never
    # returned would end this process once more.
    stored = parts.folder.measured()
    known = {key: m for key, m in stored.items() if m.latency_ms is not None or m.error.startswith(HANG_REASON)}
    check_state = state_check(parts.predictor.table, parts.predictor.device)
    jobs: dict[str, MeasureJob] = {}
    is_chain = exits_form(dialect_for(parts.predictor.device.profile)) == "segments"
    keys = {i: _exit_keys(everything[i], is_chain) for i in chosen}
    for i, own in keys.items():
        variant = everything[i]
        if known.keys() >= set(own):
            continue
        candidate = variant.candidate.with_thresholds((0.5,) * len(variant.candidate.exits))
        artefact = variant_artefact(parts, variant, candidate)
        macs = exit_macs(variant.candidate)
        for k, key in enumerate(own):
            if key not in known and key not in jobs:
                forced = _path_model(artefact, k, bool(candidate.exits))
                jobs[key] = MeasureJob(key, "network", candidate.precision_label, forced, macs[k])

    def keep(m: Measurement) -> None:
        check_state()
        known[m.key] = MeasuredExit(m.key, m.latency_ms, m.error or "", deviation_ms(m), m.energy_mj, m.energy_std_mj)
        parts.folder.add_measured(known[m.key])

    def show(share: float) -> None:
        parts.reporter.progress("finished students on the device", round(share * len(jobs), 1), len(jobs))

    parts.predictor.device.measure(list(jobs.values()), on_result=keep, progress=show)
    times: dict[int, LatencyEstimate] = {}
    failed: list[FailedCandidate] = []
    for i, own in keys.items():
        found = [known[key].latency_ms for key in own]
        there = [ms for ms in found if ms is not None]
        if len(there) == len(found):
            # Leaving later never takes less time; a small disorder is noise of the measurement.
            stds = [known[key].std_ms for key in own]
            if is_chain:  # segments are executed one after the other; what disturbs one disturbs all
                there, stds = np.cumsum(there).tolist(), np.cumsum(stds).tolist()
            rising = tuple(float(v) for v in np.maximum.accumulate(there))
            times[i] = LatencyEstimate(rising, tuple(stds), 0, "measured")
        else:
            reason = next(known[key].error for key in own if known[key].latency_ms is None)
            failed.append(FailedCandidate(everything[i].candidate.id, "measuring", reason or "no latency"))
    if chosen and not times:
        raise DeviceError(f"not one finished student could be measured; the first: {failed[0].reason}. Run: nas doctor")
    return times, failed


def _path_model(artefact: Artefact, exit_index: int, has_exits: bool) -> bytes:
    """The model that is measured for an exit: the whole one sent there, or the segment that ends there."""
    if not isinstance(artefact, bytes):
        return artefact[exit_index].model
    return forced_exit(artefact, exit_index) if has_exits else artefact


def _energies(parts: SearchParts, everything: Sequence[Variant]) -> dict[int, EnergyEstimate]:
    """Energy of each variant: measured where every exit was, else from the rows; none where the device tells none."""
    if not has_energy(parts.predictor.table):
        return {}
    known, estimator = parts.folder.measured(), EnergyEstimator(parts.predictor.table)
    is_chain = exits_form(dialect_for(parts.predictor.device.profile)) == "segments"
    found: dict[int, EnergyEstimate] = {}
    for i, variant in enumerate(everything):
        exits = [known.get(key) for key in _exit_keys(variant, is_chain)]
        means = [e.energy_mj for e in exits if e is not None and e.energy_mj is not None]
        stds = [e.energy_std_mj for e in exits if e is not None and e.energy_std_mj is not None]
        if len(means) == len(stds) == len(exits):
            if is_chain:  # as with their times
                means, stds = np.cumsum(means).tolist(), np.cumsum(stds).tolist()
            found[i] = EnergyEstimate(tuple(means), tuple(stds), 0, "measured")
            continue
        try:
            found[i] = estimator.estimate(variant.candidate)
        except MissingRowError:  # a row from before energy was measured: the report then has no figure
            continue
    return found


def _exit_keys(variant: Variant, is_chain: bool) -> list[str]:
    """Keys of what is measured of a variant, one for each exit and the head."""
    if not variant.candidate.exits:
        return [f"{network_key(variant.candidate, 'plain')}#0"]
    key = network_key(variant.candidate, "if")
    mark = "#segment-" if is_chain else "#"
    return [f"{key}{mark}{k}" for k in range(len(variant.candidate.exits) + 1)]


def _points(
    variant: Variant,
    wanted: Iterable[ThresholdSetting],
    predicted: LatencyEstimate,
    measured: LatencyEstimate | None,
    energy: EnergyEstimate | None,
    labels: tuple[np.ndarray, np.ndarray],
    trial_of: dict[str, TrialRecord],
) -> list[Point]:
    val_labels, test_labels = labels
    estimate = measured or predicted
    exit_ms = estimate.exit_ms
    trial = trial_of.get(variant.student.candidate.arch_id)
    curve: tuple[tuple[float, float], ...] = ()
    if len(exit_ms) > 1:
        curve = _curve(variant, val_labels, exit_ms)
    points = []
    for setting in wanted:
        candidate = variant.candidate.with_thresholds(setting.thresholds)
        val_top1, found, _ = evaluate_thresholds(variant.val_logits, val_labels, setting.thresholds, exit_ms)
        shares = tuple(found.tolist())
        latency = figures(estimate, shares)
        if measured is not None:
            latency = replace(latency, provenance="measured")
        test_top1, _, _ = evaluate_thresholds(variant.test_logits, test_labels, setting.thresholds, exit_ms)
        points.append(
            Point(
                id=_point_id(variant, candidate),
                candidate=candidate,
                latency=latency,
                val=SplitAccuracy(val_top1, len(val_labels), _each(variant.val_logits, val_labels)),
                test=SplitAccuracy(test_top1, len(test_labels), _each(variant.test_logits, test_labels)),
                prediction=figures(predicted, shares),
                energy=None if energy is None else energy_figures(energy, shares),
                exit_ms=tuple(exit_ms),
                exit_shares=shares,
                threshold_curve=curve,
                trial=None if trial is None else trial.number,
                round=None if trial is None else trial.round,
                is_finished=True,
                model_bytes=None,
                cost_s=variant.student.cost_s,
                steps=steps_of(variant.student, variant.precisions),
                confidence=variant.confidence,
            )
        )
    return points


def _point_id(variant: Variant, candidate: Candidate) -> str:
    """The candidate's id; of two students whose cut networks are alike each keeps its own."""
    if variant.cut is None and candidate.exits and len(candidate.exits) == len(variant.student.candidate.exits):
        return candidate.id
    origin = content_hash([variant.student.candidate.arch_id, variant.cut], 4)
    return f"{candidate.id}-{origin}"


def _each(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    return tuple(_right(row, labels) for row in logits)


def _curve(variant: Variant, labels: np.ndarray, exit_ms: Sequence[float]) -> tuple[tuple[float, float], ...]:
    front = sweep(variant.val_logits, labels, exit_ms).front()
    step = max(1, len(front) // CURVE_POINTS)
    kept = [*front[::step], front[-1]] if front else []
    return tuple(dict.fromkeys((s.expected_ms, s.top1) for s in kept))


def mark_front(points: Sequence[Point], of: LatencyKind, with_energy: bool = False) -> list[Point]:
    """The same points with `on_front` set: measured, and not dominated in validation accuracy, expected and worst case.

    A student whose exits make it fast on the mean and one that is fast at worst can both be the one to take. Where the
    budget limits p99, that is a fourth axis: else the pick could be missing from its own front. `with_energy`: so is
    the energy of an inference, where every student has one.
    """
    usable = [(i, p, p.val) for i, p in enumerate(points) if p.latency.provenance == "measured" and p.val is not None]
    if not usable:
        return list(points)
    values: list[tuple[float, ...]] = [
        (v.top1, p.latency.expected_ms, p.latency.worst_ms, latency_of(p.latency, of)) for _, p, v in usable
    ]
    aims: tuple[bool, ...] = (True, False, False, False)
    energies = [p.energy.expected_mj for _, p, _ in usable if p.energy is not None]
    if with_energy and len(energies) == len(usable):
        values = [(*v, mj) for v, mj in zip(values, energies, strict=True)]
        aims = (*aims, False)
    on = {usable[k][0] for k in np.flatnonzero(non_dominated(values, aims))}
    return [dataclasses.replace(p, on_front=i in on) for i, p in enumerate(points)]
