"""TensorRT through its Python module, 8.2 to 11.x, by looking for features and never by counting versions.

What differs between the generations is asked of the classes: tensors by name (8.5 on) or by binding index, workspace
as a pool or as a size, flags for precision (up to 10.x) or a strongly typed network (10.0 on, the only kind in 11).
Numbers of enumerations are never written down: they were shifted twice.

An engine is built in a process of its own, so that a builder that hangs, runs out of memory or is killed by the system
is a result and not the end of the program. Times are those between two events around each inference in a stream of its
own, as a CUDA graph where one can be captured; the host spins. Copies of inputs and outputs are measured apart.
"""

import json
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections import deque
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import processes
from .building import build_apart
from .cuda import find_cuda
from .errors import BoardError, as_board_error
from .onnx_facts import onnx_facts
from .trt_chain import WARM_FOR_S, WARMUP_S, TensorRtChain
from .trtexec import BF16_VERSION, effective_precision, is_weak
from .trtexec_output import failure_of, layers_of, skipped_note

# The dtype table is ours: `trt.nptype` of 8.2 and 8.4 needs a NumPy older than 1.24. Member of DataType -> our name,
# bytes of an element, and its letter in `struct`.
DTYPES = (
    ("FLOAT", "float32", 4, "f"),
    ("HALF", "float16", 2, "e"),
    ("INT8", "int8", 1, "b"),
    ("INT32", "int32", 4, "i"),
    ("BOOL", "bool", 1, "?"),
    ("UINT8", "uint8", 1, "B"),
    ("INT64", "int64", 8, "q"),
    ("BF16", "bfloat16", 2, "H"),
)
WORKSPACE_MIB = 512  # a Jetson shares its memory with the system: some of it has to stay free
TIMING_ITERATIONS = 8  # of each tactic while building, as trtexec does
OPTIMIZATION_LEVEL = 3  # the default, set so that it stays the same
BUILD_TIMEOUT_S = 1800.0
IN_FLIGHT = 3  # inferences between two looks of the host
SHORT_MS = 0.01  # events resolve about half a microsecond: shorter networks run several times between two
SHORT_REPEATS = 16
TRANSFER_RUNS = 20
PROFILE_RUNS = 50
ENQUEUE_BOUND = 0.8  # share of the GPU's time from which on the host decides it; trtexec warns from there
KEPT_LINES = 50  # of what TensorRT logs while an engine is used: the last ones say why it failed


