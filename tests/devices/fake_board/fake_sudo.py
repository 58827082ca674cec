#!/usr/bin/env python3
"""Stands in for `sudo -n PROGRAM ...`: starts the fake program beside it, or asks for a password and gives up.

`sudo.json` beside it: {"password": true where sudo would want one}. Python 3.6, standard library only.
"""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def main(arguments):
    with open(os.path.join(HERE, "sudo.calls.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(arguments) + "\n")
    with open(os.path.join(HERE, "sudo.json"), encoding="utf-8") as f:
        scenario = json.load(f)
    if arguments[:1] != ["-n"]:
        print("sudo: this would wait for a password", file=sys.stderr)
        return 1
    if scenario.get("password"):
        print("sudo: a password is required", file=sys.stderr)
        return 1
    program = os.path.join(HERE, os.path.basename(arguments[1]))
    if not os.path.exists(program):
        print("sudo: %s: command not found" % arguments[1], file=sys.stderr)
        return 1
    os.environ["FAKE_SUDO"] = "1"
    os.execv(program, [program] + arguments[2:])
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
