"""Packages for a board: chains of segments, engines built there and only there, scripts in Python 3.6's syntax."""

import ast
import importlib
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from export_networks import MEAN, PROFILE, STD, network_input, run, small_candidate, smooth_images, time_models

from nas import export as export_module
from nas.compress.calibrate import calibrate
from nas.core.errors import DeviceError, UsageError
from nas.core.records import Measurement
from nas.devices import board
from nas.devices.agent import pack
from nas.devices.board import trt_engine, trtexec_output
from nas.export.check import PackageError
from nas.export.dialect import ORT, TRT_8_4, TRT_10_13, Dialect
from nas.export.forms import answers, in_series
from nas.export.graph import random_weights, segment_models, tensors_model
from nas.export.package import (
    Instruments,
    PackagePlan,
    complete_package,
    export_package,
    latency_report,
    measured_accuracy,
    read_artefact,
    verify_package,
)

TEST_IMAGES = smooth_images(40, 32, 1)
LABELS = np.arange(40) % 5
CANDIDATE = small_candidate("fp32", (0.45, 0.29))
SCRIPTS = ("infer.py", "parity.py", "bench.py", "build_engine.py")


@cache
def board_code() -> bytes:
    """The program for a board with a stand-in for TensorRT."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(Path(board.__file__).parent, Path(scratch) / "board"))
        fake = (Path(__file__).parent / "fake_trt_engine.py.txt").read_text(encoding="utf-8")
        (folder / "trt_engine.py").write_text(fake, encoding="utf-8")
        (folder / "cuda.py").write_text("def find_cuda():\n    return None\n", encoding="utf-8")
        said = "from .errors import BoardError\n\n\ndef failure_of(text, code, what):\n"
        said += "    return BoardError('killed', '%s: ended with %s' % (what, code))\n"
        (folder / "trtexec_output.py").write_text(said, encoding="utf-8")
        return pack(folder).data


def plan(dialect: Dialect = TRT_8_4, precision: str = "fp32", **changes: object) -> PackagePlan:
    names = ("fine", "scratch", "hole", "stain", "dent")
    candidate = CANDIDATE.with_precision(precision)
    return PackagePlan("tiny", candidate, "segments", names, MEAN, STD, dialect=dialect, **changes)


def instruments(measure: object = time_models) -> Instruments:
    return Instruments(
        run=run,
        measure_accuracy=lambda model: measured_accuracy(run, model, TEST_IMAGES, LABELS, exits=2),
        measure_latency=measure,
        device=PROFILE,
        board_code=board_code(),
    )


def export(folder: Path, the_plan: PackagePlan, tools: Instruments | None = None) -> Path:
    weights = random_weights(CANDIDATE, 0)
    quant = None
    if "int8" in the_plan.candidate.precisions:
        quant = calibrate(run, *tensors_model(CANDIDATE, weights, MEAN, STD), smooth_images(64, 32, 3))
    export_package(folder, the_plan, weights, quant, smooth_images(20, 32, 9), tools or instruments())
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("packages") / "tiny", plan())


@pytest.fixture(scope="module")
def built(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the package."""
    engines = tmp_path_factory.mktemp("home") / "engines"
    done = script(package, "build_engine.py", "--engines", str(engines))
    assert done.returncode == 0, done.stdout + done.stderr
    return engines


