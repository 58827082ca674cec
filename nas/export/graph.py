"""Direct ONNX writer: layers of `expand` to ONNX, in fp32 or int8, for rows and for whole networks alike.

A measured row is the very piece of graph that stands in the network. int8 is explicit QDQ. Writing takes milliseconds,
which exporters do not: a search writes thousands of graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from nas.core.errors import RecordError, UsageError
from nas.core.records import Candidate, ConvSpec, LayerSpec, Precision, QuantSpec
from nas.core.walk import expand
from nas.devices.board.onnx_facts import OURS, PRECISION_KEY
from nas.export.check import all_graphs
from nas.export.dialect import ORT, Dialect, FloatType, building_precision
from nas.export.writer import ONNX_TYPES, LayerWriter, Scope, Tensor, Weights

Form = Literal["plain", "logits", "if"]


def layer_model(layer: LayerSpec, *, seed: int = 0, dialect: Dialect = ORT) -> bytes:
    """ONNX model of one layer with random weights: a row to measure.

    Its input `x` and its output have the network's own form: float (half where the dialect has half floats), or
    quantized where pairs stand behind outputs. A stem takes raw float pixels
    and normalises them; heads give float logits [1, K].

    Args:
        layer: what to write, in its precision.
        seed: of the weights.
        dialect: form of an int8 graph.

    Raises:
        UsageError: the dialect does not have the layer's precision.
    """
    dialect = dialect.fitting((layer.precision,))
    is_head = layer.kind in ("head", "exit_head")
    is_quantized = layer.precision == "int8" and dialect.pairs_at == "outputs"
    writer = LayerWriter(_random(((layer, spec) for spec in layer.convolutions), seed), _nominal([layer]), dialect)
    model, scope = _new_model(layer.key, dialect)
    if layer.kind == "stem":
        _declare(scope.graph.input, "x", "float32", (1, layer.in_channels, layer.in_size, layer.in_size))
        x = writer.image(scope, "x", (0.5,) * layer.in_channels, (0.25,) * layer.in_channels)
    else:
        kind = dialect.float_type(layer.precision)
        x = Tensor("x", "x", kind=kind)
        if is_quantized:
            x = Tensor("x", "x", *dialect.scale_and_zero_point(*_NOMINAL["linear"]))
        in_type = dialect.activation_type if is_quantized else kind
        _declare(scope.graph.input, "x", in_type, (1, layer.in_channels, layer.in_size, layer.in_size))
    if is_head:
        _declare(scope.graph.output, writer.head(scope, x, layer, "y"), "float32", (1, layer.out_channels))
    else:
        y = writer.layer(scope, x, layer)
        out_type = dialect.activation_type if is_quantized else y.kind
        _declare(scope.graph.output, y.source, out_type, (1, layer.out_channels, layer.out_size, layer.out_size))
    return _finished(model, dialect, (layer.precision,))


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
    dialect = dialect.fitting(candidate.precisions)
    writer = LayerWriter(weights, quant, dialect)
    model, scope = _new_model(candidate.id, dialect)
    _declare_image(scope, candidate, batch)
    x = writer.image(scope, "image", mean, std)
    if form == "if":
        if batch != 1:
            raise UsageError(f"form 'if' decides image by image: batch must be 1, got {batch}")
        _write_gated(writer, scope, x, candidate)
        return _finished(model, dialect, candidate.precisions)
    for layer in expand(candidate):
        if layer.kind not in ("head", "exit_head"):
            x = writer.layer(scope, x, layer)
        elif form == "logits" or layer.kind == "head":
            name = f"logits_{layer.segment}" if form == "logits" else "logits"
            writer.head(scope, x, layer, name)
            _declare(scope.graph.output, name, "float32", ("N" if batch is None else batch, layer.out_channels))
    return _finished(model, dialect, candidate.precisions)


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of a network with exits: what is executed between two decisions.

    Attributes:
        exit_index: exit where an image can leave behind it; the number of exits stands for the head.
        threshold: confidence from which on an image leaves; None: whatever reaches it leaves here.
        features_in: name of the input; `image` for the first segment, else of the feature map of the one before it.
        features_out: name of the output that the next segment takes; None for the last.
        model: ONNX file. Outputs in order: `logits` float32 [1, K]; unless it is the last one also `confidence` float32
            [1] (largest softmax probability) and the feature map, float32 or float16.
    """

    exit_index: int
    threshold: float | None
    features_in: str
    features_out: str | None
    model: bytes = field(repr=False)


