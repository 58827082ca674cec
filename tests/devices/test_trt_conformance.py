"""Every TensorRT name, argument and enumeration that the backend uses exists in the releases it must run on.

Offline: the backend is driven, path by path, over a stand-in module that has exactly the names of one release and
refuses everything else, with CUDA from a library of the tests. What this cannot show is that an engine builds.
"""

from __future__ import annotations

import ast
import ctypes
import json
import struct
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trt_examples import INFORMATION, LAYER_NAMES, RELEASES, fake_cudart, stand_in, surface, tool

from nas.core.records import BlockConfig, Candidate, HeadConfig, Precision, StageConfig, StemConfig
from nas.devices.board import trt_engine
from nas.devices.board.cuda import CtypesCuda
from nas.devices.board.errors import BoardError
from nas.export.graph import network_model, nominal_quant, random_weights

SOURCE = Path(trt_engine.__file__)
SMALL = Candidate(8, 4, StemConfig(8), (StageConfig((BlockConfig(8, 16, 8),)),), HeadConfig())
GRAY = (0.5,) * 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fake_cudart(tmp_path_factory.mktemp("cuda"))


def onnx(precision: Precision = "fp32") -> bytes:
    network = SMALL.with_precision(precision)
    return network_model(network, random_weights(network, 0), GRAY, GRAY, quant=nominal_quant(network))


def request_for(folder: Path, **changes: Any) -> dict[str, Any]:
    model = folder / "model.onnx"
    model.write_bytes(onnx())
    told = {
        "model": str(model),
        "engine": str(folder / "engine.plan"),
        "report": str(folder / "report.json"),
        "precision": "fp32",
        "typing": "auto",
        "workspace_mib": 64,
        "timing_cache": str(folder / "timing.cache"),
    }
    return {**told, **changes}


def drive(trt: ModuleType, library: Any, folder: Path) -> dict[str, Any]:
    """Every path of the backend over one release; what it said on the way."""
    said: dict[str, Any] = {"build": trt_engine.build(trt, request_for(folder))}
    plan = (folder / "engine.plan").read_bytes()
    session = trt_engine.TensorRtSession(trt, CtypesCuda(library), plan, 0, [])
    said["inputs"] = session.inputs()
    session.set_inputs({"image": bytes(3 * 8 * 8 * 4)})
    said["time"] = session.time(5, 2)
    began_s = time.perf_counter()
    session.run_only(9)
    said["run_only_s"] = time.perf_counter() - began_s
    said["outputs"] = session.outputs()
    said["profile"] = session.profile(3)
    session.close()
    return said


@pytest.mark.parametrize("release", RELEASES)
def test_the_backend_builds_times_profiles_and_inspects_with_the_names_of_a_release(
    release: str, library: Any, tmp_path: Path
) -> None:
    trt = stand_in(release, library.fake_work)
    before = library.fake_live()
    said = drive(trt, library, tmp_path)
    assert library.fake_live() == before, "memory, streams, events or graphs were not given back"
    assert (tmp_path / "timing.cache").exists()
    major, minor = map(int, release.split(".")[:2])
    assert said["build"]["typing"] == ("strong" if (major, minor) >= (10, 13) else "weak")
    assert said["inputs"] == [{"name": "image", "dtype": "float32", "shape": [1, 3, 8, 8]}]
    assert said["run_only_s"] > 9 * 1e-4, "an inference of the library takes 0.2 ms"
    assert said["time"]["cuda_graph"] is True and said["time"]["clock"] == "cuda_event"
    assert len(said["time"]["samples_ms"]) == len(said["time"]["host_ms"]) == 5
    assert [(o["name"], o["shape"], len(o["data"])) for o in said["outputs"]] == [("logits", [1, 4], 16)]
    assert [(row["name"], row["median_ms"], row["type"]) for row in said["profile"]] == [
        (name, 0.25, "CaskConvolution") for name in LAYER_NAMES
    ]
    assert said["profile"][1]["metadata"] == "[ONNX Layer: stages.0.0.project/Conv]"


# Variables of the source that hold objects of TensorRT.
OBJECTS = {
    *("builder", "network", "parser", "config", "cache", "plan", "inspector"),
    *("engine", "_engine", "context", "_context", "_runtime"),
}


def members_in_source() -> set[str]:
    """Attributes of TensorRT's objects that the source touches."""
    return {
        node.attr
        for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in OBJECTS
    }


