"""What trtexec writes, read into plain lists and numbers: its log, and the JSON files that it exports.

Formats by version (8.0 to 11.x): a log line begins with `[date-time] [I] `; statistics follow `=== Performance
summary ===`; profiles are a table in the log or a file, which does not escape the names of layers; layer information
is JSON that may hold raw control characters, with bare strings for layers of an engine that was not built with
detailed verbosity. What cannot be read is a BoardError of kind `truncated` that says where.
"""

import json
import re
from typing import Any, Dict, List, Optional, Tuple

from .errors import BoardError

_PREFIX = re.compile(r"^(?:\[[^\]]*\]\s)*(?:\[[A-Z]\])?")
_COLUMNS = re.compile(r"Layer|Avg\.(?: Time)? ?\(ms\)|Median(?: Time)? ?\(ms\)|Time ?\(ms\)|Time ?\(?%\)?")
_ITERATIONS = re.compile(r"=== Profile \((\d+) iterations")
_PROFILE_ITEM = re.compile(r'\{\s*"name"\s*:\s*"(.*)"\s*,\s*("timeMs"\s*:.*?)\}')
_NOT_A_NUMBER = re.compile(r'("percentage"\s*:\s*)[-+]?(?:nan|inf|NaN|Infinity)\b')
_BANNER = re.compile(r"&&&& \w+ TensorRT\.trtexec \[TensorRT v(\d+)\]")
_METRIC = re.compile(r"^\s*([A-Z][\w /-]*?): (min = .*)$")
_STATISTIC = re.compile(r"([a-z][\w() %.]*?) = ([-+]?(?:\d[\w.+-]*|inf|nan))")
_SKIPPED = re.compile(r"skipping tactic|insufficient to use tactic", re.IGNORECASE)
_SKIPPING = re.compile(r"skipping tactic", re.IGNORECASE)
# 8.x writes "insuficient"; tactics are also skipped for what has nothing to do with memory
_FOR_MEMORY = re.compile(r"insuff?icient|memory|\boom\b|alloc", re.IGNORECASE)
_TIMING_CACHE = re.compile(r"timing[ _]?cache", re.IGNORECASE)
_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|cudaErrorMemoryAllocation|insufficient (?:workspace|memory)|"
    r"requested amount of gpu memory|cannot allocate",
    re.IGNORECASE,
)
_NO_SPACE = "No space left on device"  # strerror(ENOSPC)
_SERIOUS = re.compile(r"\berror\b|FAILED|Unknown option|Could not|terminate called", re.IGNORECASE)
_UNKNOWN_OPTION = re.compile(r"Unknown option:? +(--?[\w-]+)")
_DROPPED_MS = ("8.0", "8.2", "8.4")  # `--exportTimes` of these holds the queries of the warm-up, too

Version = Tuple[int, int, int]


def version_of(text: str) -> Optional[Version]:
    """The version in trtexec's banner: MAJOR*1000+MINOR*100+PATCH below 10000, else MAJOR*10000+MINOR*100+PATCH."""
    found = _BANNER.search(text)
    if found is None:
        return None
    number = int(found.group(1))
    major = 1000 if number < 10000 else 10000
    return number // major, number % major // 100, number % 100


def performance_of(text: str) -> Dict[str, Dict[str, float]]:
    """Statistics of the performance summary: metric -> min, max, mean, median, percentile(99%), ... in ms.

    Metrics of the last summary in the log; their order differs between versions. Empty where there is none.
    """
    result: Dict[str, Dict[str, float]] = {}
    begun = False
    for raw in text.splitlines():
        line = _PREFIX.sub("", raw.rstrip(), count=1)
        if "=== Performance summary" in line:
            begun, result = True, {}
        metric = _METRIC.match(line) if begun else None
        if metric is not None:
            result[metric.group(1)] = {
                name.strip(): float(value) for name, value in _STATISTIC.findall(metric.group(2)) if _is_number(value)
            }
    return result


def check_median(text: str, median_ms: float) -> None:
    """Compares the median of the queries with the one that trtexec prints: what is read wrong would be off by far.

    Raises:
        BoardError: `truncated`: they differ by more than a tenth and more than the clock resolves. A log without a
            summary says nothing.
    """
    told_ms = performance_of(text).get("GPU Compute Time", {}).get("median")
    if told_ms is not None and abs(told_ms - median_ms) > max(0.1 * told_ms, 0.005):
        raise BoardError(
            "truncated",
            "trtexec's summary tells a median of %g ms, the times that it exports one of %g ms: its output is read "
            "wrong" % (told_ms, median_ms),
        )


