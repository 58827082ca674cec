"""What state a board is in: model, software, power mode, clocks, temperatures, throttling, power, memory.

Everything is read from files below a root and by asking `nvpmodel`, `dpkg-query` and `systemctl`; nothing is changed
and nothing needs root. What is not there is None, and `unknown` says why, so that no value is ever invented. On a host
that is no Jetson the record holds what there is.

Paths and formats by generation are those that jetson_stats (rbonghi/jetson_stats, f41d5ca) reads and that dumps of
boards show; no line of this was run on a board yet.
"""

import glob
import json
import os
import platform
import re
import shutil
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import processes
from .errors import BoardError

# Exit status, output and error output of a program; raises BoardError where it cannot be started or does not end.
Run = Callable[[List[str], float], Tuple[int, str, str]]

RUN_TIMEOUT_S = 20.0
# A command over SSH gets a PATH without these, and nvpmodel lies there.
ADMIN_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")

SOCS = ("tegra210", "tegra186", "tegra194", "tegra234", "tegra264")

# Part number -> module (jetson_stats, jtop/core/jetson_variables.py).
MODULES = {
    "p3448-0000": "Jetson Nano",
    "p3448-0002": "Jetson Nano eMMC",
    "p3448-0003": "Jetson Nano 2GB",
    "p3310-1000": "Jetson TX2",
    "p3636-0001": "Jetson TX2 NX",
    "p3668-0000": "Jetson Xavier NX (developer kit)",
    "p3668-0001": "Jetson Xavier NX 8GB",
    "p3668-0003": "Jetson Xavier NX 16GB",
    "p2888-0001": "Jetson AGX Xavier",
    "p2888-0003": "Jetson AGX Xavier",
    "p2888-0004": "Jetson AGX Xavier",
    "p2888-0005": "Jetson AGX Xavier",
    "p2888-0006": "Jetson AGX Xavier",
    "p2888-0008": "Jetson AGX Xavier",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano (developer kit)",
    "p3701-0000": "Jetson AGX Orin",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3834-0008": "Jetson Thor",
}

# L4T -> JetPack (jetson_stats; JetPack 7.2: github.com/OE4T/meta-tegra, PR 2224). Others are left unknown.
JETPACKS = {
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5 or 5.1.6",
    "35.6.3": "5.1.5 or 5.1.6",
    "35.6.4": "5.1.6",
    "35.6.5": "5.1.7",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.2": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.0.0": "7.2 EA",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}

GPU_NAMES = ("gv11b", "gp10b", "ga10b", "gb10b", "gpu")
BOOT_ID = "proc/sys/kernel/random/boot_id"
GOVERNOR = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
OFF_C = -100.0  # a sensor that is switched off reads -256
ABSURD_C = 150.0
NEAR_TRIP_C = 5.0
LEAST_FREE_MB = 1024  # below it TensorRT leaves out kernels that would need more (NVIDIA/TensorRT#3355)
CLOCK_TOLERANCE = 0.99


def run_program(argv: List[str], timeout_s: float = RUN_TIMEOUT_S) -> Tuple[int, str, str]:
    """Runs a program without a shell and without input, so that a question it asks is never answered.

    Raises:
        BoardError: `not_found`: it is not installed; `hung`: it did not end in time and was ended.
    """
    found = shutil.which(argv[0]) or shutil.which(argv[0], path=os.pathsep.join(ADMIN_PATHS))
    if found is None:
        raise BoardError("not_found", "%s is not installed" % argv[0])
    return processes.run([found] + argv[1:], timeout_s)


