"""Per-layer profiles that trtexec prints (--dumpProfile) or exports (--exportProfile), read into entries.

TensorRT 7 puts the layer first and has no median, 8 puts it last; the export has `medianMs` since 8.4. Layers are fused
nodes of an engine: true times of that engine, never rows of ours.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from nas.core.errors import DataError, UsageError
from nas.latency.entries import ImportSettings, SourceEntry, judged, number_of

_PREFIX = re.compile(r"^(?:\[[^\]]*\]\s)*(?:\[[A-Z]\])?")
_COLUMNS = re.compile(r"Layer|Avg\.(?: Time)? ?\(ms\)|Median(?: Time)? ?\(ms\)|Time ?\(ms\)|Time ?\(?%\)?")
_ITERATIONS = re.compile(r"=== Profile \((\d+) iterations")
_PROFILE_ITEM = re.compile(r'\{\s*"name"\s*:\s*"(.*)"\s*,\s*("timeMs"\s*:.*?)\}')
_NOT_A_NUMBER = re.compile(r'("percentage"\s*:\s*)[-+]?(?:nan|inf|NaN|Infinity)\b')


def trtexec_text(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """The table that trtexec prints; other lines of the log are passed over."""
    _milliseconds(settings)
    columns: list[str] = []
    count, entries = 0, []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _PREFIX.sub("", raw.rstrip(), count=1)
        iterations = _ITERATIONS.search(line)
        if iterations is not None:
            count, columns = int(iterations[1]), []
            continue
        if not columns:
            found = _COLUMNS.findall(line)
            if count and "Layer" in (found[:1] + found[-1:]) and len(found) >= 4:
                columns = found
            continue
        cells = _profile_cells(line, columns)
        if cells is None or cells["Layer"] == "Total":
            columns, count = [], 0
            continue
        entries.append(_profile_entry(cells, count, f"line {number}", f"{where}:{number}", settings))
    if not entries:
        raise DataError(
            f"{where}: no layers after a line `=== Profile (N iterations ) ===`. Run trtexec with --dumpProfile"
            " --separateProfileRun and keep what it prints"
        )
    return _numbered(entries)


def _profile_cells(line: str, columns: list[str]) -> dict[str, str] | None:
    numbers = r"\s+([-+]?[\d.]\S*|-?nan|-?inf)" * (len(columns) - 1)
    pattern = rf"\s*(\S.*?){numbers}\s*" if columns[0] == "Layer" else rf"{numbers}\s+(\S.*?)\s*"
    match = re.fullmatch(pattern, line if line[:1].isspace() else f" {line}")
    if match is None:
        return None
    cells = dict(zip(columns, match.groups(), strict=True))
    return {_column(name): cell for name, cell in cells.items()}


def _column(name: str) -> str:
    for start, short in (("Layer", "Layer"), ("Avg", "averageMs"), ("Median", "medianMs")):
        if name.startswith(start):
            return short
    return "percentage" if "%" in name else "timeMs"


def trtexec_json(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """The list that trtexec exports. It does not escape names: where a quote breaks the JSON, it is read by line."""
    _milliseconds(settings)
    text = _NOT_A_NUMBER.sub(r"\1null", text)
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        data = [{"name": m[1], **json.loads(f"{{{m[2]}}}")} for m in map(_item, text.splitlines()) if m is not None]
        first = re.search(r'"count"\s*:\s*(\d+)', text)
        if not data or first is None:
            raise DataError(f"{where}: not JSON of --exportProfile: {e}. Is it the right file?") from e
        data.insert(0, {"count": int(first[1])})
    is_list = isinstance(data, list) and data and isinstance(data[0], dict)
    if not is_list or not isinstance(data[0].get("count"), int) or data[0]["count"] < 1:
        raise DataError(
            f'{where}: a profile of trtexec is a list that begins with {{"count": N}}. Is it the right file?'
        )
    entries = []
    for i, item in enumerate(data[1:], start=1):
        at = f"{where}[{i}]"
        if not isinstance(item, dict) or "name" not in item or not {"timeMs", "averageMs"} <= set(item):
            raise DataError(f"{at}: a layer of the profile has name, timeMs and averageMs")
        cells = {**item, "Layer": str(item["name"])}
        entries.append(_profile_entry(cells, data[0]["count"], f"item {i}", at, settings))
    if not entries:
        raise DataError(f"{where}: the profile has no layers. Run trtexec with --exportProfile again")
    return _numbered(entries)


def _item(line: str) -> re.Match[str] | None:
    match = _PROFILE_ITEM.search(line)
    try:
        return match if match is not None and json.loads(f"{{{match[2]}}}") else None
    except json.JSONDecodeError:
        return None


def _profile_entry(cells: dict[str, str], count: int, place: str, at: str, settings: ImportSettings) -> SourceEntry:
    """Time of a layer: the median where there is one, else the total over the runs (the average has fewer digits)."""
    name = cells["Layer"]
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
