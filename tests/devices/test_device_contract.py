"""Every device keeps the same contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nas.devices import DEVICE_NAMES, open_device
from nas.devices.base import Device
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import ProtocolSettings
from nas.testing import DEVICE_CONTRACT, SimulatedDevice

QUICK = ProtocolSettings(network_rounds=2, network_sessions=2, network_round_ms=0.5, retries=1, wait_ms=0)
DEVICES: dict[str, Callable[[], Device]] = {
    "onnxruntime_cpu": lambda: OnnxRuntimeCpu(QUICK),
    "simulated": SimulatedDevice,
}


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(DEVICES))
def test_contract(name: str, check: Callable[[Device], None]) -> None:
    check(DEVICES[name]())


def test_every_device_that_can_be_opened_by_name_says_what_it_is() -> None:
    for name in DEVICE_NAMES:
        device = open_device(name)
        assert device.profile.kind == "measured"


def test_unknown_device_names_those_that_exist() -> None:
    from nas.core.errors import UsageError

    with pytest.raises(
        UsageError, match=r"device 'cpuu' does not exist; did you mean 'cpu'\?; devices: cpu\. Run: nas doctor"
    ):
        open_device("cpuu")


def test_simulated_numbers_are_labelled_and_the_same_every_time() -> None:
    from nas.testing import MeasureJob, mean_model

    job = MeasureJob("x", "row", "int8", mean_model(), 123456)
    first, second = SimulatedDevice(3), SimulatedDevice(3)
    assert first.profile.kind == "simulated"
    assert first.measure([job]) == second.measure([job])
    assert first.latency_ms(job) != SimulatedDevice(4).latency_ms(job)
