"""Writes the files that a board shows, below a folder: device tree, sysfs, /etc, /proc. All values are simulated.

Layouts differ by generation as in jetson_stats and dumps of boards: JetPack 4 has iio power sensors, later ones hwmon;
Thor names its GPU `gpu-gpc-0`. Frequencies are those of data sheets; temperatures and powers are made up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

BOOT_ID = "11111111-2222-4333-8444-555555555555"


@dataclass(frozen=True)
class FakeBoard:
    """What one board shows. Frequencies in MHz; `rails`: name -> milliwatt; `modes`: names by id.

    `iio`: power sensors of JetPack 4. `counters`: of soctherm_oc, None where the board has no such counters.
    """

    model: str
    compatible: tuple[str, ...]
    release: str
    cuda: str
    gpu_folder: str
    gpu_label: str
    gpu_mhz: tuple[float, float, float]
    cpus: int
    cpu_mhz: tuple[float, float, float]
    modes: tuple[str, ...]
    mode: int
    rails: dict[str, float]
    temperatures: dict[str, float]
    iio: bool = False
    counters: tuple[int, int, int] | None = None
    emc_mhz: tuple[float, float] | None = None

    @property
    def locked(self) -> FakeBoard:
        """The same after jetson_clocks: every lower bound is the upper one."""
        gpu, cpu = self.gpu_mhz[2], self.cpu_mhz[2]
        emc = None if self.emc_mhz is None else (self.emc_mhz[1],) * 2
        return replace(self, gpu_mhz=(gpu, gpu, gpu), cpu_mhz=(cpu, cpu, cpu), emc_mhz=emc)


NANO = FakeBoard(
    model="NVIDIA Jetson Nano Developer Kit",
    compatible=("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210"),
    release="# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: Sat Feb 19 2022",
    cuda="txt:CUDA Version 10.2.300",
    gpu_folder="57000000.gpu",
    gpu_label="gpu",
    gpu_mhz=(230.4, 76.8, 921.6),
    cpus=4,
    cpu_mhz=(1036.8, 102, 1479),
    modes=("MAXN", "5W"),
    mode=0,
    rails={"POM_5V_IN": 2100, "POM_5V_GPU": 120, "POM_5V_CPU": 640},
    temperatures={"AO-therm": 41.5, "CPU-therm": 33.0, "GPU-therm": 30.5, "PMIC-Die": 100.0, "PLL-therm": 31.0},
    iio=True,
)
XAVIER_NX = FakeBoard(
    model="NVIDIA Jetson Xavier NX Developer Kit",
    compatible=("nvidia,p3509-0000+p3668-0001", "nvidia,tegra194"),
    release="# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 2023",
    cuda="json:11.4.19",
    gpu_folder="17000000.gv11b",
    gpu_label="gv11b",
    gpu_mhz=(114.8, 114.8, 1109.2),
    cpus=6,
    cpu_mhz=(1190.4, 115.2, 1420.8),
    modes=(
        "MODE_15W_2CORE",
        "MODE_15W_4CORE",
        "MODE_15W_6CORE",
        "MODE_10W_2CORE",
        "MODE_10W_4CORE",
        "MODE_10W_DESKTOP",
        "MODE_20W_2CORE",
        "MODE_20W_4CORE",
        "MODE_20W_6CORE",
    ),
    mode=8,
    rails={"VDD_IN": 4000, "VDD_CPU_GPU_CV": 1200, "VDD_SOC": 1100},
    temperatures={"AUX-therm": 38.0, "CPU-therm": 39.0, "GPU-therm": 37.5, "PMIC-Die": 100.0},
)
ORIN_NANO_SUPER = FakeBoard(
    model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    compatible=("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"),
    release="# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025",
    cuda="json:12.6.68",
    gpu_folder="17000000.gpu",
    gpu_label="gpu",
    gpu_mhz=(306, 306, 1020),
    cpus=6,
    cpu_mhz=(960, 729.6, 1728),
    modes=("15W", "25W", "MAXN_SUPER", "7W"),
    mode=1,
    rails={"VDD_IN": 5000, "VDD_CPU_GPU_CV": 900, "VDD_SOC": 1500},
    temperatures={"cpu-thermal": 45.0, "gpu-thermal": 44.0, "tj-thermal": 46.0, "cv0-thermal": -256.0},
    counters=(0, 0, 0),
    emc_mhz=(2133, 3199),
)
THOR = FakeBoard(
    model="NVIDIA Jetson AGX Thor Developer Kit",
    compatible=("nvidia,p3971-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
    release="# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 2025",
    cuda="json:13.0.48",
    gpu_folder="gpu-gpc-0",
    gpu_label="",
    gpu_mhz=(315, 315, 1575),
    cpus=14,
    cpu_mhz=(972, 972, 2601),
    modes=("MAXN", "120W", "90W", "70W"),
    mode=1,
    rails={"VDD_GPU": 8000, "VDD_CPU_SOC_MSS": 9000, "VIN_SYS_5V0": 5000},
    temperatures={"cpu-thermal": 40.0, "gpu-thermal": 39.0, "tj-thermal": 41.0},
    counters=(0, 0, 0),
)
BOARDS = {"nano": NANO, "xavier_nx": XAVIER_NX, "orin_nano_super": ORIN_NANO_SUPER, "thor": THOR}


def write_board(root: Path, board: FakeBoard) -> Path:
    """Writes the tree of a board; `throttle.json` in it holds the files that a throttling board would change."""
    put(root, "proc/device-tree/model", board.model + "\0")
    put(root, "proc/device-tree/compatible", "".join(c + "\0" for c in board.compatible))
    put(root, "proc/sys/kernel/random/boot_id", BOOT_ID + "\n")
    put(root, "proc/sys/kernel/osrelease", "5.15.148-tegra\n")
    put(root, "proc/meminfo", "MemTotal: 7802192 kB\nMemFree: 900000 kB\nMemAvailable: 5300000 kB\nSwapTotal: 0 kB\n")
    put(root, "etc/nv_tegra_release", board.release + "\n")
    put(root, "etc/nvpmodel.conf", nvpmodel_conf(board.modes, board.mode))
    kind, _, version = board.cuda.partition(":")
    if kind == "txt":
        put(root, "usr/local/cuda/version.txt", version)
    else:
        put(root, "usr/local/cuda/version.json", json.dumps({"cuda": {"name": "CUDA SDK", "version": version}}))
    for path, text in _clock_files(board).items():
        put(root, path, text)
    _other_nodes(root, board)
    for i, (name, celsius) in enumerate(board.temperatures.items()):
        zone = f"sys/class/thermal/thermal_zone{i}"
        put(root, f"{zone}/type", name + "\n")
        put(root, f"{zone}/temp", f"{celsius * 1000:.0f}\n")
        put(root, f"{zone}/trip_point_0_type", "active\n")
        put(root, f"{zone}/trip_point_0_temp", "35000\n")
        put(root, f"{zone}/trip_point_1_type", "passive\n")
        put(root, f"{zone}/trip_point_1_temp", "95000\n")
    put(root, "sys/class/thermal/cooling_device0/type", "pwm-fan\n")
    put(root, "sys/class/thermal/cooling_device0/cur_state", "3\n")
    put(root, "sys/class/thermal/cooling_device1/type", "cpufreq-cpu0\n")
    put(root, "sys/class/thermal/cooling_device1/cur_state", "0\n")
    if board.counters is not None:
        put(root, "sys/class/hwmon/hwmon4/name", "soctherm_oc\n")
        for i, count in enumerate(board.counters, start=1):
            put(root, f"sys/class/hwmon/hwmon4/oc{i}_event_cnt", f"{count}\n")
    set_rails(root, board)
    hot = [f"sys/class/thermal/thermal_zone{i}/temp" for i in range(len(board.temperatures))]
    changes = {path: "96500\n" for path in hot} | {f"{gpu_node(board)}/cur_freq": f"{board.gpu_mhz[1] * 5e5:.0f}\n"}
    if board.counters is not None:
        changes["sys/class/hwmon/hwmon4/oc3_event_cnt"] = f"{board.counters[2] + 7}\n"
    put(root, "throttle.json", json.dumps(changes))
    put(root, "clocks.json", json.dumps({"free": _clock_files(board), "locked": _clock_files(board.locked)}))
    return root


def gpu_node(board: FakeBoard) -> str:
    """Path of the GPU's devfreq node from the root."""
    return f"sys/class/devfreq/{board.gpu_folder}"


