"""The host CPU through ONNX Runtime: every session of that runtime in this project is made here.

With one intra-op thread, which is the default, all work is on the calling thread and its CPU time is the latency; more
threads are timed by the wall clock. `run` and `op_counts` give answers and not times: they take one thread whatever the
device has, so that the same file has the same accuracy on each of them and what works beside them keeps its cores.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from nas.core.errors import DeviceError
from nas.core.records import DeviceProfile, Measurement
from nas.devices.base import (
    HANG_REASON,
    CalmReport,
    JobPrecision,
    LayerTime,
    MeasureJob,
    OnProgress,
    OnResult,
    StreamJob,
    StreamTimes,
)
from nas.devices.graphs import GATE_STREAMING_MB, identity_model, reference_model, streaming_model
from nas.devices.host import clock_and_temperature, host_profile, probe_host
from nas.devices.protocol import (
    Attempt,
    Clock,
    Gate,
    ProtocolSettings,
    Run,
    Subject,
    SystemClock,
    agrees,
    is_accepted,
    measure_interleaved,
    network_value,
    one_line,
    session_value,
)
from nas.devices.stream import Opened, stream_times
from nas.devices.watchdog import watched

PROVIDER = "CPUExecutionProvider"
_FATAL_ONLY = 4  # log severity: errors come as exceptions, the runtime's own log would only repeat them
_SPINNING_US = 200
# Rounds of a row with several threads: each thread needs its core at the same time. Two fills of 120 rows differed by
# 6-10 % (standard deviation) with 3 rounds, by 4-6 % with 6, on two cores that other programs used now and then.
_ROW_ROUNDS = 6
# Bytes of a model file, which are about those of its weights: what a second-level cache holds. Rows are exempt: the
# largest have 1 to 2 MB, and repeated within 0.5 % while networks took up to 25 % longer.
_STREAMS_FROM_BYTES = 1_000_000
_BATCH = 64  # images in one call of `run` where the batch is dynamic: bounds the memory
_NEARLY_ALL = 0.99  # of the work, while nobody knows how many further sessions it takes until they agree
_PROFILE_RUNS = 200  # the runtime tells whole microseconds: many runs give the fractions
_PROFILE_WARMUP = 20

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeCpu:
    """The host CPU as a Device. Precisions: fp32 and int8 (fp16 would run in fp32 with casts around it)."""

    def __init__(
        self,
        settings: ProtocolSettings | None = None,
        *,
        threads: int = 1,
        clock: Clock | None = None,
        root: Path = Path("/"),
    ) -> None:
        """Probes the host; the reference network is built at the first measurement.

        Args:
            settings: numbers of the measuring protocol; its clock follows from `threads`.
            threads: threads of one measured inference; at most the cores that this process may use.
            clock: time; tests set it.
            root: where the machine's description is read (`/proc`, `/sys`).
        """
        if threads == 1:
            self._settings = replace(settings or ProtocolSettings(), clock="thread_cpu")
        else:
            self._settings = replace(settings or ProtocolSettings(row_rounds=_ROW_ROUNDS), clock="wall")
        self._threads = threads
        self._clock: Clock = clock or SystemClock()
        self._root = root
        self._gate: Gate | None = None
        self._expected_ms: tuple[float | None, float | None] = (None, None)
        self._sequence = 0

    @property
    def profile(self) -> DeviceProfile:
        """State of this host and runtime, as it is now: the governor of the clock may change at any time."""
        return host_profile(
            probe_host(self._root),
            runtime="ort",
            runtime_version=ort.__version__,
            threads=self._threads,
            precisions=("fp32", "int8"),
        )

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Sets the references' times in earlier sessions; the gate then rejects rounds in a slower state."""
        self._expected_ms = reference_ms, streaming_ms
        if self._gate is not None:
            self._gate.expect(reference_ms, streaming_ms)

    def calm(self, checks: int = 20) -> CalmReport:
        """Looks `checks` times at the reference network (about 7 ms each)."""
        return self._ready_gate().report(checks)

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """Measures jobs interleaved, jobs of one kind together; see `Device.measure`."""
        gate = self._ready_gate()
        results: dict[int, Measurement] = {}
        steps_total = sum(self._settings.sessions(j.kind) * self._settings.rounds(j.kind) for j in jobs)
        steps_done = 0

        def step(is_planned: bool) -> None:
            nonlocal steps_done
            steps_done += is_planned
            if progress is not None:  # also where only further sessions are made: a caller may stop the work there
                progress(min(_NEARLY_ALL, steps_done / steps_total))

        def hung(key: str) -> bool:
            job = next(job for job in jobs if job.key == key)
            if on_result is not None:
                on_result(self._failed(job, f"{HANG_REASON} {self._settings.hang_s:g} s"))
            return on_result is not None

        with watched(self._settings.hang_s, hung) as begin:
            for batch in self._batches(jobs):
                for index, result in self._measure_batch([(i, jobs[i]) for i in batch], gate, step, begin):
                    results[index] = result
                    if on_result is not None:
                        on_result(result)
        if progress is not None and jobs:
            progress(1.0)
        return [results[i] for i in range(len(jobs))]

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs for raw images; see `Device.run`."""
        with watched(self._settings.hang_s, lambda _: False) as begin:
            return run_model(model, images, lambda: begin("running the model on images"))

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:  # noqa: ARG002  # the file says it
        """Typical time of each operator that the runtime executes; see `LayerTimer`.

        Less what the runtime tells of an operator that does nothing, 1 to 2 us: in a small network as much as the work.
        """
        with watched(self._settings.hang_s, lambda _: False) as begin:
            begin("profiling a model")
            nothing_ms = min(time.median_ms for time in profiled(identity_model(), self._threads))
            return [
                replace(time, median_ms=max(0.0, time.median_ms - nothing_ms))
                for time in profiled(model, self._threads)
            ]

    @property
    def no_stream(self) -> str:
        """Empty: it can."""
        return ""

    def stream_times(self, job: StreamJob, progress: OnProgress | None = None) -> StreamTimes:
        """Times of the images of a stream; see `StreamTimer`. Between two models of a chain this thread decides."""
        gate = self._ready_gate()
        streams = sum(map(len, job.models)) >= _STREAMS_FROM_BYTES
        with watched(self._settings.hang_s, lambda _: False) as begin:
            try:
                return stream_times(
                    job.key,
                    len(job.images),
                    lambda: _opened_stream(job, self._threads),
                    gate,
                    self._settings,
                    self._clock,
                    streams=streams,
                    begin=begin,
                    progress=progress,
                )
            except Exception as e:  # the runtime's exceptions have no common base of their own
                raise DeviceError(f"{job.key}: the stream cannot be timed: {one_line(e)}") from e

    def _ready_gate(self) -> Gate:
        if self._gate is None:
            reference = bound_run(reference_model(), {}, self._threads)
            self._gate = Gate(reference, self._settings, self._clock, self._streaming_reference)
            self._gate.expect(*self._expected_ms)
        return self._gate

    def _streaming_reference(self) -> Run:
        return bound_run(streaming_model(GATE_STREAMING_MB, cached=False), {}, self._threads)

    def _batches(self, jobs: Sequence[MeasureJob]) -> list[list[int]]:
        """Indices of jobs measured together, in the order given: of one kind, of rows as many as may be alive."""
        batches: list[list[int]] = []
        for i, job in enumerate(jobs):
            last = batches[-1] if batches else []
            is_full = job.kind == "row" and len(last) >= self._settings.rows_alive
            if last and jobs[last[0]].kind == job.kind and not is_full:
                last.append(i)
            else:
                batches.append([i])
        return batches

    def _measure_batch(
        self,
        batch: list[tuple[int, MeasureJob]],
        gate: Gate,
        step: Callable[[bool], None],
        begin: Callable[[str], None],
    ) -> list[tuple[int, Measurement]]:
        sessions: dict[int, list[list[Attempt]]] = {i: [] for i, _ in batch}
        errors: dict[int, str] = {}
        kind = batch[0][1].kind
        left = list(batch)
        for number in range(self._settings.most_sessions(kind)):
            planned = number < self._settings.sessions(kind)
            if not planned:  # sessions differ in where they lie in memory, and in how busy the machine was
                left = [(i, job) for i, job in left if not agrees(self._session_ms(sessions[i]), self._settings)]
            # Every job has its turn before any has its next session: what disturbs a host for seconds or a minute then
            # meets some sessions of all jobs and not all sessions of some.
            for start in range(0, len(left), self._settings.alive(kind)):
                part = left[start : start + self._settings.alive(kind)]
                for i, attempts in self._one_session(part, gate, errors, partial(step, planned), begin).items():
                    sessions[i].append(attempts)
            left = [(i, job) for i, job in left if i not in errors]
        state = clock_and_temperature(self._root)
        return [(i, self._result(job, sessions[i], errors.get(i), gate, state)) for i, job in batch]

    def _one_session(
        self,
        jobs: Sequence[tuple[int, MeasureJob]],
        gate: Gate,
        errors: dict[int, str],
        after_round: Callable[[], None],
        begin: Callable[[str], None],
    ) -> dict[int, list[Attempt]]:
        """The rounds of one session of each job, by its index; `errors` gets the reason of each that has none.

        All sessions are closed when it returns. Left alive until the next ones are made, they make everything slower
        that the process runs: 24 networks lay 6 to 8 % above their best in the first turns and 10 to 13 % in the last
        of sixteen, where it is 3 to 6 and 3 to 4 % now.
        """
        subjects = self._opened(jobs, errors, begin)
        measure_interleaved(list(subjects.values()), gate, self._settings, self._clock, after_round, begin)
        begin("")
        errors |= {i: subject.error for i, subject in subjects.items() if subject.error is not None}
        return {i: subject.attempts for i, subject in subjects.items()}

    def _opened(
        self, jobs: Sequence[tuple[int, MeasureJob]], errors: dict[int, str], begin: Callable[[str], None]
    ) -> dict[int, Subject]:
        """A fresh session of each job by its index; where the runtime refuses a model, `errors` gets the reason."""
        subjects: dict[int, Subject] = {}
        for i, job in jobs:
            begin(job.key)
            try:
                run = bound_run(job.model, job.feeds, self._threads)
                streams = job.kind != "row" and len(job.model) >= _STREAMS_FROM_BYTES
                subjects[i] = Subject(job.key, job.kind, run, streams)
            except Exception as e:  # whatever the runtime raises becomes a recorded row with its reason
                errors[i] = one_line(e)
        return subjects

    def _session_ms(self, sessions: list[list[Attempt]]) -> tuple[float, ...]:
        return tuple(session_value(session, self._settings) for session in sessions)

    def _result(
        self,
        job: MeasureJob,
        sessions: list[list[Attempt]],
        error: str | None,
        gate: Gate,
        state: tuple[float | None, float | None],
    ) -> Measurement:
        values = () if error else self._session_ms(sessions)
        if values and min(values) <= 0:  # coarser than a round: no latency can be told
            error = "the clock shows no time for a whole round"
        if error is not None:
            return self._failed(job, error)
        self._sequence += 1
        attempts = [attempt for session in sessions for attempt in session]
        return Measurement(
            key=job.key,
            kind=job.kind,
            precision=job.precision,
            latency_ms=network_value(values),
            rounds_ms=tuple(a.samples_ms for a in attempts),
            accepted=tuple(is_accepted(a, gate, self._settings) for a in attempts),
            clock=self._settings.clock,
            measured_at=self._clock.utc(),
            sequence=self._sequence,
            temperature_c=state[1],
            clock_mhz=state[0],
            error=None,
            session_ms=values,
        )

    def _failed(self, job: MeasureJob, error: str) -> Measurement:
        self._sequence += 1
        return Measurement(
            job.key,
            job.kind,
            job.precision,
            None,
            (),
            (),
            self._settings.clock,
            self._clock.utc(),
            self._sequence,
            error=error,
        )


def run_model(
    model: bytes, images: NDArray[np.float32], begin: Callable[[], None] = lambda: None, *, as_written: bool = False
) -> list[NDArray[np.generic]]:
    """Outputs of a model for raw images [B, 3, H, W], each with B rows; the batch may be static or dynamic.

    Feature maps of half floats, which a segment of a network takes, are given as they are.
    `begin` is called before the session is made and before each batch. `as_written`: every operator is computed as the
    file says. Else this runtime's own optimiser may change the numbers: it quantises float biases of int8
    convolutions, which the dialects of other runtimes have.

    Raises:
        DeviceError: the runtime refuses the model or the images.
    """
    begin()
    try:
        session = _session(model, as_written=as_written)
        entry = session.get_inputs()[0]
        size = entry.shape[0] if isinstance(entry.shape[0], int) else _BATCH
        parts: list[list[NDArray[np.generic]]] = []
        for start in range(0, len(images), size):
            begin()
            part = images[start : start + size]
            missing = size - len(part) if isinstance(entry.shape[0], int) else 0
            if missing:  # a static batch is filled up with copies that are cut off again
                part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            kind = np.float16 if part.dtype == np.float16 else np.float32
            outputs = session.run(None, {entry.name: np.ascontiguousarray(part, dtype=kind)})
            rows = len(part)
            parts.append([_rows(output, rows)[: rows - missing] for output in outputs])
    except Exception as e:  # the runtime's exceptions have no common base of their own
        raise DeviceError(f"ONNX Runtime {ort.__version__} cannot run the model: {one_line(e)}") from e
    if not parts:
        raise DeviceError("no images were given to run")
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def op_counts(model: bytes) -> dict[str, int]:
    """Operators that ONNX Runtime really executes: op type -> number, after its own optimisation, branches included.

    Raises:
        DeviceError: the runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="nas-ort-") as folder:
        path = Path(folder) / "optimised.onnx"
        try:
            _session(model, optimised_path=path)
            graph = onnx.load(str(path)).graph
        except Exception as e:
            raise DeviceError(f"ONNX Runtime {ort.__version__} cannot optimise the model: {one_line(e)}") from e
    counts: dict[str, int] = {}
    _count(graph, counts)
    return dict(sorted(counts.items()))


