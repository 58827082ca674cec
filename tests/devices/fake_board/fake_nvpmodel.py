#!/usr/bin/env python3
"""Stands in for nvpmodel: -q, -p --verbose and -m ID over the files of a fake board; -m needs the fake sudo.

`nvpmodel.json` beside it: {"root": tree of the board, "reboot": ids that want a reboot first, "fail": fault or null}.
A change of mode undoes locked clocks, as on a board. Python 3.6, standard library only.
"""

import json
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def main(arguments):
    with open(os.path.join(HERE, "nvpmodel.json"), encoding="utf-8") as f:
        scenario = json.load(f)
    with open(os.path.join(HERE, "nvpmodel.calls.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(arguments) + "\n")
    root = scenario["root"]
    with open(os.path.join(root, "etc/nvpmodel.conf"), encoding="utf-8") as f:
        lines = [line for line in f if not line.startswith("#")]
    text = "".join(lines)
    modes = {}
    for entry in re.findall(r"< POWER_MODEL (.*) >", text):
        fields = dict(part.split("=") for part in entry.split())
        modes[int(fields["ID"])] = fields["NAME"]
    status = os.path.join(root, "var/lib/nvpmodel/status")
    current = int(re.search(r"DEFAULT=(\d+)", text).group(1))
    if os.path.exists(status):
        with open(status, encoding="utf-8") as f:
            current = int(f.read().split(":")[1])
    if scenario.get("fail") == "garbage":
        print("NVPM ERROR: Failed to open /dev/nvpm\x00\x1b[31m")
        return 255
    if "-q" in arguments:
        print("NVPM WARN: fan mode is not set!", file=sys.stderr)
        print("NV Power Mode: %s\n%d" % (modes[current], current))
        return 0
    if "-p" in arguments:
        for mode, name in sorted(modes.items()):
            print("POWER_MODEL: ID=%d NAME=%s" % (mode, name))
        return 0
    if "-m" in arguments:
        return set_mode(int(arguments[arguments.index("-m") + 1]), modes, scenario, root, status)
    print("usage: nvpmodel -q | -p --verbose | -m ID")
    return 1


def set_mode(wanted, modes, scenario, root, status):
    if not os.environ.get("FAKE_SUDO"):
        print("NVPM ERROR: Error: Permission denied", file=sys.stderr)
        return 1
    if wanted not in modes:
        print("NVPM ERROR: invalid PowerModel ID %d" % wanted)
        return 1
    if wanted in (scenario.get("reboot") or []):
        print("NVPM WARN: Reboot required for changing to this power mode: %d" % wanted)
        print("NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:")
        if sys.stdin.readline().strip().lower() != "yes":
            print("NVPM ERROR: Reboot is cancelled, the power mode is not changed")
            return 1
        with open(os.path.join(root, "proc/sys/kernel/random/boot_id"), "w") as f:
            f.write("99999999-0000-4000-8000-000000000000\n")
    os.makedirs(os.path.dirname(status), exist_ok=True)
    with open(status, "w", encoding="utf-8") as f:
        f.write("pmode:%04d" % wanted)
    with open(os.path.join(root, "clocks.json"), encoding="utf-8") as f:
        for path, content in json.load(f)["free"].items():
            with open(os.path.join(root, path), "w") as out:
                out.write(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
