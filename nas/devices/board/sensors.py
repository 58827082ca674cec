"""The little that is read around every measurement, from files that every Linux has: cheap and without privileges."""

import os
import platform
import sys
from typing import Any, Dict, List, Optional


def bare_state(root: str = "/") -> Dict[str, Any]:
    """Board, processor, boot id and governor below `root`; what cannot be read is None or empty."""
    return {
        "board": _board(root),
        "soc": None,
        "jetpack": None,
        "l4t": None,
        "cuda": None,
        "python": "%d.%d.%d" % sys.version_info[:3],
        "boot_id": _line(root, "proc/sys/kernel/random/boot_id"),
        "power_mode": None,
        "power_modes": [],
        "governor": _line(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clocks": {},
        "clocks_locked": _clocks_locked(root),
        "temperature_c": {},
        "throttle": {},
        "rails": [],
        "memory_mb": {},
        "problems": [],
    }


def identity(state: Dict[str, Any]) -> Dict[str, Any]:
    """The part of a state record that may not change while something is measured: boot, power mode, locked clocks."""
    mode = state.get("power_mode")
    return {
        "boot_id": state.get("boot_id"),
        "power_mode": mode.get("name") if isinstance(mode, dict) else mode,
        "governor": state.get("governor"),
        "clocks_locked": state.get("clocks_locked"),
    }


def look(root: str = "/") -> Dict[str, Any]:
    """Highest temperature, degrees C, and clock of the fastest core, MHz, now; None where the board does not tell."""
    zones = [_number(root, path + "/temp") for path in _entries(root, "sys/class/thermal", "thermal_zone")]
    degrees = [v / 1e3 for v in zones if v is not None and v > 0]  # a zone without a sensor gives 0 or less
    cpus = _entries(root, "sys/devices/system/cpu", "cpu")
    clocks = [_number(root, path + "/cpufreq/scaling_cur_freq") for path in cpus]
    megahertz = [v / 1e3 for v in clocks if v]
    return {"temperature_c": max(degrees) if degrees else None, "clock_mhz": max(megahertz) if megahertz else None}


def _board(root: str) -> str:
    model = (_line(root, "proc/device-tree/model") or "").replace("\0", "").strip()
    if model:
        return model
    for line in (_text(root, "proc/cpuinfo") or "").split("\n"):
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return "%s %s" % (platform.machine(), " ".join(value.split()))
    return platform.machine() or "unknown"


def _clocks_locked(root: str) -> Optional[bool]:
    cpufreq = "sys/devices/system/cpu/cpu0/cpufreq/"
    low, high = _line(root, cpufreq + "scaling_min_freq"), _line(root, cpufreq + "scaling_max_freq")
    return None if low is None or high is None else low == high


def _entries(root: str, folder: str, prefix: str) -> List[str]:
    try:
        names = os.listdir(os.path.join(root, folder))
    except OSError:
        return []
    return ["%s/%s" % (folder, n) for n in sorted(names) if n.startswith(prefix) and n[len(prefix) :].isdigit()]


def _number(root: str, path: str) -> Optional[float]:
    try:
        return float(_line(root, path) or "")
    except ValueError:
        return None


def _line(root: str, path: str) -> Optional[str]:
    text = _text(root, path)
    return None if text is None else text.strip().split("\n")[0].strip()


def _text(root: str, path: str) -> Optional[str]:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as f:
            return f.read(65536)
    except OSError:  # not there on this kind of machine, or not readable now
        return None