@pytest.fixture
def engines(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engines"))


def script(folder: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of a package as a user of the board would."""
    return subprocess.run(
        [sys.executable, str(folder / name), *arguments],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent), "LC_ALL": "C.UTF-8", **environment},
        timeout=60,
        check=False,
    )


class TestExport:
    @pytest.mark.parametrize(
        ("dialect", "precision"), [(TRT_8_4, "int8"), (TRT_10_13, "fp16"), (TRT_10_13, "int8"), (ORT, "int8")]
    )
    def test_a_chain_is_exported_measured_and_verified(self, tmp_path: Path, dialect: Dialect, precision: str) -> None:
        folder = export(tmp_path / "p", plan(dialect, precision, budget_ms=1e6, reference_top1=0.0))
        found = verify_package(folder, run)
        manifest = found.package.manifest
        assert found.passed and manifest.is_good and manifest.dialect == dialect.name
        assert [s.exit_index for s in manifest.segments] == [0, 1, 2]
        assert manifest.model_files == ("segment_0.onnx", "segment_1.onnx", "segment_2.onnx")
        assert not (folder / "model.onnx").exists()
        assert (folder / "board.pyz").exists() == (dialect is not ORT) == (folder / "build_engine.py").exists()
        assert manifest.opset == dialect.opset and sum(manifest.accuracy.exit_shares) == pytest.approx(1)
        latencies = [p.latency_ms for p in manifest.latency.paths]
        assert latencies == sorted(latencies) and len(latencies) == 3
        assert "segment_0.onnx" in (folder / "README.md").read_text(encoding="utf-8")

    def test_the_chain_answers_as_the_graph_with_conditionals(self, package: Path, tmp_path: Path) -> None:
        gated = export(tmp_path / "if", replace(plan(), form="if", dialect=ORT))
        for name in ("logits", "exits"):
            ours, theirs = (np.load(folder / "parity" / f"{name}.npy") for folder in (package, gated))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        exits = np.load(package / "parity" / "exits.npy")
        assert len(set(exits.tolist())) > 1, "the images of this test must take several exits"

    def test_a_path_costs_all_the_segments_that_it_passes(self) -> None:
        chain = segment_models(CANDIDATE, random_weights(CANDIDATE, 0), MEAN, STD, dialect=TRT_8_4)

        def measure(models: list[bytes]) -> list[Measurement]:
            sizes = [1.0, 0.25, 0.5]
            return [
                Measurement(f"s{i}", "network", "fp32", ms, ((ms, 2 * ms),), (True,), "wall", "", i, session_ms=(ms,))
                for i, (ms, _) in enumerate(zip(sizes, models, strict=True))
            ]

        latency, medians, _ = latency_report(plan(), chain, (0.5, 0.25, 0.25), measure, PROFILE)
        assert [p.latency_ms for p in latency.paths] == [1.0, 1.25, 1.75]
        assert [p.p50_ms for p in latency.paths] == [1.5, 1.875, 2.625]
        assert latency.figures.expected_ms == pytest.approx(0.5 + 0.25 * 1.25 + 0.25 * 1.75)
        assert (latency.figures.worst_ms, medians.worst_ms) == (1.75, 2.625)

    def test_a_segment_that_cannot_be_measured_is_named(self) -> None:
        good = Measurement("a#0", "network", "fp32", 1.0, ((1.0,),), (True,), "wall", "", 1)
        bad = replace(good, key="a#1", latency_ms=None, error="no engine")
        with pytest.raises(DeviceError, match="a#1: the exported network could not be measured: no engine"):
            in_series([good, bad])

    def test_every_image_keeps_its_own_answer(self) -> None:
        """Whatever leaves early, the rest must not be mixed up."""
        chain = segment_models(CANDIDATE, random_weights(CANDIDATE, 0), MEAN, STD, dialect=TRT_8_4)
        images = network_input(TEST_IMAGES)
        logits, exits = answers(run, chain, images, 2)
        for i in range(0, 40, 7):
            alone, place = answers(run, chain, images[i : i + 1], 2)
            np.testing.assert_allclose(alone[0], logits[i], rtol=1e-5, atol=1e-6)
            assert place[0] == exits[i]

    def test_without_the_device_the_latency_stays_open_and_can_be_added(self, tmp_path: Path) -> None:
        folder = export(tmp_path / "p", plan(budget_ms=5.0), instruments(measure=None))
        manifest = verify_package(folder, run).package.manifest
        assert manifest.verdict == "unmeasured" and manifest.latency is None and not manifest.is_good
        assert "nas deploy" in manifest.reasons[0]
        assert "UNMEASURED" in (folder / "README.md").read_text(encoding="utf-8")
        measured = export(tmp_path / "q", plan(budget_ms=5.0))
        latency = verify_package(measured).package.manifest.latency
        done = complete_package(folder, replace(manifest, latency=latency, verdict="good", reasons=()))
        assert verify_package(folder, run).passed and done.manifest.is_good
        assert "UNMEASURED" not in (folder / "README.md").read_text(encoding="utf-8")

    def test_a_package_for_a_board_needs_the_program_for_it(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"for tensorrt-8\.4 the program for the board is needed"):
            export(tmp_path / "p", plan(), replace(instruments(), board_code=None))
        assert not (tmp_path / "p").exists()

    def test_a_graph_that_the_parser_would_refuse_is_not_exported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nas.export.package.tensorrt_problems", lambda *_: ["node x: no zero point"])
        with pytest.raises(PackageError, match=r"segment_0\.onnx breaks the rules .*: node x: no zero point"):
            export(tmp_path / "p", plan())

    def test_a_missing_segment_is_noticed(self, package: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(package, tmp_path / "copy"))
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest["files"]["segment_1.onnx"]
        (copy / "segment_1.onnx").unlink()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(PackageError, match=r"does not list segment_1\.onnx"):
            verify_package(copy, run)


class TestScripts:
    def test_are_python_3_6_and_import_nothing_of_this_project(self, package: Path) -> None:
        allowed = {"numpy", "onnxruntime", "PIL", "infer", "build_engine", "nas_board", *sys.stdlib_module_names}
        for name in SCRIPTS:
            tree = ast.parse((package / name).read_text(encoding="utf-8"), feature_version=(3, 6))
            for node in ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert "__future__" not in names or "annotations" not in {a.name for a in node.names}, name
                assert {n.split(".")[0] for n in names} <= allowed, name
                assert not isinstance(node, ast.NamedExpr), name
                keywords = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else set()
                assert not keywords & {"capture_output", "text"}, name

    def test_a_chain_runs_on_a_processor(self, package: Path) -> None:
        checked = script(package, "parity.py", "--runtime", "onnxruntime")
        assert checked.returncode == 0 and checked.stdout.startswith("PASS  16 images"), checked.stdout + checked.stderr
        np.save(package.parent / "image.npy", TEST_IMAGES[:12])
        told = script(package, "infer.py", "image.npy", "--json", "--runtime", "onnxruntime")
        lines = [json.loads(line) for line in told.stdout.splitlines()]
        manifest = verify_package(package).package.manifest
        logits, exits = answers(run, read_artefact(package, manifest), network_input(TEST_IMAGES[:12]), 2)
        assert [line["exit_index"] for line in lines] == exits.tolist()
        assert [line["top"][0]["class"] for line in lines] == [manifest.class_names[k] for k in logits.argmax(1)]

    def test_engines_are_built_outside_and_give_the_same_answers(self, package: Path, built: Path) -> None:
        checked = script(package, "parity.py", "--engines", str(built), "--json")
        told = json.loads(checked.stdout)
        assert told["passed"] and told["runtime"] == "tensorrt" and told["relative_l2"] < 1e-5
        timed = script(package, "bench.py", "--engines", str(built), "--runs", "20", "--json", "--budget-ms", "1e6")
        paths = json.loads(timed.stdout)["paths"]
        assert timed.returncode == 0 and [p["exit_index"] for p in paths] == [0, 1, 2]
        assert all(0 < p["p50_ms"] <= p["p95_ms"] and p["with_host_ms"] > 0 for p in paths)
        assert paths[0]["p50_ms"] < paths[1]["p50_ms"] < paths[2]["p50_ms"]
        assert verify_package(package, run).passed, "nothing was written into the package"
        sidecar = json.loads((built / "engine.json").read_text())
        entry = sidecar["engines"]["segment_0.onnx"]
        assert entry["built_on"]["tensorrt"] == "10.3.0.30" and entry["typing"] == "weak"
        assert entry["warnings"] == ["skipped_tactics: 3 tactics were passed over"]
        assert stat.S_IMODE((built / "segment_0.engine").stat().st_mode) == 0o600

    def test_kernels_timed_under_other_conditions_are_timed_anew(self, package: Path, tmp_path: Path) -> None:
        engines = tmp_path / "engines"
        builds = ((), ("--force",), ("--force",))
        found = []
        for more, version in zip(builds, ("10.3.0.30", "10.7.0", "10.7.0"), strict=True):
            done = script(package, "build_engine.py", "--engines", str(engines), *more, FAKE_TENSORRT=version)
            assert done.returncode == 0, done.stdout + done.stderr
            found.append(len(list(engines.glob("timing-cache-*.bin"))))
        assert found == [1, 2, 2]
        entry = json.loads((engines / "engine.json").read_text())["engines"]["segment_0.onnx"]
        assert {"power_mode", "clocks_locked", "locked_mhz", "cuda"} <= set(entry["built_on"])

    def test_engines_lie_in_a_private_folder_of_the_user_and_are_built_once(self, package: Path) -> None:
        home = package.parent / "somebody"
        first = script(package, "build_engine.py", HOME=str(home))
        assert first.returncode == 0 and "building" in first.stdout, first.stdout + first.stderr
        (place,) = (home / ".cache" / "nas-engines").iterdir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        second = script(package, "build_engine.py", HOME=str(home))
        assert second.stdout.count("is there") == 3 and "building" not in second.stdout
        assert script(package, "parity.py", HOME=str(home)).returncode == 0

    def test_a_missed_deadline_is_status_1_with_the_figure(self, package: Path) -> None:
        timed = script(package, "bench.py", "--runtime", "onnxruntime", "--runs", "20", "--budget-ms", "1e-6")
        assert timed.returncode == 1 and "FAIL  expected " in timed.stdout, timed.stdout + timed.stderr
        assert script(package, "bench.py", "--runs", "3").returncode == 2


class TestForeignEngines:
    def refused(self, package: Path, engines: Path, reason: str, **environment: str) -> None:
        for name in ("parity.py", "bench.py"):
            done = script(package, name, "--engines", str(engines), **environment)
            assert done.returncode in (1, 2) and reason in done.stdout, done.stdout + done.stderr

    def test_a_replaced_engine(self, package: Path, engines: Path) -> None:
        (engines / "segment_1.engine").write_bytes(b"ENGINE of somebody else")
        self.refused(package, engines, "is not the engine that build_engine.py made; it is not loaded")

    def test_an_engine_without_its_sidecar(self, package: Path, engines: Path) -> None:
        (engines / "engine.json").unlink()
        self.refused(package, engines, "engine.json is not there. Run: python3 build_engine.py")

    def test_an_engine_of_another_tensorrt(self, package: Path, engines: Path) -> None:
        reason = "was built with tensorrt 10.3.0.30, here it is 10.7.0"
        self.refused(package, engines, reason, FAKE_TENSORRT="10.7.0")

    @pytest.mark.parametrize("what", ["board", "cuda", "compute_capability"])
    def test_an_engine_of_another_board(self, package: Path, engines: Path, what: str) -> None:
        sidecar = json.loads((engines / "engine.json").read_text())
        sidecar["engines"]["segment_0.onnx"]["built_on"][what] = "another"
        (engines / "engine.json").write_text(json.dumps(sidecar))
        self.refused(package, engines, f"was built with {what} another, here it is ")

    def test_an_engine_of_another_model(self, package: Path, engines: Path) -> None:
        sidecar = json.loads((engines / "engine.json").read_text())
        sidecar["engines"]["segment_2.onnx"]["model_sha256"] = "0" * 64
        (engines / "engine.json").write_text(json.dumps(sidecar))
        self.refused(package, engines, "the engine of segment_2.onnx was built of another model")

    @pytest.mark.parametrize("name", ["", "engine.json", "segment_0.engine"])
    def test_what_others_could_have_changed(self, package: Path, engines: Path, name: str) -> None:
        place = engines / name if name else engines
        place.chmod(place.stat().st_mode | stat.S_IWOTH)
        self.refused(package, engines, "can be changed by somebody else; its engines are not loaded")

    def test_a_link_to_another_file(self, package: Path, engines: Path) -> None:
        (engines / "segment_0.engine").rename(engines.parent / "elsewhere")
        (engines / "segment_0.engine").symlink_to(engines.parent / "elsewhere")
        self.refused(package, engines, "its engines are not loaded")

    def test_a_path_out_of_the_folder(self, package: Path, engines: Path) -> None:
        shutil.copy(engines / "segment_0.engine", engines.parent / "outside.engine")
        sidecar = json.loads((engines / "engine.json").read_text())
        sidecar["engines"]["segment_0.onnx"]["file"] = "../outside.engine"
        (engines / "engine.json").write_text(json.dumps(sidecar))
        self.refused(package, engines, "outside.engine is not there")

    def test_a_changed_program_for_the_board(self, package: Path, tmp_path: Path, engines: Path) -> None:
        copy = Path(shutil.copytree(package, tmp_path / "copy"))
        (copy / "board.pyz").write_bytes(board_code() + b" ")
        done = script(copy, "infer.py", str(copy / "parity" / "images.npy"), "--engines", str(engines))
        assert done.returncode == 2 and "board.pyz is not the file that manifest.json describes" in done.stderr


class TestBuilding:
    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            ("refused", "building segment_0.onnx: no kernel for stages.1.0.depthwise (build_failed)"),
            ("killed", "building segment_0.onnx: ended with -9 (killed)"),
        ],
    )
    def test_a_failed_build_says_why_and_leaves_nothing_to_load(
        self, package: Path, tmp_path: Path, fault: str, told: str
    ) -> None:
        done = script(package, "build_engine.py", "--engines", str(tmp_path / "e"), "--json", FAKE_FAULT=fault)
        assert done.returncode == 1 and json.loads(done.stdout) == {"built": False, "error": told}
        assert not (tmp_path / "e" / "engine.json").exists()

    def test_every_segment_of_a_mixed_network_is_built_in_its_own_precision(self, tmp_path: Path) -> None:
        mixed = replace(plan(), candidate=CANDIDATE.with_precision(("fp16", "fp16", "int8", "fp16", "fp16")))
        folder = export(tmp_path / "p", mixed)
        done = script(folder, "build_engine.py", "--engines", str(tmp_path / "e"), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        entries = json.loads(done.stdout)["engines"]
        built = [entries[f"segment_{k}.onnx"] for k in range(3)]
        assert [e["precision"] for e in built] == ["fp16", "int8", "fp16"]
        assert {e["typing"] for e in built} == {"weak"}
        assert script(folder, "parity.py", "--engines", str(tmp_path / "e")).returncode == 0

    def test_without_tensorrt_the_other_runtime_is_named(self, package: Path, tmp_path: Path) -> None:
        done = script(package, "build_engine.py", "--engines", str(tmp_path / "e"), FAKE_TENSORRT="")
        assert done.returncode == 2
        assert "cannot import tensorrt. On a board without TensorRT: --runtime onnxruntime" in done.stdout

    def test_force_builds_again_what_is_there(self, package: Path, engines: Path) -> None:
        (engines / "segment_0.engine").write_bytes(b"ENGINE of somebody else")
        done = script(package, "build_engine.py", "--engines", str(engines))
        assert done.stdout.count("is there") == 2, "only the engine that is not ours is built again"
        assert script(package, "parity.py", "--engines", str(engines)).returncode == 0
        assert "is there" not in script(package, "build_engine.py", "--engines", str(engines), "--force").stdout


def test_what_the_scripts_use_of_the_program_for_a_board_is_there() -> None:
    """The stand-in of these tests has the names that are asked for; so must the real modules, with these arguments."""
    source = (Path(export_module.__file__).parent / "build_engine.py.txt").read_text(encoding="utf-8")
    tree = ast.parse(source)
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "nas_board"
        for alias in node.names
    }
    assert modules == {"building", "cuda", "errors", "state", "trt_engine"}
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    for module, name in sorted(used):
        assert hasattr(importlib.import_module(f"nas.devices.board.{module}"), name), f"{module}.{name}"
    arguments = inspect.signature(trt_engine.TensorRtSession).parameters
    assert list(arguments) == ["trt", "cuda", "plan", "seed", "warnings"]
    assert list(inspect.signature(trtexec_output.failure_of).parameters) == ["text", "returncode", "what"]
    used_keys = (node for node in ast.walk(ast.parse(inspect.getsource(trt_engine))) if _is_request_key(node))
    request = {node.slice.value for node in used_keys}
    asked = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict) and "timing_cache" in _keys(node))
    assert request and request <= {*_keys(asked), "report"}, (
        "trt_engine.build reads a key that build_engine.py does not send"
    )


def _is_request_key(node: ast.AST) -> bool:
    """The key in an expression request["..."]."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "request"
        and isinstance(node.slice, ast.Constant)
    )


def _keys(node: ast.Dict) -> set[str]:
    return {key.value for key in node.keys if isinstance(key, ast.Constant)}