def test_every_member_in_the_source_was_driven_over_some_release(library: Any, tmp_path: Path) -> None:
    used: set[str] = set()
    for release in RELEASES:
        trt = stand_in(release, library.fake_work)
        drive(trt, library, tmp_path)
        if hasattr(trt.BuilderFlag, "INT8"):
            (tmp_path / "int8.onnx").write_bytes(onnx("int8"))
            weak = request_for(tmp_path, precision="int8", typing="weak", model=str(tmp_path / "int8.onnx"))
            trt_engine.build(trt, weak)
        broken = stand_in(release, library.fake_work, **{"OnnxParser.parse": False, "OnnxParser.num_errors": 1})
        with pytest.raises(BoardError, match="cannot read the model"):
            trt_engine.build(broken, request_for(tmp_path))
        used |= trt.used | broken.used
    driven = {label.rpartition(".")[2] for label in used}
    assert len(members_in_source()) > 30
    assert members_in_source() - driven == set()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("precision", "typing", "expected"),
    [("fp32", "weak", []), ("fp16", "weak", ["FP16"]), ("int8", "weak", ["INT8", "FP16"]), ("int8", "auto", None)],
)
def test_precision_is_asked_for_by_flags_or_taken_from_the_file_as_the_release_wants(
    release: str, precision: Precision, typing: str, expected: list[str] | None, library: Any, tmp_path: Path
) -> None:
    chosen: list[str] = []
    networks: list[int] = []
    answers = {
        "IBuilderConfig.set_flag": lambda _, flag: chosen.append(flag.name),
        "Builder.create_network": lambda _, flags=0: networks.append(flags) or object(),
    }
    trt = stand_in(release, library.fake_work, **answers)
    version = tuple(map(int, release.split(".")[:2]))
    request = request_for(tmp_path, precision=precision, typing=typing)
    Path(request["model"]).write_bytes(onnx("int8" if precision == "int8" else "fp32"))
    if typing == "weak" and version >= (11, 0):
        with pytest.raises(BoardError, match="has no weak typing"):
            trt_engine.build(trt, request)
        return
    told = trt_engine.build(trt, request)
    flags = trt.NetworkDefinitionCreationFlag
    is_strong = hasattr(flags, "STRONGLY_TYPED") and bool(networks[0] & 1 << int(flags.STRONGLY_TYPED))
    assert is_strong == (told["typing"] == "strong") == (typing == "auto" and version >= (10, 13))
    assert chosen == (expected if expected is not None else [] if is_strong else ["INT8", "FP16"])
    if hasattr(flags, "EXPLICIT_BATCH"):
        assert networks[0] & 1 << int(flags.EXPLICIT_BATCH)


@pytest.mark.parametrize("source", ["trt_engine.py"])
def test_names_are_right_statically_in_every_release(source: str) -> None:
    path = SOURCE.with_name(source)
    assert tool("check_names").check(surface(), str(path), list(RELEASES)) == []


def test_a_graph_that_cannot_be_captured_is_timed_without_one(library: Any, tmp_path: Path) -> None:
    trt = stand_in("10.3.0", library.fake_work)
    trt_engine.build(trt, request_for(tmp_path))
    library.fake_fail_capture(1)
    try:
        session = trt_engine.TensorRtSession(trt, CtypesCuda(library), (tmp_path / "engine.plan").read_bytes(), 0, [])
        told = session.time(4, 0)
        session.close()
    finally:
        library.fake_fail_capture(0)
    assert told["cuda_graph"] is False
    assert len(told["samples_ms"]) == 4 and min(told["samples_ms"]) > 0.1  # an inference of the library takes 0.2 ms


