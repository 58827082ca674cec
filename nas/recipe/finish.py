"""A finalist becomes a finished student: full distillation, int8 ranges, logits in every precision that is asked for.

One recipe and the same number of epochs for all finalists, so that their figures compare. Everything goes to files
under the student's folder, the record last; a job that was killed goes on from its last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from nas.core.errors import InterruptedRunError, StorageError
from nas.core.jsonio import read_record, write_bytes, write_record
from nas.core.records import Candidate, Precision, QuantSpec
from nas.core.run import ExitConfidence
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import ORT, dialect_named
from nas.models.student import folded_weights
from nas.recipe.confidence import confidence_figures, fitted_temperatures, with_temperatures
from nas.recipe.context import Context, open_context
from nas.recipe.deployed import calibrated, deployed_logits
from nas.recipe.records import FinishedStudent, read_logits, read_scored, write_scored
from nas.train.evaluate import predict_logits
from nas.train.loop import EpochRecord
from nas.train.settings import DistillSettings
from nas.train.trainer import new_student, train_student

FINISHED_SCHEMA = 1
WEIGHTS_FILE = "weights.safetensors"
QUANT_FILE = "quant.json"
RECORD_FILE = "finished.json"


@dataclass(frozen=True, slots=True)
class FinishJob:
    """One student to finish, as a worker process receives it.

    `precisions` are those whose logits are wanted beside fp32, each as the tuple of `Candidate.precisions`; `dialect`
    is that of the device's runtime. `calibrate_confidence`: a temperature per exit goes into the weights.
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
    calibrate_confidence: bool = True


def precision_name(precisions: tuple[Precision, ...]) -> str:
    """File name part of a precision: `int8`, or the first letters and numbers of each part for a mix."""
    names = set(precisions)
    return precisions[0] if len(names) == 1 else "-".join(p.replace("fp", "f").replace("int", "i") for p in precisions)


def finish_student(job: FinishJob) -> FinishedStudent:
    """Distils in full, calibrates, and writes logits on search validation, on test and on the images for thresholds.

    Raises:
        TrainingError: the training diverged or learnt nothing.
        InterruptedRunError: the stop file appeared; the last epoch is kept.
    """
    folder = Path(job.folder)
    architecture = job.candidate.architecture
    context = open_context(job.context, architecture.resolution)
    record_file = folder / RECORD_FILE
    if record_file.exists():
        finished = read_record(FinishedStudent, record_file)
    else:
        finished = _train(job, architecture, context, folder)
    _write_deployed(job, architecture, context, folder)
    return finished


def _train(job: FinishJob, architecture: Candidate, context: Context, folder: Path) -> FinishedStudent:
    student = new_student(architecture, job.seed)

    def stop_when_told(_: EpochRecord) -> None:
        if Path(job.stop_file).exists():
            raise InterruptedRunError("stopped at the end of an epoch")

    checkpoint = folder / "finish.ckpt"
    history = train_student(
        student, context.targets, job.distill, seed=job.seed, checkpoint=checkpoint, progress=stop_when_told
    )
    weights = folded_weights(student)
    started = time.thread_time()
    quant = calibrated(
        architecture, weights, context.mean, context.std, context.sample[: job.calibration_images], run_model
    )
    logits = {
        name: predict_logits(student, images, context.mean, context.std) for name, (images, _) in context.splits.items()
    }
    confidence: tuple[ExitConfidence, ...] = ()
    if job.calibrate_confidence:
        temperatures = fitted_temperatures(logits.get("solve", logits["val"]), np.asarray(context.solve_labels))
        confidence = confidence_figures(temperatures, logits["test"], np.asarray(context.test_labels))
        weights, quant = with_temperatures(weights, quant, temperatures)
        each = np.array(temperatures, np.float32)[:, None, None]
        logits = {name: own / each for name, own in logits.items()}
    write_bytes(folder / WEIGHTS_FILE, save(weights))
    write_record(folder / QUANT_FILE, quant)
    for name, (_, labels) in context.splits.items():
        write_scored(
            folder,
            architecture,
            epochs=len(history.epochs),
            cost_s=0.0,
            logits=logits[name],
            labels=labels,
            name=f"final-{name}-fp32",
        )
    finished = FinishedStudent(
        FINISHED_SCHEMA,
        architecture,
        len(history.epochs),
        history.cpu_s + time.thread_time() - started,
        confidence,
    )
    write_record(folder / RECORD_FILE, finished)
    checkpoint.unlink(missing_ok=True)
    return finished


def _write_deployed(job: FinishJob, architecture: Candidate, context: Context, folder: Path) -> None:
    weights, quant = load_finished(folder)
    for precisions in job.precisions:
        candidate = architecture.with_precision(precisions)
        for split, (images, labels) in context.splits.items():
            name = f"final-{split}-{precision_name(precisions)}"
            if read_scored(folder, name) is None:
                logits = deployed_logits(
                    candidate, weights, quant, context.mean, context.std, images, run_model, dialect_named(job.dialect)
                )
                write_scored(folder, candidate, epochs=0, cost_s=0.0, logits=logits, labels=labels, name=name)


def load_finished(folder: Path) -> tuple[Mapping[str, NDArray[np.float32]], QuantSpec]:
    """Weights (batch norm folded in) and int8 ranges of a finished student.

    Raises:
        StorageError: a file is missing or damaged.
    """
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except Exception as e:  # safetensors raises its own and OSError alike
        raise StorageError(f"{folder / WEIGHTS_FILE}: cannot be read: {e}. Delete the folder and run again") from e
    return weights, read_record(QuantSpec, folder / QUANT_FILE)


def finished_logits(folder: Path, split: str, precisions: tuple[Precision, ...]) -> NDArray[np.float32]:
    """Logits float32 [E, N, K] of a finished student on `val`, `test` or, where the data set has it, `solve`.

    Raises:
        StorageError: the file is missing or damaged.
    """
    name = f"final-{split}-{precision_name(precisions)}"
    scored = read_scored(folder, name)
    if scored is None:
        raise StorageError(f"{folder}: no logits '{name}'. Delete the folder and run again")
    return read_logits(folder, scored)


def kept_exits(trained: Candidate, deployed: Candidate) -> tuple[int, ...]:
    """Indices of the exits of a trained student that a deployed form of it has."""
    places = {e.after_stage for e in deployed.exits}
    return tuple(k for k, e in enumerate(trained.exits) if e.after_stage in places)


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
