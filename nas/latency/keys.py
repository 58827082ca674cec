"""Row keys read back: what a key of a latency row says about its layer, and which latencies are possible at all."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from nas.core.errors import RecordError
from nas.core.jsonio import from_plain
from nas.core.records import KEY_NAMES, LayerSpec

_KINDS = {name: kind for kind, name in KEY_NAMES.items()}
_SHAPE = re.compile(r"(\d{1,9})x(\d{1,9})x(\d{1,9})")
_FORM = "a row key looks like ir|in=24x16x16|out=24x16x16|k=3|s=1|e=72|se=0|act=relu|fp32"

# A result outside these bounds has a wrong unit or a wrong decimal point, on every device this project knows: nothing
# starts in under 0.1 us, no device does more than 5e12 multiply-adds per second in a layer of a small network, and none
# fewer than 5e7 once 2 ms have passed.
MIN_MS = 1e-4
MAX_MACS_PER_MS = 5e9
MIN_MACS_PER_MS = 5e4
SLACK_MS = 2.0


@lru_cache(maxsize=65536)
def layer_of_key(key: str) -> LayerSpec:
    """The layer that a row key describes; its `key` is the same text again.

    Raises:
        RecordError: a text that no layer has as its key.
    """
    parts = key.split("|")
    if len(parts) < 4 or parts[0] not in _KINDS:
        raise RecordError(f"{key!r} is not a row key; {_FORM}")
    values = dict(part.partition("=")[::2] for part in parts[1:-1])
    plain: dict[str, Any] = {
        "kind": _KINDS[parts[0]],
        "precision": parts[-1],
        "activation": values.get("act", ""),
        "use_se": values.get("se") == "1",
    }
    for end, name in (("in", "in"), ("out", "out")):
        shape = _SHAPE.fullmatch(values.get(end, ""))
        if shape is None or shape[2] != shape[3]:
            raise RecordError(f"{key!r}: {end}={values.get(end, '')!r} is not channels x size x size; {_FORM}")
        plain[f"{name}_channels"], plain[f"{name}_size"] = int(shape[1]), int(shape[2])
    for letter, name, default in (
        ("k", "kernel_size", 1),
        ("s", "stride", 1),
        ("e", "expanded_channels", 0),
        ("h", "hidden_channels", 0),
    ):
        text = values.get(letter, str(default))
        if not re.fullmatch(r"\d{1,9}", text):
            raise RecordError(f"{key!r}: {letter}={text!r} is not a whole number; {_FORM}")
        plain[name] = int(text)
    layer = from_plain(LayerSpec, plain, repr(key))
    if layer.key != key:
        raise RecordError(f"{key!r} is not a row key; the closest one is {layer.key!r}")
    return layer


def implausible(latency_ms: float, macs: int | None) -> str | None:
    """Why a latency cannot be right, or None.

    Args:
        latency_ms: the value.
        macs: multiply-adds of what was measured; None where they are not known.
    """
    if latency_ms < MIN_MS:
        return f"{latency_ms:g} ms is shorter than any call ({MIN_MS:g} ms); are these seconds?"
    if macs is None:
        return None
    if latency_ms * MAX_MACS_PER_MS < macs:
        return f"{latency_ms:g} ms is too short for {macs} multiply-adds; are these seconds?"
    if latency_ms > SLACK_MS + macs / MIN_MACS_PER_MS:
        return f"{latency_ms:g} ms is too long for {macs} multiply-adds; are these microseconds?"
    return None