def bound_run(model: bytes, feeds: Mapping[str, NDArray[np.generic]], threads: int = 1) -> Run:
    """A function that runs the model once, inputs and outputs bound beforehand, with so many threads.

    Inputs that `feeds` does not name get random values that are the same every time; a dynamic batch becomes 1.

    Raises:
        DeviceError: a dynamic size other than the batch, an unknown input, a feed of another shape.
    """
    return _bound(_session(model, threads), feeds)


def _bound(session: Any, feeds: Mapping[str, NDArray[np.generic]]) -> Run:
    binding = session.io_binding()
    rng = np.random.default_rng(0)
    inputs = {entry.name: entry for entry in session.get_inputs()}
    optional = {entry.name: entry for entry in session.get_overridable_initializers()}
    unknown = set(feeds) - set(inputs) - set(optional)
    if unknown:
        raise DeviceError(f"no input {sorted(unknown)[0]!r} in the model; inputs: {', '.join([*inputs, *optional])}")
    for name in [*inputs, *(set(feeds) & set(optional))]:
        entry = inputs.get(name) or optional[name]
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(_input(entry, feeds.get(name), rng)))
    for entry in session.get_outputs():
        if entry.type in _DTYPES and all(isinstance(n, int) for n in entry.shape):
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(entry.shape), _DTYPES[entry.type])
            binding.bind_ortvalue_output(entry.name, value)
        else:
            binding.bind_output(entry.name, "cpu")
    run_with_binding = session.run_with_iobinding
    return lambda: run_with_binding(binding)


