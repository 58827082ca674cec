"""What an ONNX file says of itself, read without the onnx package, which no board has: its inputs and precisions.

Only the few fields that are needed are read from the protocol buffer (onnx.proto of ONNX, IR version 3 and later):
producer_name = 2, graph = 7, metadata_props = 14 of a model; node = 1, initializer = 5, input = 11, output = 12 of a
graph.
"""

from typing import Any, Dict, Iterator, List, Set, Tuple, Union

from .errors import BoardError

# TensorProto.DataType -> our name.
TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}
_FLOAT16, _BFLOAT16 = 10, 16

OURS = "nas"  # what the writers of this project call themselves
PRECISION_KEY = "precision"  # in the metadata of a file of theirs: what it is to be built in


class OnnxFacts(object):
    """Inputs and outputs (name, dtype, shape; -1: a free size), the operators, and the types of the weights.

    `precision` is what a file of this project says that it is to be built in; empty where another program wrote it.
    """

    def __init__(self) -> None:
        self.inputs: List[Dict[str, Any]] = []
        self.outputs: List[Dict[str, Any]] = []
        self.operators: Set[str] = set()
        self.weight_types: Set[int] = set()
        self.precision = ""

    @property
    def is_quantized(self) -> bool:
        """Whether the file holds int8 as explicit quantize and dequantize nodes."""
        return "DequantizeLinear" in self.operators

    @property
    def is_half(self) -> bool:
        """Whether weights are half precision."""
        return bool(self.weight_types & {_FLOAT16, _BFLOAT16})

    def carries(self, precision: str) -> bool:
        """Whether the file itself says to compute in this precision, as strongly typed TensorRT wants it."""
        if precision == "fp16":
            return self.is_half
        if precision == "bf16":
            return _BFLOAT16 in self.weight_types
        if precision == "int8":
            return self.is_quantized
        if precision == "mixed":
            return self.is_quantized or self.is_half
        return True


def onnx_facts(model: bytes) -> OnnxFacts:
    """Reads a model.

    Raises:
        BoardError: `bad_request`: not an ONNX file.
    """
    facts = OnnxFacts()
    try:
        producer = ""
        metadata: Dict[str, str] = {}
        for number, value in _fields(memoryview(model)):
            if number == 2:
                producer = _text(value)
            elif number == 7:
                _read_graph(value, facts, is_main=True)
            elif number == 14:
                entry = dict((n, _text(v)) for n, v in _fields(value) if n in (1, 2))
                metadata[entry.get(1, "")] = entry.get(2, "")
        if producer == OURS:
            facts.precision = metadata.get(PRECISION_KEY, "")
    except (IndexError, ValueError, TypeError) as e:
        raise BoardError("bad_request", "not an ONNX model (%d bytes): %s" % (len(model), e)) from e
    if not facts.operators:
        raise BoardError("bad_request", "not an ONNX model (%d bytes): it has no nodes" % len(model))
    return facts


def _read_graph(graph: Any, facts: OnnxFacts, is_main: bool) -> None:
    weights = set()
    inputs, outputs = [], []
    for number, value in _fields(graph):
        if number == 1:
            for field, content in _fields(value):
                if field == 4:
                    facts.operators.add(_text(content))
                elif field == 5:  # an attribute; field 6 of it is a graph: a branch of If
                    for inner, branch in _fields(content):
                        if inner == 6:
                            _read_graph(branch, facts, is_main=False)
        elif number == 5:
            tensor = dict((n, v) for n, v in _fields(value) if n in (2, 8))
            facts.weight_types.add(int(tensor.get(2, 0)))
            weights.add(_text(tensor.get(8, b"")))
        elif number == 11:
            inputs.append(_value(value))
        elif number == 12:
            outputs.append(_value(value))
    if is_main:
        facts.inputs = [entry for entry in inputs if entry["name"] not in weights]
        facts.outputs = outputs


def _value(data: Any) -> Dict[str, Any]:
    """Name, dtype and shape of an input or output."""
    name, kind = "", 0
    shape: List[int] = []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for outer, tensor in _fields(value):
                if outer == 1:
                    for inner, part in _fields(tensor):
                        if inner == 1:
                            kind = int(part)
                        elif inner == 2:
                            shape = [_size(dim) for n, dim in _fields(part) if n == 1]
    return {"name": name, "dtype": TYPES.get(kind, "type %d" % kind), "shape": shape}


def _size(dim: Any) -> int:
    return next((int(value) for number, value in _fields(dim) if number == 1), -1)


def _text(data: Any) -> str:
    return bytes(data).decode("utf-8")


def _fields(data: Any) -> Iterator[Tuple[int, Union[int, Any]]]:
    """Number and value of each field: an int, or the bytes of what is inside."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
        elif kind == 2:
            size, place = _varint(data, place)
            if place + size > end:
                raise ValueError("a field ends behind the file")
            yield tag >> 3, data[place : place + size]
            place += size
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError("no protocol buffer")


def _varint(data: Any, place: int) -> Tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("no protocol buffer")
