"""What a search would do: rows to measure, work per phase, about how long it takes. Nothing is trained or measured.

The durations are guesses from rates of one core of a 2-core x86-64 virtual machine (AMD EPYC, AVX-512, torch 2.15,
November 2026); other machines differ by a factor of two either way. They are there to tell minutes from hours. How
long engines are built for is taken from the table of that device, and unknown where it has none.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nas.core.errors import RunMismatchError
from nas.core.jsonio import parse_json, read_text
from nas.core.walk import expand, total_macs
from nas.data.corruptions import CORRUPTIONS
from nas.devices.base import Device
from nas.latency.interpolate import spread_rows
from nas.latency.table import LatencyTable
from nas.measure.fill import Pace, pace_of
from nas.models.teachers import ResNet, count_macs
from nas.search.choice import choose_sampler
from nas.search.experiment import Experiment, with_deadline
from nas.search.folder import SCHEMA, RunFolder, fingerprint_diff, is_young
from nas.search.predictor import Predictor, fills_whole, row_count
from nas.search.prepare import Inputs, fingerprint, load_inputs, open_table, pipeline_times, worker_count
from nas.search.progress import Reporter
from nas.search.rounds import FIRST_ROWS_SAMPLES
from nas.space.space import SearchSpace

# Multiply-adds of the forward pass per second of one core.
TEACHER_TRAINING = 22e9  # ResNet of 26.4 M MACs, bfloat16, channels last: 14 epochs of 4,000 images in 67 s
TEACHER_ANSWERS = 80e9  # the same, forward only: 3,077 images per second
STUDENT_TRAINING = 2.4e9  # distilling students of 0.4 to 4.4 M MACs from cached answers
STUDENT_ANSWERS = 12e9  # the same, forward only

QAT_EPOCH = 2.4  # epochs of distillation that one of quantization-aware training costs: 9 and 3.8 CPU seconds
SCORE_OVERHEAD_S = 0.3  # extraction, batch norm, int8 ranges of one score
SAMPLES = 64  # random networks of the space whose mean stands for the candidates


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the work: what is done and about how many seconds of wall time it takes, None where nobody knows."""

    name: str
    what: str
    about_s: float | None


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """What is to be measured on one device, and how fast that goes."""

    missing: int
    pace: Pace


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What a search would measure on a further device, as the fields of the same names in `Plan`."""

    device: str
    table: str
    missing: int
    pace: Pace
    fastest_ms: float | None
    budget_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search would do.

    `rows` are all rows of the space and `missing` those that the table lacks; where the space has too many, only what
    candidates need is measured, and `missing` is empty. Where `is_interpolated`, `missing` are the rows to be measured
    and the others are estimated from them. `scored` trials of an earlier call are kept. `fastest_ms` is
    the predicted worst case of the fastest network, None while rows are missing. `differences` are the lines of
    the fingerprint that would make the run folder refuse this experiment.
    `sampler` proposes the candidates, for the reason beside it.
    """

    run_dir: str
    status: str
    scored: int
    device: str
    table: str
    rows: int
    missing: tuple[str, ...]
    is_whole_table: bool
    is_interpolated: bool
    fastest_ms: float | None
    budget_ms: float
    phases: tuple[Phase, ...]
    differences: tuple[str, ...]
    others: tuple[DevicePlan, ...] = ()
    sampler: str = ""
    sampler_reason: str = ""

    @property
    def about_s(self) -> float:
        """About how long all of it takes, seconds of wall time, without what nobody knows."""
        return sum(phase.about_s or 0.0 for phase in self.phases)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the phases of which nobody knows how long they take."""
        return tuple(phase.name for phase in self.phases if phase.about_s is None)


def plan_search(experiment: Experiment, reporter: Reporter) -> Plan:
    """The plan of a search; data, space and device are really read, so that mistakes show.

    Raises:
        NasError: with what to mend, as a search would.
    """
    inputs = load_inputs(experiment, reporter)
    experiment = with_deadline(experiment, pipeline_times(inputs))
    device, space = inputs.device.profile, inputs.space
    folder = Path(experiment.run.tables) / device.name
    table = open_table(experiment, device) if (folder / "device.json").exists() else None
    keys = list(dict.fromkeys(layer.key for layer in space.layers()))
    max_rows = experiment.feedback.max_rows
    missing = missing_rows(space, table, experiment.search.trials, max_rows)
    is_limited = max_rows is not None and len(keys) > max_rows
    is_whole = fills_whole(space) and not is_limited
    status, scored, differences = _run_state(experiment.run_dir, fingerprint(inputs))
    others = tuple(_device_plan(inputs, name, other, reporter) for name, other in inputs.each[1:])
    work = [DeviceWork(len(missing), pace_of(device.runtime, table))]
    work += [DeviceWork(other.missing, other.pace) for other in others]
    search, is_known = experiment.search, is_whole or is_limited
    goes_on = status != "new" and not differences
    sampler, reason = choose_sampler(
        search.sampler,
        search.trials,
        is_latency_known=is_known,
        with_energy=search.energy,
        score_s=score_seconds(inputs),
        batch=search.batch,
        kept=RunFolder(experiment.run_dir).sampler() if goes_on else None,
    )
    return Plan(
        run_dir=str(experiment.run_dir),
        status=status,
        scored=scored,
        device=device.name,
        table=str(folder),
        rows=len(keys),
        missing=tuple(missing) if is_whole or is_limited else (),
        is_whole_table=is_whole,
        is_interpolated=is_limited,
        fastest_ms=None if table is None else _fastest_ms(space, table, inputs.device, reporter),
        budget_ms=experiment.budget.ms,
        phases=()
        if status == "finished" and not differences
        else phases_of(inputs, work, 0 if differences else scored),
        differences=differences,
        others=others,
        sampler=sampler,
        sampler_reason=reason,
    )


def _device_plan(inputs: Inputs, name: str, device: Device, reporter: Reporter) -> DevicePlan:
    e = inputs.experiment
    folder = Path(e.run.tables) / device.profile.name
    table = LatencyTable.open(folder, device.profile) if (folder / "device.json").exists() else None
    return DevicePlan(
        device=device.profile.name,
        table=str(folder),
        missing=len(missing_rows(inputs.space, table, e.search.trials, e.feedback.max_rows)),
        pace=pace_of(device.profile.runtime, table),
        fastest_ms=None if table is None else _fastest_ms(inputs.space, table, device, reporter),
        budget_ms=e.budget_on(name).ms,
    )


def missing_rows(space: SearchSpace, table: LatencyTable | None, trials: int, max_rows: int | None = None) -> list[str]:
    """Keys of the rows that a search of so many trials has to measure; `max_rows` at most where that is given.

    Of a space that is filled row by row those of as many random networks: about as many rows as the search will need.
    """
    layers = space.layers()
    if max_rows is not None and row_count(space) > max_rows:
        layers = tuple(spread_rows(layers, max_rows))
    elif not fills_whole(space):
        drawn = space.sample_many(np.random.default_rng(0), FIRST_ROWS_SAMPLES + trials)
        layers = tuple(x for genotype in drawn.tolist() for x in expand(space.decode(tuple(genotype))))
    keys = list(dict.fromkeys(x.key for x in layers))
    return keys if table is None else table.missing(keys)


def check_plan(plan: Plan) -> None:
    """Refuses a plan whose run folder belongs to another run.

    Raises:
        RunMismatchError: lists what differs.
    """
    if plan.differences:
        raise RunMismatchError(
            f"{plan.run_dir}: this folder holds a run with other settings:\n"
            + "\n".join(plan.differences)
            + "\nStart anew in another folder (--set run.dir=DIR), or keep what is still valid: --fork"
        )


def _run_state(path: Path, marks: dict[str, str]) -> tuple[str, int, tuple[str, ...]]:
    file = path / "fingerprint.json"
    if not file.exists() or is_young(path):
        return "new", 0, ()
    stored = parse_json(read_text(file), str(file))
    differences = tuple(line for line in fingerprint_diff(stored, {"schema": str(SCHEMA), **marks}))
    scored = sum(record.state != "failed" for record in RunFolder(path).trials())
    return ("finished" if (path / "outcome.json").exists() else "begun"), scored, differences


def _fastest_ms(space: SearchSpace, table: LatencyTable, device: Device, reporter: Reporter) -> float | None:
    if not table.has_overhead:
        return None
    found = Predictor(space, table, device, reporter).fastest()
    return None if found is None else found[1]


def phases_of(inputs: Inputs, work: Sequence[DeviceWork], scored: int) -> tuple[Phase, ...]:
    """What is to be done, in order, if nothing is cached.

    Args:
        inputs: of the search.
        work: what is to be measured, on each device.
        scored: candidates that were scored by an earlier call.
    """
    e, dataset = inputs.experiment, inputs.dataset
    images, side, workers = len(dataset.train), dataset.resolution, worker_count(e)
    macs = _mean_macs(inputs.space)
    phases = []
    teacher_macs = 0
    trained = [n.settings for n in e.teacher.networks if n.settings.kind == "resnet"]
    if trained:
        macs_of = [count_macs(ResNet(t.widths, t.blocks, dataset.num_classes, side), side) for t in trained]
        teacher_macs = sum(macs_of)
        about_s = images * sum(t.epochs * m for t, m in zip(trained, macs_of, strict=True)) / TEACHER_TRAINING
        epochs = sum(t.epochs for t in trained)
        what = f"{epochs} epochs of {images} images, unless cached"
        phases.append(Phase("teacher", what, about_s / max(1, min(e.teacher.threads, 2))))
    about_s = e.distill.variants * images * teacher_macs / TEACHER_ANSWERS
    unless = "unless cached" if teacher_macs else "by a given teacher, whose time is not known beforehand"
    phases.append(Phase("teacher's answers", f"{e.distill.variants} augmented copies, {unless}", about_s))
    missing = sum(device.missing for device in work)
    if missing:
        if e.feedback.max_rows is not None and row_count(inputs.space) > e.feedback.max_rows:
            what = f"{missing} rows, the others are interpolated"
        elif fills_whole(inputs.space):
            what = f"{missing} rows"
        else:
            what = f"about {missing} rows, as candidates need them"
        phases.append(Phase("latency table", what, _sum((w.missing, w.pace.row_s) for w in work)))
    todo = max(0, e.search.trials - scored)
    if e.search.scorer == "supernet":
        cpu_s = e.supernet.cpu_seconds
        if e.supernet.steps is not None:
            cpu_s = e.supernet.steps * e.supernet.batch_size * macs / STUDENT_TRAINING
        share = min(workers, e.supernet.networks_per_step)
        phases.append(Phase("supernet", "shared weights, unless trained", cpu_s / share))
    phases.append(Phase("scores", f"{todo} of {e.search.trials} candidates", todo * score_seconds(inputs)))
    networks = e.feedback.engines(e.search.rounds)
    where = "the device" if len(work) == 1 else f"{len(work)} devices"
    about_s = _sum((networks, w.pace.network_s) for w in work)
    phases.append(Phase("networks", f"{networks * len(work)} whole networks on {where}", about_s))
    if e.distill.assistants != 0:
        count, largest = e.distill.assistants, total_macs(inputs.space.decode(inputs.space.largest()))
        count = 1 if count == "auto" else count
        assistant_s = count * e.distill.epochs * images * largest / STUDENT_TRAINING
        phases.append(Phase("assistants", f"{count} at most, {e.distill.epochs} epochs each", assistant_s))
    qat_epochs = e.finish.qat_epochs if "int8" in inputs.space.precisions else 0
    epochs = e.distill.epochs + QAT_EPOCH * qat_epochs  # at most: QAT is done where calibration loses
    about_s = e.finish.students * epochs * images * macs / STUDENT_TRAINING / min(workers, e.finish.students)
    what = f"{e.finish.students} students, {e.distill.epochs} epochs each"
    what += f", up to {qat_epochs} more in int8" if qat_epochs else ""
    phases.append(Phase("finalists", what, about_s))
    if e.finish.robustness:
        each = len(CORRUPTIONS) * len(e.finish.robustness) * len(dataset.test) * macs / STUDENT_ANSWERS
        what = f"{e.finish.students} students on test images with {len(CORRUPTIONS)} corruptions"
        phases.append(Phase("robustness", what, e.finish.students * each))
    return tuple(phases)


def _sum(parts: Iterable[tuple[int, float | None]]) -> float | None:
    """Numbers times seconds of each, summed; None where a factor that counts is unknown."""
    total = 0.0
    for count, seconds in parts:
        if count and seconds is None:
            return None
        total += count * (seconds or 0.0)
    return total


def score_seconds(inputs: Inputs) -> float:
    """About how many seconds of wall time scoring one candidate takes while all workers are busy."""
    e, dataset = inputs.experiment, inputs.dataset
    macs = _mean_macs(inputs.space)
    cpu_s = SCORE_OVERHEAD_S + len(dataset.val) * macs / STUDENT_ANSWERS
    if e.search.scorer == "standalone":
        rungs = e.standalone.rungs
        kept = sum(
            (epochs - before) * e.standalone.keep**i
            for i, (before, epochs) in enumerate(zip((0, *rungs), rungs, strict=False))
        )
        cpu_s += kept * len(dataset.train) * macs / STUDENT_TRAINING
    return cpu_s / worker_count(e)


def _mean_macs(space: SearchSpace) -> float:
    """Multiply-adds of a candidate, mean of random ones."""
    rng = np.random.default_rng(0)
    return statistics.mean(total_macs(space.decode(space.sample(rng))) for _ in range(SAMPLES))
