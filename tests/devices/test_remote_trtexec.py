"""A fake trtexec over a real OpenSSH server: found, driven by another user, its times reduced on this machine."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_board.tools import VERSIONS, calls_of, install_trtexec

from nas.cli.main import run
from nas.core.errors import DeviceError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.devices.address import parse_address
from nas.devices.base import MeasureJob, StreamJob
from nas.devices.link import AgentLink
from nas.devices.remote import BUILD_LIMIT_S, SLOW_START, RemoteDevice
from nas.export.dialect import dialect_for
from nas.export.graph import layer_model, nominal_quant, random_weights, segment_models
from nas.latency.table import LatencyTable
from nas.measure.covering import fill_covering
from nas.measure.stream import stream_timer
from nas.space.space import load_space
from nas.testing import SshServer, exits_chain, mean_model, requires_openssh

ONE_STAGE = """
name: one-stage
source: made up
resolution: 16
stem: {channels: 8, activation: relu}
stages:
  - {name: s1, width: 16, depth: 1, stride: 2, kernel_size: [3, 5], expansion: [2, 4], activation: relu}
head: {conv_channels: 0, hidden_channels: 0, activation: relu}
precision: {choices: [fp16], per: network}
"""
QUICK = replace(SLOW_START, row_round_ms=20.0, network_round_ms=20.0, retries=0, wait_ms=0.0)


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with SshServer(requires_openssh()) as running:
        yield running


def board(server: SshServer, version: str, faults: Sequence[str | None] = ()) -> tuple[RemoteDevice, Path]:
    """A board whose PATH has a fake trtexec of one version, and the program."""
    folder = server.folder / f"trtexec-{version}-{len(list(server.folder.iterdir()))}"
    program = install_trtexec(folder, version, faults)
    program.write_text(program.read_text().replace(sys.executable, shutil.which("python3", path="/usr/bin") or "", 1))
    folder.chmod(0o777)  # the board's user notes each start there
    program.chmod(0o755)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPATH={folder}:$PATH exec {server.python} "$@"\n')
    python.chmod(0o755)
    return RemoteDevice(parse_address(server.device_name(python=python)), settings=QUICK), program


def row(key: str, size: int = 8) -> MeasureJob:
    return MeasureJob(key, "row", "fp16", mean_model(size=size), 1000)


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3", "11"])
def test_trtexec_is_found_first_and_its_compute_times_are_the_latency(server: SshServer, version: str) -> None:
    device, program = board(server, version)
    try:
        assert device.profile.runtime == "tensorrt" and device.profile.details["runner"] == "trtexec"
        assert device.profile.runtime_version.startswith(".".join(map(str, VERSIONS[version][:2])))
        jobs = [row("a"), MeasureJob("n", "network", "fp16", mean_model(None), 1000)]
        if version == "11":  # strongly typed only: these files are fp32
            assert "Export it in fp16" in str(device.measure(jobs[:1])[0].error)
            jobs = [replace(job, precision="fp32") for job in jobs]
        one, two = device.measure(jobs)
        for m in (one, two):
            assert m.error is None and m.clock == "device_event", m.error
            samples = [s for r in m.rounds_ms for s in r]
            assert min(samples) <= (m.latency_ms or 0) <= max(samples) and len(samples) >= 50
        assert (len(one.session_ms), len(two.session_ms)) == (1, 2), "a network is built twice"
        assert any("--onnx" in option for call in calls_of(program) for option in call)
    finally:
        device.close()


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3"])
def test_float_parts_of_int8_and_mixed_networks_are_built_in_half_precision(server: SshServer, version: str) -> None:
    """The file of an int8 head and a segment in fp16 have no quantized tensor, but what they belong to has."""
    space = load_space(Path(__file__).parents[2] / "search_spaces" / "jetson-64.yaml", 4)
    layers = {layer.kind: layer for layer in space.layers() if layer.precision == "int8"}
    stages = (StageConfig((BlockConfig(8, 16, 16),)), StageConfig((BlockConfig(16, 32, 16),)))
    mixed = Candidate(16, 4, StemConfig(8), stages, HeadConfig(), (ExitConfig(0, threshold=0.5),))
    mixed = mixed.with_precision(("fp16", "fp16", "int8", "int8"))
    device, program = board(server, version)
    try:
        dialect = dialect_for(device.profile)
        jobs = [
            MeasureJob(kind, "row", "int8", layer_model(layers[kind], dialect=dialect), 1000)
            for kind in ("head", "exit_head", "inverted_residual")
        ]
        chain = segment_models(
            mixed, random_weights(mixed, 0), (0.5,) * 3, (0.25,) * 3, quant=nominal_quant(mixed), dialect=dialect
        )
        jobs += [MeasureJob(f"#{i}", "row", mixed.precision_label, s.model, 1000) for i, s in enumerate(chain)]
        found = device.measure(jobs)
        foreign = device.measure([MeasureJob("f", "row", "int8", mean_model(size=8), 1000)])[0]
    finally:
        device.close()
    assert [m.error for m in found] == [None] * 5 and mixed.precision_label == "mixed"
    assert [m.precision for m in found] == ["int8"] * 3 + ["mixed"] * 2, "what it is a part of stays its precision"
    builds = [call for call in calls_of(program) if any(x.startswith("--onnx=") for x in call)]
    flags = ["+".join(x[2:] for x in call if x in ("--int8", "--fp16")) for call in builds]
    assert flags == ["fp16", "fp16", "int8+fp16", "fp16", "int8+fp16"]
    assert foreign.error is not None and "the file has no QuantizeLinear nodes" in foreign.error


def test_a_file_and_a_published_network_are_built_in_the_precision_that_is_asked_for(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.devices.remote.SLOW_START", QUICK)
    device, program = board(server, "8.5")
    device.close()
    (tmp_path / "a.onnx").write_bytes(mean_model())
    for package in (str(tmp_path / "a.onnx"), "mobilenetv3-small-224"):
        before = len(calls_of(program))
        options = ["--device", server.device_name(python=program.parent / "python"), "--precision", "fp16"]
        assert run(["bench", package, *options]) == 0
        built = [call for call in calls_of(program)[before:] if any("--onnx" in x for x in call)]
        assert built and all("--fp16" in call for call in built), package


def test_an_engine_that_is_not_built_is_a_row_with_its_reason_and_the_next_is_measured(server: SshServer) -> None:
    device, _ = board(server, "8.5", ["build_failure"])
    try:
        first, second = device.measure([row("a"), row("b", 9)])
        assert first.error is not None and first.latency_ms is None and "\n" not in first.error
        assert second.error is None
    finally:
        device.close()


def test_a_build_that_the_kernel_kills_is_told_as_such(server: SshServer) -> None:
    device, _ = board(server, "10.3", ["killed"])
    try:
        (found,) = device.measure([row("a")])
        assert found.error is not None and "killed by the system" in found.error, found.error
    finally:
        device.close()


def test_images_are_run_through_an_engine_of_one_image_as_it_is_deployed(
    server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, Any]] = []
    ask = AgentLink.ask

    def noted(link: AgentLink, request: Mapping[str, Any], **rest: Any) -> Mapping[str, Any]:
        asked.append(request)
        return ask(link, request, **rest)

    monkeypatch.setattr(AgentLink, "ask", noted)
    device, program = board(server, "8.5")
    try:
        with pytest.raises(DeviceError, match="trtexec gives no exact outputs"):
            device.run(mean_model(None), np.zeros((5, 3, 8, 8), np.float32))
    finally:
        device.close()
    limits = [request["limit_s"] for request in asked if request["op"] == "run"]
    assert limits == [BUILD_LIMIT_S], "the engine is built within this limit, as for measuring"
    (built,) = [x.partition("=")[2] for call in calls_of(program) for x in call if x.startswith("--onnx=")]
    assert [d.dim_value for d in onnx.load(built).graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]


@pytest.mark.parametrize("options", ["", "&runner=trtexec"])
def test_where_only_trtexec_is_there_no_stream_is_offered_and_the_reason_is_told(
    server: SshServer, options: str
) -> None:
    device, program = board(server, "8.5")
    device.close()
    name = server.device_name(options, python=program.parent / "python")
    device = RemoteDevice(parse_address(name), settings=QUICK)
    try:
        assert stream_timer(device) is None
        told = "not looked for, as only trtexec" if options else "the Python module tensorrt cannot be imported"
        assert device.no_stream.startswith(f"trtexec takes no images one by one, and tensorrt is missing: {told}")
        with pytest.raises(DeviceError, match="s: the stream cannot be timed: trtexec takes no images"):
            device.stream_times(StreamJob("s", exits_chain(), (0.5,), np.zeros((1, 3, 8, 8), np.float32)))
    finally:
        device.close()


def test_layers_of_an_engine_come_back(server: SshServer) -> None:
    device, _ = board(server, "8.5")
    try:
        layers = device.profile_layers(row("a"))["layers"]
        assert layers and all(layer["median_ms"] > 0 and layer["name"] for layer in layers)
    finally:
        device.close()


@pytest.mark.parametrize("version", ["8.2", "10.3"])
def test_the_reference_network_is_read_by_every_version(server: SshServer, version: str) -> None:
    device, _ = board(server, version)
    try:
        assert device.calm(2).median_ms > 0
    finally:
        device.close()


def test_a_look_at_a_board_starts_few_programs(server: SshServer) -> None:
    device, program = board(server, "8.5")
    try:
        before = len(calls_of(program))
        assert device.calm().checks == 3
    finally:
        device.close()
    assert len(calls_of(program)) - before <= 6, "--help, a build, a warm-up and the looks"


def test_the_doctor_measures_where_trtexec_gives_no_outputs(
    server: SshServer, capsys: pytest.CaptureFixture[str]
) -> None:
    device, program = board(server, "8.2")
    device.close()
    name = server.device_name(python=program.parent / "python")
    assert run(["doctor", "--device", name, "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    check = checks[f"device {name} fp16"]
    assert check["level"] == "WARN" and check["text"].startswith("a small network takes 0.")
    assert "outputs could not be compared" in check["text"] and "python3-libnvinfer" in check["fix"]
    assert checks[f"device {name} clock"]["level"] == "OK"


def test_the_doctor_says_why_nothing_can_be_built(server: SshServer, capsys: pytest.CaptureFixture[str]) -> None:
    device, program = board(server, "8.5", ["build_failure"] * 9)
    device.close()
    name = server.device_name(python=program.parent / "python")
    assert run(["doctor", "--device", name, "--json"]) == 4
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks[f"device {name} fp32"]["level"] == "FAIL"
    assert "Could not find any implementation for node" in checks[f"device {name} fp32"]["text"]


def test_the_experiment_for_a_jetson_says_what_it_would_do_and_guesses_no_time_of_engines(
    server: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device, program = board(server, "10.3")
    device.close()
    given = {
        "device": server.device_name(python=program.parent / "python"),
        "data.name": "defects",
        "data.train_images": 200,
        "run.dir": tmp_path / "run",
        "run.tables": tmp_path / "tables",
    }
    sets = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    experiment = Path(__file__).parents[2] / "experiments" / "jetson.yaml"
    assert run(["search", str(experiment), *sets, "--dry-run"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"(\d+) rows are to be measured, the others of (\d+) interpolated", out)
    assert found is not None and 0 < int(found[1]) < int(found[2])
    assert "without: latency table, networks. Each is an engine that the board builds" in out
    phases = {line.split("  ")[0]: line for line in out.splitlines()}
    assert phases["networks"].endswith("unknown") and "about" in phases["scores"]
    assert not (tmp_path / "tables").exists()


def test_a_search_on_a_board_with_trtexec_alone_ends_with_packages_and_says_what_is_missing(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nas.devices.remote.SLOW_START", QUICK)
    device, program = board(server, "10.3")
    device.close()
    monkeypatch.chdir(tmp_path)
    name = server.device_name(python=program.parent / "python")
    Path("space.yaml").write_text(ONE_STAGE, encoding="utf-8")
    Path("tiny.yaml").write_text(
        f"space: space.yaml\ndevice: '{name}'\nbudget: {{ms: 100}}\n"
        "data: {train_images: 120, val_images: 60, test_images: 60}\n"
        "teacher: {epochs: 1, widths: [8, 16], blocks: 1, threads: 1}\n"
        "distill: {epochs: 1, variants: 1, batch_size: 40, recalibration_images: 40, attention: 0}\n"
        "search: {trials: 2, rounds: 1, batch: 2, workers: 1}\nsupernet: {steps: 3}\n"
        "feedback: {first_networks: 0, networks_per_round: 0}\nfinish: {students: 1, calibration_images: 64}\n",
        encoding="utf-8",
    )
    code = run(["search", "tiny.yaml"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "measures, but gives no answers: the Python module tensorrt cannot be imported" in captured.err
    assert "apt-get install python3-libnvinfer" in captured.err
    (package,) = Path("runs/tiny/packages").iterdir()
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["latency"]["device"]["details"]["runner"] == "trtexec" and manifest["accuracy"]["top1"] > 0


def test_rows_are_filled_from_covering_networks_whose_layers_the_board_profiles(
    server: SshServer, tmp_path: Path
) -> None:
    path = tmp_path / "one-stage.yaml"
    path.write_text(ONE_STAGE, encoding="utf-8")
    space = load_space(path, 4)
    device, program = board(server, "10.3")
    try:
        table = LatencyTable.open(tmp_path / "table", device.profile)
        report = fill_covering(table, device, space, space.layers())
    finally:
        device.close()
    assert (report.measured, report.failed) == (len(space.layers()), ())
    sources = [row.source for row in table.rows.values()]
    assert all(source.startswith("covering: median of ") for source in sources)
    assert any(" 0 ms of it changes of layout" not in source for source in sources), "reformats are told apart"
    assert any("--fp16" in call for call in calls_of(program))  # weakly typed below 10.13