def segment_models(
    candidate: Candidate,
    weights: Weights,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    quant: QuantSpec | None = None,
    dialect: Dialect = ORT,
) -> tuple[Segment, ...]:
    """A network with exits as a chain of models: the host reads one number behind each and decides.

    For runtimes in which a conditional costs more than its branch, such as TensorRT (NVIDIA/TensorRT issues 4402 and
    4059). Exits are left out, and the chain ends early, as in form "if" of `network_model`.

    Args:
        candidate: the network, with thresholds.
        weights: `<layer>.<convolution>.weight|bias`, batch norm folded in.
        mean: of the training pixels / 255, one per channel.
        std: same.
        quant: ranges of the tensors, where a layer is int8.
        dialect: what the runtime reads.

    Raises:
        UsageError: a precision that the dialect lacks, a missing threshold or range.
        RecordError: weights or ranges of another candidate.
    """
    _check_normalisation(candidate, mean, std)
    dialect = dialect.fitting(candidate.precisions)
    pieces = _pieces(candidate)
    result: list[Segment] = []
    x: Tensor | None = None
    side, channels = candidate.resolution, candidate.in_channels
    for number, (layers, threshold) in enumerate(pieces):
        writer = LayerWriter(weights, quant, dialect)
        model, scope = _new_model(f"{candidate.id}#{number}", dialect)
        if x is None:
            entered = "image"
            _declare_image(scope, candidate, 1)
            x = writer.image(scope, "image", mean, std)
        else:
            entered = x.source
            _declare(scope.graph.input, entered, x.kind, (1, channels, side, side))
        for layer in layers[:-1]:
            x = writer.layer(scope, x, layer)
            side, channels = layer.out_size, layer.out_channels
        head = layers[-1]
        _declare(scope.graph.output, writer.head(scope, x, head, "logits"), "float32", (1, head.out_channels))
        left = None
        if threshold is not None:
            confidence = writer.confidence(scope, "logits", head.name, "confidence", is_scalar=False)
            _declare(scope.graph.output, confidence, "float32", (1,))
            # Float at the border, whatever it was before, and of a type that NumPy has: the host passes it on.
            kind: FloatType = "float32" if x.kind == "bfloat16" else x.kind
            left = scope.float_of(x, dialect, kind)
            _declare(scope.graph.output, left, kind, (1, channels, side, side))
            x = Tensor(x.name, x.name, kind=kind)
        data = _finished(model, dialect, [layer.precision for layer in layers])
        result.append(Segment(head.segment, threshold, entered, left, data))
    return tuple(result)


def _pieces(candidate: Candidate) -> list[tuple[list[LayerSpec], float | None]]:
    """Layers between two decisions, the head or exit head last, and the threshold there; None: everything leaves."""
    pieces: list[tuple[list[LayerSpec], float | None]] = []
    body: list[LayerSpec] = []
    for layer in expand(candidate):
        if layer.kind not in ("head", "exit_head"):
            body.append(layer)
            continue
        threshold = _threshold(candidate, layer.segment)
        if threshold > 1.0:
            continue
        if threshold <= 0.0:
            return [*pieces, ([*body, layer], None)]
        pieces.append(([*body, layer], threshold))
        body = []
    return pieces


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
    writer = LayerWriter(weights, None, ORT)
    model, scope = _new_model(plain.id, ORT)
    _declare_image(scope, candidate, None)
    x = writer.image(scope, "image", mean, std)
    for layer in expand(plain):
        if layer.kind in ("head", "exit_head"):
            writer.head(scope, x, layer, f"logits_{layer.segment}")
        else:
            x = writer.layer(scope, x, layer)
    shape = scope.constant("row_shape", np.array([-1, 1], dtype=np.int64))
    for side, op in (("lo", "ReduceMin"), ("hi", "ReduceMax")):
        columns = []
        for tensor in writer.seen:
            name = f"{tensor.name}.{side}"
            scope.node(op, (tensor.source,), f"{name}.value", axes=(1, 2, 3), keepdims=0)
            columns.append(scope.node("Reshape", (f"{name}.value", shape), name))
        scope.node("Concat", columns, side, axis=1)
        _declare(scope.graph.output, side, "float32", ("N", len(columns)))
    return _serialised(model), tuple(tensor.name for tensor in writer.seen)


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
    return _serialised(proto)


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
    ranges = {"image": (-2.5, 2.5), "x": _NOMINAL["linear"]}
    for layer in layers:
        for spec in layer.convolutions:
            base = f"{layer.name}.{spec.name}"
            ranges[base] = _NOMINAL[spec.activation]
            ranges[f"{base}.pre"] = _NOMINAL["pre"]
        for name in ("pool", "scaled", "attention", *(branch.sum for branch in layer.branches)):
            ranges[f"{layer.name}.{name}"] = _NOMINAL["linear"]
    return QuantSpec({k: lo for k, (lo, _) in ranges.items()}, {k: hi for k, (_, hi) in ranges.items()}, 0)


