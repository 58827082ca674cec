"""trtexec by version: its options, its log, its files; and each way in which it fails as a result of its kind."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nas.core.records import BlockConfig, Candidate, HeadConfig, Precision, StageConfig, StemConfig
from nas.devices.board import trtexec_output as output
from nas.devices.board.errors import BoardError
from nas.devices.board.onnx_facts import onnx_facts
from nas.devices.board.trtexec import (
    TrtexecRunner,
    build_command,
    effective_precision,
    find_trtexec,
    is_weak,
    run_command,
)
from nas.export.graph import network_model, nominal_quant, random_weights

SMALL = Candidate(8, 4, StemConfig(8), (StageConfig((BlockConfig(8, 16, 8),)),), HeadConfig())
BANNERS = {(8, 2, 1): "v8201", (8, 5, 2): "v8502", (10, 3, 0): "v100300", (11, 4, 0): "v110400"}
LAYER = "stem.conv/Conv + PWN(stem.conv/HardSwish)"
QUERY = {
    "startEnqMs": 300.0, "endEnqMs": 300.02, "startH2dMs": 300.0, "endH2dMs": 300.1, "startComputeMs": 300.1,
    "endComputeMs": 300.95, "startD2hMs": 300.95, "endD2hMs": 301.0, "h2dMs": 0.1, "computeMs": 0.85, "d2hMs": 0.05,
    "latencyMs": 1.0,
}  # fmt: skip
# Options that a release refuses, from the option parsers of its sources (facts: flag matrix).
REFUSED = {
    (8, 2, 1): ("--memPoolSize", "--skipInference", "--stronglyTyped", "--includeDataTransfers", "--bf16"),
    (8, 5, 2): ("--skipInference", "--stronglyTyped", "--includeDataTransfers", "--bf16"),
    (8, 6, 1): ("--stronglyTyped", "--includeDataTransfers", "--bf16"),
    (10, 3, 0): ("--explicitBatch", "--workspace", "--includeDataTransfers"),
    (10, 16, 1): ("--explicitBatch", "--workspace", "--includeDataTransfers"),
    (11, 4, 0): ("--explicitBatch", "--workspace", "--fp16", "--int8", "--bf16", "--calib", "--best"),
}
SUMMARY_8_2 = """\
[11/20/2026-10:00:00] [I] === Performance summary ===
[11/20/2026-10:00:00] [I] Throughput: 1.29477e+08 qps
[11/20/2026-10:00:00] [I] Latency: min = 0.9 ms, max = 1.2 ms, mean = 1.0 ms, median = 0.99 ms, percentile(99%) = 1.1 ms
[11/20/2026-10:00:00] [I] End-to-End Host Latency: min = 1 ms, max = inf ms, mean = 1.5 ms, median = 1.4 ms
[11/20/2026-10:00:00] [I] GPU Compute Time: min = 0.8 ms, max = 1 ms, mean = 0.9 ms, median = 0.000976562 ms
[11/20/2026-10:00:00] [I] Average on 10 runs - GPU latency: 0.9 ms - Host latency: 1 ms (end to end 2 ms)
"""


def onnx(precision: Precision = "fp32") -> bytes:
    network = SMALL.with_precision(precision)
    return network_model(network, random_weights(network, 0), (0.5,) * 3, (0.5,) * 3, quant=nominal_quant(network))


class FakeTrtexec:
    """Answers as a release does: refuses its unknown options, writes the files that it is asked for."""

    def __init__(self, version: tuple[int, int, int], changes: dict[str, Any] | None = None) -> None:
        self.version = version
        self.changes = changes or {}
        self.commands: list[list[str]] = []

    def __call__(self, argv: list[str], _: float) -> tuple[int, str, str]:
        self.commands.append(argv)
        banner = f"&&&& RUNNING TensorRT.trtexec [TensorRT {BANNERS.get(self.version, 'v8601')}] # trtexec\n"
        if "--help" in argv:
            return 0, banner, ""
        options = dict(part.partition("=")[::2] for part in argv[1:])
        unknown = [name for name in options if name in REFUSED[self.version]]
        if unknown:
            return 1, banner, f"[E] Unknown option: {unknown[0]} \n&&&& FAILED TensorRT.trtexec\n"
        if self.changes.get("raises"):
            raise self.changes["raises"]
        if "code" in self.changes:
            return self.changes["code"], banner, self.changes.get("err", "")
        if "--saveEngine" in options:
            Path(options["--saveEngine"]).write_bytes(self.changes.get("plan", b"plan"))
        if "--exportTimes" in options:
            queries = [dict(QUERY, startComputeMs=ms) for ms in (20.0, 300.1, 301.0, 302.0)]
            if self.version >= (8, 5, 0):
                queries = queries[1:]  # the warm-up is among them before
            Path(options["--exportTimes"]).write_text(self.changes.get("times", json.dumps(queries)))
        if "--exportProfile" in options:
            text = json.dumps([{"count": 50}, {"name": LAYER, "timeMs": 6.0, "averageMs": 0.12, "medianMs": 0.11}])
            if self.version < (8, 4, 0):
                text = text.replace(', "medianMs": 0.11', "")
            Path(options["--exportProfile"]).write_text(self.changes.get("profile", text))
        if "--exportLayerInfo" in options:
            layer = {"Name": LAYER, "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"}
            text = json.dumps({"Layers": [layer]}).replace("\\u001e", "\x1e")
            Path(options["--exportLayerInfo"]).write_text(text)
        log = "[I] Successfully captured CUDA graph for the current execution context\n" if self.version[0] < 11 else ""
        return 0, banner + log + "&&&& PASSED TensorRT.trtexec\n", self.changes.get("err", "")


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "trtexec"
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def model_file(folder: Path, precision: Precision = "fp32") -> str:
    path = folder / "model.onnx"
    path.write_bytes(onnx(precision))
    return str(path)


def test_trtexec_is_found_where_it_is_given_on_path_or_where_jetpack_puts_it(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.devices.board.trtexec.PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert find_trtexec() is None
    assert find_trtexec(program) == program
    assert find_trtexec(program + "-not") is None
    monkeypatch.setattr("nas.devices.board.trtexec.PLACES", (program,))
    assert find_trtexec() == program
    monkeypatch.setenv("PATH", str(Path(program).parent))
    monkeypatch.setattr("nas.devices.board.trtexec.PLACES", ())
    assert find_trtexec() == program
    missing = TrtexecRunner(program + "-not").available()
    assert missing is not None and f"trtexec was not found ({program}-not)" in missing


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec --help", (8, 2, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # /usr/src/x --help", (8, 5, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", (10, 3, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100800] [b43] # trtexec", (10, 8, 0)),
        ("&&&& FAILED TensorRT.trtexec [TensorRT v101601] # trtexec", (10, 16, 1)),
        ("trtexec of something else", None),
    ],
)
def test_the_version_is_that_of_the_banner(text: str, version: tuple[int, int, int] | None) -> None:
    assert output.version_of(text) == version


@pytest.mark.parametrize("version", sorted(REFUSED))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_no_release_gets_an_option_that_it_refuses(version: tuple[int, int, int], precision: str) -> None:
    cache = {"timing_cache": "t.cache"}
    weak = version[0] < 11
    build = build_command("trtexec", version, "m.onnx", "e.plan", weak, precision, cache)
    everything = {"times": "t", "profile": "p", "layers": "l", "transfers": True, "inputs": {"x": "f"}}
    run = run_command("trtexec", version, "e.plan", 50, everything)
    plain = run_command("trtexec", version, "e.plan", 50, {"times": "t"})
    for command in (build, run, plain):
        names = {part.partition("=")[0] for part in command[1:]}
        assert not names & set(REFUSED[version]), command
    assert "--timingCacheFile=t.cache" in build
    assert ("--fp16" in build) == (weak and precision != "fp32")  # int8 alone would leave the rest in fp32
    assert ("--buildOnly" in build) == (version < (8, 6, 0))
    assert ("--workspace=512" in build) == (version < (8, 4, 0))
    same = {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"}
    assert same <= set(plain) if version[0] < 11 else not same & set(plain)  # defaults from 11 on
    assert "--noDataTransfers" not in run


@pytest.mark.parametrize("version", sorted(BANNERS))
def test_an_engine_is_built_timed_and_profiled(version: tuple[int, int, int], program: str, tmp_path: Path) -> None:
    fake = FakeTrtexec(version)
    runner = TrtexecRunner(program, fake)
    assert runner.available() is None
    assert runner.describe()["version"] == ".".join(map(str, version))
    session = runner.load(model_file(tmp_path), {"work": str(tmp_path), "precision": "fp32"})
    assert (session.engine_bytes, session.warnings) == (4, [])
    assert session.inputs() == [{"name": "image", "dtype": "float32", "shape": [1, 3, 8, 8]}]
    session.set_inputs({"image": b"\0" * 768})
    told = session.time(3)
    assert told["samples_ms"] == [0.85] * 3  # a query of the warm-up is left out
    assert told["host_ms"] == pytest.approx([0.02] * 3)
    assert session.transfer_ms() == pytest.approx(0.15)
    assert (told["cuda_graph"], told["enqueue_bound"], told["clock"]) == (True, False, "cuda_event")
    expected = 0.11 if version >= (8, 4, 0) else 0.12  # no median before 8.4
    assert session.profile(50) == [
        {
            "name": LAYER,
            "median_ms": pytest.approx(expected),
            "metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]",
            "type": "CaskConvolution",
            "origin": "",
        }
    ]
    loaded = [part for command in fake.commands for part in command if part.startswith("--loadInputs")]
    assert loaded and all(re.fullmatch(r"--loadInputs=image:.*/input-0\.raw", part) for part in loaded)
    with pytest.raises(BoardError, match="no input 'x'; inputs: image"):
        session.set_inputs({"x": b""})
    with pytest.raises(BoardError, match="gives no exact outputs, and the Python module tensorrt cannot be imported"):
        session.outputs()
    session.close()
    assert not list(tmp_path.glob("engine-*"))


SKIPPED = "[W] [TRT] Skipping tactic 3 due to insufficient memory on requested size of 2243 detected for tactic 4.\n"


def test_skipped_tactics_are_a_warning_of_the_session(program: str, tmp_path: Path) -> None:
    runner = TrtexecRunner(program, FakeTrtexec((8, 5, 2), {"err": SKIPPED * 2}))
    session = runner.load(model_file(tmp_path), {"work": str(tmp_path)})
    assert session.warnings == ["skipped_tactics: 2 tactics were passed over because memory was short"]


DEVICE_REQUEST = (
    "[W] [TRT] Tactic Device request: 2457MB Available: 1536MB. Device memory is insufficient to use tactic.\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((DEVICE_REQUEST + SKIPPED) * 2, 2),
        (DEVICE_REQUEST * 3, 3),
        ("[W] [TRT] Skipping tactic 3 due to insuficient memory on requested size of 9 detected for tactic 4.", 1),
        ("[W] [TRT] Skipping tactic 0x0 due to exception Assertion dims failed", 0),
        ("[W] [TRT] Skipping tactic 0x0 due to Myelin error: oom", 1),
    ],
)
def test_only_tactics_skipped_for_memory_are_counted_and_each_once(text: str, expected: int) -> None:
    assert output.skipped_tactics(text) == expected


def test_a_trtexec_that_cannot_start_says_what_it_lacks(program: str) -> None:
    lacks = f"{program}: error while loading shared libraries: libnvinfer.so.8: cannot open shared object file"
    missing = TrtexecRunner(program, lambda *_: (127, "", lacks + "\n")).available()
    assert missing is not None and missing.endswith(f"is it trtexec? It ended with exit code 127: {lacks}")
    silent = TrtexecRunner(program, lambda *_: (-11, "", "")).available()
    assert silent is not None and silent.endswith("It ended with signal 11: nothing was printed")


class DamagedCache(FakeTrtexec):
    """Fails to build, with `said`, while there is a timing cache."""

    def __init__(self, said: str) -> None:
        super().__init__((8, 5, 2))
        self._said = said

    def __call__(self, argv: list[str], limit_s: float) -> tuple[int, str, str]:
        paths = [part.partition("=")[2] for part in argv if part.startswith("--timingCacheFile=")]
        self.changes.clear()
        if paths and Path(paths[0]).exists():
            failed = f"&&&& FAILED TensorRT.trtexec [TensorRT v8502] # trtexec --timingCacheFile={paths[0]}\n"
            self.changes.update(code=1, err=self._said + failed)
        return super().__call__(argv, limit_s)


def test_a_damaged_timing_cache_is_begun_anew_and_said(program: str, tmp_path: Path) -> None:
    cache = tmp_path / "timing-cache-x.bin"
    cache.write_bytes(b"cut of")
    runner = TrtexecRunner(program, DamagedCache("[E] [TRT] Cannot deserialize the timing cache: magic tag\n"))
    session = runner.load(model_file(tmp_path), {"work": str(tmp_path), "timing_cache": str(cache)})
    (warning,) = session.warnings
    assert warning.startswith("the timing cache could not be used and a new one was begun: building model.onnx")
    assert "magic tag" in warning and not cache.exists()


def test_a_failure_that_does_not_name_the_timing_cache_leaves_it(program: str, tmp_path: Path) -> None:
    cache = tmp_path / "timing-cache-x.bin"
    cache.write_bytes(b"good")
    fake = DamagedCache("")
    runner = TrtexecRunner(program, fake)
    with pytest.raises(BoardError, match="exit code 1"):
        runner.load(model_file(tmp_path), {"work": str(tmp_path), "timing_cache": str(cache)})
    builds = [command for command in fake.commands if "--help" not in command]
    assert cache.read_bytes() == b"good" and len(builds) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"code": 1, "err": "[E] Error[2]: Assertion failed\n&&&& FAILED"},
            "build_failed",
            "exit code 1: Error.2.: As",
        ),
        ({"code": 1, "err": SKIPPED + "[E] Error[10]: no implementation\n"}, "build_failed", "1 tactics were skipped"),
        (
            {"code": 1, "err": "[W] Could not read timing cache\n[E] bad node\n"},
            "build_failed",
            "exit code 1: bad node",
        ),
        ({"code": 1, "err": "[E] Error[2]: OutOfMemory (no further information)"}, "out_of_memory", "out of memory"),
        ({"code": -6, "err": "[E] a\nterminate called: std::bad_alloc"}, "out_of_memory", "out of memory: a"),
        ({"code": -6, "err": "terminate called after throwing 'std::bad_alloc'"}, "out_of_memory", "bad_alloc"),
        ({"code": -9}, "killed", "killed by the system"),
        ({"code": 137, "err": SKIPPED}, "killed", "dmesg.*1 tactics were skipped"),
        ({"code": -11}, "build_failed", "signal 11"),
        ({"code": 1, "err": "[E] Unknown option: --fp16 "}, "unsupported", "does not know --fp16"),
        ({"code": 1, "err": "OSError: [Errno 28] No space left on device"}, "disk_full", "no space left on this board"),
        ({"plan": b""}, "build_failed", "wrote no engine"),
        (
            {"raises": BoardError("hung", "trtexec did not return within 5 s")},
            "hung",
            "building model.onnx: trtexec did",
        ),
    ],
)
def test_each_failure_of_a_build_has_its_kind(
    changes: dict[str, Any], kind: str, message: str, program: str, tmp_path: Path
) -> None:
    runner = TrtexecRunner(program, FakeTrtexec((8, 5, 2), changes))
    with pytest.raises(BoardError, match=message) as failed:
        runner.load(model_file(tmp_path), {"work": str(tmp_path)})
    assert failed.value.kind == kind
    assert not list(tmp_path.glob("engine-*")), "the folder of the engine was left behind"


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({"times": '[{"startEnqMs": 1, "endE'}, lambda s: s.time(3), "times of TensorRT are no complete JSON"),
        ({"times": '[{"startEnqMs": 1}]'}, lambda s: s.time(3), r"times\[0\] of trtexec has no number endEnqMs"),
        ({"times": "[]"}, lambda s: s.time(3), "hold no query"),
        ({"profile": '[{"count": 50}, {"name": "a", "timeMs": 6'}, lambda s: s.profile(3), "not JSON of --exportProf"),
        ({"profile": '[{"count": 5}, {"name": "a", "timeMs": 6, "averageMs": 1},'}, lambda s: s.profile(3), "not JSON"),
    ],
)
def test_files_that_are_cut_off_are_truncated(
    changes: dict[str, Any], call: Callable[[Any], object], message: str, program: str, tmp_path: Path
) -> None:
    session = TrtexecRunner(program, FakeTrtexec((10, 3, 0), changes)).load(
        model_file(tmp_path), {"work": str(tmp_path)}
    )
    with pytest.raises(BoardError, match=message) as failed:
        call(session)
    assert failed.value.kind == "truncated"


def test_a_file_of_an_earlier_run_is_never_read_again(program: str, tmp_path: Path) -> None:
    fake = FakeTrtexec((10, 3, 0))
    session = TrtexecRunner(program, fake).load(model_file(tmp_path), {"work": str(tmp_path)})
    session.time(3)
    fake.changes["code"] = 0  # ends well, and writes nothing
    with pytest.raises(BoardError, match=r"trtexec wrote no times\.json"):
        session.time(3)


def test_the_summary_is_read_whatever_the_order_and_form_of_its_numbers() -> None:
    found = output.performance_of(SUMMARY_8_2)
    assert list(found) == ["Latency", "End-to-End Host Latency", "GPU Compute Time"]
    assert found["Latency"]["percentile(99%)"] == 1.1
    assert found["GPU Compute Time"]["median"] == 0.000976562
    assert found["End-to-End Host Latency"]["max"] == float("inf")
    assert output.performance_of("nothing of the kind") == {}


def test_times_that_contradict_the_summary_are_not_believed() -> None:
    text = "=== Performance summary ===\n[I] GPU Compute Time: min = 1 ms, max = 3 ms, mean = 2 ms, median = 2 ms\n"
    output.check_median(text, 2.1)
    output.check_median("no summary", 7.0)
    with pytest.raises(BoardError, match="a median of 2 ms, the times that it exports one of 4 ms: its output is read"):
        output.check_median(text, 4.0)


def test_a_graph_counts_only_where_the_log_says_so() -> None:
    assert output.captured_graph("[W] CUDA graph capture failed on line 3") is False
    assert output.captured_graph("[I] Successfully captured CUDA graph for the current execution context") is True
    assert output.captured_graph("[I] nothing") is None


def test_layer_information_of_every_form() -> None:
    bare = output.layers_of('{"Layers": ["a", "b"], "Bindings": ["x"]}')
    assert [layer["name"] for layer in bare] == ["a", "b"]
    old = {"Name": "r", "LayerType": "Reformat", "Origin": "REFORMAT", "Inputs": [{"Format/Datatype": "Row FP32"}]}
    new = {"Name": "n", "Outputs": [{"Format": "Linear", "DataType": "Half"}]}
    found = output.layers_of(json.dumps({"Layers": [old, new], "I/O Tensors": []}))
    assert (found[0]["type"], found[0]["origin"], found[0]["formats"]) == ("Reformat", "REFORMAT", "input: Row FP32")
    assert found[1]["formats"] == "output: Linear Half"
    for wrong in ("{", "{}", "3"):
        with pytest.raises(BoardError) as failed:
            output.layers_of(wrong)
        assert failed.value.kind == "truncated"


@pytest.mark.parametrize(
    ("version", "precision", "typing", "expected"),
    [
        ((8, 2, 1), "fp16", "auto", True),
        ((10, 3, 0), "fp32", "auto", True),
        ((10, 13, 3), "fp32", "auto", False),
        ((10, 13, 3), "fp16", "auto", True),  # the file is fp32: strong typing would silently be fp32
        ((10, 13, 3), "fp32", "weak", True),
        ((10, 3, 0), "fp32", "strong", False),
        ((11, 4, 0), "fp32", "auto", False),
    ],
)
def test_typing_is_what_the_version_wants_and_the_file_carries(
    version: tuple[int, int, int], precision: str, typing: str, expected: bool
) -> None:
    assert is_weak(version, onnx_facts(onnx()), precision, typing) is expected


@pytest.mark.parametrize(
    ("version", "precision", "typing", "kind", "message"),
    [
        ((11, 4, 0), "fp16", "auto", "bad_request", "would build it in fp32. Export it in fp16"),
        ((11, 4, 0), "fp32", "weak", "unsupported", "11.4.0 has no weak typing"),
        ((8, 6, 1), "fp32", "strong", "unsupported", "8.6.1 has no strong typing"),
        ((8, 6, 1), "int8", "auto", "bad_request", "has no QuantizeLinear nodes"),
        ((8, 6, 1), "fp32", "strict", "bad_request", "typing is auto, weak or strong"),
    ],
)
def test_a_precision_that_would_silently_be_another_is_refused(
    version: tuple[int, int, int], precision: str, typing: str, kind: str, message: str
) -> None:
    with pytest.raises(BoardError, match=message) as refused:
        is_weak(version, onnx_facts(onnx()), precision, typing)
    assert refused.value.kind == kind


def test_facts_of_an_onnx_file_are_those_of_the_onnx_package() -> None:
    import onnx as package

    for precision in ("fp32", "int8"):
        data = onnx(precision)
        proto = package.load_model_from_string(data)
        facts = onnx_facts(data)
        assert facts.operators == {node.op_type for node in proto.graph.node}
        assert facts.weight_types == {tensor.data_type for tensor in proto.graph.initializer}
        assert [entry["name"] for entry in facts.inputs] == [value.name for value in proto.graph.input]
        assert facts.outputs == [{"name": "logits", "dtype": "float32", "shape": [1, 4]}]
        assert facts.carries("int8") == (precision == "int8")


@pytest.mark.parametrize("data", [b"", b"\x00not onnx", b"\x3a\xff", onnx()[:-40], b"\xff" * 64])
def test_what_is_no_onnx_file_is_refused(data: bytes) -> None:
    with pytest.raises(BoardError, match="not an ONNX model") as refused:
        onnx_facts(data)
    assert refused.value.kind == "bad_request"


@pytest.mark.parametrize("asked", ["fp32", "none", "auto"])
def test_a_quantized_file_is_built_in_int8_even_where_nobody_asks_for_it(asked: str) -> None:
    assert effective_precision(onnx_facts(onnx("int8")), asked) == "int8"
    assert effective_precision(onnx_facts(onnx()), asked) == "fp32"
    assert effective_precision(onnx_facts(onnx()), "fp16") == "fp16"


@pytest.mark.parametrize("asked", ["int8", "mixed"])
def test_only_a_file_of_ours_says_what_it_is_built_in_where_its_network_is_int8(asked: str) -> None:
    import onnx as package

    proto = package.load_model_from_string(onnx())
    proto.metadata_props.add(key="precision", value="fp16")
    for producer, expected in (("nas", "fp16"), ("another", asked)):
        proto.producer_name = producer
        facts = onnx_facts(proto.SerializeToString())
        assert effective_precision(facts, asked) == expected
    with pytest.raises(BoardError, match=f"{asked} is asked for, but the file has no QuantizeLinear nodes"):
        is_weak((10, 3, 0), facts, effective_precision(facts, asked))
