"""Times with units."""

from __future__ import annotations

import pytest

from nas.core.errors import UsageError
from nas.core.units import format_bytes, format_count, format_duration, format_ms, parse_ms


@pytest.mark.parametrize(
    ("text", "value_ms"),
    [("5ms", 5), ("5", 5), (" 5 ms ", 5), ("0.005s", 5), ("800us", 0.8), (".5ms", 0.5), ("1e-3s", 1), ("2.s", 2000)],
)
def test_times_with_and_without_units(text: str, value_ms: float) -> None:
    assert parse_ms(text, "--budget") == pytest.approx(value_ms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a time"),
        ("fast", "'fast' is not a time"),
        ("5,2ms", "write a decimal point, not a comma"),
        ("5m", "unknown unit 'm' in '5m'; did you mean 'ms'?"),
        ("5fps", "unknown unit 'fps'"),
        ("5MS", "unknown unit 'MS'"),
        ("0", "'0' is not a positive, finite time"),
        ("-1ms", "not a positive"),
        ("1e999", "not a positive, finite time"),
        ("nan", "'nan' is not a time"),
        ("1ms2", "is not a time"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_ms(text, "--budget")
    assert str(e.value).startswith("--budget: ")
    assert message in str(e.value)
    assert "such as 5ms, 800us, 0.005s" in str(e.value)


def test_shown_with_three_digits() -> None:
    assert [format_ms(v) for v in (0.0312, 0.3124, 4.8, 48.14, 481.2, 0)] == [
        "0.0312 ms",
        "0.312 ms",
        "4.80 ms",
        "48.1 ms",
        "481 ms",
        "0 ms",
    ]


def test_durations_sizes_and_counts_for_people() -> None:
    assert [format_duration(s) for s in (0.42, 12, 59.6, 185, 7800)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [format_bytes(b) for b in (812, 1_468_006, 5 * 2**30)] == ["812 B", "1.4 MiB", "5.0 GiB"]
    assert [format_count(n) for n in (740, 12_345, 1_040_000, 450_000_000_000)] == [
        "740",
        "12.3 k",
        "1.04 M",
        "4.50e+11",
    ]
