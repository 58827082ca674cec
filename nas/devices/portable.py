"""Models as they travel to a board, for older runtimes where that changes nothing; inputs as the bytes they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from nas.devices.base import MeasureJob
from nas.devices.board.errors import BoardError
from nas.devices.board.onnx_facts import OURS, onnx_facts

# Newer definitions that only took in further types of tensors, which the models of this project do not have (onnx,
# docs/Changelog.md): operator -> the operator set whose definition they have used since.
_MORE_TYPES_ONLY = {"Add": 13, "Mul": 13, "Relu": 13, "Identity": 13, "If": 13, "GreaterOrEqual": 12}

# Format versions with the operator sets that came with them (onnx, docs/Versioning.md); newer ones stay as they are.
_FORMAT_OF_OPSET = ((14, 7), (18, 8))


def portable_model(model: bytes, rows: int | None = None, *, splits_hard_swish: bool = False) -> bytes:
    """The model stamped with the oldest operator set in which its operators are the same: older runtimes then take it.

    An operator means what the newest definition not above the model's operator set says; the stamp is lowered as far as
    every operator keeps its definition, so nothing is computed differently. JetPack 4.6 has ONNX Runtime up to 1.11,
    which refuses the stamps of today.

    Args:
        model: an ONNX file; what is none stays as it is, for the runtime to say.
        rows: fixes the batch where that is open.
        splits_hard_swish: writes x * HardSigmoid(x) for HardSwish, which the parser of TensorRT before 8.4 cannot read;
            it is what that operator is defined as.
    """
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError:
        return model
    if splits_hard_swish:
        _split_hard_swish(proto.graph)
    stamps = list(proto.opset_import)
    if len(stamps) == 1 and stamps[0].domain in ("", "ai.onnx"):
        widened = _MORE_TYPES_ONLY if proto.producer_name == OURS else {}
        needed = max([7, *_since(proto.graph, stamps[0].version, widened)])
        stamps[0].version = min(stamps[0].version, needed)
        for opset, format_version in _FORMAT_OF_OPSET:
            if needed <= opset:
                proto.ir_version = min(proto.ir_version, format_version)
                break
    if rows is not None:
        _fix_batch(proto.graph, rows)
    data: bytes = proto.SerializeToString()
    return data


def _split_hard_swish(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        if node.op_type != "HardSwish":
            nodes.append(node)
            continue
        name, gate = node.name or node.output[0], f"{node.output[0]}.gate"
        nodes.append(
            onnx.helper.make_node("HardSigmoid", [node.input[0]], [gate], f"{name}.gate", alpha=1 / 6, beta=0.5)
        )
        nodes.append(onnx.helper.make_node("Mul", [node.input[0], gate], list(node.output), name))
    del graph.node[:]
    graph.node.extend(nodes)


def precision_of(model: bytes) -> str:
    """The precision that a model of this project says it is to be built in; fp32 where it does not tell."""
    try:
        return onnx_facts(model).precision or "fp32"
    except BoardError:  # the runtime will say what is wrong with it
        return "fp32"


def feed_bytes(job: MeasureJob) -> dict[str, bytes]:
    """The feeds of a job as the bytes that its model takes, C order, little endian as all boards are."""
    if not job.feeds:
        return {}
    kinds: dict[str, Any] = {}
    try:
        graph = onnx.load_model_from_string(job.model).graph
        for entry in graph.input:
            kinds[entry.name] = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            kinds.setdefault(tensor.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (DecodeError, KeyError):  # the runtime will say what is wrong with it
        kinds = {}
    return {
        name: np.ascontiguousarray(array, dtype=kinds.get(name, array.dtype)).tobytes()
        for name, array in job.feeds.items()
    }


def image_bytes(images: NDArray[np.float32], model: bytes) -> tuple[bytes, str]:
    """Images as they travel, little endian, and their type: bytes where nothing is lost, else what the model takes."""
    if images.min() >= 0 and images.max() <= 255 and np.array_equal(np.floor(images), images):
        return images.astype(np.uint8).tobytes(), "uint8"
    try:
        kind = next((str(entry["dtype"]) for entry in onnx_facts(model).inputs), "float32")
    except BoardError:  # the runtime will say what is wrong with it
        kind = "float32"
    return np.ascontiguousarray(images, dtype=np.dtype(kind).newbyteorder("<")).tobytes(), kind


def _since(graph: onnx.GraphProto, opset: int, widened: Mapping[str, int]) -> Iterator[int]:
    """The operator set that brought the definition of each operator, branches included."""
    for node in graph.node:
        try:
            since = int(onnx.defs.get_schema(node.op_type, max_inclusive_version=opset).since_version)
            yield min(since, widened.get(node.op_type, since))
        except onnx.defs.SchemaError:
            yield opset
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _since(attribute.g, opset, widened)


def _fix_batch(graph: onnx.GraphProto, rows: int) -> None:
    initializers = {x.name for x in graph.initializer}
    changed = False
    for entry in [*(x for x in graph.input if x.name not in initializers), *graph.output]:
        dims = entry.type.tensor_type.shape.dim
        if len(dims) and not dims[0].HasField("dim_value"):
            dims[0].dim_value = rows
            changed = True
    if changed:
        del graph.value_info[:]