def times_of(text: str, version: Version, warmup_ms: float) -> List[Dict[str, float]]:
    """Queries of `--exportTimes`: startEnqMs, endEnqMs, computeMs, h2dMs, d2hMs, ... of each; warm-up left out.

    Raises:
        BoardError: `truncated`: no JSON list of queries.
    """
    data = _json_of(text, "times")
    wanted = ("startEnqMs", "endEnqMs", "startComputeMs", "computeMs", "h2dMs", "d2hMs")
    if not isinstance(data, list):
        raise BoardError("truncated", "times of trtexec are a list of queries; got a %s" % type(data).__name__)
    queries = []
    for i, item in enumerate(data):
        missing = [name for name in wanted if not isinstance(item, dict) or not _is_number(item.get(name))]
        if missing:
            raise BoardError("truncated", "times[%d] of trtexec has no number %s" % (i, missing[0]))
        queries.append({name: float(item[name]) for name in item if _is_number(item[name])})
    if "%d.%d" % version[:2] in _DROPPED_MS:
        queries = [query for query in queries if query["startComputeMs"] >= warmup_ms]
    if not queries:
        raise BoardError("truncated", "times of trtexec hold no query after the warm-up of %g ms" % warmup_ms)
    return queries


def profile_of_text(text: str) -> List[Tuple[int, int, Dict[str, str]]]:
    """Layers of the table that trtexec prints with --dumpProfile, as they stand there; other lines are passed over.

    TensorRT 7 puts the layer first and has no median, 8 puts it last.

    Returns:
        For each layer its line (from 1), the number of runs, and its cells: `Layer`, `timeMs`, `averageMs`, perhaps
        `medianMs` and `percentage`, all as text.
    """
    columns: List[str] = []
    count, layers = 0, []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _PREFIX.sub("", raw.rstrip(), count=1)
        iterations = _ITERATIONS.search(line)
        if iterations is not None:
            count, columns = int(iterations.group(1)), []
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
        layers.append((number, count, cells))
    return layers


def profile_of_json(text: str) -> Tuple[int, List[Dict[str, Any]]]:
    """Number of runs, and the layers of `--exportProfile`: name, timeMs (of all runs), averageMs, perhaps medianMs.

    trtexec does not escape names: where a quote breaks the JSON, it is read by line.

    Raises:
        BoardError: `truncated`: not such a file, or cut off.
    """
    text = _NOT_A_NUMBER.sub(r"\1null", text)
    try:
        data = json.loads(text, strict=False)
    except (ValueError, RecursionError) as e:
        matches = [match for match in map(_profile_item, text.splitlines()) if match is not None]
        first = re.search(r'"count"\s*:\s*(\d+)', text)
        if not matches or first is None or not text.rstrip().endswith("]"):
            raise BoardError("truncated", "not JSON of --exportProfile: %s" % e) from e
        data = [dict(json.loads("{%s}" % match.group(2)), name=match.group(1)) for match in matches]
        data.insert(0, {"count": int(first.group(1))})
    is_list = isinstance(data, list) and data and isinstance(data[0], dict)
    if not is_list or not isinstance(data[0].get("count"), int) or data[0]["count"] < 1:
        raise BoardError("truncated", 'a profile of trtexec is a list that begins with {"count": N}')
    for i, item in enumerate(data[1:], start=1):
        if not isinstance(item, dict) or "name" not in item or not {"timeMs", "averageMs"} <= set(item):
            raise BoardError("truncated", "[%d]: a layer of the profile has name, timeMs and averageMs" % i)
    return data[0]["count"], data[1:]


def layers_of(text: str) -> List[Dict[str, str]]:
    """Layers of `--exportLayerInfo` or of the engine inspector: name, type, origin, metadata, formats; texts.

    `metadata` has the names of the ONNX nodes where TensorRT keeps them (8.6 on), separated by the control character
    0x1E. An engine without detailed verbosity tells names only; the other texts are empty.

    Raises:
        BoardError: `truncated`: not such a text, or cut off.
    """
    data = _json_of(text, "layer information")
    layers = data.get("Layers") if isinstance(data, dict) else data
    if not isinstance(layers, list):
        raise BoardError("truncated", "layer information of TensorRT has no list of layers")
    result = []
    for item in layers:
        if isinstance(item, str):
            result.append({"name": item, "type": "", "origin": "", "metadata": "", "formats": ""})
        elif isinstance(item, dict):
            told = {key: item.get(name) for key, name in (("name", "Name"), ("type", "LayerType"))}
            told.update(origin=item.get("Origin"), metadata=item.get("Metadata"), formats=_formats(item))
            result.append({key: "" if value is None else str(value) for key, value in told.items()})
    return result


def skipped_tactics(text: str) -> int:
    """How many tactics the builder passed over because memory was short.

    8.4 and later write two lines for one: what the device has, and that the tactic is skipped. Where only the first of
    them is there, those are counted.
    """
    lines = [line for line in text.splitlines() if _SKIPPED.search(line) and _FOR_MEMORY.search(line)]
    return sum(1 for line in lines if _SKIPPING.search(line)) or len(lines)


def skipped_note(text: str) -> List[str]:
    """What to say of an engine whose builder passed over tactics; empty where it did not."""
    skipped = skipped_tactics(text)
    return ["skipped_tactics: %d tactics were passed over because memory was short" % skipped] if skipped else []


