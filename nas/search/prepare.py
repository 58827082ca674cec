"""What comes before the rounds: data, teacher, its cached answers, device, table; each kept and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nas.core.errors import BudgetError, ConfigError, DeviceError
from nas.core.jsonio import content_hash, file_sha256, to_plain
from nas.core.records import DeviceProfile
from nas.core.run import DIALECT_MARK, FOREIGN_MARK, PipelineTimes
from nas.core.units import rounded_up
from nas.data import Dataset, load_dataset
from nas.data.decode import read_image_file
from nas.devices import open_device, usable_cores
from nas.devices.base import Device
from nas.devices.boards import unlocked_warning, why_no_answers
from nas.devices.capability import WITHOUT
from nas.export.dialect import ORT, dialect_for
from nas.latency.table import LatencyTable
from nas.measure.networks import measure_model
from nas.measure.pipeline import postprocess_ms, preprocess_ms
from nas.recipe.context import write_context
from nas.recipe.deployed import computed_dialect
from nas.search.choice import choose_sampler
from nas.search.experiment import Experiment
from nas.search.folder import DIALECT, Event, RunFolder
from nas.search.predictor import knows_every_row
from nas.search.progress import Reporter
from nas.search.scoring import ScoringPlan
from nas.search.seeds import resolve
from nas.search.settings import BudgetSettings, FinishSettings
from nas.search.shared_jobs import version_of
from nas.space.space import SearchSpace, load_space
from nas.train.compute import WORKERS_PER_GPU, gpu_count
from nas.train.contributors import prepare_targets, read_files
from nas.train.features import check_teacher_features
from nas.train.settings import TeacherSettings
from nas.train.targets import Targets
from nas.train.teacher import Teacher

CHANCE_FACTOR = (
    1.5  # times the accuracy of guessing: a given teacher below it has another order of classes, most likely
)
PICTURES = 32  # whose preparation is measured where it is part of the deadline
SCORE_IMAGES = 256  # training images for batch norm and int8 ranges of a score; more change it by less than its noise


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a run is about, before anything is trained or measured.

    `datasets` has one entry per resolution, rising; `others` are the further devices, in the experiment's order.
    """

    experiment: Experiment
    space: SearchSpace
    datasets: tuple[Dataset, ...]
    device: Device
    others: tuple[Device, ...] = ()

    @property
    def each(self) -> tuple[tuple[str, Device], ...]:
        """Every device with its name in the run folder, which is empty for the first one."""
        names = (other.device for other in self.experiment.also_on)
        return (("", self.device), *zip(names, self.others, strict=True))

    @property
    def dataset(self) -> Dataset:
        """The data set in the largest resolution: the teacher's."""
        return self.datasets[-1]


