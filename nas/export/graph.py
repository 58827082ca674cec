"""Direct ONNX writer: layers of `expand` to ONNX nodes, in fp32 or int8, for rows and for whole networks alike.

One set of functions writes a layer, so a measured row is the very piece of graph that stands in the network. int8 is
explicit QDQ; what a dialect decides (placement, types, bias form) is read from a small record. Writing takes
milliseconds, which exporters do not: a search writes thousands of graphs.

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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from nas.core.errors import RecordError, UsageError
from nas.core.records import Candidate, ConvSpec, LayerSpec, Precision, QuantSpec
from nas.core.walk import expand

Weights = Mapping[str, NDArray[np.float32]]
Form = Literal["plain", "logits", "if"]

OPSET = 17  # TensorRT reads it from 8.4 on; Reduce operators still take their axes as attributes
IR_VERSION = 9

_TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
_ACTIVATION_OPS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5}),
}
_INT32_LIMIT = 2.0**30  # a bias stays a factor of two below the int32 range: the sum of products is added to it


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a runtime wants of an int8 graph.

    `activation_type` and `symmetric` give scale and zero point of a tensor from its range; `pair_before` lists the
    activations whose input is quantized too.
    """

    name: str
    precisions: tuple[Precision, ...]
    activation_type: Literal["uint8", "int8"]
    symmetric: bool
    pair_before: frozenset[str]

    def scale_and_zero_point(self, lo: float, hi: float) -> tuple[np.float32, int]:
        """Scale (float32, as the graph holds it) and zero point of a tensor with values in lo..hi."""
        if self.symmetric:
            return np.float32(max(hi, -lo, 1e-6) / 127.0), 0
        lo, hi = min(lo, 0.0), max(hi, 1e-6)
        scale = np.float32((hi - lo) / 255.0)
        return scale, int(np.clip(np.rint(-lo / float(scale)), 0, 255))