class Engines:
    """Engines in the library's memory: what is as sure as the first pixel of its input, and copies it out by one more.

    The tensors are those of a chain; of the last engine only the logits count.
    """

    TENSORS = (
        ("image", (1, 1, 2, 2)),
        ("logits", (1, 2)),
        ("confidence", (1,)),
        ("features", (1, 1, 2, 2)),
    )

    def __init__(self, release: str, library: Any) -> None:
        names, shapes = [name for name, _ in self.TENSORS], dict(self.TENSORS)
        self.addresses: dict[Any, dict[str, int]] = {}
        self.ran: list[Any] = []
        self.library = library
        self.trt = stand_in(
            release,
            library.fake_work,
            **{
                "ICudaEngine.num_io_tensors": len(names),
                "ICudaEngine.num_bindings": len(names),
                "ICudaEngine.get_tensor_name": lambda _, index: names[index],
                "ICudaEngine.get_binding_name": lambda _, index: names[index],
                "ICudaEngine.get_tensor_mode": lambda _, name: getattr(
                    self.trt.TensorIOMode, "INPUT" if name == "image" else "OUTPUT"
                ),
                "IExecutionContext.get_tensor_shape": lambda _, name: shapes[name],
                "IExecutionContext.get_binding_shape": lambda _, binding: shapes[names[binding]],
                "IExecutionContext.set_tensor_address": lambda context, name, memory: (
                    self.addresses.setdefault(id(context), {}).update({name: memory}) or True
                ),
                "IExecutionContext.execute_async_v3": lambda context, stream_handle: self.run(
                    id(context), self.addresses[id(context)], stream_handle
                ),
                "IExecutionContext.execute_async_v2": lambda context, bindings, stream_handle, input_consumed=None: (  # noqa: ARG005
                    self.run(id(context), dict(zip(names, bindings, strict=True)), stream_handle)
                ),
            },
        )

    def run(self, context: int, memory: dict[str, int], stream: int) -> bool:
        pixels = ctypes.cast(memory["image"], ctypes.POINTER(ctypes.c_float))
        ctypes.cast(memory["confidence"], ctypes.POINTER(ctypes.c_float))[0] = pixels[0]
        features = ctypes.cast(memory["features"], ctypes.POINTER(ctypes.c_float))
        for i in range(4):
            features[i] = pixels[i] + 1
        self.ran.append(context)
        return bool(self.library.fake_work(stream))


def image_of(value: float) -> bytes:
    return struct.pack("<4f", *[value] * 4)


@pytest.mark.parametrize("release", ["8.2", "8.6.1", "10.3.0", "11.4.0.106"])
def test_a_chain_passes_its_feature_maps_on_where_they_lie_and_leaves_where_it_is_sure(
    release: str, library: Any, tmp_path: Path
) -> None:
    engines, before = Engines(release, library), library.fake_live()
    trt_engine.build(engines.trt, request_for(tmp_path))
    plan = (tmp_path / "engine.plan").read_bytes()
    library.fake_fail_capture(1)  # a graph of the library would not run what is written here
    try:
        cuda = CtypesCuda(library)
        sessions = [trt_engine.TensorRtSession(engines.trt, cuda, plan, 0, []) for _ in range(3)]
        chain = trt_engine.TensorRtRunner(cuda).chain(sessions, [0.9, 1.1])
        assert chain.input() == {"name": "image", "dtype": "float32", "shape": [1, 1, 2, 2]}
        chain.time([image_of(0.0)])  # warms up
        first = len(engines.ran)
        told = chain.time([image_of(x) for x in (0.5, 0.05, 0.95, 0.9)])
        assert told["exits"] == [1, 2, 0, 0], "of 0.5 the second is sure by 1.5; 0.9 is 0.9 in float32, too"
        assert len(engines.ran) - first == 2 + 3 + 1 + 1, "nothing is run behind the exit"
        works = [2, 3, 1, 1]  # an inference of the library takes 0.2 ms
        assert all(0.2 * n <= ms for n, ms in zip(works, told["samples_ms"], strict=True)), told["samples_ms"]
        assert told["clock"] == "cuda_event"
        chain.close()
    finally:
        library.fake_fail_capture(0)
    assert library.fake_live() == before, "memory, streams, events or graphs were not given back"


def test_a_chain_is_launched_as_graphs_after_its_input_was_connected(library: Any, tmp_path: Path) -> None:
    engines, before = Engines("10.3.0", library), library.fake_live()
    trt_engine.build(engines.trt, request_for(tmp_path))
    plan = (tmp_path / "engine.plan").read_bytes()
    cuda = CtypesCuda(library)
    sessions = [trt_engine.TensorRtSession(engines.trt, cuda, plan, 0, []) for _ in range(2)]
    chain = trt_engine.TensorRtRunner(cuda).chain(sessions, [2.0])  # never sure
    one, two = engines.addresses.values()
    assert two["image"] == one["features"]
    chain.time([image_of(0.0)])
    launches = library.fake_launches()
    assert chain.time([image_of(0.0)] * 3)["exits"] == [1] * 3
    assert library.fake_launches() - launches == 6
    chain.close()
    assert library.fake_live() == before


