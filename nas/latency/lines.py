"""Lines of a table's files: how a row or a network is written, read back and checked.

A line is `{"check":"<16 hex digits>","row":{...}}`; the check is the start of the SHA-256 of the device state's
fingerprint and the text of the row, so a number or a state changed by hand is noticed, and a row that was copied from
the table of another state. What is read must be possible at all: key, units, samples and value fit together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from nas.core.errors import RecordError
from nas.core.jsonio import canonical_json, from_plain, parse_json, to_plain
from nas.core.records import Candidate, LayerSpec, Measurement
from nas.core.walk import total_macs
from nas.latency.keys import implausible, layer_of_key

NetworkForm = Literal["logits", "if", "plain"]

OVERHEAD_KEY = "overhead"
REFERENCE_KEY = "reference"
GATE_KEY = "gate"
COVERING = "covering"  # begins the source of a row that is from whole networks
# Weights of this many megabytes are streamed through the cache, and the same work done with weights that stay in it.
STREAMING_MB = (2, 4, 8, 16, 32)


def streaming_key(megabytes: int, *, cached: bool) -> str:
    """Key of the row that reads so many megabytes of weights, or does the same work with weights that stay in cache."""
    return f"weights-{megabytes}MB{'-cached' if cached else ''}"


FIXED_KEYS = (
    OVERHEAD_KEY,
    GATE_KEY,
    REFERENCE_KEY,
    *(streaming_key(megabytes, cached=cached) for megabytes in STREAMING_MB for cached in (False, True)),
)

LARGEST_MS = 1e9  # eleven days: no run of a network
_LINE = re.compile(r'\{"check":"([0-9a-f]{16})","row":(.*)\}', re.DOTALL)


@dataclass(frozen=True, slots=True)
class MeasuredNetwork:
    """A whole network as it was measured.

    `form`: `logits` computes every exit, `if` leaves at exits (measured with thresholds that no image reaches, so the
    whole network runs), `plain` has only the head. Thresholds of the candidate are unset: they do not matter here.
    """

    candidate: Candidate
    form: NetworkForm
    measurement: Measurement

    def __post_init__(self) -> None:
        expected = network_key(self.candidate, self.form)
        if self.measurement.key != expected:
            raise RecordError(
                f"measured network: key {self.measurement.key!r} is not that of its candidate, {expected!r}"
            )


def network_key(candidate: Candidate, form: NetworkForm) -> str:
    """Readable key of a measured network: architecture, precision and form; thresholds do not enter."""
    return f"{candidate.with_thresholds((None,) * len(candidate.exits)).id}|{form}"


def line_of(value: Measurement | MeasuredNetwork, state: str) -> dict[str, Any]:
    """What is appended for a row or a network of a device state (its fingerprint), as plain JSON types."""
    plain = to_plain(value)
    measurement = plain["measurement"] if isinstance(value, MeasuredNetwork) else plain
    for name in ("energy_mj", "energy_std_mj", "transfer_ms"):  # without a sensor lines stay as they have always been
        if measurement.get(name) is None:
            measurement.pop(name, None)
    return {"check": _check_of(canonical_json(plain), state), "row": plain}


def content_of(line: str, where: str, state: str) -> tuple[Any, bool]:
    """Content of a line, and whether it is as it was measured (False: changed by hand, or in another state).

    Args:
        line: without its newline.
        where: file and line number, the beginning of every message.
        state: fingerprint of the device state that the table holds for.

    Raises:
        RecordError: the line is damaged.
    """
    match = _LINE.fullmatch(line)
    if match is not None:
        # Until 2026-11-20 the check was of the row alone.
        return parse_json(match[2], where), match[1] in (_check_of(match[2], state), _sha256(match[2]))
    outer = parse_json(line, where)
    if not isinstance(outer, dict) or set(outer) != {"check", "row"}:
        raise RecordError(f"{where}: expected the fields check and row; remove the line or restore the file")
    return outer["row"], False


def row_of(data: Any, where: str) -> Measurement:
    """A row or overhead from the content of a line.

    Raises:
        RecordError: it does not fit or is impossible; the message begins with `where`.
    """
    measurement = _measurement_of(data, where)
    try:
        check_row(measurement)
    except RecordError as e:
        raise RecordError(f"{where}: {e}") from e
    return measurement


def network_of(data: Any, where: str) -> MeasuredNetwork:
    """A measured network from the content of a line.

    Raises:
        RecordError: it does not fit or is impossible; the message begins with `where`.
    """
    if not isinstance(data, dict) or set(data) != {"candidate", "form", "measurement"}:
        raise RecordError(f"{where}: expected the fields candidate, form and measurement")
    samples = _take_samples(data["measurement"], f"{where}.measurement")
    network = from_plain(MeasuredNetwork, data, where)
    network = replace(network, measurement=_with_samples(network.measurement, samples, where))
    try:
        check_network(network)
    except RecordError as e:
        raise RecordError(f"{where}: {e}") from e
    return network


def _measurement_of(data: Any, where: str) -> Measurement:
    samples = _take_samples(data, where)
    return _with_samples(from_plain(Measurement, data, where), samples, where)


def _take_samples(data: Any, where: str) -> tuple[tuple[float, ...], ...]:
    """Samples of a measurement, taken out of `data`: hundreds of numbers, too many for the general reader."""
    if not isinstance(data, dict):
        raise RecordError(f"{where}: expected a mapping with the fields of Measurement")
    data.setdefault("protocol", 1)  # lines had no number until there were two protocols
    rounds = data.get("rounds_ms")
    if not isinstance(rounds, list):
        return ()
    for i, samples in enumerate(rounds):
        if not isinstance(samples, list) or not all(type(s) in (float, int) for s in samples):
            raise RecordError(f"{where}.rounds_ms[{i}]: expected a list of numbers")
        if samples and not (min(samples) >= 0 and max(samples) < LARGEST_MS):
            raise RecordError(f"{where}.rounds_ms[{i}]: samples must be times of less than {LARGEST_MS:g} ms")
    data["rounds_ms"] = [[]] * len(rounds)
    return tuple(tuple(map(float, samples)) for samples in rounds)


def _with_samples(m: Measurement, samples: tuple[tuple[float, ...], ...], where: str) -> Measurement:
    try:
        return replace(m, rounds_ms=samples)
    except RecordError as e:
        raise RecordError(f"{where}: {e}") from e


def check_row(m: Measurement) -> None:
    """Raises RecordError when a row or overhead is impossible."""
    if m.kind == "overhead":
        if m.key not in FIXED_KEYS:
            raise RecordError(f"overhead {m.key!r} is unknown; known: {', '.join(FIXED_KEYS)}")
        _check_value(m, None)
        return
    if m.kind != "row":
        raise RecordError(f"{m.key}: a {m.kind} does not belong into rows.jsonl")
    layer: LayerSpec = layer_of_key(m.key)
    if m.precision != layer.precision:
        raise RecordError(f"{m.key}: precision {m.precision!r} is not that of the key, {layer.precision!r}")
    _check_value(m, layer.macs)


def check_network(network: MeasuredNetwork) -> None:
    """Raises RecordError when a measured network is impossible."""
    m = network.measurement
    if m.kind != "network":
        raise RecordError(f"{m.key}: a {m.kind} does not belong into networks.jsonl")
    if m.precision != network.candidate.precision_label:
        raise RecordError(
            f"{m.key}: precision {m.precision!r} is not that of the candidate, {network.candidate.precision_label!r}"
        )
    _check_value(m, total_macs(network.candidate))


def _check_value(m: Measurement, macs: int | None) -> None:
    if m.sequence < 1:
        raise RecordError(f"{m.key}: sequence must be at least 1, got {m.sequence}")
    if m.latency_ms is None:
        return
    reason = implausible(m.latency_ms, macs)
    if reason is not None:
        raise RecordError(f"{m.key}: {reason}")
    if not all(0 < s < LARGEST_MS for s in m.session_ms):
        raise RecordError(f"{m.key}: session_ms must be times of less than {LARGEST_MS:g} ms, got {list(m.session_ms)}")
    samples = [s for r in m.rounds_ms for s in r]
    if samples and not min(samples) * 0.999 <= m.latency_ms <= max(samples) * 1.001:
        raise RecordError(
            f"{m.key}: latency {m.latency_ms:g} ms lies outside its own samples"
            f" ({min(samples):g} to {max(samples):g} ms); was the unit changed?"
        )


def _check_of(text: str, state: str) -> str:
    return _sha256(f"{state} {text}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
