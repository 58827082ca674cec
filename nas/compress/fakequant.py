"""The exported int8 network in torch, trainable: rounding passes gradients on, and the numbers are those of the graph.

Source of the method: Jacob et al. 2018, arXiv 1712.05877, section 3 (training with simulated quantization, batch norm
folded, ranges by exponential average). Gradients pass rounding unchanged inside the range (Bengio et al. 2013, arXiv
1308.3432). Differs:
- Scales of weights follow the current weights at each step and get no gradient; batch norm is folded beforehand, so
  its statistics are constants of the program.
- A quantized tensor is kept as the integers that the runtime holds with the step that they count, not as their product.
  Sums of products of integers are exact in float32 below 2^24, in whatever order they are added, so convolutions and
  means come out as in an integer kernel, and only the one factor behind each sum is rounded.

The program executes the layers of `expand` and places pairs where `nas.export.writer.LayerWriter` does; a test holds
both together. What a dialect leaves in half precision is computed in float32 here: its rounding is far below a step
of int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nas.core.errors import RecordError
from nas.core.records import Candidate, ConvSpec, LayerSpec, QuantSpec
from nas.core.walk import expand
from nas.models.student import Attention, attend, branch_input

RANGE_MOMENTUM = 0.05  # weight of a batch in the exponential average of the ranges


class QuantRules(Protocol):
    """What the program has to know of a dialect; `nas.export.dialect.Dialect` says what each of these means."""

    @property
    def symmetric(self) -> bool:
        """Zero points are 0."""
        ...

    @property
    def pair_before(self) -> frozenset[str]:
        """Activations whose input is quantized too."""
        ...

    @property
    def pairs_at(self) -> Literal["outputs", "inputs"]:
        """Where tensors are quantized."""
        ...

    @property
    def integer_bias(self) -> bool:
        """The bias of an int8 convolution is int32."""
        ...

    @property
    def weight_limit(self) -> int:
        """Largest integer of a weight."""
        ...

    def scale_and_zero_point(self, lo: float, hi: float) -> tuple[np.floating[Any], int]:
        """Of a tensor with values in lo..hi."""
        ...

    def weight_scales(
        self, weight: NDArray[np.float32], bias: NDArray[np.float32], input_scale: np.floating[Any]
    ) -> NDArray[np.floating[Any]]:
        """Scale of each output channel."""
        ...

    def is_integer(self, layer: LayerSpec, spec: ConvSpec) -> bool:
        """Whether a convolution of an int8 layer is computed in int8."""
        ...


@dataclass(slots=True, eq=False)
class _Map:
    """A tensor of the program [B, C, H, W]: `values * step` is what it stands for.

    `step` is None for plain float values; a float32 number, or one per channel [1, C, 1, 1], where `values` are
    integers. `scale` is that of the quantized form, None before. `quantized` keeps it: one pair, whoever reads it.
    `is_watched`: its range follows it; not that of a copy, whose original is.
    """

    name: str
    values: Tensor
    step: np.float32 | Tensor | None = None
    scale: np.floating[Any] | None = None
    quantized: _Map | None = field(default=None, repr=False)
    is_watched: bool = True

    @property
    def real(self) -> Tensor:
        return self.values if self.step is None else self.values * self.step


class FakeQuantNetwork(nn.Module):
    """A candidate in its precisions. Input: raw pixels 0-255 [B, C, H, W]; output: logits [B, K] per exit, head last.

    Args:
        candidate: with the precision of every layer.
        weights: `<layer>.<convolution>.weight|bias`, batch norm folded in: the parameters that are trained.
        quant: ranges of the tensors from calibration, the first values of the ranges here.
        mean: of the training pixels / 255, one per channel.
        std: same.
        rules: the dialect that the network is exported in.

    Attributes:
        observes: whether the ranges follow the tensors of each batch.

    Raises:
        RecordError: weights or ranges of another candidate (a range when it is first needed).
    """

    def __init__(
        self,
        candidate: Candidate,
        weights: Mapping[str, NDArray[np.float32]],
        quant: QuantSpec,
        mean: Sequence[float],
        std: Sequence[float],
        rules: QuantRules,
    ) -> None:
        super().__init__()
        self.layers = expand(candidate)
        self.rules = rules
        self.observes = False
        self._lo, self._hi, self._images = dict(quant.lo), dict(quant.hi), quant.images
        self.folded = nn.ParameterDict()
        for layer in self.layers:
            for spec in layer.convolutions:
                for part in ("weight", "bias"):
                    name = f"{layer.name}.{spec.name}.{part}"
                    if name not in weights:
                        raise RecordError(f"weights have no {name!r}; they belong to another candidate")
                    self.folded[_key(name)] = nn.Parameter(torch.from_numpy(weights[name].copy()))
        wide = np.asarray(std, dtype=np.float64)
        self._factor = _per_channel((1.0 / (255.0 * wide)).astype(np.float32))
        self._offset = _per_channel((-np.asarray(mean, dtype=np.float64) / wide).astype(np.float32))

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The trained weights, by the names that the writer reads."""
        return {key.replace("/", "."): p.detach().contiguous().cpu().numpy().copy() for key, p in self.folded.items()}

    def ranges(self) -> QuantSpec:
        """The ranges as they are now; tensors that no pair stands behind keep those of the calibration."""
        return QuantSpec(dict(self._lo), dict(self._hi), self._images)

    def set_ranges(self, quant: QuantSpec) -> None:
        """Takes ranges of `ranges()` again: they are no tensors, so a state dict does not hold them."""
        self._lo, self._hi = dict(quant.lo), dict(quant.hi)

    def forward(self, pixels: Tensor, exit_gradient: float = 1.0) -> list[Tensor]:
        """Logits of each exit; `exit_gradient` is for training, as in `nas.models.student.branch_input`."""
        x = _Map("image", pixels * self._factor.to(pixels.device) + self._offset.to(pixels.device))
        outputs = []
        for layer in self.layers:
            x_in = self._entered(x, layer)
            if layer.kind in ("head", "exit_head"):
                if layer.kind == "exit_head" and exit_gradient != 1.0:
                    x_in = replace(
                        x_in, values=branch_input(x_in.values, exit_gradient), quantized=None, is_watched=False
                    )
                outputs.append(self._head(x_in, layer))
            else:
                x = self._layer(x_in, layer)
        return outputs

    def _entered(self, x: _Map, layer: LayerSpec) -> _Map:
        is_paired = layer.precision == "int8" and self.rules.pairs_at == "outputs"
        return self._quantized(x) if is_paired else x

    def _layer(self, x: _Map, layer: LayerSpec) -> _Map:
        for branch in layer.branches:
            y = squeezed = x
            for spec in branch.convolutions:
                if spec.name == "se_reduce":
                    squeezed = self._conv(self._pool(y, layer), spec, layer)
                elif spec.name == "se_expand":
                    y = self._product(y, self._conv(squeezed, spec, layer), layer)
                else:
                    y = self._conv(y, spec, layer)
                if spec.name == "qkv":  # attention itself stays float
                    mixed = attend(y.real, layer.heads, Attention())
                    y = self._between(_Map(f"{layer.name}.attention", mixed), layer)
            if not branch.has_skip:
                x = y
                continue
            if layer.precision == "int8" and self.rules.pairs_at == "inputs":
                x = self._quantized(x)
            x = self._between(_Map(f"{layer.name}.{branch.sum}", x.real + y.real), layer)
        return x

    def _head(self, x: _Map, layer: LayerSpec) -> Tensor:
        is_pooled = False
        for spec in layer.convolutions:
            if spec.name != "conv" and not is_pooled:
                x, is_pooled = self._pool(x, layer), True
            x = self._conv(x, spec, layer)
        return x.real.flatten(1)

    def _pool(self, x: _Map, layer: LayerSpec) -> _Map:
        name = f"{layer.name}.pool"
        if isinstance(x.step, np.float32):  # integers are added up, as the runtime does
            pixels = x.values.shape[2] * x.values.shape[3]
            y = _Map(name, x.values.sum((2, 3), keepdim=True), np.float32(x.step / np.float32(pixels)))
        else:
            y = _Map(name, x.real.mean((2, 3), keepdim=True))
        return self._between(y, layer)

    def _product(self, x: _Map, gate: _Map, layer: LayerSpec) -> _Map:
        name = f"{layer.name}.scaled"
        if isinstance(x.step, np.float32) and isinstance(gate.step, np.float32):
            return self._between(_Map(name, x.values * gate.values, np.float32(x.step * gate.step)), layer)
        return self._between(_Map(name, x.real * gate.real), layer)

    def _conv(self, x: _Map, spec: ConvSpec, layer: LayerSpec) -> _Map:
        base = f"{layer.name}.{spec.name}"
        weight, bias = self.folded[_key(f"{base}.weight")], self.folded[_key(f"{base}.bias")]
        if layer.precision == "int8" and self.rules.is_integer(layer, spec):
            y = self._integer_conv(self._quantized(x), spec, base, weight, bias)
        else:
            y = _Map(base, _convolved(x.real, weight, bias, spec))
        if spec.activation in self.rules.pair_before:
            y.name = f"{base}.pre"
            y = self._between(y, layer)
        if spec.activation == "relu":  # a step is positive: the sign is that of the integers
            y = _Map(base, F.relu(y.values), y.step)
        elif spec.activation != "linear":
            gate = (y.real * _SIXTH + 0.5).clamp(0.0, 1.0)
            y = _Map(base, y.real * gate if spec.activation == "hard_swish" else gate)
        return self._between(y, layer)

    def _integer_conv(self, x: _Map, spec: ConvSpec, base: str, weight: Tensor, bias: Tensor) -> _Map:
        if x.scale is None:
            raise RecordError(f"{base}: input {x.name!r} of an int8 convolution is not quantized")
        own = weight.detach().cpu().numpy(), bias.detach().cpu().numpy()
        scales = self.rules.weight_scales(*own, x.scale).astype(np.float32)
        limit = self.rules.weight_limit
        integers = _rounded(weight / torch.from_numpy(scales).to(weight.device).view(-1, 1, 1, 1), -limit, limit)
        # Exactly the float32 product, as in the graph: the integer kernel knows no other scale of its bias.
        step = torch.from_numpy(np.float32(x.scale) * scales).to(weight.device)
        if not self.rules.integer_bias:
            return _Map(
                base, _convolved(x.values, integers, None, spec) * step.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
            )
        wide = bias.double() / step.double()
        steps = (wide + (wide.round() - wide).detach()).float()
        return _Map(base, _convolved(x.values, integers, steps, spec), step.view(1, -1, 1, 1))

    def _between(self, x: _Map, layer: LayerSpec) -> _Map:
        """Every tensor between layers passes here: quantized in an int8 layer where pairs stand behind outputs."""
        is_paired = layer.precision == "int8" and self.rules.pairs_at == "outputs"
        return self._quantized(x) if is_paired else x

    def _quantized(self, x: _Map) -> _Map:
        if x.scale is not None:
            return x
        if x.quantized is None:
            try:
                scale, zero_point = self.rules.scale_and_zero_point(self._lo[x.name], self._hi[x.name])
            except KeyError as e:
                raise RecordError(
                    f"the quantization ranges have no tensor {x.name!r}; calibrate this candidate again"
                ) from e
            step = np.float32(scale)
            scaled = x.values / step if x.step is None else x.values * (x.step / step)
            if self.observes and x.is_watched:
                self._observe(x.name, scaled, float(scale))
            least, most = (-128, 127) if self.rules.symmetric else (-zero_point, 255 - zero_point)
            x.quantized = _Map(x.name, _rounded(scaled, least, most), step, scale)
        return x.quantized

    def _observe(self, name: str, scaled: Tensor, scale: float) -> None:
        low, high = (float(v) * scale for v in torch.aminmax(scaled.detach()))
        self._lo[name] += RANGE_MOMENTUM * (low - self._lo[name])
        self._hi[name] += RANGE_MOMENTUM * (high - self._hi[name])


_SIXTH = float(np.float32(1.0 / 6.0))


def _rounded(x: Tensor, least: int, most: int) -> Tensor:
    """The nearest integers (half to even) within least..most; the gradient passes where they are inside."""
    return torch.fake_quantize_per_tensor_affine(x, 1.0, 0, least, most)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    return F.conv2d(x, weight, bias, spec.stride, spec.kernel_size // 2, 1, spec.groups)


def _per_channel(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values).view(1, -1, 1, 1)


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dots in names
