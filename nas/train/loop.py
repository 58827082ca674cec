"""Pieces that every training here is made of: schedule, batches, optimizer groups, guard, checkpoints."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.core.errors import DataError, RunMismatchError, StorageError, TrainingError
from nas.core.jsonio import write_bytes

CHECKPOINT_VERSION = 1
DIVERGED_FACTOR = 4.0  # times the loss of the first step; a training that learns stays below 1.5
BLANK_SHARE = 0.5  # of the schedule: by then the loss must be below that of the first step
BLANK_STEPS = 100  # at least: fewer steps may do little, and the loss of one batch is noisy


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch: mean loss, share of right answers of the head on its (augmented) images, CPU seconds."""

    epoch: int
    loss: float
    top1: float
    cpu_s: float


def lr_share(step: int, steps: int, warmup: float) -> float:
    """Share 0-1 of the highest learning rate at `step` (from 0): linear warm-up, then a cosine to 0 at `steps`."""
    rising = max(1.0, warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A random order of `count` images cut into batches.

    A last batch of a single image is left out: batch norm cannot take it. The order changes with every epoch, so it is
    another image each time.

    Raises:
        DataError: fewer than two images.
    """
    if count < 2:
        raise DataError(f"training needs at least 2 images, got {count}")
    yield from cut(rng.permutation(count), size)


def cut(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """An order of image numbers cut into batches, a last batch of a single image left out."""
    for start in range(0, len(order), size):
        part = order[start : start + size]
        if len(part) > 1:
            yield part


def steps_per_epoch(count: int, size: int) -> int:
    """Number of batches that `batches` gives."""
    return count // size + (count % size > 1)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: kernels decay; batch norm and biases do not."""
    kernels = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class LossGuard:
    """Ends a training that diverged or learns nothing, with the reason and a hint.

    Args:
        where: beginning of the messages.
        lr: for the hint.
        key: the setting that it came from, such as `distill.lr`.
    """

    def __init__(self, where: str, lr: float, key: str) -> None:
        self.where, self.lr = where, lr
        self._hint = f"try --set {key}={lr / 4:.1g}"
        self.first: float | None = None
        self.steps = 0

    def step(self, loss: float, epoch: int) -> None:
        """Call with the loss of every step.

        Raises:
            TrainingError: not finite, or several times the loss of the first step.
        """
        self.steps += 1
        if self.first is None:
            self.first = loss
        if not math.isfinite(loss) or loss > DIVERGED_FACTOR * max(self.first, 1.0):
            raise TrainingError(
                f"{self.where}: training diverged in epoch {epoch + 1} "
                f"(loss {loss:.3g}, {self.first:.3g} at the start) with lr {self.lr:g}; {self._hint}"
            )

    def epoch(self, mean_loss: float, epoch: int, epochs: int) -> None:
        """Call with the mean loss of every epoch.

        Raises:
            TrainingError: half of the schedule has passed and the loss is still that of the first step.
        """
        late = self.steps >= BLANK_STEPS and epoch + 1 >= BLANK_SHARE * epochs
        if late and self.first is not None and mean_loss >= self.first:
            raise TrainingError(
                f"{self.where}: nothing was learnt in {epoch + 1} of {epochs} epochs (loss {mean_loss:.3g}, "
                f"{self.first:.3g} at the start) with lr {self.lr:g}; {self._hint}, and look at the labels"
            )


def one_pass(
    indices: Iterable[np.ndarray],
    forward: Callable[[int, np.ndarray], tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    guard: LossGuard,
    lr: Callable[[int], float],
    *,
    clip_norm: float,
    epoch: int,
    clock: Callable[[], float] = time.thread_time,
    after_step: Callable[[int], None] | None = None,
) -> EpochRecord:
    """One epoch: a step of the optimizer for every batch.

    Args:
        indices: image numbers of each batch.
        forward: of step i, from 0, and its images: loss, logits [B, K] whose right answers are counted, labels [B].
        optimizer: of `parameters`, whose gradients are clipped to `clip_norm` together.
        parameters: what is trained.
        guard: looks at the loss of every step.
        lr: learning rate of step i.
        clip_norm: largest norm of the gradient of a step.
        epoch: number of the epoch.
        clock: CPU seconds.
        after_step: called with i when the weights of step i are there.

    Raises:
        TrainingError: from the guard.
    """
    started = clock()
    loss_sum, right, seen = 0.0, 0, 0
    for i, index in enumerate(indices):
        for group in optimizer.param_groups:
            group["lr"] = lr(i)
        loss, logits, labels = forward(i, index)
        value = loss.item()
        guard.step(value, epoch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        if after_step is not None:
            after_step(i)
        loss_sum += value * len(index)
        right += int((logits.detach().argmax(1) == labels).sum())
        seen += len(index)
    return EpochRecord(epoch, loss_sum / seen, right / seen, clock() - started)


def write_checkpoint(path: Path, identity: str, content: Mapping[str, Any]) -> None:
    """Replaces a checkpoint atomically; `content` holds tensors and plain types only.

    Raises:
        StorageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, "identity": identity, **content}, buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """Content of a checkpoint, or None when there is no file; only tensors and plain types are ever read from it.

    Raises:
        StorageError: not a whole checkpoint of this version; the message says what to delete.
        RunMismatchError: it belongs to another training.
    """
    if not path.exists():
        return None
    try:
        content = dict(torch.load(path, weights_only=True, map_location="cpu"))
        version, owner = content.pop("version"), content.pop("identity")
    except Exception as e:  # torch raises many types for a damaged or foreign file; all mean the same to the user
        raise StorageError(
            f"{path}: not a checkpoint ({type(e).__name__}: {str(e).partition(chr(10))[0]}). "
            f"Delete it to train from the start"
        ) from e
    if version != CHECKPOINT_VERSION:
        raise StorageError(
            f"{path}: checkpoint of version {version!r}, expected {CHECKPOINT_VERSION}. "
            f"Delete it to train from the start"
        )
    if owner != identity:
        raise RunMismatchError(
            f"{path}: this checkpoint belongs to another network, seed, teacher, data set or settings. "
            f"Delete it to train from the start, or undo the change"
        )
    return content


def epochs_to_plain(epochs: list[EpochRecord]) -> list[list[float]]:
    """Epoch records as plain lists for a checkpoint."""
    return [[e.epoch, e.loss, e.top1, e.cpu_s] for e in epochs]


def epochs_from_plain(epochs: list[list[float]]) -> list[EpochRecord]:
    """Epoch records of a checkpoint."""
    return [EpochRecord(int(number), loss, top1, cpu_s) for number, loss, top1, cpu_s in epochs]