def _opened_stream(job: StreamJob, threads: int) -> Opened:
    """A fresh session of each model, inputs and outputs bound: the feature map of one is the input of the next."""
    # a copy: the value is that memory, and every image is written into it
    image = ort.OrtValue.ortvalue_from_numpy(np.array(job.images[:1], dtype=np.float32, order="C"))
    features, steps, surest, said, taken = image, [], [], [], [0]
    for model in job.models:
        session = _session(model, threads)
        binding = session.io_binding()
        binding.bind_ortvalue_input(session.get_inputs()[0].name, features)
        for entry in session.get_outputs():
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(entry.shape), _DTYPES[entry.type])
            binding.bind_ortvalue_output(entry.name, value)
            if entry.name == "confidence":
                surest.append(value)
            elif entry.name == "exit_index":
                said.append(value)
            elif len(entry.shape) == 4:
                features = value
        steps.append(partial(session.run_with_iobinding, binding))

    def run_chain() -> None:
        for number, (step, confidence, threshold) in enumerate(zip(steps, surest, job.thresholds, strict=False)):
            step()
            if confidence.numpy()[0] >= np.float32(threshold):
                taken[0] = number
                return
        steps[-1]()
        taken[0] = len(steps) - 1

    def place(number: int) -> object:
        return image.update_inplace(job.images[number : number + 1])

    if len(steps) == 1:
        return Opened(place, steps[0], lambda: int(said[0].numpy()) if said else 0)
    return Opened(place, run_chain, lambda: taken[0])


