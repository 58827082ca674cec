"""Quantities with units as people type them, and as they are shown. Inside the project a unit ends the name instead."""

from __future__ import annotations

import math
import re

from nas.core.errors import UsageError, did_you_mean

_MS_PER_UNIT = {"ms": 1.0, "us": 1e-3, "s": 1e3}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([^\d\s.,]*)", re.IGNORECASE)


def parse_ms(text: str, where: str) -> float:
    """Milliseconds from `5ms`, `5`, `0.005s` or `800us`; a number without a unit is milliseconds.

    Args:
        text: what was given.
        where: option or key, the beginning of the message.

    Raises:
        UsageError: no number, an unknown unit, a decimal comma, or a value that is not positive and finite.
    """
    allowed = "allowed: a positive number with ms, us or s, such as 5ms, 800us, 0.005s (no unit: ms)"
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        comma = "; write a decimal point, not a comma" if "," in text else ""
        raise UsageError(f"{where}: {text!r} is not a time{comma}; {allowed}")
    number, unit = match.groups()
    if unit not in _MS_PER_UNIT and unit:
        raise UsageError(f"{where}: unknown unit {unit!r} in {text!r}{did_you_mean(unit, _MS_PER_UNIT)}; {allowed}")
    value = float(number) * _MS_PER_UNIT[unit or "ms"]
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{where}: {text!r} is not a positive, finite time; {allowed}")
    return value


def format_ms(value_ms: float) -> str:
    """A latency with three significant digits and its unit: `0.312 ms`, `48.1 ms`."""
    if value_ms == 0:
        return "0 ms"
    digits = max(0, 2 - math.floor(math.log10(abs(value_ms))))
    return f"{value_ms:.{digits}f} ms"


def format_duration(value_s: float) -> str:
    """A duration for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if value_s < 10:
        return f"{value_s:.1f} s"
    whole = round(value_s)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(value: int) -> str:
    """A size for people in binary units: `812 B`, `1.4 MiB`."""
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{value} B" if unit == "B" else f"{size:.1f} {unit}"


def format_count(value: int) -> str:
    """A count for people: `740`, `1.04 M`, `4.50e+11` from a billion on."""
    if value < 10_000:
        return str(value)
    if value < 1_000_000_000:
        return f"{value / 1e6:.2f} M" if value >= 1_000_000 else f"{value / 1e3:.1f} k"
    return f"{value:.2e}"


def rounded_up(value: float) -> str:
    """A number as text with two digits, not below it."""
    text = f"{value:.2g}"
    return text if float(text) >= value else f"{value * 1.06:.2g}"