def _random(convolutions: Iterable[tuple[LayerSpec, ConvSpec]], seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    result = {}
    for layer, spec in convolutions:
        base = f"{layer.name}.{spec.name}"
        fan_in = spec.weights // spec.out_channels
        shape = (spec.out_channels, spec.in_channels // spec.groups, spec.kernel_size, spec.kernel_size)
        # Uniform from random bytes: much faster than normal numbers, and a table needs thousands of rows.
        integers = np.frombuffer(rng.bytes(spec.weights), np.int8).reshape(shape)
        result[f"{base}.weight"] = integers * np.float32(np.sqrt(6.0 / fan_in) / 128.0)
        result[f"{base}.bias"] = rng.uniform(-0.1, 0.1, spec.out_channels).astype(np.float32)
    return result


def _write_gated(writer: LayerWriter, main: Scope, image: Tensor, candidate: Candidate) -> None:
    """Writes the "if" form behind the normalised image: each exit, and in its else-branch all that follows."""
    segments: list[list[LayerSpec]] = [[] for _ in range(len(candidate.exits) + 1)]
    for layer in expand(candidate):
        segments[layer.segment].append(layer)

    def leave(scope: Scope, logits: str, k: int) -> None:
        scope.node("Identity", (logits,), f"{scope.tag}logits")
        index = helper.make_tensor("", TensorProto.INT64, (), [k])
        scope.node("Constant", (), f"{scope.tag}exit_index", value=index)

    def write(scope: Scope, x: Tensor, k: int) -> None:
        for layer in segments[k][:-1]:
            x = writer.layer(scope, x, layer)
        threshold = _threshold(candidate, k)
        if threshold > 1.0:
            write(scope, x, k + 1)
            return
        _declare(scope.graph.output, f"{scope.tag}logits", "float32", (1, candidate.num_classes))
        _declare(scope.graph.output, f"{scope.tag}exit_index", "int64", ())
        head = segments[k][-1]
        logits = writer.head(scope, x, head, f"{scope.tag}{head.name}.logits")
        if threshold <= 0.0:
            leave(scope, logits, k)
            return
        main.scalar(f"threshold_{k}", threshold, "float32")
        _declare(main.graph.input, f"threshold_{k}", "float32", ())
        base = f"{scope.tag}{head.name}"
        surest = writer.confidence(scope, logits, base, f"{base}.confidence", is_scalar=True)
        condition = scope.node("GreaterOrEqual", (surest, f"threshold_{k}"), f"{base}.leaves")
        outputs = (f"{scope.tag}logits", f"{scope.tag}exit_index")
        taken, tail = scope.branches(condition, outputs, base, (f"at_{k}", f"after_{k}"))
        leave(taken, logits, k)
        _declare(taken.graph.output, f"{taken.tag}logits", "float32", (1, candidate.num_classes))
        _declare(taken.graph.output, f"{taken.tag}exit_index", "int64", ())
        write(tail, x, k + 1)

    write(main, image, 0)


def _threshold(candidate: Candidate, k: int) -> float:
    """Threshold of exit k; the head takes whatever reaches it."""
    if k == len(candidate.exits):
        return 0.0
    threshold = candidate.exits[k].threshold
    if threshold is None:
        raise UsageError(
            f"exits[{k}] (after stage {candidate.exits[k].after_stage}) has no threshold; "
            "solve it and give candidate.with_thresholds(...)"
        )
    return threshold


def _check_normalisation(candidate: Candidate, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != candidate.in_channels or len(std) != candidate.in_channels:
        raise RecordError(
            f"mean and std need {candidate.in_channels} values (one per channel), got {len(mean)} and {len(std)}"
        )
    if not all(s > 0 for s in std):
        raise RecordError(f"std must be positive, got {tuple(std)}")


def _declare_image(scope: Scope, candidate: Candidate, batch: int | None) -> None:
    side = candidate.resolution
    shape = ("N" if batch is None else batch, candidate.in_channels, side, side)
    _declare(scope.graph.input, "image", "float32", shape)


def _declare(infos: MutableSequence[ValueInfoProto], name: str, kind: str, shape: Sequence[int | str]) -> None:
    """Adds an input or output to a graph; `kind` is a NumPy type name, a text in the shape is a free size."""
    infos.append(helper.make_tensor_value_info(name, ONNX_TYPES[np.dtype(kind)], shape))


def _new_model(name: str, dialect: Dialect) -> tuple[ModelProto, Scope]:
    """An empty model and its graph to write into."""
    opset = helper.make_opsetid("", dialect.opset)
    model = ModelProto(ir_version=dialect.ir_version, producer_name=OURS, opset_import=[opset])
    return model, Scope(model.graph, name)


def _finished(model: ModelProto, dialect: Dialect, precisions: Iterable[Precision]) -> bytes:
    """The file of a model with layers in these precisions; for TensorRT it says in which one it is to be built.

    A weakly typed builder has to be told: its graph is float32 whether or not half precision is meant.
    """
    if dialect is not ORT:
        is_quantized = any(n.op_type == "DequantizeLinear" for graph in all_graphs(model.graph) for n in graph.node)
        precision = building_precision(precisions, is_quantized=is_quantized)
        model.metadata_props.add(key=PRECISION_KEY, value=precision)
    return _serialised(model)


def _serialised(model: ModelProto) -> bytes:
    data: bytes = model.SerializeToString()
    return data