def load_inputs(
    experiment: Experiment, reporter: Reporter, device: Device | None = None, others: Sequence[Device] | None = None
) -> Inputs:
    """Space, data and device; all that a user can have got wrong shows here, before any long work.

    Args:
        experiment: from `load_experiment`.
        reporter: told how far it is.
        device: measures; by default the one that the experiment names.
        others: the further devices; by default those that the experiment names.

    Raises:
        ConfigError, DataError, UsageError, DeviceError: with what to mend.
    """
    device = device or open_device(experiment.device, reporter.say)
    if others is None:
        further = [open_device(other.device, reporter.say) for other in experiment.also_on]
    else:
        further = list(others)
    _check_devices(experiment, (device, *further))
    for line in _device_warnings(experiment, (device, *further)):
        reporter.warn(line)
    for network in experiment.teacher.networks:
        given = network.settings.weights if network.settings.kind != "resnet" else None
        if given is not None and not Path(given).is_file():
            raise ConfigError(
                f"teacher.weights: {given} is not a file. Give that of the teacher: --set teacher.weights=FILE"
            )
    check_teacher_features(experiment.teacher, experiment.distill)
    draft = load_space(Path(experiment.space), 2)
    datasets: list[Dataset] = []

    def read(done: int, total: int) -> None:
        reporter.progress("data", len(datasets) + done / total, len(draft.resolution), experiment.data.name)

    for resolution in sorted(draft.resolution):
        reporter.progress("data", len(datasets), len(draft.resolution), experiment.data.name)
        datasets.append(load_dataset(experiment.data, resolution, read))
    reporter.progress("data", len(datasets), len(draft.resolution), experiment.data.name)
    read_files(experiment.teacher, datasets[-1])  # bad soft labels show now
    space = replace(draft, num_classes=datasets[-1].num_classes)
    for each in (device, *further):
        before = len(space.dropped)
        space = space.restricted(each.profile.precisions)
        for p in space.dropped[before:]:
            why = each.profile.details.get(f"{WITHOUT}{p}")
            reason = f" ({why})" if why else ""
            reporter.say(f"{each.profile.name} does not offer {p}: dropped from the space{reason}")
    for other in further if "int8" in space.precisions else ():
        if (why := borrowed_accuracies(device.profile, other.profile)) is not None:
            reporter.warn(
                f"also_on: accuracies, exit thresholds and quantization-aware training in int8 on {other.profile.name} "
                f"are {why}. Only a search with it as `device` gives its own"
            )
    is_known = knows_every_row(space, experiment.feedback.max_rows)
    wanted = experiment.search
    choose_sampler(  # refuses it now
        wanted.sampler, wanted.trials, is_latency_known=is_known, with_energy=wanted.energy
    )
    for warning in datasets[-1].warnings:
        reporter.warn(warning)
    return Inputs(experiment, space, tuple(datasets), device, tuple(further))


def _check_devices(experiment: Experiment, devices: Sequence[Device]) -> None:
    """Raises ConfigError when two of the experiment's devices are one."""
    seen: dict[str, str] = {}
    for name, device in zip((experiment.device, *(o.device for o in experiment.also_on)), devices, strict=True):
        other = seen.setdefault(device.profile.fingerprint, name)
        if other != name:
            raise ConfigError(f"also_on: {name!r} is the same device as {other!r}; leave it out")


def borrowed_accuracies(first: DeviceProfile, other: DeviceProfile) -> str | None:
    """Whose int8 the accuracies on a further device are, where that device computes another one; else None.

    Candidates are scored and finished once, by graphs that say what the first device computes.
    """
    mine, own = dialect_for(first), dialect_for(other)
    if computed_dialect(mine) == computed_dialect(own):
        return None
    return f"those of {first.name}, by graphs of dialect {mine.name}; {other.name} reads graphs of dialect {own.name}"


def borrowed_marks(inputs: Inputs, other: DeviceProfile) -> dict[str, str]:
    """The same as a value of the provenance of what was found on a device."""
    why = borrowed_accuracies(inputs.device.profile, other) if "int8" in inputs.space.precisions else None
    return {} if why is None else {DIALECT_MARK: why}


def _device_warnings(experiment: Experiment, devices: Sequence[Device]) -> Iterator[str]:
    """What is to be known of the devices before hours of work on them."""
    names = (experiment.device, *(other.device for other in experiment.also_on))
    for name, device in zip(names, devices, strict=True):
        unlocked = unlocked_warning(device.profile, name)
        if unlocked is not None:
            yield unlocked
        why = why_no_answers(device)
        if why:
            yield (
                f"{device.profile.name} measures, but gives no answers: {why}. The answers of packages are computed "
                "with ONNX Runtime here; nas deploy and the scripts of a package need what is missing"
            )


