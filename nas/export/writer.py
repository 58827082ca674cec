"""Layers as ONNX nodes: one set of functions for fp32 and int8, for rows and for networks.

Names carry the unit: convolution `stages.1.0.depthwise/Conv`, its output `stages.1.0.depthwise`. The tensors that need
a range in int8 are
    image                     the normalised image
    <layer>.<conv>            output of a convolution with its activation
    <layer>.<conv>.pre        the same before hard-swish or hard-sigmoid
    <layer>.pool              global mean (squeeze-and-excitation, heads)
    <layer>.scaled            product of squeeze-and-excitation
    <layer>.sum               residual sum
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, TensorProto, helper

from nas.core.errors import RecordError, UsageError
from nas.core.records import ConvSpec, LayerSpec, QuantSpec
from nas.export.dialect import Dialect

Weights = Mapping[str, NDArray[np.float32]]

ONNX_TYPES: dict[Any, int] = {
    np.dtype("float32"): TensorProto.FLOAT,
    np.dtype("uint8"): TensorProto.UINT8,
    np.dtype("int8"): TensorProto.INT8,
    np.dtype("int32"): TensorProto.INT32,
    np.dtype("int64"): TensorProto.INT64,
}
_ACTIVATION_OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5}),
}
_INT32_LIMIT = 2.0**30  # a bias stays a factor of two below the int32 range: the sum of products is added to it


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor between layers. `source` is its name in the graph: float, or quantized when `scale` is given."""

    name: str
    source: str
    scale: np.float32 | None = None
    zero_point: int = 0


