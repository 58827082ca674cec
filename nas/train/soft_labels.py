"""Soft labels from files: one row of probabilities or logits per training image, checked before anything is trained.

Three forms. `.csv`: a heading with `name` (path of the image below the data folder) or `index` (number of the image in
the training split, from 0), then one column per class under the class's name. `.npz`: an array `values` [M, K], with
`names` [M] or `index` [M], and `classes` [K] where the columns may be in another order. `.npy`: an array [N, K], one
row per training image in the order of the split.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DataError, did_you_mean
from nas.core.jsonio import content_hash, file_sha256
from nas.data import Dataset
from nas.train.settings import SoftLabelFile

SUM_TOLERANCE = 1e-2  # of probabilities that were written with two or three digits; they are scaled to 1 afterwards
LEAST_PROBABILITY = 1e-7  # below it a softmax in float32 holds no information
SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, eq=False)
class SoftLabels:
    """What a contributor says about the training images.

    Fields:
        name: of the contributor.
        sha256: of the file and of how it is read.
        logits: float32 [N, K], in the order of the training split and of the data set's classes.
        has: bool [N], images that the file has.
        agreement: share of them whose likeliest class is the label, 0-1.
        about: the file in words, for reports.
    """

    name: str
    sha256: str
    logits: NDArray[np.float32]
    has: NDArray[np.bool_]
    agreement: float
    about: str


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Contents of a file: values [M, K], to which images they belong, and the classes of the columns.

    `line` says where row i stands, for messages.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...] | None = None
    index: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    first_line: int = 0

    def row(self, i: int) -> str:
        place = f"line {i + self.first_line}" if self.first_line else f"row {i}"
        return place if self.names is None else f"{place} ({self.names[i]})"


def read_soft_labels(file: SoftLabelFile, dataset: Dataset) -> SoftLabels:
    """Reads and checks a file against the training split.

    Raises:
        DataError: it cannot be read or does not fit; the message names contributor, file and row.
    """
    path = Path(file.path)
    where = f"teacher.files ({file.name}): {path}"
    table = _read(path, where)
    values = _in_class_order(table, dataset.class_names, where)
    _check_values(table, values, file.values, where)
    places = _places(table, dataset, where)
    count = len(dataset.train)
    has = np.zeros(count, np.bool_)
    kept = places >= 0
    has[places[kept]] = True
    _check_complete(has, file.partial, dataset.train.names, where)
    if file.values == "probabilities":
        values = np.log(np.maximum(values / values.sum(axis=1, keepdims=True), LEAST_PROBABILITY))
    logits = np.zeros((count, len(dataset.class_names)), np.float32)
    logits[places[kept]] = values[kept]
    agreement = float((logits[has].argmax(axis=1) == dataset.train.labels[has]).mean())
    about = f"{path.name}, {int(has.sum())} of {count} training images, likeliest class right in {agreement:.1%}"
    return SoftLabels(file.name, content_hash([file_sha256(path), file.values], 64), logits, has, agreement, about)


def _read(path: Path, where: str) -> _Table:
    readers = {".csv": _read_csv, ".npy": _read_npy, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{where}: soft labels are read from {', '.join(readers)} files, got {path.suffix!r}")
    try:
        return reader(path, where)
    except (OSError, EOFError, zipfile.BadZipFile, UnicodeDecodeError, csv.Error) as e:
        raise DataError(
            f"{where}: cannot be read: {e}. Give the path of the file, or leave it out: teacher.without"
        ) from e


def _read_csv(path: Path, where: str) -> _Table:
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    heading = [cell.strip() for cell in rows[0]] if rows else []
    key = heading[0] if heading else ""
    if key not in ("name", "index") or len(heading) < 3:
        raise DataError(
            f"{where}: line 1: the heading must be 'name' or 'index' and the names of the classes, got {heading[:4]}"
        )
    keys, values = [], []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(heading):
            raise DataError(f"{where}: line {line}: {len(row)} cells, the heading has {len(heading)}")
        keys.append(row[0].strip())
        values.append([_number(cell, f"{where}: line {line} ({row[0]})") for cell in row[1:]])
    array = np.array(values, np.float64).reshape(len(values), len(heading) - 1)
    classes = tuple(heading[1:])
    if key == "name":
        return _Table(array, names=tuple(keys), classes=classes, first_line=2)
    wrong = next((i for i, k in enumerate(keys) if not k.isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{where}: line {wrong + 2}: index must be a whole number from 0, got {keys[wrong]!r}")
    return _Table(array, index=np.array([int(k) for k in keys], np.int64), classes=classes, first_line=2)


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise DataError(f"{where}: expected a number, got {cell!r}") from None


def _read_npy(path: Path, where: str) -> _Table:
    return _Table(_matrix(_plain_array(path, where), where))


def _read_npz(path: Path, where: str) -> _Table:
    loaded = _plain_array(path, where)
    if isinstance(loaded, np.ndarray):
        raise DataError(f"{where}: holds one array; its name should end in .npy")
    with loaded:
        try:
            arrays = {name: loaded[name] for name in loaded.files}
        except ValueError as e:
            raise DataError(f"{where}: cannot be read: {e}") from e
    unknown = sorted(set(arrays) - {"values", "names", "index", "classes"})
    if "values" not in arrays or unknown or {"names", "index"} <= set(arrays):
        raise DataError(
            f"{where}: expected the arrays 'values', and 'names' or 'index', and 'classes', got {sorted(arrays)}"
        )
    values = _matrix(arrays["values"], where)
    names = _texts(arrays["names"]) if "names" in arrays else None
    index = arrays.get("index")
    if index is not None and not (index.dtype.kind in "iu" and index.ndim == 1):
        raise DataError(f"{where}: 'index' must hold whole numbers [M], got {index.dtype} {list(index.shape)}")
    keys: Sequence[object] | NDArray[np.int64] | None = names if index is None else index
    if keys is not None and len(keys) != len(values):
        raise DataError(f"{where}: {len(values)} rows of values, and names or index of {len(keys)}")
    classes = _texts(arrays["classes"]) if "classes" in arrays else None
    return _Table(values, names, None if index is None else index.astype(np.int64), classes)


def _texts(array: NDArray[np.generic]) -> tuple[str, ...]:
    return tuple(v.decode() if isinstance(v, bytes) else str(v) for v in array.ravel().tolist())


def _plain_array(path: Path, where: str) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as e:  # what numpy says of a foreign file, and of one that holds Python objects
        raise DataError(f"{where}: is no array of numbers ({e}). Write it with numpy.save or numpy.savez") from e


def _matrix(array: np.ndarray, where: str) -> NDArray[np.float64]:
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"{where}: expected numbers [images, classes], got {array.dtype} {list(array.shape)}")
    return array.astype(np.float64)


def _in_class_order(table: _Table, names: tuple[str, ...], where: str) -> NDArray[np.float64]:
    """Columns in the order of the data set's classes."""
    if table.classes is None:
        if table.values.shape[1] != len(names):
            raise DataError(
                f"{where}: {table.values.shape[1]} columns; the data set has {len(names)} classes: {', '.join(names)}"
            )
        return table.values
    given = table.classes
    unknown = [c for c in given if c not in names]
    missing = [c for c in names if c not in given]
    if unknown or missing or len(given) != len(names):
        hint = did_you_mean(unknown[0], names) if unknown else ""
        raise DataError(
            f"{where}: its classes are not those of the data set: unknown {unknown[:SHOWN]}, missing "
            f"{missing[:SHOWN]}{hint} (classes: {', '.join(names)})"
        )
    if len(given) != table.values.shape[1]:
        raise DataError(f"{where}: {len(given)} classes, and {table.values.shape[1]} columns of values")
    return table.values[:, [given.index(name) for name in names]]


