"""CUDA through ctypes, NVIDIA's Python package and pycuda, on a library that checks every handle it gets."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trt_examples import fake_cudart

from nas.devices.board import cuda
from nas.devices.board.cuda import CtypesCuda, CudaPython, PyCuda
from nas.devices.board.errors import BoardError


def used_once(runtime: Any, library: Any) -> list[str]:
    """Goes through what a session does; the steps that were made."""
    stream = runtime.stream()
    host, back = runtime.host_buffer(8), runtime.host_buffer(8)
    device = runtime.alloc(8)
    host.view[:] = b"12345678"
    runtime.upload(device, host, 8, stream)
    runtime.download(back, device, 8, stream)
    runtime.synchronize(stream)
    assert bytes(back.view) == b"12345678"
    start, end = runtime.event(), runtime.event()
    runtime.record(start, stream)
    assert library.fake_work(int(stream))
    runtime.record(end, stream)
    while not runtime.is_done(end):
        pass
    assert 0.19 < runtime.elapsed_ms(start, end) < 50
    steps = ["copied", "timed"]
    works = library.fake_works()
    graph = runtime.capture(stream, lambda: bool(library.fake_work(int(stream))))
    assert library.fake_works() == works, "what is captured must not run"
    if graph is not None:
        runtime.launch(graph, stream)
        runtime.synchronize(stream)
        assert library.fake_works() == works + 1
        runtime.free_graph(graph)
        steps.append("graph")
    for event in (start, end):
        runtime.free_event(event)
    runtime.free(device)
    for buffer in (host, back):
        runtime.free_host(buffer)
    runtime.free_stream(stream)
    assert library.fake_live() == 0
    return steps


@pytest.mark.parametrize(
    ("version", "with_flags"),
    [(10020, False), (11040, True), (11040, False), (12060, True), (12060, False), (13000, True)],
)
def test_ctypes_calls_the_form_that_each_version_of_cuda_has(version: int, with_flags: bool, tmp_path: Path) -> None:
    library = fake_cudart(tmp_path, version, with_flags=with_flags)
    runtime = CtypesCuda(library)
    assert (runtime.version(), runtime.capability()) == (version, (8, 7))
    assert used_once(runtime, library) == ["copied", "timed", "graph"]


def test_a_failed_capture_gives_no_graph_and_leaves_nothing(tmp_path: Path) -> None:
    library = fake_cudart(tmp_path)
    runtime = CtypesCuda(library)
    stream = runtime.stream()
    assert runtime.capture(stream, lambda: False) is None  # what was to be captured was refused
    library.fake_fail_capture(1)
    assert runtime.capture(stream, lambda: True) is None
    library.fake_fail_capture(0)
    runtime.synchronize(stream)  # the stream can be used again
    runtime.free_stream(stream)
    assert library.fake_live() == 0


def test_no_memory_and_wrong_handles_are_errors_of_their_kind(tmp_path: Path) -> None:
    runtime = CtypesCuda(fake_cudart(tmp_path))
    with pytest.raises(BoardError, match="cudaMalloc failed with error 2: out of memory") as full:
        runtime.alloc(1 << 40)
    assert full.value.kind == "out_of_memory"
    event = runtime.event()
    with pytest.raises(BoardError, match="cudaEventQuery failed with error 1: invalid argument"):
        runtime.is_done(event)  # it was not recorded


class AsCudaPython:
    """The calls of NVIDIA's package over a test library: each gives a tuple, the error first."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        # cudaGraphInstantiate is not among them: its arguments differ between versions of the package
        first = {
            "cudaMalloc": (ctypes.c_void_p, ctypes.c_size_t),
            "cudaHostAlloc": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
            "cudaStreamCreateWithFlags": (ctypes.c_void_p, ctypes.c_uint),
            "cudaEventCreateWithFlags": (ctypes.c_void_p, ctypes.c_uint),
            "cudaGraphInstantiateWithFlags": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong),
            "cudaEventElapsedTime": (ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p),
            "cudaRuntimeGetVersion": (ctypes.c_int,),
            "cudaDeviceGetAttribute": (ctypes.c_int, ctypes.c_int, ctypes.c_int),
        }
        plain: dict[str, tuple[Any, ...]] = {
            "cudaFree": (ctypes.c_void_p,),
            "cudaFreeHost": (ctypes.c_void_p,),
            "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
            "cudaStreamDestroy": (ctypes.c_void_p,),
            "cudaStreamSynchronize": (ctypes.c_void_p,),
            "cudaStreamBeginCapture": (ctypes.c_void_p, ctypes.c_int),
            "cudaEventDestroy": (ctypes.c_void_p,),
            "cudaEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
            "cudaEventQuery": (ctypes.c_void_p,),
            "cudaGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
            "cudaGraphExecDestroy": (ctypes.c_void_p,),
            "cudaGraphDestroy": (ctypes.c_void_p,),
            "cudaGetLastError": (),
        }
        call = getattr(self._library, name)
        if name == "cudaStreamEndCapture":

            def ended(stream: int) -> tuple[int, int]:
                graph = ctypes.c_void_p()
                return call(ctypes.c_void_p(stream), ctypes.byref(graph)), graph.value or 0

            return ended
        if name in first:

            def making(*given: Any) -> tuple[Any, Any]:
                made = first[name][0]()
                kinds = first[name][1:]
                code = call(ctypes.byref(made), *(kind(value) for kind, value in zip(kinds, given, strict=True)))
                return code, made.value or 0

            return making
        return lambda *given: (call(*(kind(value) for kind, value in zip(plain[name], given, strict=True))),)


