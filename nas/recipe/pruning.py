"""A finished student becomes a narrower one: importance of its channels, the cut, and distillation of what is left.

Two ways. `after`: the finished weights are cut once and distilled for some more epochs. `joint`: a new network as wide
as the parent is distilled over the whole schedule and becomes narrower on the way, so that what is left learns from the
start beside what goes (gradual pruning, Zhu and Gupta 2017, arXiv 1710.01878; differs: channels instead of weights, in
a few steps of equal size, the importance computed anew before each of them). How wide each block ends is known
beforehand in both, for that names the student.

Int8 comes afterwards, as for every finished student: prune, distil, quantise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from nas.compress.prune import (
    BlockImportance,
    between,
    gate_importance,
    gated_unit,
    kept_channels,
    l1_importance,
    narrowed,
    prunable,
    with_widths,
)
from nas.core.errors import StorageError
from nas.core.jsonio import write_bytes
from nas.core.records import Candidate, LayerSpec
from nas.data import even_places, evenly
from nas.models.hooks import Hook, hooked
from nas.models.student import ConvUnit, Student, folded_weights, module_name
from nas.recipe.settings import ImportanceKind, PruneSettings
from nas.train.compute import CPU, device_of
from nas.train.evaluate import normalised, threads
from nas.train.loop import EpochRecord
from nas.train.losses import student_loss
from nas.train.settings import DistillSettings
from nas.train.targets import Targets
from nas.train.trainer import new_student, train_student

IMPORTANCE_FILE = "importance.safetensors"  # of shared weights, and of the parent of a student that is cut
BATCH = 64  # images whose gradient is one sample of the importance
MOST_IMAGES, LEAST_IMAGES, PIXELS = 1024, BATCH, 2**20  # as many as have so many pixels: of 32 px 1024, of 128 px 64
JOINT_CUTS = (0.2, 0.3, 0.4, 0.5)  # shares of the schedule at which a quarter each of what goes is cut

Importance = Mapping[str, BlockImportance]
Progress = Callable[[EpochRecord], None]


@dataclass(frozen=True, slots=True, eq=False)
class PrunedStudent:
    """A narrower student that was distilled: how many epochs that took, and CPU seconds, importance included."""

    student: Student
    epochs: int
    cpu_s: float


def unfolded_student(
    candidate: Candidate, weights: Mapping[str, NDArray[np.float32]], targets: Targets, device: torch.device = CPU
) -> Student:
    """A student that can be trained on from weights into which batch norm was folded; it answers as they do.

    Batch norm gets the mean and deviation that its convolution has over training images, and the scale and shift that
    give them back: in training, with the statistics of a batch, the network is then the same but for their noise.

    Args:
        candidate: of the weights.
        weights: of `folded_weights`.
        targets: give the images.
        device: where the student shall be.
    """
    with torch.random.fork_rng(devices=[]):  # a student starts from random weights, which are not used here
        student = Student(candidate).to(device, memory_format=torch.channels_last)
    hooks: list[tuple[nn.Module, Hook]] = []
    for layer in student.layers:
        for spec in layer.convolutions:
            unit: ConvUnit = getattr(student.body[module_name(layer)], spec.name)
            base = f"{layer.name}.{spec.name}"
            bias = torch.from_numpy(weights[f"{base}.bias"].copy()).to(device)
            with torch.no_grad():
                unit.conv.weight.copy_(torch.from_numpy(weights[f"{base}.weight"].copy()))
                if unit.conv.bias is not None:
                    unit.conv.bias.copy_(bias)
            if unit.bn is not None:
                hooks.append((unit.conv, _absorb(unit.bn, bias)))
    # One pass over all images, layer after layer: each batch norm is set before the next layer sees its output.
    with threads(1), torch.no_grad(), hooked(hooks):
        student.eval()(normalised(evenly(targets.images[0], _images(targets)), targets.mean, targets.std, device))
    return student


def _images(targets: Targets) -> int:
    return max(LEAST_IMAGES, min(MOST_IMAGES, PIXELS // targets.images.shape[2] ** 2))


def _absorb(bn: nn.BatchNorm2d, bias: Tensor) -> Hook:
    """A hook that sets batch norm so that it adds `bias` to what passes now, and nothing else."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        mean, var = output.mean((0, 2, 3)), output.var((0, 2, 3), unbiased=False)
        assert bn.running_mean is not None  # made with running statistics
        assert bn.running_var is not None
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn.weight.copy_(torch.sqrt(var + bn.eps))
        bn.bias.copy_(bias + mean)

    return hook


