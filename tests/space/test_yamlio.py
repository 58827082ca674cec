"""YAML files are read strictly, attacks end in one message, and what is written reads back equal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.errors import ConfigError, RecordError
from nas.space.yamlio import MAX_DEPTH, MAX_FILE_BYTES, dump_yaml, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-0.25", -0.25),
        ("1.10", 1.1),
        ("12", 12),
        ("012", 12),  # YAML 1.1 would say 10
        ("+7", 7),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("'1e-3'", "1e-3"),
        ("!!float 1", None),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    if text == "!!float 1":
        with pytest.raises(ConfigError, match=r"'1' does not fit the tag !!float"):
            parse_yaml(f"key: {text}", "x.yaml")
        return
    result = parse_yaml(f"key: {text}", "x.yaml")["key"]
    assert result == value
    assert type(result) is type(value)


BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"x\.yaml:3: key 'a' appears twice \(first on line 1\)"),
        ("s:\n  - {k: 1, 'k': 2}", r"x\.yaml:2: key 'k' appears twice"),
        ("a: .nan", r"x\.yaml:1: \.nan is not a finite number"),
        ("a:\n - -.inf", r"x\.yaml:2: -\.inf is not a finite number"),
        ("a: 1e999", r"x\.yaml:1: 1e999 is not a finite number"),
        ("a: " + "9" * 5000, r"x\.yaml:1: integer with more than 18 digits"),
        ("a: !!python/object/apply:os.system [ls]", r"x\.yaml:1: tag !!python/object/apply:os\.system is not allowed"),
        ("a: !env HOME", r"x\.yaml:1: tag !env is not allowed; write plain values"),
        ("a: !!binary aGk=", r"tag !!binary is not allowed"),
        ("a: !!set {b, c}", r"tag !!set is not allowed"),
        ("a: !!int x", r"'x' does not fit the tag !!int"),
        ("a: !!int [1]", r"x\.yaml:1: expected text"),
        ("a: !!seq {b: 1}", r"x\.yaml:1: expected a list"),
        ("a: !!map [b]", r"x\.yaml:1: expected a mapping"),
        ("3: x", r"x\.yaml:1: a key must be text, got 3; put it in quotes"),
        ("? [a]\n: b", r"x\.yaml:1: a key must be text, got \['a'\]"),
        (BOMB, r"x\.yaml:6: more than 100000 values once its aliases are written out"),
        ("a: &a [*a]", r"x\.yaml:1: alias \*a stands inside the value it names"),
        ("a: &a {b: {c: *a}}", r"alias \*a stands inside the value it names"),
        ("a: *b", r"x\.yaml:1: not valid YAML: found undefined alias"),
        ("[" * 5000, rf"x\.yaml:1: nested deeper than {MAX_DEPTH} levels"),
        ("\n".join("  " * i + f"k{i}:" for i in range(100)), rf"x\.yaml:\d+: nested deeper than {MAX_DEPTH} levels"),
        ("a: [1", r"x\.yaml:1: not valid YAML: expected ',' or ']'"),
        ("a: b: c", r"x\.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", r"x\.yaml:2: not valid YAML: but found another document"),
        ("a: \x00", r"x\.yaml: not valid YAML: unacceptable character #x0000"),
        ("a: " + "x" * MAX_FILE_BYTES, r"x\.yaml: larger than 256 KiB"),
    ],
)
def test_bad_text_ends_in_one_message_with_its_line(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x.yaml")
    assert time.process_time() - start < 5


def test_aliases_in_reason_are_read() -> None:
    assert parse_yaml("a: &k [3, 5]\nb: *k", "x.yaml") == {"a": [3, 5], "b": [3, 5]}


def test_merge_keys_are_ordinary_keys() -> None:
    assert parse_yaml("<<: {a: 1}", "x.yaml") == {"<<": {"a": 1}}


def test_a_missing_file_names_the_closest_one(tmp_path: Path) -> None:
    (tmp_path / "tiny-32.yaml").write_text("a: 1")
    with pytest.raises(
        ConfigError, match=r"tiny-23\.yaml: no such file; did you mean 'tiny-32\.yaml'\?; in .*: tiny-32"
    ):
        load_yaml(tmp_path / "tiny-23.yaml")
    with pytest.raises(ConfigError, match=r"no such file; the folder .*nowhere does not exist"):
        load_yaml(tmp_path / "nowhere" / "x.yaml")


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_yaml(tmp_path)
    file = tmp_path / "x.yaml"
    file.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.yaml: not UTF-8 text \(byte 3\)"):
        load_yaml(file)
    file.write_bytes(b"a: 1\n" * (MAX_FILE_BYTES // 4))
    with pytest.raises(ConfigError, match=r"x\.yaml: larger than 256 KiB"):
        load_yaml(file)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffa: 1\r\nb: Äther\r\n".encode())
    assert load_yaml(file) == {"a": 1, "b": "Äther"}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18) + 1, 10**18 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(
        ["no", "1e-3", "1.0", "0o7", "012", "true", "Null", "~", "", "=", "<<", ".nan", "- a", "a: b", "#"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(PLAIN)
def test_what_is_written_reads_back_equal(value: Any) -> None:
    text = dump_yaml(value)
    result = parse_yaml(text, "written.yaml")
    assert result == value
    assert dump_yaml(result) == text
    assert yaml.safe_load(text) == value  # also for the YAML 1.1 readers of other tools


def test_writing_keeps_the_order_and_refuses_nan() -> None:
    assert dump_yaml({"b": 1, "a": [3, 5]}) == "b: 1\na: [3, 5]\n"
    with pytest.raises(RecordError, match=r"cannot write nan as JSON: numbers must be finite"):
        dump_yaml({"a": float("nan")})
