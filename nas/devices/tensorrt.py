"""The GPU of this machine through TensorRT: the very runners that a board uses, in this process.

Each model is built into an engine in a process of its own, with a timing cache that all builds share; a time is the
median of what passes on the GPU between two events, copies excluded. A round whose samples scatter by more than 2.5 %
is not calm (the limit from which trtexec itself warns). An engine for which the builder had to pass over tactics for
want of memory is measured as it is, and its measurement says so: measuring it again would give the same.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from nas.core.errors import DeviceError, RecordError
from nas.core.records import DeviceProfile, Measurement
from nas.devices.base import (
    HANG_REASON,
    CalmReport,
    JobKind,
    JobPrecision,
    LayerTime,
    MeasureJob,
    OnProgress,
    OnResult,
    StreamJob,
    StreamTimes,
    layer_times_of,
)
from nas.devices.board import processes
from nas.devices.board.errors import BoardError
from nas.devices.board.onnx_facts import onnx_facts
from nas.devices.board.stream import Block, Images
from nas.devices.board.trt_engine import TensorRtRunner
from nas.devices.board.trtexec import TrtexecRunner
from nas.devices.capability import without_details
from nas.devices.graphs import reference_model
from nas.devices.host import probe_host, safe_name
from nas.devices.portable import image_bytes, precision_of
from nas.devices.protocol import Clock, SystemClock, network_value, one_line, queueing_note
from nas.devices.stream import StreamSession, stream_session, stream_values
from nas.devices.watchdog import watched

CACHE = Path(".nas-cache/tensorrt")
_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
_QUERY_TIMEOUT_S = 20.0
_PATIENCE_S = 120.0  # of the watchdog, beyond the time limit of a build
_MEDIAN = 0.5
_CALM_DRIFT = 1.05  # a reference network that takes longer than this shows a lower clock or another program


class Runner(Protocol):
    """What builds engines: `nas.devices.board.trt_engine`, `nas.devices.board.trtexec`, or one of a test."""

    name: str

    def available(self) -> str | None:
        """None, or what is missing."""
        ...

    def describe(self) -> dict[str, Any]:
        """Runtime, version, precisions and details."""
        ...

    def load(self, model_path: str, options: dict[str, Any]) -> Any:
        """A session of an engine that is built now."""
        ...

    def chain(self, sessions: list[Any], thresholds: list[float]) -> Any:
        """What times images one by one through such sessions; only asked for where `streams_by` names a runner."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRtSettings:
    """Numbers of measuring with TensorRT.

    rounds, runs: rounds of an engine, and inferences in each (fact: at least 200 together).
    network_builds: engines of a network, each built anew: tactics are chosen by timing, so builds differ.
    warmup_runs: inferences before a round, at least; the runner warms up for 200 ms anyway.
    scatter: largest standard deviation of a calm round, relative to its mean.
    build_timeout_s: after so many seconds a build counts as hung.
    profile_runs: inferences of a profile of layers.
    """

    rounds: int = 4
    runs: int = 50
    network_builds: int = 2
    warmup_runs: int = 5
    scatter: float = 0.025
    build_timeout_s: float = 1800.0
    profile_runs: int = 50

    def __post_init__(self) -> None:
        for name in ("rounds", "runs", "network_builds", "profile_runs"):
            if getattr(self, name) < 1:
                raise RecordError(f"{name} must be at least 1, got {getattr(self, name)}")

    def builds(self, kind: JobKind) -> int:
        """Engines that are built of one model."""
        return self.network_builds if kind == "network" else 1


