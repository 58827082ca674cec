"""Settings of teachers and of distillation: frozen records, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from nas.core.errors import ConfigError, did_you_mean

Accelerator = Literal["cpu", "cuda"]
TeacherKind = Literal["resnet", "torchvision", "onnx"]
TeacherPixels = Literal["dataset", "imagenet", "unit", "raw"]
MOST_ASSISTANTS = 2


@dataclass(frozen=True, slots=True)
class TeacherMember:
    """One of several networks that teach together. What is not given is as in the section `teacher`.

    `name`: of the contributor. `weight`: its share in the mean, relative to the others. `kind`: resnet, torchvision or
    onnx. `model`: torchvision's name of the model. `weights`: path of its weights or .onnx file. `pixels`: what a given
    model expects as input. `resolution`: side in pixels at which it sees the images. `widths`: channels of each stage
    of the resnet. `blocks`: basic blocks per stage. `epochs`: passes over the training images. `seed`: of its training.
    """

    name: str
    weight: float | None = None
    kind: TeacherKind | None = None
    model: str | None = None
    weights: str | None = None
    pixels: TeacherPixels | None = None
    resolution: int | None = None
    widths: tuple[int, ...] | None = None
    blocks: int | None = None
    epochs: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class SoftLabelFile:
    """Soft labels of the training images that somebody contributed as a file.

    `name`: of the contributor. `path`: a .csv, .npy or .npz file (docs/students.md says what is in it). `weight`: its
    share in the mean, relative to the other contributors. `values`: probabilities that sum to 1, or logits.
    `partial`: images may be missing in the file; the mean of such an image is that of the other contributors.
    """

    name: str
    path: str
    weight: float = 1.0
    values: Literal["probabilities", "logits"] = "probabilities"
    partial: bool = False


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Which teacher, and how the built-in one is trained; alone or as one of several contributors.

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
        members: several networks that teach together instead of one, such as [{name: a, seed: 0}, {name: b, seed: 1}];
            each has a name, and what it does not say is as in this section.
        files: soft labels of the training images from files, such as [{name: lab, path: lab.csv}].
        weight: share of the network in the mean, relative to `files`; with 0 it is only compared with.
        average: what is averaged over contributors: probabilities, or logits (the geometric mean of probabilities).
        without: names of members and files that are left out: nothing of them is read or taken from a cache.
    """

    kind: TeacherKind = "resnet"
    name: str = ""
    weights: str | None = None
    pixels: TeacherPixels = "dataset"
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
    members: tuple[TeacherMember, ...] = ()
    files: tuple[SoftLabelFile, ...] = ()
    weight: float = 1.0
    average: Literal["probabilities", "logits"] = "probabilities"
    without: tuple[str, ...] = ()

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
        self._check_contributors()
        if self.members:
            return  # each of them is checked as a teacher of its own
        if self.kind != "resnet" and not self.weights:
            raise ConfigError(
                f"{where}.weights: a teacher of kind {self.kind!r} needs the path of its "
                f"{'.onnx file' if self.kind == 'onnx' else 'weights'}; set {where}.weights, "
                f"or {where}.kind to 'resnet' to train one on the spot"
            )
        if self.kind == "torchvision" and not self.name:
            raise ConfigError(f"{where}.name: kind 'torchvision' needs the name of the model, such as 'resnet50'")

    def _check_contributors(self) -> None:
        names = [c.name for c in (*self.members, *self.files)]
        for name in names:
            if not name.strip() or names.count(name) > 1:
                raise ConfigError(f"teacher: every member and file needs a name of its own, got {names}")
        for name in self.without:
            if name not in names:
                known = f" (names: {', '.join(names)})" if names else "; there are no members and no files"
                raise ConfigError(f"teacher.without: no contributor {name!r}{did_you_mean(name, names)}{known}")
        networks, files = self.networks, self.used_files
        if not networks:
            raise ConfigError(
                "teacher.without: no network is left, with which students are compared; keep one of teacher.members "
                "(with weight 0 it teaches nothing)"
            )
        weights = [n.settings.weight for n in networks] + [f.weight for f in files]
        if any(not (math.isfinite(w) and w >= 0) for w in weights) or (names and not sum(weights) > 0):
            raise ConfigError(f"teacher: weights must be 0 or more, and one of them above 0, got {weights}")
        if files and all(f.partial or not f.weight for f in files) and not any(n.settings.weight for n in networks):
            raise ConfigError("teacher.files: no network teaches, so one file must hold all images: partial: false")

    @property
    def networks(self) -> tuple[NetworkTeacher, ...]:
        """Each network that is not left out, as a teacher of its own."""
        if not self.members:
            return (NetworkTeacher("network", _alone(self) if self.files else self),)
        return tuple(NetworkTeacher(m.name, _of_member(self, m)) for m in self.members if m.name not in self.without)

    @property
    def used_files(self) -> tuple[SoftLabelFile, ...]:
        """Files of soft labels that are not left out."""
        return tuple(f for f in self.files if f.name not in self.without)


