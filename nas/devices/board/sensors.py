"""What may not change while something is measured, and the frequency governor of the processor, from one file."""

import os
from typing import Any, Dict, Optional


def governor(root: str = "/") -> Optional[str]:
    """How the processor's clock is chosen; None where the board does not tell."""
    path = os.path.join(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read(256).strip() or None
    except OSError:  # not there on this kind of machine
        return None


def identity(state: Dict[str, Any]) -> Dict[str, Any]:
    """The part of a state record that may not change while something is measured.

    Returns:
        `boot_id`, `power_mode` (its name), `governor`, `clocks_locked`; None for what the board does not tell.
    """
    mode = state.get("power_mode")
    return {
        "boot_id": state.get("boot_id"),
        "power_mode": mode.get("name") if isinstance(mode, dict) else mode,
        "governor": state.get("governor"),
        "clocks_locked": state.get("clocks_locked"),
    }
