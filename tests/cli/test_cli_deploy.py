"""`nas deploy`: real packages on this processor, and on a board behind a real OpenSSH server."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.cli.main import run
from nas.core.errors import DeviceError, NasError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.devices import board, open_device
from nas.devices.address import parse_address
from nas.devices.agent import AgentFile, pack, packed_agent
from nas.devices.base import MeasureJob
from nas.devices.folders import send_folder
from nas.devices.remote import SLOW_START, RemoteDevice
from nas.devices.ssh import Ssh
from nas.export.dialect import ORT, TRT_8_4, Dialect
from nas.export.graph import random_weights
from nas.export.manifest import PackageForm
from nas.export.package import (
    Instruments,
    PackageError,
    PackagePlan,
    check_scripts,
    export_package,
    measured_accuracy,
    verify_package,
)
from nas.latency.lines import network_key
from nas.latency.table import LatencyTable
from nas.measure.deploy import Deployment, deployed_candidate, run_on_board
from nas.testing import SshServer, requires_openssh

STAGES = (StageConfig((BlockConfig(8, 16, 8),)), StageConfig((BlockConfig(8, 16, 16, stride=2),)))
CANDIDATE = Candidate(16, 4, StemConfig(8), STAGES, HeadConfig(), (ExitConfig(0, threshold=0.3),))


def made(
    folder: Path,
    form: PackageForm = "if",
    dialect: Dialect = ORT,
    *,
    measured: bool = True,
    name: str = "small",
    agent: AgentFile | None = None,
) -> Path:
    """A package of a small network with one exit, random weights."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, 40)
    device = open_device("cpu")
    plan = PackagePlan(name, CANDIDATE, form, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3, dialect=dialect)
    instruments = Instruments(
        device.run,
        lambda model: measured_accuracy(device.run, model, images, labels, exits=1),
        (lambda ms: device.measure([MeasureJob(f"m{i}", "row", "none", m, 0) for i, m in enumerate(ms)]))
        if measured
        else None,
        device.profile,
        board_code=(agent or packed_agent()).data,
    )
    export_package(folder / name, plan, random_weights(CANDIDATE, 0), None, images, instruments)
    return folder / name


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables") / "cpu"