def importance_of(
    student: Student, kind: ImportanceKind, targets: Targets, distill: DistillSettings
) -> dict[str, BlockImportance]:
    """How much each expansion channel of a trained student matters, by block.

    Args:
        student: with running statistics of batch norm.
        kind: `taylor`: by the first-order change of the distillation loss when it goes; `l1`: by its kernels alone.
        targets: images of the first variant, with the teacher's answers.
        distill: the loss.
    """
    if kind == "l1":
        return l1_importance(student.candidate, folded_weights(student))
    device = device_of(student)
    units = {name: _gated(student, layer) for name, layer in prunable(student.candidate).items()}
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in own] for name, own in units.items()}
    was_training = student.training
    student.eval()  # the gate is closed in the network as it will answer
    student.zero_grad()  # a training leaves its last gradients behind
    with threads(1):
        places = even_places(len(targets.labels), _images(targets))
        for start in range(0, len(places), BATCH):
            part = places[start : start + BATCH]
            images = normalised(targets.images[0][part], targets.mean, targets.std, device)
            outputs = student(images, distill.exit_gradient)
            logits = torch.tensor(targets.logits[0][part], device=device)
            labels = torch.tensor(targets.labels[part], device=device)
            student_loss(outputs, logits, labels, distill).backward()
            for name, own in units.items():
                for unit, found in zip(own, rows[name], strict=True):
                    found.append(_gate_gradient(unit))
            student.zero_grad()
    student.train(was_training)
    result = {}
    for name, found in rows.items():
        each = [gate_importance(torch.stack(r).cpu().double().numpy()) for r in found]
        result[name] = BlockImportance(each[0], each[1] if len(each) > 1 else np.empty(0))
    return result


def _gated(student: Student, layer: LayerSpec) -> list[ConvUnit]:
    """The units whose outputs are the channels of a block, and the hidden units of its squeeze-and-excitation."""
    block = student.body[module_name(layer)]
    return [getattr(block, name) for name in (gated_unit(layer), *(("se_reduce",) if layer.use_se else ()))]


def _gate_gradient(unit: ConvUnit) -> Tensor:
    """Gradient [C] by a gate of value 1 on each output of a unit, before its activation: relu(0) = hard_swish(0) = 0.

    With a gate z the output is z (scale x + shift), so the gradient is scale g_scale + shift g_shift.
    """
    of = unit.conv if unit.bn is None else unit.bn
    products = [p.detach() * p.grad for p in of.parameters() if p.grad is not None]
    return torch.stack([p.flatten(1).sum(1) if p.ndim > 1 else p for p in products]).sum(0)


def narrowed_student(student: Student, target: Candidate, importance: Importance) -> Student:
    """A new student with the most important channels of another one; batch norm keeps its statistics.

    Args:
        student: as wide as the importance.
        target: the same network with at most as many expanded channels in each block.
        importance: by block.
    """
    names = {module_name(layer): layer.name for layer in student.layers}
    arrays: dict[str, NDArray[np.generic]] = {}
    owners: dict[str, str] = {}
    for key, value in student.state_dict().items():
        _, module, rest = key.split(".", 2)  # body.stages_0_1.expand.conv.weight
        name = f"{names[module]}.{rest}"
        arrays[name], owners[name] = value.contiguous().cpu().numpy(), key
    left = narrowed(arrays, kept_channels(importance, target))
    with torch.random.fork_rng(devices=[]):
        result = Student(target)
    result.load_state_dict({owners[name]: torch.from_numpy(np.array(array)) for name, array in left.items()})
    return result.to(device_of(student), memory_format=torch.channels_last)


def importance_file(kind: ImportanceKind) -> str:
    """Name of the file in the folder of a finished student."""
    return f"importance-{kind}.safetensors"


def write_importance(path: Path, importance: Importance) -> None:
    """Keeps the importance of a network's channels in a file."""
    write_bytes(path, save(_arrays(importance)))


def read_importance(path: Path) -> dict[str, BlockImportance]:
    """What `write_importance` kept.

    Raises:
        StorageError: missing or damaged; the message says what to delete.
    """
    return _blocks(_opened(path))


@dataclass(frozen=True, slots=True, eq=False)
class SharedImportance:
    """Of the shared weights of a supernet: importance by block, and the widths in which each block was trained."""

    blocks: dict[str, BlockImportance]
    trained: dict[str, tuple[int, ...]]

    def widened(self, candidate: Candidate) -> Candidate:
        """The network from which a candidate is cut: every block in the next width in which it was trained."""
        widths = {}
        for name, layer in prunable(candidate).items():
            enough = [w for w in self.trained.get(name, ()) if w >= layer.expanded_channels and w != layer.in_channels]
            widths[name] = min(enough, default=layer.expanded_channels)
        return with_widths(candidate, widths)


