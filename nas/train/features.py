"""Feature maps that student and teacher compare: which ones, how the teacher's are kept, adapters for the student's.

The teacher's maps are cached beside its logits, so they are made small: hints are averaged to `HINT_SIDE` pixels a
side, of attention one map per layer is kept, scaled to unit length (the loss does not see the scale), and of what each
token of a transformer attends to the mean over the heads, with at most `MAP_SIDE` tokens a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.core.errors import ConfigError, did_you_mean
from nas.models.hooks import Hook, hooked
from nas.models.student import Student, attention_maps, module_name
from nas.models.teachers import torchvision_attention
from nas.train.compute import device_of
from nas.train.evaluate import EVAL_BATCH, normalised, threads
from nas.train.losses import FeaturePairs, attention_map
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.teacher import Teacher

HINT_SIDE = 4  # 7 KB an image for three layers of the built-in teacher; larger maps would outgrow the images
MAP_SIDE = 7  # 5 KB an image; the grid of a ViT-B/32 at 224 px, and half that of a ViT-B/16
# Beginnings of the names of cached features; the layer's name follows.
HINT, ATTENTION, ATTENTION_MAPS = "hint.", "attention.", "attention_maps."
_KINDS = {"hints": HINT, "attention": ATTENTION, "attention_maps": ATTENTION_MAPS}
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
        if not teacher.weight:
            raise ConfigError(
                f"distill.{name}: teacher.weight is 0, so the network teaches nothing, and files have no feature maps. "
                f"Give it a weight, or switch the loss off: --set distill.{name}=0"
            )
        if name == "attention_maps":
            if teacher.kind != "torchvision":
                raise _no_attention(f"a teacher of kind {teacher.kind!r} gives no attention maps")
            attention = torchvision_attention(teacher.name)
            if not attention:
                raise _no_attention(f"the teacher {teacher.name} has no multi-head attention")
            _compared_layers(distill, teacher.name, distill.teacher_layers, attention)
        elif teacher.kind not in ("resnet", "torchvision"):
            raise ConfigError(
                f"distill.{name}: a teacher of kind {teacher.kind!r} gives logits only, this loss needs its feature "
                f"maps. Use teacher.kind 'resnet' or 'torchvision', or switch the loss off: --set distill.{name}=0"
            )
        elif teacher.kind == "torchvision" and not distill.teacher_layers:
            raise ConfigError(
                f"distill.teacher_layers: distill.{name} needs the layers of the torchvision teacher {teacher.name!r} "
                f"whose maps are compared, such as --set 'distill.teacher_layers=[layer2, layer4]' for a resnet"
            )


def wanted_features(teacher: Teacher, distill: DistillSettings) -> tuple[str, ...]:
    """Names of the features that the losses of `distill` need, empty where they need none.

    Raises:
        ConfigError: the teacher gives no features, or a layer is named that none of the losses compares.
    """
    if not distill.feature_losses:
        return ()
    if distill.attention_maps and not teacher.attention_layers:
        raise _no_attention(f"the teacher {teacher.name} has no multi-head attention")
    if teacher.features is None:
        raise ConfigError(
            f"distill.{distill.feature_losses[0]}: the teacher {teacher.name} gives logits only, this loss needs its "
            f"feature maps. Use one teacher of kind 'resnet' or 'torchvision', or switch the loss off: "
            f"--set distill.{distill.feature_losses[0]}=0"
        )
    compared = _compared_layers(distill, teacher.name, teacher.feature_layers, teacher.attention_layers)
    return tuple(_KINDS[name] + layer for name, layers in compared.items() for layer in layers)


def _compared_layers(
    distill: DistillSettings, teacher: str, stages: Sequence[str], attention: Sequence[str]
) -> dict[str, Sequence[str]]:
    """The teacher's layers that each loss compares: attention for attention maps, all others for the other losses.

    Args:
        distill: names layers, or none.
        teacher: its name.
        stages: what is compared where no layer with maps is named.
        attention: names of its multi-head attentions, first to last.

    Raises:
        ConfigError: a loss is left without a layer, or a named layer without a loss.
    """
    where, named = "distill.teacher_layers", distill.teacher_layers
    attending = [layer for layer in named if layer in attention]
    others = [layer for layer in named if layer not in attention]
    compared: dict[str, Sequence[str]] = {}
    for name in distill.feature_losses:
        if name != "attention_maps":
            compared[name] = others or [layer for layer in stages if layer not in attention]
            if not compared[name]:
                raise ConfigError(f"{where}: distill.{name} compares maps; name layers of {teacher} that give some")
        elif len(attending) > 1:
            raise ConfigError(f"{where}: attention maps of one layer are compared, got {', '.join(attending)}")
        else:
            compared[name] = attending or attention[-1:]
    if others and compared.keys() == {"attention_maps"}:
        meant = did_you_mean(others[0], list(attention))
        raise ConfigError(
            f"{where}: {others[0]!r} is no multi-head attention of {teacher}{meant}. Leave it out to compare the last "
            f"one, {attention[-1]}"
        )
    if attending and "attention_maps" not in compared:
        raise ConfigError(
            f"{where}: {attending[0]!r} gives no maps [B, C, H, W]; name another layer, or compare its probabilities: "
            "--set distill.attention_maps=1"
        )
    return compared


def _no_attention(what: str) -> ConfigError:
    return ConfigError(
        f"distill.attention_maps: {what}, whose probabilities this loss compares. Use a vision transformer "
        "(teacher.kind 'torchvision', teacher.name 'vit_b_16'; transformers with windows such as swin_t have no map of "
        "the whole image), or switch the loss off: --set distill.attention_maps=0"
    )


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


def student_features(
    student: Student, cached: Mapping[str, np.ndarray], distill: DistillSettings
) -> dict[str, np.ndarray]:
    """Those of `needed_features` that this student learns from: attention maps only where it has attention itself.

    Raises:
        ConfigError: none are cached for a loss that is on.
    """
    found = needed_features(cached, distill)
    if any(layer.kind == "attention" for layer in student.layers):
        return found
    return {name: value for name, value in found.items() if not name.startswith(ATTENTION_MAPS)}


def reduced(name: str, features: np.ndarray) -> np.ndarray:
    """What is kept of a layer's features, float16: [B, C, h, w] of hints, [B, 1, H, W] of attention.

    Of attention maps [B, 1, n, n], n the tokens of a grid of at most `MAP_SIDE` a side.

    Args:
        name: beginning with `HINT`, `ATTENTION` or `ATTENTION_MAPS`.
        features: maps of that layer, float32 [B, C, H, W], or probabilities [B, N, N].

    Raises:
        ConfigError: tokens that are no square grid.
    """
    x = torch.from_numpy(features)
    if name.startswith(ATTENTION_MAPS):
        x = _without_class_token(x, layer_of(name))[:, None]
        x = pooled_attention(x, min(MAP_SIDE, math.isqrt(x.shape[-1])))
    elif name.startswith(HINT):
        side = min(HINT_SIDE, x.shape[-1])
        x = functional.adaptive_avg_pool2d(x, side).clamp(-_HALF_MAX, _HALF_MAX)
    else:
        x = attention_map(x)
        x = functional.normalize(x.flatten(1)).reshape(x.shape)
    return x.numpy().astype(np.float16)


def layer_of(name: str) -> str:
    """The teacher's layer of a feature."""
    return next(name.removeprefix(kind) for kind in _KINDS.values() if name.startswith(kind))