def waiting_option(version: str) -> tuple[str, str]:
    """How worker threads wait for work: the name and the value of a session's option in this version of the runtime.

    By default they spin for many milliseconds: long after their session ran, on a core that the next one is to use.
    Measured on two cores with 25 sessions alive, the typical round in the quietest of four repetitions, ms: the
    reference network takes 0.301 with one thread, with two 0.317 by default and 0.203 with this limit; 0.203 also by
    default with no other session alive, which is what a program that runs one network again and again gets. Without any
    spinning it takes 0.302: waking a worker takes as long as the work of a small convolution. Versions that know no
    limit (before 1.26) stop spinning after each run; that adds one waking to each: a chain of convolutions of 0.049 ms
    takes 0.061 ms.
    """
    known = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if known >= (1, 26):
        return "session.intra_op.spin_duration_us", str(_SPINNING_US)
    return "session.force_spinning_stop", "1"


def _session(
    model: bytes,
    threads: int = 1,
    optimised_path: Path | None = None,
    profile_prefix: Path | None = None,
    *,
    as_written: bool = False,
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        options.add_session_config_entry(*waiting_option(ort.__version__))
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if as_written else levels.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return ort.InferenceSession(model, options, providers=[PROVIDER])


def _input(entry: Any, given: NDArray[np.generic] | None, rng: np.random.Generator) -> NDArray[np.generic]:
    dtype = _DTYPES.get(entry.type)
    if dtype is None:
        raise DeviceError(f"input {entry.name!r} is a {entry.type}; only plain tensors can be measured")
    shape = [1 if axis == 0 and not isinstance(n, int) else n for axis, n in enumerate(entry.shape)]
    if given is not None:
        if len(given.shape) != len(shape) or any(
            isinstance(n, int) and n != m for n, m in zip(shape, given.shape, strict=True)
        ):
            raise DeviceError(f"input {entry.name!r} takes {shape}, got {list(given.shape)}")
        return np.ascontiguousarray(given, dtype=dtype)
    if not all(isinstance(n, int) for n in shape):
        raise DeviceError(f"input {entry.name!r} has the dynamic shape {entry.shape}; only the batch may be dynamic")
    if np.issubdtype(dtype, np.floating):
        return rng.random(shape).astype(dtype)
    return rng.integers(0, 2 if dtype is np.bool_ else 128, shape).astype(dtype)


def _rows(output: NDArray[np.generic], rows: int) -> NDArray[np.generic]:
    array = np.atleast_1d(np.asarray(output))
    if len(array) != rows:
        raise DeviceError(f"an output has {len(array)} rows for {rows} images")
    return array


def _count(graph: Any, counts: dict[str, int]) -> None:
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _count(attribute.g, counts)


def profiled(model: bytes, threads: int = 1) -> list[LayerTime]:
    """Time of each operator that ONNX Runtime executes, as its profile tells it.

    Raises:
        DeviceError: the runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="nas-ort-") as folder:
        try:
            session = _session(model, threads, profile_prefix=Path(folder) / "profile")
            run = _bound(session, {})
            for _ in range(_PROFILE_WARMUP + _PROFILE_RUNS):
                run()
            text = Path(session.end_profiling()).read_text(encoding="utf-8")
        except Exception as e:  # the runtime's exceptions have no common base of their own
            raise DeviceError(f"ONNX Runtime {ort.__version__} cannot profile the model: {one_line(e)}") from e
    return _layer_times(text)


def _layer_times(profile: str) -> list[LayerTime]:
    """Operators of the runtime's profile in the order of execution, without the runs of the warm-up.

    A time is the mean of the faster half of the runs: disturbance only adds, and whole microseconds average out.
    """
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in json.loads(profile):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            times.setdefault(node, []).append(float(event["dur"]) / 1e3)
            kinds[node] = str(event.get("args", {}).get("op_name", ""))
    result = []
    for node, values in times.items():
        repeats = max(1, round(len(values) / (_PROFILE_WARMUP + _PROFILE_RUNS)))  # several operators of one name
        counted = np.sort(values[repeats * _PROFILE_WARMUP :])
        faster = counted[: max(1, len(counted) // 2)]
        result.append(LayerTime(node, repeats * float(np.mean(faster)), "", kinds[node]))
    return result
