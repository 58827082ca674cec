"""What is read back from disk is not trusted: paths of a manifest, ONNX files."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import numpy_helper

from nas.core.errors import UsageError
from nas.export.dialect import Dialect

MAX_MODEL_BYTES = 512 * 1024 * 1024
MAX_ELEMENTS = 2**31  # of one tensor: far above any network here


class PackageError(UsageError):
    """A package that is incomplete, changed, unsafe, or does not reproduce its own outputs."""


def checked_names(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Files of a package by name, each a regular file inside `folder`; nothing else may lie there.

    A name is refused when it is absolute, climbs out of the folder, or is a link: a package from elsewhere must not
    make this program read other files. Unlisted files are refused because Python would import them beside infer.py.

    Raises:
        PackageError: such a name, a missing file, an unlisted file.
    """
    result: dict[str, Path] = {}
    for name in names:
        parts = name.split("/")
        if "\\" in name or ":" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise PackageError(f"{folder}: the manifest names {name!r}; only plain relative paths are allowed")
        path = folder
        for part in parts:
            path = path / part
            try:
                mode = path.lstat().st_mode
            except OSError as e:
                raise PackageError(f"{folder}: {name} is missing; get the package again") from e
            if stat.S_ISLNK(mode):
                raise PackageError(f"{folder}: {name} is a symbolic link; a package holds its files itself")
        if not stat.S_ISREG(mode):
            raise PackageError(f"{folder}: {name} is not a regular file")
        result[name] = path
    allowed = {*result, "manifest.json"}
    for path in sorted(folder.rglob("*")):
        name = PurePosixPath(path.relative_to(folder)).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in allowed):
            raise PackageError(f"{folder}: {name} is not listed in manifest.json; remove it or get the package again")
    return result


def checked_model(data: bytes, where: str) -> onnx.ModelProto:
    """An ONNX model that holds all its data itself and uses standard operators only.

    Raises:
        PackageError: not a model, one that refers to other files, foreign operators, sizes beyond any network here.
    """
    if not data:
        raise PackageError(f"{where}: empty file, not an ONNX model")
    if len(data) > MAX_MODEL_BYTES:
        raise PackageError(f"{where}: {len(data)} bytes; at most {MAX_MODEL_BYTES} are read")
    try:
        model = onnx.load_from_string(data)
    except Exception as e:  # an error of protobuf, which is a dependency of onnx only
        raise PackageError(f"{where}: not an ONNX model: {e}") from e
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            raise PackageError(f"{where}: uses operators of {entry.domain!r}; only standard ONNX operators are allowed")
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise PackageError(f"{where}: {tensor.name!r} lies in another file; weights must be inside the model")
            size = 1
            for side in tensor.dims:
                size *= side
            if not 0 <= size <= MAX_ELEMENTS:
                raise PackageError(f"{where}: tensor {tensor.name!r} claims {list(tensor.dims)} values")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise PackageError(f"{where}: not a valid ONNX model: {str(e).splitlines()[0]}") from e
    return model


def all_graphs(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    """A graph and the branches inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def tensorrt_problems(model: onnx.ModelProto, dialect: Dialect) -> list[str]:
    """What TensorRT's ONNX parser would refuse or misread in a graph of one of its dialects; empty for a good one.

    The rules of onnx-tensorrt's importers (8.2-GA, 8.6-GA, 10.0-GA): zero points present, int8 and all zero; scales
    constant and positive, float32 before TensorRT 10; per-channel scales on axis 0 and of weights only; unique names of
    nodes, because they become the names of layers.
    """
    problems: list[str] = []
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset not in (dialect.opset, dialect.fitting(("bf16",)).opset):
        problems.append(f"opset {opset}; the parser of {dialect.name} reads {dialect.opset}")
    names: set[str] = set()
    for graph in all_graphs(model.graph):
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        quantized = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
        for node in graph.node:
            if not node.name or node.name in names:
                problems.append(f"node {node.name!r} ({node.op_type}): names must be there and unique")
            names.add(node.name)
            if node.op_type == "HardSwish" and opset < 14:
                problems.append(f"{node.name}: no HardSwish below opset 14")
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                source = quantized.get(node.input[0])
                is_weight = node.input[0] in constants or (source is not None and source.input[0] in constants)
                problems += [f"{node.name}: {what}" for what in _pair_problems(node, constants, dialect, is_weight)]
    return problems


def _pair_problems(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], dialect: Dialect, is_weight: bool
) -> list[str]:
    if len(node.input) != 3:
        return ["no zero point"]
    scale, zero = constants.get(node.input[1]), constants.get(node.input[2])
    if scale is None or zero is None:
        return ["scale and zero point must be constant initializers"]
    problems = []
    if zero.dtype != np.int8 or zero.any() or zero.size != scale.size:
        problems.append(f"zero point is {zero.dtype} {list(zero.shape)}, not int8 zeros as many as scales")
    wanted = np.float16 if dialect.half_floats else np.float32
    if scale.dtype != wanted or not (np.isfinite(scale).all() and (scale > 0).all()):
        problems.append(f"scale is {scale.dtype}; it must be positive {np.dtype(wanted)}")
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    if scale.size > 1 and not (is_weight and axis == 0):
        problems.append(f"{scale.size} scales on axis {axis}; per-channel scales are for weights, on axis 0")
    return problems
