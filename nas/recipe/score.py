"""Scores one candidate in a worker process: a student from the scorer, its logits in its deployed precision.

The same job function serves both scorers: `supernet` copies a student out of shared weights, `standalone` trains it for
some epochs (going on from its checkpoint). Results are files named by architecture, so nothing is scored twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from nas.core.errors import InterruptedRunError
from nas.core.jsonio import read_record, write_bytes, write_record
from nas.core.records import Candidate, Precision, QuantSpec
from nas.data import evenly
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import ORT, dialect_named
from nas.models.student import Student, folded_weights
from nas.recipe.context import Context, open_context
from nas.recipe.deployed import calibrated, deployed_logits
from nas.recipe.finish import precision_name
from nas.recipe.records import ScoredStudent, read_scored, write_scored
from nas.recipe.sensitivity import IMAGES, Sensitivity, sensitivity
from nas.recipe.supernet import inherited_student, open_supernet, shared_importance
from nas.train.evaluate import predict_logits
from nas.train.loop import EpochRecord
from nas.train.settings import DistillSettings
from nas.train.trainer import new_student, train_student

Source = Literal["supernet", "standalone"]

STUDENTS_KEPT = 4  # in the memory of a worker: what is scored next is often the same architecture in another precision


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One candidate to score, as a worker process receives it.

    `epochs` is where own training stops (0 with the supernet); `images` limits the training images used for batch norm
    (supernet) and int8 ranges. `dialect` is that of the device's runtime.
    """

    candidate: Candidate
    source: Source
    context: str
    students: str
    supernet: str
    stop_file: str
    distill: DistillSettings
    epochs: int
    seed: int
    images: int
    dialect: str = ORT.name

    @property
    def name(self) -> str:
        """Name of the score among those of the same architecture."""
        return f"{self.source}-{self.epochs}-{precision_name(self.candidate.precisions)}"


def student_folder(students: str, arch_id: str) -> Path:
    """Folder of one architecture."""
    return Path(students) / arch_id


def score(job: ScoreJob) -> ScoredStudent:
    """Scores a candidate, or gives the score that is there already, at no cost: what it took was counted then.

    Raises:
        TrainingError: the training diverged or learnt nothing.
        InterruptedRunError: the stop file appeared; the last epoch is kept.
    """
    folder = student_folder(job.students, job.candidate.arch_id)
    known = read_scored(folder, job.name)
    if known is not None:
        return replace(known, cost_s=0.0)
    started = time.thread_time()
    context = open_context(job.context, job.candidate.resolution)
    logits = deployed_answers(job, context, context.val)
    return write_scored(
        folder,
        job.candidate,
        epochs=job.epochs,
        cost_s=time.thread_time() - started,
        logits=logits,
        labels=context.val_labels,
        name=job.name,
    )


def deployed_answers(job: ScoreJob, context: Context, images: np.ndarray) -> np.ndarray:
    """Logits float32 [E, N, K] of a candidate's student in its deployed precision on images uint8 [N, H, W, 3]."""
    student, weights = _float_student(_of_architecture(job))
    if set(job.candidate.precisions) == {"fp32"} and context.device.type != "cpu":
        return predict_logits(student, images, context.mean, context.std)
    # On a processor the runtime answers fp32 in half the time that torch takes, with the graph that is exported.
    quant = _ranges(job, context, weights) if "int8" in job.candidate.precisions else None
    dialect = dialect_named(job.dialect)
    return deployed_logits(job.candidate, weights, quant, context.mean, context.std, images, dialect)


def candidate_sensitivity(job: ScoreJob, choices: tuple[Precision, ...]) -> Sensitivity:
    """What each part of a scored candidate loses in each precision; the student is the one that was scored."""
    context = open_context(job.context, job.candidate.resolution)
    _, weights = _float_student(_of_architecture(job))
    quant, images, dialect = _ranges(job, context, weights), evenly(context.val, IMAGES), dialect_named(job.dialect)
    return sensitivity(job.candidate, weights, quant, context.mean, context.std, images, choices, dialect)


def _of_architecture(job: ScoreJob) -> ScoreJob:
    """The job whose student, batch norm and ranges those of all precisions and thresholds are."""
    return replace(job, candidate=job.candidate.architecture, dialect=ORT.name)


@lru_cache(maxsize=STUDENTS_KEPT)
def _float_student(job: ScoreJob) -> tuple[Student, Mapping[str, np.ndarray]]:
    """The student of an architecture, and its weights with batch norm folded in; the last ones stay in memory."""
    context = open_context(job.context, job.candidate.resolution)
    folder = student_folder(job.students, job.candidate.arch_id)
    student = _inherited(job, context) if job.source == "supernet" else _trained(job, context, folder)
    return student, folded_weights(student)


def _ranges(job: ScoreJob, context: Context, weights: Mapping[str, np.ndarray]) -> QuantSpec:
    """Ranges of every tensor, computed for the first precision of an architecture and read for every other one."""
    file = student_folder(job.students, job.candidate.arch_id) / f"ranges-{job.source}-{job.epochs}-{job.images}.json"
    if file.exists():
        return read_record(QuantSpec, file)
    quant = calibrated(job.candidate, weights, context.mean, context.std, evenly(context.sample, job.images), run_model)
    write_record(file, quant)
    return quant


def _inherited(job: ScoreJob, context: Context) -> Student:
    sample = evenly(context.sample, job.images)
    supernet, importance = open_supernet(job.supernet), shared_importance(job.supernet)
    device = context.device
    return inherited_student(supernet, job.candidate, sample, context.mean, context.std, importance, device)


def _trained(job: ScoreJob, context: Context, folder: Path) -> Student:
    def stop_when_told(_: EpochRecord) -> None:
        if Path(job.stop_file).exists():
            raise InterruptedRunError("stopped at the end of an epoch")

    student = new_student(job.candidate.architecture, job.seed).to(context.device)
    checkpoint = folder / f"score-{job.epochs}.ckpt"
    if not checkpoint.exists():
        # From the longest shorter training; a longer one (of this architecture in another precision) is no start.
        shorter = {int(p.stem.partition("-")[2]): p for p in folder.glob("score-*.ckpt")}
        below = [epochs for epochs in shorter if epochs < job.epochs]
        if below:
            write_bytes(checkpoint, shorter[max(below)].read_bytes())
    train_student(
        student,
        context.targets,
        job.distill,
        seed=job.seed,
        stop_epoch=job.epochs,
        checkpoint=checkpoint,
        progress=stop_when_told,
    )
    return student