class TensorRt:
    """The GPU of this machine as a Device, and as a LayerTimer."""

    def __init__(
        self,
        runner: Runner | None = None,
        settings: TensorRtSettings | None = None,
        *,
        clock: Clock | None = None,
        cache: Path = CACHE,
    ) -> None:
        """Looks for a runtime.

        Args:
            runner: builds engines; the `tensorrt` module where it can be imported, else trtexec, if not given.
            settings: numbers of measuring.
            clock: time; tests set it.
            cache: folder of timing caches, one for each TensorRT and GPU.

        Raises:
            DeviceError: neither is there; the message says what is missing for each.
        """
        self._runner = runner or find_runner()
        self._settings = settings or TensorRtSettings()
        self._clock: Clock = clock or SystemClock()
        self._cache = cache
        self._sequence = 0
        self._described: dict[str, Any] = self._runner.describe()

    @property
    def profile(self) -> DeviceProfile:
        """State of this GPU and runtime, as it is now."""
        told, gpu = self._described, _gpu()
        host = probe_host()
        name = gpu.get("name") or f"gpu-{told['details'].get('compute_capability', 'unknown')}"
        return DeviceProfile(
            name=safe_name(f"{host.machine}-{name}_tensorrt{told['version']}"),
            board=f"{host.machine} {host.cpu_model}, {name}",
            runtime="tensorrt",
            runtime_version=str(told["version"]),
            power_mode=gpu.get("power", "unknown"),
            clocks_locked=False,
            threads=1,
            driver=" ".join([gpu.get("driver", "unknown"), "cuda", str(told["details"].get("cuda", "unknown"))]),
            precisions=tuple(told["precisions"]),
            kind="measured",
            details={
                "runner": self._runner.name,
                **without_details(tuple(told["precisions"]), str(told["version"]), None),
                **{str(k): str(v) for k, v in told["details"].items()},
            },
        )

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """Measures one job after the other; see `Device.measure`."""

        def hung(key: str) -> bool:
            if on_result is not None:
                job = next(job for job in jobs if job.key == key)
                on_result(self._failed(job, f"{HANG_REASON} {self._settings.build_timeout_s:g} s"))
            return on_result is not None

        results = []
        with watched(self._settings.build_timeout_s + _PATIENCE_S, hung) as begin:
            for number, job in enumerate(jobs, start=1):
                results.append(self._measured(job, begin))
                begin("")
                if progress is not None:
                    progress(number / len(jobs))
                if on_result is not None:
                    on_result(results[-1])
        return results

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs for raw images; see `Device.run`. A dynamic batch is built as a batch of one."""
        if not len(images):
            raise DeviceError("no images were given to run")
        try:
            model = _with_static_batch(model)
            with self._session(model, precision_of(model)) as session:
                entry = session.inputs()[0]
                shape = (len(images), *entry["shape"][1:])
                if images.shape != shape or entry["dtype"] not in ("float32", "float16"):
                    raise DeviceError(
                        f"input {entry['name']!r} takes {entry['dtype']} {list(shape)}, got images {list(images.shape)}"
                    )
                return _in_batches(session, entry, images)
        except BoardError as e:
            raise DeviceError(f"TensorRT {self._described['version']}: {e.kind}: {e.message}") from e

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
        """Median time of each layer of the engine of a model; see `LayerTimer`."""
        try:
            with self._session(model, precision) as session:
                return layer_times_of(session.profile(self._settings.profile_runs))
        except BoardError as e:
            raise DeviceError(f"TensorRT {self._described['version']}: {e.kind}: {e.message}") from e

    @property
    def no_stream(self) -> str:
        """Why images cannot be timed one by one: trtexec alone takes none. Empty where they can."""
        needed, own = getattr(self._runner, "streams_by", ""), f"{self._runner.name} takes no images one by one"
        if not needed:
            return own
        lacks = None if needed == self._runner.name else TensorRtRunner().available()
        return f"{own}, and {needed} is missing: {lacks}" if lacks else ""

    def stream_times(self, job: StreamJob, progress: OnProgress | None = None) -> StreamTimes:
        """Times of the images of a stream, between events of the GPU; see `StreamTimer` and `board.trt_chain`.

        A round is calm where its images scatter no more than those of `measure` about what each usually takes.
        """
        if self.no_stream:
            raise DeviceError(f"{job.key}: the stream cannot be timed: {self.no_stream}")
        settings = self._settings
        images, kind = image_bytes(job.images, job.models[0])
        sessions = []
        with (
            tempfile.TemporaryDirectory(prefix="nas-tensorrt-") as folder,
            watched(settings.build_timeout_s + _PATIENCE_S, lambda _: False) as begin,
        ):
            path = Path(folder) / "images.raw"
            path.write_bytes(images)
            try:
                for number in range(settings.network_builds):
                    sessions.append(self._stream_session(job, str(path), kind, begin))
                    if progress is not None:
                        progress(number / settings.network_builds)
            except BoardError as e:
                raise DeviceError(f"{job.key}: the stream cannot be timed: {e.kind}: {e.message}") from e
            except Exception as e:  # whatever a runtime raises
                raise DeviceError(f"{job.key}: the stream cannot be timed: {one_line(e)}") from e
        if progress is not None:
            progress(1.0)
        return stream_values(sessions, _MEDIAN)

    def _stream_session(self, job: StreamJob, path: str, kind: str, begin: Callable[[str], None]) -> StreamSession:
        """Engines that are built now, and the rounds of all parts of the stream."""
        settings = self._settings
        with ExitStack() as opened:
            built = []
            for model in job.models:
                begin(job.key)
                built.append(opened.enter_context(self._session(model, precision_of(model))))
            begin(job.key)
            chain = self._runner.chain(built, list(job.thresholds))
            images = opened.enter_context(closing(Images(path, kind, list(job.images.shape), chain.input())))
            chain.time(images.read(0, min(images.count, settings.warmup_runs)))
            blocks = []
            for first in range(0, images.count, settings.runs):
                count = min(settings.runs, images.count - first)
                blocks.append((Block(chain, images, first, count), list[tuple[float, ...]](), list[int]()))
            for _ in range(settings.rounds):
                for block, samples, exits in blocks:
                    begin(job.key)
                    told = block.time(settings.runs, 0)
                    samples.append(tuple(round(float(ms), 6) for ms in told["samples_ms"]))
                    exits[:] = exits or told["exits"]
            begin("")
        return stream_session([(samples, _calm(samples, settings.scatter), exits) for _, samples, exits in blocks])

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Ignored: rounds are judged by their own scatter."""

    def calm(self, checks: int = 20) -> CalmReport:
        """Runs the reference network again and again; a check that is 5 % slower than the best is rejected."""
        with self._session(reference_model(), "fp32") as session:
            times = [
                float(np.median(session.time(self._settings.runs, self._settings.warmup_runs)["samples_ms"]))
                for _ in range(max(1, checks))
            ]
        best = min(times)
        rejected = sum(ms > _CALM_DRIFT * best for ms in times)
        return CalmReport(len(times), rejected, best, float(np.median(times)), max(times), 1.0)

    def _measured(self, job: MeasureJob, begin: Callable[[str], None]) -> Measurement:
        rounds: list[tuple[float, ...]] = []
        accepted: list[bool] = []
        values: list[float] = []
        notes: list[str] = []
        copies_ms: float | None = None
        settings = self._settings
        try:
            for _ in range(settings.builds(job.kind)):
                begin(job.key)
                with self._session(job.model, job.precision, job.feeds) as session:
                    of_build = []
                    for _ in range(settings.rounds):
                        begin(job.key)
                        told = session.time(settings.runs, settings.warmup_runs)
                        samples = tuple(round(float(ms), 6) for ms in told["samples_ms"])
                        of_build.append(samples)
                        accepted.append(_scatter(samples) <= settings.scatter)
                    rounds += of_build
                    values.append(min(float(np.median(samples)) for samples in of_build))
                    notes += session.warnings
                    if job.kind != "row" and copies_ms is None and hasattr(session, "transfer_ms"):
                        copies_ms = float(session.transfer_ms())
                    if told["enqueue_bound"]:
                        notes.append(queueing_note(told["cuda_graph"]))
        except BoardError as e:
            return self._failed(job, f"{e.kind}: {e.message}")
        except Exception as e:  # whatever a runtime raises becomes a recorded row with its reason
            return self._failed(job, one_line(e))
        if not min(values) > 0:
            return self._failed(job, "the events show no time for an inference")
        self._sequence += 1
        return Measurement(
            key=job.key,
            kind=job.kind,
            precision=job.precision,
            latency_ms=network_value(values),
            rounds_ms=tuple(rounds),
            accepted=tuple(accepted),
            clock="device_event",
            measured_at=self._clock.utc(),
            sequence=self._sequence,
            session_ms=tuple(values),
            transfer_ms=copies_ms,
            source="; ".join(dict.fromkeys(notes)),
        )

    def _failed(self, job: MeasureJob, error: str) -> Measurement:
        self._sequence += 1
        return Measurement(
            key=job.key,
            kind=job.kind,
            precision=job.precision,
            latency_ms=None,
            rounds_ms=(),
            accepted=(),
            clock="device_event",
            measured_at=self._clock.utc(),
            sequence=self._sequence,
            error=error,
        )

    @contextmanager
    def _session(
        self, model: bytes, precision: str, feeds: Mapping[str, NDArray[np.generic]] | None = None
    ) -> Iterator[Any]:
        """An engine that is built now and given back at the end.

        Raises:
            BoardError: it cannot be built.
        """
        told = self._described
        gpu = _gpu()  # tactics are chosen by timing, so the power limit is part of what they hold for
        known = (
            told["version"],
            told["details"].get("compute_capability", ""),
            gpu.get("name", ""),
            gpu.get("power", ""),
        )
        state = " ".join(map(str, known))
        cache = self._cache / f"timing-{hashlib.sha256(state.encode()).hexdigest()[:12]}.cache"
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="nas-tensorrt-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model)
            options = {
                "precision": precision,
                "timing_cache": str(cache.absolute()),
                "seed": 0,
                "timeout_s": self._settings.build_timeout_s,
                "work": folder,
            }
            session = self._runner.load(str(path), options)
            try:
                if feeds:
                    session.set_inputs({name: np.ascontiguousarray(value).tobytes() for name, value in feeds.items()})
                yield session
            finally:
                session.close()


