"""Per-layer profiles that trtexec prints (--dumpProfile) or exports (--exportProfile), read into entries.

The formats themselves are read by `nas.devices.board.trtexec_output`, which a board uses too. Layers are fused nodes of
an engine: true times of that engine, never rows of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.core.errors import DataError, UsageError
from nas.devices.board.errors import BoardError
from nas.devices.board.trtexec_output import profile_of_json, profile_of_text
from nas.latency.entries import ImportSettings, SourceEntry, judged, number_of


def trtexec_text(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """The table that trtexec prints; other lines of the log are passed over."""
    _milliseconds(settings)
    entries = [
        _profile_entry(cells, count, f"line {number}", f"{where}:{number}", settings)
        for number, count, cells in profile_of_text(text)
    ]
    if not entries:
        raise DataError(
            f"{where}: no layers after a line `=== Profile (N iterations ) ===`. Run trtexec with --dumpProfile"
            " --separateProfileRun and keep what it prints"
        )
    return _numbered(entries)


def trtexec_json(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """The list that trtexec exports."""
    _milliseconds(settings)
    try:
        count, layers = profile_of_json(text)
    except BoardError as e:
        colon = "" if e.message.startswith("[") else ": "  # the place inside the file belongs to its name
        raise DataError(f"{where}{colon}{e.message}. Is it the right file?") from e
    entries = [
        _profile_entry({**item, "Layer": str(item["name"])}, count, f"item {i}", f"{where}[{i}]", settings)
        for i, item in enumerate(layers, start=1)
    ]
    if not entries:
        raise DataError(f"{where}: the profile has no layers. Run trtexec with --exportProfile again")
    return _numbered(entries)


def _profile_entry(
    cells: Mapping[str, object], count: int, place: str, at: str, settings: ImportSettings
) -> SourceEntry:
    """Time of a layer: the median where there is one, else the total over the runs (the average has fewer digits)."""
    name = str(cells["Layer"])
    if cells.get("medianMs") is not None:
        value = number_of(cells["medianMs"], f"{at}: {name}: median")
    else:
        total = number_of(cells["timeMs"], f"{at}: {name}: time")
        number_of(cells["averageMs"], f"{at}: {name}: average")
        value = total / count
    entry = SourceEntry(
        f"layer|{name}|{settings.precision}",
        name,
        place,
        "kept",
        value,
        "a fused layer",
        images=settings.batch,
        count=count,
    )
    return judged(entry, None, None)


def _numbered(entries: list[SourceEntry]) -> list[SourceEntry]:
    """Names made unique: a profile may have several layers of one name, which are different layers."""
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        again = seen[entry.name]
        result.append(entry if again == 1 else replace(entry, name=f"{entry.name}#{again}"))
    return result


def _milliseconds(settings: ImportSettings) -> None:
    if settings.unit not in (None, "ms"):
        raise UsageError(f"--unit {settings.unit}: trtexec writes milliseconds; leave --unit out")
