"""What tests of several packages share: a simulated device, and the contract that every device has to keep.

Simulated numbers say so (`profile.kind == "simulated"`): they are for tests of the programs around a device and never
stand in a result.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nas.core.errors import DeviceError
from nas.core.records import DeviceProfile, Measurement
from nas.devices.base import (
    GATE_KEY,
    OVERHEAD_KEY,
    REFERENCE_KEY,
    CalmReport,
    Device,
    MeasureJob,
    OnProgress,
    OnResult,
)
from nas.devices.graphs import IR_VERSION, OPSET, overhead_job, reference_job

# Multiply-adds per millisecond; about those of one thread of a server CPU.
_MACS_PER_MS = {"fp32": 2e7, "fp16": 3e7, "int8": 4e7, "mixed": 2.7e7, "none": 2e7}
_OVERHEAD_MS = 0.003
_GATE_MS = 0.002
_STREAMING_MS = 0.2
_REFERENCE_MS = 0.3


class SimulatedDevice:
    """A device whose latencies are a function of multiply-adds and key, the same on every machine.

    A row takes overhead + macs / rate, a whole network `network_factor` times that, each with a deviation of about
    `noise` that depends on the key and the seed only. Models must be readable ONNX, otherwise measuring them fails as
    on a real device. `run` really runs the model on the host.
    """

    def __init__(self, seed: int = 0, *, network_factor: float = 1.05, noise: float = 0.01) -> None:
        """`noise` is the relative standard deviation of a value."""
        self._seed = seed
        self._network_factor = network_factor
        self._noise = noise
        self._sequence = 0

    @property
    def profile(self) -> DeviceProfile:
        """A made-up device, labelled as such."""
        return DeviceProfile(
            name=f"simulated-{self._seed}",
            board="simulated",
            runtime="simulated",
            runtime_version="1",
            power_mode="none",
            clocks_locked=True,
            threads=1,
            driver=f"seed={self._seed}",
            precisions=("fp32", "int8"),
            kind="simulated",
        )

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """One measurement per job, at once; see `Device.measure`."""
        results = []
        for i, job in enumerate(jobs):
            results.append(self._measurement(job))
            if progress is not None:
                progress((i + 1) / len(jobs))
            if on_result is not None:
                on_result(results[-1])
        return results

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs of the model, really computed; see `Device.run`."""
        from nas.devices.onnxruntime_cpu import run_model

        return run_model(model, images)

    def expect_reference(self, reference_ms: float | None) -> None:
        """Ignored: this device is always in the same state."""

    def calm(self, checks: int = 20) -> CalmReport:
        """Always calm."""
        return CalmReport(checks, 0, _REFERENCE_MS, _REFERENCE_MS, _REFERENCE_MS, 1.0)

    def latency_ms(self, job: MeasureJob) -> float:
        """The latency of a job, milliseconds."""
        if job.kind == "overhead":
            fixed = {OVERHEAD_KEY: 0.0, GATE_KEY: _GATE_MS, REFERENCE_KEY: _REFERENCE_MS}
            return _OVERHEAD_MS + fixed.get(job.key, _STREAMING_MS)  # weights cost the same wherever they come from
        digest = hashlib.sha256(f"{self._seed}/{job.key}".encode()).digest()
        deviation = float(np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(0, self._noise))
        factor = 1.0 if job.kind == "row" else self._network_factor
        work = (job.macs + 1000) / _MACS_PER_MS[job.precision]
        return round(_OVERHEAD_MS + work * factor * (1 + float(np.clip(deviation, -0.5, 0.5))), 9)

    def _measurement(self, job: MeasureJob) -> Measurement:
        self._sequence += 1
        value: float | None = None
        error: str | None = None
        try:
            onnx.load_model_from_string(job.model)
            value = self.latency_ms(job)
        except DecodeError as e:
            error = f"not an ONNX model: {e}"
        return Measurement(
            key=job.key,
            kind=job.kind,
            precision=job.precision,
            latency_ms=value,
            rounds_ms=() if value is None else ((value,) * 4,) * 3,
            accepted=() if value is None else (True,) * 3,
            clock="device_event",
            measured_at="2000-01-01T00:00:00+00:00",
            sequence=self._sequence,
            error=error,
            session_ms=() if value is None else (value,),
        )


def requires_path(path: Path, what: str) -> Path:
    """`path` where it exists; otherwise the calling test is skipped, and the reason names what is missing."""
    if not path.exists():
        import pytest

        pytest.skip(f"{what} is not there: {path}")
    return path


def requires_program(name: str, what: str) -> str:
    """Path of a program; otherwise the calling test is skipped, and the reason names what is missing."""
    found = shutil.which(name)
    if found is None:
        import pytest

        pytest.skip(f"{what} needs the program {name}, which is not on PATH")
    return found


def mean_model(batch: int | None = 1, size: int = 8, factor: float = 2.0) -> bytes:
    """A tiny ONNX model: output `y` [B, 3] is factor times the mean of each channel of `x` [B, 3, size, size]."""
    rows = "N" if batch is None else batch
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat", axis=1),
        helper.make_node("Mul", ["flat", "factor"], ["y"], name="scale"),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    data: bytes = model.SerializeToString()
    return data


