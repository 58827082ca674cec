"""Settings of scorers and of finishing that need no torch, so that an experiment file is checked in a blink."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from nas.core.errors import ConfigError
from nas.train.settings import DistillSettings

ImportanceKind = Literal["taylor", "l1"]
PruneMode = Literal["after", "joint"]


@dataclass(frozen=True, slots=True)
class SupernetSettings:
    """How the shared weights are trained, once per run. The loss is that of `DistillSettings`.

    Fields:
        cpu_seconds: processor seconds of training; turned into a number of steps by timing a few of them.
        steps: number of steps instead; None: from `cpu_seconds`.
        batch_size: images per step, divided among the sub-networks of the step.
        random_subnets: random sub-networks per turn of the largest and the smallest: with 2 the order is largest,
            random, smallest, random, and from the start.
        networks_per_step: sub-networks whose gradients are added up in a step, the next ones of that order.
        lr: highest learning rate (AdamW).
        weight_decay: AdamW's decoupled decay, on kernels only.
        warmup: share of the steps with a rising learning rate; a cosine to 0 follows.
        clip_norm: largest norm of the gradient of a step, all its sub-networks together.
        checkpoint_steps: a killed training loses at most so many steps.
        seed: of the initial weights, the order of images and the sub-networks.
        latency_weight: weight of the distance of the expected latency to the first device's deadline in a learned
            distribution from which the random sub-networks are drawn; 0: they are drawn uniformly. It needs the latency
            of every layer of the space.
    """

    cpu_seconds: float = 150.0
    steps: int | None = None
    batch_size: int = 64
    random_subnets: int = 2
    networks_per_step: int = 2
    lr: float = 1e-2
    weight_decay: float = 0.02
    warmup: float = 0.06
    clip_norm: float = 5.0
    checkpoint_steps: int = 100
    seed: int = 0
    latency_weight: float = 0.0

    def __post_init__(self) -> None:
        where = "supernet"
        least = {"batch_size": 2, "random_subnets": 0, "networks_per_step": 1, "checkpoint_steps": 1, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{where}.{name}: must be at least {minimum}, got {getattr(self, name)}")
        if self.batch_size < 2 * self.networks_per_step:
            raise ConfigError(
                f"{where}.batch_size: {self.networks_per_step} sub-networks per step need at least "
                f"{2 * self.networks_per_step} images, got {self.batch_size}"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"{where}.steps: must be at least 1, got {self.steps}")
        for name in ("cpu_seconds", "lr", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{where}.{name}: must be above 0, got {value}")
        for name in ("weight_decay", "latency_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{where}.{name}: must be 0 or more, got {value}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"{where}.warmup: must be 0 or more and below 1, got {self.warmup}")


@dataclass(frozen=True, slots=True)
class StandaloneSettings:
    """Successive halving of students that are trained on their own.

    Fields:
        rungs: epochs after which a student is compared with all of the search that got so far; the last one is the
            length of the schedule.
        keep: the best share of the students seen at a rung goes on to the next, at least one. Students that were
            stopped in earlier batches may go on too, from their checkpoint.
    """

    rungs: tuple[int, ...] = (1, 2, 8)
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.rungs or self.rungs[0] < 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ConfigError(f"standalone.rungs: rising numbers of epochs are needed, got {list(self.rungs)}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"standalone.keep: must be above 0 and at most 1, got {self.keep}")


@dataclass(frozen=True, slots=True)
class QatSettings:
    """Quantization-aware training of a finished student, once per int8 precision; its loss is that of the distillation.

    Fields:
        epochs: passes over the training images; 0: none.
        lr: highest learning rate as a share of that of the distillation.
        least_loss: it is done where post-training quantization loses more than this (ratio) at one of the exits on
            search validation; -1: always.
    """

    epochs: int = 0
    lr: float = 0.1
    least_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ConfigError(f"finish.qat_epochs must be 0 or more, got {self.epochs}")
        if not 0 < self.lr <= 1:
            raise ConfigError(f"finish.qat_lr must be above 0 and at most 1, got {self.lr}")
        if not -1 <= self.least_loss < 1:
            raise ConfigError(f"finish.qat_least_loss must be a ratio from -1 to 1, got {self.least_loss}")


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """How a finished student becomes a narrower one.

    Fields:
        mode: `after`: its weights are cut, then distilled for `epochs`; `joint`: a new student as wide as it is
            distilled over the whole schedule, and narrower from step to step.
        importance: what is cut: `taylor`: the channels whose absence changes the distillation loss the least; `l1`:
            those with the smallest kernels.
        epochs: of the distillation after the cut.
        lr: highest learning rate of it, as a share of that of the distillation.
    """

    mode: PruneMode = "after"
    importance: ImportanceKind = "taylor"
    epochs: int = 8
    lr: float = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"finish.prune_epochs must be at least 1, got {self.epochs}")
        if not 0 < self.lr <= 1:
            raise ConfigError(f"finish.prune_lr must be above 0 and at most 1, got {self.lr}")

    def fine_tuning(self, distill: DistillSettings) -> DistillSettings:
        """The recipe after the cut; a curriculum is for new weights."""
        return replace(distill, epochs=self.epochs, lr=self.lr * distill.lr, curriculum=0.0)