def _check_values(table: _Table, values: NDArray[np.float64], kind: str, where: str) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(f"{where}: {_rows(table, bad)}: a value is not finite (NaN or infinity)")
    if kind == "logits":
        return
    hint = "; of logits say so: values: logits"
    outside = ((values < 0) | (values > 1 + SUM_TOLERANCE)).any(axis=1)
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        worst = values[i].min() if values[i].min() < 0 else values[i].max()
        raise DataError(f"{where}: {_rows(table, outside)}: a probability must be from 0 to 1, got {worst:g}{hint}")
    sums = values.sum(axis=1)
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        first = sums[int(np.flatnonzero(off)[0])]
        raise DataError(f"{where}: {_rows(table, off)}: the probabilities sum to {first:.4g}, not 1{hint}")


def _rows(table: _Table, bad: NDArray[np.bool_]) -> str:
    """The first of the bad rows, and how many there are."""
    more = int(bad.sum()) - 1
    return table.row(int(np.flatnonzero(bad)[0])) + (f" and {more} more" if more else "")


def _places(table: _Table, dataset: Dataset, where: str) -> NDArray[np.int64]:
    """Number in the training split of each row, -1 for an image of another split."""
    count, rows = len(dataset.train), len(table.values)
    if table.names is not None:
        return _places_of_names(table, table.names, dataset, where)
    if table.index is None:
        if rows != count:
            raise DataError(
                f"{where}: {rows} rows; the training split has {count} images. Rows that belong to some of them only "
                "need names or index: write a .csv or .npz file"
            )
        return np.arange(count, dtype=np.int64)
    outside = (table.index < 0) | (table.index >= count)
    if outside.any():
        got = table.index[int(np.flatnonzero(outside)[0])]
        raise DataError(f"{where}: {_rows(table, outside)}: index {got} is outside 0 to {count - 1}")
    _check_once(table, table.index, where)
    return table.index


def _places_of_names(table: _Table, names: tuple[str, ...], dataset: Dataset, where: str) -> NDArray[np.int64]:
    known = dataset.train.names
    if known is None:
        raise DataError(f"{where}: images of {dataset.name} have no names; give their index in the training split")
    place = {name: i for i, name in enumerate(known)}
    found = np.array([place.get(name, -1) for name in names], np.int64)
    others = {*(dataset.val.names or ()), *(dataset.test.names or ())}
    unknown = np.array([f < 0 and name not in others for f, name in zip(found, names, strict=True)], np.bool_)
    if unknown.any():
        first = names[int(np.flatnonzero(unknown)[0])]
        raise DataError(
            f"{where}: {_rows(table, unknown)}: no such image in the data set{did_you_mean(first, known)} (names are "
            f"paths below the data folder, such as {known[0]!r})"
        )
    _check_once(table, np.where(found >= 0, found, -1 - np.arange(len(found))), where)
    return found


def _check_once(table: _Table, keys: NDArray[np.int64], where: str) -> None:
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), np.bool_)
    again[first] = False
    if again.any():
        raise DataError(f"{where}: {_rows(table, again)}: this image has a row already")


def _check_complete(has: NDArray[np.bool_], partial: bool, names: tuple[str, ...] | None, where: str) -> None:
    missing = np.flatnonzero(~has)
    if len(missing) == len(has):
        raise DataError(f"{where}: holds none of the {len(has)} training images")
    if len(missing) and not partial:
        shown = ", ".join(str(i) if names is None else names[i] for i in missing[:SHOWN].tolist())
        raise DataError(
            f"{where}: {len(missing)} of {len(has)} training images are missing, such as {shown}. Add them, or allow "
            "it: partial: true"
        )
