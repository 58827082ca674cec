"""The student network in torch, built from the layers of `expand`.

Howard et al. 2019, arXiv 1905.02244: inverted residuals with squeeze-and-excitation and hard-swish. Batch norm uses
eps 1e-3 and momentum 0.01 as published; linear layers are 1x1 convolutions so that one rule exports all of them. What
the other kinds of blocks follow is said in `BlockConfig`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from nas.core.records import HEAD_DIM, Branch, Candidate, ConvSpec, LayerSpec
from nas.core.walk import expand
from nas.models.hooks import hooked

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


class Attention(nn.Module):
    """Softmax of the scaled products of queries and keys: the attention map [B, heads, N queries, N keys], N tokens.

    Vaswani et al. 2017 (arXiv 1706.03762), equation 1, without the product with the values. A module of its own so that
    a hook can read the map (`attention_maps`).
    """

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Of queries and keys [B, heads, HEAD_DIM, N]."""
        return (query.transpose(2, 3) @ key * HEAD_DIM**-0.5).softmax(dim=3)


def attend(qkv: Tensor, heads: int, attention: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Self-attention over the pixels of a map: [B, heads * 3 * HEAD_DIM, H, W] to [B, heads * HEAD_DIM, H, W].

    The channels of one head follow each other (query, key, value), so that the first heads of a supernet are a slice.
    """
    b, _, h, w = qkv.shape
    query, key, value = qkv.reshape(b, heads, 3 * HEAD_DIM, h * w).split(HEAD_DIM, dim=2)
    mixed = value @ attention(query, key).transpose(2, 3)
    return mixed.reshape(b, heads * HEAD_DIM, h, w)


def run_block(
    x: Tensor,
    branches: Sequence[Branch],
    heads: int,
    convolve: Callable[[Tensor, ConvSpec], Tensor],
    attention: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A stem or block of any kind on a map [B, C, H, W].

    Args:
        x: the input.
        branches: those of the layer.
        heads: those of the layer.
        convolve: one convolution with batch norm and activation.
        attention: queries and keys to attention maps, see `Attention`.
    """
    for branch in branches:
        y = squeezed = x
        for spec in branch.convolutions:
            if spec.name == "se_reduce":
                squeezed = convolve(y.mean((2, 3), keepdim=True), spec)
            elif spec.name == "se_expand":
                y = y * convolve(squeezed, spec)
            else:
                y = convolve(y, spec)
            if spec.name == "qkv":
                y = attend(y, heads, attention)
        x = x + y if branch.has_skip else y
    return x


class Block(nn.Module):
    """A stem or a block of any kind; its convolutions are sub-modules by their names."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.branches = layer.branches
        self.heads = layer.heads
        for spec in layer.convolutions:
            self.add_module(spec.name, ConvUnit(spec))
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return run_block(x, self.branches, self.heads, self._convolve, self.attention)

    def _convolve(self, x: Tensor, spec: ConvSpec) -> Tensor:
        unit: ConvUnit = getattr(self, spec.name)
        return unit(x)


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
            OrderedDict((module_name(layer), (Head if _is_head(layer) else Block)(layer)) for layer in self.layers)
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


def _is_head(layer: LayerSpec) -> bool:
    return layer.kind in ("exit_head", "head")


@contextmanager
def attention_maps(student: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the attention maps of what the network computes inside the `with`: [B, heads, N, N] of each block.

    In the order of execution, the last block's last; gradients flow through them. Clear the list between two forwards.
    """
    maps: list[Tensor] = []
    attentions = [module for module in student.modules() if isinstance(module, Attention)]
    with hooked((module, lambda _module, _inputs, found: maps.append(found)) for module in attentions):
        yield maps


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
                bias = torch.zeros(spec.out_channels, dtype=torch.float64, device=weight.device)
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
                result[f"{base}.weight"] = np.ascontiguousarray(weight.float().cpu().numpy())
                result[f"{base}.bias"] = np.ascontiguousarray(bias.float().cpu().numpy())
    return result
