"""The little of CUDA that timing an engine needs, through whichever binding is there.

Tried in this order: cuda-python (`cuda.bindings.runtime`, before 12.9 `cuda.cudart`), ctypes on libcudart, pycuda. The
first two work in the primary context, which TensorRT uses too, and have CUDA graphs; pycuda has no graph functions, so
it comes last, and needs 2025.1.2 for CUDA 13.

Every implementation has the methods of `Runtime`: pointers, streams, events and graphs are what `Runtime` says.
"""

import ctypes
import ctypes.util
import glob
import os
import sys
from typing import Any, Callable, List, Optional, Tuple

from .errors import BoardError, as_board_error

# Values of CUDA's C interface, which never change (cuda_runtime_api.h, cuda.h).
_SUCCESS, _NOT_READY, _OUT_OF_MEMORY = 0, 600, 2
_TO_DEVICE, _TO_HOST = 1, 2
_NON_BLOCKING_STREAM = 1
_THREAD_LOCAL_CAPTURE = 1
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76
_INSTANTIATE_WITH_3_FROM = 12000  # cudaGraphInstantiate: five arguments before CUDA 12, three from it on

LIBRARIES = (
    "libcudart.so",
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so.11.0",
    "libcudart.so.10.2",
)
_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib", "/usr/lib/aarch64-linux-gnu")


class HostBuffer(object):
    """Page-locked memory of the host: an address, and a view to read and write bytes."""

    def __init__(self, address: int, view: memoryview, owner: Any) -> None:
        self.address = address
        self.view = view
        self.owner = owner  # keeps the memory alive


class Runtime(object):
    """CUDA through a binding; device pointers, streams, events and graphs are opaque to the caller.

    `int(stream)` and `int(pointer)` are the handles that TensorRT takes.
    """

    name = ""

    def version(self) -> int:
        """Version of the runtime: 12060 is 12.6."""
        raise BoardError("unsupported", "%s does not tell CUDA's version" % self.name)