def _without_class_token(maps: Tensor, layer: str) -> Tensor:
    """Probabilities [B, N, N] among the tokens of the image, from those with a class token before them."""
    tokens = maps.shape[-1]
    for before in (0, 1):
        if math.isqrt(tokens - before) ** 2 == tokens - before:
            return maps[:, before:, before:]
    raise ConfigError(
        f"distill.teacher_layers: {layer!r} attends to {tokens} tokens, which are no square grid of the image, with or "
        "without a class token; name another layer, or switch the loss off: --set distill.attention_maps=0"
    )


def pooled_attention(maps: Tensor, side: int) -> Tensor:
    """Probabilities [B, heads, N, N] among the tokens of a square grid as those of a coarser grid, [B, heads, n, n].

    A cell of it attends as its tokens do on average, and is attended to as much as all of them together. Cells need not
    have whole tokens: each belongs to the cells by the shares of its area. Rows are divided by their sums.

    Args:
        maps: row-major tokens; rows need not sum to 1.
        side: of the coarser grid, at most that of the grid.
    """
    tokens = math.isqrt(maps.shape[-1])
    if side < tokens:
        edges = torch.arange(side + 1, device=maps.device, dtype=maps.dtype) * (tokens / side)
        token = torch.arange(tokens, device=maps.device, dtype=maps.dtype)
        ends, starts = torch.minimum(edges[1:, None], token + 1), torch.maximum(edges[:-1, None], token)
        shares = (ends - starts).clamp_min(0)
        cells = torch.kron(shares, shares)
        maps = cells @ maps @ cells.T  # cells are of one size, so the division by sums makes means of the queries
    return maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


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

    def pairs(self, maps: Sequence[Tensor], attended: Sequence[Tensor], teacher: Mapping[str, Tensor]) -> FeaturePairs:
        """The pairs of one step.

        Args:
            maps: the student's map behind every stage, [B, C, H, W].
            attended: attention maps of its blocks with attention, [B, heads, N, N].
            teacher: features of the batch by name, [B, ...], in the order in which they are cached.
        """
        hints = [t for name, t in teacher.items() if name.startswith(HINT)]
        attention = [t for name, t in teacher.items() if name.startswith(ATTENTION)]
        hinted = zip(self.convs, compared_stages(len(hints), len(maps)), hints, strict=True)
        lit = zip(compared_stages(len(attention), len(maps)), attention, strict=True)
        return FeaturePairs(
            tuple((conv(maps[stage]), t) for conv, stage, t in hinted),
            tuple((attention_map(maps[stage]), t) for stage, t in lit),
            map_pairs(attended, teacher),
        )


def map_pairs(attended: Sequence[Tensor], teacher: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """What the tokens of the student's last block with attention and the teacher's attend to, on the coarser grid.

    Args, as of `Adapters.pairs`.
    """
    found = []
    for wanted in (t for name, t in teacher.items() if name.startswith(ATTENTION_MAPS)):
        own = attended[-1].mean(1, keepdim=True)
        side = math.isqrt(min(own.shape[-1], wanted.shape[-1]))
        found.append((pooled_attention(own, side), pooled_attention(wanted, side)))
    return tuple(found)


def kept_attention(student: Student, images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What a trained student with attention teaches by its last block with it: as `reduced`, for uint8 [N, H, W, 3]."""
    parts = []
    with threads(1), torch.inference_mode(), attention_maps(student.eval()) as maps:
        for start in range(0, len(images), EVAL_BATCH):
            maps.clear()
            student(normalised(images[start : start + EVAL_BATCH], mean, std, device_of(student)))
            parts.append(reduced(ATTENTION_MAPS, maps[-1].float().mean(1).cpu().numpy()))
    return np.concatenate(parts)


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