class Tree(object):
    """Files below a root; remembers why each thing that was asked for could not be read."""

    def __init__(self, root: str = "/") -> None:
        """`root`: where `sys`, `proc` and `etc` lie."""
        self.root = root
        self.unknown = {}  # type: Dict[str, str]

    def text(self, path: str, what: str = "") -> Optional[str]:
        """A file without NUL, spaces and newlines around; None where it cannot be read.

        Args:
            path: from the root, without a slash in front.
            what: name in the record under which `unknown` keeps the reason; none is kept where it is empty.
        """
        try:
            with open(os.path.join(self.root, path), "rb") as f:
                return f.read(1 << 20).decode("utf-8", "replace").replace("\0", " ").strip()
        except OSError as e:  # a rail that is switched off gives EAGAIN, a file of root EACCES
            if what:
                self.unknown[what] = "/%s: %s" % (path, e.strerror or e)
            return None

    def number(self, path: str, what: str = "") -> Optional[float]:
        """A file that holds one number."""
        text = self.text(path, what)
        if text is None:
            return None
        try:
            return float(text)
        except ValueError:
            if what:
                self.unknown[what] = "/%s: not a number: %r" % (path, text[:40])
            return None

    def paths(self, pattern: str) -> List[str]:
        """Paths from the root that fit a pattern, in the order of their numbers."""
        found = glob.glob(os.path.join(glob.escape(self.root), pattern))
        return sorted((os.path.relpath(p, self.root) for p in found), key=_by_number)


