"""`nas doctor`: real checks, each line with its fix, exit code by what failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nas.cli import doctor
from nas.cli.doctor import Check, check_disk, check_inference, check_memory, check_python, check_writable, exit_code
from nas.cli.main import run
from nas.devices import open_device


def test_this_machine_passes_and_every_device_ran_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    by_name = {check["name"]: check for check in document["checks"]}
    for name in ("python", "packages", "training", "device cpu fp32", "device cpu int8", "device cpu clock"):
        assert by_name[name]["level"] in ("OK", "WARN"), by_name[name]
        assert f"{name}: {by_name[name]['text']}" in err
    assert "torch" in by_name["packages"]["details"]["versions"]
    assert all(check["fix"] for check in document["checks"] if check["level"] != "OK")


def test_limits_of_python_memory_and_disk() -> None:
    assert check_python((3, 10, 9)).level == "FAIL"
    assert "make setup PYTHON=" in check_python((3, 10, 9)).fix
    assert check_python((3, 14, 0)).level == "OK"
    assert [check_memory(g << 30).level for g in (8, 2, 0)] == ["OK", "WARN", "FAIL"]
    assert check_memory(None).level == "OK"
    assert [check_disk(Path("x"), g << 30).level for g in (8, 1, 0)] == ["OK", "WARN", "FAIL"]


def test_a_folder_that_cannot_be_written_fails_with_its_name(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "runs").level == "OK"
    assert not (tmp_path / "runs").exists()
    blocked = tmp_path / "file"
    blocked.touch()
    check = check_writable(blocked / "runs")
    assert check.level == "FAIL"
    assert str(blocked) in check.text and "--set run.dir=DIR" in check.fix
    assert exit_code([check]) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert check_writable(tmp_path / "runs").level == "FAIL"
    tmp_path.chmod(0o700)


def test_the_gravest_failure_decides_the_exit_code() -> None:
    def failed(area: doctor.Area) -> Check:
        return Check("x", "FAIL", "", area=area)

    assert exit_code([Check("x", "WARN", "", area="device")]) == 0
    assert exit_code([failed("environment")]) == 2
    assert exit_code([failed("environment"), failed("storage")]) == 6
    assert exit_code([failed("storage"), failed("device"), failed("environment")]) == 4


class Liar:
    """A device whose answers do not depend on the image."""

    def __init__(self) -> None:
        self.profile = open_device("cpu").profile

    def run(self, model: bytes, images):  # noqa: ARG002
        import numpy as np

        return [np.zeros((len(images), 4), np.float32)]


def test_a_runtime_with_wrong_answers_fails() -> None:
    check = check_inference(Liar(), "liar", "fp32")
    assert (check.level, check.area, check.text) == ("FAIL", "device", "a small network gave wrong answers")


def test_a_broken_device_is_a_line_and_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("driver is gone")

    monkeypatch.setattr("nas.devices.open_device", broken)
    assert run(["doctor"]) == 4
    out = capsys.readouterr().out
    assert "FAIL  device cpu: RuntimeError: driver is gone\n      fix: make setup" in out
    assert "1 FAIL" in out.splitlines()[-1]
