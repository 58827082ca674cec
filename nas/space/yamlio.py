"""YAML of people: strict to read, written so that it reads back equal.

YAML 1.2 scalars (core schema, https://yaml.org/spec/1.2.2/ chapter 10.3) instead of PyYAML's 1.1: `1e-3` is a number,
`no` and `12:30` are text. Differs: only `true` and `false` are booleans, integers are decimal, merge keys (`<<`) are
plain keys, and what no file of ours needs is an error: tags, duplicate keys, keys that are not text, NaN and infinity.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nas.core.errors import ConfigError, did_you_mean
from nas.core.jsonio import to_plain

MAX_FILE_BYTES = 256 * 1024  # PyYAML reads about 100 KB per second; our largest file has 5 KB
MAX_DEPTH = 32
MAX_NODES = 100_000  # aliases counted as often as they are used, so that an alias bomb is found before it is expanded
MAX_DIGITS = 18  # fits int64

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_STR = "tag:yaml.org,2002:str"
_SEQ = "tag:yaml.org,2002:seq"
_MAP = "tag:yaml.org,2002:map"

# (tag, pattern, characters that the text can begin with; "" is the empty text)
_RESOLVERS: tuple[tuple[str, str, list[str]], ...] = (
    (_NULL, r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"^(?:true|false)$", ["t", "f"]),
    (_INT, r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        _FLOAT,
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with our scalars and nothing else; the tables below replace the inherited ones."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (declared so by the stubs)
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str, where: str) -> None:
        super().__init__(stream)
        self.where = where
        self.depth = 0
        self.sizes: dict[int, int] = {}  # nodes below each composed node, by id; the nodes live as long as the document

    def fail(self, mark: yaml.Mark | None, problem: str) -> ConfigError:
        line = f":{mark.line + 1}" if mark is not None else ""
        return ConfigError(f"{self.where}{line}: {problem}")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs lack it
        mark = event.start_mark
        if self.depth >= MAX_DEPTH:
            raise self.fail(mark, f"nested deeper than {MAX_DEPTH} levels")
        if (
            isinstance(event, yaml.AliasEvent)
            and event.anchor in self.anchors
            and id(self.anchors[event.anchor]) not in self.sizes
        ):
            raise self.fail(mark, f"alias *{event.anchor} stands inside the value it names")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and id(node) not in self.sizes:
            self.sizes[id(node)] = self._size(node)
        if node is not None and self.sizes[id(node)] > MAX_NODES:
            raise self.fail(mark, f"more than {MAX_NODES} values once its aliases are written out")
        return node

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self.sizes[id(item)] for item in node.value)
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self.sizes[id(key)] + self.sizes[id(value)] for key, value in node.value)
        return 1

    def strict_null(self, node: yaml.Node) -> None:
        self.checked_scalar(node, _NULL)

    def strict_bool(self, node: yaml.Node) -> bool:
        return self.checked_scalar(node, _BOOL) == "true"

    def strict_int(self, node: yaml.Node) -> int:
        text = self.checked_scalar(node, _INT)
        if len(text.lstrip("+-")) > MAX_DIGITS:
            raise self.fail(node.start_mark, f"integer with more than {MAX_DIGITS} digits")
        return int(text)

    def strict_float(self, node: yaml.Node) -> float:
        text = self.checked_scalar(node, _FLOAT)
        word = text.lstrip("+-.").lower()
        value = math.nan if word in ("inf", "nan") else float(text)
        if not math.isfinite(value):
            raise self.fail(node.start_mark, f"{text} is not a finite number")
        return value

    def strict_str(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node.start_mark, "expected text")
        return str(node.value)

    def checked_scalar(self, node: yaml.Node, tag: str) -> str:
        text = self.strict_str(node)
        resolved = self.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if resolved != tag:  # only an explicit tag comes to this: !!int "x"
            raise self.fail(node.start_mark, f"{text!r} does not fit the tag !!{tag.rsplit(':', 1)[1]}")
        return text

    def strict_list(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.fail(node.start_mark, "expected a list")
        return [self.construct_object(item, deep=True) for item in node.value]

    def strict_dict(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node.start_mark, "expected a mapping")
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise self.fail(key_node.start_mark, f"a key must be text, got {key!r}; put it in quotes")
            if key in result:
                raise self.fail(key_node.start_mark, f"key '{key}' appears twice (first on line {lines[key]})")
            lines[key] = line
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def strict_unknown(self, node: yaml.Node) -> Any:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise self.fail(node.start_mark, f"tag {tag} is not allowed; write plain values")


for _tag, _pattern, _first in _RESOLVERS:
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_CONSTRUCTORS: dict[str | None, Any] = {
    _NULL: _StrictLoader.strict_null,
    _BOOL: _StrictLoader.strict_bool,
    _INT: _StrictLoader.strict_int,
    _FLOAT: _StrictLoader.strict_float,
    _STR: _StrictLoader.strict_str,
    _SEQ: _StrictLoader.strict_list,
    _MAP: _StrictLoader.strict_dict,
    None: _StrictLoader.strict_unknown,
}
_StrictLoader.yaml_constructors.update(_CONSTRUCTORS)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else; writes shared values out instead of aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's signature)
        return True

    def quoted_where_needed(self, data: str) -> yaml.ScalarNode:
        """Double quotes keep control characters and rare line breaks (U+0085, U+2028), which plain text folds."""
        return self.represent_scalar(_STR, data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.quoted_where_needed)
for _tag, _pattern, _first in _RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data (dict, list, str, int, float, bool, None) of one YAML document.

    Args:
        text: the document.
        where: file name or option, the beginning of every message.

    Raises:
        ConfigError: text that is not strict YAML in the sense of this module; the message gives the line.
    """
    if len(text.encode(errors="replace")) > MAX_FILE_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_FILE_BYTES // 1024} KiB; is this the right file?")
    try:
        loader = _StrictLoader(text, where)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        context = f" ({e.context})" if e.context else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {e.problem}{context}") from e
    except yaml.YAMLError as e:  # ReaderError: a character that YAML does not allow
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from e


def load_yaml(path: Path) -> Any:
    """Plain data of a YAML file.

    Raises:
        ConfigError: no such file, not UTF-8, or not strict YAML; the message begins with file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES // 1024} KiB; is this the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such file{_files_beside(path)}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from e
    return parse_yaml(text, str(path))


def _files_beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"{did_you_mean(path.name, names)}; in {folder}: {', '.join(names[:12]) or 'no YAML file'}"


def dump_yaml(value: Any) -> str:
    """YAML text of a record or plain data, in the order of its fields; `parse_yaml` gives the plain data back.

    Raises:
        RecordError: NaN, infinity, or a type that plain data cannot hold.
    """
    text: str = yaml.dump(
        to_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )
    return text
