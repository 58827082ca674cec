"""Weight-sharing supernet: one set of weights for every network of a space.

Kernel: the centre of the largest one; expansion and width: the first channels; depth: the first blocks of a stage
(Cai et al. 2020, "Once-for-All", arXiv 1908.09791; differs: the kernel transform and the sorting of channels are left
out, width is shared as well, all sizes are trained from the start). Batch norm shares and slices scale and shift and
keeps no running statistics (Yu et al. 2020, "BigNAS", arXiv 2003.11142): every size has its own, so they are estimated
anew for an extracted student. Activations and resolutions share all weights, kinds of blocks none; attention shares its
first heads.

A sub-network is never made by changing the supernet: `forward` runs through slices of the weights, and `extract` gives
a new, ordinary `Student` with copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.core.errors import RecordError
from nas.core.records import Candidate, ConvSpec, LayerSpec, SlotKind
from nas.core.walk import expand
from nas.models.student import BN_EPS, Attention, Student, branch_input, module_name, run_block


class SlotLike(Protocol):
    """A place of the network with every layer that may stand there; None where the place may be empty."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> SlotKind: ...
    @property
    def stage(self) -> int: ...
    @property
    def layers(self) -> Sequence[LayerSpec | None]: ...


class SpaceLike(Protocol):
    """What the supernet must know of a search space: the layers that may stand in each place."""

    def slots(self) -> Sequence[SlotLike]: ...


@dataclass(frozen=True, slots=True)
class SharedShape:
    """Largest size of one convolution: weight [out, inputs, kernel, kernel], with batch norm or with a bias."""

    out_channels: int
    inputs: int
    kernel_size: int
    batch_norm: bool


class SharedConv(nn.Module):
    """Weights of one convolution in its largest size, with batch norm's scale and shift or a bias."""

    def __init__(self, name: str, shape: SharedShape) -> None:
        super().__init__()
        self.name = name
        out, kernel = shape.out_channels, shape.kernel_size
        self.weight = nn.Parameter(torch.empty(out, shape.inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out))  # batch norm's shift where there is batch norm
        self.scale = nn.Parameter(torch.ones(out)) if shape.batch_norm else None
        if any(part in name for part in ("__hidden", "__classifier")):  # the scheme of `student.initialise`
            nn.init.normal_(self.weight, 0, 0.01)
        else:
            nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def sliced(self, spec: ConvSpec) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of weight, bias and scale for one size: first channels, centre of the kernel.

        Raises:
            RecordError: the size is not inside the largest one.
        """
        out, inputs, kernel = spec.out_channels, spec.in_channels // spec.groups, spec.kernel_size
        most_out, most_inputs, largest, _ = self.weight.shape
        if out > most_out or inputs > most_inputs or kernel > largest or spec.batch_norm != (self.scale is not None):
            raise RecordError(
                f"{self.name}: [{out}, {inputs}, {kernel}, {kernel}] is outside the supernet's "
                f"[{most_out}, {most_inputs}, {largest}, {largest}]; use a candidate of the space it was made from"
            )
        first = (largest - kernel) // 2
        weight = self.weight[:out, :inputs, first : first + kernel, first : first + kernel]
        return weight, self.bias[:out], None if self.scale is None else self.scale[:out]

    def forward(self, x: Tensor, spec: ConvSpec) -> Tensor:
        weight, bias, scale = self.sliced(spec)
        if scale is None:
            x = functional.conv2d(x, weight, bias, spec.stride, spec.kernel_size // 2, groups=spec.groups)
        else:
            x = functional.conv2d(x, weight, None, spec.stride, spec.kernel_size // 2, groups=spec.groups)
            x = functional.batch_norm(x, None, None, scale, bias, training=True, eps=BN_EPS)
        return _activated(x, spec)


def _activated(x: Tensor, spec: ConvSpec) -> Tensor:
    match spec.activation:
        case "relu":
            return functional.relu(x)
        case "hard_swish":
            return functional.hardswish(x)
        case "hard_sigmoid":
            return functional.hardsigmoid(x)
        case "linear":
            return x


class Supernet(nn.Module):
    """Shared weights of all networks of a space.

    Input: normalised images [B, C, H, W] in a resolution of the space; output: logits [B, K] per exit of the candidate,
    head last. Batch statistics are used in training and evaluation alike: score an extracted student instead.
    """

    def __init__(self, shapes: Mapping[str, SharedShape]) -> None:
        super().__init__()
        self.units = nn.ModuleDict({unit: SharedConv(unit, shape) for unit, shape in shapes.items()})
        self.attention = Attention()

    @classmethod
    def of(cls, space: SpaceLike) -> Supernet:
        """Untrained weights, drawn from torch's global generator, large enough for every network of a space."""
        specs: dict[str, list[ConvSpec]] = {}
        for slot in space.slots():
            place = _place(slot.name, slot.stage if slot.kind == "exit_head" else None)
            for layer in slot.layers:
                if layer is not None:
                    for unit, spec in _units(place, layer):
                        specs.setdefault(unit, []).append(spec)
        return cls({unit: _largest(choices) for unit, choices in specs.items()})

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Supernet:
        """The supernet whose `state_dict` this is; its sizes are those of the weights, so no space is needed.

        Raises:
            RecordError: not the weights of a supernet.
        """
        shapes = {}
        for name, weight in weights.items():
            unit, _, kind = name.removeprefix("units.").partition(".")
            if kind == "weight":
                out, inputs, kernel, _ = weight.shape
                shapes[unit] = SharedShape(out, inputs, kernel, f"units.{unit}.scale" in weights)
        net = cls(shapes)
        try:
            net.load_state_dict(dict(weights))
        except RuntimeError as e:
            raise RecordError(f"not the weights of a supernet: {str(e).splitlines()[0]}") from e
        return net

    def forward(self, x: Tensor, candidate: Candidate, exit_gradient: float = 1.0) -> list[Tensor]:
        outputs = []
        for layer, place in _placed(candidate):
            units = {spec.name: (self._unit(unit), spec) for unit, spec in _units(place, layer)}
            if layer.kind in ("head", "exit_head"):
                outputs.append(_head(branch_input(x, exit_gradient) if layer.kind == "exit_head" else x, units))
            else:
                x = run_block(x, layer.branches, layer.heads, partial(_convolved, units), self.attention)
        return outputs

    def _unit(self, unit: str) -> SharedConv:
        if unit not in self.units:
            raise RecordError(f"{unit} is not in the supernet; use a candidate of the space it was made from")
        return cast(SharedConv, self.units[unit])

    def extract(self, candidate: Candidate) -> Student:
        """A new student with copies of its slices; batch norm's running statistics must still be estimated.

        Raises:
            RecordError: a candidate outside the space.
        """
        with torch.random.fork_rng(devices=[]):  # a student starts from random weights, which are not used here
            student = Student(candidate)
        with torch.no_grad():
            for layer, place in _placed(candidate):
                module = student.body[module_name(layer)]
                for unit, spec in _units(place, layer):
                    weight, bias, scale = self._unit(unit).sliced(spec)
                    target = getattr(module, spec.name)
                    target.conv.weight.copy_(weight)
                    if scale is None:
                        target.conv.bias.copy_(bias)
                    else:
                        target.bn.weight.copy_(scale)
                        target.bn.bias.copy_(bias)
        return student


