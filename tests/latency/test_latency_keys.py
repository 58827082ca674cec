"""Row keys can be read back, and impossible latencies are recognised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_examples import candidate

from nas.core.errors import RecordError
from nas.core.records import LayerSpec
from nas.core.walk import expand
from nas.latency.keys import implausible, layer_of_key

KEYS = sorted({x.key for p in ("fp32", "int8") for x in expand(candidate(p))})


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_read_back(key: str) -> None:
    layer = layer_of_key(key)
    assert layer.key == key
    assert layer in [x for p in ("fp32", "int8") for x in expand(candidate(p))]


def test_the_layer_of_a_key_costs_what_the_layer_costs() -> None:
    for layer in expand(candidate("int8")):
        again: LayerSpec = layer_of_key(layer.key)
        assert (again.macs, again.params, again.weight_bytes) == (layer.macs, layer.params, layer.weight_bytes)


@pytest.mark.parametrize(("precision", "each"), [("fp32", 4), ("int8", 1)])
def test_feature_maps_are_those_that_the_convolutions_write(precision: str, each: int) -> None:
    layer = layer_of_key(f"ir|in=8x8x8|out=12x4x4|k=3|s=2|e=16|se=0|act=relu|{precision}")
    assert layer.feature_bytes == each * (16 * 8 * 8 + 16 * 4 * 4 + 12 * 4 * 4)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "is not a row key; a row key looks like ir"),
        ("conv|in=3x8x8|out=8x8x8|relu", "is not a row key"),
        ("stem|in=3x8x9|out=8x4x4|k=3|s=2|act=relu|fp32", "in='3x8x9' is not channels x size x size"),
        ("stem|in=3x8x8|out=8x4x4|k=x|s=2|act=relu|fp32", "k='x' is not a whole number"),
        ("stem|in=3x8x8|out=8x4x4|k=3|s=2|act=rellu|fp32", "'rellu' is not allowed.*did you mean 'relu'"),
        ("stem|in=3x8x8|out=8x4x4|k=3|s=2|act=relu|fp64", "'fp64' is not allowed"),
        ("stem|in=3x8x8|k=3|out=8x4x4|s=2|act=relu|fp32", "the closest one is 'stem.in=3x8x8.out"),
    ],
)
def test_other_texts_are_refused(key: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        layer_of_key(key)


@given(st.text(max_size=60))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    try:
        layer = layer_of_key(text)
    except RecordError:
        return
    assert layer.key == text


@pytest.mark.parametrize(
    ("latency_ms", "macs", "message"),
    [
        (0.02, 400_000, None),
        (0.02, None, None),
        (30.0, 300_000_000, None),
        (0.00002, 400_000, "seconds"),
        (0.0002, 40_000_000, "seconds"),
        (2000.0, 400_000, "microseconds"),
    ],
)
def test_units_are_recognised_by_multiply_adds(latency_ms: float, macs: int | None, message: str | None) -> None:
    reason = implausible(latency_ms, macs)
    assert (reason is None) if message is None else (reason is not None and message in reason)
