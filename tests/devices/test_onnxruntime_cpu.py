"""The host CPU through ONNX Runtime: what the contract of devices does not say."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from nas.core.errors import DeviceError, RecordError
from nas.core.records import Measurement
from nas.devices import onnxruntime_cpu
from nas.devices.base import MeasureJob
from nas.devices.graphs import identity_model, overhead_job, reference_job, reference_model
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu, bound_run, op_counts, waiting_option
from nas.devices.protocol import ProtocolSettings, Run, network_value
from nas.testing import mean_model, requires_path

QUICK = ProtocolSettings(network_rounds=2, network_sessions=2, network_round_ms=0.5, row_rounds=2, retries=0, wait_ms=0)


@pytest.fixture(scope="module")
def device() -> OnnxRuntimeCpu:
    return OnnxRuntimeCpu(QUICK)


def model(
    nodes: list[object], inputs: list[object], outputs: list[object], weights: list[object] | None = None
) -> bytes:
    graph = helper.make_graph(nodes, "test", inputs, outputs, weights or [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


def measured(session_ms: Sequence[float]) -> Measurement:
    values = tuple(float(ms) for ms in session_ms)
    latency_ms = network_value(values)
    return Measurement("n", "network", "fp32", latency_ms, ((latency_ms,),), (True,), "wall", "", 1, session_ms=values)


def info(name: str, kind: int, shape: list[int | str]) -> object:
    return helper.make_tensor_value_info(name, kind, shape)


def doubled(kind: int, shape: list[int | str]) -> bytes:
    node = helper.make_node("Add", ["x", "x"], ["y"], name="add")
    return model([node], [info("x", kind, shape)], [info("y", kind, shape)])


def gated(threshold: float) -> bytes:
    """A model with an optional scalar input, as exit thresholds are."""
    weights = [helper.make_tensor("threshold", TensorProto.FLOAT, [], [threshold])]
    node = helper.make_node("Mul", ["x", "threshold"], ["y"], name="mul")
    inputs = [info("x", TensorProto.FLOAT, [1, 3, 4, 4]), info("threshold", TensorProto.FLOAT, [])]
    return model([node], inputs, [info("y", TensorProto.FLOAT, [1, 3, 4, 4])], weights)


def test_rows_have_one_session_and_networks_several(device: OnnxRuntimeCpu) -> None:
    row, network = device.measure(
        [MeasureJob("r", "row", "fp32", mean_model(), 1), MeasureJob("n", "network", "fp32", mean_model(), 1)]
    )
    assert len(row.session_ms) == 1
    assert len(network.session_ms) >= QUICK.network_sessions
    assert len(network.rounds_ms) == len(network.session_ms) * QUICK.network_rounds
    assert network.latency_ms == pytest.approx(np.quantile(network.session_ms, 0.25))
    assert row.clock == "thread_cpu"


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_cpu"), (2, "wall")])
def test_several_threads_are_timed_by_the_wall_clock(threads: int, clock: str) -> None:
    device = OnnxRuntimeCpu(QUICK, threads=threads)
    results = device.measure([overhead_job(), MeasureJob("r", "row", "fp32", mean_model(), 1)])
    assert {m.clock for m in results} == {clock}
    assert device.profile.threads == threads


def test_the_reference_network_and_every_job_run_with_the_threads_of_the_device() -> None:
    def threads_of_process() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    requires_path(Path("/proc/self/task"), "the list of a process's threads")
    gc.collect()  # sessions of other tests that wait for it would end their threads in between
    before = threads_of_process()
    run = bound_run(reference_model(), {}, 3)
    assert threads_of_process() == before + 2  # the calling thread is the third
    del run
    device = OnnxRuntimeCpu(QUICK, threads=3)
    counts: list[int] = []
    job = MeasureJob("r", "row", "fp32", mean_model(), 1)
    device.measure([job, replace(job, key="s")], progress=lambda _: counts.append(threads_of_process()))
    del counts[-1]  # all is done
    assert set(counts) == {before + 3 * 2 + 1}  # the reference network and two rows; the watchdog


@pytest.mark.parametrize(
    ("version", "option"),
    [
        ("1.22.0", ("session.force_spinning_stop", "1")),
        ("1.26.0.dev1", ("session.intra_op.spin_duration_us", "200")),
        ("1.31.1", ("session.intra_op.spin_duration_us", "200")),
        ("2.0", ("session.intra_op.spin_duration_us", "200")),
    ],
)
def test_idle_workers_do_not_spin_for_long_in_any_version_of_the_runtime(version: str, option: tuple[str, str]) -> None:
    assert waiting_option(version) == option


def test_answers_take_one_thread_whatever_the_device_has() -> None:
    images = np.random.default_rng(0).uniform(0, 255, (3, 48, 16, 16)).astype(np.float32)
    one, three = (OnnxRuntimeCpu(QUICK, threads=n).run(reference_model(), images)[0] for n in (1, 3))
    assert np.array_equal(one, three)


@pytest.mark.parametrize(("agreement", "agreeing", "sessions"), [(1e9, 2, 2), (1e9, 3, 3), (-1.0, 2, 5)])
def test_a_network_gets_sessions_until_the_fastest_agree_or_there_were_enough(
    agreement: float, agreeing: int, sessions: int
) -> None:
    settings = replace(QUICK, agreement=agreement, agreeing_sessions=agreeing, most_network_sessions=5)
    shares: list[float] = []
    m = OnnxRuntimeCpu(settings).measure([MeasureJob("n", "network", "fp32", mean_model(), 1)], progress=shares.append)[
        0
    ]
    assert len(m.session_ms) == sessions
    assert shares == sorted(shares) and shares[-1] == 1.0
    # Told after every round, also of the sessions that nobody planned: a search may be stopped there. Not done before.
    assert len(shares) == sessions * settings.network_rounds + 1 and shares[-2] < 1.0


def test_sequence_rises_over_calls(device: OnnxRuntimeCpu) -> None:
    numbers = [m.sequence for _ in range(2) for m in device.measure([overhead_job(), reference_job()])]
    assert numbers == sorted(set(numbers))


def test_quantized_boundaries_can_be_measured(device: OnnxRuntimeCpu) -> None:
    node = helper.make_node("MaxPool", ["x"], ["y"], name="pool", kernel_shape=[1, 1])
    shape: list[int | str] = [1, 3, 4, 4]
    uint8 = model([node], [info("x", TensorProto.UINT8, shape)], [info("y", TensorProto.UINT8, shape)])
    assert device.measure([MeasureJob("x", "row", "int8", uint8, 1)])[0].error is None


def test_a_dynamic_batch_is_measured_at_one_and_other_dynamic_sizes_are_refused(device: OnnxRuntimeCpu) -> None:
    free_batch, free_size = device.measure(
        [
            MeasureJob("batch", "network", "fp32", mean_model(None), 1),
            MeasureJob("size", "network", "fp32", doubled(TensorProto.FLOAT, [1, 3, "H", "W"]), 1),
        ]
    )
    assert free_batch.error is None
    assert "input 'x' has the dynamic shape [1, 3, 'H', 'W']; only the batch may be dynamic" in (free_size.error or "")


def test_feeds_replace_inputs_and_optional_inputs(device: OnnxRuntimeCpu) -> None:
    feeds = {"x": np.ones((1, 3, 4, 4), np.float32), "threshold": np.array(2.0, np.float32)}
    assert device.measure([MeasureJob("x", "network", "fp32", gated(0.5), 1, feeds)])[0].error is None


def test_feeds_that_do_not_fit_are_refused_with_what_fits() -> None:
    with pytest.raises(DeviceError, match="no input 'thresh' in the model; inputs: x, threshold"):
        bound_run(gated(0.5), {"thresh": np.zeros(1)})
    with pytest.raises(DeviceError, match=r"input 'x' takes \[1, 3, 4, 4\], got \[1, 3, 5, 5\]"):
        bound_run(gated(0.5), {"x": np.zeros((1, 3, 5, 5))})


def test_run_takes_scalar_outputs_of_single_images(device: OnnxRuntimeCpu) -> None:
    node = helper.make_node("ReduceMax", ["x"], ["y"], name="max", keepdims=0)
    scalar = model([node], [info("x", TensorProto.FLOAT, [1, 3, 2, 2])], [info("y", TensorProto.FLOAT, [])])
    images = np.arange(36, dtype=np.float32).reshape(3, 3, 2, 2)
    assert device.run(scalar, images)[0].tolist() == [11.0, 23.0, 35.0]


def test_run_without_images_is_refused(device: OnnxRuntimeCpu) -> None:
    with pytest.raises(DeviceError, match="no images"):
        device.run(mean_model(), np.zeros((0, 3, 8, 8), np.float32))


def test_op_counts_are_those_of_the_optimised_graph() -> None:
    counts = op_counts(reference_model())
    assert counts["Conv"] == 10
    assert "HardSwish" not in counts  # fused into its convolution
    assert op_counts(identity_model()) == {"Identity": 1}


def test_op_counts_look_into_branches() -> None:
    shape: list[int | str] = [1, 3, 4, 4]

    def branch(op: str) -> object:
        return helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [info(op, TensorProto.FLOAT, shape)])

    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("Sin"), else_branch=branch("Cos"))
    inputs = [info("x", TensorProto.FLOAT, shape), info("c", TensorProto.BOOL, [])]
    counts = op_counts(model([node], inputs, [info("y", TensorProto.FLOAT, shape)]))
    assert counts == {"Cos": 1, "If": 1, "Sin": 1}


def test_op_counts_of_a_broken_model_are_an_error() -> None:
    with pytest.raises(DeviceError, match=r"ONNX Runtime .* cannot optimise the model: InvalidProtobuf"):
        op_counts(b"\x00not onnx")


def test_a_reference_from_a_faster_state_flags_every_round() -> None:
    slow = OnnxRuntimeCpu(QUICK)
    slow.expect_reference(1e-4)
    result = slow.measure([overhead_job()])[0]
    assert result.latency_ms is not None
    assert not result.is_stable
    assert slow.calm(2).rejected == 2


def test_a_long_list_is_measured_in_groups_of_bounded_size() -> None:
    small = OnnxRuntimeCpu(ProtocolSettings(row_rounds=1, rows_alive=2, retries=0, wait_ms=0))
    seen: list[Measurement] = []
    after: list[int] = []
    jobs = [MeasureJob(f"r{i}", "row", "fp32", mean_model(), 1) for i in range(5)]
    small.measure(jobs, on_result=seen.append, progress=lambda _: after.append(len(seen)))
    assert [m.key for m in seen] == ["r0", "r1", "r2", "r3", "r4"]
    assert after == [0, 0, 2, 2, 4, 5]  # results come after each group, not at the end


def test_sessions_are_closed_before_the_next_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups in memory at once make one another slower, the longer the measuring takes the more."""
    opened: list[weakref.ref[object]] = []
    alive: list[int] = []
    make = onnxruntime_cpu._session

    def watched(model: bytes, threads: int = 1) -> object:
        alive.append(sum(session() is not None for session in opened))
        session = make(model, threads)
        opened.append(weakref.ref(session))
        return session

    device = OnnxRuntimeCpu(replace(QUICK, networks_alive=2, network_sessions=2, most_network_sessions=2))
    device.calm(1)
    monkeypatch.setattr(onnxruntime_cpu, "_session", watched)
    device.measure([MeasureJob(f"n{i}", "network", "fp32", mean_model(), 1) for i in range(5)])
    assert alive == [0, 1, 0, 1, 0] * 2


