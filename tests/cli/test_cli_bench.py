"""`nas bench`: a real package and a plain ONNX file on the real device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nas.cli.main import run
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, Measurement, StageConfig, StemConfig
from nas.devices import open_device
from nas.devices.base import MeasureJob
from nas.export.graph import random_weights
from nas.export.package import Instruments, PackagePlan, export_package, measured_accuracy


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a small network with one exit, random weights."""
    stages = (StageConfig((BlockConfig(8, 16, 8),)), StageConfig((BlockConfig(8, 16, 16, stride=2),)))
    candidate = Candidate(16, 4, StemConfig(8), stages, HeadConfig(), (ExitConfig(0, threshold=0.5),))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, 40)
    device = open_device("cpu")
    plan = PackagePlan("small", candidate, "if", ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)
    instruments = Instruments(
        device.run,
        lambda model: measured_accuracy(device.run, model, images, labels, exits=1),
        lambda models: device.measure([MeasureJob(f"m{i}", "network", "none", m, 0) for i, m in enumerate(models)]),
        device.profile,
    )
    folder = tmp_path_factory.mktemp("packages") / "small"
    export_package(folder, plan, random_weights(candidate, 0), None, images, instruments)
    return folder


def test_every_path_of_a_package_is_measured_and_weighted(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(package), "--json", "--budget-ms", "1s"]) == 0
    document = json.loads(capsys.readouterr().out)
    paths = document["paths"]
    assert sum(path["share"] for path in paths) == pytest.approx(1)
    assert all(0 < path["latency_ms"] <= path["p95_ms"] and path["samples"] >= 4 for path in paths)
    assert document["figures"]["provenance"] == "measured"
    assert document["figures"]["worst_ms"] == max(path["latency_ms"] for path in paths)
    assert document["keeps_budget"] is True
    assert document["median_figures"]["worst_ms"] == max(path["p50_ms"] for path in paths)


def test_the_median_of_all_runs_decides_on_a_budget(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when the package is exported: an undisturbed run is faster than what a user gets half of the time."""
    device = open_device("cpu")

    def half_slow(jobs: Sequence[MeasureJob], *_: object, **__: object) -> list[Measurement]:
        return [
            Measurement(j.key, "network", "none", 1.0, ((1.0, 3.0, 3.0),), (True,), "wall", "", i, session_ms=(1.0,))
            for i, j in enumerate(jobs)
        ]

    monkeypatch.setattr(type(device), "measure", lambda _, jobs, **options: half_slow(jobs, **options))
    assert run(["bench", str(package), "--budget-ms", "2"]) == 3
    assert run(["bench", str(package), "--budget-ms", "4"]) == 0


def test_a_missed_budget_is_exit_code_3_with_the_figure(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(package), "--budget-ms", "0.1us", "--of", "expected"]) == 3
    out = capsys.readouterr().out
    assert "budget 0.000100 ms (expected): MISSED with median " in out
    assert "its card: expected" in out
    assert out.splitlines()[1].split() == ["path", "images", "latency", "median", "p95", "samples", "calm"]


def test_any_onnx_classifier_can_be_measured(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(package / "model.onnx")]) == 0
    assert "all layers" in capsys.readouterr().out


def test_a_published_network_can_be_measured_in_a_precision(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []
    device = open_device("cpu")

    def once(jobs: Sequence[MeasureJob]) -> list[Measurement]:
        asked.extend((j.precision, len(j.model)) for j in jobs)
        return [Measurement(j.key, "network", j.precision, 1.0, ((1.0,),), (True,), "wall", "", 0) for j in jobs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(device), "measure", lambda _, jobs, **__: once(jobs))
        for options in ([], ["--precision", "int8"]):
            assert run(["bench", "mobilenetv3-small-224", *options]) == 0
    assert "mobilenetv3-small-224 on " in capsys.readouterr().out
    (plain, floats), (label, integers) = asked
    assert (plain, label) == ("fp32", "int8")
    assert floats > 4 * 2_500_000 > 2 * integers, "weights of the published size, in bytes of each precision"


def test_the_precision_is_that_of_a_file_and_one_that_the_device_has(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(package / "model.onnx"), "--precision", "fp16"]) == 2
    assert "--precision fp16: this device offers fp32, int8" in capsys.readouterr().err
    assert run(["bench", str(package), "--precision", "fp32"]) == 2
    assert "--precision goes with an .onnx file or a published network" in capsys.readouterr().err


def test_a_changed_package_is_refused(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in package.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(package)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (copy / "labels.txt").write_text("other\n", encoding="utf-8")
    assert run(["bench", str(copy)]) == 2
    assert "labels.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "nowhere: neither a package folder nor an .onnx file nor a published network (mobile"),
        ("model.onnx", b"no model", "model.onnx: not an ONNX model"),
        ("empty.onnx", b"", "empty.onnx: empty file, not an ONNX model"),
    ],
)
def test_what_is_no_package_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(["bench", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
