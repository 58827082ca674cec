"""Fixed ONNX graphs that every device measures: the empty graph, the decision at an early exit, the reference network,
and chains of convolutions whose weights do or do not fit into the cache.

The reference network must never change: its time is compared across sessions and kept in latency tables.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from nas.devices.base import GATE_KEY, OVERHEAD_KEY, REFERENCE_KEY, MeasureJob

OPSET = 17
IR_VERSION = 9

REFERENCE_CHANNELS = 48
REFERENCE_SIZE = 16
REFERENCE_EXPANSION = 4

STREAMING_CHANNELS = 256  # 0.26 MB of weights for each convolution: they stay in the cache when all take the same
STREAMING_SIZE = 4
GATE_STREAMING_MB = 8  # of the chain that shows how busy the memory is; one of those that a table keeps


@cache
def identity_model() -> bytes:
    """A graph that only hands its input on: what one call costs without any work."""
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 4])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["output"], name="identity")], "overhead", [value], [output]
    )
    return _bytes(graph)


@cache
def confidence_model() -> bytes:
    """What a segment of a chain computes for the host's decision: softmax of 10 logits and its maximum."""
    nodes = [
        helper.make_node("Softmax", ["logits"], ["softmax"], name="softmax", axis=1),
        helper.make_node("ReduceMax", ["softmax"], ["output"], name="max", axes=[1], keepdims=0),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])
    surest = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])
    return _bytes(helper.make_graph(nodes, "confidence", [logits], [surest]))


@cache
def gate_model() -> bytes:
    """The decision at an early exit alone: softmax of 10 logits, its maximum against a threshold, an `If`."""

    def branch(name: str) -> GraphProto:
        output = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, [1, 10])
        node = helper.make_node("Identity", ["logits"], [f"{name}.out"], name=f"{name}.identity")
        return helper.make_graph([node], name, [], [output])

    nodes = [
        helper.make_node("Softmax", ["logits"], ["softmax"], name="softmax", axis=1),
        helper.make_node("ReduceMax", ["softmax"], ["surest"], name="max", axes=[0, 1], keepdims=0),
        helper.make_node("GreaterOrEqual", ["surest", "threshold"], ["leaves"], name="compare"),
        helper.make_node("If", ["leaves"], ["output"], name="if", then_branch=branch("yes"), else_branch=branch("no")),
    ]
    graph = helper.make_graph(
        nodes,
        "gate",
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(np.array(0.5, np.float32), "threshold")],
    )
    return _bytes(graph)


@cache
def reference_model() -> bytes:
    """Two inverted residuals, 48 channels, 16x16, kernels 3 and 5, expansion 4, SE, hard-swish: about 0.3 ms here."""
    rng = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    shape = [1, REFERENCE_CHANNELS, REFERENCE_SIZE, REFERENCE_SIZE]
    wide = REFERENCE_CHANNELS * REFERENCE_EXPANSION

    def conv(name: str, x: str, c_in: int, c_out: int, kernel: int = 1, groups: int = 1, act: str = "") -> str:
        fan_in = c_in // groups * kernel**2
        weight = rng.normal(0, fan_in**-0.5, (c_out, c_in // groups, kernel, kernel)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        weights.append(numpy_helper.from_array(np.zeros(c_out, np.float32), f"{name}.bias"))
        pad = kernel // 2
        nodes.append(
            helper.make_node(
                "Conv",
                [x, f"{name}.weight", f"{name}.bias"],
                [f"{name}.conv"],
                name=f"{name}.conv",
                kernel_shape=[kernel, kernel],
                pads=[pad] * 4,
                group=groups,
            )
        )
        if not act:
            return f"{name}.conv"
        node = helper.make_node(act, [f"{name}.conv"], [f"{name}.out"], name=f"{name}.act")
        if act == "HardSigmoid":
            node.attribute.extend([helper.make_attribute("alpha", 1 / 6), helper.make_attribute("beta", 0.5)])
        nodes.append(node)
        return f"{name}.out"

    x = "input"
    for i, kernel in enumerate((3, 5)):
        y = conv(f"{i}.expand", x, REFERENCE_CHANNELS, wide, act="HardSwish")
        y = conv(f"{i}.depthwise", y, wide, wide, kernel, wide, act="HardSwish")
        nodes.append(helper.make_node("GlobalAveragePool", [y], [f"{i}.pool"], name=f"{i}.pool"))
        gate = conv(f"{i}.se_reduce", f"{i}.pool", wide, wide // 4, act="Relu")
        gate = conv(f"{i}.se_expand", gate, wide // 4, wide, act="HardSigmoid")
        nodes.append(helper.make_node("Mul", [y, gate], [f"{i}.se"], name=f"{i}.se"))
        y = conv(f"{i}.project", f"{i}.se", wide, REFERENCE_CHANNELS)
        out = "output" if i == 1 else f"{i}.out"
        nodes.append(helper.make_node("Add", [x, y], [out], name=f"{i}.add"))
        x = out
    graph = helper.make_graph(
        nodes,
        "reference",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    return _bytes(graph)


def streaming_model(megabytes: int, *, cached: bool) -> bytes:
    """A chain of 1x1 convolutions of 256 channels on 4x4 pixels that reads so many megabytes of fp32 weights.

    Args:
        megabytes: weights read in one inference, 10^6 bytes.
        cached: all convolutions take the same weights; the work is that of different ones.
    """
    count = round(megabytes * 1e6 / (4 * STREAMING_CHANNELS**2))
    rng = np.random.default_rng(0)
    shape = [1, STREAMING_CHANNELS, STREAMING_SIZE, STREAMING_SIZE]
    std = STREAMING_CHANNELS**-0.5
    weights = [
        numpy_helper.from_array(
            rng.normal(0, std, (STREAMING_CHANNELS, STREAMING_CHANNELS, 1, 1)).astype(np.float32), f"weight{i}"
        )
        for i in range(1 if cached else count)
    ]
    names = ["input", *(f"between{i}" for i in range(1, count)), "output"]
    nodes = [
        helper.make_node(
            "Conv", [names[i], f"weight{0 if cached else i}"], [names[i + 1]], name=f"conv{i}", kernel_shape=[1, 1]
        )
        for i in range(count)
    ]
    graph = helper.make_graph(
        nodes,
        "streaming",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    return _bytes(graph)


def streaming_job(key: str, megabytes: int, *, cached: bool) -> MeasureJob:
    """The job that measures `streaming_model`, under a key of the table's."""
    return MeasureJob(key, "overhead", "fp32", streaming_model(megabytes, cached=cached), 0)


def overhead_job() -> MeasureJob:
    """The job whose result is subtracted from every row and added once for each network."""
    return MeasureJob(OVERHEAD_KEY, "overhead", "none", identity_model(), 0)


def gate_job(*, in_graph: bool = True) -> MeasureJob:
    """The job whose result, less the overhead, is what one early exit costs beside its head.

    `in_graph`: the graph itself decides; else the host does, and what that takes is in no measurement of a graph.
    """
    return MeasureJob(GATE_KEY, "overhead", "none", gate_model() if in_graph else confidence_model(), 0)


def reference_job() -> MeasureJob:
    """The job whose result says how fast the device is now, to compare with other sessions."""
    return MeasureJob(REFERENCE_KEY, "overhead", "fp32", reference_model(), 0)


def _bytes(graph: GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="nas")
    model.ir_version = IR_VERSION
    data: bytes = model.SerializeToString()
    return data