def blames_timing_cache(text: str) -> bool:
    """Whether a build that failed names the timing cache: in its errors, or in the last that it printed."""
    told = "\n".join(line for line in text.splitlines() if "&&&&" not in line)  # those repeat the command
    marked, loud, last = _telling(told)
    return any(_TIMING_CACHE.search(line) for line in marked or loud or [last])


def captured_graph(text: str) -> Optional[bool]:
    """Whether trtexec ran a CUDA graph; None where its log says nothing about one."""
    if re.search("CUDA graph capture (?:on the stream has )?failed", text, re.IGNORECASE):
        return False
    return True if re.search("Successfully captured CUDA graph", text, re.IGNORECASE) else None


def unknown_options(text: str) -> List[str]:
    """Options that this trtexec refused."""
    return _UNKNOWN_OPTION.findall(text)


def failure_of(text: str, returncode: Optional[int], what: str) -> BoardError:
    """The typed error of a program of TensorRT that ended badly, or of a call in this process that did.

    Args:
        text: everything that it printed.
        returncode: as subprocess tells it, below 0 for a signal; None where no program ended.
        what: what was tried, such as `building model.onnx`.
    """
    marked, loud, last = _telling(text)
    said = " | ".join((marked or loud)[:3]) or last or "nothing was printed"
    said = said if len(said) <= 400 else said[:397] + "..."
    skipped = skipped_tactics(text)
    more = "; %d tactics were skipped because memory was short" % skipped if skipped else ""
    if returncode in (-9, 137):
        return BoardError(
            "killed",
            "%s: killed by the system, which ends the largest program when memory is short (look into: dmesg)%s. "
            "Close other programs, add swap, or give a smaller workspace" % (what, more),
        )
    if any(_MEMORY.search(line) for line in marked + loud):
        return BoardError("out_of_memory", "%s: out of memory: %s%s" % (what, said, more))
    if _NO_SPACE in text:
        return BoardError("disk_full", "%s: no space left on this board: %s" % (what, said))
    if unknown_options(text):
        return BoardError("unsupported", "%s: this trtexec does not know %s" % (what, unknown_options(text)[0]))
    if returncode is not None:
        what += ": signal %d" % -returncode if returncode < 0 else ": exit code %d" % returncode
    return BoardError("build_failed", "%s: %s%s" % (what, said, more))


def _telling(text: str) -> Tuple[List[str], List[str], str]:
    """Lines that tell why something failed: those marked as errors, those that sound like one, and the last one.

    What is marked as an error says more than a warning, such as that there is no timing cache yet. Tactics that were
    skipped are no reason.
    """
    raw = [line for line in text.splitlines() if not _SKIPPED.search(line)]
    lines = [_PREFIX.sub("", line, count=1).strip() for line in raw]
    marked = [line for mark, line in zip(raw, lines) if "[E]" in mark]
    loud = [line for line in lines if _SERIOUS.search(line)]
    return marked, loud, next((line for line in reversed(lines) if line), "")


def _json_of(text: str, what: str) -> Any:
    try:
        return json.loads(text, strict=False)  # names may hold raw control characters
    except (ValueError, RecursionError) as e:
        raise BoardError(
            "truncated", "%s of TensorRT are no complete JSON (%d characters): %s" % (what, len(text), e)
        ) from e


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _profile_cells(line: str, columns: List[str]) -> Optional[Dict[str, str]]:
    numbers = r"\s+([-+]?[\d.]\S*|-?nan|-?inf)" * (len(columns) - 1)
    pattern = r"\s*(\S.*?)%s\s*" % numbers if columns[0] == "Layer" else r"%s\s+(\S.*?)\s*" % numbers
    match = re.fullmatch(pattern, line if line[:1].isspace() else " " + line)
    if match is None:
        return None
    return {_column(name): cell for name, cell in zip(columns, match.groups())}


def _column(name: str) -> str:
    for start, short in (("Layer", "Layer"), ("Avg", "averageMs"), ("Median", "medianMs")):
        if name.startswith(start):
            return short
    return "percentage" if "%" in name else "timeMs"


def _profile_item(line: str) -> Any:
    match = _PROFILE_ITEM.search(line)
    try:
        return match if match is not None and json.loads("{%s}" % match.group(2)) else None
    except ValueError:
        return None


def _formats(item: Dict[str, Any]) -> str:
    """Formats of what a layer reads and writes; until 10.x one field, in 11.x two."""
    found = []
    for side in ("Inputs", "Outputs"):
        for tensor in item.get(side) or []:
            if isinstance(tensor, dict):
                parts = [tensor.get(name) for name in ("Format/Datatype", "Format", "DataType", "Datatype")]
                found.append("%s: %s" % (side[:-1].lower(), " ".join(str(part) for part in parts if part)))
    return "; ".join(found)
