"""Every device keeps the same contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nas.core.errors import UsageError
from nas.devices import DEVICE_NAMES, open_device, usable_cores
from nas.devices.base import Device
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import ProtocolSettings
from nas.testing import DEVICE_CONTRACT, SimulatedDevice

QUICK = ProtocolSettings(network_rounds=2, network_sessions=2, network_round_ms=0.5, retries=1, wait_ms=0)
DEVICES: dict[str, Callable[[], Device]] = {
    "onnxruntime_cpu": lambda: OnnxRuntimeCpu(QUICK),
    "simulated": SimulatedDevice,
}
if usable_cores() > 1:
    DEVICES["onnxruntime_cpu_2_threads"] = lambda: OnnxRuntimeCpu(QUICK, threads=2)

several_cores = pytest.mark.skipif(usable_cores() < 2, reason="this process may use one core only")


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(DEVICES))
def test_contract(name: str, check: Callable[[Device], None]) -> None:
    check(DEVICES[name]())


def test_every_device_that_can_be_opened_by_name_says_what_it_is() -> None:
    for name in DEVICE_NAMES:
        device = open_device(name)
        assert device.profile.kind == "measured"


def test_unknown_device_names_those_that_exist() -> None:
    with pytest.raises(
        UsageError,
        match=r"device 'cpuu' does not exist; did you mean 'cpu'\?; devices: cpu, tensorrt, cpu:N for N threads, "
        "and ssh:USER@HOST for a board. Run: nas doctor",
    ):
        open_device("cpuu")


@several_cores
def test_the_number_after_the_name_is_that_of_threads_and_another_device_state() -> None:
    one, two = open_device("cpu").profile, open_device("cpu:2").profile
    assert (one.threads, two.threads) == (1, 2)
    assert one.name.endswith("_1t") and two.name.endswith("_2t")
    assert one.fingerprint != two.fingerprint


def test_one_thread_has_two_names() -> None:
    assert open_device("cpu:1").profile.fingerprint == open_device("cpu").profile.fingerprint
    assert open_device("cpu:1").profile.name == open_device("cpu").profile.name


@pytest.mark.parametrize("given", ["0", "x", "", "-1", "1.5", "\u00b2", "9" * 5000])
def test_a_number_of_threads_that_cannot_be_is_refused_with_what_can(given: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_device(f"cpu:{given}")
    cores = usable_cores()
    assert f"a number of threads from 1 to {cores} (the cores that this process may use)" in str(refused.value)
    assert f"got {given!r}. Give cpu for one thread" in str(refused.value)


@pytest.mark.parametrize(
    ("cores", "advice"),
    [({0}, "Give cpu for one thread"), ({1, 2, 5}, "Give cpu for one thread, or cpu:3 for all cores")],
)
def test_more_threads_than_this_process_may_use_are_refused(
    cores: set[int], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores, raising=False)
    with pytest.raises(UsageError) as refused:
        open_device("cpu:4")
    assert str(refused.value) == (
        f"device 'cpu:4': after cpu: comes a number of threads from 1 to {len(cores)} (the cores that this process may "
        f"use), got '4'. {advice}"
    )


def test_simulated_numbers_are_labelled_and_the_same_every_time() -> None:
    from nas.testing import MeasureJob, mean_model

    job = MeasureJob("x", "row", "int8", mean_model(), 123456)
    first, second = SimulatedDevice(3), SimulatedDevice(3)
    assert first.profile.kind == "simulated"
    assert first.measure([job]) == second.measure([job])
    assert first.latency_ms(job) != SimulatedDevice(4).latency_ms(job)
