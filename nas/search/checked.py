"""Settings records from what people wrote: every problem at once, each with its key, what is allowed and a suggestion.

pydantic checks the plain frozen dataclasses from outside, so that the records themselves need the standard library
only. Strict JSON mode: no text for a number, no 1 for true, no NaN; a list becomes a tuple. What a record refuses in
its `__post_init__` (ConfigError and RecordError are ValueErrors) is collected like all the rest.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from nas.core.errors import ConfigError, did_you_mean

if typing.TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "tuple_type": "a list, such as [1, 2]",
    "finite_number": "a finite number",
}


def checked(cls: type[T], data: Any, where: str, origins: Mapping[str, str] | None = None) -> T:
    """A record of nested settings from plain data.

    Args:
        cls: a frozen dataclass made of str, int, float, bool, None, Literal, tuple and such dataclasses.
        data: what the YAML file held.
        where: the file, the beginning of the message.
        origins: for keys that did not come from the file (`search.trials`), where they came from.

    Raises:
        ConfigError: lists every problem, one line each.
    """
    from pydantic import ValidationError

    kind: Any = cls  # mypy does not take a type[T] for hashable
    try:
        # In JSON, because only there strict mode takes a list for a tuple. NaN passes here and is refused with its key.
        return typing.cast(T, _adapter(kind).validate_json(json.dumps([data]))[0])
    except ValidationError as e:
        problems = _problems(cls, e.errors(include_url=False), origins or {})
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    raise ConfigError(f"{where}: {len(problems)} problems:" + "".join(f"\n  {p}" for p in problems))


def schema(cls: type) -> dict[str, Any]:
    """JSON Schema of a settings record, for editors; the meaning of each key comes from the docstrings."""
    document = _adapter(cls).json_schema()
    by_name = {kind.__name__: kind for kind in _sections(cls)}
    for name, definition in document["$defs"].items():
        meanings = field_meanings(by_name[name])
        definition.pop("title", None)
        definition["description"] = (inspect.getdoc(by_name[name]) or "").split("\n\n")[0]
        for key, entry in definition["properties"].items():
            entry.pop("title", None)
            if key in meanings:
                entry["description"] = meanings[key]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document["$defs"].pop(cls.__name__),
        "$defs": document["$defs"],
    }


def field_meanings(cls: type) -> dict[str, str]:
    """Meaning of each field as its class's docstring gives it.

    Both ways of this project are read: a section `Fields:` or `Attributes:` with a line per field, and sentences that
    begin with `name` in backquotes and a colon.
    """
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^(?:Fields|Attributes):\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    if section is not None:
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1], re.MULTILINE)
    else:
        found = re.findall(r"`(\w+)`: (.*?)(?=\s`\w+`: |\Z)", text, re.DOTALL)
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: " ".join(meaning.split()).rstrip(".") for name, meaning in found if name in names}


def section_type(cls: type, keys: Sequence[str]) -> Any:
    """Type of the value at a key path below a record; None where there is no such key."""
    kind: Any = cls
    for key in keys:
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = _hints(kind).get(key)
    return kind


def _within_lists(cls: type, keys: Sequence[str]) -> Any:
    """As `section_type`, through lists of records too: what a problem in one of them is about."""
    kind: Any = cls
    for key in keys:
        kind = _hints(_record_in(kind)).get(key)
    return _record_in(kind)


def _record_in(kind: Any) -> Any:
    """The record of a tuple of records; anything else is itself."""
    inside = typing.get_args(kind)
    is_list = typing.get_origin(kind) is tuple and inside and dataclasses.is_dataclass(inside[0])
    return inside[0] if is_list else kind


def key_paths(cls: type, prefix: str = "") -> list[str]:
    """All keys of a record with their path, sections included: `search`, `search.trials`, ..."""
    paths = []
    for name, kind in _hints(cls).items():
        paths.append(prefix + name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            paths += key_paths(kind, f"{prefix}{name}.")
    return paths


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _sections(cls: type) -> list[type]:
    kinds = [_record_in(kind) for kind in _hints(cls).values()]
    below = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return [cls, *(section for kind in below for section in _sections(kind))]


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    # The settings reach plain dataclasses only through a type around them; given with a dataclass they are refused.
    inside: Any = types.GenericAlias(tuple, (cls,))
    return TypeAdapter(inside, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


def _problems(cls: type, errors: Sequence[ErrorDetails], origins: Mapping[str, str]) -> list[str]:
    """One line for each value: the members of a union complain one by one, and each record has a word of its own."""
    complaints: dict[tuple[str, bool], list[ErrorDetails]] = {}
    for error in errors:
        complaints.setdefault((_path(_keys(error)), error["type"] == "value_error"), []).append(error)
    problems = []
    for (path, _), own in complaints.items():
        message = _message(cls, own)
        origin = f" ({origins[path]})" if path in origins else ""
        # A record's own message may name the key already.
        named = message if path and message.startswith(path) else ": ".join(part for part in (path, message) if part)
        problems.append(named + origin)
    return problems


def _keys(error: ErrorDetails) -> list[str | int]:
    """Keys and places in lists that lead to the value."""
    *above, last = error["loc"][1:] or ("",)
    is_unknown = error["type"] == "unexpected_keyword_argument"  # its name may be anything
    return [part for part in above if _is_key(part)] + ([last] if is_unknown or _is_key(last) else [])


def _path(keys: Sequence[str | int]) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")


def _allowed(error: ErrorDetails) -> list[str]:
    """Words that a `literal_error` would have taken."""
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _is_key(part: int | str) -> bool:
    """False for the names that pydantic puts into a place for the members of a union, such as `literal['a']`."""
    return isinstance(part, int) or (
        re.fullmatch(r"\w+", part) is not None and part not in ("bool", "float", "int", "str")
    )


def _message(cls: type, complaints: Sequence[ErrorDetails]) -> str:
    """What is wrong with a value: the first complaint, and the words that would have been taken instead."""
    error = complaints[0]
    kind, given = error["type"], error["input"]
    keys = [k for k in _keys(error) if isinstance(k, str)]
    if kind == "unexpected_keyword_argument":
        allowed = list(_hints(_within_lists(cls, keys[:-1])))
        return f"unknown key{did_you_mean(keys[-1], allowed)} (keys: {', '.join(allowed)})"
    if kind == "missing":
        meaning = field_meanings(_within_lists(cls, keys[:-1])).get(keys[-1], "")
        return f"is missing{f'; it is: {meaning}' if meaning else ''}"
    if kind == "dataclass_type":
        allowed = list(_hints(_within_lists(cls, keys)))
        return f"expected a mapping with keys such as {', '.join(allowed[:4])}, got {_shown(given)}"
    if kind == "literal_error":
        allowed = _allowed(error)
        return f"{_shown(given)} is not allowed; allowed: {', '.join(allowed)}{did_you_mean(str(given), allowed)}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    words = [word for e in complaints if e["type"] == "literal_error" for word in _allowed(e)]
    wanted = " or ".join([_EXPECTED.get(kind, error["msg"]), *words])
    return f"expected {wanted}, got {_shown(given)}{did_you_mean(str(given), words)}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a mapping with {', '.join(map(str, list(value)[:4])) or 'no keys'}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
