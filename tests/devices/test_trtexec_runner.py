"""The runner of trtexec against the stand-in that was written from the documented formats, as programs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_board.tools import VERSIONS, calls_of, install_trtexec

from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.core.walk import expand
from nas.devices.base import layer_times_of
from nas.devices.board.errors import BoardError
from nas.devices.board.trtexec import TrtexecRunner
from nas.measure.attribution import attribute
from nas.measure.networks import network_bytes

NETWORK = Candidate(
    16,
    4,
    StemConfig(8, activation="relu"),
    (StageConfig((BlockConfig(8, 16, 16, stride=2), BlockConfig(16, 32, 16))),),
    HeadConfig(activation="relu"),
)


def runner(folder: Path, version: str, **scenario: Any) -> tuple[TrtexecRunner, Path]:
    program = install_trtexec(folder / "programs", version, **scenario)
    (folder / "model.onnx").write_bytes(network_bytes(NETWORK))
    return TrtexecRunner(str(program)), program


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"work": str(folder), "precision": "fp32", "timing_cache": str(folder / "timing.cache"), **more}


@pytest.mark.parametrize("version", list(VERSIONS))
def test_an_engine_of_each_version_is_built_timed_and_its_layers_come_home(version: str, tmp_path: Path) -> None:
    found, program = runner(tmp_path, version)
    assert found.available() is None
    assert found.describe()["version"] == ".".join(map(str, VERSIONS[version]))
    session = found.load(str(tmp_path / "model.onnx"), options(tmp_path))
    told = session.time(20, 5)
    assert len(told["samples_ms"]) == 20 and min(told["samples_ms"]) > 0
    assert told["cuda_graph"] is True
    home = attribute(layer_times_of(session.profile(20)), expand(NETWORK))
    assert all(block.total_ms > 0 for block in home.blocks)
    assert home.unnamed_ms == 0
    if VERSIONS[version] >= (8, 2, 0):  # 8.0 tells no layer information; the name says it there
        assert 0 < home.reformat_ms < home.total_ms
    session.close()
    assert {p.name for p in tmp_path.iterdir()} - {"programs", "model.onnx", "timing.cache"} == set()
    assert len(calls_of(program)) == 4  # --help, build, time, profile


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3", "11"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("build_failure", "build_failed"), ("out_of_memory", "out_of_memory"), ("killed", "killed"), ("hang", "hung")],
)
def test_a_fault_of_a_build_is_a_result_of_its_kind(version: str, fault: str, kind: str, tmp_path: Path) -> None:
    found, _ = runner(tmp_path, version, faults=[fault])
    with pytest.raises(BoardError, match=r"building model\.onnx") as failed:
        found.load(str(tmp_path / "model.onnx"), options(tmp_path, timeout_s=1.5))
    assert failed.value.kind == kind
    session = found.load(str(tmp_path / "model.onnx"), options(tmp_path))  # the next one is good again
    assert session.warnings == []


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3", "11"])
def test_faults_of_a_run_are_told(version: str, tmp_path: Path) -> None:
    faults = ["skipped_tactics", "no_graph", "truncated", "control_characters", "nan", "killed"]
    found, _ = runner(tmp_path, version, faults=faults)
    session = found.load(str(tmp_path / "model.onnx"), options(tmp_path))
    assert session.warnings[0].startswith("skipped_tactics: ")
    assert session.time(20)["cuda_graph"] is False
    with pytest.raises(BoardError) as cut:
        session.time(20)
    assert cut.value.kind == "truncated"
    assert session.profile(20), "control characters in names are read"
    assert session.profile(20), "shares that are no number are read"
    with pytest.raises(BoardError) as killed:
        session.time(20)
    assert killed.value.kind == "killed"
    assert len(session.time(20)["samples_ms"]) == 20