def test_engines_that_do_not_fit_together_are_refused(library: Any, tmp_path: Path) -> None:
    trt, before = stand_in("10.3.0", library.fake_work), library.fake_live()
    trt_engine.build(trt, request_for(tmp_path))
    plan = (tmp_path / "engine.plan").read_bytes()
    cuda = CtypesCuda(library)
    sessions = [trt_engine.TensorRtSession(trt, cuda, plan, 0, []) for _ in range(2)]
    with pytest.raises(BoardError, match="gives no confidence of one float32"):
        trt_engine.TensorRtRunner(cuda).chain(sessions, [0.5])
    source = {"name": "features", "dtype": "float16", "shape": [1, 3, 8, 8], "device": 0}
    with pytest.raises(BoardError, match=r"takes image float32 .* before it gives features float16"):
        sessions[1].read_from(source)
    for session in sessions:
        session.close()
    assert library.fake_live() == before


def test_an_engine_that_refuses_to_run_is_an_error(library: Any, tmp_path: Path) -> None:
    trt = stand_in("8.6.1", lambda _: False)
    trt_engine.build(trt, request_for(tmp_path))
    session = trt_engine.TensorRtSession(trt, CtypesCuda(library), (tmp_path / "engine.plan").read_bytes(), 0, [])
    with pytest.raises(BoardError, match="refused to run") as refused:
        session.time(4, 0)
    assert refused.value.kind == "build_failed"
    session.close()


def test_a_plan_that_does_not_fit_is_an_error(library: Any) -> None:
    trt = stand_in("10.3.0", library.fake_work, **{"Runtime.deserialize_cuda_engine": None})
    with pytest.raises(BoardError, match=r"does not fit this GPU, driver or TensorRT 10\.3\.0"):
        trt_engine.TensorRtSession(trt, CtypesCuda(library), b"plan", 0, [])


def logging_module(library: Any, label: str, *messages: str) -> tuple[ModuleType, list[Any]]:
    """A module one of whose functions logs errors and gives None, and the loggers that were made of it."""
    loggers: list[Any] = []

    def answer(*_: Any) -> None:
        for message in messages:
            loggers[-1].log(made[0].ILogger.ERROR, message)

    made = [stand_in("10.3.0", library.fake_work, **{label: answer})]
    return made[0], loggers


