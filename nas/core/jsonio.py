"""Strict JSON for frozen records: an unknown field, a wrong type or a number that is not finite is an error.

Whole files are replaced atomically; JSON-lines files are append-only and survive a torn last line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from nas.core.errors import RecordError, StorageError, did_you_mean

T = TypeVar("T")

MAX_FILE_BYTES = 512 * 1024 * 1024  # far above any table of ours; stops a wrong path from filling the memory


def to_plain(value: Any) -> Any:
    """Plain JSON types (dict, list, str, int, float, bool, None) of a record, recursively.

    Raises:
        RecordError: a value that JSON cannot hold exactly (NaN, infinity, an unknown type).
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"cannot write {value!r} as JSON: numbers must be finite")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    raise RecordError(f"cannot write a {type(value).__name__} as JSON")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_plain(cls: type[T], data: Any, where: str) -> T:
    """A record of type `cls` from plain JSON types.

    Args:
        cls: the record type; any annotation made of plain types, Literal, tuple, dict, unions and records.
        data: what `json.loads` gave.
        where: file and key path, the beginning of every message.

    Raises:
        RecordError: an unknown or missing field, a wrong type, a number that is not finite.
    """
    return typing.cast(T, _convert(cls, data, where))


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin is Literal:
        allowed = typing.get_args(kind)
        if data not in allowed or isinstance(data, bool) != any(isinstance(a, bool) for a in allowed):
            names = ", ".join(repr(a) for a in allowed)
            raise RecordError(
                f"{where}: {data!r} is not allowed; allowed: {names}{did_you_mean(str(data), map(str, allowed))}"
            )
        return data
    if origin in (Union, types.UnionType):
        return _convert_union(kind, data, where)
    if origin is tuple:
        return _convert_tuple(kind, data, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(data, dict):
            raise RecordError(f"{where}: expected a mapping, got {_shown(data)}")
        item = typing.get_args(kind)[1]
        return {key: _convert(item, value, f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_record(typing.cast(type, kind), data, where)
    return _convert_scalar(kind, data, where)


def _convert_union(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    errors = []
    for option in rest:
        try:
            return _convert(option, data, where)
        except RecordError as e:
            errors.append(e)
    raise errors[0]


def _convert_tuple(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, list | tuple):
        raise RecordError(f"{where}: expected a list, got {_shown(data)}")
    args = typing.get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(args) != len(data):
        raise RecordError(f"{where}: expected {len(args)} items, got {len(data)}")
    return tuple(_convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))


def _convert_record(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecordError(f"{where}: expected a mapping with the fields of {kind.__name__}, got {_shown(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = _hints(kind)
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise RecordError(
                f"{where}: unknown field {key!r} of {kind.__name__}{did_you_mean(str(key), fields)}"
                f" (fields: {', '.join(fields)})"
            )
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RecordError(f"{where}: field {name!r} of {kind.__name__} is missing")
    try:
        return kind(**values)
    except RecordError as e:
        raise RecordError(f"{where}: {e}") from e


def _convert_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is bool and isinstance(data, bool):
        return data
    if kind is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        try:
            value = float(data)
        except OverflowError as e:
            raise RecordError(f"{where}: {_shown(data)} is too large") from e
        if not math.isfinite(value):
            raise RecordError(f"{where}: {data!r} is not a finite number")
        return value
    if kind is str and isinstance(data, str):
        return data
    if kind is type(None) and data is None:
        return None
    raise RecordError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {_shown(data)}")


def _shown(data: Any) -> str:
    text = repr(data)
    return f"{type(data).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def canonical_json(value: Any) -> str:
    """One line of JSON with sorted keys: equal records give equal text on every machine."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any, length: int = 16) -> str:
    """First `length` hex digits of the SHA-256 of a record's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def parse_json(text: str, where: str) -> Any:
    """`json.loads` without NaN, infinity and duplicate keys.

    Raises:
        RecordError: text that is not JSON in this sense; the message gives the place.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise RecordError(f"{where}: key {key!r} appears twice")
            result[key] = value
        return result

    def refuse(constant: str) -> Any:
        raise RecordError(f"{where}: {constant} is not a finite number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as e:
        raise RecordError(f"{where}: not valid JSON: {e.msg} at line {e.lineno}, column {e.colno}") from e
    except RecursionError as e:
        raise RecordError(f"{where}: nested too deeply") from e
    except ValueError as e:  # Python refuses to read whole numbers of thousands of digits
        raise RecordError(f"{where}: {e}") from e


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        StorageError: the file cannot be read, is too large or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StorageError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise StorageError(f"{path}: cannot be read: {e}") from e


def read_record(cls: type[T], path: Path) -> T:
    """A record from a JSON file.

    Raises:
        StorageError: the file cannot be read.
        RecordError: its content does not fit `cls`.
    """
    return from_plain(cls, parse_json(read_text(path), str(path)), str(path))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically: a reader sees the old bytes or the new ones, also after a power cut.

    Raises:
        StorageError: the file cannot be written; the message gives the free space.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary = Path(name)
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as e:
        raise _write_error(path, e) from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_record(path: Path, value: Any) -> None:
    """A record as an indented JSON file, replaced atomically."""
    write_text(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any, *, sync: bool = True) -> None:
    """Appends a record as one JSON line, durably; a torn last line is moved away first, never glued to.

    The caller holds the lock of the folder: one writer at a time. Without `sync` the line survives the end of this
    process but not that of the machine, until `sync_file`: for many lines in a short time.

    Raises:
        StorageError: the line cannot be written.
    """
    line = (canonical_json(value) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        repair_tail(path)
        with path.open("ab") as f:
            f.write(line)
            f.flush()
            if sync:
                os.fsync(f.fileno())
    except OSError as e:
        raise _write_error(path, e) from e


def sync_file(path: Path) -> None:
    """Makes what was written to a file durable.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with path.open("rb") as f:
            os.fsync(f.fileno())
    except OSError as e:
        raise _write_error(path, e) from e


def repair_tail(path: Path) -> str | None:
    """Moves a torn last line of a JSON-lines file to `<name>.torn`; the line, or None when the file was whole."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb+") as f:
        f.seek(-1, os.SEEK_END)
        if f.read(1) == b"\n":
            return None
        f.seek(0)
        data = f.read()
        keep = data.rfind(b"\n") + 1
        with path.with_name(path.name + ".torn").open("ab") as torn:
            torn.write(data[keep:] + b"\n")
        f.truncate(keep)
        f.flush()
        os.fsync(f.fileno())
    return data[keep:].decode(errors="replace")


def read_lines(cls: type[T], path: Path, renamed: Mapping[str, str] | None = None) -> Iterator[T]:
    """Records of a JSON-lines file; a torn last line (no newline) is passed over, any other bad line is an error.

    Args:
        cls: of the records.
        path: nothing is there: no records.
        renamed: fields by the names that they had in files of earlier versions.

    Raises:
        StorageError: the file cannot be read.
        RecordError: a line that does not fit `cls`, named by file and line number.
    """
    if not path.exists():
        return
    text = read_text_lossy(path)
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # the part after the last newline is empty or torn
        if line.strip():
            where = f"{path}:{number}"
            plain = parse_json(line, where)
            for before, now in (renamed or {}).items():
                if isinstance(plain, dict) and before in plain:
                    plain[now] = plain.pop(before)
            yield from_plain(cls, plain, where)


def read_text_lossy(path: Path) -> str:
    """A text file whose torn tail may end in the middle of a UTF-8 character."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e}") from e


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, e: OSError) -> StorageError:
    try:
        stats = os.statvfs(path.parent if path.parent.exists() else Path.cwd())
        free = f"; {stats.f_bavail * stats.f_frsize // 2**20} MiB free there"
    except OSError:
        free = ""
    return StorageError(
        f"{path}: cannot be written: {e.strerror or e}{free}. Free space or choose another folder (--set run.dir=DIR)"
    )