def _largest(specs: Sequence[ConvSpec]) -> SharedShape:
    return SharedShape(
        max(spec.out_channels for spec in specs),
        max(spec.in_channels // spec.groups for spec in specs),
        max(spec.kernel_size for spec in specs),
        specs[0].batch_norm,
    )


_Units = dict[str, tuple[SharedConv, ConvSpec]]


def _place(name: str, exit_stage: int | None) -> str:
    # Exit heads are numbered among the exits a candidate has; their weights belong to the stage they stand behind.
    return name.replace(".", "_") if exit_stage is None else f"exits_{exit_stage}"


def _placed(candidate: Candidate) -> list[tuple[LayerSpec, str]]:
    result = []
    for layer in expand(candidate):
        stage = candidate.exits[layer.segment].after_stage if layer.kind == "exit_head" else None
        result.append((layer, _place(layer.name, stage)))
    return result


def _units(place: str, layer: LayerSpec) -> list[tuple[str, ConvSpec]]:
    """Name of the shared convolution and the size of it that the layer uses.

    The layers of a head see other features when the one before them is absent, so each such case has its own weights.
    So has each kind of block.
    """
    result, before = [], ""
    if layer.is_block and layer.kind != "inverted_residual":  # whose names are those of supernets before other kinds
        place = f"{place}__{layer.kind}"
    for spec in layer.convolutions:
        after = f"_after_{before}" if before and layer.kind in ("head", "exit_head") else ""
        result.append((f"{place}__{spec.name}{after}", spec))
        before = spec.name
    return result


def _convolved(units: _Units, x: Tensor, spec: ConvSpec) -> Tensor:
    return units[spec.name][0](x, spec)


def _apply(x: Tensor, units: _Units, name: str) -> Tensor:
    if name not in units:
        return x
    shared, spec = units[name]
    return shared(x, spec)


def _head(x: Tensor, units: _Units) -> Tensor:
    x = _apply(x, units, "conv").mean((2, 3), keepdim=True)
    x = _apply(_apply(x, units, "hidden"), units, "classifier")
    return x.flatten(1)
