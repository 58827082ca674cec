"""Floor 1: devices that measure and run ONNX models, behind one Protocol."""

from __future__ import annotations

from nas.core.errors import UsageError, did_you_mean
from nas.devices.base import Device

DEVICE_NAMES = ("cpu",)


def open_device(name: str) -> Device:
    """The device with this name.

    Args:
        name: `cpu`: the host CPU through ONNX Runtime, one thread.

    Raises:
        UsageError: there is no such device; the message names those that exist.
    """
    if name == "cpu":
        from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu  # heavy: not needed by a command's help

        return OnnxRuntimeCpu()
    raise UsageError(
        f"device {name!r} does not exist{did_you_mean(name, DEVICE_NAMES)}; devices: {', '.join(DEVICE_NAMES)}."
        " Run: nas doctor"
    )