def find_runner() -> Runner:
    """The `tensorrt` module where it can be used, else trtexec.

    Raises:
        DeviceError: neither is there.
    """
    missing = []
    for runner in (TensorRtRunner(), TrtexecRunner()):
        lacks = runner.available()
        if lacks is None:
            return runner
        missing.append(f"  {runner.name}: {lacks}")
    raise DeviceError("device tensorrt: TensorRT cannot be used on this machine:\n" + "\n".join(missing))


def _scatter(samples: Sequence[float]) -> float:
    mean = float(np.mean(samples))
    return float(np.std(samples)) / mean if mean > 0 else float("inf")


def _calm(rounds: Sequence[Sequence[float]], scatter: float) -> list[bool]:
    """Whether each round of the same images deviates no more from what each of them usually takes."""
    usual = np.maximum(np.median(rounds, axis=0), 1e-6)
    return [float(np.sqrt(np.mean((np.asarray(samples) / usual - 1) ** 2))) <= scatter for samples in rounds]


def _with_static_batch(model: bytes) -> bytes:
    """The model with a batch of one where its batch is free; itself otherwise."""
    if not any(-1 in entry["shape"][:1] for entry in onnx_facts(model).inputs):
        return model
    proto = ModelProto.FromString(model)
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_param"):
            dims[0].dim_value = 1
    data: bytes = proto.SerializeToString()
    return data


def _in_batches(session: Any, entry: Mapping[str, Any], images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    size = int(entry["shape"][0])
    columns: list[list[NDArray[np.generic]]] = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part)
        if missing:  # the batch is filled up with copies that are cut off again
            part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
        session.set_inputs({str(entry["name"]): np.ascontiguousarray(part, dtype=entry["dtype"]).tobytes()})
        outputs = []
        for told in session.outputs():
            if told["dtype"] == "bfloat16":
                raise DeviceError(f"output {told['name']!r} is bfloat16, which NumPy does not have")
            array = np.frombuffer(told["data"], told["dtype"]).reshape(told["shape"])
            outputs.append(array[: size - missing])
        columns.append(outputs)
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def _gpu() -> dict[str, str]:
    """Name, driver and power limit of the first GPU as its driver's program tells them; empty where it is not there."""
    try:
        code, out, _ = processes.run(_QUERY, _QUERY_TIMEOUT_S)
    except BoardError:
        return {}
    parts = [part.strip() for part in out.splitlines()[0].split(",")] if code == 0 and out.strip() else []
    if len(parts) != 3:
        return {}
    return {"name": parts[0], "driver": parts[1], "power": f"limit {parts[2]}"}
