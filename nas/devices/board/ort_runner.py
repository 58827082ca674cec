"""ONNX Runtime on a board's processor: every version from 1.6 (Python 3.6) on, by feature and not by number.

With one thread all work is on the calling thread, and a sample is that thread's processor time; with more it is wall
time and `cpu_share` still says whether the calling thread kept its core.
"""

import re
import time
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from .errors import BoardError, as_board_error

PROVIDER = "CPUExecutionProvider"
_FATAL_ONLY = 4  # log severity: errors come as exceptions
_SPINNING_US = 200  # how long worker threads wait for work; see `waiting_option` of nas/devices/onnxruntime_cpu.py

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeRunner(object):
    """The processor of this board through ONNX Runtime."""

    name = "onnxruntime"
    slow_start = False  # a session is made in milliseconds: several for each network, many alive at once
    dynamic_batch = True  # takes models whose batch is not fixed
    streams_by = name

    def available(self) -> Optional[str]:
        """None, or what is missing on this board."""
        for module in ("numpy", "onnxruntime"):
            try:
                __import__(module)
            except Exception as e:  # a package of the wrong architecture fails in any way
                return "python3 on this board cannot import %s: %s" % (module, as_board_error(e, "not_found").message)
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return "ONNX Runtime %s on this board has no %s" % (onnxruntime.__version__, PROVIDER)
        return None

    def describe(self) -> Dict[str, Any]:
        """Runtime, version and precisions, for the device's profile."""
        import numpy
        import onnxruntime

        return {
            "runtime": "ort",
            "version": str(onnxruntime.__version__),
            "precisions": ["fp32", "int8"],  # fp16 would run in fp32 with casts around it
            "details": {"numpy": str(numpy.__version__)},
        }

    def load(self, model_path: str, options: Dict[str, Any]) -> "OnnxRuntimeSession":
        """A session of a model file.

        Args:
            model_path: an ONNX file.
            options: `seed` of random inputs and `threads` count here; others are for runtimes that build engines.

        Raises:
            BoardError: the runtime refuses the model.
        """
        started = time.perf_counter()
        try:
            session = _session(model_path, int(options.get("threads", 1)))
        except Exception as e:  # the runtime's exceptions have no common base of their own
            raise as_board_error(e, "build_failed") from e
        seed, threads = int(options.get("seed", 0)), int(options.get("threads", 1))
        return OnnxRuntimeSession(session, seed, threads, time.perf_counter() - started)

    def chain(self, sessions: List["OnnxRuntimeSession"], thresholds: List[float]) -> "OnnxRuntimeChain":
        """Sessions one behind the other; an image leaves behind one from its confidence on.

        Args:
            sessions: of the models of a chain, or of one that decides by itself.
            thresholds: between two of them each.
        """
        return OnnxRuntimeChain(sessions, thresholds)


