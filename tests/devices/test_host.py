"""The host is described by its files; folders made here stand for other machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nas.devices.host import HostFacts, clock_and_temperature, host_profile, probe_host, safe_name

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 106
model name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
stepping\t: 6
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni hypervisor

processor\t: 1
model name\t: another one
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: 0xd0c\n"


def machine(folder: Path, files: dict[str, str]) -> HostFacts:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return probe_host(folder)


def test_cpu_is_named_without_decoration(tmp_path: Path) -> None:
    facts = machine(tmp_path, {"proc/cpuinfo": INTEL, "proc/loadavg": "1.50 1.0 1.0 2/100 5\n"})
    assert facts.cpu_model == "Intel Xeon Platinum 8375C"
    assert facts.cpu_id == "GenuineIntel-6-106-6"
    assert facts.isa == ("avx", "avx2", "avx512f", "avx512_vnni")
    assert facts.is_virtual
    assert facts.load_1min == 1.5
    assert facts.int8_is_exact


def test_governor_boost_and_locked_clocks_are_read(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu"
    files = {
        f"{base}/cpu0/cpufreq/scaling_governor": "performance\n",
        f"{base}/cpu0/cpufreq/scaling_min_freq": "3000000\n",
        f"{base}/cpu0/cpufreq/scaling_max_freq": "3000000\n",
        f"{base}/cpufreq/boost": "0\n",
    }
    facts = machine(tmp_path, files)
    assert (facts.governor, facts.boost, facts.clocks_locked) == ("performance", "off", True)


def test_arm_core_without_a_model_name_gets_one(tmp_path: Path) -> None:
    assert machine(tmp_path, {"proc/cpuinfo": ARM}).cpu_model == "arm part 0xd0c"


def test_a_machine_that_tells_nothing_is_still_described(tmp_path: Path) -> None:
    facts = probe_host(tmp_path)
    assert facts.cpu_id == "unknown"
    assert facts.memory_mib == 0
    assert facts.governor == "host"
    assert not facts.clocks_locked


def test_x86_without_vnni_is_told_that_int8_may_saturate(tmp_path: Path) -> None:
    facts = machine(tmp_path, {"proc/cpuinfo": INTEL.replace("avx512_vnni", "")})
    x86 = dataclasses.replace(facts, machine="x86-64")
    assert not x86.int8_is_exact
    profile = host_profile(x86, runtime="ort", runtime_version="1", threads=1, precisions=("fp32", "int8"))
    assert profile.details["int8_sums"] == "may saturate (no VNNI)"


def test_profile_is_named_for_people_and_file_systems(tmp_path: Path) -> None:
    facts = dataclasses.replace(machine(tmp_path, {"proc/cpuinfo": INTEL}), machine="x86-64")
    profile = host_profile(facts, runtime="ort", runtime_version="1.31.1", threads=1, precisions=("fp32", "int8"))
    assert profile.name == "x86-64-intel-xeon-platinum-8375c_ort1.31.1_1t"


def test_load_does_not_change_the_state_but_the_governor_does(tmp_path: Path) -> None:
    facts = machine(tmp_path, {"proc/cpuinfo": INTEL})

    def fingerprint(**changes: object) -> str:
        changed = dataclasses.replace(facts, **changes)  # type: ignore[arg-type]
        return host_profile(changed, runtime="ort", runtime_version="1", threads=1, precisions=("fp32",)).fingerprint

    assert fingerprint(load_1min=9.0, memory_free_mib=1, kernel="other") == fingerprint()
    assert fingerprint(governor="powersave") != fingerprint()
    assert fingerprint(isa=("avx",)) != fingerprint()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("../../etc", "etc"), ("A B/C", "a-b-c"), ("", "unknown"), ("x" * 100, "x" * 80), ("...", "unknown")],
)
def test_names_are_safe(text: str, expected: str) -> None:
    assert safe_name(text) == expected


def test_clock_and_temperature_are_those_of_the_fastest_core_and_the_hottest_zone(tmp_path: Path) -> None:
    for cpu, khz in (("cpu0", "1500000"), ("cpu1", "2400000")):
        (tmp_path / f"sys/devices/system/cpu/{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"sys/devices/system/cpu/{cpu}/cpufreq/scaling_cur_freq").write_text(khz)
    for zone, value in (("thermal_zone0", "41500"), ("thermal_zone1", "-256000"), ("thermal_zone2", "")):
        (tmp_path / f"sys/class/thermal/{zone}").mkdir(parents=True)
        (tmp_path / f"sys/class/thermal/{zone}/temp").write_text(value)
    assert clock_and_temperature(tmp_path) == (2400.0, 41.5)


def test_a_virtual_machine_gives_the_clock_of_its_processor_and_no_temperature(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2445.432\nmodel name: x\n\ncpu MHz : 2300.0\n")
    assert clock_and_temperature(tmp_path) == (2445.432, None)


def test_a_machine_that_tells_nothing_gives_neither(tmp_path: Path) -> None:
    assert clock_and_temperature(tmp_path) == (None, None)
