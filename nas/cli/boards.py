"""What `nas doctor --device ssh:...` says about a board, and the archive that it writes to be sent when it fails."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import io
import json
import platform
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

from nas.cli.doctor import Check, Level
from nas.core.errors import NasError, StorageError, UsageError
from nas.core.jsonio import to_plain

HIDDEN_NAMES = ("localhost", "root")  # say nothing about anybody
# What ssh says of the machine behind an alias: ann@10.0.0.5, "connect to host 10.0.0.5 port 22", "hostname board.lan:".
_LOGIN = re.compile(r"[\w.+-]+@[\w.-]+")
_PEER = re.compile(r"(?<=\bhostname )[\w.%-]+|[\w.:%-]+(?= port \d)")


def state_checks(state: Mapping[str, Any], by_hand: str) -> Iterator[Check]:
    """A line for each thing that a board tells, then one for each problem with the command that mends it.

    Args:
        state: record of `nas.devices.board.state`.
        by_hand: the command that logs in on the board, such as `ssh me@jetson`.
    """
    unknown = state.get("unknown", {})
    model = state.get("module") or state.get("board") or "unknown"
    parts = [f"{name} {state[key]}" for name, key in _SOFTWARE if state.get(key)]
    yield Check("board", "OK", ", ".join([str(model), *parts]), area="device", details=dict(state))
    mode, modes = state.get("power_mode"), state.get("power_modes") or []
    if mode is not None:
        others = ", ".join(f"{m['id']}={m['name']}" for m in modes if m["id"] != mode["id"])
        text = f"{mode['name']} (id {mode['id']})" + (f"; others: {others}" if others else "")
        yield Check("board power mode", "OK", text, area="device")
    clocks = state.get("clocks") or {}
    if clocks.get("gpu_mhz") is not None:
        told = f"GPU {clocks['gpu_mhz']:g} of at most {_number(clocks.get('gpu_max_mhz'))} MHz"
        emc = clocks.get("emc_mhz")
        told += f", memory {emc:g} MHz" if emc is not None else ", memory: only root may read its clock"
        yield Check("board clocks", "OK", f"{told}; {_LOCKED[state.get('clocks_locked')]}", area="device")
    heat = state.get("temperature_c") or {}
    if heat:
        zone = max(heat, key=lambda name: heat[name])
        yield Check("board heat", "OK", f"{zone} {heat[zone]:g} C is the hottest of {len(heat)} zones", area="device")
    rails = state.get("rails") or []
    text = (
        f"{len(rails)} rails: " + ", ".join(f"{r['name']} {r['mw']:g} mW" for r in rails)
        if rails
        else "no sensor, so no energy of an inference"
    )
    yield Check("board power", "OK", text, area="device")
    memory = state.get("memory_mb") or {}
    if "available" in memory:
        text = f"{memory['available']} of {memory.get('total', '?')} MB free, {memory.get('swap', 0)} MB swap"
        yield Check("board memory", "OK", text, area="device")
    for problem in state.get("problems", ()):
        yield Check(f"board {problem['what']}", "WARN", problem["why"], _command(problem["fix"], by_hand), "device")
    if unknown and state.get("soc"):  # a host that is no Jetson lacks nearly all of it
        text = "; ".join(f"{name}: {why}" for name, why in sorted(unknown.items()))
        yield Check("board unknown", "OK", text, area="device")


_SOFTWARE = (
    ("part", "part_number"),
    ("JetPack", "jetpack"),
    ("L4T", "l4t"),
    ("CUDA", "cuda"),
    ("Python", "python"),
    ("kernel", "kernel"),
)
_LOCKED = {True: "locked", False: "not locked", None: "nothing tells whether they are locked"}


def _number(value: Any) -> str:
    return "?" if value is None else f"{value:g}"


def _command(fix: str, by_hand: str) -> str:
    """What a problem's fix is from this machine: commands are started over SSH, -t so that sudo can ask."""
    is_command = fix.split(" ", 1)[0] in ("sudo", "ps")
    command, _, note = fix.partition("  ")
    return f"{by_hand} -t {quote(command)}{'  ' + note if note else ''}" if is_command else fix


def capability_checks(state: Mapping[str, Any], runtime: str, version: str) -> Iterator[Check]:
    """What the board can do with its TensorRT, and why not the rest; nothing for another runtime or unknown silicon."""
    from nas.devices.capability import BF16_OPSET, SILICON, capability_of

    if runtime != "tensorrt" or state.get("soc") not in SILICON:
        return
    can = capability_of(str(state["soc"]), version)
    text = f"TensorRT {version}: {', '.join(can.precisions)}; ONNX up to opset {can.max_opset}"
    if "bf16" in can.precisions:
        text += f" (bf16 graphs are opset {BF16_OPSET}: never built on a board)"
    text += "".join(f"; {r.operator} is written as {r.instead}" for r in can.rewrites)
    without = "; ".join(f"no {p}: {why}" for p, why in can.without.items())
    yield Check("board can do", "OK", f"{text}. {without}" if without else text, area="device")