@pytest.fixture
def deployed(table: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict, str]]:
    """Deploys on this processor: exit code, document, messages."""

    def call(package: Path, *options: str, device: str = "cpu", table: Path = table) -> tuple[int, dict, str]:
        code = run(["deploy", str(package), "--device", device, "--table", str(table), *options, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return call


def changed(package: Path, folder: Path, name: str, array: np.ndarray) -> Path:
    """A copy of a package with another array, its manifest fitting."""
    copy = Path(shutil.copytree(package, folder / "copy"))
    np.save(copy / "parity" / name, array)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][f"parity/{name}"] = hashlib.sha256((copy / "parity" / name).read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_package_is_checked_measured_and_teaches_the_table(
    package: Path, table: Path, deployed: Callable[..., tuple[int, dict, str]]
) -> None:
    code, document, _ = deployed(package, "--budget-ms", "1s")
    assert code == 0 and document["verdict"] == "good" and document["reasons"] == []
    assert document["parity"] == {"exit_agreement": 1.0, "top1_agreement": 1.0, "relative_l2": 0.0}
    assert [p["exit_index"] for p in document["paths"]] == [0, 1]
    key = network_key(CANDIDATE, "if")
    assert document["stored"] == key
    stored = LatencyTable.read(table).networks[key]
    assert stored.measurement.latency_ms == document["paths"][-1]["latency_ms"]
    assert stored.candidate.exits[0].threshold is None
    assert document["scripts"] == [] and document["folder"] == ""


def test_a_missed_deadline_is_exit_code_3_and_what_was_measured_is_kept(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table"
    assert run(["deploy", str(package), "--device", "cpu", "--budget-ms", "0.1us", "--table", str(table)]) == 3
    captured = capsys.readouterr()
    assert "deadline 0.000100 ms (expected): MISSED with median " in captured.out
    assert "small is not good on " in captured.err and "above the budget" in captured.err
    assert captured.out.splitlines()[1].split() == ["path", "images", "latency", "median", "p95", "samples", "calm"]
    assert set(LatencyTable.read(table).networks) == {network_key(CANDIDATE, "if")}


def test_a_package_for_another_runtime_is_refused_with_the_command(
    tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
) -> None:
    package = made(tmp_path, "segments", TRT_8_4, measured=False)
    code, document, _ = deployed(package)
    assert code == 2
    assert "its graphs are of dialect tensorrt-8.4" in document["error"]["message"]
    assert "--student small --for ort --output DIR" in document["error"]["message"]


def test_other_answers_than_the_package_carries_are_exit_code_4(
    package: Path, tmp_path: Path, table: Path, deployed: Callable[..., tuple[int, dict, str]]
) -> None:
    copy = changed(package, tmp_path, "logits.npy", -np.load(package / "parity" / "logits.npy"))
    before = dict(LatencyTable.read(table).networks) if (table / "device.json").exists() else {}
    code, document, _ = deployed(copy)
    assert code == 4 and "does not give the answers that it carries" in document["error"]["message"]
    assert not before or dict(LatencyTable.read(table).networks) == before, "nothing is learnt from a wrong network"


def test_a_changed_file_is_refused(
    package: Path, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    (copy / "labels.txt").write_text("other\n", encoding="utf-8")
    code, document, _ = deployed(copy)
    assert code == 2 and "labels.txt was changed after the export" in document["error"]["message"]


def test_a_package_without_a_latency_gets_one(tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]) -> None:
    package = made(tmp_path, measured=False, name="open")
    assert verify_package(package).package.manifest.verdict == "unmeasured"
    code, document, _ = deployed(package, "--budget-ms", "1s")
    manifest = verify_package(package).package.manifest
    assert code == 0 and manifest.is_good and manifest.latency is not None
    assert manifest.latency.figures.expected_ms == document["figures"]["expected_ms"]
    assert (manifest.budget_ms, document["sha256"]) == (1000.0, verify_package(package).package.sha256)


def test_a_chain_teaches_the_table_with_the_whole_network(
    tmp_path: Path, table: Path, deployed: Callable[..., tuple[int, dict, str]]
) -> None:
    code, document, _ = deployed(made(tmp_path, "segments", name="chain"))
    assert code == 0 and document["stored"] == network_key(CANDIDATE, "logits")
    assert document["stored"] in LatencyTable.read(table).networks
    first, last = document["paths"]
    assert first["latency_ms"] < last["latency_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "--device", "cpu"], "nowhere: not a package folder. Packages are made by: nas export"),
        ([".", "--device", "cpu", "--to", "x"], "--to and --no-copy are for a board: --device ssh:USER@HOST"),
        ([".", "--device", "ssh:a,ssh:b"], "a package is deployed on one board at a time"),
        ([".", "--device", "cpu"], "not a package (no manifest.json)"),
    ],
)
def test_what_cannot_be_deployed_is_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["deploy", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_network_that_a_package_holds() -> None:
    two = replace(
        CANDIDATE,
        stages=(*STAGES, StageConfig((BlockConfig(16, 16, 16),))),
        exits=(ExitConfig(0, threshold=0.3), ExitConfig(1, threshold=0.4)),
    )
    assert deployed_candidate(two, "plain") == replace(two, exits=())
    kept = deployed_candidate(two.with_thresholds((2.0, 0.4)), "if")
    assert [e.after_stage for e in kept.exits] == [1] and kept.exits[0].threshold is None
    cut = deployed_candidate(two.with_thresholds((0.3, 0.0)), "segments")
    assert len(cut.stages) == 2 and [e.after_stage for e in cut.exits] == [0]


def with_file(package: Path, folder: Path, name: str, text: str) -> Path:
    """A copy of a package with a file of somebody else, its manifest fitting."""
    copy = Path(shutil.copytree(package, folder / "foreign"))
    (copy / name).write_text(text)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("name", ["parity.py", "numpy.py"])
def test_code_that_this_version_did_not_write_is_not_run_on_a_board(package: Path, tmp_path: Path, name: str) -> None:
    board_code = packed_agent().data
    check_scripts(verify_package(package).package, board_code)
    foreign = verify_package(with_file(package, tmp_path, name, "import os\n")).package
    with pytest.raises(PackageError, match=rf"{name}: not what this version of nas writes.* only measure .*--no-copy"):
        check_scripts(foreign, board_code)


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with SshServer(requires_openssh()) as running:
        yield running


class TestBoard:
    def test_the_package_is_copied_and_its_own_scripts_run_there(
        self, package: Path, server: SshServer, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
    ) -> None:
        table = tmp_path / "board"
        code, document, _ = deployed(package, "--budget-ms", "1s", device=server.device_name(), table=table)
        assert code == 0 and document["verdict"] == "good", document
        assert document["folder"] == "nas-packages/small"
        assert [(s["script"], s["code"]) for s in document["scripts"]] == [("parity.py", 0), ("bench.py", 0)]
        assert document["scripts"][0]["told"]["passed"] is True
        assert document["scripts"][1]["told"]["keeps_budget"] is True
        assert document["stored"] in LatencyTable.read(table).networks
        # again: the folder is replaced, the table has the network already
        code, document, _ = deployed(package, "--budget-ms", "0.1us", device=server.device_name(), table=table)
        assert code == 3

    def test_a_folder_of_somebody_else_is_not_replaced(
        self, package: Path, server: SshServer, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
    ) -> None:
        with Ssh(parse_address(server.device_name()).ssh) as ssh:
            send_folder(ssh, {"a.txt": b"mine"}, "other", "a.txt")
            with pytest.raises(DeviceError, match="other is there and was not put there by this program"):
                send_folder(ssh, {"manifest.json": b"{}"}, "other", "manifest.json")
            assert ssh.run(["cat", "other/a.txt"])[:2] == (0, "mine")
        options = ("--to", "other")
        code, document, _ = deployed(package, *options, device=server.device_name(), table=tmp_path / "t")
        assert code == 4 and "give another folder" in document["error"]["message"]

    def test_foreign_code_is_refused_before_anything_is_measured(
        self, package: Path, server: SshServer, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
    ) -> None:
        foreign = with_file(package, tmp_path, "bench.py", "print(1)\n")
        code, document, _ = deployed(foreign, "--to", "foreign", device=server.device_name(), table=tmp_path / "t")
        assert code == 2 and "bench.py: not what this version of nas writes" in document["error"]["message"]
        assert not (tmp_path / "t").exists() and not (server.home / "foreign").exists()
        assert deployed(foreign, "--no-copy", device=server.device_name(), table=tmp_path / "t")[0] == 0

    def test_no_copy_leaves_nothing(
        self, package: Path, server: SshServer, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
    ) -> None:
        code, document, _ = deployed(package, "--no-copy", device=server.device_name(), table=tmp_path / "t")
        assert code == 0 and (document["folder"], document["scripts"]) == ("", [])


@pytest.fixture(scope="module")
def fake_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> AgentFile:
    """The program for a board with a stand-in for TensorRT's module: ONNX Runtime computes what it "builds"."""
    folder = Path(shutil.copytree(Path(board.__file__).parent, tmp_path_factory.mktemp("agent") / "board"))
    fake = Path(__file__).parents[1] / "export" / "fake_trt_engine.py.txt"
    (folder / "trt_engine.py").write_text(fake.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "cuda.py").write_text("def find_cuda():\n    return None\n", encoding="utf-8")
    return pack(folder)


@pytest.fixture
def trt_package(fake_tensorrt: AgentFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain for TensorRT, while this version's program for boards is the one with the stand-in."""
    for place in ("nas.devices.agent", "nas.devices.remote", "nas.measure.deploy"):
        monkeypatch.setattr(f"{place}.packed_agent", lambda: fake_tensorrt)
    quick = replace(SLOW_START, row_round_ms=20.0, network_round_ms=20.0, retries=0, wait_ms=0.0)
    monkeypatch.setattr("nas.devices.remote.SLOW_START", quick)
    return made(tmp_path, "segments", TRT_8_4, measured=False, name="chain", agent=fake_tensorrt)


class TestBoardThatBuilds:
    def test_engines_are_built_there_and_their_answers_checked_and_timed(
        self, trt_package: Path, server: SshServer, tmp_path: Path, deployed: Callable[..., tuple[int, dict, str]]
    ) -> None:
        table, name = tmp_path / "board", server.device_name()
        code, document, _ = deployed(trt_package, "--budget-ms", "1s", device=name, table=table)
        assert code == 0 and document["verdict"] == "good", document
        assert (document["device"]["runtime"], document["device"]["details"]["runner"]) == ("tensorrt", "tensorrt")
        built, checked, timed = document["scripts"]
        assert (built["script"], built["code"], built["told"]["built"]) == ("build_engine.py", 0, True)
        assert checked["told"]["passed"] is True and checked["told"]["runtime"] == "tensorrt"
        assert [p["exit_index"] for p in timed["told"]["paths"]] == [0, 1]
        (place,) = (server.home / ".cache" / "nas-engines").iterdir()
        assert {p.name for p in place.glob("*.engine")} == {"segment_0.engine", "segment_1.engine"}
        assert not list((server.home / document["folder"]).glob("*.engine")), "an engine lies in the package"
        assert document["stored"] in LatencyTable.read(table).networks

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [
            ("FAKE_FAULT=refused", r"build_engine\.py: building segment_0\.onnx: no kernel for .* \(build_failed\)"),
            ("FAKE_FAULT=killed", r"build_engine\.py: building segment_0\.onnx: .* \(killed\)"),
            ("FAKE_TENSORRT=", r"build_engine\.py: .*cannot import tensorrt"),
        ],
    )
    def test_what_keeps_the_board_from_building_is_told(
        self, trt_package: Path, server: SshServer, environment: str, reason: str
    ) -> None:
        python = server.folder / f"python-{environment.replace('=', '-')}.sh"
        python.write_text(f'#!/bin/sh\n{environment} exec {server.python} "$@"\n')
        python.chmod(0o755)
        package = verify_package(trt_package).package
        nothing: Any = None  # of what was measured before, the scripts are told the deadline only
        deployment = Deployment(
            package, nothing, nothing, nothing, nothing, 0.0, None, "worst", "good", (), stored=environment
        )
        device = RemoteDevice(parse_address(server.device_name("&runner=onnxruntime", python=python)))
        try:
            device.ssh.run(["rm", "-rf", ".cache/nas-engines"])  # of other tests
            with pytest.raises(NasError, match=reason) as raised:
                run_on_board(deployment, device, "broken", lambda _: None)
        finally:
            device.close()
        assert raised.value.exit_code == DeviceError.exit_code
