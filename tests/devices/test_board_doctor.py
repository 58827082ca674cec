"""What `nas doctor --device` says of a board; boards are fake, so every figure is simulated."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_board.tools import install_board_tools, runner_in
from fake_board.tree import NANO, ORIN_NANO_SUPER, FakeBoard, write_board
from numpy.typing import NDArray

from nas.cli.boards import capability_checks, change_checks, hidden, names_of, runner_checks, state_checks, write_bundle
from nas.cli.doctor import Check, check_inference
from nas.cli.main import run
from nas.core.errors import DeviceError, UsageError
from nas.devices.board.power import change
from nas.devices.board.state import read_state
from nas.devices.board_profile import RemoteRunner
from nas.testing import SimulatedDevice, SshServer, requires_openssh

BY_HAND = "ssh -p 2222 me@jetson"


def state_of(folder: Path, board: FakeBoard) -> tuple[dict[str, Any], Callable[..., Any]]:
    root = write_board(folder / "root", board)
    install_board_tools(folder / "bin", root)
    return read_state(str(root), runner_in(folder / "bin")), runner_in(folder / "bin")


def test_every_line_of_a_board_and_the_command_that_mends_a_problem(tmp_path: Path) -> None:
    checks = {c.name: c for c in state_checks(state_of(tmp_path, ORIN_NANO_SUPER)[0], BY_HAND)}
    board = checks["board"].text
    for part in ("Jetson Orin Nano (developer kit)", "part p3767-0005", "JetPack 6.2", "L4T 36.4.3", "CUDA 12.6.68"):
        assert part in board
    assert checks["board power mode"].text == "25W (id 1); others: 0=15W, 2=MAXN_SUPER, 3=7W"
    assert checks["board clocks"].text == "GPU 306 of at most 1020 MHz, memory 2133 MHz; not locked"
    assert checks["board heat"].text == "tj-thermal 46 C is the hottest of 3 zones"
    assert checks["board power"].text.startswith("3 rails: VDD_IN 5000 mW")
    problem = checks["board clocks not locked"]
    assert (problem.level, problem.area) == ("WARN", "device")
    assert problem.fix == "ssh -p 2222 me@jetson -t 'sudo jetson_clocks'"
    assert all(c.fix for c in checks.values() if c.level != "OK")


def test_a_locked_board_has_no_problem(tmp_path: Path) -> None:
    checks = list(state_checks(state_of(tmp_path, ORIN_NANO_SUPER.locked)[0], BY_HAND))
    assert {c.level for c in checks} == {"OK"}


def test_a_board_without_sensors_and_nvpmodel_has_fewer_lines_and_says_why(tmp_path: Path) -> None:
    root = write_board(tmp_path, dataclasses.replace(NANO, rails={}))
    (tmp_path / "bin").mkdir()
    checks = {c.name: c for c in state_checks(read_state(str(root), runner_in(tmp_path / "bin")), BY_HAND)}
    assert "board power mode" not in checks
    assert checks["board power"].text == "no sensor, so no energy of an inference"
    assert "power_mode: nvpmodel -q: nvpmodel is not installed" in checks["board unknown"].text
    assert checks["board power mode unknown"].fix == "ssh -p 2222 me@jetson -t 'sudo nvpmodel -q'"


def test_what_the_board_can_do_stands_there_with_what_it_cannot(tmp_path: Path) -> None:
    state = state_of(tmp_path, NANO)[0]
    [check] = capability_checks(state, "tensorrt", "8.2.1")
    assert check.text.startswith(
        "TensorRT 8.2.1: fp32, fp16; ONNX up to opset 13; HardSwish is written as HardSigmoid, Mul"
    )
    assert "no int8: Jetson Nano, TX1 has no int8 instructions" in check.text
    assert list(capability_checks(state, "ort", "1.6.0")) == []
    orin = state_of(tmp_path / "orin", ORIN_NANO_SUPER)[0]
    (of_10_3,), (of_10_16,) = (list(capability_checks(orin, "tensorrt", v)) for v in ("10.3.0", "10.16.2"))
    assert of_10_3.text.startswith("TensorRT 10.3.0: fp32, tf32, fp16, int8; ONNX up to opset 20. ")
    assert "no bf16: only strongly typed graphs say it, which are written for TensorRT 10.13 and newer" in of_10_3.text
    assert "bf16, int8; ONNX up to opset 20 (bf16 graphs are opset 22: never built on a board)" in of_10_16.text


def test_one_runtime_is_enough_and_none_is_a_failure() -> None:
    missing = RemoteRunner("trtexec", "trtexec was not found")
    there = RemoteRunner("onnxruntime", "", "ort", "1.16.3", ("fp32", "int8"))
    assert [c.level for c in runner_checks((missing, there), BY_HAND)] == ["OK", "OK"]
    [check] = runner_checks((missing,), BY_HAND)
    assert (check.level, check.text) == ("FAIL", "not there: trtexec was not found")


def test_numpy_that_is_missing_is_a_line_with_the_command() -> None:
    trtexec = RemoteRunner("trtexec", "", "tensorrt", "8.2.1", ("fp32", "fp16"))
    without = RemoteRunner("onnxruntime", "python3 on this board cannot import numpy: No module named 'numpy'")
    check = next(c for c in runner_checks((trtexec, without), BY_HAND) if c.name == "board onnxruntime")
    assert check.level == "WARN" and "parity.py of a package need NumPy" in check.text
    assert check.fix == "ssh -p 2222 me@jetson -t 'sudo apt-get install python3-numpy'"


def test_wrong_answers_of_a_board_ask_for_a_bundle_and_those_of_this_machine_for_a_setup() -> None:
    class Constant(SimulatedDevice):
        def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:  # noqa: ARG002
            return [np.zeros((len(images), 4), np.float32)]

    here, there = (check_inference(Constant(), name, "fp32") for name in ("cpu", "ssh:me@jetson"))
    assert (here.level, here.fix) == ("FAIL", "make setup")
    assert there.fix == "to get help: nas doctor --device ssh:me@jetson --bundle send.zip"


def test_what_was_run_and_the_way_back_are_said(tmp_path: Path) -> None:
    state_of(tmp_path, ORIN_NANO_SUPER)
    told = change("MAXN_SUPER", False, "unused", str(tmp_path / "root"), runner_in(tmp_path / "bin"))
    [check] = change_checks(told, BY_HAND)
    assert check.text.startswith("ran: sudo -n nvpmodel -m 2.")
    assert check.text.endswith("The way back: ssh -p 2222 me@jetson -t 'sudo nvpmodel -m 1'")


def test_power_is_not_changed_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--lock-clocks"]) == 2
    assert "name it: --device ssh:USER@HOST" in capsys.readouterr().err
    assert run(["doctor", "--device", "cpu", "--set-power-mode", "0"]) == 2


def test_a_board_that_cannot_be_reached_is_a_failure_with_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, say: Callable[[str], None]) -> Any:  # noqa: ARG001
        raise DeviceError("ann@jetson-7: the login was refused, token=abcdef0123456789")

    monkeypatch.setattr("nas.devices.open_device", refused)
    bundle = tmp_path / "send.zip"
    assert run(["doctor", "--device", "ssh:ann@jetson-7", "--bundle", str(bundle)]) == 4
    err = "".join(capsys.readouterr())
    assert "FAIL  device ssh:ann@jetson-7: ann@jetson-7: the login was refused" in err
    assert f"written: {bundle}" in err
    with zipfile.ZipFile(bundle) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(texts) == {"README.txt", "doctor.json", "device.json", "host.json"}
    everything = "\n".join(texts.values())
    for secret in ("ann", "jetson-7", "abcdef0123456789"):
        assert not re.search(rf"\b{secret}\b", everything), secret
    device = json.loads(texts["device.json"])
    assert device["error"].startswith("DeviceError: ***@***: the login was refused")
    assert len(device["agent"]) == 64


def test_a_bundle_overwrites_nothing_and_is_a_zip(tmp_path: Path) -> None:
    there = tmp_path / "there.zip"
    there.touch()
    with pytest.raises(UsageError, match=r"there\.zip: exists already, and is not overwritten"):
        write_bundle(there, [Check("x", "OK", "")], None)
    with pytest.raises(UsageError, match=r"the archive is a \.zip file"):
        write_bundle(tmp_path / "x.tar", [], None)
    with pytest.raises(UsageError, match=r"nowhere is not a folder"):
        write_bundle(tmp_path / "nowhere" / "x.zip", [], None)
    assert there.read_bytes() == b""


def test_a_place_for_the_bundle_is_looked_at_before_anything_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: object) -> Any:
        raise AssertionError("the device was opened")

    monkeypatch.setattr("nas.devices.open_device", opened)
    for name in ("send.zip", "send-2.zip"):
        (tmp_path / name).touch()
    assert run(["doctor", "--device", "ssh:me@jetson", "--bundle", str(tmp_path / "send.zip")]) == 2
    err = capsys.readouterr().err
    assert f"exists already, and is not overwritten; such as: --bundle {tmp_path / 'send-3.zip'}" in err


def test_a_bundle_keeps_the_state_of_the_board(tmp_path: Path) -> None:
    state = state_of(tmp_path, ORIN_NANO_SUPER)[0]
    write_bundle(tmp_path / "b.zip", list(state_checks(state, BY_HAND)), "ssh:me@jetson:2222")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        found = json.loads(archive.read("doctor.json"))
    board = next(c for c in found["checks"] if c["name"] == "board")
    assert board["details"]["power_modes"][2] == {"id": 2, "name": "MAXN_SUPER"}
    assert board["details"]["soc"] == "tegra234"
    assert "jetson:2222" not in json.dumps(found)


def test_names_that_are_hidden_are_whole_words() -> None:
    assert set(names_of("ssh:ann@board.lan:2222?config=conf/ssh,ssh:[fe80::1]")) >= {"ann", "board.lan", "fe80::1"}
    assert hidden("ann@board.lan annotates board.lanes", ["ann", "board.lan"]) == "***@*** annotates board.lanes"


@pytest.mark.parametrize(
    "said",
    [
        "ssh: connect to host 10.0.0.5 port 22: Connection refused",
        "ann@10.0.0.5: Permission denied (publickey)",
        "Could not resolve hostname board.lan: Name or service not known",
        "Connection closed by 10.0.0.5 port 22",
    ],
)
def test_what_ssh_says_of_the_machine_behind_an_alias_is_hidden(said: str) -> None:
    told = hidden(said, names_of("ssh:myboard"))
    assert not re.search(r"10\.0\.0\.5|ann|board\.lan", told) and "***" in told
    assert said.rpartition(":")[2].split()[-1] in told, "what went wrong is still there"


def test_a_mistyped_device_is_the_users_mistake() -> None:
    assert run(["doctor", "--device", "cpux"]) == 2


def test_boards_that_are_joined_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def refused(name: str, say: Callable[[str], None]) -> Any:  # noqa: ARG001
        seen.append(name)
        raise DeviceError("not now")

    monkeypatch.setattr("nas.devices.open_device", refused)
    assert run(["doctor", "--device", "ssh:a,ssh:b"]) == 4
    assert seen == ["ssh:a", "ssh:b"]


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with SshServer(requires_openssh()) as running:
        yield running


def test_a_host_behind_ssh_is_looked_at_and_sent_in_a_bundle(
    server: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "send.zip"
    assert run(["doctor", "--device", server.device_name(), "--bundle", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    by_name = {c["name"]: c for c in document["checks"]}
    assert by_name["board"]["details"]["soc"] is None
    assert by_name["board onnxruntime"]["text"].startswith("ort ")
    assert by_name[f"device {server.device_name()} fp32"]["level"] == "OK"
    with zipfile.ZipFile(bundle) as archive:
        assert json.loads(archive.read("device.json"))["error"] is None


def test_what_cannot_be_changed_on_a_host_is_a_failure_that_says_why(
    server: SshServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--device", server.device_name(), "--set-power-mode", "MAXN", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    changed = next(c for c in document["checks"] if c["name"] == "board changed")
    assert "this board has no power modes: /etc/nvpmodel.conf: No such file or directory" in changed["text"]
    assert changed["fix"].startswith("on the board itself: ssh ")