def nvpmodel_conf(modes: tuple[str, ...], default: int) -> str:
    """A file like /etc/nvpmodel.conf: comments that look like entries, parameters, modes, the default one."""
    lines = [
        "# < POWER_MODEL ID=id_num NAME=mode_name >",
        "< PARAM TYPE=FILE NAME=CPU_ONLINE >",
        "CORE_0 /sys/devices/system/cpu/cpu0/online",
        "",
    ]
    for i, name in enumerate(modes):
        fields = f"NAME={name} ID={i}" if i == len(modes) - 1 and len(modes) > 1 else f"ID={i} NAME={name}"
        lines += [f"< POWER_MODEL {fields} >", "CPU_ONLINE CORE_0 1", "GPU MAX_FREQ 918000000", ""]
    return "\n".join([*lines, f"< PM_CONFIG DEFAULT={default} >", ""])


def set_rails(root: Path, board: FakeBoard, milliwatt: dict[str, float] | None = None) -> None:
    """Writes the power sensors: millivolt and milliampere, or milliwatt on JetPack 4."""
    rails = board.rails | (milliwatt or {})
    if board.iio:
        folder = "sys/bus/i2c/devices/6-0040/iio:device0"
        for i, (name, mw) in enumerate(rails.items()):
            put(root, f"{folder}/rail_name_{i}", name + "\n")
            put(root, f"{folder}/in_power{i}_input", f"{mw:.0f}\n")
        return
    folder = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
    put(root, f"{folder}/name", "ina3221\n")
    for i, (name, mw) in enumerate(rails.items(), start=1):
        put(root, f"{folder}/in{i}_label", name + "\n")
        put(root, f"{folder}/in{i}_input", "5000\n")
        put(root, f"{folder}/curr{i}_input", f"{mw / 5:.0f}\n")
        put(root, f"{folder}/curr{i}_crit_alarm", "0\n")
        put(root, f"{folder}/curr{i}_max_alarm", "0\n")
    put(root, f"{folder}/in7_label", "sum of shunt voltages\n")
    put(root, f"{folder}/in7_input", "17\n")
    put(root, f"{folder}/curr7_input", "3\n")