class OnnxRuntimeSession(object):
    """A model ready to run."""

    engine_bytes = 0  # there is no engine beside the model file

    def __init__(self, session: Any, seed: int, threads: int, build_s: float) -> None:
        self.build_s = build_s
        self.warnings = []  # type: List[str]
        self._session = session
        self._seed = seed
        self._threads = threads
        self._feeds = {}  # type: Dict[str, bytes]
        self._run = None  # type: Optional[Callable[[], Any]]

    def inputs(self) -> List[Dict[str, Any]]:
        """Name, dtype and shape of each input; None in a shape is a size that is not fixed."""
        return [_described(entry) for entry in self._session.get_inputs()]

    def set_inputs(self, feeds: Dict[str, bytes]) -> None:
        """Sets inputs by name, C order; the rest are random values that are the same every time.

        Raises:
            BoardError: an input that the model does not have, or bytes that do not fit it.
        """
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        optional = {entry.name: entry for entry in self._session.get_overridable_initializers()}
        for name in feeds:
            if name not in inputs and name not in optional:
                known = ", ".join(list(inputs) + list(optional))
                raise BoardError("bad_request", "no input %r in the model; inputs: %s" % (name, known))
        self._feeds = dict(feeds)
        self._run = None

    def time(self, runs: int, warmup: int) -> Dict[str, Any]:
        """Times single runs, milliseconds; see the top of the module for the clock."""
        run = self._ready()
        for _ in range(warmup):
            run()
        wall, cpu = time.perf_counter, _thread_seconds()
        now = cpu if self._threads == 1 and cpu is not None else wall
        samples, host = [], []
        wall_start, cpu_start = wall(), cpu() if cpu is not None else 0.0
        for _ in range(runs):
            start = now()
            run()
            samples.append(now() - start)
        wall_total = wall() - wall_start
        share = 1.0 if cpu is None or wall_total <= 0 else min(1.0, (cpu() - cpu_start) / wall_total)
        host.append(1e3 * wall_total / runs)
        return {
            "samples_ms": [round(1e3 * s, 6) for s in samples],
            "host_ms": host,
            "clock": "wall" if now is wall else "thread_cpu",
            "cpu_share": share,
            "cuda_graph": False,
            "enqueue_bound": False,
        }

    def run_only(self, runs: int) -> None:
        """Runs so many inferences and does nothing else; nothing is timed."""
        run = self._ready()
        for _ in range(runs):
            run()

    def outputs(self) -> List[Dict[str, Any]]:
        """Runs once and gives the outputs: name, dtype, shape, and the bytes in C order.

        Raises:
            BoardError: the runtime cannot run it.
        """
        import numpy

        try:
            values = self._session.run(None, self._arrays())
        except Exception as e:  # as in `load`
            raise as_board_error(e, "build_failed") from e
        found = []
        for entry, value in zip(self._session.get_outputs(), values):
            array = numpy.ascontiguousarray(value)
            shape = list(numpy.shape(value))  # ascontiguousarray makes a scalar a vector
            found.append({"name": entry.name, "dtype": str(array.dtype), "shape": shape, "data": array.tobytes()})
        return found

    def profile(self, runs: int) -> List[Dict[str, Any]]:
        """Not offered by this runtime in a form that could be compared."""
        raise BoardError(
            "unsupported", "ONNX Runtime gives no time per layer of %d runs; choose a TensorRT runner" % runs
        )

    def close(self) -> None:
        """Frees the session."""
        self._run = None
        self._session = None

    def _arrays(self) -> Dict[str, Any]:
        import numpy

        rng = numpy.random.RandomState(self._seed)
        named = {}
        for entry in self._session.get_inputs():
            named[entry.name] = _array(entry, self._feeds.get(entry.name), rng)
        for entry in self._session.get_overridable_initializers():
            if entry.name in self._feeds:
                named[entry.name] = _array(entry, self._feeds[entry.name], rng)
        return named

    def _ready(self) -> Callable[[], Any]:
        if self._run is None:
            arrays, session = self._arrays(), self._session
            self._run = _bound(session, arrays) or (lambda: session.run(None, arrays))
        return self._run


