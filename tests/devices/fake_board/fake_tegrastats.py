#!/usr/bin/env python3
"""Stands in for tegrastats: one line per interval in the format of JetPack 4, 6, 7.0 (Thor) or 7.2; all is simulated.

`tegrastats.json` beside it: {"format": "jp4" | "jp6" | "jp7" | "jp72", "lines": how many, null for no end}.
Python 3.6, standard library only.
"""

import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))

LINES = {
    "jp4": "RAM 1530/3964MB (lfb 330x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB)"
    " CPU [5%@1036,2%@1036,off,off]"
    " EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@31C CPU@33.5C PMIC@100C GPU@30.5C AO@41.5C thermal@32C"
    " POM_5V_IN 2100/2100 POM_5V_GPU 120/120 POM_5V_CPU 640/640",
    "jp6": "11-28-2026 12:00:00 RAM 2310/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB)"
    " CPU [3%@729,0%@729,off,off,1%@729,"
    "0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 12%@[305] NVDLA0 off VIC off cpu@45C soc2@44.1C gpu@44C tj@46C"
    " VDD_IN 5000mW/5000mW VDD_CPU_GPU_CV 900mW/900mW VDD_SOC 1500mW/1500mW",
    "jp7": "11-28-2026 12:00:00 RAM 4100/125772MB (lfb 9x4MB) CPU [0%@972,0%@972] GR3D_FREQ @[315,315,315] cpu@40C"
    " gpu@39C tj@41C VDD_GPU 8000mW/8000mW VDD_CPU_SOC_MSS 9000mW/9000mW VIN_SYS_5V0 5000mW/5000mW",
    "jp72": "11-28-2026 12:00:00 RAM 2310/7620MB (lfb 4x4MB) CPU [3%@729,0%@729] EMC_FREQ 0% GR3D_FREQ 12%@[305,305]"
    " cpu@45C/45C gpu@44C/44C tj@46C/46C VDD_IN 5000mW/5000mW/5100mW VDD_CPU_GPU_CV 900mW/900mW/950mW",
}


def main(arguments):
    with open(os.path.join(HERE, "tegrastats.json"), encoding="utf-8") as f:
        scenario = json.load(f)
    interval_s = 1.0
    if "--interval" in arguments:
        interval_s = int(arguments[arguments.index("--interval") + 1]) / 1000.0
    count = 0
    while scenario.get("lines") is None or count < scenario["lines"]:
        print(LINES[scenario["format"]])
        sys.stdout.flush()
        count += 1
        time.sleep(interval_s)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