# ONNX Runtime on x86 fuses a ReLU into the next Q only where that Q itself clips at zero, hence uint8; a convolution
# before hard-swish or hard-sigmoid stays an integer one only with a pair between the two.
ORT = Dialect("ort", ("fp32", "int8"), "uint8", symmetric=False, pair_before=frozenset({"hard_swish", "hard_sigmoid"}))
DIALECTS = {dialect.name: dialect for dialect in (ORT,)}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor between layers. `source` is its name in the graph: float, or quantized when `scale` is given."""

    name: str
    source: str
    scale: np.float32 | None = None
    zero_point: int = 0


class _Scope:
    """A graph being written: the main one or a branch of an `If`.

    A branch reads tensors of the graphs around it, but has its own initializers and its own DequantizeLinear: weights
    of the outer graph are not optimised into a branch. `tag` keeps the names of a branch apart.
    """

    def __init__(self, tag: str = "") -> None:
        self.tag = tag
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._floats: dict[str, str] = {}
        self._quantized: dict[str, _Tensor] = {}

    def node(self, op: str, inputs: Sequence[str], output: str, unit: str = "", **attributes: Any) -> str:
        name = f"{self.tag}{unit}/{op}" if unit else f"{output}/{op}"
        self.nodes.append(helper.make_node(op, inputs, (output,), name, **attributes))
        return output

    def constant(self, name: str, values: NDArray[Any]) -> str:
        full = self.tag + name
        if full not in self.initializers:
            self.initializers[full] = TensorProto(
                name=full, data_type=_TYPES[values.dtype.name], dims=values.shape, raw_data=values.tobytes()
            )
        return full

    def scalar(self, name: str, value: float | np.float32, kind: str) -> str:
        return self.constant(name, np.asarray(value, dtype=kind))

    def float_of(self, x: _Tensor, dialect: Dialect) -> str:
        """Name of the float form of a tensor; its DequantizeLinear is written once per graph, at the first reader."""
        if x.scale is None:
            return x.source
        if x.source not in self._floats:
            pair = self._pair(x.name, x.scale, x.zero_point, dialect)
            self._floats[x.source] = self.node("DequantizeLinear", (x.source, *pair), f"{self.tag}{x.name}.dq")
        return self._floats[x.source]

    def quantize(self, name: str, source: str, scale: np.float32, zero_point: int, dialect: Dialect) -> _Tensor:
        """Writes the QuantizeLinear of a float tensor, once per graph."""
        if source not in self._quantized:
            pair = self._pair(name, scale, zero_point, dialect)
            q = self.node("QuantizeLinear", (source, *pair), f"{self.tag}{name}.q")
            self._quantized[source] = _Tensor(name, q, scale, zero_point)
        return self._quantized[source]

    def _pair(self, name: str, scale: np.float32, zero_point: int, dialect: Dialect) -> tuple[str, str]:
        return (
            self.scalar(f"{name}.scale", scale, "float32"),
            self.scalar(f"{name}.zero_point", zero_point, dialect.activation_type),
        )

    def graph(self, name: str, inputs: Iterable[ValueInfoProto], outputs: Iterable[ValueInfoProto]) -> GraphProto:
        return helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), initializer=list(self.initializers.values())
        )


class _Writer:
    """Writes layers into scopes. `ranges` is needed by int8 layers; `seen` lists the tensors that need a range."""

    def __init__(self, weights: Weights, ranges: QuantSpec | None, dialect: Dialect) -> None:
        self.weights = weights
        self.ranges = ranges
        self.dialect = dialect
        self.seen: list[_Tensor] = []

    def image(self, scope: _Scope, source: str, mean: Sequence[float], std: Sequence[float]) -> _Tensor:
        """Normalisation of raw pixels: x * 1/(255 std) - mean/std."""
        shape = (1, len(mean), 1, 1)
        wide_std = np.asarray(std, dtype=np.float64)
        factor = (1.0 / (255.0 * wide_std)).astype(np.float32).reshape(shape)
        offset = (-np.asarray(mean, dtype=np.float64) / wide_std).astype(np.float32).reshape(shape)
        x = scope.node("Mul", (source, scope.constant("image.factor", factor)), "image.scaled")
        x = scope.node("Add", (x, scope.constant("image.offset", offset)), "image.normalised")
        return self._between(scope, "image", x, quantized=False)

    def layer(self, scope: _Scope, x: _Tensor, layer: LayerSpec) -> _Tensor:
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

    def head(self, scope: _Scope, x: _Tensor, layer: LayerSpec, output: str) -> str:
        """Writes a head or exit head; its logits [B, K] are float and called `output`."""
        x = self._entered(scope, x, layer)
        is_pooled = False
        for spec in layer.convolutions:
            if spec.name != "conv" and not is_pooled:
                x, is_pooled = self._pool(scope, x, layer), True
            x = self._conv(scope, x, spec, layer)
        return scope.node("Flatten", (scope.float_of(x, self.dialect),), output, axis=1)

    def _entered(self, scope: _Scope, x: _Tensor, layer: LayerSpec) -> _Tensor:
        if layer.precision not in self.dialect.precisions:
            raise UsageError(
                f"{layer.name or layer.key}: precision {layer.precision!r} does not exist in dialect "
                f"'{self.dialect.name}'; allowed: {', '.join(self.dialect.precisions)}"
            )
        if layer.precision == "int8" and x.scale is None:
            return scope.quantize(x.name, x.source, *self._scale(x.name), self.dialect)
        return x

    def _pool(self, scope: _Scope, x: _Tensor, layer: LayerSpec) -> _Tensor:
        name = f"{layer.name}.pool"
        # GlobalAveragePool, not ReduceMean: ONNX Runtime keeps it in its blocked layout.
        y = scope.node("GlobalAveragePool", (scope.float_of(x, self.dialect),), scope.tag + name)
        return self._between(scope, name, y, quantized=layer.precision == "int8")

    def _joined(self, scope: _Scope, op: str, a: _Tensor, b: _Tensor, name: str, layer: LayerSpec) -> _Tensor:
        inputs = (scope.float_of(a, self.dialect), scope.float_of(b, self.dialect))
        return self._between(scope, name, scope.node(op, inputs, scope.tag + name), layer.precision == "int8")

    def _conv(self, scope: _Scope, x: _Tensor, spec: ConvSpec, layer: LayerSpec) -> _Tensor:
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

    def _between(self, scope: _Scope, name: str, source: str, quantized: bool) -> _Tensor:
        """Every tensor between layers passes here: quantized in an int8 layer, float elsewhere."""
        x = _Tensor(name, source)
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
        self, scope: _Scope, x: _Tensor, base: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> tuple[str, str]:
        if x.scale is None:
            raise RecordError(f"{base}: input {x.name!r} of an int8 convolution is not quantized")
        scale = weight_scales(weight, bias, x.scale)
        integers = np.clip(np.rint(weight / scale.reshape(-1, 1, 1, 1)), -127, 127).astype(np.int8)
        # Exactly the float32 product: with any other bias scale ONNX Runtime fuses no convolution at all.
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
    return np.maximum(largest, np.abs(bias) / (input_scale * np.float32(_INT32_LIMIT))).astype(np.float32)


def layer_model(layer: LayerSpec, *, seed: int = 0, dialect: Dialect = ORT) -> bytes:
    """ONNX model of one layer with random weights: a row to measure.

    Input `x` and output `y` have the network's own form: float, or quantized in int8. A stem takes raw float pixels and
    normalises them; heads give float logits [1, K].

    Args:
        layer: what to write, in its precision.
        seed: of the weights.
        dialect: form of an int8 graph.

    Raises:
        UsageError: the dialect does not have the layer's precision.
    """
    is_int8, is_head = layer.precision == "int8", layer.kind in ("head", "exit_head")
    writer = _Writer(_random(((layer, spec) for spec in layer.convolutions), seed), _nominal([layer]), dialect)
    scope = _Scope()
    in_shape = (1, layer.in_channels, layer.in_size, layer.in_size)
    if layer.kind == "stem":
        x = writer.image(scope, "x", (0.5,) * layer.in_channels, (0.25,) * layer.in_channels)
    elif is_int8:
        x = _Tensor("x", "x", *dialect.scale_and_zero_point(*_NOMINAL["linear"]))
    else:
        x = _Tensor("x", "x")
    in_type = dialect.activation_type if x.scale is not None else "float32"
    if is_head:
        output = helper.make_tensor_value_info(
            writer.head(scope, x, layer, "y"), TensorProto.FLOAT, (1, layer.out_channels)
        )
    else:
        out_type = _TYPES[dialect.activation_type] if is_int8 else TensorProto.FLOAT
        out_shape = (1, layer.out_channels, layer.out_size, layer.out_size)
        output = helper.make_tensor_value_info(writer.layer(scope, x, layer).source, out_type, out_shape)
    return _model(scope.graph(layer.key, [helper.make_tensor_value_info("x", _TYPES[in_type], in_shape)], [output]))


def network_model(
    candidate: Candidate,
    weights: Weights,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    quant: QuantSpec | None = None,
    form: Form = "plain",
    batch: int | None = 1,
    dialect: Dialect = ORT,
) -> bytes:
    """ONNX model of a whole network, each stage in its precision. Input `image`: raw float32 pixels 0-255 [B, C, H, W].

    Forms:
        plain: output `logits` [B, K] of the head; exit heads are not written.
        logits: outputs `logits_0` ... of every exit, the head last; all of them are always computed.
        if: outputs `logits` [1, K] and `exit_index` (int64, number of exits = the head). What lies behind an exit is
            executed only when the largest softmax probability there is below `threshold_<k>`, a graph input whose
            default is the candidate's threshold. An exit that nothing takes (threshold above 1) is left out, and the
            network ends at an exit that everything takes (threshold at most 0).

    Args:
        candidate: the network; its thresholds are needed by form "if".
        weights: `<layer>.<convolution>.weight|bias`, batch norm folded in.
        mean: of the training pixels / 255, one per channel.
        std: same.
        quant: ranges of the tensors, where a layer is int8.
        form: see above.
        batch: images per run, None for any number.
        dialect: form of an int8 graph.

    Raises:
        UsageError: a precision that the dialect lacks, a missing threshold or range, "if" with a batch.
        RecordError: weights or ranges of another candidate.
    """
    _check_normalisation(candidate, mean, std)
    writer = _Writer(weights, quant, dialect)
    scope = _Scope()
    x = writer.image(scope, "image", mean, std)
    rows = "N" if batch is None else batch
    inputs = [_image_info(candidate, batch)]
    if form == "if":
        if batch != 1:
            raise UsageError(f"form 'if' decides image by image: batch must be 1, got {batch}")
        outputs = _write_gated(writer, scope, x, candidate, inputs)
    else:
        outputs = []
        for layer in expand(candidate):
            if layer.kind not in ("head", "exit_head"):
                x = writer.layer(scope, x, layer)
            elif form == "logits" or layer.kind == "head":
                name = f"logits_{layer.segment}" if form == "logits" else "logits"
                writer.head(scope, x, layer, name)
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (rows, layer.out_channels)))
    return _model(scope.graph(candidate.id, inputs, outputs))


def tensors_model(
    candidate: Candidate, weights: Weights, mean: Sequence[float], std: Sequence[float]
) -> tuple[bytes, tuple[str, ...]]:
    """The float network that reports the range of every tensor, for calibration; serves every mix of precisions.

    Outputs `lo` and `hi` [B, T]: smallest and largest value of each image in each of the T named tensors, so that no
    tensor has to leave the runtime.

    Returns:
        The model (any batch size) and the T names.

    Raises:
        RecordError: weights of another candidate.
    """
    _check_normalisation(candidate, mean, std)
    plain = candidate.with_precision("fp32")
    writer = _Writer(weights, None, ORT)
    scope = _Scope()
    x = writer.image(scope, "image", mean, std)
    for layer in expand(plain):
        if layer.kind in ("head", "exit_head"):
            writer.head(scope, x, layer, f"logits_{layer.segment}")
        else:
            x = writer.layer(scope, x, layer)
    shape = scope.constant("row_shape", np.array([-1, 1], dtype=np.int64))
    outputs = []
    for side, op in (("lo", "ReduceMin"), ("hi", "ReduceMax")):
        columns = []
        for tensor in writer.seen:
            name = f"{tensor.name}.{side}"
            scope.node(op, (tensor.source,), f"{name}.value", axes=(1, 2, 3), keepdims=0)
            columns.append(scope.node("Reshape", (f"{name}.value", shape), name))
        scope.node("Concat", columns, side, axis=1)
        outputs.append(helper.make_tensor_value_info(side, TensorProto.FLOAT, ("N", len(columns))))
    model = _model(scope.graph(plain.id, [_image_info(candidate, None)], outputs))
    return model, tuple(tensor.name for tensor in writer.seen)


def forced_exit(model: bytes, exit_index: int) -> bytes:
    """An "if" model whose default thresholds send every image to one exit: what is measured to time that exit.

    Only the defaults of the threshold inputs change; the graph stays the exported one.

    Args:
        model: written by `network_model(..., form="if")`.
        exit_index: of `network_model`'s output `exit_index`; the head is the number of exits.
    """
    proto = ModelProto.FromString(model)
    for tensor in proto.graph.initializer:
        prefix, _, number = tensor.name.partition("_")
        if prefix == "threshold" and number.isdigit():
            tensor.raw_data = np.float32(0.0 if int(number) == exit_index else 2.0).tobytes()
    return proto.SerializeToString()


def random_weights(candidate: Candidate, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights of every convolution, keeping the size of the signal: where only latency or shapes matter."""
    return _random(((layer, spec) for layer in expand(candidate) for spec in layer.convolutions), seed)


