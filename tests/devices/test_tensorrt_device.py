"""The GPU of a machine as a Device: the contract, over a runner whose engines are ONNX Runtime's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_board.tools import install_trtexec

from nas.core.errors import DeviceError
from nas.devices import open_device
from nas.devices.base import Device, LayerTime, MeasureJob, StreamJob
from nas.devices.board.errors import BoardError
from nas.devices.board.trt_engine import TensorRtRunner
from nas.devices.board.trtexec import TrtexecRunner
from nas.devices.tensorrt import TensorRt, TensorRtSettings, find_runner
from nas.measure.stream import stream_timer
from nas.testing import DEVICE_CONTRACT, exits_chain, mean_model

QUICK = TensorRtSettings(rounds=2, runs=6, warmup_runs=1)


class CpuSession:
    """An engine that runs on the processor, with the interface of a runner's session."""

    def __init__(self, path: str, options: dict[str, Any], runner: CpuRunner) -> None:
        try:
            self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise BoardError("build_failed", f"building {Path(path).name}: {e}") from e
        self.options = options
        self.warnings = list(runner.warnings)
        self._runner = runner
        self._feeds = {
            entry.name: np.random.default_rng(options["seed"]).random(entry.shape).astype(np.float32)
            for entry in self._session.get_inputs()
        }
        runner.alive += 1

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": e.name, "dtype": "float32", "shape": e.shape} for e in self._session.get_inputs()]

    def set_inputs(self, feeds: dict[str, bytes]) -> None:
        for name, data in feeds.items():
            if name not in self._feeds:
                raise BoardError("bad_request", f"no input {name!r}")
            self._feeds[name] = np.frombuffer(data, np.float32).reshape(self._feeds[name].shape)

    def time(self, runs: int, warmup: int = 0) -> dict[str, Any]:
        samples = []
        for _ in range(warmup + runs):
            began = time.perf_counter()
            self._session.run(None, self._feeds)
            samples.append(1e3 * (time.perf_counter() - began))
        told = {"clock": "cuda_event", "cuda_graph": True, "enqueue_bound": self._runner.is_bound}
        return {"samples_ms": self._runner.samples or samples[warmup:], "host_ms": samples[warmup:], **told}

    def outputs(self) -> list[dict[str, Any]]:
        values = self._session.run(None, self._feeds)
        entries = self._session.get_outputs()
        return [
            {"name": e.name, "dtype": str(v.dtype), "shape": list(v.shape), "data": v.tobytes()}
            for e, v in zip(entries, values, strict=True)
        ]

    def profile(self, runs: int) -> list[dict[str, Any]]:
        assert runs == 50
        return [{"name": "a", "median_ms": 0.5, "metadata": "m", "type": "Reformat", "origin": "REFORMAT"}]

    def close(self) -> None:
        self._runner.alive -= 1


class CpuChain:
    """Engines one behind the other that run on the processor."""

    def __init__(self, sessions: list[CpuSession], thresholds: list[float], runner: CpuRunner) -> None:
        self._sessions, self._thresholds, self._runner = sessions, thresholds, runner

    def input(self) -> dict[str, Any]:
        return self._sessions[0].inputs()[0]

    def time(self, images: Iterable[bytes]) -> dict[str, Any]:
        samples, exits = [], []
        for data in images:
            began, number = time.perf_counter(), 0
            for number, session in enumerate(self._sessions):
                session.set_inputs({session.inputs()[0]["name"]: data})
                told = {o["name"]: o["data"] for o in session.outputs()}
                if number < len(self._thresholds) and np.frombuffer(told["confidence"], "<f4") >= np.float32(
                    self._thresholds[number]
                ):
                    break
                data = told.get("features", b"")
            samples.append(1e3 * (time.perf_counter() - began))
            exits.append(number)
        given = self._runner.stream_ms.pop(0) if self._runner.stream_ms else samples
        return {"samples_ms": given, "exits": exits, "clock": "cuda_event"}


class CpuRunner:
    name = "tensorrt"
    streams_by = name

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.samples: list[float] = []
        self.is_bound = False
        self.alive = 0
        self.loaded: list[dict[str, Any]] = []
        self.stream_ms: list[list[float]] = []

    def available(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        details = {"compute_capability": "8.7", "cuda": "12.6"}
        return {"runtime": "tensorrt", "version": "10.3.0", "precisions": ["fp32", "fp16", "int8"], "details": details}

    def load(self, model_path: str, options: dict[str, Any]) -> CpuSession:
        self.loaded.append(options)
        return CpuSession(model_path, options, self)

    def chain(self, sessions: list[CpuSession], thresholds: list[float]) -> CpuChain:
        return CpuChain(sessions, thresholds, self)


def device(runner: CpuRunner, folder: Path) -> TensorRt:
    return TensorRt(runner, QUICK, cache=folder / "cache")


def job(kind: Any = "row", precision: Any = "fp32") -> MeasureJob:
    return MeasureJob("x", kind, precision, mean_model(), 1000)


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Device], None], tmp_path: Path) -> None:
    runner = CpuRunner()
    check(device(runner, tmp_path))
    assert runner.alive == 0, "an engine was not given back"


def test_all_builds_share_a_timing_cache_and_networks_are_built_twice(tmp_path: Path) -> None:
    runner = CpuRunner()
    row, network = device(runner, tmp_path).measure([job(), job("network")])
    assert (len(row.session_ms), len(network.session_ms), len(runner.loaded)) == (1, 2, 3)
    assert (len(row.rounds_ms), len(network.rounds_ms)) == (2, 4)
    assert len({options["timing_cache"] for options in runner.loaded}) == 1
    assert runner.loaded[0]["timing_cache"].startswith(str(tmp_path / "cache"))
    assert row.clock == "device_event"


