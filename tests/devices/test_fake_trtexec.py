"""The stand-in for trtexec keeps to what is documented of each version; tests of the runner rely on it."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_board.tools import calls_of, install_trtexec
from fake_board.tree import ORIN_NANO_SUPER, write_board
from onnx import helper, numpy_helper

from nas.devices.board.state import snapshot

COMMON = ["--iterations=20", "--duration=0", "--useCudaGraph", "--useSpinWait", "--noDataTransfers"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="Conv_0"),
        helper.make_node("Relu", ["a"], ["b"], name="Relu_1"),
        helper.make_node("HardSigmoid", ["b"], ["c"], name="HardSigmoid_2"),
        helper.make_node("Mul", ["b", "c"], ["y"], name="Mul_3"),
    ]
    shapes = {"x": [1, 3, 8, 8], "y": [1, 4, 6, 6]}
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items())
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]).SerializeToString())
    return path


def started(program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *options], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("version", "number"), [("8.2", "8201"), ("8.5", "8502"), ("10.3", "100300"), ("11", "110401")]
)
def test_the_banner_tells_the_version_and_the_log_that_it_is_simulated(
    tmp_path: Path, model: Path, version: str, number: str
) -> None:
    done = started(install_trtexec(tmp_path, version), f"--onnx={model}", *COMMON)
    assert done.returncode == 0, done.stderr
    assert f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}]" in done.stdout
    assert f"&&&& PASSED TensorRT.trtexec [TensorRT v{number}]" in done.stdout
    assert "SIMULATED: this is a stand-in" in done.stdout


@pytest.mark.parametrize(
    ("version", "option", "known"),
    [
        ("8.2", "--explicitBatch", True),
        ("8.2", "--memPoolSize=workspace:64", False),
        ("8.2", "--skipInference", False),
        ("8.0", "--exportLayerInfo=x", False),
        ("8.5", "--workspace=64", True),
        ("10.3", "--explicitBatch", False),
        ("10.3", "--buildOnly", False),
        ("10.3", "--bf16", True),
        ("11", "--fp16", False),
        ("11", "--useCudaGraph", True),
        ("11", "--noCudaGraph", True),
        ("10.3", "--noCudaGraph", False),
    ],
)
def test_options_exist_in_the_versions_that_have_them(
    tmp_path: Path, model: Path, version: str, option: str, known: bool
) -> None:
    done = started(install_trtexec(tmp_path, version), f"--onnx={model}", option)
    assert (done.returncode == 0) is known
    assert (f"Unknown option: {option.partition('=')[0]}" in done.stderr) is not known
    assert ("&&&& FAILED" in done.stdout) is not known


def test_files_of_8_2_hold_the_warm_up_and_no_medians(tmp_path: Path, model: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("Times", "Profile", "LayerInfo")}
    exports = [f"--export{name}={path}" for name, path in files.items()]
    done = started(
        install_trtexec(tmp_path, "8.2"),
        f"--onnx={model}",
        "--profilingVerbosity=detailed",
        "--separateProfileRun",
        *COMMON,
        *exports,
    )
    assert done.returncode == 0, done.stderr
    times = json.loads(files["Times"].read_text())
    assert any(q["startComputeMs"] < 200 for q in times)
    assert sum(q["startComputeMs"] >= 200 for q in times) == 20
    assert "endToEndMs" in times[0]
    profile = json.loads(files["Profile"].read_text())
    assert profile[0] == {"count": 20} and "medianMs" not in profile[1]
    layers = json.loads(files["LayerInfo"].read_text())
    assert layers["Layers"][0]["Origin"] == "REFORMAT" and "Metadata" not in layers["Layers"][1]
    assert "Bindings" in layers
    assert "End-to-End Host Latency: min = " in done.stdout
    assert "percentile(99%)" in done.stdout and "percentile(90%)" not in done.stdout


def test_files_of_10_3_have_metadata_with_raw_control_characters(tmp_path: Path, model: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("Times", "Profile", "LayerInfo")}
    exports = [f"--export{name}={path}" for name, path in files.items()]
    done = started(
        install_trtexec(tmp_path, "10.3"), f"--onnx={model}", "--profilingVerbosity=detailed", *COMMON, *exports
    )
    assert done.returncode == 0, done.stderr
    assert all(q["startComputeMs"] >= 200 for q in json.loads(files["Times"].read_text()))
    assert "medianMs" in json.loads(files["Profile"].read_text())[1]
    text = files["LayerInfo"].read_text()
    with pytest.raises(json.JSONDecodeError, match="Invalid control character"):
        json.loads(text)
    metadata = [x["Metadata"] for x in json.loads(text, strict=False)["Layers"]]
    assert any("\x1e[ONNX Layer: " in m for m in metadata)
    assert "The e2e network timing is not reported" in done.stdout, "without --separateProfileRun there are no times"
    assert "percentile(90%)" not in done.stdout


def test_layer_information_of_11_has_other_names_and_no_bindings(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "layers.json"
    program = install_trtexec(tmp_path, "11")
    started(program, f"--onnx={model}", "--profilingVerbosity=detailed", f"--exportLayerInfo={path}", "--skipInference")
    found = json.loads(path.read_text(), strict=False)
    assert "Bindings" not in found and found["I/O Tensors"]
    assert "Format/Datatype" not in found["Layers"][1]["Inputs"][0]
    plain = tmp_path / "plain.json"
    started(program, f"--onnx={model}", f"--exportLayerInfo={plain}", "--skipInference")
    assert all(isinstance(x, str) for x in json.loads(plain.read_text(), strict=False)["Layers"])


def test_an_engine_runs_in_its_own_version_only(tmp_path: Path, model: Path) -> None:
    engine = tmp_path / "engine.plan"
    assert started(install_trtexec(tmp_path / "a", "10.3"), f"--onnx={model}", f"--saveEngine={engine}").returncode == 0
    other = install_trtexec(tmp_path / "b", "10.13")
    done = started(other, f"--loadEngine={engine}", "--iterations=5")
    assert done.returncode == 1
    assert "expecting library version 10.13.3 got 10.3.0, please rebuild" in done.stderr
    engine.write_bytes(b"\x00 no engine")
    assert "magicTag" in started(other, f"--loadEngine={engine}").stderr


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("build_failure", 1, "Could not find any implementation for node"),
        ("out_of_memory", 1, "Error Code 2: OutOfMemory"),
        ("killed", -signal.SIGKILL, ""),
        ("segfault", -signal.SIGSEGV, ""),
        ("skipped_tactics", 0, "Skipping tactic 2 due to insufficient memory on requested size of"),
        ("no_graph", 0, "CUDA graph capture failed"),
        ("unstable", 0, "GPU compute time is unstable, with coefficient of variance"),
    ],
)
def test_faults_come_in_the_order_in_which_they_were_scripted(
    tmp_path: Path, model: Path, fault: str, code: int, said: str
) -> None:
    program = install_trtexec(tmp_path, "10.3", faults=[None, fault])
    assert started(program, "--help").returncode == 0
    assert started(program, f"--onnx={model}", *COMMON).returncode == 0
    done = started(program, f"--onnx={model}", *COMMON)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert started(program, f"--onnx={model}", *COMMON).returncode == 0
    assert len(calls_of(program)) == 4


def test_hard_swish_cannot_be_read_before_8_4(tmp_path: Path) -> None:
    node = helper.make_node("HardSwish", ["x"], ["y"], name="act")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    path = tmp_path / "swish.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)]).SerializeToString())
    done = started(install_trtexec(tmp_path / "a", "8.2"), f"--onnx={path}")
    assert done.returncode == 1 and "No importer registered for op: HardSwish" in done.stderr
    assert started(install_trtexec(tmp_path / "b", "8.4"), f"--onnx={path}").returncode == 0


def test_a_process_that_hangs_does_not_mind_being_asked_to_end(tmp_path: Path, model: Path) -> None:
    program = install_trtexec(tmp_path, "8.5", every="hang")
    process = subprocess.Popen([program, f"--onnx={model}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("&&&& RUNNING")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("fault", "broken"), [("truncated", True), ("control_characters", True), ("nan", True), (None, False)]
)
def test_profiles_break_as_scripted(tmp_path: Path, model: Path, fault: str | None, broken: bool) -> None:
    path = tmp_path / "profile.json"
    program = install_trtexec(tmp_path, "10.3", every=fault)
    assert started(program, f"--onnx={model}", f"--exportProfile={path}", *COMMON).returncode == 0
    try:
        json.loads(path.read_text(), parse_constant=lambda _: pytest.fail("Python takes NaN, JSON does not"))
    except json.JSONDecodeError:
        assert broken
    else:
        assert not broken


def test_throttling_changes_the_board_and_the_times(tmp_path: Path, model: Path) -> None:
    root = write_board(tmp_path / "root", ORIN_NANO_SUPER.locked)
    program = install_trtexec(tmp_path, "10.3", faults=[None, "throttle"], root=root)
    totals = []
    for _ in range(2):
        path = tmp_path / "times.json"
        started(program, f"--onnx={model}", f"--exportTimes={path}", *COMMON)
        totals.append(sum(q["computeMs"] for q in json.loads(path.read_text())))
    assert totals[1] == pytest.approx(1.6 * totals[0], rel=1e-3)
    assert snapshot(str(root))["throttle"]["oc3_event_cnt"] == 7
