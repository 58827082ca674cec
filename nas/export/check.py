"""What is read back from disk is not trusted: paths of a manifest, ONNX files."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import onnx

from nas.core.errors import UsageError

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
