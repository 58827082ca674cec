#!/usr/bin/env python3
"""Stands in for jetson_clocks: lock, --store FILE, --restore FILE, --show over a fake board; all need the fake sudo.

`jetson_clocks.json` beside it: {"root": tree of the board, "ignored": true where locking has no effect}.
Python 3.6, standard library only.
"""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def main(arguments):
    with open(os.path.join(HERE, "jetson_clocks.json"), encoding="utf-8") as f:
        scenario = json.load(f)
    with open(os.path.join(HERE, "jetson_clocks.calls.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(arguments) + "\n")
    if not os.environ.get("FAKE_SUDO"):
        print("Error: this script(jetson_clocks) needs root permission", file=sys.stderr)
        return 1
    root = scenario["root"]
    with open(os.path.join(root, "clocks.json"), encoding="utf-8") as f:
        clocks = json.load(f)
    if "--show" in arguments:
        print("SOC family:tegra234  Machine:simulated\nOnline CPUs: 0-5, Offline CPUs:")
        for path in sorted(clocks["locked"]):
            with open(os.path.join(root, path)) as f:
                print("%s: CurrentFreq=%s" % (path, f.read().strip()))
        return 0
    if "--store" in arguments:
        now = {}
        for path in clocks["locked"]:
            with open(os.path.join(root, path)) as f:
                now[path] = f.read()
        with open(arguments[arguments.index("--store") + 1], "w", encoding="utf-8") as f:
            json.dump(now, f)
        return 0
    wanted = clocks["locked"]
    if "--restore" in arguments:
        with open(arguments[arguments.index("--restore") + 1], encoding="utf-8") as f:
            wanted = json.load(f)
    for path, content in ({} if scenario.get("ignored") else wanted).items():
        with open(os.path.join(root, path), "w") as f:
            f.write(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