def test_a_round_that_scatters_is_not_calm_and_an_engine_short_of_memory_is_said(tmp_path: Path) -> None:
    runner = CpuRunner()
    measured = device(runner, tmp_path)
    runner.samples = [1.0, 1.01, 0.99, 1.0]
    assert measured.measure([job()])[0].accepted == (True, True)
    runner.warnings = ["skipped_tactics: 2 tactics were passed over because memory was short"]
    short = measured.measure([job()])[0]
    assert (short.accepted, short.source) == ((True, True), runner.warnings[0]), "the same again would come of it"
    runner.warnings, runner.samples, runner.is_bound = [], [1.0, 1.2, 0.9, 1.0], True
    noisy = measured.measure([job()])[0]
    assert (noisy.accepted, noisy.latency_ms) == ((False, False), 1.0)
    assert noisy.source == "queueing takes about as long as the inference, with a CUDA graph"


def test_a_stream_is_of_builds_of_its_own_and_calm_where_its_images_take_what_they_usually_do(tmp_path: Path) -> None:
    runner = CpuRunner()
    images = np.zeros((3, 3, 8, 8), np.float32)
    job = StreamJob("s", exits_chain(), (0.5,), images)
    rounds = [[0.1, 0.2, 0.3], [0.101, 0.199, 0.301]]
    slow = [[0.2, 0.4, 0.6], [0.22, 0.44, 0.66]]
    for second, is_calm in ((rounds, True), (slow, True)):
        runner.stream_ms = [[1.0], *rounds, [1.0], *second]  # of each build the warm-up first
        times = device(runner, tmp_path).stream_times(job)
        assert times.is_calm is is_calm
        build, other = (np.median(of_build, axis=0) for of_build in (rounds, second))
        assert times.latency_ms == pytest.approx(0.75 * build + 0.25 * other)
    assert len(runner.loaded) == 8 and runner.alive == 0
    runner.stream_ms = [[1.0], *slow, [1.0], *slow]
    assert not device(runner, tmp_path).stream_times(job).is_calm
    assert len({options["timing_cache"] for options in runner.loaded}) == 1


def test_engines_that_differ_say_of_an_image_where_the_faster_one_let_it_go(tmp_path: Path) -> None:
    """Near a threshold two builds may decide differently."""
    runner = CpuRunner()
    images = np.full((2, 3, 8, 8), 200.0, np.float32)
    chained = runner.chain

    def chain(sessions: list[CpuSession], _: list[float]) -> CpuChain:
        return chained(sessions, [0.5 if len(runner.loaded) == 2 else 0.9])

    runner.chain = chain
    runner.stream_ms = [[1.0], [0.1, 0.4], [0.1, 0.4], [1.0], [0.3, 0.3], [0.3, 0.3]]
    times = device(runner, tmp_path).stream_times(StreamJob("s", exits_chain(), (0.5,), images))
    assert (times.latency_ms, times.exits) == (pytest.approx((0.15, 0.325)), (0, 1))


def test_trtexec_alone_times_no_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    runner = TrtexecRunner(str(install_trtexec(tmp_path / "programs", "8.5")))
    alone = TensorRt(runner, QUICK, cache=tmp_path / "cache")
    assert stream_timer(alone) is None
    assert "trtexec takes no images one by one, and tensorrt is missing: the Python module" in alone.no_stream


def test_a_failed_build_is_a_result_of_its_kind(tmp_path: Path) -> None:
    class Hanging(CpuRunner):
        def load(self, model_path: str, options: dict[str, Any]) -> CpuSession:
            raise BoardError(
                "hung", f"building {Path(model_path).name}: did not return within {options['timeout_s']:g} s"
            )

    failed = device(Hanging(), tmp_path).measure([job()])[0]
    assert failed.error == "hung: building model.onnx: did not return within 1800 s"


def test_its_profile_says_why_it_lacks_a_precision(tmp_path: Path) -> None:
    why = device(CpuRunner(), tmp_path).profile.details["without_bf16"]
    assert why == "only strongly typed graphs say it, which are written for TensorRT 10.13 and newer"


def test_the_precision_of_a_job_is_asked_for(tmp_path: Path) -> None:
    runner = CpuRunner()
    device(runner, tmp_path).measure([job("row", "int8"), job("row", "none")])
    assert [options["precision"] for options in runner.loaded] == ["int8", "none"]


def test_layers_come_with_what_the_runtime_says_of_them(tmp_path: Path) -> None:
    found = device(CpuRunner(), tmp_path).layer_times(mean_model(), "fp32")
    assert found == [LayerTime("a", 0.5, "m", "Reformat REFORMAT")]


@pytest.mark.parametrize("wrong", ["RuntimeError('built for another NumPy')", "OSError('libnvinfer.so.8: not found')"])
def test_a_module_that_breaks_when_it_is_imported_is_missing_and_trtexec_is_taken(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"raise {wrong}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setenv("PATH", str(install_trtexec(tmp_path / "programs", "8.5").parent))
    assert wrong.split("'")[1] in str(TensorRtRunner().available())
    assert find_runner().name == "trtexec"


def test_without_a_runtime_the_device_says_what_is_missing_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    monkeypatch.setattr("nas.devices.board.trtexec.PLACES", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError) as missing:
        open_device("tensorrt")
    assert "tensorrt: the Python module tensorrt cannot be imported" in str(missing.value)
    assert "trtexec: trtexec was not found" in str(missing.value)
