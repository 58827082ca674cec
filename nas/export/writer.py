"""Layers as ONNX nodes: one set of functions for every precision and dialect, for rows and for networks.

Names carry the unit: convolution `stages.1.0.depthwise/Conv`, its output `stages.1.0.depthwise`. The tensors that need
a range in int8 are
    image                     the normalised image
    <layer>.<conv>            output of a convolution with its activation
    <layer>.<conv>.pre        the same before hard-swish or hard-sigmoid
    <layer>.pool              global mean (squeeze-and-excitation, heads)
    <layer>.scaled            product of squeeze-and-excitation
    <layer>.sum               residual sum; `local_sum` and `attention_sum` inside a block with attention
    <layer>.attention         what attention gives: the values mixed by the attention map
Attention itself (two matrix products and the softmax between them) is computed in float: products of two activations,
and probabilities that 8 bits with one scale for a whole map would round to 0 where many tokens share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, TensorProto, helper

from nas.core.errors import RecordError, UsageError
from nas.core.records import HEAD_DIM, ConvSpec, LayerSpec, QuantSpec
from nas.export.dialect import Dialect, FloatType

Weights = Mapping[str, NDArray[np.float32]]

ONNX_TYPES: dict[Any, int] = {
    np.dtype("float32"): TensorProto.FLOAT,
    np.dtype("float16"): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
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
_HARD_SWISH_OPSET = 14  # below it hard-swish is written as HardSigmoid and Mul
_REDUCED_AXES_OPSET = 18  # from it on ReduceMax takes its axes as an input


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor between layers. `source` is its name in the graph: float, or quantized when `scale` is given.

    `kind` is the type of its float form.
    """

    name: str
    source: str
    scale: np.floating[Any] | None = None
    zero_point: int = 0
    kind: FloatType = "float32"


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
        self._casts: dict[tuple[str, str], str] = {}

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

    def split(self, inputs: Sequence[str], outputs: Sequence[str], axis: int) -> Sequence[str]:
        """Adds a Split along an axis; gives the names of its outputs."""
        node = self.graph.node.add(op_type="Split", name=f"{inputs[0]}/Split", input=inputs, output=outputs)
        node.attribute.append(helper.make_attribute("axis", axis))
        return outputs

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

    def scalar(self, name: str, value: float | np.floating[Any], kind: str) -> str:
        """Adds an initializer without dimensions; `kind` is a NumPy type name."""
        return self.constant(name, np.asarray(value, dtype=kind))

    def float_of(self, x: Tensor, dialect: Dialect, kind: FloatType = "float32") -> str:
        """Name of the float form of a tensor in a type; DequantizeLinear and Cast are written once per graph."""
        if x.scale is None:
            return self.cast(x.source, x.kind, kind)
        if x.source not in self._floats:
            pair = self._pair(x.name, x.scale, x.zero_point, dialect)
            self._floats[x.source] = self.node("DequantizeLinear", (x.source, *pair), f"{self.tag}{x.name}.dq")
        return self.cast(self._floats[x.source], x.kind, kind)

    def cast(self, source: str, kind: str, wanted: str, name: str = "") -> str:
        """Name of a float tensor in another type, called `name` where one is given."""
        if kind == wanted:
            return source
        if (source, wanted) not in self._casts:
            own = source if source.startswith(self.tag) else self.tag + source
            output = name or f"{own}.{wanted}"
            self._casts[source, wanted] = self.node("Cast", (source,), output, to=ONNX_TYPES[np.dtype(wanted)])
        return self._casts[source, wanted]

    def quantize(self, name: str, source: str, scale: np.floating[Any], zero_point: int, dialect: Dialect) -> Tensor:
        """Writes the QuantizeLinear of a float tensor of the type of its scale, once per graph."""
        if source not in self._quantized:
            pair = self._pair(name, scale, zero_point, dialect)
            q = self.node("QuantizeLinear", (source, *pair), f"{self.tag}{name}.q")
            kind: FloatType = "float16" if scale.dtype == np.float16 else "float32"
            self._quantized[source] = Tensor(name, q, scale, zero_point, kind)
        return self._quantized[source]

    def _pair(self, name: str, scale: np.floating[Any], zero_point: int, dialect: Dialect) -> tuple[str, str]:
        return (
            self.scalar(f"{name}.scale", scale, str(scale.dtype)),
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
        return self._between(scope, "image", x, None)

    def layer(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        """Writes a stem or block; gives its output."""
        x = self._entered(scope, x, layer)
        for branch in layer.branches:
            y = squeezed = x
            for spec in branch.convolutions:
                if spec.name == "se_reduce":
                    squeezed = self._conv(scope, self._pool(scope, y, layer), spec, layer)
                elif spec.name == "se_expand":
                    gate = self._conv(scope, squeezed, spec, layer)
                    y = self._joined(scope, "Mul", y, gate, f"{layer.name}.scaled", layer)
                else:
                    y = self._conv(scope, y, spec, layer)
                if spec.name == "qkv":
                    y = self._attend(scope, y, layer)
            if not branch.has_skip:
                x = y
                continue
            if layer.precision == "int8" and self.dialect.pairs_at == "inputs":
                # Only the skip input has a pair: the branch that comes from the convolution must stay bare to be fused.
                x = self._paired(scope, x, layer)
            x = self._joined(scope, "Add", x, y, f"{layer.name}.{branch.sum}", layer)
        return x

    def head(self, scope: Scope, x: Tensor, layer: LayerSpec, output: str) -> str:
        """Writes a head or exit head; its logits [B, K] are float32 and called `output`."""
        x = self._entered(scope, x, layer)
        is_pooled = False
        for spec in layer.convolutions:
            if spec.name != "conv" and not is_pooled:
                x, is_pooled = self._pool(scope, x, layer), True
            x = self._conv(scope, x, spec, layer)
        kind = self.dialect.float_type(layer.precision)
        is_last = kind == "float32"
        flat = scope.node(
            "Flatten", (scope.float_of(x, self.dialect, kind),), output if is_last else f"{output}.flat", axis=1
        )
        return scope.cast(flat, kind, "float32", output)

    def confidence(self, scope: Scope, logits: str, base: str, output: str, *, is_scalar: bool) -> str:
        """Largest softmax probability of logits [1, K]: without dimensions, or one value per image [1]."""
        surest = scope.node("Softmax", (logits,), f"{base}.softmax", axis=1)
        axes = (0, 1) if is_scalar else (1,)
        if self.dialect.opset < _REDUCED_AXES_OPSET:
            return scope.node("ReduceMax", (surest,), output, axes=axes, keepdims=0)
        name = scope.constant(f"{base}.axes", np.array(axes, dtype=np.int64))
        return scope.node("ReduceMax", (surest, name), output, keepdims=0)

    def _entered(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        if layer.precision not in self.dialect.precisions:
            raise UsageError(
                f"{layer.name or layer.key}: precision {layer.precision!r} does not exist in dialect "
                f"'{self.dialect.name}'; allowed: {', '.join(self.dialect.precisions)}"
            )
        if layer.precision == "int8" and x.scale is None and self.dialect.pairs_at == "outputs":
            return scope.quantize(x.name, x.source, *self._scale(x.name), self.dialect)
        return x

    def _paired(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        """The quantized form of a tensor: one pair, whoever reads it."""
        if x.scale is not None:
            return x
        source = scope.float_of(x, self.dialect, self.dialect.float_type(layer.precision))
        return scope.quantize(x.name, source, *self._scale(x.name), self.dialect)

    def _pool(self, scope: Scope, x: Tensor, layer: LayerSpec) -> Tensor:
        name = f"{layer.name}.pool"
        # GlobalAveragePool, not ReduceMean: ONNX Runtime keeps it in its blocked layout.
        source = scope.float_of(x, self.dialect, self.dialect.float_type(layer.precision))
        y = scope.node("GlobalAveragePool", (source,), scope.tag + name)
        return self._between(scope, name, y, layer)

    def _attend(self, scope: Scope, qkv: Tensor, layer: LayerSpec) -> Tensor:
        """Self-attention over the pixels of a map, as `nas.models.student.attend` computes it."""
        kind, name = self.dialect.float_type(layer.precision), f"{layer.name}.attention"
        out = scope.tag + name

        def shape(what: str, *sizes: int) -> str:
            return scope.constant(f"{name}.{what}", np.array(sizes, dtype=np.int64))

        source = scope.float_of(qkv, self.dialect, kind)
        by_head = (source, shape("heads_shape", 0, layer.heads, 3 * HEAD_DIM, layer.tokens))  # 0: the batch
        parts = (scope.node("Reshape", by_head, f"{out}.heads"), shape("parts", *(HEAD_DIM,) * 3))
        query, key, value = scope.split(parts, [f"{out}.query", f"{out}.key", f"{out}.value"], axis=2)
        turned = scope.node("Transpose", (query,), f"{out}.query_t", perm=(0, 1, 3, 2))
        products = scope.node("MatMul", (turned, key), f"{out}.products")
        factor = scope.scalar(f"{name}.factor", HEAD_DIM**-0.5, kind)
        scaled = scope.node("Mul", (products, factor), f"{out}.scaled_products")
        weights = scope.node("Softmax", (scaled,), f"{out}.map", axis=3)
        turned = scope.node("Transpose", (weights,), f"{out}.map_t", perm=(0, 1, 3, 2))
        mixed = scope.node("MatMul", (value, turned), f"{out}.mixed")
        side = layer.out_size
        whole = (mixed, shape("map_shape", 0, layer.heads * HEAD_DIM, side, side))
        return self._between(scope, name, scope.node("Reshape", whole, out), layer)

    def _joined(self, scope: Scope, op: str, a: Tensor, b: Tensor, name: str, layer: LayerSpec) -> Tensor:
        kind = self.dialect.float_type(layer.precision)
        inputs = (scope.float_of(a, self.dialect, kind), scope.float_of(b, self.dialect, kind))
        return self._between(scope, name, scope.node(op, inputs, scope.tag + name), layer)

    def _conv(self, scope: Scope, x: Tensor, spec: ConvSpec, layer: LayerSpec) -> Tensor:
        base = f"{layer.name}.{spec.name}"
        pre = spec.activation in self.dialect.pair_before
        output = base if spec.activation == "linear" else f"{base}.pre" if pre else f"{base}.conv"
        kind = self.dialect.float_type(layer.precision)
        weight, bias = self._conv_weights(spec, base)
        if layer.precision == "int8" and self.dialect.is_integer(layer, spec):
            x = self._paired(scope, x, layer)
            scale = self._weight_scale(x, base, weight, bias)
            weight_name = self._integer_weight(scope, base, weight, scale)
            bias_name = self._bias(scope, x, base, bias, scale, kind)
        else:
            if self._rounds(layer):
                weight, bias = (v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in (weight, bias))
            weight_name = scope.constant(f"{base}.weight", _typed(weight, kind, f"{base}.weight"))
            bias_name = scope.constant(f"{base}.bias", _typed(bias, kind, f"{base}.bias"))
        pad = spec.kernel_size // 2
        y = scope.node(
            "Conv",
            (scope.float_of(x, self.dialect, kind), weight_name, bias_name),
            scope.tag + output,
            base,
            kernel_shape=(spec.kernel_size, spec.kernel_size),
            strides=(spec.stride, spec.stride),
            pads=(pad, pad, pad, pad),
            group=spec.groups,
        )
        if spec.activation == "linear":
            return self._between(scope, base, y, layer)
        if pre:
            y = scope.float_of(self._between(scope, output, y, layer), self.dialect, kind)
        if spec.activation == "hard_swish" and self.dialect.opset < _HARD_SWISH_OPSET:
            op, attributes = _ACTIVATION_OPS["hard_sigmoid"]
            gate = scope.node(op, (y,), f"{scope.tag}{base}.gate", **attributes)
            return self._between(scope, base, scope.node("Mul", (y, gate), scope.tag + base), layer)
        op, attributes = _ACTIVATION_OPS[spec.activation]
        return self._between(scope, base, scope.node(op, (y,), scope.tag + base, **attributes), layer)

    def _between(self, scope: Scope, name: str, source: str, layer: LayerSpec | None) -> Tensor:
        """Every tensor between layers passes here: quantized in an int8 layer where pairs stand behind outputs.

        `layer` is the one that made it; None for the normalised image, which is float32.
        """
        if layer is not None and self._rounds(layer):
            rounded = scope.node("Cast", (source,), f"{source}.bf16", to=TensorProto.BFLOAT16)
            source = scope.node("Cast", (rounded,), f"{source}.rounded", to=TensorProto.FLOAT)
        x = Tensor(name, source, kind="float32" if layer is None else self.dialect.float_type(layer.precision))
        self.seen.append(x)
        if layer is None or layer.precision != "int8" or self.dialect.pairs_at == "inputs":
            return x
        return scope.quantize(name, source, *self._scale(name), self.dialect)

    def _rounds(self, layer: LayerSpec) -> bool:
        return layer.precision == "bf16" and self.dialect.rounds_bf16

    def _scale(self, name: str) -> tuple[np.floating[Any], int]:
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

    def _integer_weight(
        self, scope: Scope, base: str, weight: NDArray[np.float32], scale: NDArray[np.floating[Any]]
    ) -> str:
        """Name of the float form of an int8 weight: symmetric, one scale per output channel (axis 0)."""
        zero_points = scope.constant(f"{base}.weight.zero_point", np.zeros(len(weight), np.int8))
        pair = (scope.constant(f"{base}.weight.scale", scale), zero_points)
        if self.dialect.weights == "floats":
            source = scope.constant(f"{base}.weight", weight)
            integers = scope.node("QuantizeLinear", (source, *pair), f"{scope.tag}{base}.weight.q", axis=0)
        else:
            steps = weight / scale.astype(np.float32).reshape(-1, 1, 1, 1)
            # the scale keeps them within the limit
            integers = scope.constant(f"{base}.weight.q", np.rint(steps, out=steps).astype(np.int8))
        return scope.node("DequantizeLinear", (integers, *pair), f"{scope.tag}{base}.weight.dq", axis=0)

    def _bias(
        self,
        scope: Scope,
        x: Tensor,
        base: str,
        bias: NDArray[np.float32],
        weight_scale: NDArray[np.floating[Any]],
        kind: FloatType,
    ) -> str:
        """Name of the bias of an int8 convolution."""
        if not self.dialect.integer_bias:
            return scope.constant(f"{base}.bias", _typed(bias, kind, f"{base}.bias"))
        # Exactly the float32 product: the integer convolution knows no other scale of its bias.
        scale = x.scale * weight_scale
        integers = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
        return scope.node(
            "DequantizeLinear",
            (
                scope.constant(f"{base}.bias.q", integers),
                scope.constant(f"{base}.bias.scale", scale),
                scope.constant(f"{base}.bias.zero_point", np.zeros(len(integers), np.int32)),
            ),
            f"{scope.tag}{base}.bias.dq",
            axis=0,
        )

    def _weight_scale(
        self, x: Tensor, base: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> NDArray[np.floating[Any]]:
        if x.scale is None:
            raise RecordError(f"{base}: input {x.name!r} of an int8 convolution is not quantized")
        return self.dialect.weight_scales(weight, bias, x.scale)


def _typed(values: NDArray[np.float32], kind: FloatType, name: str) -> NDArray[np.floating[Any]]:
    """Weights in a type; float16 holds values up to 65504, bfloat16 those of float32 with 8 bits of them."""
    if kind == "float32":
        return values
    if kind == "bfloat16":
        return values.astype(ml_dtypes.bfloat16)
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise RecordError(f"{name}: holds {float(np.abs(values).max()):g}, too large for fp16 (65504); use fp32 there")
    return values.astype(np.float16)
