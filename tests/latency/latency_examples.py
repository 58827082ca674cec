"""Small networks, rows and tables for the tests of the latency package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nas.core.records import (
    BlockConfig,
    Candidate,
    DeviceProfile,
    ExitConfig,
    HeadConfig,
    LayerSpec,
    Measurement,
    Precision,
    StageConfig,
    StemConfig,
)
from nas.core.walk import expand
from nas.latency.lines import NetworkForm, network_key, streaming_key
from nas.latency.table import LatencyTable

OVERHEAD_MS = 0.003
GATE_MS = 0.002


def profile(**changes: object) -> DeviceProfile:
    fields: dict[str, object] = {
        "name": "test-board_ort1_1t",
        "board": "test board",
        "runtime": "ort",
        "runtime_version": "1.0",
        "power_mode": "governor=host",
        "clocks_locked": False,
        "threads": 1,
        "driver": "avx2",
        "precisions": ("fp32", "int8"),
        "kind": "measured",
    }
    return DeviceProfile(**{**fields, **changes})  # type: ignore[arg-type]


def candidate(
    precision: Precision | tuple[Precision, ...] = "fp32", *, exits: bool = True, width: int = 24, depth: int = 2
) -> Candidate:
    """Two stages at 32 px, an exit after the first."""
    first = tuple(BlockConfig(16 if i == 0 else width, 64, width, stride=2 if i == 0 else 1) for i in range(depth))
    second = (BlockConfig(width, 96, 40, kernel_size=5, stride=2, use_se=True, activation="hard_swish"),)
    made = Candidate(
        resolution=32,
        num_classes=10,
        stem=StemConfig(16),
        stages=(StageConfig(first), StageConfig(second)),
        head=HeadConfig(conv_channels=96),
        exits=(ExitConfig(0, threshold=0.9),) if exits else (),
    )
    return made.with_precision(precision)


def row_time_ms(layer: LayerSpec) -> float:
    """A made-up latency of a row, overhead included: some multiply-adds per ms, fewer in fp32."""
    return OVERHEAD_MS + 0.002 + layer.macs / (4e7 if layer.precision == "int8" else 2e7)


def measured(
    key: str,
    kind: str,
    precision: str,
    latency_ms: float | None,
    *,
    stable: bool = True,
    error: str | None = None,
    sequence: int = 1,
) -> Measurement:
    rounds = () if latency_ms is None else ((latency_ms, latency_ms * 1.01),) * 3
    return Measurement(
        key=key,
        kind=kind,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        latency_ms=latency_ms,
        rounds_ms=rounds,
        accepted=(stable,) * len(rounds),
        clock="thread_cpu",
        measured_at="2026-01-01T00:00:00+00:00",
        sequence=sequence,
        error=error,
    )


def row(layer: LayerSpec, latency_ms: float | None = None, *, stable: bool = True) -> Measurement:
    return measured(
        layer.key, "row", layer.precision, row_time_ms(layer) if latency_ms is None else latency_ms, stable=stable
    )


def network(c: Candidate, latency_ms: float, form: NetworkForm = "if", *, stable: bool = True) -> Measurement:
    return measured(network_key(c, form), "network", c.precision_label, latency_ms, stable=stable)


def sum_ms(c: Candidate, *, gated: bool = True) -> float:
    """The plain estimate of a candidate from made-up rows."""
    gates = len(c.exits) if gated else 0
    return OVERHEAD_MS + sum(row_time_ms(x) - OVERHEAD_MS for x in expand(c)) + gates * GATE_MS


def filled(folder: Path, candidates: Iterable[Candidate], **changes: object) -> LatencyTable:
    """A table with the overhead and all rows of these candidates; `changes` of the device's state."""
    table = LatencyTable.open(folder, profile(**changes))
    with table.writing():
        table.add(measured("overhead", "overhead", "none", OVERHEAD_MS))
        table.add(measured("gate", "overhead", "none", OVERHEAD_MS + GATE_MS))
        for layer in dict.fromkeys(x for c in candidates for x in expand(c)):
            table.add(row(layer))
    return table


def add_streaming(table: LatencyTable, megabytes: int, cost_ms: float) -> None:
    """So many megabytes of weights cost so much when they do not stay in the cache."""
    table.add(measured(streaming_key(megabytes, cached=True), "overhead", "fp32", 1.0))
    table.add(measured(streaming_key(megabytes, cached=False), "overhead", "fp32", 1.0 + cost_ms))
