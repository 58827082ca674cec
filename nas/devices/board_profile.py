"""What a board says of itself: its runtimes, and the state that a latency table holds for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nas.core.errors import DeviceError, UsageError, did_you_mean
from nas.core.records import PROFILE_STATE_FIELDS, DeviceProfile, Precision
from nas.devices.address import RemoteAddress
from nas.devices.board.state import identity
from nas.devices.capability import SILICON, Capability, capability_of, without_details
from nas.devices.host import safe_name
from nas.devices.link import Message

LOCK_CLOCKS = "lock_clocks"  # in the details of a profile whose clocks are not locked: the command that does it there
_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True, slots=True)
class RemoteRunner:
    """A runtime on the board, as the board describes it."""

    name: str
    missing: str
    runtime: str = ""
    version: str = ""
    precisions: tuple[Precision, ...] = ()
    details: dict[str, str] = field(default_factory=dict)
    slow_start: bool = True
    dynamic_batch: bool = False
    streams_by: str = ""


def runner_of(told: Message) -> RemoteRunner:
    """A runtime as the board tells of it; with `missing` where it cannot be used."""
    if told.get("missing") is not None:
        return RemoteRunner(str(told["name"]), str(told["missing"]))
    offered = [str(p) for p in told["precisions"]]
    return RemoteRunner(
        name=str(told["name"]),
        missing="",
        runtime=str(told["runtime"]),
        version=str(told["version"]),
        precisions=tuple(p for p in _PRECISIONS if p in offered),
        details={str(k): str(v) for k, v in told.get("details", {}).items()},
        slow_start=bool(told["slow_start"]),
        dynamic_batch=bool(told["dynamic_batch"]),
        streams_by=str(told.get("streams_by", "")),
    )


def chosen_runner(runners: Sequence[RemoteRunner], address: RemoteAddress) -> RemoteRunner:
    """The runtime that the address names, else the first one that can be used.

    Raises:
        UsageError: no runtime has that name.
        DeviceError: none can be used, with the reasons and what to install.
    """
    names = [r.name for r in runners]
    where = address.ssh.shown
    if address.runner and address.runner not in names:
        raise UsageError(
            f"{where}: runner={address.runner!r}: runners are {', '.join(names)}{did_you_mean(address.runner, names)}"
        )
    wanted = [r for r in runners if address.runner in ("", r.name)]
    usable = [r for r in wanted if not r.missing]
    if not usable:
        reasons = "\n  ".join(f"{r.name}: {r.missing}" for r in wanted)
        raise DeviceError(
            f"{where}: no runtime to measure with there:\n  {reasons}\nJetPack brings TensorRT; for ONNX Runtime on "
            f"the board: {address.ssh.by_hand} {address.ssh.python} -m pip install onnxruntime"
        )
    return usable[0]


def remote_profile(address: RemoteAddress, runner: RemoteRunner, state: Message) -> DeviceProfile:
    """The device state that a board's records tell; boards of one kind in one state have the same."""
    can = _capability(runner, state)
    mode = identity(state)["power_mode"] or (f"governor={state['governor']}" if state.get("governor") else "unknown")
    board = " ".join(str(state.get("board") or "unknown").split())
    on_processor = runner.runtime == "ort"
    offered = runner.precisions if can is None else can.offered(runner.precisions)
    names = [board, f"{runner.runtime}{runner.version}", f"{address.threads}t" if on_processor else str(mode)]
    is_locked = state.get("clocks_locked")
    if is_locked is not None:  # a table holds for one of both, so each has a folder
        names.append("locked" if is_locked else "free")
    known = [f"{name}={state[name]}" for name in ("l4t", "cuda") if state.get(name)]
    return DeviceProfile(
        name=safe_name("_".join(names)),
        board=board,
        runtime=runner.runtime,
        runtime_version=runner.version,
        power_mode=str(mode),
        clocks_locked=bool(state.get("clocks_locked")),
        locked_mhz=state.get("locked_mhz") or "",
        threads=address.threads if on_processor else 1,
        driver=" ".join(known) or "unknown",
        precisions=offered,
        kind="measured",
        details={
            **runner.details,
            **(without_details(offered, runner.version, can) if runner.runtime == "tensorrt" else {}),
            "address": address.ssh.shown,
            "device_name": address.name,
            "runner": runner.name,
            **({LOCK_CLOCKS: "sudo jetson_clocks"} if is_locked is False and state.get("soc") else {}),
            **{name: str(state[name]) for name in ("python", "jetpack", "soc") if state.get(name)},
        },
    )


def _capability(runner: RemoteRunner, state: Message) -> Capability | None:
    """What the board can do with its TensorRT; None of another runtime, and of silicon that is not in our table."""
    if runner.runtime != "tensorrt" or state.get("soc") not in SILICON:
        return None
    return capability_of(state["soc"], runner.version)


def same_state(first: DeviceProfile, other: DeviceProfile) -> list[str]:
    """`field: first, other` for each field in which two boards differ; empty where one table holds for both."""
    pairs = [(name, getattr(first, name), getattr(other, name)) for name in PROFILE_STATE_FIELDS]
    return [f"{name}: {a!r} and {b!r}" for name, a, b in pairs if a != b]