def pipeline_times(inputs: Inputs) -> PipelineTimes | None:
    """What of a deadline of the whole pipeline is not the network's; None where the deadline is the network's.

    Raises:
        BudgetError: nothing is left for the network.
        DeviceError: a part is to be measured, and the device is not this machine.
    """
    budget, dataset = inputs.experiment.budget, inputs.dataset
    if budget.total_ms is None:
        return None
    parts = {"preprocess": budget.preprocess, "postprocess": budget.postprocess}
    measured = tuple(name for name, value in parts.items() if value == "measured")
    if measured and inputs.device.profile.kind == "measured" and inputs.experiment.device.partition(":")[0] != "cpu":
        raise DeviceError(
            f"budget.{measured[0]}: can be measured on this machine only, and the device is "
            f"{inputs.device.profile.name}. Give milliseconds: --set budget.{measured[0]}=MS"
        )
    if budget.preprocess == "measured":
        parts["preprocess"] = preprocess_ms(_pictures(inputs), dataset.resolution)
    if budget.postprocess == "measured":
        parts["postprocess"] = postprocess_ms(dataset.num_classes)
    times = PipelineTimes(
        budget.total_ms, budget.capture_ms, float(parts["preprocess"]), float(parts["postprocess"]), measured
    )
    if times.network_ms <= 0:
        raise BudgetError(
            f"budget.total_ms: nothing of {times.total_ms:g} ms is left for the network: capture {times.capture_ms:g}, "
            f"preprocess {times.preprocess_ms:.3g}, postprocess {times.postprocess_ms:.3g} ms. Allow more time: "
            f"--set budget.total_ms={rounded_up(2 * (times.total_ms - times.network_ms))}"
        )
    return times


def _pictures(inputs: Inputs) -> list[bytes | np.ndarray]:
    """Some pictures as they come: files of a folder, else pixels as the data set has them."""
    train, settings = inputs.dataset.train, inputs.experiment.data
    chosen = np.linspace(0, len(train) - 1, min(PICTURES, len(train))).astype(int)
    if settings.name == "folder" and train.names is not None and settings.path is not None:
        root = Path(settings.path).expanduser()
        files = [root / train.names[i] for i in chosen]
        return [read_image_file(file) for file in files if file.exists()]  # a name that cannot be shown is another
    return [train.images[i] for i in chosen]


def _pruning(finish: FinishSettings) -> str:
    how = f"{finish.prune_mode}, {finish.prune_epochs} epochs, lr {finish.prune_lr:g}"
    shares = ", ".join(f"{share:g}" for share in finish.prune)
    return f"{shares} of the channels by {finish.prune_importance}, {how}, {finish.prune_rows} widths a block"


