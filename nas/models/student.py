"""The student network in torch, built from the layers of `expand`.

Howard et al. 2019, arXiv 1905.02244: inverted residuals with squeeze-and-excitation and hard-swish. Batch norm uses
eps 1e-3 and momentum 0.01 as published; linear layers are 1x1 convolutions so that one rule exports all of them.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

from nas.core.records import Candidate, ConvSpec, LayerSpec
from nas.core.walk import expand

BN_EPS = 1e-3  # Howard et al. 2019
BN_MOMENTUM = 0.01

_ACTIVATIONS = {"relu": nn.ReLU, "hard_swish": nn.Hardswish, "hard_sigmoid": nn.Hardsigmoid, "linear": nn.Identity}


class ConvUnit(nn.Module):
    """Convolution, batch norm where the spec has it (a bias where not), activation."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            spec.stride,
            padding=spec.kernel_size // 2,
            groups=spec.groups,
            bias=not spec.batch_norm,
        )
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=BN_EPS, momentum=BN_MOMENTUM) if spec.batch_norm else None
        self.act = _ACTIVATIONS[spec.activation]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return self.act(x)


class Stem(nn.Module):
    """First convolution."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.conv = ConvUnit(layer.convolutions[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excitation, project; a skip connection where the shape stays."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        units = {spec.name: ConvUnit(spec) for spec in layer.convolutions}
        self.expand = units.get("expand")
        self.depthwise = units["depthwise"]
        self.se_reduce = units.get("se_reduce")
        self.se_expand = units.get("se_expand")
        self.project = units["project"]
        self.has_residual = layer.has_residual

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        if self.se_reduce is not None and self.se_expand is not None:
            y = y * self.se_expand(self.se_reduce(y.mean((2, 3), keepdim=True)))
        y = self.project(y)
        return x + y if self.has_residual else y


class Head(nn.Module):
    """Head or exit head: optional 1x1 convolution, global mean, optional hidden layer, classifier. Gives [B, K]."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        units = {spec.name: ConvUnit(spec) for spec in layer.convolutions}
        self.conv = units.get("conv")
        self.hidden = units.get("hidden")
        self.classifier = units["classifier"]

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        x = x.mean((2, 3), keepdim=True)
        if self.hidden is not None:
            x = self.hidden(x)
        return self.classifier(x).flatten(1)


_MODULES = {"stem": Stem, "inverted_residual": InvertedResidual, "exit_head": Head, "head": Head}


class Student(nn.Module):
    """A candidate as a torch module. Input: normalised images [B, C, H, W]; output: logits [B, K] per exit, head last.

    Sub-modules are named by `LayerSpec.name` with `_` for `.`: `stem`, `stages_0_1`, `exits_0`, `head`. `exit_gradient`
    is for training, as in `branch_input`.
    """

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        self.candidate = candidate
        self.layers = expand(candidate)
        self.body = nn.ModuleDict(
            OrderedDict((module_name(layer), _MODULES[layer.kind](layer)) for layer in self.layers)
        )
        initialise(self)

    def forward(self, x: Tensor, exit_gradient: float = 1.0) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            module = self.body[module_name(layer)]
            if layer.kind == "exit_head":
                outputs.append(module(branch_input(x, exit_gradient)))
            elif layer.kind == "head":
                outputs.append(module(x))
            else:
                x = module(x)
        return outputs


def branch_input(x: Tensor, exit_gradient: float) -> Tensor:
    """Features for an early exit that hand a share of its gradient back to the layers before it: 1 all, 0 none."""
    return x if exit_gradient == 1.0 else torch.lerp(x.detach(), x, exit_gradient)


def module_name(layer: LayerSpec) -> str:
    """Name of a layer's sub-module (torch does not allow dots)."""
    return layer.name.replace(".", "_")


def initialise(module: nn.Module) -> None:
    """Fan-out normal convolutions, unit batch norm, small classifiers: torchvision's scheme for MobileNetV3."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            if name.endswith(("hidden.conv", "classifier.conv")):
                nn.init.normal_(part.weight, 0, 0.01)
            else:
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def folded_weights(student: Student) -> dict[str, np.ndarray]:
    """Weights and biases with batch norm folded in, float32, by `<layer name>.<convolution name>.weight|bias`.

    Kernels are [out, in / groups, k, k], biases [out]. The folding is done in float64.
    """
    result: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for layer in student.layers:
            module = student.body[module_name(layer)]
            for spec in layer.convolutions:
                unit: ConvUnit = getattr(module, spec.name)
                weight = unit.conv.weight.double()
                bias = torch.zeros(spec.out_channels, dtype=torch.float64)
                if unit.conv.bias is not None:
                    bias = unit.conv.bias.double()
                if unit.bn is not None:
                    bn = unit.bn
                    if bn.running_mean is None or bn.running_var is None or bn.weight is None or bn.bias is None:
                        raise ValueError(f"{layer.name}.{spec.name}: batch norm has no running statistics to fold")
                    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
                    weight = weight * scale[:, None, None, None]
                    bias = bn.bias.double() + (bias - bn.running_mean.double()) * scale
                base = f"{layer.name}.{spec.name}"
                result[f"{base}.weight"] = np.ascontiguousarray(weight.float().numpy())
                result[f"{base}.bias"] = np.ascontiguousarray(bias.float().numpy())
    return result