class CtypesCuda(Runtime):
    """CUDA's runtime library through ctypes: nothing has to be installed."""

    name = "ctypes"

    def __init__(self, library: Any) -> None:
        """`library`: libcudart as ctypes.CDLL gives it."""
        self._lib = library
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p

    def version(self) -> int:
        number = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(number))
        return number.value

    def capability(self) -> Tuple[int, int]:
        """Compute capability of the first GPU."""
        found = []
        for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
            found.append(value.value)
        return found[0], found[1]

    def alloc(self, count: int) -> int:
        """Address of `count` bytes on the device."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, count)))
        return int(pointer.value or 0)

    def free(self, pointer: int) -> None:
        """Gives memory of the device back."""
        self._call("cudaFree", ctypes.c_void_p(pointer))

    def host_buffer(self, count: int) -> HostBuffer:
        """Page-locked memory of the host."""
        pointer = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, count)), ctypes.c_uint(0))
        address = int(pointer.value or 0)
        array = (ctypes.c_char * count).from_address(address)
        return HostBuffer(address, memoryview(array).cast("B"), pointer)

    def free_host(self, buffer: HostBuffer) -> None:
        """Gives page-locked memory back."""
        buffer.view.release()
        self._call("cudaFreeHost", ctypes.c_void_p(buffer.address))

    def upload(self, pointer: int, buffer: HostBuffer, count: int, stream: int) -> None:
        """Queues a copy to the device."""
        self._copy(pointer, buffer.address, count, _TO_DEVICE, stream)

    def download(self, buffer: HostBuffer, pointer: int, count: int, stream: int) -> None:
        """Queues a copy to the host."""
        self._copy(buffer.address, pointer, count, _TO_HOST, stream)

    def stream(self) -> int:
        """A stream of its own: the default one would synchronise with others."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), ctypes.c_uint(_NON_BLOCKING_STREAM))
        return int(handle.value or 0)

    def free_stream(self, stream: int) -> None:
        """Ends a stream."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Waits until everything in the stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """An event that keeps its time."""
        handle = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(handle), ctypes.c_uint(0))
        return int(handle.value or 0)

    def free_event(self, event: int) -> None:
        """Ends an event."""
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        """Queues the event."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def is_done(self, event: int) -> bool:
        """Whether the device has passed the event; asked again and again it spins instead of sleeping."""
        code = self._lib.cudaEventQuery(ctypes.c_void_p(event))
        if code not in (_SUCCESS, _NOT_READY):
            self._check("cudaEventQuery", code)
        return bool(code == _SUCCESS)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two events that were passed."""
        value = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(value), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return float(value.value)

    def capture(self, stream: int, work: Callable[[], bool]) -> Optional[Tuple[int, int]]:
        """What `work` queues, as a graph that can be launched; None where it cannot be captured."""
        handle, graph = ctypes.c_void_p(stream), ctypes.c_void_p()
        if self._lib.cudaStreamBeginCapture(handle, ctypes.c_int(_THREAD_LOCAL_CAPTURE)) != _SUCCESS:
            self._lib.cudaGetLastError()
            return None
        is_queued = work()
        code = self._lib.cudaStreamEndCapture(handle, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        if is_queued and code == _SUCCESS and graph.value:
            code = self._instantiate(executable, graph)
        if not is_queued or code != _SUCCESS or not executable.value:
            if graph.value:
                self._lib.cudaGraphDestroy(graph)
            self._lib.cudaGetLastError()  # a failed capture leaves an error that the next call would report
            return None
        return int(executable.value), int(graph.value or 0)

    def launch(self, graph: Tuple[int, int], stream: int) -> bool:
        """Queues a captured graph."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph[0]), ctypes.c_void_p(stream))
        return True

    def free_graph(self, graph: Tuple[int, int]) -> None:
        """Ends a graph."""
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph[0]))
        self._call("cudaGraphDestroy", ctypes.c_void_p(graph[1]))

    def _instantiate(self, executable: Any, graph: Any) -> int:
        if hasattr(self._lib, "cudaGraphInstantiateWithFlags"):
            flags = ctypes.c_ulonglong(0)
            return int(self._lib.cudaGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags))
        if self.version() >= _INSTANTIATE_WITH_3_FROM:
            return int(self._lib.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)))
        nothing = ctypes.c_void_p()
        return int(self._lib.cudaGraphInstantiate(ctypes.byref(executable), graph, nothing, nothing, ctypes.c_size_t()))

    def _copy(self, target: int, source: int, count: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(count),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._lib, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code != _SUCCESS:
            said = self._lib.cudaGetErrorString(ctypes.c_int(code))
            raise _failed(name, code, said.decode("utf-8", "replace") if said else "")


class CudaPython(Runtime):
    """CUDA through NVIDIA's cuda-python: each call gives a tuple, the error first."""

    name = "cuda-python"

    def __init__(self, cudart: Any) -> None:
        """`cudart`: the module `cuda.bindings.runtime`, or `cuda.cudart` of older releases."""
        self._rt = cudart

    def version(self) -> int:
        return int(self._call(self._rt.cudaRuntimeGetVersion()))

    def capability(self) -> Tuple[int, int]:
        """Compute capability of the first GPU."""
        attributes = self._rt.cudaDeviceAttr
        major = self._call(self._rt.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self._call(self._rt.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, 0))
        return int(major), int(minor)

    def alloc(self, count: int) -> int:
        """Address of `count` bytes on the device."""
        return int(self._call(self._rt.cudaMalloc(max(1, count))))

    def free(self, pointer: int) -> None:
        """Gives memory of the device back."""
        self._call(self._rt.cudaFree(pointer))

    def host_buffer(self, count: int) -> HostBuffer:
        """Page-locked memory of the host."""
        address = int(self._call(self._rt.cudaHostAlloc(max(1, count), 0)))
        array = (ctypes.c_char * count).from_address(address)
        return HostBuffer(address, memoryview(array).cast("B"), address)

    def free_host(self, buffer: HostBuffer) -> None:
        """Gives page-locked memory back."""
        buffer.view.release()
        self._call(self._rt.cudaFreeHost(buffer.address))

    def upload(self, pointer: int, buffer: HostBuffer, count: int, stream: Any) -> None:
        """Queues a copy to the device."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._rt.cudaMemcpyAsync(pointer, buffer.address, count, kind, stream))

    def download(self, buffer: HostBuffer, pointer: int, count: int, stream: Any) -> None:
        """Queues a copy to the host."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._rt.cudaMemcpyAsync(buffer.address, pointer, count, kind, stream))

    def stream(self) -> Any:
        """A stream of its own: the default one would synchronise with others."""
        return self._call(self._rt.cudaStreamCreateWithFlags(_NON_BLOCKING_STREAM))

    def free_stream(self, stream: Any) -> None:
        """Ends a stream."""
        self._call(self._rt.cudaStreamDestroy(stream))

    def synchronize(self, stream: Any) -> None:
        """Waits until everything in the stream is done."""
        self._call(self._rt.cudaStreamSynchronize(stream))

    def event(self) -> Any:
        """An event that keeps its time."""
        return self._call(self._rt.cudaEventCreateWithFlags(0))

    def free_event(self, event: Any) -> None:
        """Ends an event."""
        self._call(self._rt.cudaEventDestroy(event))

    def record(self, event: Any, stream: Any) -> None:
        """Queues the event."""
        self._call(self._rt.cudaEventRecord(event, stream))

    def is_done(self, event: Any) -> bool:
        """Whether the device has passed the event; asked again and again it spins instead of sleeping."""
        answer = self._rt.cudaEventQuery(event)
        if int(answer[0]) not in (_SUCCESS, _NOT_READY):
            self._call(answer)
        return int(answer[0]) == _SUCCESS

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that were passed."""
        return float(self._call(self._rt.cudaEventElapsedTime(start, end)))

    def capture(self, stream: Any, work: Callable[[], bool]) -> Any:
        """What `work` queues, as a graph that can be launched; None where it cannot be captured."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        if int(self._rt.cudaStreamBeginCapture(stream, mode)[0]) != _SUCCESS:
            self._rt.cudaGetLastError()
            return None
        is_queued = work()
        ended = self._rt.cudaStreamEndCapture(stream)
        if int(ended[0]) != _SUCCESS:
            self._rt.cudaGetLastError()  # a failed capture leaves an error that the next call would report
            return None
        # the one form of this call that is the same in 11.8, 12.9 and 13.2
        made = self._rt.cudaGraphInstantiateWithFlags(ended[1], 0) if is_queued else None
        if made is None or int(made[0]) != _SUCCESS:
            self._rt.cudaGraphDestroy(ended[1])
            self._rt.cudaGetLastError()
            return None
        return made[1], ended[1]

    def launch(self, graph: Any, stream: Any) -> bool:
        """Queues a captured graph."""
        self._call(self._rt.cudaGraphLaunch(graph[0], stream))
        return True

    def free_graph(self, graph: Any) -> None:
        """Ends a graph."""
        self._call(self._rt.cudaGraphExecDestroy(graph[0]))
        self._call(self._rt.cudaGraphDestroy(graph[1]))

    def _call(self, answer: Any) -> Any:
        code = int(answer[0])
        if code != _SUCCESS:
            raise _failed(str(answer[0]), code, "")
        return answer[1] if len(answer) > 1 else None


class PyCuda(Runtime):
    """CUDA through pycuda, which has no graph functions."""

    name = "pycuda"

    def __init__(self, driver: Any) -> None:
        """`driver`: the module pycuda.driver, with a context."""
        self._cuda = driver

    def version(self) -> int:
        major, minor = self._cuda.get_version()[:2]
        return int(major) * 1000 + int(minor) * 10

    def capability(self) -> Tuple[int, int]:
        """Compute capability of the first GPU."""
        major, minor = self._cuda.Device(0).compute_capability()
        return int(major), int(minor)

    def alloc(self, count: int) -> Any:
        """Memory of `count` bytes on the device."""
        return self._translated(lambda: self._cuda.mem_alloc(max(1, count)))

    def free(self, pointer: Any) -> None:
        """Gives memory of the device back."""
        pointer.free()

    def host_buffer(self, count: int) -> HostBuffer:
        """Page-locked memory of the host."""
        array = self._translated(lambda: self._cuda.pagelocked_empty(max(1, count), "uint8"))
        return HostBuffer(int(array.ctypes.data), memoryview(array)[:count], array)

    def free_host(self, buffer: HostBuffer) -> None:
        """Gives page-locked memory back: it goes with its array."""
        buffer.view.release()
        buffer.owner = None

    def upload(self, pointer: Any, buffer: HostBuffer, count: int, stream: Any) -> None:
        """Queues a copy to the device."""
        self._cuda.memcpy_htod_async(pointer, buffer.owner[:count], stream.owner)

    def download(self, buffer: HostBuffer, pointer: Any, count: int, stream: Any) -> None:
        """Queues a copy to the host."""
        self._cuda.memcpy_dtoh_async(buffer.owner[:count], pointer, stream.owner)

    def stream(self) -> Any:
        """A stream of its own: the default one would synchronise with others."""
        return _PyCudaStream(self._cuda.Stream())

    def free_stream(self, stream: Any) -> None:
        """Ends a stream: it goes with its object."""
        stream.owner = None

    def synchronize(self, stream: Any) -> None:
        """Waits until everything in the stream is done."""
        self._translated(stream.owner.synchronize)

    def event(self) -> Any:
        """An event that keeps its time."""
        return self._cuda.Event()

    def free_event(self, event: Any) -> None:
        """Ends an event: it goes with its object."""

    def record(self, event: Any, stream: Any) -> None:
        """Queues the event."""
        event.record(stream.owner)

    def is_done(self, event: Any) -> bool:
        """Whether the device has passed the event; asked again and again it spins instead of sleeping."""
        return bool(self._translated(event.query))

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that were passed."""
        return float(end.time_since(start))

    def capture(self, stream: Any, work: Callable[[], bool]) -> None:
        """None, always: pycuda cannot capture graphs, so it has no `launch` and no `free_graph`."""

    def _translated(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as e:  # pycuda's errors have no base that is there without it
            kind = "out_of_memory" if type(e).__name__ == "MemoryError" or "out of memory" in str(e) else "build_failed"
            raise BoardError(kind, "pycuda: %s" % e) from e


class _PyCudaStream(object):
    """A stream whose int() is its handle."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __int__(self) -> int:
        return int(self.owner.handle)


def find_cuda() -> Any:
    """The first binding that works here.

    Raises:
        BoardError: `not_found`: none does; the message says what was tried.
    """
    tried: List[str] = []
    for name, make in (("cuda-python", _cuda_python), ("libcudart", _ctypes_cuda), ("pycuda", _pycuda)):
        try:
            return _opened(make)
        except BoardError as e:
            tried.append("%s: %s" % (name, e.message))
    raise BoardError("not_found", "CUDA cannot be used from Python (%s)" % "; ".join(tried))


def _opened(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except BoardError:
        raise
    except Exception as e:  # a binding without its driver raises whatever it likes; the next one may do
        raise as_board_error(e, "not_found") from e


def _cuda_python() -> CudaPython:
    try:
        from cuda.bindings import runtime  # from 12.x; the only one from 13 on
    except ImportError:
        try:
            from cuda import cudart as runtime  # 11.x and early 12.x
        except ImportError as e:
            raise BoardError("not_found", "not installed") from e
    found = CudaPython(runtime)
    found._call(runtime.cudaSetDevice(0))
    return found


def _ctypes_cuda() -> CtypesCuda:
    library = load_cudart()
    found = CtypesCuda(library)
    found._call("cudaSetDevice", ctypes.c_int(0))
    return found


def load_cudart() -> Any:
    """libcudart, looked for by name and in the folders where JetPack and the toolkit put it.

    Raises:
        BoardError: `not_found`.
    """
    names = list(LIBRARIES)
    for folder in _FOLDERS:
        names += sorted(glob.glob(os.path.join(folder, "libcudart.so*")))
    for folder in sys.path:  # what package managers of Python install beside TensorRT
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcudart.so*")))
    known = ctypes.util.find_library("cudart")
    for name in names + ([known] if known else []):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BoardError("not_found", "no libcudart.so in the library path or %s" % ", ".join(_FOLDERS))


def _pycuda() -> PyCuda:
    try:
        import pycuda.driver as driver
    except ImportError as e:
        raise BoardError("not_found", "not installed") from e
    try:
        try:
            import pycuda.autoprimaryctx  # 2021.1 on: shares the context that TensorRT uses
        except ImportError:
            import pycuda.autoinit  # noqa: F401
    except Exception as e:  # a driver or GPU that is not there shows itself only here
        raise BoardError("not_found", "no usable GPU: %s" % e) from e
    return PyCuda(driver)


def _failed(name: str, code: int, said: str) -> BoardError:
    text = "%s failed with error %d%s" % (name, code, ": " + said if said else "")
    return BoardError("out_of_memory" if code == _OUT_OF_MEMORY else "build_failed", text)
