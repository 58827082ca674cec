"""What boards can do, from their silicon and the TensorRT of their JetPack."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nas.core.errors import DeviceError
from nas.devices.address import parse_address
from nas.devices.board_profile import RemoteRunner, remote_profile
from nas.devices.boards import unlocked_warning
from nas.devices.capability import BF16_OPSET, SILICON, capability_of, version_of
from nas.export.dialect import tensorrt_dialect

UNTYPED = "only strongly typed graphs say it, which are written for TensorRT 10.13 and newer"


@pytest.mark.parametrize(
    ("soc", "version", "expected"),
    [
        ("tegra210", "8.2.1", ("fp32", "fp16")),
        ("tegra186", "8.2.1", ("fp32", "fp16")),
        ("tegra194", "8.5.2", ("fp32", "fp16", "int8")),
        ("tegra234", "8.5.2", ("fp32", "tf32", "fp16", "int8")),
        ("tegra234", "10.3.0", ("fp32", "tf32", "fp16", "int8")),
        ("tegra234", "10.16.2", ("fp32", "tf32", "fp16", "bf16", "int8")),
        ("tegra264", "10.13.3", ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4")),
        ("tegra264", "10.10.0", ("fp32", "tf32", "fp16", "int8", "fp8")),
    ],
)
def test_precisions_by_silicon_and_version(soc: str, version: str, expected: tuple[str, ...]) -> None:
    can = capability_of(soc, version)
    assert can.precisions == expected
    assert set(can.without) == {"fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"} - set(expected)
    assert all(can.without.values())


def test_why_a_precision_is_missing_is_said() -> None:
    assert "no int8 instructions (DP4A)" in capability_of("tegra210", "8.2.1").without["int8"]
    orin = capability_of("tegra234", "8.5.2").without
    assert orin["fp8"] == "Jetson Orin (sm 8.7) cannot; it begins with Jetson Thor"
    for without in (orin, capability_of("tegra234", "10.3.0").without):
        assert without["bf16"] == UNTYPED


@pytest.mark.parametrize(
    ("version", "opset", "rewritten"),
    [("8.2.1", 13, ["HardSwish"]), ("8.4.1", 17, []), ("8.6.2", 17, []), ("10.3.0", 20, []), ("10.16.2", 20, [])],
)
def test_opset_and_operators_by_version(version: str, opset: int, rewritten: list[str]) -> None:
    can = capability_of("tegra194" if version.startswith("8") else "tegra234", version)
    assert can.max_opset == opset
    assert [r.operator for r in can.rewrites] == rewritten
    assert all(r.instead == "HardSigmoid, Mul" for r in can.rewrites)
    dialect = tensorrt_dialect(version)
    assert dialect.opset <= opset, "a graph that its parser cannot read would be written"
    assert ("bf16" in dialect.precisions) == ("bf16" in can.precisions)
    assert dialect.fitting(("bf16",)).opset == (BF16_OPSET if "bf16" in can.precisions else dialect.opset)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"TensorRT 10\.3\.0 has no kernels for Jetson Nano"):
        capability_of("tegra210", "10.3.0")
    with pytest.raises(DeviceError, match="SoC 'tegra999' is not known; known: tegra210"):
        capability_of("tegra999", "10.3.0")
    with pytest.raises(DeviceError, match=r"expected numbers such as 10\.3\.0, got 'new'"):
        version_of("new")
    assert version_of("10.3.0.30.post1") == (10, 3, 0, 30)


def state(soc: str) -> dict[str, Any]:
    return {"board": "simulated", "soc": soc, "boot_id": "a", "power_mode": {"id": 0, "name": "MAXN"}, "module": None}


TENSORRT = RemoteRunner("trtexec", "", "tensorrt", "8.2.1", ("fp32", "fp16", "int8"))


def test_a_boards_profile_offers_only_what_it_can_do_and_says_why() -> None:
    nano = remote_profile(parse_address("ssh:me@nano"), TENSORRT, state("tegra210"))
    assert nano.precisions == ("fp32", "fp16")
    assert "no int8 instructions" in nano.details["without_int8"]
    xavier = remote_profile(parse_address("ssh:me@nx"), TENSORRT, state("tegra194"))
    assert xavier.precisions == ("fp32", "fp16", "int8") and "without_int8" not in xavier.details


@pytest.mark.parametrize(
    ("soc", "version", "reason"),
    [
        ("tegra210", "8.2.1", "Jetson Nano, TX1 (sm 5.3) cannot; it begins with Ampere (Jetson Orin)"),
        ("tegra234", "10.3.0", UNTYPED),
        ("unknown", "10.3.0", UNTYPED),
        ("unknown", "10.16.2", "its GPU is older than Ampere, which brought it"),
    ],
)
def test_a_profile_gives_the_reason_for_what_its_runtime_lacks_as_well(soc: str, version: str, reason: str) -> None:
    profile = remote_profile(parse_address("ssh:me@board"), dataclasses.replace(TENSORRT, version=version), state(soc))
    assert "bf16" not in profile.precisions and profile.details["without_bf16"] == reason
    offered = {f"without_{p}" for p in profile.precisions}
    assert not offered & set(profile.details)


def test_tables_of_locked_and_of_free_clocks_have_names_of_their_own_and_free_ones_a_warning() -> None:
    address = parse_address("ssh:me@nx")
    plain, locked, free = (
        remote_profile(address, TENSORRT, {**state("tegra194"), "clocks_locked": are}) for are in (None, True, False)
    )
    assert (locked.name, free.name) == (f"{plain.name}_locked", f"{plain.name}_free")
    assert unlocked_warning(plain, "ssh:me@nx") is None and unlocked_warning(locked, "ssh:me@nx") is None
    warning = unlocked_warning(free, "ssh:me@nx")
    assert warning is not None and "on the board: sudo jetson_clocks;" in warning
    assert "nas doctor --device ssh:me@nx --lock-clocks" in warning
    elsewhere = remote_profile(address, TENSORRT, {**state("tegra194"), "soc": None, "clocks_locked": False})
    assert unlocked_warning(elsewhere, "ssh:me@nx") is None, "jetson_clocks is a program of Jetsons"


def test_the_processor_of_a_board_is_not_bound_by_its_gpu() -> None:
    runner = dataclasses.replace(
        TENSORRT, name="onnxruntime", runtime="ort", version="1.6.0", precisions=("fp32", "int8")
    )
    assert remote_profile(parse_address("ssh:me@nano"), runner, state("tegra210")).precisions == ("fp32", "int8")


def test_silicon_is_that_of_the_boards_that_are_recognised() -> None:
    from nas.devices.board.state import SOCS

    assert set(SOCS) == set(SILICON)
