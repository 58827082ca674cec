"""What foreign latency files are read into: one entry per line of the source, with its fate, and what is known of it.

An entry is a row (it is exactly one of our layers), is kept beside (a true time of something that is no layer of ours),
or is rejected (not a time: zero, negative, failed there, impossible for its work). None is dropped silently.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from nas.core.errors import DataError, RecordError, UsageError
from nas.core.records import LayerSpec, Precision
from nas.latency.keys import MIN_MACS_PER_MS, MIN_MS, SLACK_MS, implausible

Unit = Literal["ms", "us", "s"]
Fate = Literal["row", "kept", "rejected"]

MS_PER_UNIT: dict[str, float] = {"ms": 1.0, "us": 1e-3, "s": 1e3}
WRONG_UNIT_SHARE = 0.02  # more impossible times than this are no accident of single entries; published files have none
MAX_MACS_PER_MS_ANYWHERE = 1e12  # 2 * 10^15 operations per second: above every accelerator with published tables
_IMPOSSIBLE, _IMPOSSIBLE_ROW = "impossible", "impossible for a row"
_AGAIN = "Correct it, then run the same command again"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What a file does not say by itself and has to be told.

    `unit` is None where it was not given; `batch` images are in each timed call; `similar` takes blocks that differ
    from ours in the form of an activation only.
    """

    precision: Precision
    unit: Unit | None = None
    batch: int = 1
    similar: bool = False

    def factor(self, form: str) -> float:
        """Milliseconds per number of the source. Raises UsageError where nobody said the unit."""
        if self.unit is None:
            raise UsageError(
                f"{form} does not say in which unit its times are, and guessing is refused. Give --unit ms, us or s"
            )
        return MS_PER_UNIT[self.unit]


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One entry of a foreign file.

    `name` is neutral and readable, `source` the text of the file, `place` its line or key. `latency_ms` is the time of
    one timed call of `images` images, None where the file has none. `key` is our row key. `count`, `std_ms`: repeats
    and their deviation, where published.
    """

    name: str
    source: str
    place: str
    fate: Fate
    latency_ms: float | None
    reason: str = ""
    key: str | None = None
    images: int = 1
    count: int | None = None
    std_ms: float | None = None

    @property
    def image_ms(self) -> float | None:
        """Milliseconds per image: what a row holds."""
        return None if self.latency_ms is None else self.latency_ms / self.images

    def rejected(self, reason: str) -> SourceEntry:
        """The same entry, not usable for this reason."""
        return replace(self, fate="rejected", reason=reason, key=None)


@dataclass(frozen=True, slots=True)
class Imported:
    """All entries of a file, in its order, and what a user should know of them."""

    form: str
    entries: tuple[SourceEntry, ...]
    warnings: tuple[str, ...]

    def of(self, fate: Fate) -> tuple[SourceEntry, ...]:
        """Entries with this fate."""
        return tuple(e for e in self.entries if e.fate == fate)


def number_of(value: object, where: str) -> float:
    """A finite number from the text or plain value of a file.

    Raises:
        RecordError: text, NaN, infinity, or a decimal comma; the message begins with `where`.
    """
    text = str(value).strip()
    if isinstance(value, bool) or _NUMBER.fullmatch(text) is None:
        lower = text.lower().lstrip("+-.")
        if lower in ("nan", "inf", "infinity"):
            raise RecordError(f"{where}: {text} is not a finite number. {_AGAIN}")
        comma = "; write a decimal point, not a comma" if "," in text else ""
        raise RecordError(f"{where}: {text!r} is not a number{comma}. {_AGAIN}")
    result = float(text)
    if not math.isfinite(result):
        raise RecordError(f"{where}: {text} is not a finite number. {_AGAIN}")
    return result


def judged(entry: SourceEntry, layer: LayerSpec | None, macs: int | None) -> SourceEntry:
    """The entry with its fate: whether its time can be one at all, and whether it is a row.

    Args:
        entry: as read.
        layer: our layer that it is exactly, or None.
        macs: multiply-adds of one image, where they are known.
    """
    value = entry.image_ms
    if value is None:
        return entry
    if not value > 0:
        return entry.rejected("negative" if value < 0 else "zero")
    reason = implausible(value, macs) if layer is not None else _impossible(value, macs)
    if reason is not None:
        return entry.rejected(f"{_IMPOSSIBLE if layer is None else _IMPOSSIBLE_ROW}: {reason}")
    return entry if layer is None else replace(entry, fate="row", key=layer.key)


def _impossible(value_ms: float, macs: int | None) -> str | None:
    """As `implausible`, for things that are no layer of ours and for devices of any speed."""
    if value_ms < MIN_MS / 10:
        return f"{value_ms:g} ms is shorter than any call"
    if macs is None:
        return None
    if value_ms * MAX_MACS_PER_MS_ANYWHERE < macs:
        return f"{value_ms:g} ms is too short for {macs} multiply-adds"
    if value_ms > SLACK_MS + macs / MIN_MACS_PER_MS:
        return f"{value_ms:g} ms is too long for {macs} multiply-adds"
    return None


def finished(form: str, entries: list[SourceEntry], where: str) -> Imported:
    """The entries of a whole file, checked together: duplicates, unit, and what to warn about.

    Raises:
        DataError: no entry at all, or the same entry twice with different times.
        RecordError: so many impossible times that the unit must be wrong; the message names the first.
    """
    if not entries:
        raise DataError(f"{where}: no entry of the format {form} in this file. Is it the right file and format?")
    unique: dict[str, SourceEntry] = {}
    repeats = 0
    for entry in entries:
        for name in {entry.name, entry.key or entry.name}:
            before = unique.get(name)
            if (
                before is not None
                and before.latency_ms != entry.latency_ms
                and "rejected" not in (before.fate, entry.fate)
            ):
                raise DataError(
                    f"{where}: {entry.place} contradicts {before.place}: {entry.source} has {entry.latency_ms:g} ms and"
                    f" {before.latency_ms:g} ms. Take one of them out, then run the same command again"
                )
        if entry.name in unique and entry.latency_ms == unique[entry.name].latency_ms:
            repeats += 1
            continue
        for name in {entry.name, entry.key or entry.name}:
            unique.setdefault(name, entry)
    kept = list(dict.fromkeys(unique[e.name] for e in entries))
    _refuse_wrong_unit(kept, where)
    return Imported(form, tuple(kept), tuple(_warnings(kept, repeats)))


def _refuse_wrong_unit(entries: list[SourceEntry], where: str) -> None:
    """Rows are judged among themselves too: their bounds are tighter than those of what is kept beside."""
    timed = [e for e in entries if e.latency_ms is not None and e.latency_ms > 0]
    wrong = [e for e in timed if e.reason.startswith(_IMPOSSIBLE)]
    wrong_rows = [e for e in wrong if e.reason.startswith(_IMPOSSIBLE_ROW)]
    rows = sum(e.fate == "row" for e in timed) + len(wrong_rows)
    for found, count in ((wrong, len(timed)), (wrong_rows, rows)):
        if found and len(found) > WRONG_UNIT_SHARE * count:
            first = found[0]
            name = first.source if first.source == first.place else f"{first.place}: {first.source}"
            others = f", and {len(found) - 1} more of {count}" if found[1:] else ""
            raise RecordError(
                f"{where}: {name}: {first.reason}{others}. The unit or the batch must be wrong: give the right --unit"
                " (ms, us, s) and --batch"
            )


def _warnings(entries: list[SourceEntry], repeats: int) -> list[str]:
    result = []
    found: dict[str, list[SourceEntry]] = {}
    for entry in entries:
        if entry.fate == "rejected":
            found.setdefault(entry.reason.partition(":")[0], []).append(entry)
    for reason, rejected in found.items():
        names = ", ".join(e.source for e in rejected[:3])
        more = f" and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        result.append(f"{len(rejected)} of {len(entries)} entries rejected ({reason}): {names}{more}")
    if repeats:
        result.append(f"{repeats} entries stand in the file more than once with the same time; each is used once")
    if not any(e.fate == "row" for e in entries):
        result.append("no entry is exactly one of our layers, so a search can borrow nothing from this table")
    return result
