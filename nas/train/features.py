"""Feature maps that student and teacher compare: which ones, how the teacher's are kept, adapters for the student's.

The teacher's maps are cached beside its logits, so they are made small: hints are averaged to `HINT_SIDE` pixels a
side, of attention one map per layer is kept, scaled to unit length (the loss does not see the scale).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.core.errors import ConfigError
from nas.models.hooks import Hook, hooked
from nas.models.student import Student, module_name
from nas.train.losses import FeaturePairs, attention_map
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.teacher import Teacher

HINT_SIDE = 4  # 7 KB an image for three layers of the built-in teacher; larger maps would outgrow the images
HINT, ATTENTION = "hint.", "attention."  # beginnings of the names of cached features; the layer's name follows
_KINDS = {"hints": HINT, "attention": ATTENTION}
_HALF_MAX = float(np.finfo(np.float16).max)


def check_teacher_features(teacher: TeacherSettings, distill: DistillSettings) -> None:
    """Refuses losses that need what a teacher of this kind does not give, before any long work.

    Raises:
        ConfigError: names the setting and what to change.
    """
    networks = [network.settings for network in teacher.networks]
    for name in distill.feature_losses:
        if len(networks) > 1:
            raise ConfigError(
                f"distill.{name}: {len(networks)} networks teach together, and this loss needs the feature maps of "
                f"one. Keep one of teacher.members, or switch the loss off: --set distill.{name}=0"
            )
        teacher = networks[0]
        if teacher.kind not in ("resnet", "torchvision"):
            raise ConfigError(
                f"distill.{name}: a teacher of kind {teacher.kind!r} gives logits only, this loss needs its feature "
                f"maps. Use teacher.kind 'resnet' or 'torchvision', or switch the loss off: --set distill.{name}=0"
            )
        if teacher.kind == "torchvision" and not distill.teacher_layers:
            raise ConfigError(
                f"distill.teacher_layers: distill.{name} needs the layers of the torchvision teacher {teacher.name!r} "
                f"whose maps are compared, such as --set 'distill.teacher_layers=[layer2, layer4]' for a resnet"
            )


def wanted_features(teacher: Teacher, distill: DistillSettings) -> tuple[str, ...]:
    """Names of the features that the losses of `distill` need, empty where they need none.

    Raises:
        ConfigError: the teacher gives no features.
    """
    if not distill.feature_losses:
        return ()
    if teacher.features is None:
        raise ConfigError(
            f"distill.{distill.feature_losses[0]}: the teacher {teacher.name} gives logits only, this loss needs its "
            f"feature maps. Use one teacher of kind 'resnet' or 'torchvision', or switch the loss off: "
            f"--set distill.{distill.feature_losses[0]}=0"
        )
    layers = distill.teacher_layers or teacher.feature_layers
    return tuple(_KINDS[name] + layer for name in distill.feature_losses for layer in layers)


def needed_features(cached: Mapping[str, np.ndarray], distill: DistillSettings) -> dict[str, np.ndarray]:
    """Those of the cached features that the losses of `distill` need.

    Raises:
        ConfigError: none are cached for a loss that is on.
    """
    found: dict[str, np.ndarray] = {}
    for name in distill.feature_losses:
        own = {key: value for key, value in cached.items() if key.startswith(_KINDS[name])}
        if not own:
            raise ConfigError(
                f"distill.{name}: the cached targets hold no features for it. Run the same command again with "
                f"another cache (--set run.cache=DIR), or switch the loss off: --set distill.{name}=0"
            )
        found |= own
    return found


def reduced(name: str, features: np.ndarray) -> np.ndarray:
    """What is kept of a layer's maps float32 [B, C, H, W]: float16, [B, C, h, w] for hints, [B, 1, H, W] for attention.

    Args:
        name: beginning with `HINT` or `ATTENTION`.
        features: maps of that layer.
    """
    x = torch.from_numpy(features)
    if name.startswith(HINT):
        side = min(HINT_SIDE, x.shape[-1])
        x = functional.adaptive_avg_pool2d(x, side).clamp(-_HALF_MAX, _HALF_MAX)
    else:
        x = attention_map(x)
        x = functional.normalize(x.flatten(1)).reshape(x.shape)
    return x.numpy().astype(np.float16)


def layer_of(name: str) -> str:
    """The teacher's layer of a feature."""
    return name.removeprefix(HINT).removeprefix(ATTENTION)


def compared_stages(layers: int, stages: int) -> list[int]:
    """The student's stage for each of the teacher's layers: the last for the last, the others evenly before."""
    return [max(0, round((k + 1) * stages / layers) - 1) for k in range(layers)]


class Adapters(nn.Module):
    """Learned 1x1 convolutions from the student's channels to the teacher's, one per hint; trained along, not exported.

    Args:
        student: gives the channels of its stages.
        features: cached features of the teacher by name; those of hints count.
        seed: of the initial weights; torch's global generator stays untouched.
    """

    def __init__(self, student: Student, features: Mapping[str, np.ndarray], seed: int) -> None:
        super().__init__()
        names = [name for name in features if name.startswith(HINT)]
        stages = student.candidate.stages
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convs = nn.ModuleList(
                nn.Conv2d(stages[stage].blocks[-1].out_channels, features[name].shape[2], 1)
                for name, stage in zip(names, compared_stages(len(names), len(stages)), strict=True)
            )

    def pairs(self, maps: Sequence[Tensor], teacher: Mapping[str, Tensor]) -> FeaturePairs:
        """The pairs of one step.

        Args:
            maps: the student's map behind every stage, [B, C, H, W].
            teacher: features of the batch by name, [B, ...], in the order in which they are cached.
        """
        hints = [t for name, t in teacher.items() if name.startswith(HINT)]
        attention = [t for name, t in teacher.items() if name.startswith(ATTENTION)]
        hinted = zip(self.convs, compared_stages(len(hints), len(maps)), hints, strict=True)
        attended = zip(compared_stages(len(attention), len(maps)), attention, strict=True)
        return FeaturePairs(
            tuple((conv(maps[stage]), t) for conv, stage, t in hinted),
            tuple((attention_map(maps[stage]), t) for stage, t in attended),
        )


@contextmanager
def stage_maps(student: Student) -> Iterator[list[Tensor]]:
    """A list that holds, after each forward pass inside, the student's map behind every stage."""
    last = {int(layer.name.split(".")[1]): layer for layer in student.layers if layer.name.startswith("stages.")}
    maps = [torch.empty(0)] * len(last)

    def keeper(stage: int) -> Hook:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            maps[stage] = output

        return keep

    with hooked((student.body[module_name(layer)], keeper(stage)) for stage, layer in last.items()):
        yield maps
