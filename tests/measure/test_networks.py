"""Whole networks as evidence, and any other model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, Measurement, StageConfig, StemConfig
from nas.core.walk import expand, total_macs
from nas.devices.base import MeasureJob, OnProgress, OnResult
from nas.devices.graphs import reference_job
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu, op_counts, run_model
from nas.devices.protocol import ProtocolSettings
from nas.latency.estimate import Estimator
from nas.latency.fitting import fit_correction
from nas.latency.lines import NetworkForm
from nas.latency.table import LatencyTable
from nas.measure.fill import fill
from nas.measure.networks import (
    NetworkProgress,
    measure_model,
    measure_networks,
    network_bytes,
    network_job,
)
from nas.testing import SimulatedDevice, mean_model

QUICK = ProtocolSettings(network_rounds=1, network_sessions=1, network_round_ms=0.2, retries=0, wait_ms=0)


def small(width: int = 16, threshold: float | None = 0.7) -> Candidate:
    stages = (
        StageConfig((BlockConfig(8, 16, width, stride=2),)),
        StageConfig((BlockConfig(width, 32, 24, stride=2, use_se=True, activation="hard_swish"),)),
    )
    return Candidate(32, 4, StemConfig(8), stages, HeadConfig(), exits=(ExitConfig(0, threshold=threshold),))


def opened(folder: Path) -> LatencyTable:
    return LatencyTable.open(folder, SimulatedDevice().profile)


def test_networks_are_measured_once_and_stored_with_their_architecture(tmp_path: Path) -> None:
    candidates = [small(), small(24).with_precision("int8"), small(threshold=0.2)]
    told: list[NetworkProgress] = []
    first = measure_networks(opened(tmp_path), SimulatedDevice(), candidates, progress=told.append)
    assert first[0] == first[2]  # thresholds do not matter
    assert [(p.done, p.total) for p in told] == [(1, 2), (2, 2)]
    assert [n.candidate for n in opened(tmp_path).networks.values()] == [
        small(threshold=None),
        small(24, None).with_precision("int8"),
    ]
    told.clear()
    assert measure_networks(opened(tmp_path), SimulatedDevice(), candidates, progress=told.append) == first
    assert told == []
    again = measure_networks(opened(tmp_path), SimulatedDevice(), candidates, again=True)
    assert [m.sequence > f.sequence for m, f in zip(again, first, strict=True)] == [True] * 3


def test_what_another_process_measured_meanwhile_is_not_repeated(tmp_path: Path) -> None:
    waiting = opened(tmp_path)
    first = measure_networks(opened(tmp_path), SimulatedDevice(), [small()])
    told: list[NetworkProgress] = []
    assert measure_networks(waiting, SimulatedDevice(), [small(), small(24)], progress=told.append)[:1] == first
    assert [(p.done, p.total) for p in told] == [(1, 1)]


def test_networks_of_a_busy_machine_are_measured_again_when_it_is_quiet(tmp_path: Path) -> None:
    def look(value: float) -> None:
        table = opened(tmp_path)
        reference = SimulatedDevice().measure([reference_job()])[0]
        table.add(replace(reference, latency_ms=value, rounds_ms=((value,),) * 3))

    look(0.4)
    job = network_job(small(), "logits", network_bytes(small()))
    busy = opened(tmp_path).add(SimulatedDevice().measure([job])[0], small(), "logits")
    assert measure_networks(opened(tmp_path), SimulatedDevice(), [small()]) == [busy]
    look(0.303)
    quiet = measure_networks(opened(tmp_path), SimulatedDevice(), [small()])
    assert quiet[0].sequence > busy.sequence
    assert measure_networks(opened(tmp_path), SimulatedDevice(), [small()]) == quiet


def test_as_many_networks_are_measured_together_as_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(SimulatedDevice):
        groups: ClassVar[list[int]] = []

        def measure(
            self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
        ) -> list[Measurement]:
            if jobs[0].kind == "network":
                self.groups.append(len(jobs))
            return super().measure(jobs, on_result, progress)

    candidates = [small(w) for w in (8, 16, 24, 32, 40)]
    size = len(network_bytes(candidates[-1]))
    monkeypatch.setattr("nas.measure.networks.BYTES_AT_A_TIME", 2 * size)
    monkeypatch.setattr("nas.measure.networks.NETWORKS_AT_A_TIME", 3)
    told: list[NetworkProgress] = []
    measure_networks(
        opened(tmp_path), Watched(), candidates, write=lambda *_: network_bytes(candidates[-1]), progress=told.append
    )
    assert Watched.groups == [2, 2, 1]
    assert [(p.done, p.total) for p in told] == [(n, 5) for n in range(1, 6)]
    measure_networks(opened(tmp_path), Watched(), candidates, write=lambda *_: mean_model(), again=True)
    assert Watched.groups == [2, 2, 1, 3, 2]


def test_a_network_that_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    def write(candidate: Candidate, form: NetworkForm) -> bytes:
        return network_bytes(candidate, form) if candidate.stages[0].blocks[0].out_channels == 16 else b"\x00"

    good, bad = measure_networks(opened(tmp_path), SimulatedDevice(), [small(), small(24)], write=write)
    assert good.error is None
    assert bad.latency_ms is None and "not an ONNX model" in (bad.error or "")


def test_measured_networks_correct_the_estimate(tmp_path: Path) -> None:
    candidates = [small(w) for w in (8, 16, 24, 32, 40, 48)]
    table, device = opened(tmp_path), SimulatedDevice(network_factor=1.2)
    fill(table, device, [x for c in candidates for x in expand(c)])
    measure_networks(table, device, candidates[:5])
    truth = measure_networks(table, device, candidates[5:])[0].latency_ms or 0.0
    raw = Estimator(table, gated=False).estimate(candidates[5]).worst_ms
    corrected = Estimator(table, fit_correction(table, list(table.networks.values())[:5]), gated=False).estimate(
        candidates[5]
    )
    assert abs(raw / truth - 1) > 0.1
    assert abs(corrected.worst_ms / truth - 1) < 0.04


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("form", ["logits", "if", "plain"])
def test_every_form_and_precision_runs_on_the_host(precision: str, form: NetworkForm) -> None:
    candidate = small().with_precision(precision)  # type: ignore[arg-type]
    model = network_bytes(candidate, form)
    outputs = run_model(model, np.zeros((1, 3, 32, 32), np.float32))
    assert outputs[0].shape == (1, 4)
    if form == "if":
        assert outputs[1].tolist() == [1]  # no image leaves early
    if precision == "int8":
        counts = op_counts(model)
        layers = [x for x in expand(candidate) if form != "plain" or x.kind != "exit_head"]
        assert counts["QLinearConv"] == sum(len(x.convolutions) for x in layers)
        assert "Conv" not in counts and "FusedConv" not in counts


def test_any_model_can_be_measured_without_a_table() -> None:
    m = measure_model(OnnxRuntimeCpu(QUICK), "teacher", mean_model(None), {"x": np.ones((1, 3, 8, 8), np.float32)})
    assert (m.key, m.kind, m.precision, m.error) == ("teacher", "network", "none", None)


def test_jobs_know_their_multiply_adds(tmp_path: Path) -> None:
    m = measure_networks(opened(tmp_path), SimulatedDevice(noise=0.0, network_factor=1.0), [small()])[0]
    assert m.latency_ms == pytest.approx(0.003 + (total_macs(small()) + 1000) / 2e7)
