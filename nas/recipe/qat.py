"""Quantization-aware training: a finished student learns to live with the rounding of its int8 network.

Source: Jacob et al. 2018, arXiv 1712.05877; with the teacher's cached logits as targets (Mishra and Marr 2018, arXiv
1711.05852). It begins at post-training quantization, with a small learning rate, and forgets the optimizer of the
distillation. Like it, it is the same whether or not the process was killed in between: every epoch leaves a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.compress.fakequant import FakeQuantNetwork
from nas.core.jsonio import content_hash
from nas.core.records import Candidate, QuantSpec
from nas.recipe.settings import QatSettings
from nas.train.compute import device_of
from nas.train.evaluate import EVAL_BATCH, raw_tensor, threads
from nas.train.feed import Feed
from nas.train.loop import (
    EpochRecord,
    LossGuard,
    batches,
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

WARMUP = 0.1  # share of the steps with a rising learning rate; a cosine to 0 follows
FROZEN = 0.3  # share of the steps, the last ones, in which the ranges of the tensors stay as they are


def train_quantized(
    network: FakeQuantNetwork,
    candidate: Candidate,
    targets: Targets,
    distill: DistillSettings,
    settings: QatSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
) -> tuple[EpochRecord, ...]:
    """Trains weights and ranges of a network in place, where it is; the epochs, those before a restart included.

    Args:
        network: with the weights and ranges of post-training quantization.
        candidate: what it was made from.
        targets: cached variants of the training images with the teacher's logits.
        distill: the recipe of the finished student: loss, batch, and the learning rate of which a share is taken.
        settings: of this training.
        seed: of the order of images and of the first variant.
        checkpoint: file that is written at every epoch's end and resumed from when it is there.
        progress: called after every epoch, its checkpoint written; may raise to stop.

    Raises:
        TrainingError: the loss is not finite or runs away.
        RunMismatchError: the checkpoint belongs to another student, other settings, targets or seed.
        StorageError: the checkpoint cannot be read or written.
    """
    identity = content_hash([candidate.with_thresholds((None,) * len(candidate.exits)), distill, settings])
    identity = content_hash([identity, network.ranges(), targets.key, seed])
    lr = settings.lr * distill.lr
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.0), lr=lr, fused=True)
    guard = LossGuard(f"student {candidate.arch_id}, QAT", lr, "finish.qat_lr")
    done: list[EpochRecord] = []
    if checkpoint is not None and (content := read_checkpoint(checkpoint, identity)) is not None:
        done, guard.first = epochs_from_plain(content["epochs"]), content["first_loss"]
        network.load_state_dict(content["weights"])
        network.set_ranges(QuantSpec(content["lo"], content["hi"], network.ranges().images))
        optimizer.load_state_dict(content["optimizer"])
    with threads(1):
        for epoch in range(len(done), settings.epochs):
            record = _one_epoch(network, targets, distill, settings, seed, epoch, optimizer, guard)
            done.append(record)
            if checkpoint is not None:
                write_checkpoint(checkpoint, identity, _content(network, optimizer, done, guard))
            if progress is not None:
                progress(record)
    network.observes = False
    return tuple(done)


def _content(
    network: FakeQuantNetwork, optimizer: torch.optim.Optimizer, done: list[EpochRecord], guard: LossGuard
) -> dict[str, Any]:
    ranges = network.ranges()
    return {
        "weights": dict(network.state_dict()),
        "lo": ranges.lo,
        "hi": ranges.hi,
        "optimizer": optimizer.state_dict(),
        "epochs": epochs_to_plain(done),
        "first_loss": guard.first,
    }


def _one_epoch(
    network: FakeQuantNetwork,
    targets: Targets,
    distill: DistillSettings,
    settings: QatSettings,
    seed: int,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    guard: LossGuard,
) -> EpochRecord:
    variant, feed = (epoch + seed) % targets.variants, Feed(targets, {}, device_of(network), is_raw=True)
    count = len(targets.labels)
    first = epoch * steps_per_epoch(count, distill.batch_size)
    steps = settings.epochs * steps_per_epoch(count, distill.batch_size)

    def forward(step: int, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        network.observes = first + step < (1 - FROZEN) * steps
        batch = feed.batch(variant, index)
        outputs = network(batch.images, distill.exit_gradient)
        return student_loss(outputs, batch.logits, batch.labels, distill), outputs[-1], batch.labels

    return one_pass(
        batches(count, distill.batch_size, np.random.default_rng([seed, epoch])),
        forward,
        optimizer,
        list(network.parameters()),
        guard,
        lambda step: settings.lr * distill.lr * lr_share(first + step, steps, WARMUP),
        clip_norm=distill.clip_norm,
        epoch=epoch,
    )


def simulated_logits(network: FakeQuantNetwork, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits float32 [E, N, K] of the simulation, for uint8 images [N, H, W, 3]; one thread."""
    network.observes = False
    parts = []
    with threads(1), torch.inference_mode():
        for start in range(0, len(images), EVAL_BATCH):
            outputs = network(raw_tensor(images[start : start + EVAL_BATCH], device_of(network)))
            parts.append(torch.stack(outputs).cpu().numpy())
    return np.concatenate(parts, axis=1)