def test_every_network_has_a_session_before_one_has_its_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What disturbs a host for a minute then meets some sessions of all networks, and not all sessions of some."""
    opened: list[int] = []

    def watched(model: bytes, feeds: Mapping[str, NDArray[np.generic]], threads: int = 1) -> Run:
        if model in models:
            opened.append(models.index(model))
        return bound_run(model, feeds, threads)

    models = [doubled(TensorProto.FLOAT, [1, 3, 10**i, 1]) for i in range(3)]
    monkeypatch.setattr("nas.devices.onnxruntime_cpu.bound_run", watched)
    settings = replace(QUICK, networks_alive=2, network_sessions=3, most_network_sessions=3)
    jobs = [MeasureJob(f"n{i}", "network", "fp32", m, 1) for i, m in enumerate(models)]
    assert [m.key for m in OnnxRuntimeCpu(settings).measure(jobs)] == ["n0", "n1", "n2"]
    assert opened == [0, 1, 2] * 3


def test_the_reference_network_does_not_change() -> None:
    graph = ModelProto.FromString(reference_model()).graph
    assert [n.op_type for n in graph.node].count("Conv") == 10
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 48, 16, 16]


def test_jobs_are_checked() -> None:
    with pytest.raises(RecordError, match="needs a key"):
        MeasureJob("", "row", "fp32", b"", 1)
    with pytest.raises(RecordError, match="macs must not be negative, got -1"):
        MeasureJob("x", "row", "fp32", b"", -1)


def test_the_deviation_of_a_latency_is_what_its_quartile_varies_by_when_it_is_measured_again() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 15):
        values = [measured(rng.normal(1.0, 0.02, count)) for _ in range(2000)]
        spread = np.std([m.latency_ms for m in values])
        assert np.mean([m.std_ms for m in values]) == pytest.approx(spread, rel=0.2)
    one = measured([1.0])
    assert (one.latency_ms, one.std_ms) == (1.0, 0.0)
    disturbed = measured([1.0, 1.01, 1.02, 9.0])
    assert disturbed.std_ms < 0.02


def test_the_runtime_notes_nothing_in_the_home_of_its_user(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    subprocess.run([sys.executable, "-c", "import nas.devices.onnxruntime_cpu"], check=True, env=environment)
    assert list(tmp_path.rglob("*")) == []