@dataclass(frozen=True, slots=True)
class NetworkTeacher:
    """One network among the contributors; its `settings` name no other."""

    name: str
    settings: TeacherSettings


def _alone(shared: TeacherSettings) -> TeacherSettings:
    return replace(shared, members=(), files=(), without=())


def _of_member(shared: TeacherSettings, member: TeacherMember) -> TeacherSettings:
    own = {f.name: getattr(member, f.name) for f in fields(member) if f.name not in ("name", "model")}
    own |= {"name": member.model, "members": (), "files": (), "without": ()}
    try:
        return replace(shared, **{name: value for name, value in own.items() if value is not None})
    except ConfigError as e:
        raise ConfigError(f"teacher.members ({member.name}): {e}") from None


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
        hints: weight of feature hints (Romero et al. 2015): maps of the student, through learned 1x1 adapters that are
            never exported, shall equal those of the teacher; 0: off. Students of their own only, not the supernet.
        attention: weight of attention transfer (Zagoruyko and Komodakis 2017): the student shall be active where the
            teacher is; 0: off. Students of their own only.
        attention_maps: weight of the last attention maps (Wang et al. 2020, MiniLM): what each place of the image
            attends to in the student shall be what it attends to in the teacher, a vision transformer of torchvision.
            Students without a block of attention have no such term; 0: off. Students of their own only, not the
            supernet.
        teacher_layers: layers of the teacher for these three, first to last, by their names in torch, such as
            ["layer2", "layer4"]; the last is compared with the student's last stage, the others evenly before. Empty:
            the end of every stage of the resnet; a torchvision teacher needs names. A multi-head attention among them
            is the one for attention_maps; without it: the last one of the teacher.
        dist_inter: weight of the relations of DIST (Huang et al. 2022) between the classes of an image; the paper has 2
            for this and the next with `alpha` 0; 0: off.
        dist_intra: weight of its relations between the images of a class; 0: off.
        dist_temperature: T of the softmax of these relations.
        self_distillation: weight of what the early exits learn from the student's own head (Zhang et al. 2019) beside
            the teacher; 0: off.
        curriculum: share of the epochs over which training images are admitted, easy ones first; 0: all from the start.
            Easy is what the teacher is sure of. Every epoch has the same number of steps.
        curriculum_start: share of each class's images with which a curriculum starts.
        mining: share of an epoch's images that is drawn by how far the student is from a teacher who is sure and right;
            0: every image once.
        assistants: networks of middle size between the teacher and finalists that are much smaller (Mirzadeh et al.
            2020): each learns from the one before and teaches the next. A number of them, or `auto`: one where the
            teacher is at least 20 times as large.
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
    hints: float = 0.0
    attention: float = 0.0
    attention_maps: float = 0.0
    teacher_layers: tuple[str, ...] = ()
    dist_inter: float = 0.0
    dist_intra: float = 0.0
    dist_temperature: float = 1.0
    self_distillation: float = 0.0
    curriculum: float = 0.0
    curriculum_start: float = 0.3
    mining: float = 0.0
    assistants: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        where = "distill"
        _at_least(where, 1, epochs=self.epochs, variants=self.variants)
        _at_least(where, 2, batch_size=self.batch_size, recalibration_images=self.recalibration_images)
        _above_zero(where, lr=self.lr, temperature=self.temperature, clip_norm=self.clip_norm)
        _above_zero(where, dist_temperature=self.dist_temperature, curriculum_start=self.curriculum_start)
        _share(where, curriculum=self.curriculum, curriculum_start=self.curriculum_start, mining=self.mining, upper=1.0)
        _not_negative(where, hints=self.hints, attention=self.attention, self_distillation=self.self_distillation)
        _not_negative(where, attention_maps=self.attention_maps)
        _not_negative(where, dist_inter=self.dist_inter, dist_intra=self.dist_intra)
        if len(set(self.teacher_layers)) != len(self.teacher_layers):
            raise ConfigError(f"{where}.teacher_layers: each layer once, got {list(self.teacher_layers)}")
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
        if self.assistants != "auto" and not 0 <= self.assistants <= MOST_ASSISTANTS:
            raise ConfigError(
                f"{where}.assistants: must be from 0 to {MOST_ASSISTANTS}, or auto, got {self.assistants}"
            )
        if any(not (math.isfinite(w) and w >= 0) for w in self.exit_weights):
            raise ConfigError(f"{where}.exit_weights: must be 0 or more, got {list(self.exit_weights)}")

    @property
    def feature_losses(self) -> tuple[str, ...]:
        """Names of the losses that are on and need features of the teacher: `hints`, `attention`, `attention_maps`."""
        weights = {"hints": self.hints, "attention": self.attention, "attention_maps": self.attention_maps}
        return tuple(name for name, weight in weights.items() if weight)


def _at_least(where: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{where}.{name}: must be at least {least}, got {value}")


def _above_zero(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{where}.{name}: must be above 0, got {value}")


def _not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{where}.{name}: must be 0 or more, got {value}")


def _share(where: str, upper: float = 0.999, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= upper:
            raise ConfigError(f"{where}.{name}: must be from 0 to {upper:g}, got {value}")
