"""Distillation of one student from cached targets: one thread, resumable at every epoch.

The same arguments give the same weights, whether or not the process was killed in between: the order of images depends
on (seed, epoch) only (and on how the student did so far, where hard samples are mined), and a checkpoint holds weights,
optimizer, average, adapters and those distances. On a GPU they are the same up to the order in which it adds.

Batch norm, decided 2026-11: the student's momentum of 0.01 (Howard et al. 2019) needs hundreds of steps to follow the
weights, a short training has fewer, and students were evaluated at chance after one epoch. Raising the momentum lags
too, and averages weights that no longer exist. So running statistics are left out of training; when it stops they are
estimated once from `recalibration_images` training images with the final weights (`recalibrate_bn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.core.jsonio import content_hash
from nas.core.records import Candidate
from nas.data import evenly
from nas.models.student import Student, attention_maps
from nas.train.compute import device_of, mixed_precision
from nas.train.curriculum import distances, easy_ranks, images_of_epoch
from nas.train.evaluate import recalibrate_bn, threads
from nas.train.features import Adapters, stage_maps, student_features
from nas.train.feed import Feed
from nas.train.loop import (
    EpochRecord,
    LossGuard,
    batches,
    cut,
    epochs_from_plain,
    epochs_to_plain,
    lr_share,
    one_pass,
    parameter_groups,
    read_checkpoint,
    steps_per_epoch,
    write_checkpoint,
)
from nas.train.losses import student_loss
from nas.train.settings import DistillSettings
from nas.train.targets import Targets


@dataclass(frozen=True, slots=True)
class History:
    """All epochs of a student, those before a restart included."""

    epochs: tuple[EpochRecord, ...]

    @property
    def cpu_s(self) -> float:
        return sum(e.cpu_s for e in self.epochs)


def new_student(candidate: Candidate, seed: int) -> Student:
    """An untrained student; its weights depend on candidate and seed only, torch's global generator stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(candidate).to(memory_format=torch.channels_last)


def train_student(
    student: Student,
    targets: Targets,
    settings: DistillSettings,
    *,
    seed: int,
    start_epoch: int = 0,
    stop_epoch: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    is_trained: bool = False,
) -> History:
    """Trains `student` in place up to `stop_epoch`; it is ready for evaluation afterwards.

    Args:
        student: from `new_student`, or with inherited weights; it is trained where they are.
        targets: cached variants of the training images with the teacher's logits.
        settings: `settings.epochs` is the length of the learning rate's schedule, whatever `stop_epoch` is.
        seed: of the order of images and of the first variant.
        start_epoch: epochs of the schedule that the student has behind it; the optimizer starts anew.
        stop_epoch: epochs in total after which to stop; None: the whole schedule.
        checkpoint: file that is written at every epoch's end and resumed from when it is there.
        progress: called after every epoch, its checkpoint written; may raise to stop.
        is_trained: its weights were trained before, so a loss that does not fall is no failure.

    Raises:
        TrainingError: the loss is not finite, runs away, or does not fall.
        RunMismatchError: the checkpoint belongs to another student, other settings, targets or seed.
        StorageError: the checkpoint cannot be read or written.
    """
    stop = settings.epochs if stop_epoch is None else min(stop_epoch, settings.epochs)
    identity = content_hash(
        [student.candidate.arch_id, settings, targets.key, seed, *([start_epoch] if start_epoch else [])]
    )
    student.to(memory_format=torch.channels_last)
    training = _Training(student, targets, settings, seed)
    done: list[EpochRecord] = []
    if checkpoint is not None and (content := read_checkpoint(checkpoint, identity)) is not None:
        done = epochs_from_plain(content["epochs"])
        training.load(content)
    with threads(1), _no_running_statistics(student):
        for epoch in range(start_epoch + len(done), stop):
            student.train()
            record = training.one_epoch(epoch)
            if not is_trained:
                training.guard.epoch(record.loss, epoch, settings.epochs)
            done.append(record)
            if checkpoint is not None:
                write_checkpoint(checkpoint, identity, {**training.content(), "epochs": epochs_to_plain(done)})
            if progress is not None:
                progress(record)
    if training.average:
        with torch.no_grad():
            for name, p in student.named_parameters():
                p.copy_(training.average[name])
    recalibrate_bn(student, evenly(targets.images[0], settings.recalibration_images), targets.mean, targets.std)
    student.eval()
    return History(tuple(done))


