"""What kind of machine this is, read with the standard library only (Linux files where they exist)."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from nas.core.errors import StorageError
from nas.core.jsonio import read_text
from nas.core.records import DeviceProfile, Precision

# Instruction sets that decide which kernels a runtime takes; others are left out so that the line stays readable.
ISA_FLAGS = (
    "avx",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_EXACT_INT8 = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}

# A few makers of ARM cores (Linux, arch/arm64/include/asm/cputype.h); ARM machines often give no model name.
_ARM_MAKERS = {"0x41": "arm", "0x4e": "nvidia", "0x51": "qualcomm", "0x61": "apple", "0xc0": "ampere"}


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine as far as it matters to a latency.

    `governor` is `host` where the machine has no frequency control of its own (a virtual machine). `load_1min` is the
    number of waiting processes, `memory_mib` the installed memory, `memory_free_mib` what is available now.
    """

    machine: str
    cpu_model: str
    cpu_id: str
    cpus: int
    isa: tuple[str, ...]
    governor: str
    boost: str
    clocks_locked: bool
    kernel: str
    load_1min: float
    memory_mib: int
    memory_free_mib: int
    is_virtual: bool

    @property
    def int8_is_exact(self) -> bool:
        """False where uint8 x int8 products may saturate 16-bit sums: x86 without VNNI (ONNX Runtime's guide)."""
        return bool(_EXACT_INT8 & set(self.isa)) or not self.machine.startswith(("x86", "amd64"))


def probe_host(root: Path = Path("/")) -> HostFacts:
    """Reads the machine's description below `root`; what cannot be read becomes `unknown` or 0."""
    fields = _cpu_fields(root / "proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor = _line(cpufreq / "scaling_governor") or "host"
    low, high = _line(cpufreq / "scaling_min_freq"), _line(cpufreq / "scaling_max_freq")
    memory = _memory_mib(root / "proc/meminfo")
    return HostFacts(
        machine=platform.machine().lower().replace("_", "-") or "unknown",
        cpu_model=_cpu_model(fields, root),
        cpu_id="-".join(
            fields[k]
            for k in ("vendor_id", "cpu family", "model", "stepping", "CPU part", "CPU variant")
            if k in fields
        )
        or "unknown",
        cpus=os.cpu_count() or 1,
        isa=tuple(f for f in ISA_FLAGS if f in flags),
        governor=governor,
        boost=_boost(root),
        clocks_locked=bool(low) and low == high,
        kernel=platform.release() or "unknown",
        load_1min=_load(root),
        memory_mib=memory.get("MemTotal", 0),
        memory_free_mib=memory.get("MemAvailable", 0),
        is_virtual="hypervisor" in flags,
    )


def clock_and_temperature(root: Path = Path("/")) -> tuple[float | None, float | None]:
    """Clock of the fastest core, MHz, and highest temperature of the machine, degrees C; None where it tells neither.

    A machine without frequency control of its own (a virtual one) gives what its processor reports of itself.
    """
    khz = [_number(p) for p in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = [v / 1000 for v in khz if v]
    if not clocks:
        told = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo"), flags=re.MULTILINE)
        clocks = [float(v) for v in told]
    zones = [_number(p) for p in (root / "sys/class/thermal").glob("thermal_zone[0-9]*/temp")]
    degrees = [v / 1000 for v in zones if v and v > 0]  # millidegrees; a zone without a sensor gives 0 or less
    return max(clocks, default=None), max(degrees, default=None)


def host_profile(
    facts: HostFacts, *, runtime: str, runtime_version: str, threads: int, precisions: tuple[Precision, ...]
) -> DeviceProfile:
    """The device state of a runtime on this machine.

    Args:
        facts: from `probe_host`.
        runtime: short name that may stand in a folder name, such as `ort`.
        runtime_version: its version.
        threads: worker threads of one inference.
        precisions: what the runtime runs faster or equal in, fp32 first.
    """
    name = f"{facts.machine}-{facts.cpu_model}_{runtime}{runtime_version}_{threads}t"
    return DeviceProfile(
        name=safe_name(name),
        board=f"{facts.machine} {facts.cpu_model} ({facts.cpu_id})",
        runtime=runtime,
        runtime_version=runtime_version,
        power_mode=f"governor={facts.governor} boost={facts.boost}",
        clocks_locked=facts.clocks_locked,
        threads=threads,
        driver=" ".join(facts.isa) or "unknown",
        precisions=precisions,
        kind="measured",
        details={
            "kernel": facts.kernel,
            "cpus": str(facts.cpus),
            "load_1min": f"{facts.load_1min:.2f}",
            "memory_mib": str(facts.memory_mib),
            "memory_free_mib": str(facts.memory_free_mib),
            "virtual": "yes" if facts.is_virtual else "no",
            "int8_sums": "exact" if facts.int8_is_exact else "may saturate (no VNNI)",
        },
    )


def safe_name(text: str) -> str:
    """A folder name: lower-case letters, digits, dots, dashes and underscores, at most 80 characters."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:80].rstrip("-._") or "unknown"


def _cpu_fields(path: Path) -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _text(path).split("\n"):
        if not line.strip():
            if fields:
                break
            continue
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _cpu_model(fields: dict[str, str], root: Path) -> str:
    name = fields.get("model name") or _line(root / "proc/device-tree/model")
    if not name and "CPU part" in fields:
        maker = fields.get("CPU implementer", "")
        name = f"{_ARM_MAKERS.get(maker, maker)} part {fields['CPU part']}"
    name = name or platform.processor() or "unknown"
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*$", " ", name, flags=re.IGNORECASE)
    return " ".join(name.replace("\0", "").split()) or "unknown"


def _boost(root: Path) -> str:
    value = _line(root / "sys/devices/system/cpu/cpufreq/boost")
    if value in ("0", "1"):
        return "on" if value == "1" else "off"
    no_turbo = _line(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo in ("0", "1"):
        return "off" if no_turbo == "1" else "on"
    return "unknown"


def _load(root: Path) -> float:
    try:
        return float(_line(root / "proc/loadavg").split(" ")[0])
    except ValueError:
        return 0.0


def _memory_mib(path: Path) -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text(path), flags=re.MULTILINE)
    return {name: int(kib) // 1024 for name, kib in found}


def _number(path: Path) -> float | None:
    try:
        return float(_line(path))
    except ValueError:
        return None


def _line(path: Path) -> str:
    return _text(path).strip().split("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except StorageError:  # the file is not there on this kind of machine
        return ""