def _network_job(key: str, model: bytes) -> MeasureJob:
    return MeasureJob(key, "network", "fp32", model, 1000)


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def profile_names_a_folder_and_its_precisions(device: Device) -> None:
    """The profile can name a table's folder, and is the same when asked again."""
    profile = device.profile
    _expect(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", profile.name) is not None, f"name {profile.name!r}")
    _expect(len(profile.precisions) > 0, "no precision")
    _expect(profile.threads >= 1, "no thread")
    _expect(profile.fingerprint == device.profile.fingerprint, "the fingerprint changes from one call to the next")


def every_job_gives_one_measurement_in_order(device: Device) -> None:
    """Results come in the order of the jobs, each reported once, with samples that contain the value."""
    jobs = [_network_job("a", mean_model()), overhead_job(), _network_job("b", mean_model(size=16))]
    told: list[Measurement] = []
    shares: list[float] = []
    results = device.measure(jobs, told.append, shares.append)
    _expect([m.key for m in results] == [j.key for j in jobs], "keys are not those of the jobs, in order")
    _expect([m.kind for m in results] == [j.kind for j in jobs], "kinds are not those of the jobs")
    _expect(sorted(m.key for m in told) == sorted(j.key for j in jobs), "not every result was reported once")
    _expect(all(m in results for m in told), "reported results differ from returned ones")
    _expect(shares == sorted(shares) and abs(shares[-1] - 1) < 1e-9, f"progress does not rise to 1: {shares[-3:]}")
    for m in results:
        _expect(m.latency_ms is not None and m.latency_ms > 0, f"{m.key}: {m.error}")
        samples = [s for r in m.rounds_ms for s in r]
        _expect(bool(samples), f"{m.key}: no samples were kept")
        _expect(min(samples) <= (m.latency_ms or 0) <= max(samples), f"{m.key}: value outside its samples")
        _expect(len(m.accepted) == len(m.rounds_ms), f"{m.key}: flags of rounds")


def no_jobs_give_no_measurements(device: Device) -> None:
    """An empty list is no error."""
    _expect(device.measure([]) == [], "something was measured")


def a_broken_model_is_a_result_with_a_reason(device: Device) -> None:
    """A model that cannot be read fails alone; the others are measured."""
    good, bad = device.measure([_network_job("good", mean_model()), _network_job("bad", b"\x00not onnx")])
    _expect(good.error is None and good.latency_ms is not None, f"the good one failed: {good.error}")
    _expect(bad.latency_ms is None and bool(bad.error), "the broken one has a latency")
    _expect("\n" not in (bad.error or ""), "the reason is more than one line")


def work_takes_longer_than_none(device: Device) -> None:
    """The reference network takes longer than the empty graph."""
    empty, reference = device.measure([overhead_job(), reference_job()])
    _expect((reference.latency_ms or 0) > (empty.latency_ms or 0) > 0, "the empty graph is not the faster one")


def run_gives_one_row_per_image(device: Device) -> None:
    """Static and dynamic batches give the same rows, whatever the number of images."""
    images = np.random.default_rng(0).uniform(0, 255, (5, 3, 8, 8)).astype(np.float32)
    expected = 2 * images.mean((2, 3))
    for batch in (1, 2, None):
        outputs = device.run(mean_model(batch), images)
        _expect(len(outputs) == 1 and outputs[0].shape == (5, 3), f"batch {batch}: shape {outputs[0].shape}")
        _expect(bool(np.allclose(outputs[0], expected, rtol=1e-5)), f"batch {batch}: other values")


def run_refuses_what_it_cannot_run(device: Device) -> None:
    """A broken model or images of another size are a DeviceError with the runtime's reason."""
    images = np.zeros((1, 3, 8, 8), np.float32)
    for model, given in ((b"\x00not onnx", images), (mean_model(), np.zeros((1, 3, 9, 9), np.float32))):
        try:
            device.run(model, given)
        except DeviceError as e:
            _expect(len(str(e)) > 20, f"no reason: {e}")
        else:
            raise AssertionError("nothing was refused")


def calm_counts_its_checks(device: Device) -> None:
    """A calm report has as many checks as were asked for, and times that fit together."""
    report = device.calm(4)
    _expect(report.checks == 4 and 0 <= report.rejected <= 4, f"{report}")
    _expect(0 < report.best_ms <= report.median_ms <= report.worst_ms, f"{report}")
    _expect(0 <= report.rejected_share <= 1 and 0 < report.cpu_share <= 1, f"{report}")


# Every implementation of Device runs all of these: parametrise a test with them.
DEVICE_CONTRACT: tuple[Callable[[Device], None], ...] = (
    profile_names_a_folder_and_its_precisions,
    every_job_gives_one_measurement_in_order,
    no_jobs_give_no_measurements,
    a_broken_model_is_a_result_with_a_reason,
    work_takes_longer_than_none,
    run_gives_one_row_per_image,
    run_refuses_what_it_cannot_run,
    calm_counts_its_checks,
)