def _deadline(budget: BudgetSettings) -> str:
    if budget.total_ms is None:
        return f"{', '.join(f'{ms:g}' for ms in budget.all_ms)} ms"
    return (
        f"{budget.total_ms:g} ms in all, capture {budget.capture_ms:g}, preprocess {budget.preprocess}, postprocess "
        f"{budget.postprocess}"
    )


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """Everything that decides what a run finds, as readable values.

    Raises:
        ConfigError: a candidate of `search.enqueue` cannot be read, or is not in the space.
    """
    e = inputs.experiment
    s, finish = e.search, e.finish
    scorer = {"supernet": e.supernet, "standalone": e.standalone}[e.search.scorer]
    dialect = dialect_for(inputs.device.profile).name
    return {
        "program": f"nas {version_of('nas')}",
        "space": f"{inputs.space.name} {inputs.space.sha256[:12]}",
        "data": f"{inputs.dataset.name} {inputs.dataset.sha256[:12]}"
        + (f", {e.data.threshold_share:g} of validation for thresholds" if e.data.threshold_share else ""),
        "augmentation": content_hash(inputs.dataset.augment),
        "teacher": _teacher_mark(e.teacher),
        "distillation": content_hash(e.distill),
        "scorer": f"{e.search.scorer} {content_hash(scorer)}",
        "budget": f"{_deadline(e.budget)} ({e.budget.of}), margin of {e.budget.margin_std:g} deviations, of packages "
        f"{e.budget.package_margin_std:g}",
        "device": f"{inputs.device.profile.name} {inputs.device.profile.fingerprint}",
        **({} if dialect == ORT.name else {DIALECT: dialect}),
        "seed": str(s.seed),
        **({} if s.accelerator == "cpu" else {"accelerator": s.accelerator}),
        "search": f"{s.trials} trials in {s.rounds} rounds, batches of {s.batch}, sampler {s.sampler}"
        + (f", a ladder of {s.ladder}" if s.ladder else "")
        + (f", {s.predictor_candidates} candidates screened" if s.predictor_candidates else "")
        + (f", {s.precision_seeds} architectures in solved precisions" if s.precision_seeds else "")
        + (", energy as an objective" if s.energy else ""),
        "feedback": f"{e.feedback.first_networks} networks first, {e.feedback.networks_per_round} per round"
        + ("" if e.feedback.max_engines is None else f", {e.feedback.max_engines} at most")
        + ("" if e.feedback.max_rows is None else f", {e.feedback.max_rows} rows first"),
        "finish": f"{finish.students} students, exits may cost {finish.exit_loss:g}, int8 {finish.int8_loss:g}"
        + (f", {finish.precision_ladder} solved precisions" if finish.precision_ladder else "")
        + (f", thresholds for {', '.join(finish.exit_targets)}" if finish.exit_targets else ""),
        **({"robustness": f"at severities {list(finish.robustness)}"} if finish.robustness else {}),
        **({"pruning": _pruning(finish)} if finish.prune else {}),
        "calibration": f"{finish.calibration_images} images"
        + (f", QAT of {finish.qat.epochs} epochs {content_hash(finish.qat)}" if finish.qat.epochs else "")
        + ("" if finish.calibrate_confidence else ", confidences as they are"),
        **_enqueued(inputs),
        **_further(inputs),
        **({FOREIGN_MARK: str(Path(e.run.foreign_table).resolve())} if e.run.foreign_table else {}),
    }


def _teacher_mark(teacher: TeacherSettings) -> str:
    """Settings of the teacher with the contents of its files; one contributor alone is marked as ever."""

    def content(path: str | None) -> str:
        return file_sha256(Path(path)) if path and Path(path).is_file() else str(path)

    plain = to_plain(teacher)
    plain["weights"] = content(teacher.weights if teacher.weights else None)
    for part, key in (("members", "weights"), ("files", "path")):
        used = [c for c in plain[part] if c["name"] not in teacher.without]  # nothing is read of what is left out
        plain[part] = [{**c, key: content(c[key])} for c in used]
    names = ", ".join(c["name"] for part in ("members", "files") for c in plain[part])
    without = f", without {', '.join(teacher.without)}" if teacher.without else ""
    return f"{teacher.kind} {content_hash(plain)}" + (f" with {names}" if names else "") + without


def _enqueued(inputs: Inputs) -> dict[str, str]:
    """The candidates themselves, not what the file calls them: a file that was edited since is another seed."""
    seeds = resolve(inputs.experiment.search.enqueue, inputs.space)
    if not seeds:
        return {}
    return {"enqueued": f"{', '.join(s.name for s in seeds)} {content_hash([s.genotype for s in seeds])}"}


def _further(inputs: Inputs) -> dict[str, str]:
    pairs = zip(inputs.experiment.also_on, inputs.others, strict=True)
    lines = [f"{other.ms:g} ms on {device.profile.name} {device.profile.fingerprint}" for other, device in pairs]
    return {"also on": "; ".join(lines)} if lines else {}


def open_table(experiment: Experiment, profile: DeviceProfile) -> LatencyTable:
    """The latency table of the device state, begun where it is new; with rows of a foreign table where one is named.

    Raises:
        DeviceError: the table is of another device state, or the foreign one of this state.
        StorageError, RecordError: a table cannot be read.
    """
    table = LatencyTable.open(Path(experiment.run.tables) / profile.name, profile)
    if experiment.run.foreign_table:
        table.borrow(Path(experiment.run.foreign_table))
    return table