class Scope:
    """A graph being written in place: the main one or a branch of an `If`.

    A branch reads tensors of the graphs around it, but has its own initializers and its own DequantizeLinear: weights
    of the outer graph are not optimised into a branch. `tag` keeps the names of a branch apart.
    """

    def __init__(self, graph: GraphProto, name: str, tag: str = "") -> None:
        self.graph = graph
        self.tag = tag
        graph.name = name
        self._constants: set[str] = set()
        self._floats: dict[str, str] = {}
        self._quantized: dict[str, Tensor] = {}

    def node(self, op: str, inputs: Sequence[str], output: str, unit: str = "", **attributes: Any) -> str:
        """Adds an operator; its name carries the unit (`output` where none is given). Gives the output's name."""
        name = f"{self.tag}{unit}/{op}" if unit else f"{output}/{op}"
        self.graph.node.add(
            op_type=op,
            name=name,
            input=inputs,
            output=(output,),
            attribute=[helper.make_attribute(key, value) for key, value in attributes.items()],
        )
        return output

    def branches(
        self, condition: str, outputs: Sequence[str], unit: str, names: tuple[str, str]
    ) -> tuple[Scope, Scope]:
        """Adds an `If`; its two empty branches (then, else), called `names`."""
        node = self.graph.node.add(op_type="If", name=f"{unit}/If", input=(condition,), output=outputs)
        graphs = (node.attribute.add(name=kind, type=AttributeProto.GRAPH).g for kind in ("then_branch", "else_branch"))
        then, other = (Scope(graph, name, f"{name}/") for graph, name in zip(graphs, names, strict=True))
        return then, other

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Adds an initializer, once; gives its name."""
        full = self.tag + name
        if full not in self._constants:
            self._constants.add(full)
            self.graph.initializer.add(
                name=full, data_type=ONNX_TYPES[values.dtype], dims=values.shape, raw_data=values.tobytes()
            )
        return full

    def scalar(self, name: str, value: float | np.float32, kind: str) -> str:
        """Adds an initializer without dimensions; `kind` is a NumPy type name."""
        return self.constant(name, np.asarray(value, dtype=kind))

    def float_of(self, x: Tensor, dialect: Dialect) -> str:
        """Name of the float form of a tensor; its DequantizeLinear is written once per graph, at the first reader."""
        if x.scale is None:
            return x.source
        if x.source not in self._floats:
            pair = self._pair(x.name, x.scale, x.zero_point, dialect)
            self._floats[x.source] = self.node("DequantizeLinear", (x.source, *pair), f"{self.tag}{x.name}.dq")
        return self._floats[x.source]

    def quantize(self, name: str, source: str, scale: np.float32, zero_point: int, dialect: Dialect) -> Tensor:
        """Writes the QuantizeLinear of a float tensor, once per graph."""
        if source not in self._quantized:
            pair = self._pair(name, scale, zero_point, dialect)
            q = self.node("QuantizeLinear", (source, *pair), f"{self.tag}{name}.q")
            self._quantized[source] = Tensor(name, q, scale, zero_point)
        return self._quantized[source]

    def _pair(self, name: str, scale: np.float32, zero_point: int, dialect: Dialect) -> tuple[str, str]:
        return (
            self.scalar(f"{name}.scale", scale, "float32"),
            self.scalar(f"{name}.zero_point", zero_point, dialect.activation_type),
        )


class LayerWriter:
    """Writes layers into scopes. `ranges` is needed by int8 layers; `seen` lists the tensors that need a range."""

    def __init__(self, weights: Weights, ranges: QuantSpec | None, dialect: Dialect) -> None:
        self.weights = weights
        self.ranges = ranges
        self.dialect = dialect
        self.seen: list[Tensor] = []

    def image(self, scope: Scope, source: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Normalisation of raw pixels: x * 1/(255 std) - mean/std."""
        shape = (1, len(mean), 1, 1)
        wide_std = np.asarray(std, dtype=np.float64)
        factor = (1.0 / (255.0 * wide_std)).astype(np.float32).reshape(shape)
        offset = (-np.asarray(mean, dtype=np.float64) / wide_std).astype(np.float32).reshape(shape)
        x = scope.node("Mul", (source, scope.constant("image.factor", factor)), "image.scaled")
        x = scope.node("Add", (x, scope.constant("image.offset", offset)), "image.normalised")
        return self._between(scope, "image", x, quantized=False)

    def layer(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        """Writes a stem or block; gives its output."""
        x = self._entered(scope, x, layer)
        y = x
        squeezed = x
        for spec in layer.convolutions:
            if spec.name == "se_reduce":
                squeezed = self._conv(scope, self._pool(scope, y, layer), spec, layer)
            elif spec.name == "se_expand":
                gate = self._conv(scope, squeezed, spec, layer)
                y = self._joined(scope, "Mul", y, gate, f"{layer.name}.scaled", layer)
            else:
                y = self._conv(scope, y, spec, layer)
        return self._joined(scope, "Add", x, y, f"{layer.name}.sum", layer) if layer.has_residual else y

    def head(self, scope: Scope, x: Tensor, layer: LayerSpec, output: str) -> str:
        """Writes a head or exit head; its logits [B, K] are float and called `output`."""
        x = self._entered(scope, x, layer)
        is_pooled = False
        for spec in layer.convolutions:
            if spec.name != "conv" and not is_pooled:
                x, is_pooled = self._pool(scope, x, layer), True
            x = self._conv(scope, x, spec, layer)
        return scope.node("Flatten", (scope.float_of(x, self.dialect),), output, axis=1)

    def _entered(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        if layer.precision not in self.dialect.precisions:
            raise UsageError(
                f"{layer.name or layer.key}: precision {layer.precision!r} does not exist in dialect "
                f"'{self.dialect.name}'; allowed: {', '.join(self.dialect.precisions)}"
            )
        if layer.precision == "int8" and x.scale is None:
            return scope.quantize(x.name, x.source, *self._scale(x.name), self.dialect)
        return x

    def _pool(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        name = f"{layer.name}.pool"
        # GlobalAveragePool, not ReduceMean: ONNX Runtime keeps it in its blocked layout.
        y = scope.node("GlobalAveragePool", (scope.float_of(x, self.dialect),), scope.tag + name)
        return self._between(scope, name, y, quantized=layer.precision == "int8")

    def _joined(self, scope: Scope, op: str, a: Tensor, b: Tensor, name: str, layer: LayerSpec) -> Tensor:
        inputs = (scope.float_of(a, self.dialect), scope.float_of(b, self.dialect))
        return self._between(scope, name, scope.node(op, inputs, scope.tag + name), layer.precision == "int8")

    def _conv(self, scope: Scope, x: Tensor, spec: ConvSpec, layer: LayerSpec) -> Tensor:
        base = f"{layer.name}.{spec.name}"
        int8 = layer.precision == "int8"
        pre = spec.activation in self.dialect.pair_before
        output = base if spec.activation == "linear" else f"{base}.pre" if pre else f"{base}.conv"
        weight, bias = self._conv_weights(spec, base)
        if int8:
            inputs = (scope.float_of(x, self.dialect), *self._integer_weights(scope, x, base, weight, bias))
        else:
            inputs = (
                scope.float_of(x, self.dialect),
                scope.constant(f"{base}.weight", weight),
                scope.constant(f"{base}.bias", bias),
            )
        pad = spec.kernel_size // 2
        y = scope.node(
            "Conv",
            inputs,
            scope.tag + output,
            base,
            kernel_shape=(spec.kernel_size, spec.kernel_size),
            strides=(spec.stride, spec.stride),
            pads=(pad, pad, pad, pad),
            group=spec.groups,
        )
        if spec.activation == "linear":
            return self._between(scope, base, y, int8)
        if pre:
            y = scope.float_of(self._between(scope, output, y, int8), self.dialect)
        op, attributes = _ACTIVATION_OPS[spec.activation]
        return self._between(scope, base, scope.node(op, (y,), scope.tag + base, **attributes), int8)

    def _between(self, scope: Scope, name: str, source: str, quantized: bool) -> Tensor:
        """Every tensor between layers passes here: quantized in an int8 layer, float elsewhere."""
        x = Tensor(name, source)
        self.seen.append(x)
        if not quantized:
            return x
        return scope.quantize(name, source, *self._scale(name), self.dialect)

    def _scale(self, name: str) -> tuple[np.float32, int]:
        if self.ranges is None:
            raise UsageError(
                "an int8 layer needs the ranges of its tensors: give quant=calibrate(...) of nas.compress.calibrate, "
                "or quant=nominal_quant(candidate) where only latency matters"
            )
        try:
            lo, hi = self.ranges.lo[name], self.ranges.hi[name]
        except KeyError as e:
            raise RecordError(f"the quantization ranges have no tensor {name!r}; calibrate this candidate again") from e
        return self.dialect.scale_and_zero_point(lo, hi)

    def _conv_weights(self, spec: ConvSpec, base: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        shape = (spec.out_channels, spec.in_channels // spec.groups, spec.kernel_size, spec.kernel_size)
        result = []
        for name, wanted in ((f"{base}.weight", shape), (f"{base}.bias", shape[:1])):
            values = self.weights.get(name)
            if values is None:
                raise RecordError(f"weights have no {name!r}; they belong to another candidate")
            if values.shape != wanted or values.dtype != np.float32:
                raise RecordError(f"{name}: expected float32 {wanted}, got {values.dtype} {values.shape}")
            if not np.isfinite(values).all():
                raise RecordError(f"{name}: holds NaN or infinity; the training of this student diverged")
            result.append(values)
        return result[0], result[1]

    def _integer_weights(
        self, scope: Scope, x: Tensor, base: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> tuple[str, str]:
        if x.scale is None:
            raise RecordError(f"{base}: input {x.name!r} of an int8 convolution is not quantized")
        scale = weight_scales(weight, bias, x.scale)
        steps = weight / scale.reshape(-1, 1, 1, 1)
        integers = np.rint(steps, out=steps).astype(np.int8)  # the scale keeps them within -127..127
        # Exactly the float32 product: the integer convolution knows no other scale of its bias.
        bias_scale = x.scale * scale
        bias_integers = np.rint(bias.astype(np.float64) / bias_scale).astype(np.int32)
        return tuple(  # type: ignore[return-value]
            scope.node(
                "DequantizeLinear",
                (
                    scope.constant(f"{base}.{part}.q", values),
                    scope.constant(f"{base}.{part}.scale", scales),
                    scope.constant(f"{base}.{part}.zero_point", np.zeros(len(values), values.dtype)),
                ),
                f"{scope.tag}{base}.{part}.dq",
                axis=0,
            )
            for part, values, scales in (("weight", integers, scale), ("bias", bias_integers, bias_scale))
        )


def weight_scales(
    weight: NDArray[np.float32], bias: NDArray[np.float32], input_scale: np.float32
) -> NDArray[np.float32]:
    """Scale of each output channel [out]: symmetric, narrow range (-127..127).

    Differs from max|w| / 127 where a channel has nearly no weights but a bias (batch norm folded into a dead channel):
    the scale grows until the int32 bias fits.

    Args:
        weight: [out, in / groups, k, k].
        bias: [out].
        input_scale: scale of the convolution's input.
    """
    largest = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), np.float32(1e-8)) / np.float32(127)
    fitting = np.abs(bias) / (input_scale * np.float32(_INT32_LIMIT))
    scales: NDArray[np.float32] = np.maximum(largest, fitting)
    return scales