def test_cuda_python_gives_tuples_with_the_error_first(tmp_path: Path) -> None:
    library = fake_cudart(tmp_path)
    runtime = CudaPython(AsCudaPython(library))
    assert (runtime.version(), runtime.capability()) == (12060, (8, 7))
    assert used_once(runtime, library) == ["copied", "timed", "graph"]
    with pytest.raises(BoardError) as full:
        runtime.alloc(1 << 40)
    assert full.value.kind == "out_of_memory"
    stream = runtime.stream()
    assert runtime.capture(stream, lambda: False) is None
    library.fake_fail_capture(1)
    assert runtime.capture(stream, lambda: True) is None
    runtime.free_stream(stream)
    assert library.fake_live() == 0


def test_nothing_found_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.setattr(cuda, "LIBRARIES", ("libnothing.so",))
    monkeypatch.setattr(cuda, "_FOLDERS", ("/nowhere",))
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "nvidia").exists()])
    with pytest.raises(BoardError, match=r"cuda-python: not installed; libcudart: no libcudart.so.*; pycuda: not") as e:
        cuda.find_cuda()
    assert e.value.kind == "not_found"


def test_the_library_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_cudart(tmp_path)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(cuda, "LIBRARIES", (library._name,))
    found = cuda.find_cuda()
    assert (found.name, found.version()) == ("ctypes", 12060)


class FakeAllocation:
    def __init__(self, count: int, log: list[str]) -> None:
        self._memory = (ctypes.c_char * count)()
        self._log = log
        log.append("alloc")

    def __int__(self) -> int:
        return ctypes.addressof(self._memory)

    def free(self) -> None:
        self._log.append("free")


class FakePyCuda(ModuleType):
    """The few names of pycuda.driver that are used, over plain memory; NumPy arrays are its page-locked memory."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.log: list[str] = []

    def mem_alloc(self, count: int) -> FakeAllocation:
        if count > 1 << 30:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return FakeAllocation(count, self.log)

    def pagelocked_empty(self, shape: int, dtype: str) -> Any:
        return np.zeros(shape, dtype)

    def memcpy_htod_async(self, to: Any, source: Any, stream: Any) -> None:
        assert stream.handle == 77
        ctypes.memmove(int(to), source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, to: Any, source: Any, stream: Any) -> None:
        assert stream.handle == 77
        ctypes.memmove(to.ctypes.data, int(source), to.nbytes)

    class Stream:
        handle = 77

        def synchronize(self) -> None:
            pass

    class Event:
        def record(self, stream: Any) -> None:
            assert stream.handle == 77

        def query(self) -> bool:
            return True

        def time_since(self, start: Any) -> float:
            assert isinstance(start, FakePyCuda.Event)
            return 0.5


def test_pycuda_copies_and_times_without_graphs() -> None:
    driver = FakePyCuda()
    runtime = PyCuda(driver)
    stream = runtime.stream()
    assert int(stream) == 77
    host, back = runtime.host_buffer(8), runtime.host_buffer(8)
    device = runtime.alloc(8)
    host.view[:] = b"12345678"
    runtime.upload(device, host, 8, stream)
    runtime.download(back, device, 8, stream)
    runtime.synchronize(stream)
    assert bytes(back.view) == b"12345678"
    start, end = runtime.event(), runtime.event()
    runtime.record(start, stream)
    runtime.record(end, stream)
    assert runtime.is_done(end) and runtime.elapsed_ms(start, end) == 0.5
    assert runtime.capture(stream, lambda: True) is None
    runtime.free(device)
    runtime.free_host(back)
    assert driver.log == ["alloc", "free"]
    with pytest.raises(BoardError) as full:
        runtime.alloc(1 << 40)
    assert full.value.kind == "out_of_memory"


def test_a_binding_that_raises_anything_leaves_the_next_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(cuda, "_cuda_python", broken)
    monkeypatch.setattr(cuda, "load_cudart", lambda: fake_cudart(tmp_path))
    assert cuda.find_cuda().name == "ctypes"
    for name in ("_ctypes_cuda", "_pycuda"):
        monkeypatch.setattr(cuda, name, broken)
    with pytest.raises(
        BoardError, match=r"cuda-python: RuntimeError: Failed to dlopen libcuda\.so\.1; libcudart: Runt"
    ):
        cuda.find_cuda()