def prepare_training(inputs: Inputs, folder: RunFolder, reporter: Reporter) -> tuple[Teacher, Targets, str]:
    """Teacher, its answers, and the context record of the workers; from the cache where they are.

    Returns:
        The teacher, the targets, and the path of the context record.
    """
    e, dataset = inputs.experiment, inputs.dataset
    cache = Path(e.run.cache)
    taught = prepare_targets(
        dataset,
        e.teacher,
        e.distill.variants,
        cache,
        seed=e.data.seed,
        distill=e.distill,
        training=lambda done, total: reporter.progress("teacher", done, total, "epochs"),
        answering=lambda done, total: reporter.progress("teacher's answers", done, total, "augmented copies"),
        accelerator=e.search.accelerator,
    )
    teacher, targets = taught.teacher, taught.targets
    reporter.say(f"teacher {teacher.name}: {100 * teacher.val_accuracy:.1f} % on search validation")
    classes = dataset.class_names
    least = CHANCE_FACTOR / len(classes)
    order = f"({', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''})"
    for network in teacher.networks if e.teacher.members or e.teacher.kind != "resnet" else ():
        if network.val_accuracy < least:
            reporter.warn(
                f"the given teacher {network.name} is hardly better than guessing among {len(classes)} classes. Its "
                f"outputs must be in the order of the data set's classes {order}, and its images as teacher.pixels says"
            )
    for file in taught.files:
        if file.agreement < least:
            reporter.warn(
                f"the soft labels of {file.name} agree with hardly more labels than by guessing. Their columns must be "
                f"in the order of the data set's classes {order}, their rows in that of its training images"
            )
    for line in teacher.contributors:
        reporter.say(f"contributor {line}")
    path = folder.path / "context.json"
    write_context(path, inputs.datasets, targets, cache, e.data.seed, e.search.accelerator)
    return teacher, targets, str(path.resolve())


def teacher_latency(teacher: Teacher, device: Device, folder: RunFolder) -> float:
    """Latency of the teacher's ONNX file on the device, ms, of several networks their sum; measured once per run.

    Raises:
        DeviceError: the device cannot run it.
    """
    for event in folder.events():
        if event.kind == "teacher" and event.values.get("sha256") == teacher.sha256:
            return float(event.values["latency_ms"] or 0)
    latency_ms = 0.0
    for network in teacher.networks:
        m = measure_model(device, f"teacher-{network.sha256[:12]}", network.onnx())
        if m.latency_ms is None:
            raise DeviceError(f"the teacher {network.name} does not run on {device.profile.name}: {m.error}")
        latency_ms += m.latency_ms
    values: Mapping[str, float | int | str | None] = {"sha256": teacher.sha256, "latency_ms": latency_ms}
    folder.add_event(Event("teacher", 0.0, dict(values)))
    return latency_ms


def scoring_plan(inputs: Inputs, folder: RunFolder, context: str) -> ScoringPlan:
    """What all score jobs of the run share."""
    e = inputs.experiment
    rungs = (0,) if e.search.scorer == "supernet" else e.standalone.rungs
    distill = e.distill if e.search.scorer == "supernet" else replace(e.distill, epochs=rungs[-1])
    root = folder.path.resolve()
    return ScoringPlan(
        e.search.scorer,
        context,
        str(root / "students"),
        str(root / "supernet"),
        str(root / "stop"),
        distill,
        rungs,
        e.standalone.keep,
        e.search.seed,
        SCORE_IMAGES,
        dialect_for(inputs.device.profile).name,
    )


def worker_count(experiment: Experiment) -> int:
    """Training processes: as asked for, or one per core this process may use, on a GPU a few."""
    if experiment.search.workers:
        return experiment.search.workers
    gpus = gpu_count(experiment.search.accelerator)
    return min(usable_cores(), gpus * WORKERS_PER_GPU) if gpus else usable_cores()