def put(root: Path, path: str, text: str) -> None:
    """Writes one file below the root."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _clock_files(board: FakeBoard) -> dict[str, str]:
    """Every file that jetson_clocks changes, with its content."""
    files = {}
    for file, mhz in zip(("cur_freq", "min_freq", "max_freq"), board.gpu_mhz, strict=True):
        files[f"{gpu_node(board)}/{file}"] = f"{mhz * 1e6:.0f}\n"
    for i in range(board.cpus):
        names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
        for name, mhz in zip(names, board.cpu_mhz, strict=True):
            files[f"sys/devices/system/cpu/cpu{i}/cpufreq/{name}"] = f"{mhz * 1e3:.0f}\n"
    if board.emc_mhz is not None:
        for file, mhz in zip(("rate", "max_rate"), board.emc_mhz, strict=True):
            files[f"sys/kernel/debug/bpmp/debug/clk/emc/{file}"] = f"{mhz * 1e6:.0f}\n"
    return files


def _other_nodes(root: Path, board: FakeBoard) -> None:
    node = gpu_node(board)
    put(root, f"{node}/governor", "nvhost_podgov\n")
    if board.gpu_label:
        put(root, f"{node}/device/of_node/name", board.gpu_label + "\0")
    else:  # Thor shows its video engine beside the GPU
        put(root, "sys/class/devfreq/gpu-nvd-0/cur_freq", "1692000000\n")
    put(root, "sys/class/devfreq/15480000.nvdec/cur_freq", "793600000\n")
    for i in range(1, board.cpus):
        put(root, f"sys/devices/system/cpu/cpu{i}/online", "1\n")
