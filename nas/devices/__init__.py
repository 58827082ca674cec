"""Floor 1: devices that measure and run ONNX models, behind one Protocol."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from nas.core.errors import UsageError, did_you_mean
from nas.devices.base import Device

DEVICE_NAMES = ("cpu",)
OTHER_NAMES = ("tensorrt",)  # where there is such a runtime

os.putenv("ORT_DISABLE_TELEMETRY", "1")  # newer ONNX Runtimes note their use in files of the home


def open_device(name: str, say: Callable[[str], None] = lambda _: None) -> Device:
    """The device with this name.

    Args:
        name: `cpu`: the host CPU through ONNX Runtime, one thread; `cpu:N`: the same with N threads; `tensorrt`: the
            GPU of this machine; `ssh:USER@HOST`: a board behind SSH (`nas.devices.address.parse_address` has the
            whole form), several of one state joined by commas.
        say: told in a line what a device has to say while it works, such as that a connection broke.

    Raises:
        UsageError: there is no such device, or it has fewer cores; the message says what there is.
        DeviceError: it cannot be used.
    """
    kind, colon, given = name.partition(":")
    if kind == "cpu":
        threads = _threads(name, given) if colon else 1
        from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu  # heavy: not needed by a command's help

        return OnnxRuntimeCpu(threads=threads)
    if kind == "ssh":
        from nas.devices.boards import open_boards  # as above

        return open_boards(name, say)
    if name == "tensorrt":
        from nas.devices.tensorrt import TensorRt  # as above

        return TensorRt()
    names = DEVICE_NAMES + OTHER_NAMES
    raise UsageError(
        f"device {name!r} does not exist{did_you_mean(name, names)}; devices: {', '.join(names)}, cpu:N for N threads, "
        "and ssh:USER@HOST for a board. Run: nas doctor"
    )


def usable_cores() -> int:
    """Processor cores that this process may use; those of the machine where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(name: str, given: str) -> int:
    cores = usable_cores()
    if re.fullmatch("[0-9]{1,9}", given) and 1 <= int(given) <= cores:
        return int(given)
    more = f", or cpu:{cores} for all cores" if cores > 1 else ""
    raise UsageError(
        f"device {name!r}: after cpu: comes a number of threads from 1 to {cores} (the cores that this process may "
        f"use), got {given!r}. Give cpu for one thread{more}"
    )
