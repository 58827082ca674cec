"""A finalist becomes a finished student: full distillation, int8 ranges, logits in every precision that is asked for.

One recipe and the same number of epochs for all finalists, so that their figures compare. Everything goes to files
under the student's folder, the record last; a job that was killed goes on from its last epoch. The record tells the
steps: `distil`, then for each precision `calibrate` and, where it was done, `QAT`. What quantization-aware training
gives lies beside the float weights and serves its precision only; it is kept only where it is better on validation.

Weights and logits lie there as they were trained; the temperatures of each precision lie beside them, and
`load_deployed` and `finished_logits` put them in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from nas.compress.fakequant import FakeQuantNetwork
from nas.core.errors import InterruptedRunError, StorageError, TrainingError
from nas.core.jsonio import content_hash, read_record, write_bytes, write_record
from nas.core.records import Candidate, Precision, QuantSpec
from nas.core.run import ExitConfidence, FinishStep
from nas.data import evenly
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import ORT, dialect_named
from nas.models.student import folded_weights
from nas.recipe.confidence import (
    StudentConfidence,
    confidence_figures,
    divided,
    fitted_temperatures,
    with_temperatures,
)
from nas.recipe.context import Context, open_context
from nas.recipe.deployed import calibrated, computed_dialect, deployed_logits
from nas.recipe.pruning import (
    IMPORTANCE_FILE,
    PrunedStudent,
    importance_file,
    importance_of,
    prune_student,
    read_importance,
    unfolded_student,
    write_importance,
)
from nas.recipe.qat import train_quantized
from nas.recipe.records import (
    FINISHED_FILES,
    PARENT,
    QUANT_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    FinishedStudent,
    read_logits,
    read_scored,
    top1_per_exit,
    write_scored,
)
from nas.recipe.sensitivity import IMAGES, keep_sensitivity, kept_sensitivity, sensitivity
from nas.recipe.settings import ImportanceKind, PruneSettings, QatSettings
from nas.train.evaluate import predict_logits
from nas.train.loop import EpochRecord
from nas.train.settings import DistillSettings
from nas.train.trainer import new_student, train_student

FINISHED_SCHEMA = 1

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class FinishJob:
    """One student to finish, as a worker process receives it.

    `precisions` are those whose logits are wanted beside fp32, each as the tuple of `Candidate.precisions`; `dialect`
    is that of the device's runtime. With `importance` how much each channel matters is kept beside the weights, for a
    student that is cut from this one. Such a student has `parent`, the `arch_id` of the one that it is cut from, whose
    files `adopt_parent` has placed in its folder, and `prune`. `before` are the steps that led to the answers of the
    context. `sensitivity`: precisions in which every part is tried alone; none: no table. `calibrate_confidence`:
    a temperature is fitted for each exit in each precision.
    """

    candidate: Candidate
    context: str
    folder: str
    stop_file: str
    distill: DistillSettings
    seed: int
    calibration_images: int
    precisions: tuple[tuple[Precision, ...], ...]
    dialect: str = ORT.name
    qat: QatSettings = field(default_factory=QatSettings)
    importance: ImportanceKind | None = None
    parent: str = ""
    prune: PruneSettings | None = None
    before: tuple[FinishStep, ...] = ()
    sensitivity: tuple[Precision, ...] = ()
    calibrate_confidence: bool = True

    @property
    def pruning(self) -> str:
        """What decides the weights of a pruned student beside those of its parent; empty where none is cut."""
        return "" if self.prune is None else content_hash([self.parent, self.prune, self.distill, self.seed])


@dataclass(frozen=True, slots=True, eq=False)
class _Quantized:
    """Weights and ranges of one precision, the logits [E, N, K] that they give on search validation, and the step."""

    weights: Weights
    quant: QuantSpec
    logits: NDArray[np.float32]
    top1: tuple[float, ...]
    step: FinishStep


def precision_name(precisions: tuple[Precision, ...]) -> str:
    """File name part of a precision: `int8`, or the first letters and numbers of each part for a mix."""
    names = set(precisions)
    return precisions[0] if len(names) == 1 else "-".join(p.replace("fp", "f").replace("int", "i") for p in precisions)


def finish_student(job: FinishJob) -> FinishedStudent:
    """Distils in full, calibrates, and writes logits on the search validation split and on the test split.

    Raises:
        TrainingError: the training diverged or learnt nothing.
        InterruptedRunError: the stop file appeared; the last epoch is kept.
    """
    folder = Path(job.folder)
    architecture = job.candidate.architecture
    context = open_context(job.context, architecture.resolution)
    finished = _known(job, folder) or _train(job, architecture, context, folder)
    if job.importance is not None and not (folder / importance_file(job.importance)).exists():
        student = unfolded_student(architecture, load_finished(folder)[0], context.targets, context.device)
        found = importance_of(student, job.importance, context.targets, job.distill)
        write_importance(folder / importance_file(job.importance), found)
    for precisions in job.precisions:
        finished = _deploy(job, finished, architecture.with_precision(precisions), context)
    _write_sensitivity(job, architecture, context, folder)
    return finished


def _known(job: FinishJob, folder: Path) -> FinishedStudent | None:
    """The record that lies there. One that came about in another way, pruned or not, is removed with its files."""
    if not (folder / RECORD_FILE).exists():
        return None
    finished = read_record(FinishedStudent, folder / RECORD_FILE)
    if finished.pruning == job.pruning:
        return finished
    for path in (path for pattern in FINISHED_FILES for path in folder.glob(pattern)):
        path.unlink(missing_ok=True)
    return None


def adopt_parent(parent: Path, folder: Path, kind: ImportanceKind) -> None:
    """Copies what pruning needs of a finished student, its importance of a kind too, into the folder of a narrower one.

    Raises:
        StorageError: the parent's files cannot be read, or the copies not be written.
    """
    names = {WEIGHTS_FILE: WEIGHTS_FILE, importance_file(kind): IMPORTANCE_FILE, RECORD_FILE: RECORD_FILE}
    for name, copy in names.items():
        try:
            write_bytes(folder / f"{PARENT}{copy}", (parent / name).read_bytes())
        except OSError as e:
            raise StorageError(f"{parent / name}: cannot be read: {e}. Delete {parent} and run again") from e


def _pruned(job: FinishJob, settings: PruneSettings, context: Context, folder: Path) -> PrunedStudent:
    """The narrower student, from what `adopt_parent` has placed."""
    return prune_student(
        read_record(FinishedStudent, folder / f"{PARENT}{RECORD_FILE}").candidate,
        _read_weights(folder / f"{PARENT}{WEIGHTS_FILE}"),
        read_importance(folder / f"{PARENT}{IMPORTANCE_FILE}"),
        job.candidate.architecture,
        context.targets,
        job.distill,
        settings,
        seed=job.seed,
        checkpoint=folder / f"prune-{job.pruning}",
        progress=_stop_when_told(job),
        device=context.device,
    )


def _distilled(job: FinishJob, context: Context, folder: Path) -> PrunedStudent:
    """A new student, distilled over the whole schedule."""
    student = new_student(job.candidate.architecture, job.seed).to(context.device)
    history = train_student(
        student,
        context.targets,
        job.distill,
        seed=job.seed,
        checkpoint=folder / "finish.ckpt",
        progress=_stop_when_told(job),
    )
    return PrunedStudent(student, len(history.epochs), history.cpu_s)


def _train(job: FinishJob, architecture: Candidate, context: Context, folder: Path) -> FinishedStudent:
    if job.prune is None:
        trained = _distilled(job, context, folder)
    else:
        trained = _pruned(job, job.prune, context, folder)
    student, epochs, top1 = trained.student.cpu(), trained.epochs, 0.0  # figures are those of a processor, in float32
    weights = folded_weights(student)
    write_bytes(folder / WEIGHTS_FILE, save(weights))
    started = time.thread_time()
    sample = evenly(context.sample, job.calibration_images)
    quant = calibrated(architecture, weights, context.mean, context.std, sample, run_model)
    write_record(folder / QUANT_FILE, quant)
    for split, (images, labels) in context.splits.items():
        logits = predict_logits(student, images, context.mean, context.std)
        name = f"final-{split}-fp32"
        scored = write_scored(folder, architecture, epochs=epochs, cost_s=0.0, logits=logits, labels=labels, name=name)
        top1 = scored.top1[-1] if split == "val" else top1
    _calibrate_confidence(job, architecture.precisions, context, folder)
    cost_s = trained.cpu_s + time.thread_time() - started
    name, note = "distil", ""
    if job.prune is not None:
        name, note = "prune", f"cut from {job.parent}, {job.prune.importance}, {job.prune.mode}"
    step = FinishStep(name, epochs, top1, cost_s, note)
    steps = (*job.before, step)
    finished = FinishedStudent(FINISHED_SCHEMA, architecture, epochs, cost_s, steps, job.parent, job.pruning)
    write_record(folder / RECORD_FILE, finished)
    for checkpoint in (folder / "finish.ckpt", *folder.glob("prune-*.ckpt")):
        checkpoint.unlink(missing_ok=True)
    return finished


def _stop_when_told(job: FinishJob) -> Callable[[EpochRecord], None]:
    def look(_: EpochRecord) -> None:
        if Path(job.stop_file).exists():
            raise InterruptedRunError("stopped at the end of an epoch")

    return look


def _deploy(job: FinishJob, finished: FinishedStudent, candidate: Candidate, context: Context) -> FinishedStudent:
    """Weights and logits of one precision of a finished student; the record with the steps that led to them.

    The record comes last. Until then the checkpoint of QAT stays, so that a kill in between costs no training.
    """
    folder, label = Path(job.folder), precision_name(candidate.precisions)
    splits = context.splits
    missing = [split for split in splits if read_scored(folder, f"final-{split}-{label}") is None]
    is_told = any(step.precision == label for step in finished.steps)
    if is_told and not missing:
        return finished
    checkpoint = folder / f"qat-{label}.ckpt"
    kept = _calibrated(job, candidate, context, folder)
    steps = [kept.step]
    if (trained := _qat(job, candidate, context, kept, checkpoint)) is not None:
        steps.append(trained.step)
        if sum(trained.top1) > sum(kept.top1):
            kept = trained
            write_bytes(folder / _of_precision(WEIGHTS_FILE, label), save(dict(kept.weights)))
            write_record(folder / _of_precision(QUANT_FILE, label), kept.quant)
    for split in missing:
        images, labels = splits[split]
        logits = kept.logits if split == "val" else _logits(job, candidate, kept.weights, kept.quant, context, images)
        name = f"final-{split}-{label}"
        write_scored(
            folder,
            candidate,
            epochs=kept.step.epochs,
            cost_s=kept.step.cpu_s,
            logits=logits,
            labels=labels,
            name=name,
        )
    _calibrate_confidence(job, candidate.precisions, context, folder)
    if not is_told:
        cost_s = finished.cost_s + sum(step.cpu_s for step in steps)
        finished = replace(finished, cost_s=cost_s, steps=(*finished.steps, *steps))
        write_record(folder / RECORD_FILE, finished)
    checkpoint.unlink(missing_ok=True)
    return finished


def _calibrate_confidence(job: FinishJob, precisions: tuple[Precision, ...], context: Context, folder: Path) -> None:
    """Fits the temperatures of a precision whose logits are there, and keeps them."""
    if not job.calibrate_confidence:
        return
    logits = {split: _raw_logits(folder, split, precisions) for split in context.splits}
    temperatures = fitted_temperatures(logits.get("solve", logits["val"]), np.asarray(context.solve_labels))
    found = confidence_figures(temperatures, logits["test"], np.asarray(context.test_labels))
    write_record(folder / f"confidence-{precision_name(precisions)}.json", StudentConfidence(found))


def _calibrated(job: FinishJob, candidate: Candidate, context: Context, folder: Path) -> _Quantized:
    """The float weights with the ranges of calibration: post-training quantization."""
    started = time.thread_time()
    weights, quant = load_finished(folder)
    logits = _logits(job, candidate, weights, quant, context, context.val)
    top1 = top1_per_exit(logits, context.val_labels)
    cpu_s, label = time.thread_time() - started, precision_name(candidate.precisions)
    name = "calibrate" if "int8" in candidate.precisions else "convert"
    return _Quantized(weights, quant, logits, top1, FinishStep(name, 0, top1[-1], cpu_s, precision=label))


def _write_sensitivity(job: FinishJob, architecture: Candidate, context: Context, folder: Path) -> None:
    if not job.sensitivity or kept_sensitivity(folder) is not None:
        return
    weights, quant = load_finished(folder)
    images, dialect = evenly(context.val, IMAGES), dialect_named(job.dialect)
    table = sensitivity(architecture, weights, quant, context.mean, context.std, images, job.sensitivity, dialect)
    keep_sensitivity(folder, table)


def _qat(
    job: FinishJob, candidate: Candidate, context: Context, start: _Quantized, checkpoint: Path
) -> _Quantized | None:
    """Quantization-aware training from there; None where it is not asked for, or calibration loses too little."""
    full = read_scored(checkpoint.parent, "final-val-fp32")
    if full is None or not job.qat.epochs or "int8" not in candidate.precisions:
        return None
    if max(a - b for a, b in zip(full.top1, start.top1, strict=True)) <= job.qat.least_loss:
        return None
    label = precision_name(candidate.precisions)
    dialect = computed_dialect(dialect_named(job.dialect))
    network = FakeQuantNetwork(candidate, start.weights, start.quant, context.mean, context.std, dialect)
    network.to(context.device)
    try:
        epochs = train_quantized(
            network,
            candidate,
            context.targets,
            job.distill,
            job.qat,
            seed=job.seed,
            checkpoint=checkpoint,
            progress=_stop_when_told(job),
        )
    except TrainingError as e:  # what calibration gave is still there
        return replace(start, step=FinishStep("QAT", job.qat.epochs, start.step.top1, 0.0, f"not kept: {e}", label))
    started = time.thread_time()
    weights, quant = network.weights(), network.ranges()
    logits = _logits(job, candidate, weights, quant, context, context.val)
    top1 = top1_per_exit(logits, context.val_labels)
    note = "kept" if sum(top1) > sum(start.top1) else "not kept: not better than calibration alone"
    cpu_s = sum(e.cpu_s for e in epochs) + time.thread_time() - started
    return _Quantized(weights, quant, logits, top1, FinishStep("QAT", len(epochs), top1[-1], cpu_s, note, label))


def _logits(
    job: FinishJob, candidate: Candidate, weights: Weights, quant: QuantSpec, context: Context, images: np.ndarray
) -> NDArray[np.float32]:
    dialect = dialect_named(job.dialect)
    return deployed_logits(candidate, weights, quant, context.mean, context.std, images, dialect)


def _of_precision(file: str, label: str) -> str:
    """`quant-int8.json` for `quant.json`."""
    stem, dot, suffix = file.partition(".")
    return f"{stem}-{label}{dot}{suffix}"


def load_finished(folder: Path, precisions: tuple[Precision, ...] = ()) -> tuple[Weights, QuantSpec]:
    """Weights (batch norm folded in) and int8 ranges of a finished student.

    Args:
        folder: of the student.
        precisions: those in which it is deployed, as `Candidate.precisions` of the whole student: where
            quantization-aware training was kept for them, what it gave. Else, and without, the float weights.

    Raises:
        StorageError: a file is missing or damaged.
    """
    names = WEIGHTS_FILE, QUANT_FILE
    if precisions:
        own = tuple(_of_precision(name, precision_name(precisions)) for name in names)
        names = own if (folder / own[1]).exists() else names
    return _read_weights(folder / names[0]), read_record(QuantSpec, folder / names[1])


def _read_weights(path: Path) -> Weights:
    try:
        return load_file(path)
    except Exception as e:  # safetensors raises its own and OSError alike
        raise StorageError(f"{path}: cannot be read: {e}. Delete the folder and run again") from e


def load_deployed(folder: Path, precisions: tuple[Precision, ...]) -> tuple[Weights, QuantSpec]:
    """As `load_finished`, with the temperatures of the precision in the weights of its heads."""
    weights, quant = load_finished(folder, precisions)
    return with_temperatures(weights, quant, [c.temperature for c in finished_confidence(folder, precisions)])


def finished_confidence(folder: Path, precisions: tuple[Precision, ...]) -> tuple[ExitConfidence, ...]:
    """Calibration of each exit of a finished student, the head last; empty where confidences were not calibrated."""
    path = folder / f"confidence-{precision_name(precisions)}.json"
    return read_record(StudentConfidence, path).exits if path.exists() else ()


def finished_logits(folder: Path, split: str, precisions: tuple[Precision, ...]) -> NDArray[np.float32]:
    """Logits float32 [E, N, K] of a finished student on `val`, `test` or, where the data set has it, `solve`.

    They are those of what is deployed: divided by its temperatures where confidences were calibrated.

    Raises:
        StorageError: the file is missing or damaged.
    """
    temperatures = [c.temperature for c in finished_confidence(folder, precisions)]
    return divided(_raw_logits(folder, split, precisions), temperatures)


def _raw_logits(folder: Path, split: str, precisions: tuple[Precision, ...]) -> NDArray[np.float32]:
    name = f"final-{split}-{precision_name(precisions)}"
    scored = read_scored(folder, name)
    if scored is None:
        raise StorageError(f"{folder}: no logits '{name}'. Delete the folder and run again")
    return read_logits(folder, scored)


def kept_exits(trained: Candidate, deployed: Candidate) -> tuple[int, ...]:
    """Indices of the exits of a trained student that a deployed form of it has."""
    places = {e.after_stage for e in deployed.exits}
    return tuple(k for k, e in enumerate(trained.exits) if e.after_stage in places)


def deployed_rows(trained: Candidate, deployed: Candidate, cut: int | None) -> list[int]:
    """Which rows of a trained student's logits [E, N, K] are those of a deployed form, the head last."""
    return [*kept_exits(trained, deployed), len(trained.exits) if cut is None else cut]