class OnnxRuntimeChain(object):
    """Sessions one behind the other; the feature map of one is the input of the next."""

    def __init__(self, sessions: List[OnnxRuntimeSession], thresholds: List[float]) -> None:
        import numpy

        self._sessions = sessions
        self._thresholds = [numpy.float32(threshold) for threshold in thresholds]
        self._left = 0
        entry = sessions[0]._session.get_inputs()[0]
        if entry.type not in _DTYPES:
            raise BoardError("unsupported", "input %r is a %s; only plain tensors are taken" % (entry.name, entry.type))
        image = numpy.zeros(_shape(entry, None), numpy.dtype(_DTYPES[entry.type]))
        self._like = image
        plain = [session._session for session in sessions]
        self._steps = _BoundSteps(plain, image) if _can_bind(plain[0]) else _PlainSteps(plain, image)  # type: Any

    def input(self) -> Dict[str, Any]:
        """Name, dtype and shape of the image."""
        return dict(self._sessions[0].inputs()[0], shape=list(self._like.shape))

    def time(self, images: Iterable[bytes]) -> Dict[str, Any]:
        """Puts one image after the other into place, which is not timed, and times its way.

        Args:
            images: raw values as the input takes them, C order.

        Returns:
            As `OnnxRuntimeSession.time`; `exits`: the number of the session behind which each image left, or what one
            session alone says itself.
        """
        import numpy

        wall, cpu = time.perf_counter, _thread_seconds()
        now = cpu if self._sessions[0]._threads == 1 and cpu is not None else wall
        samples, exits = [], []
        used_s = passed_s = 0.0
        for data in images:
            self._steps.place(numpy.frombuffer(data, dtype=self._like.dtype).reshape(self._like.shape))
            cpu_start, wall_start = cpu() if cpu is not None else 0.0, wall()
            start = now()
            self._run()
            samples.append(now() - start)
            passed_s += wall() - wall_start
            used_s += cpu() - cpu_start if cpu is not None else 0.0
            exits.append(self._steps.says() if len(self._sessions) == 1 else self._left)
        return {
            "samples_ms": [round(1e3 * s, 6) for s in samples],
            "exits": exits,
            "clock": "wall" if now is wall else "thread_cpu",
            "cpu_share": 1.0 if cpu is None or passed_s <= 0 else min(1.0, used_s / passed_s),
        }

    def close(self) -> None:
        """Frees the sessions."""
        self._steps = None
        for session in self._sessions:
            session.close()

    def _run(self) -> None:
        for number, threshold in enumerate(self._thresholds):
            self._steps.run(number)
            if self._steps.confidence(number) >= threshold:  # in float32, in which the exported graphs compare
                self._left = number
                return
        self._left = len(self._thresholds)
        self._steps.run(self._left)


class _BoundSteps(object):
    """Sessions whose inputs and outputs are bound beforehand: nothing is copied from one to the next."""

    def __init__(self, sessions: List[Any], image: Any) -> None:
        import numpy
        import onnxruntime

        self._image = features = onnxruntime.OrtValue.ortvalue_from_numpy(image)
        self._runs, self._surest = [], []  # type: List[Any], List[Any]
        self._said = None  # type: Any
        for session in sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input(session.get_inputs()[0].name, features)
            for entry in session.get_outputs():
                kind = numpy.dtype(_DTYPES[entry.type]).type
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(entry.shape), kind)
                binding.bind_ortvalue_output(entry.name, value)
                if entry.name == "confidence":
                    self._surest.append(value)
                elif entry.name == "exit_index":
                    self._said = value
                elif len(entry.shape) == 4:
                    features = value
            self._runs.append(partial(session.run_with_iobinding, binding))

    def place(self, image: Any) -> None:
        self._image.update_inplace(image)

    def run(self, number: int) -> None:
        self._runs[number]()

    def confidence(self, number: int) -> Any:
        return self._surest[number].numpy()[0]

    def says(self) -> int:
        return 0 if self._said is None else int(self._said.numpy())


class _PlainSteps(object):
    """The same for versions of the runtime that cannot bind."""

    def __init__(self, sessions: List[Any], image: Any) -> None:
        self._runs = [partial(session.run, None) for session in sessions]
        self._inputs = [session.get_inputs()[0].name for session in sessions]
        self._names = [[entry.name for entry in session.get_outputs()] for session in sessions]
        self._features = image
        self._told = {}  # type: Dict[str, Any]

    def place(self, image: Any) -> None:
        self._features = image

    def run(self, number: int) -> None:
        values = self._runs[number]({self._inputs[number]: self._features})
        self._told = dict(zip(self._names[number], values))
        for value in values:
            if len(value.shape) == 4:
                self._features = value

    def confidence(self, number: int) -> Any:  # noqa: ARG002
        return self._told["confidence"][0]

    def says(self) -> int:
        return int(self._told.get("exit_index", 0))