class _Training:
    """State of one training; everything that an epoch changes is in a checkpoint."""

    def __init__(self, student: Student, targets: Targets, settings: DistillSettings, seed: int) -> None:
        self.student, self.targets, self.settings, self.seed = student, targets, settings, seed
        self.features = student_features(student, targets.features, settings)
        self.feed = Feed(targets, self.features, device_of(student))
        self.adapters = Adapters(student, self.features, seed).to(self.feed.device)
        groups = parameter_groups(nn.ModuleList([student, self.adapters]), settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        self.average = {name: p.detach().clone() for name, p in student.named_parameters()} if settings.ema else {}
        self.guard = LossGuard(f"student {student.candidate.arch_id}", settings.lr, "distill.lr")
        self.distance = np.zeros(len(targets.labels), dtype=np.float32)  # to the teacher, where it is mined
        self.ranks = easy_ranks(targets) if settings.curriculum or settings.mining else None

    def content(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "weights": dict(self.student.state_dict()),
            "adapters": dict(self.adapters.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "distance": torch.from_numpy(self.distance),
            "first_loss": self.guard.first,
        }

    def load(self, content: dict[str, Any]) -> None:
        """Goes on from a checkpoint's content."""
        self.student.load_state_dict(content["weights"])
        self.adapters.load_state_dict(content["adapters"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.average = {name: value.to(self.feed.device) for name, value in content["average"].items()}
        self.guard.first = content["first_loss"]
        self.distance = content["distance"].numpy()

    def one_epoch(self, epoch: int) -> EpochRecord:
        """Passes over one variant of the training images."""
        settings, targets = self.settings, self.targets
        variant = (epoch + self.seed) % targets.variants
        first = epoch * steps_per_epoch(len(targets.labels), settings.batch_size)
        steps = settings.epochs * steps_per_epoch(len(targets.labels), settings.batch_size)

        def forward(_step: int, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.feed.batch(variant, index)
            attended.clear()
            with mixed_precision(self.feed.device):
                outputs = self.student(batch.images, settings.exit_gradient)
            outputs = [logits.float() for logits in outputs]
            pairs = None
            if batch.features:
                pairs = self.adapters.pairs([m.float() for m in maps], [m.float() for m in attended], batch.features)
            if settings.mining:
                self.distance[np.sort(index)] = distances(outputs[-1], batch.logits, batch.labels)
            return student_loss(outputs, batch.logits, batch.labels, settings, pairs), outputs[-1], batch.labels

        def average(step: int) -> None:
            _update_average(self.average, self.student, settings.ema, first + step)

        with (
            stage_maps(self.student) if self.features else nullcontext([]) as maps,
            attention_maps(self.student) if self.features else nullcontext([]) as attended,
        ):
            return one_pass(
                self._batches(epoch),
                forward,
                self.optimizer,
                [*self.student.parameters(), *self.adapters.parameters()],
                self.guard,
                lambda step: settings.lr * lr_share(first + step, steps, settings.warmup),
                clip_norm=settings.clip_norm,
                epoch=epoch,
                after_step=average if self.average else None,
            )

    def _batches(self, epoch: int) -> Iterator[np.ndarray]:
        size, rng = self.settings.batch_size, np.random.default_rng([self.seed, epoch])
        if self.ranks is None:
            return batches(len(self.targets.labels), size, rng)
        return cut(images_of_epoch(self.settings, epoch, self.ranks, self.distance, rng), size)


def _update_average(average: dict[str, Tensor], student: Student, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # early weights are forgotten faster, as in TensorFlow's average
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), list(student.parameters()), 1 - decay)


@contextmanager
def _no_running_statistics(student: Student) -> Iterator[None]:
    """Batch norm keeps no running statistics while training: they are estimated at its end."""
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