def write_shared(path: Path, shared: SharedImportance) -> None:
    """Keeps the importance of shared weights in a file."""
    widths = {f"{name}|trained": np.array(widths, np.int64) for name, widths in shared.trained.items()}
    write_bytes(path, save(_arrays(shared.blocks) | widths))


def read_shared(path: Path) -> SharedImportance:
    """What `write_shared` kept.

    Raises:
        StorageError: missing or damaged; the message says what to delete.
    """
    arrays = _opened(path)
    ends = {name.removesuffix("|trained"): a for name, a in arrays.items() if name.endswith("|trained")}
    return SharedImportance(_blocks(arrays), {name: tuple(a.tolist()) for name, a in ends.items()})


def _arrays(importance: Importance) -> dict[str, NDArray[np.generic]]:
    return {
        f"{name}|{part}": np.ascontiguousarray(array)
        for name, block in importance.items()
        for part, array in (("channels", block.channels), ("squeeze", block.squeeze))
    }


def _blocks(arrays: Mapping[str, NDArray[np.float64]]) -> dict[str, BlockImportance]:
    names = [name.removesuffix("|channels") for name in arrays if name.endswith("|channels")]
    return {name: BlockImportance(arrays[f"{name}|channels"], arrays[f"{name}|squeeze"]) for name in names}


def _opened(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(path)
    except Exception as e:  # safetensors raises its own and OSError alike
        raise StorageError(f"{path}: cannot be read: {e}. Delete {path.parent} and run again") from e


def prune_student(
    parent: Candidate,
    weights: Mapping[str, NDArray[np.float32]],
    importance: Importance,
    target: Candidate,
    targets: Targets,
    distill: DistillSettings,
    settings: PruneSettings,
    *,
    seed: int,
    checkpoint: Path,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> PrunedStudent:
    """The narrower student, distilled; the same with and without a kill in between.

    Args:
        parent: the finished student that is cut.
        weights, importance: of the parent.
        target: the narrower network.
        targets: cached variants of the training images with the teacher's logits.
        distill: the recipe; its whole schedule with `joint`, its loss with `after`.
        settings: how.
        seed: of the order of images; with `joint` also of the initial weights.
        checkpoint: beginning of the checkpoints' names, to which a number and `.ckpt` are added.
        progress: called after every epoch; may raise to stop.
        device: where it is trained.

    Raises:
        TrainingError: the training diverged.
    """
    if settings.mode == "joint":
        return _prune_on_the_way(parent, target, targets, distill, settings, seed, checkpoint, progress, device)
    started = time.thread_time()
    student = narrowed_student(unfolded_student(parent, weights, targets, device), target, importance)
    spent = time.thread_time() - started
    tuned = settings.fine_tuning(distill)
    file = _numbered(checkpoint, 0)
    history = train_student(student, targets, tuned, seed=seed, checkpoint=file, progress=progress, is_trained=True)
    return PrunedStudent(student, len(history.epochs), history.cpu_s + spent)


def _prune_on_the_way(
    parent: Candidate,
    target: Candidate,
    targets: Targets,
    distill: DistillSettings,
    settings: PruneSettings,
    seed: int,
    checkpoint: Path,
    progress: Progress | None,
    device: torch.device,
) -> PrunedStudent:
    """Distillation in parts of one schedule, each with a checkpoint of its own, narrower from part to part."""
    student = new_student(parent, seed).to(device)
    ends = joint_ends(distill.epochs)
    spent = 0.0
    for part, end in enumerate([*ends, distill.epochs]):
        history = train_student(
            student,
            targets,
            distill,
            seed=seed,
            start_epoch=ends[part - 1] if part else 0,
            stop_epoch=end,
            checkpoint=_numbered(checkpoint, part),
            progress=progress,
            is_trained=part > 0,
        )
        spent += history.cpu_s
        if part < len(ends):
            started = time.thread_time()
            importance = importance_of(student, settings.importance, targets, distill)
            student = narrowed_student(student, between(parent, target, (part + 1) / len(ends)), importance)
            spent += time.thread_time() - started
    return PrunedStudent(student, distill.epochs, spent)


def _numbered(checkpoint: Path, part: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-{part}.ckpt")


def joint_ends(epochs: int) -> list[int]:
    """Epochs after which a network that is pruned on the way is cut: distinct, at least one epoch follows."""
    return sorted({min(epochs - 1, max(1, round(share * epochs))) for share in JOINT_CUTS})