def _by_number(path: str) -> List[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def read_state(root: str = "/", run: Run = run_program) -> Dict[str, Any]:
    """The whole record.

    Args:
        root: where `sys`, `proc` and `etc` lie; tests give a tree of their own.
        run: starts programs.

    Returns:
        board, module, part_number, soc, jetpack, l4t, cuda, python, kernel, boot_id, governor (how the clock of the
        processor is chosen): texts or None.
        power_mode: {"id", "name"} or None; power_modes: list of {"id", "name"}; power_mode_default: id or None.
        clocks: gpu_mhz, gpu_min_mhz, gpu_max_mhz, gpu_governor, cpu_mhz, cpu_min_mhz, cpu_max_mhz (lists over the
        cores that are on), emc_mhz, emc_max_mhz. clocks_locked: bool, or None where nothing tells. locked_mhz: at
        what, such as "gpu 1020, cpu 1510.4"; None where they are not locked.
        temperature_c, trip_c: by zone; trip_c is where the kernel begins to slow the board down.
        throttle: counters that only rise, and alarms. cooling: state of each device that cools by slowing down.
        rails: list of {"name", "mw"}. memory_mb: total, available, swap, swap_free.
        unknown: name in this record -> why it is None or incomplete.
        tegrastats: a line of that program as it is, for people (its form changes with JetPack); None elsewhere.
        problems: list of {"what", "why", "fix"}, each fix a command for the board.
    """
    tree = Tree(root)
    record = _identity(tree, run)
    record["governor"] = tree.text(GOVERNOR) or None
    record.update(_power_modes(tree, run))
    record.update(snapshot(root, tree))
    record.update(_locks(record["clocks"]))
    record["trip_c"] = trips(root)
    record["memory_mb"] = _memory(tree)
    record["desktop"] = _desktop(run) if record["soc"] else None
    record["tegrastats"] = _tegrastats(run) if record["soc"] else None
    record["unknown"] = tree.unknown
    record["problems"] = _problems(record)
    return record


def identity(state: Dict[str, Any]) -> Dict[str, Any]:
    """The part of a state record that may not change while something is measured.

    Returns:
        `boot_id`, `power_mode` (its name), `governor`, `clocks_locked`, `locked_mhz`; None for what the board does not
        tell.
    """
    mode = state.get("power_mode")
    return {
        "boot_id": state.get("boot_id"),
        "power_mode": mode.get("name") if isinstance(mode, dict) else mode,
        "governor": state.get("governor"),
        "clocks_locked": state.get("clocks_locked"),
        "locked_mhz": state.get("locked_mhz"),
    }


def read_identity(root: str = "/", run: Run = run_program) -> Dict[str, Any]:
    """`identity` of the board now, without the rest of the record: it is asked for around each group of models."""
    tree = Tree(root)
    record = {"boot_id": tree.text(BOOT_ID), "governor": tree.text(GOVERNOR) or None}
    record.update(_locks(_clocks(tree)))
    return identity(dict(record, **_power_modes(tree, run)))


def snapshot(root: str = "/", tree: Optional[Tree] = None) -> Dict[str, Any]:
    """The part that changes while a board works: boot_id, clocks, temperature_c, throttle, cooling, rails.

    Reads files only, in a few milliseconds, so that it can be taken between measurements.
    """
    tree = tree or Tree(root)
    return {
        "boot_id": tree.text(BOOT_ID, "boot_id"),
        "clocks": _clocks(tree),
        "temperature_c": _temperatures(tree),
        "throttle": _counters(tree),
        "cooling": _cooling(tree),
        "rails": read_rails(root),
    }


# -- identity ----------------------------------------------------------------------------------------------------------


def _identity(tree: Tree, run: Run) -> Dict[str, Any]:
    compatible = (tree.text("proc/device-tree/compatible") or "").split()
    soc = next((s for s in SOCS if any(s in text for text in compatible)), None)
    part = _part_number(compatible, tree.text("proc/device-tree/nvidia,dtsfilename") or "")
    if soc is None:
        tree.unknown["soc"] = "no Tegra among the compatible strings of the device tree: %s" % (
            ", ".join(compatible[:4]) or "there is no device tree"
        )
    l4t = _l4t(tree, run)
    return {
        "board": _board(tree),
        "module": MODULES.get(part or ""),
        "part_number": part,
        "compatible": compatible,
        "soc": soc,
        "l4t": l4t,
        "jetpack": _jetpack(tree, run, l4t),
        "cuda": _cuda(tree),
        "python": platform.python_version(),
        "kernel": tree.text("proc/sys/kernel/osrelease", "kernel"),
    }


def _board(tree: Tree) -> Optional[str]:
    """Model of the board; of a host without a device tree that of its processor."""
    model = tree.text("proc/device-tree/model")
    if model:
        return model
    found = re.search(r"^model name\s*:\s*(\S.*)$", tree.text("proc/cpuinfo") or "", re.MULTILINE)
    name = " ".join(found.group(1).split()) if found else ""
    return " ".join(x for x in (platform.machine(), name) if x) or None


def _part_number(compatible: List[str], dts: str) -> Optional[str]:
    """Part number of the module: a carrier board has one, too, so known modules go first."""
    found = re.findall(r"p\d{4}-\d{4}", " ".join(compatible + [dts]).lower())
    return next((p for p in found if p in MODULES), found[0] if found else None)


def _l4t(tree: Tree, run: Run) -> Optional[str]:
    first = (tree.text("etc/nv_tegra_release", "l4t") or "").split("\n")[0]
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", first)
    version = "%s.%s" % match.groups() if match else _installed(run, "nvidia-l4t-core")
    found = re.match(r"\d+(?:\.\d+)+", version or "")
    if found is None:
        return None
    tree.unknown.pop("l4t", None)
    text = found.group(0)
    return text if text.count(".") > 1 else text + ".0"


def _jetpack(tree: Tree, run: Run, l4t: Optional[str]) -> Optional[str]:
    if l4t is None:
        return None
    package = re.match(r"\d+\.\d+(?:\.\d+)?", _installed(run, "nvidia-jetpack") or "")
    if package is not None:
        return package.group(0)
    if l4t not in JETPACKS:
        tree.unknown["jetpack"] = "the package nvidia-jetpack is not installed, and L4T %s is not in our table" % l4t
    return JETPACKS.get(l4t)


def _installed(run: Run, package: str) -> Optional[str]:
    """Version of a Debian package; None where it is not installed."""
    try:
        code, out, _ = run(["dpkg-query", "--showformat=${Version}", "--show", package], RUN_TIMEOUT_S)
    except BoardError:
        return None
    return out.strip() or None if code == 0 else None


def _cuda(tree: Tree) -> Optional[str]:
    text = tree.text("usr/local/cuda/version.json", "cuda")
    if text is not None:
        try:
            version = json.loads(text)["cuda"]["version"]
            return version if isinstance(version, str) else None
        except (ValueError, KeyError, TypeError):
            tree.unknown["cuda"] = "/usr/local/cuda/version.json: no version in it"
            return None
    found = re.search(r"CUDA Version (\d+(?:\.\d+)+)", tree.text("usr/local/cuda/version.txt") or "")
    if found is not None:
        tree.unknown.pop("cuda", None)
    return found.group(1) if found else None


# -- power modes -------------------------------------------------------------------------------------------------------


def parse_power_modes(text: str) -> Tuple[List[Dict[str, Any]], Optional[int]]:
    """Modes and the default one's id from nvpmodel.conf; ids differ between boards and mean nothing by themselves.

    Entries are `< POWER_MODEL ID=n NAME=x >`, in either order, and `< PM_CONFIG DEFAULT=n >`; # begins a comment.
    """
    modes, default = [], None
    for line in text.splitlines():
        line = line.split("#", 1)[0]
        entry = re.match(r"\s*<\s*(POWER_MODEL|PM_CONFIG)\s(.*)>", line)
        if entry is None:
            continue
        fields = dict(re.findall(r"(\w+)=(\S+)", entry.group(2).replace(">", " ")))
        if entry.group(1) == "POWER_MODEL" and fields.get("ID", "").isdigit() and "NAME" in fields:
            modes.append({"id": int(fields["ID"]), "name": fields["NAME"].strip('"')})
        elif entry.group(1) == "PM_CONFIG" and fields.get("DEFAULT", "").isdigit():
            default = int(fields["DEFAULT"])
    return modes, default


def parse_current_mode(text: str) -> Tuple[Optional[int], Optional[str]]:
    """Id and name that `nvpmodel -q` prints: `NV Power Mode: NAME`, then the id on a line of its own."""
    name = mode = None
    lines = [line.strip() for line in text.splitlines()]
    for i, line in enumerate(lines):
        found = re.search(r"NV Power Mode:\s*(\S+)", line)
        if found is None:
            continue
        name = found.group(1)
        after = next((x for x in lines[i + 1 :] if x), "")
        mode = int(after) if after.isdigit() else None
    return mode, name


def _power_modes(tree: Tree, run: Run) -> Dict[str, Any]:
    modes, default = parse_power_modes(tree.text("etc/nvpmodel.conf", "power_modes") or "")
    mode = name = None
    try:
        code, out, err = run(["nvpmodel", "-q"], RUN_TIMEOUT_S)
        mode, name = parse_current_mode(out)  # without root it may complain about clocks and still tell the mode
        if name is None:
            last = (err or out).strip().split("\n")[-1] or "nothing was printed"
            tree.unknown["power_mode"] = "nvpmodel -q ended with %d: %s" % (code, last)
    except BoardError as e:
        tree.unknown["power_mode"] = "nvpmodel -q: %s" % e
    if name is None:
        found = re.match(r"pmode:(\d+)", tree.text("var/lib/nvpmodel/status") or "")
        mode = int(found.group(1)) if found else None
    by_id = {m["id"]: m["name"] for m in modes}
    if mode is None and name is not None:
        mode = next((m["id"] for m in modes if m["name"] == name), None)
    if name is None and mode is not None:
        name = by_id.get(mode)
    current = {"id": mode, "name": name} if mode is not None or name is not None else None
    if current is not None:
        tree.unknown.pop("power_mode", None)
    return {"power_mode": current, "power_modes": modes, "power_mode_default": default}


# -- clocks ------------------------------------------------------------------------------------------------------------


def _gpu_node(tree: Tree) -> Optional[str]:
    """The GPU's devfreq node; Thor has two, of which gpc is what computes."""
    found = []
    for path in tree.paths("sys/class/devfreq/*"):
        name = os.path.basename(path)
        label = (tree.text(path + "/device/of_node/name") or name.split(".")[-1]).lower()
        if label in GPU_NAMES or "gpu" in label or "gpu" in name:
            found.append(path)
    return next((p for p in found if "gpc" in p), found[0] if found else None)


def _mhz(value: Optional[float], per_mhz: float) -> Optional[float]:
    return None if value is None else round(value / per_mhz, 1)


def _clocks(tree: Tree) -> Dict[str, Any]:
    node = _gpu_node(tree)
    clocks = {"gpu_mhz": None, "gpu_min_mhz": None, "gpu_max_mhz": None, "gpu_governor": None}  # type: Dict[str, Any]
    if node is None:
        tree.unknown["clocks.gpu_mhz"] = "/sys/class/devfreq: no GPU among its nodes"
    else:
        for name, file in (("gpu_mhz", "cur_freq"), ("gpu_min_mhz", "min_freq"), ("gpu_max_mhz", "max_freq")):
            clocks[name] = _mhz(tree.number("%s/%s" % (node, file), "clocks." + name), 1e6)
        clocks["gpu_governor"] = tree.text(node + "/governor")
    cores = []
    for path in tree.paths("sys/devices/system/cpu/cpu[0-9]*"):
        if tree.text(path + "/online") == "0":  # the first core often has no such file and is always on
            continue
        files = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
        values = [_mhz(tree.number("%s/cpufreq/%s" % (path, file)), 1e3) for file in files]
        if None not in values:
            cores.append(values)
    if not cores:
        tree.unknown["clocks.cpu_mhz"] = "/sys/devices/system/cpu: no cpufreq"
    for i, name in enumerate(("cpu_mhz", "cpu_min_mhz", "cpu_max_mhz")):
        clocks[name] = [values[i] for values in cores]
    clocks["emc_mhz"] = _mhz(tree.number(EMC + "/rate", "clocks.emc_mhz"), 1e6)  # of root
    clocks["emc_max_mhz"] = _mhz(tree.number(EMC + "/max_rate"), 1e6)
    return clocks


def are_locked(clocks: Dict[str, Any]) -> Optional[bool]:
    """Whether GPU and CPU can run at one frequency only; None where nothing tells.

    jetson_clocks sets the lower bound to the upper one. What runs below that bound is throttled, not unlocked.
    """
    gpu = (clocks.get("gpu_min_mhz"), clocks.get("gpu_max_mhz"))
    pairs = [] if None in gpu else [gpu]
    pairs += list(zip(clocks.get("cpu_min_mhz") or [], clocks.get("cpu_max_mhz") or []))
    return all(low == high for low, high in pairs) if pairs else None


def locked_mhz(clocks: Dict[str, Any]) -> Optional[str]:
    """The frequencies that GPU and CPU are locked to, as text; None where they are not locked.

    Clocks that were locked anew at another frequency are still locked, and a latency is not what it was.
    """
    if not are_locked(clocks):
        return None
    gpu, cores = clocks.get("gpu_min_mhz"), sorted(set(clocks.get("cpu_min_mhz") or []))
    told = [] if gpu is None else ["gpu %.5g" % gpu]
    return ", ".join(told + (["cpu " + "/".join("%.5g" % mhz for mhz in cores)] if cores else []))


def _locks(clocks: Dict[str, Any]) -> Dict[str, Any]:
    """What a state record says of the locks of its clocks."""
    return {"clocks_locked": are_locked(clocks), "locked_mhz": locked_mhz(clocks)}


# -- heat, throttling, power -------------------------------------------------------------------------------------------


def _zones(tree: Tree) -> List[Tuple[str, str]]:
    """Name and path of each thermal zone that says something; PMIC always reads 100."""
    result, seen = [], {}  # type: List[Tuple[str, str]], Dict[str, int]
    for path in tree.paths("sys/class/thermal/thermal_zone*"):
        name = tree.text(path + "/type") or os.path.basename(path)
        if "pmic" in name.lower():
            continue
        seen[name] = seen.get(name, 0) + 1
        result.append((name if seen[name] == 1 else "%s#%d" % (name, seen[name]), path))
    return result


def _temperatures(tree: Tree) -> Dict[str, float]:
    result = {}
    for name, path in _zones(tree):
        value = tree.number(path + "/temp", "temperature_c." + name)
        if value is not None and OFF_C < value / 1000 < ABSURD_C:
            result[name] = round(value / 1000, 1)
    return result


def trips(root: str = "/") -> Dict[str, float]:
    """The lowest temperature at which each zone slows something down or shuts it off; fans (`active`) are left out."""
    tree = Tree(root)
    result = {}
    for name, path in _zones(tree):
        found = []
        for kind in tree.paths(path + "/trip_point_*_type"):
            value = tree.number(kind[: -len("type")] + "temp")
            if tree.text(kind) in ("passive", "hot", "critical") and value is not None and 0 < value / 1000 < ABSURD_C:
                found.append(value / 1000)
        if found:
            result[name] = min(found)
    return result


def _counters(tree: Tree) -> Dict[str, int]:
    """Over-current and under-voltage events of Orin and Thor, alarms of the sensors, throttle counts of other CPUs."""
    result = {}  # type: Dict[str, int]
    for path in tree.paths("sys/class/hwmon/hwmon*"):
        if tree.text(path + "/name") == "soctherm_oc":
            for file in tree.paths(path + "/oc*_event_cnt"):
                _count(tree, result, os.path.basename(file), file)
    for path, channel, label in _ina_channels(tree):
        for alarm in ("crit_alarm", "max_alarm"):
            _count(tree, result, "%s %s" % (label, alarm), "%s/curr%s_%s" % (path, channel, alarm))
    others = tree.paths("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    if others:
        result["core_throttle_count"] = sum(int(tree.number(file) or 0) for file in others)
    return result


def _count(tree: Tree, into: Dict[str, int], name: str, path: str) -> None:
    value = tree.number(path)
    if value is not None:
        into[name] = int(value)


def _cooling(tree: Tree) -> Dict[str, int]:
    """State of what cools by slowing down; 0 is full speed. Fans are left out."""
    result = {}  # type: Dict[str, int]
    for path in tree.paths("sys/class/thermal/cooling_device*"):
        name, state = tree.text(path + "/type"), tree.number(path + "/cur_state")
        if name and state is not None and "fan" not in name.lower():
            result[name] = max(result.get(name, 0), int(state))
    return result


def _ina_channels(tree: Tree) -> List[Tuple[str, str, str]]:
    """Folder, channel and label of each rail of the sensors as the kernel of JetPack 5 and later shows them."""
    result = []
    for path in tree.paths("sys/bus/i2c/devices/*/hwmon/hwmon*"):
        if tree.text(path + "/name") != "ina3221":
            continue
        for file in tree.paths(path + "/in*_label"):
            channel = os.path.basename(file)[2 : -len("_label")]
            label = tree.text(file)
            if label and label != "NC" and channel != "7":  # 7 is the sum of the shunt voltages
                result.append((path, channel, label))
    return result


def read_rails(root: str = "/") -> List[Dict[str, Any]]:
    """Power of each rail now: list of {"name", "mw"}; empty where the board has no sensor.

    JetPack 5 and later give millivolt and milliampere, JetPack 4 (iio) milliwatt.
    """
    tree = Tree(root)
    result = []
    for path, channel, label in _ina_channels(tree):
        millivolt = tree.number("%s/in%s_input" % (path, channel))
        milliampere = tree.number("%s/curr%s_input" % (path, channel))
        if millivolt is not None and milliampere is not None:
            result.append({"name": label, "mw": round(millivolt * milliampere / 1000, 1)})
    if result:
        return result
    for file in tree.paths("sys/bus/i2c/devices/*/iio:device*/rail_name_*"):
        folder, channel = os.path.dirname(file), file.rsplit("_", 1)[1]
        milliwatt = tree.number("%s/in_power%s_input" % (folder, channel))
        rail = tree.text(file)
        if rail and rail != "NC" and milliwatt is not None:
            result.append({"name": rail, "mw": round(milliwatt, 1)})
    return result


# -- memory, desktop, problems -----------------------------------------------------------------------------------------


def _memory(tree: Tree) -> Dict[str, int]:
    text = tree.text("proc/meminfo", "memory_mb") or ""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    names = {"total": "MemTotal", "available": "MemAvailable", "swap": "SwapTotal", "swap_free": "SwapFree"}
    return {name: int(found[key]) // 1024 for name, key in names.items() if key in found}


def _desktop(run: Run) -> Optional[bool]:
    """Whether a desktop is up, which takes memory and GPU time; None where systemd does not say."""
    try:
        _, out, _ = run(["systemctl", "is-active", "display-manager"], RUN_TIMEOUT_S)
    except BoardError:
        return None
    return out.strip() == "active" if out.strip() else None


def _tegrastats(run: Run) -> Optional[str]:
    """The last line of half a second of it; it would not end by itself."""
    try:
        _, out, _ = run(["timeout", "0.5", "tegrastats", "--interval", "200"], RUN_TIMEOUT_S)
    except BoardError:
        return None
    return out.strip().rpartition("\n")[2] or None


def near_trip(record: Dict[str, Any], margin_c: float = NEAR_TRIP_C) -> List[str]:
    """Zones within `margin_c` of where the kernel slows the board down, each with its figures."""
    result = []
    for zone, trip in sorted((record.get("trip_c") or {}).items()):
        now = (record.get("temperature_c") or {}).get(zone)
        if now is not None and now > trip - margin_c:
            result.append("%s has %.1f C, and is slowed down from %.1f C" % (zone, now, trip))
    return result


def slow_clocks(clocks: Dict[str, Any]) -> Optional[str]:
    """What runs below the frequency that it is locked to; None where nothing does."""
    now, low, high = clocks.get("gpu_mhz"), clocks.get("gpu_min_mhz"), clocks.get("gpu_max_mhz")
    if now is not None and high is not None and low == high and now < CLOCK_TOLERANCE * high:
        return "the GPU is locked to %g MHz and runs at %g MHz" % (high, now)
    now, high = clocks.get("emc_mhz"), clocks.get("emc_max_mhz")
    if are_locked(clocks) and now is not None and high is not None and now < CLOCK_TOLERANCE * high:
        return "the memory can run at %g MHz and runs at %g MHz" % (high, now)
    return None


def _problem(what: str, why: str, fix: str) -> Dict[str, str]:
    return {"what": what, "why": why, "fix": fix}


def _problems(record: Dict[str, Any]) -> List[Dict[str, str]]:
    """What would make a measurement wrong or hard to repeat, each with the command that mends it."""
    result = []  # type: List[Dict[str, str]]
    if record["soc"] is None:
        return result
    if record["power_mode"] is None:
        why = record["unknown"].get("power_mode", "nothing tells it")
        result.append(_problem("power mode unknown", why, "sudo nvpmodel -q"))
    if record["clocks_locked"] is False:
        clocks = record["clocks"]
        why = "the GPU may run at %s to %s MHz, so times depend on what ran before" % (
            _plain(clocks["gpu_min_mhz"]),
            _plain(clocks["gpu_max_mhz"]),
        )
        result.append(_problem("clocks not locked", why, "sudo jetson_clocks"))
    slow = slow_clocks(record["clocks"])
    if slow:
        result.append(_problem("wrong clocks", slow, "let the board cool down, then: sudo jetson_clocks"))
    for why in near_trip(record):
        result.append(_problem("hot", why, "turn the fan up or let the board cool down"))
    for name, state in sorted(record["cooling"].items()):
        if state and "throttle" in name.lower():
            why = "the kernel slows the board down: %s is in state %d" % (name, state)
            result.append(_problem("throttled", why, "let the board cool down"))
    events = {name: n for name, n in record["throttle"].items() if n and name.startswith("oc")}
    if events:
        why = "since it started, the supply gave too little %d times (%s)" % (
            sum(events.values()),
            ", ".join("%s %d" % item for item in sorted(events.items())),
        )
        result.append(
            _problem("over-current", why, "use a stronger power supply, or a lower mode: sudo nvpmodel -m ID")
        )
    free = record["memory_mb"].get("available")
    if free is not None and free < LEAST_FREE_MB:
        why = "%d MB are free; TensorRT leaves out fast kernels that would need more" % free
        result.append(_problem("little memory", why, "end other programs: ps aux --sort=-rss | head"))
    if record["desktop"]:
        why = "a desktop takes memory and GPU time"
        result.append(_problem("desktop", why, "sudo systemctl isolate multi-user.target  (back: graphical.target)"))
    return result


def _plain(value: Optional[float]) -> str:
    return "?" if value is None else "%g" % value