class TensorRtRunner(object):
    """Builds and times ONNX files with the `tensorrt` module."""

    name = "tensorrt"
    streams_by = name

    def __init__(
        self, cuda: Any = None, run: Callable[[List[str], float], Tuple[int, str, str]] = processes.run
    ) -> None:
        """Nothing is imported yet.

        Args:
            cuda: an implementation of `cuda.Runtime`; looked for where not given.
            run: starts the process that builds; tests set it.
        """
        self._cuda = cuda
        self._run = run

    def available(self) -> Optional[str]:
        """None, or what is missing."""
        try:
            import_tensorrt()
            self.cuda()
        except BoardError as e:
            return e.message
        return None

    def describe(self) -> Dict[str, Any]:
        """Runtime, version, precisions and details.

        Raises:
            BoardError: `not_found`.
        """
        trt = import_tensorrt()
        cuda = self.cuda()
        has_flags = hasattr(trt.BuilderFlag, "FP16")
        is_typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        number = cuda.version()
        has_bf16 = version_of(trt) >= BF16_VERSION and cuda.capability() >= (8, 0)  # from Ampere on
        return {
            "runtime": "tensorrt",
            "version": str(trt.__version__),
            "precisions": ["fp32", "fp16", "bf16", "int8"] if has_bf16 else ["fp32", "fp16", "int8"],
            "details": {
                "typing": ", ".join(["weak"] * has_flags + ["strong"] * is_typed),
                "cuda": "%d.%d" % (number // 1000, number % 1000 // 10),
                "cuda_binding": cuda.name,
                "compute_capability": "%d.%d" % cuda.capability(),
            },
        }

    def cuda(self) -> Any:
        """CUDA, looked for once.

        Raises:
            BoardError: `not_found`.
        """
        if self._cuda is None:
            self._cuda = find_cuda()
        return self._cuda

    def load(self, model_path: str, options: Dict[str, Any]) -> "TensorRtSession":
        """Builds an engine in a process of its own and loads it here.

        Args:
            model_path: an ONNX file.
            options: `precision`; `timing_cache`: a file shared by builds; `seed` of random inputs; `timeout_s`;
                `work`: a folder of ours; `typing`: auto, weak or strong; `workspace_mib`.

        Raises:
            BoardError: `build_failed`, `out_of_memory`, `hung`, `killed`, `unsupported`, `bad_request`, `not_found`.
        """
        trt = import_tensorrt()
        folder = tempfile.mkdtemp(prefix="engine-", dir=options.get("work"))
        engine = os.path.join(folder, "engine.plan")
        what = "building %s" % os.path.basename(model_path)
        request = {
            "model": os.path.abspath(model_path),
            "engine": engine,
            "precision": str(options.get("precision", "fp32")),
            "timing_cache": options.get("timing_cache"),
            "typing": str(options.get("typing", "auto")),
            "workspace_mib": int(options.get("workspace_mib", WORKSPACE_MIB)),
        }
        try:
            told = build_apart(request, float(options.get("timeout_s", BUILD_TIMEOUT_S)), self._run)
            with open(engine, "rb") as file:
                plan = file.read()
            session = TensorRtSession(trt, self.cuda(), plan, int(options.get("seed", 0)), list(told["warnings"]))
        except BoardError as e:
            raise e if what in e.message else BoardError(e.kind, "%s: %s" % (what, e.message)) from e
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        session.build_s = told["seconds"]
        return session

    def chain(self, sessions: List["TensorRtSession"], thresholds: List[float]) -> TensorRtChain:
        """Engines one behind the other; an image leaves behind one from its confidence on.

        Args:
            sessions: of the models of a chain, or of one.
            thresholds: between two of them each.

        Raises:
            BoardError: as those of `TensorRtChain`.
        """
        return TensorRtChain(self.cuda(), sessions, thresholds, list(sessions))


class TensorRtSession(object):
    """An engine on this GPU. Not for several threads."""

    def __init__(self, trt: Any, cuda: Any, plan: bytes, seed: int, warnings: List[str]) -> None:
        """Loads an engine; its inputs get random values that are the same every time.

        Raises:
            BoardError: `build_failed`: it does not fit this GPU, driver or TensorRT; `out_of_memory`; `unsupported`.
        """
        self.build_s = 0.0
        self.engine_bytes = len(plan)
        self.warnings = warnings
        self._trt = trt
        self._cuda = cuda
        self._lines: Any = deque(maxlen=KEPT_LINES)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self.stream: Any = None
        self._graph: Any = None
        self._tensors: List[Dict[str, Any]] = []
        self._used_s = float("-inf")  # when the last timing ended
        try:
            self._open(plan, random.Random(seed))
        except Exception:  # the process goes on: what was taken has to be given back
            try:
                self.close()
            except BoardError:  # CUDA refuses everything after some errors; the first one is the reason
                pass
            raise

    def _open(self, plan: bytes, rng: random.Random) -> None:
        self._logger = make_logger(self._trt, self._lines)
        try:
            self._runtime = self._trt.Runtime(self._logger)  # kept while the engine lives
        except TypeError as e:  # "factory function returned nullptr": why, only the log says
            raise self._failure("build_failed", "TensorRT %s cannot start: %s" % (self._trt.__version__, e)) from e
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            what = "the engine does not fit this GPU, driver or TensorRT %s" % self._trt.__version__
            raise self._failure("build_failed", what)
        self._context = self._new_context()
        self.stream = self._cuda.stream()
        self._bind()
        for tensor in self._tensors:
            if tensor["is_input"]:
                tensor["host"].view[:] = random_bytes(tensor["dtype"], tensor["count"], rng)
        self._upload()

    def inputs(self) -> List[Dict[str, Any]]:
        """Name, dtype and shape of each input."""
        return [self._described(tensor) for tensor in self._tensors if tensor["is_input"]]

    def set_inputs(self, feeds: Dict[str, bytes]) -> None:
        """Values of inputs by name, raw in C order; the others keep theirs.

        Raises:
            BoardError: `bad_request`: no such input, or another number of bytes.
        """
        known = {tensor["name"]: tensor for tensor in self._tensors if tensor["is_input"]}
        for name, data in feeds.items():
            if name not in known:
                raise BoardError("bad_request", "no input %r; inputs: %s" % (name, ", ".join(sorted(known))))
            if len(data) != known[name]["bytes"]:
                raise BoardError(
                    "bad_request", "input %r takes %d bytes, got %d" % (name, known[name]["bytes"], len(data))
                )
            known[name]["host"].view[:] = data
        self._upload()

    def time(self, runs: int, warmup: int = 0) -> Dict[str, Any]:
        """Times of the GPU for `runs` inferences.

        Args:
            runs: inferences, each between two events.
            warmup: inferences before them at least; where the GPU was idle there are at least 200 ms of them.

        Returns:
            `samples_ms`: of the GPU; `host_ms`: inside the call that queues an inference; `single_ms`: from calling to
            having waited, inference by inference; `cuda_graph`; `enqueue_bound`: whether queueing takes about as long
            as the inference itself.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        self.make_ready()
        self._warm_up(warmup)
        inner = 1
        trial, _ = self._timed(IN_FLIGHT, 1)
        if statistics.median(trial) < SHORT_MS:
            inner = SHORT_REPEATS
        samples, host = self._timed(runs, inner)
        single = []
        for _ in range(min(runs, TRANSFER_RUNS)):
            began = time.perf_counter()
            self.launch()
            self._cuda.synchronize(self.stream)
            single.append(1e3 * (time.perf_counter() - began))
        self._used_s = time.perf_counter()
        return {
            "samples_ms": samples,
            "host_ms": host,
            "single_ms": single,
            "clock": "cuda_event",
            "cuda_graph": self._graph is not None,
            "enqueue_bound": statistics.median(host) >= ENQUEUE_BOUND * statistics.median(samples),
        }

    def make_ready(self) -> None:
        """Runs once, which loads kernels, and captures the inference as a graph where that can be done.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        self._enqueue(self._context)
        self._cuda.synchronize(self.stream)
        if self._graph is None:
            self._graph = self._cuda.capture(self.stream, lambda: self._queued(self._context))

    def launch(self) -> None:
        """Queues an inference.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        if self._graph is not None:
            self._cuda.launch(self._graph, self.stream)
        else:
            self._enqueue(self._context)

    def tensors(self, is_input: bool) -> List[Dict[str, Any]]:
        """Inputs, or outputs, with their `bytes` and where they lie on the device (`device`)."""
        return [tensor for tensor in self._tensors if tensor["is_input"] == is_input]

    def read_from(self, source: Dict[str, Any]) -> None:
        """Takes as its only input what another engine writes, where it lies; before the first inference.

        Args:
            source: of that engine's `tensors`; it has to live as long as this session is used.

        Raises:
            BoardError: `unsupported`: they are not alike, or there are other inputs.
        """
        inputs = self.tensors(is_input=True)
        if len(inputs) != 1 or any(inputs[0][name] != source[name] for name in ("dtype", "shape")):
            told = ", ".join("%s %s %r" % (t["name"], t["dtype"], t["shape"]) for t in inputs)
            given = "%s %s %r" % (source["name"], source["dtype"], source["shape"])
            raise BoardError("unsupported", "an engine takes %s, the one before it gives %s" % (told, given))
        own, inputs[0]["device"], inputs[0]["is_shared"] = inputs[0]["device"], source["device"], True
        self._cuda.free(own)
        self._set_addresses(self._context)

    def place(self, data: bytes) -> None:
        """Queues the copy of its first input and does not wait; nothing may be queued before that is not done."""
        (tensor, *_) = self.tensors(is_input=True)
        tensor["host"].view[:] = data
        self._copy_in(tensor)

    def fetched(self, tensor: Dict[str, Any], event: Any) -> memoryview:
        """An output of the inference that was queued last, as soon as it is there; `event` is used to wait for it.

        The host spins: how CUDA waits by itself depends on the power mode of a Jetson.
        """
        self._copy_out(tensor)
        self._cuda.record(event, self.stream)
        while not self._cuda.is_done(event):
            pass
        view: memoryview = tensor["host"].view
        return view

    def transfer_ms(self) -> float:
        """Median time of copying inputs and outputs of an inference.

        Raises:
            BoardError: CUDA refuses.
        """
        cuda, stream = self._cuda, self.stream
        start, end = cuda.event(), cuda.event()
        values = []
        for _ in range(TRANSFER_RUNS):
            cuda.record(start, stream)
            for tensor in self._tensors:
                copy = self._copy_in if tensor["is_input"] else self._copy_out
                copy(tensor)
            cuda.record(end, stream)
            cuda.synchronize(stream)
            values.append(cuda.elapsed_ms(start, end))
        cuda.free_event(start)
        cuda.free_event(end)
        return float(statistics.median(values))

    def run_only(self, runs: int) -> None:
        """Runs so many inferences, a few in flight, and does nothing else; nothing is timed.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        for i in range(1, runs + 1):
            self.launch()
            if i % IN_FLIGHT == 0 or i == runs:
                self._cuda.synchronize(self.stream)
        self._used_s = time.perf_counter()

    def outputs(self) -> List[Dict[str, Any]]:
        """Runs once; name, dtype, shape and bytes of each output.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        self._enqueue(self._context)
        self._download()
        found = []
        for tensor in self._tensors:
            if not tensor["is_input"]:
                found.append(dict(self._described(tensor), data=bytes(tensor["host"].view)))
        return found

    def profile(self, runs: int = PROFILE_RUNS) -> List[Dict[str, Any]]:
        """Median time of each layer of the engine, with what the inspector tells of it.

        In a context of its own: a profiler makes the queueing of an inference wait. Layers of one name are told apart
        by their order, which is the same in each inference.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        context = self._new_context()
        times = make_profiler(self._trt)
        context.profiler = times
        self._set_addresses(context)
        self._enqueue(context)
        self._cuda.synchronize(self.stream)
        collected: List[List[Tuple[str, float]]] = []
        for _ in range(runs):
            del times.rows[:]
            self._enqueue(context)
            self._cuda.synchronize(self.stream)
            collected.append(list(times.rows))
        if not collected or not collected[0]:
            raise BoardError("unsupported", "TensorRT %s reported no layers" % self._trt.__version__)
        told = {layer["name"]: layer for layer in self._inspected(context)}
        rows = []
        for i, (name, _) in enumerate(collected[0]):
            facts = told.get(name, {})
            values = [run[i][1] for run in collected if len(run) == len(collected[0])]
            rows.append(
                {
                    "name": name,
                    "median_ms": statistics.median(values),
                    "metadata": facts.get("metadata", ""),
                    "type": facts.get("type", ""),
                    "origin": facts.get("origin", ""),
                }
            )
        return rows

    def close(self) -> None:
        """Gives memory back; the engine goes before the runtime."""
        if self._graph is not None:
            self._cuda.free_graph(self._graph)
            self._graph = None
        for tensor in self._tensors:
            if not tensor["is_shared"]:
                self._cuda.free(tensor["device"])
            if tensor["host"] is not None:
                self._cuda.free_host(tensor["host"])
        self._tensors = []
        if self.stream is not None:
            self._cuda.free_stream(self.stream)
            self.stream = None
        self._context = None
        self._engine = None
        self._runtime = None

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._failure("out_of_memory", "TensorRT could not make an execution context")
        return context

    def _failure(self, kind: str, what: str) -> BoardError:
        """The error of a call that TensorRT refused, with what it logged; memory that was short is told as such."""
        if not self._lines:
            return BoardError(kind, what)
        told = failure_of("\n".join(self._lines), None, what)
        return BoardError(kind, told.message) if told.kind == "build_failed" else told

    def _bind(self) -> None:
        """Buffers of every input and output, in the engine's order."""
        for name, is_input, kind, shape in self._named():
            dtype, width = dtype_of(self._trt, kind, name)
            if any(size < 0 for size in shape):
                raise BoardError("unsupported", "tensor %r has the free shape %s; write it static" % (name, shape))
            count = 1
            for size in shape:
                count *= size
            tensor = {
                "name": name,
                "is_input": is_input,
                "dtype": dtype,
                "shape": shape,
                "count": count,
                "bytes": count * width,
                "device": self._cuda.alloc(count * width),
                "is_shared": False,
                "host": None,
            }
            self._tensors.append(tensor)  # at once: `close` frees what there is, also when the next call fails
            tensor["host"] = self._cuda.host_buffer(count * width)
        self._set_addresses(self._context)

    def _named(self) -> List[Tuple[str, bool, Any, List[int]]]:
        engine, trt = self._engine, self._trt
        if hasattr(trt.ICudaEngine, "num_io_tensors"):
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            return [
                (
                    name,
                    engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                    engine.get_tensor_dtype(name),
                    [int(size) for size in self._context.get_tensor_shape(name)],
                )
                for name in names
            ]
        return [
            (
                engine.get_binding_name(i),
                engine.binding_is_input(i),
                engine.get_binding_dtype(i),
                [int(size) for size in self._context.get_binding_shape(i)],
            )
            for i in range(engine.num_bindings)
        ]

    def _set_addresses(self, context: Any) -> None:
        if hasattr(self._trt.ICudaEngine, "num_io_tensors"):
            for tensor in self._tensors:
                context.set_tensor_address(tensor["name"], int(tensor["device"]))

    def _queued(self, context: Any) -> bool:
        if hasattr(self._trt.ICudaEngine, "num_io_tensors"):
            return bool(context.execute_async_v3(int(self.stream)))
        addresses = [int(tensor["device"]) for tensor in self._tensors]
        return bool(context.execute_async_v2(bindings=addresses, stream_handle=int(self.stream)))

    def _enqueue(self, context: Any) -> None:
        if not self._queued(context):
            raise self._failure("build_failed", "TensorRT refused to run the engine")

    def _warm_up(self, least: int) -> None:
        is_warm = time.perf_counter() - self._used_s < WARM_FOR_S  # between the rounds of one measurement
        until = time.perf_counter() + (0.0 if is_warm else WARMUP_S)
        done = 0
        while done < least or time.perf_counter() < until:
            self.launch()
            self._cuda.synchronize(self.stream)
            done += 1

    def _timed(self, runs: int, inner: int) -> Tuple[List[float], List[float]]:
        """Times of the GPU and of queueing, ms for one inference; `inner` of them between two events."""
        cuda, stream = self._cuda, self.stream
        events = [(cuda.event(), cuda.event()) for _ in range(IN_FLIGHT)]
        samples: List[float] = []
        host: List[float] = []
        try:
            while len(samples) < runs:
                batch = events[: runs - len(samples)]
                for start, end in batch:
                    cuda.record(start, stream)
                    began = time.perf_counter()
                    for _ in range(inner):
                        self.launch()
                    host.append(1e3 * (time.perf_counter() - began) / inner)
                    cuda.record(end, stream)
                while not cuda.is_done(batch[-1][1]):  # spins: a thread that sleeps wakes late
                    pass
                samples += [cuda.elapsed_ms(start, end) / inner for start, end in batch]
        finally:
            for start, end in events:
                cuda.free_event(start)
                cuda.free_event(end)
        return samples, host

    def _upload(self) -> None:
        for tensor in self._tensors:
            if tensor["is_input"] and not tensor["is_shared"]:
                self._copy_in(tensor)
        self._cuda.synchronize(self.stream)

    def _download(self) -> None:
        for tensor in self._tensors:
            if not tensor["is_input"]:
                self._copy_out(tensor)
        self._cuda.synchronize(self.stream)

    def _copy_in(self, tensor: Dict[str, Any]) -> None:
        self._cuda.upload(tensor["device"], tensor["host"], tensor["bytes"], self.stream)

    def _copy_out(self, tensor: Dict[str, Any]) -> None:
        self._cuda.download(tensor["host"], tensor["device"], tensor["bytes"], self.stream)

    def _inspected(self, context: Any) -> List[Dict[str, str]]:
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = context  # for the shapes
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        try:
            return layers_of(text)
        except BoardError:  # times without what they belong to are still times
            self.warnings.append("the engine inspector gave no readable layers")
            return []

    def _described(self, tensor: Dict[str, Any]) -> Dict[str, Any]:
        return {"name": tensor["name"], "dtype": tensor["dtype"], "shape": list(tensor["shape"])}


def import_tensorrt() -> Any:
    """The `tensorrt` module.

    Raises:
        BoardError: `not_found`, with the command that installs it.
    """
    try:
        import tensorrt as trt
    except Exception as e:  # also OSError, of a library that cannot be loaded; of a broken one whatever it raises
        raise BoardError(
            "not_found",
            "the Python module tensorrt cannot be imported (%s). On JetPack: apt-get install python3-libnvinfer "
            "(a virtual environment needs --system-site-packages); elsewhere: pip install 'nas[tensorrt]'"
            % (e if isinstance(e, ImportError) else "%s: %s" % (type(e).__name__, e)),
        ) from e
    return trt


def version_of(trt: Any) -> Tuple[int, int, int]:
    """The first three numbers of the module's version; suffixes such as .post1 do not matter."""
    numbers = []
    for part in str(trt.__version__).split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        numbers.append(int(digits))
    major, minor, patch = (numbers + [0, 0, 0])[:3]
    return major, minor, patch


def make_logger(trt: Any, lines: Any) -> Any:
    """A logger that appends warnings and errors as `[W] ...` and `[E] ...` to `lines`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                lines.append("[E] " + msg)
            elif severity == trt.ILogger.WARNING:
                lines.append("[W] " + msg)

    return Logger()


def make_profiler(trt: Any) -> Any:
    """A profiler that keeps (layer, ms) of every report in `rows`."""

    class LayerTimes(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.rows: List[Tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.rows.append((layer_name, ms))

    return LayerTimes()


def dtype_of(trt: Any, kind: Any, name: str) -> Tuple[str, int]:
    """Our name of a DataType, and bytes of one element.

    Raises:
        BoardError: `unsupported`.
    """
    for member, dtype, width, _ in DTYPES:
        if getattr(trt.DataType, member, None) == kind:
            return dtype, width
    raise BoardError("unsupported", "tensor %r has the type %s, which has no form on the host" % (name, kind))


def random_bytes(dtype: str, count: int, rng: random.Random) -> bytes:
    """So many random elements: numbers in 0..1, integers in 0..127."""
    letter = {name: code for _, name, _, code in DTYPES}[dtype]
    if dtype in ("float32", "float16"):
        return struct.pack("=%d%s" % (count, letter), *[rng.random() for _ in range(count)])
    if dtype == "bfloat16":  # the upper half of a float32
        return b"".join(struct.pack("<f", rng.random())[2:] for _ in range(count))
    values = [rng.randrange(2 if dtype == "bool" else 128) for _ in range(count)]
    return struct.pack("=%d%s" % (count, letter), *values)


def build(trt: Any, request: Dict[str, Any], lines: Optional[List[str]] = None) -> Dict[str, Any]:
    """Builds an engine and writes it: what the process of its own does.

    Args:
        trt: the module.
        request: `model`, `engine`: paths; `precision`; `typing`; `workspace_mib`; `timing_cache`: a path or None.
        lines: takes what TensorRT logs, which is all that there is where it raises something that says nothing.

    Returns:
        `warnings`, `typing`, and the `precision` that it was built in.

    Raises:
        BoardError: `build_failed`, `out_of_memory`, `bad_request`, `unsupported`.
    """
    with open(request["model"], "rb") as file:
        model = file.read()
    lines = [] if lines is None else lines
    logger = make_logger(trt, lines)
    facts = onnx_facts(model)
    precision = effective_precision(facts, request["precision"])
    weak = is_weak(version_of(trt), facts, precision, request["typing"])
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, weak))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BoardError("build_failed", "TensorRT %s cannot read the model: %s" % (trt.__version__, said))
    config = builder.create_builder_config()
    _configure(trt, config, request["workspace_mib"], precision if weak else "fp32")
    warnings: List[str] = []
    cache = _open_cache(config, request["timing_cache"], warnings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failure_of("\n".join(lines), None, "the builder made no engine")
    _write(request["engine"], bytes(plan))
    if cache is not None:
        _write(request["timing_cache"], bytes(config.get_timing_cache().serialize()))
    warnings += skipped_note("\n".join(lines))
    return {"warnings": warnings, "typing": "weak" if weak else "strong", "precision": precision}


def _network_flags(trt: Any, weak: bool) -> int:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if not weak and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _configure(trt: Any, config: Any, workspace_mib: int, flagged: str) -> None:
    """Settings of a build; `flagged`: the precision to be asked for by flags, fp32 where none is needed."""
    size = workspace_mib << 20
    if hasattr(trt.IBuilderConfig, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    else:
        config.max_workspace_size = size
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.avg_timing_iterations = TIMING_ITERATIONS
    if hasattr(trt.IBuilderConfig, "builder_optimization_level"):
        config.builder_optimization_level = OPTIMIZATION_LEVEL
    if flagged == "fp32":
        return
    # int8 alone would run everything that is not quantized in fp32
    wanted = {"fp16": ("FP16",), "bf16": ("BF16",)}.get(flagged, ("INT8", "FP16"))
    for name in wanted:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise BoardError("unsupported", "TensorRT %s has no %s flag" % (trt.__version__, name))
        config.set_flag(flag)


def _open_cache(config: Any, path: Optional[str], warnings: List[str]) -> Any:
    """The timing cache of earlier builds, or an empty one where that was made by another GPU or TensorRT."""
    if not path:
        return None
    saved = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            saved = file.read()
    cache = config.create_timing_cache(saved)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        warnings.append("the timing cache is of another GPU, CUDA or TensorRT; a new one was begun")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _write(path: str, data: bytes) -> None:
    """Replaces a file as a whole: another build may read it."""
    part = "%s.%d.part" % (path, os.getpid())
    with open(part, "wb") as file:
        file.write(data)
    os.replace(part, path)


def _built(request: Dict[str, Any]) -> Dict[str, Any]:
    lines: List[str] = []
    try:
        return build(import_tensorrt(), request, lines)
    except (BoardError, MemoryError, OSError):
        raise
    except Exception as e:  # what the bindings raise names a C++ function; why, only the log says
        error = as_board_error(e, "build_failed")
        raise (failure_of("\n".join(lines), None, error.message) if lines else error) from e


def main() -> None:
    """The process that builds: its last argument is the request; it writes a report."""
    request = json.loads(sys.argv[-1])
    try:
        told = _built(request)
    except (BoardError, MemoryError, OSError) as e:  # OSError: such as a full disk, which says nothing about the model
        error = as_board_error(e, "not_found")
        told = {"kind": error.kind, "error": error.message, "warnings": []}
    _write(request["report"], json.dumps(told).encode("utf-8"))