@pytest.mark.parametrize(
    ("label", "message", "kind", "told"),
    [
        ("Runtime.deserialize_cuda_engine", "OutOfMemory (no further information)", "out_of_memory", "OutOfMemory"),
        ("Runtime.deserialize_cuda_engine", "Serialization: magic tag", "build_failed", "does not fit .*magic tag"),
        ("ICudaEngine.create_execution_context", "cannot bind", "out_of_memory", "execution context: cannot bind"),
    ],
)
def test_what_tensorrt_logs_of_an_engine_is_the_reason(
    label: str, message: str, kind: str, told: str, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, loggers = logging_module(library, label, message)
    real = trt_engine.make_logger
    monkeypatch.setattr(trt_engine, "make_logger", lambda *a: loggers.append(real(*a)) or loggers[-1])
    with pytest.raises(BoardError, match=told) as failed:
        trt_engine.TensorRtSession(trt, CtypesCuda(library), b"plan", 0, [])
    assert failed.value.kind == kind


def test_what_bindings_raise_is_told_with_what_tensorrt_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Any, __: dict[str, Any], lines: list[str]) -> None:
        lines.append("[E] CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    report = tmp_path / "report.json"
    monkeypatch.setattr(trt_engine, "build", build)
    monkeypatch.setattr(trt_engine, "import_tensorrt", lambda: None)
    monkeypatch.setattr(sys, "argv", ["-c", json.dumps({"report": str(report)})])
    trt_engine.main()
    told = json.loads(report.read_text())
    assert told["kind"] == "build_failed"
    assert told["error"].startswith("TypeError: pybind11::init(): factory function returned nullptr")
    assert told["error"].endswith("CUDA initialization failure with error: 35")


def test_a_session_that_cannot_be_opened_gives_back_what_it_took(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trt, before = stand_in("10.3.0", library.fake_work), library.fake_live()
    cuda = CtypesCuda(library)
    real, calls = cuda.host_buffer, []

    def host_buffer(count: int) -> Any:
        calls.append(count)
        if len(calls) == 2:
            raise BoardError("out_of_memory", "cudaHostAlloc failed")
        return real(count)

    monkeypatch.setattr(cuda, "host_buffer", host_buffer)
    with pytest.raises(BoardError, match="cudaHostAlloc failed"):
        trt_engine.TensorRtSession(trt, cuda, b"plan", 0, [])
    assert len(calls) == 2 and library.fake_live() == before


@pytest.mark.parametrize("release", ["8.2", "11.4.0.106"])
def test_a_builder_that_gives_nothing_tells_its_errors(release: str, library: Any, tmp_path: Path) -> None:
    loggers: list[Any] = []

    def builder(*_: Any) -> None:
        trt = made[0]
        loggers[0].log(trt.ILogger.WARNING, "Skipping tactic 3 due to insufficient memory on requested size of 9")
        loggers[0].log(trt.ILogger.ERROR, "Error Code 2: OutOfMemory (no further information)")

    made = [stand_in(release, library.fake_work, **{"Builder.build_serialized_network": builder})]
    real = trt_engine.make_logger
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_engine, "make_logger", lambda *a: loggers.append(real(*a)) or loggers[-1])
        with pytest.raises(BoardError) as failed:
            trt_engine.build(made[0], request_for(tmp_path))
    assert failed.value.kind == "out_of_memory"
    assert "OutOfMemory" in failed.value.message and "1 tactics were skipped" in failed.value.message


def test_a_timing_cache_of_another_gpu_is_replaced_and_said(library: Any, tmp_path: Path) -> None:
    answers = iter([False, True])
    made: list[bytes] = []
    own = {
        "IBuilderConfig.set_timing_cache": lambda *_, **__: next(answers),
        "IBuilderConfig.create_timing_cache": lambda _, saved: made.append(saved) or object(),
    }
    trt = stand_in("10.3.0", library.fake_work, **own)
    request = request_for(tmp_path)
    Path(request["timing_cache"]).write_bytes(b"of another GPU")
    told = trt_engine.build(trt, request)
    assert made == [b"of another GPU", b""]
    assert told["warnings"] == ["the timing cache is of another GPU, CUDA or TensorRT; a new one was begun"]


def test_information_with_control_characters_is_read(library: Any, tmp_path: Path) -> None:
    raw = INFORMATION.replace("[ONNX Layer: stem.conv/Conv]", "[ONNX Layer: a]\x1e[ONNX Layer: b]")
    trt = stand_in("10.3.0", library.fake_work, **{"EngineInspector.get_engine_information": raw})
    assert drive(trt, library, tmp_path)["profile"][0]["metadata"] == "[ONNX Layer: a]\x1e[ONNX Layer: b]"


@pytest.mark.parametrize("release", ["8.6.1", "10.3.0", "11.4.0.106"])
def test_a_build_in_a_process_of_its_own_comes_back(
    release: str, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    (folder / "tensorrt.py").write_text(
        "import sys\n"
        f"sys.path[:0] = {here!r}\n"
        "from trt_examples import stand_in\n"
        f"sys.modules['tensorrt'] = stand_in({release!r}, lambda _: True)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(release, library.fake_work))
    model = tmp_path / "model.onnx"
    model.write_bytes(onnx())
    runner = trt_engine.TensorRtRunner(CtypesCuda(library))
    cache = tmp_path / "timing.cache"
    session = runner.load(str(model), {"precision": "fp32", "work": str(tmp_path), "timing_cache": str(cache)})
    assert session.engine_bytes > 0 and session.build_s > 0 and session.warnings == []
    assert cache.exists()
    session.close()
    with pytest.raises(BoardError, match=r"building model\.onnx: int8 is asked for, but the file has no") as refused:
        runner.load(str(model), {"precision": "int8", "work": str(tmp_path)})
    assert refused.value.kind == "bad_request"
    with pytest.raises(BoardError, match=r"building model\.onnx: .* did not return within") as hung:
        runner.load(str(model), {"precision": "fp32", "work": str(tmp_path), "timeout_s": 0.05})
    assert hung.value.kind == "hung"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "modules", "timing.cache"]
    assert runner.describe()["version"] == json.loads(json.dumps(str(sys.modules["tensorrt"].__version__)))