def _can_bind(session: Any) -> bool:
    """Whether this version of the runtime binds values that can be replaced in place."""
    import onnxruntime

    return (
        hasattr(session, "io_binding")
        and hasattr(session.io_binding(), "bind_ortvalue_input")
        and hasattr(getattr(onnxruntime, "OrtValue", None), "update_inplace")
    )


def _bound(session: Any, arrays: Dict[str, Any]) -> Optional[Callable[[], Any]]:
    """A run with inputs and outputs bound beforehand, or None where this version of the runtime cannot do that."""
    import onnxruntime

    if not hasattr(session, "io_binding") or not hasattr(onnxruntime, "OrtValue"):
        return None
    binding = session.io_binding()
    if not hasattr(binding, "bind_ortvalue_input"):
        return None
    for name, array in arrays.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for entry in session.get_outputs():
        shape = list(entry.shape)
        if entry.type in _DTYPES and all(isinstance(n, int) for n in shape):
            import numpy

            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, numpy.dtype(_DTYPES[entry.type]).type)
            binding.bind_ortvalue_output(entry.name, value)
        else:
            binding.bind_output(entry.name, "cpu")
    run = session.run_with_iobinding
    return lambda: run(binding)


def _session(model_path: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        known = tuple(int(n) for n in re.findall(r"\d+", onnxruntime.__version__)[:2])
        if known >= (1, 26):
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPINNING_US))
        elif known >= (1, 12):
            options.add_session_config_entry("session.force_spinning_stop", "1")
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    return onnxruntime.InferenceSession(model_path, options, providers=[PROVIDER])


def _described(entry: Any) -> Dict[str, Any]:
    shape = [n if isinstance(n, int) else None for n in entry.shape]
    return {"name": entry.name, "dtype": _DTYPES.get(entry.type, entry.type), "shape": shape}


def _array(entry: Any, given: Optional[bytes], rng: Any) -> Any:
    import numpy

    if entry.type not in _DTYPES:
        raise BoardError("unsupported", "input %r is a %s; only plain tensors are taken" % (entry.name, entry.type))
    dtype = numpy.dtype(_DTYPES[entry.type])
    shape = _shape(entry, None if given is None else len(given) // dtype.itemsize)
    if given is not None:
        count = 1
        for n in shape:
            count *= n
        if len(given) != count * dtype.itemsize:
            raise BoardError(
                "bad_request",
                "input %r takes %r (%d bytes), got %d bytes" % (entry.name, shape, count * dtype.itemsize, len(given)),
            )
        return numpy.frombuffer(given, dtype=dtype).reshape(shape)
    if dtype.kind == "f":
        return rng.random_sample(shape).astype(dtype)
    return rng.randint(0, 2 if dtype.kind == "b" else 128, shape).astype(dtype)


def _shape(entry: Any, count: Optional[int]) -> Tuple[int, ...]:
    """The shape of an input: a batch that is not fixed is 1, or what fits `count` values."""
    rest = [n for axis, n in enumerate(entry.shape) if axis or isinstance(n, int)]
    if not all(isinstance(n, int) for n in rest):
        raise BoardError(
            "unsupported",
            "input %r has the dynamic shape %r; only the batch may be dynamic" % (entry.name, list(entry.shape)),
        )
    if len(rest) == len(entry.shape):
        return tuple(rest)
    each = 1
    for n in rest:
        each *= n
    return tuple([1 if count is None or not each else max(1, count // each)] + rest)


def _thread_seconds() -> Optional[Callable[[], float]]:
    """Processor time of this thread, seconds; None where the system does not tell."""
    clock = getattr(time, "CLOCK_THREAD_CPUTIME_ID", None)
    if clock is None:
        return None
    return lambda: time.clock_gettime(clock)