def deployed_student(
    folder: Path, trained: Candidate, deployed: Candidate, precisions: tuple[Precision, ...], cut: int | None
) -> tuple[dict[str, NDArray[np.float32]], QuantSpec]:
    """Weights and ranges of one deployed form of a finished student.

    Args:
        folder: of the student.
        trained: the whole student.
        deployed: the form, with some of its exits.
        precisions: of the whole student, as `Candidate.precisions`.
        cut: as in `deployed_parts`.

    Raises:
        StorageError: a file is missing or damaged.
    """
    return deployed_parts(trained, *load_deployed(folder, precisions), cut, kept_exits(trained, deployed))


def deployed_parts(
    candidate: Candidate,
    weights: Mapping[str, NDArray[np.float32]],
    quant: QuantSpec,
    cut: int | None,
    kept: Sequence[int],
) -> tuple[dict[str, NDArray[np.float32]], QuantSpec]:
    """Weights and ranges of a finished student deployed with some of its exits, or cut behind one.

    Args:
        candidate: the student as it was trained.
        weights, quant: of `load_finished`; names begin with the layer's name.
        cut: index of the exit whose head becomes the head (as in `Candidate.truncated`), None: the whole network.
        kept: indices of the exits before the cut that stay, rising (`kept_exits`).
    """
    places = {str(k): f"exits.{i}" for i, k in enumerate(kept)}

    def new_name(name: str) -> str | None:
        part, _, rest = name.partition(".")
        if part == "exits":
            number, _, tail = rest.partition(".")
            if cut is not None and int(number) == cut:
                return f"head.{tail}"
            return f"{places[number]}.{tail}" if number in places else None
        if cut is not None:
            last = candidate.exits[cut].after_stage
            if part == "head" or (part == "stages" and int(rest.partition(".")[0]) > last):
                return None
        return name

    renamed = {new: value for name, value in weights.items() if (new := new_name(name)) is not None}
    lo = {new: value for name, value in quant.lo.items() if (new := new_name(name)) is not None}
    hi = {new: value for name, value in quant.hi.items() if (new := new_name(name)) is not None}
    return renamed, QuantSpec(lo, hi, quant.images)