def nominal_quant(candidate: Candidate) -> QuantSpec:
    """Made-up ranges of every tensor, by kind: for int8 networks of which only the latency matters."""
    return _nominal(expand(candidate))


# Typical ranges after batch norm; hard-swish has its minimum -0.375 at -1.5.
_NOMINAL = {
    "linear": (-4.0, 4.0),
    "relu": (0.0, 4.0),
    "hard_swish": (-0.375, 4.0),
    "hard_sigmoid": (0.0, 1.0),
    "pre": (-4.0, 4.0),
}


def _nominal(layers: Iterable[LayerSpec]) -> QuantSpec:
    ranges = {"image": (-2.5, 2.5)}
    for layer in layers:
        for spec in layer.convolutions:
            base = f"{layer.name}.{spec.name}"
            ranges[base] = _NOMINAL[spec.activation]
            ranges[f"{base}.pre"] = _NOMINAL["pre"]
        for name in ("pool", "scaled", "sum"):
            ranges[f"{layer.name}.{name}"] = _NOMINAL["linear"]
    return QuantSpec({k: lo for k, (lo, _) in ranges.items()}, {k: hi for k, (_, hi) in ranges.items()}, 0)


def _random(convolutions: Iterable[tuple[LayerSpec, ConvSpec]], seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    result = {}
    for layer, spec in convolutions:
        base = f"{layer.name}.{spec.name}"
        fan_in = spec.weights // spec.out_channels
        # Uniform from random bytes: ten times faster than normal numbers, and a table needs thousands of rows.
        integers = rng.integers(
            -127, 128, (spec.out_channels, spec.in_channels // spec.groups, spec.kernel_size, spec.kernel_size), np.int8
        )
        result[f"{base}.weight"] = integers.astype(np.float32) * np.float32(np.sqrt(6.0 / fan_in) / 127.0)
        result[f"{base}.bias"] = rng.uniform(-0.1, 0.1, spec.out_channels).astype(np.float32)
    return result


def _write_gated(
    writer: _Writer, scope: _Scope, x: _Tensor, candidate: Candidate, inputs: list[ValueInfoProto]
) -> list[ValueInfoProto]:
    """Writes the "if" form; adds the threshold inputs to `inputs` and gives the outputs."""
    main = scope
    segments: list[list[LayerSpec]] = [[] for _ in range(len(candidate.exits) + 1)]
    for layer in expand(candidate):
        segments[layer.segment].append(layer)
    outputs = ("logits", TensorProto.FLOAT, (1, candidate.num_classes)), ("exit_index", TensorProto.INT64, ())

    def leave(branch: _Scope, logits: str, k: int) -> None:
        branch.node("Identity", (logits,), f"{branch.tag}logits")
        branch.node("Constant", (), f"{branch.tag}exit_index", value=helper.make_tensor("", TensorProto.INT64, (), [k]))

    def infos(tag: str) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(tag + name, kind, shape) for name, kind, shape in outputs]

    def write(branch: _Scope, x: _Tensor, k: int) -> None:
        for layer in segments[k][:-1]:
            x = writer.layer(branch, x, layer)
        head = segments[k][-1]
        threshold = 0.0
        if k < len(candidate.exits):
            given = candidate.exits[k].threshold
            if given is None:
                raise UsageError(
                    f"exits[{k}] (after stage {candidate.exits[k].after_stage}) has no threshold; "
                    "solve it and give candidate.with_thresholds(...)"
                )
            threshold = given
        if threshold > 1.0:
            write(branch, x, k + 1)
            return
        logits = writer.head(branch, x, head, f"{branch.tag}{head.name}.logits")
        if threshold <= 0.0:
            leave(branch, logits, k)
            return
        main.scalar(f"threshold_{k}", threshold, "float32")
        inputs.append(helper.make_tensor_value_info(f"threshold_{k}", TensorProto.FLOAT, ()))
        base = f"{branch.tag}{head.name}"
        surest = branch.node("Softmax", (logits,), f"{base}.softmax", axis=1)
        surest = branch.node("ReduceMax", (surest,), f"{base}.confidence", axes=(0, 1), keepdims=0)
        condition = branch.node("GreaterOrEqual", (surest, f"threshold_{k}"), f"{base}.leaves")
        taken, tail = _Scope(f"at_{k}/"), _Scope(f"after_{k}/")
        leave(taken, logits, k)
        write(tail, x, k + 1)
        branch.nodes.append(
            helper.make_node(
                "If",
                (condition,),
                (f"{branch.tag}logits", f"{branch.tag}exit_index"),
                f"{base}/If",
                then_branch=taken.graph(f"at_{k}", (), infos(taken.tag)),
                else_branch=tail.graph(f"after_{k}", (), infos(tail.tag)),
            )
        )

    write(scope, x, 0)
    return infos("")


def _check_normalisation(candidate: Candidate, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != candidate.in_channels or len(std) != candidate.in_channels:
        raise RecordError(
            f"mean and std need {candidate.in_channels} values (one per channel), got {len(mean)} and {len(std)}"
        )
    if not all(s > 0 for s in std):
        raise RecordError(f"std must be positive, got {tuple(std)}")


def _image_info(candidate: Candidate, batch: int | None) -> ValueInfoProto:
    side = candidate.resolution
    shape = ("N" if batch is None else batch, candidate.in_channels, side, side)
    return helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)


def _model(graph: GraphProto) -> bytes:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="nas"
    )
    return model.SerializeToString()