def runner_checks(runners: Sequence[Any], by_hand: str) -> Iterator[Check]:
    """A line for each runtime on the board; one of them is enough to measure, and packages need NumPy beside it."""
    usable = [r for r in runners if not r.missing]
    for runner in runners:
        if not runner.missing:
            text = f"{runner.runtime} {runner.version}, {', '.join(runner.precisions)}"
            yield Check(f"board {runner.name}", "OK", text, area="device")
            continue
        is_numpy = "import numpy" in runner.missing
        level: Level = "FAIL" if not usable else "WARN" if is_numpy else "OK"
        package = "python3-numpy" if is_numpy else _PACKAGES.get(runner.name)
        fix = "" if package is None else _command(f"sudo apt-get install {package}", by_hand)
        text = f"not there: {runner.missing}" + ("; infer.py and parity.py of a package need NumPy" if is_numpy else "")
        yield Check(f"board {runner.name}", level, text, fix, "device")


_PACKAGES = {"tensorrt": "python3-libnvinfer"}  # of JetPack


def change_checks(told: Mapping[str, Any], by_hand: str) -> Iterator[Check]:
    """What was changed because it was asked for, and the way back."""
    ran = "; ".join(" ".join(argv) for argv in told["ran"]) or "nothing was run"
    back = "; ".join(_command(command, by_hand) for command in told["back"])
    notes = ". ".join(told["notes"])
    text = f"ran: {ran}. {notes}" + (f". The way back: {back}" if back else "")
    yield Check("board changed", "OK", text, area="device", details={"ran": told["ran"], "back": told["back"]})


def check_bundle(path: Path) -> None:
    """Refuses a place where no bundle can be written; asked before the checks, which take minutes on a board.

    Raises:
        UsageError: something is there already, the name does not end in .zip, or its folder is missing.
    """
    if path.suffix != ".zip":
        raise UsageError(f"--bundle {path}: the archive is a .zip file; give such a name")
    if path.exists():
        raise UsageError(f"--bundle {path}: exists already, and is not overwritten; such as: --bundle {_free(path)}")
    if not path.parent.is_dir():
        raise UsageError(f"--bundle {path}: {path.parent} is not a folder; give a place in one that is there")


def _free(path: Path) -> Path:
    """The first name like this one that is not taken."""
    stem = re.sub(r"-\d+$", "", path.stem)
    return next(p for i in count(2) if not (p := path.with_name(f"{stem}-{i}{path.suffix}")).exists())


def write_bundle(path: Path, checks: Sequence[Check], device: str | None, error: BaseException | None = None) -> None:
    """Writes an archive with everything that helps to find out why a board fails, without names, tokens and paths.

    Args:
        path: the .zip file; nothing is overwritten.
        checks: what the doctor found.
        device: name of the device, whose user and host are hidden; None where there was none.
        error: why the device could not be used.

    Raises:
        UsageError: as from `check_bundle`.
        StorageError: it cannot be written.
    """
    check_bundle(path)
    from nas.devices.agent import packed_agent

    content = {
        "doctor.json": {"checks": [to_plain(check) for check in checks]},
        "host.json": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "nas": importlib.metadata.version("nas"),
        },
        "device.json": {
            "device": device,
            "agent": packed_agent().sha256,
            "error": None if error is None else f"{type(error).__name__}: {error}",
        },
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
            archive.writestr(zipfile.ZipInfo(name), hidden(text, names_of(device)))
        archive.writestr(zipfile.ZipInfo("README.txt"), _README)
    try:
        with open(path, "xb") as f:
            f.write(data.getvalue())
    except FileExistsError as e:  # made since it was looked for
        raise UsageError(f"--bundle {path}: exists already, and is not overwritten; give another name") from e
    except OSError as e:
        raise StorageError(f"--bundle {path}: cannot be written: {e.strerror or e}") from e


_README = """What `nas doctor` found about a board, for whoever helps with it.
User, host and home folder are replaced by ***, and so are tokens and passwords. Read it before you send it.
doctor.json  each check; the line `board` has the whole state record
device.json  the device, the content hash of the agent, and why the device could not be used
host.json    the machine that the doctor ran on
"""


def hidden(text: str, names: Sequence[str]) -> str:
    """Text without secrets, logins, addresses that ssh tells, and names, each as a whole word."""
    from nas.report.redact import HIDDEN, redacted

    text = _PEER.sub(HIDDEN, _LOGIN.sub(f"{HIDDEN}@{HIDDEN}", redacted(text)))
    for name in sorted(set(names), key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", HIDDEN, text)
    return text


def names_of(device: str | None) -> list[str]:
    """Names that a text about a device may hold: user and host of the device and of this machine."""
    found = [socket.gethostname()]
    with contextlib.suppress(KeyError, OSError):  # a user without an entry in the list of users: containers have them
        found.append(getpass.getuser())
    for part in (device or "").split(","):
        place = part.partition("?")[0].removeprefix("ssh:")
        user, _, host = place.rpartition("@")
        found += [user, re.sub(r":\d+$", "", host).strip("[]"), *re.findall(r"[?&]config=([^&]+)", part)]
    return [name for name in found if len(name) > 1 and name not in (*HIDDEN_NAMES, "cpu")]


def failed(device: str, error: BaseException) -> Check:
    """The line of a device that cannot be used; the error of a `NasError` says what to do."""
    reason = " ".join(str(error).split()) if isinstance(error, NasError) else f"{type(error).__name__}: {error}"
    fix = f"what the line says, then again: nas doctor --device {quote(device)}; to get help: --bundle FILE.zip"
    return Check(f"device {device}", "FAIL", reason, fix, "device")
