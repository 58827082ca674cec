"""Puts the fake programs into a folder: each is a file of its own that another user can start, with its scenario."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

VERSIONS = {"8.0": (8, 0, 1), "8.2": (8, 2, 1), "8.4": (8, 4, 1), "8.5": (8, 5, 2), "8.6": (8, 6, 2)} | {
    "10.3": (10, 3, 0),
    "10.13": (10, 13, 3),
    "10.16": (10, 16, 2),
    "11": (11, 4, 1),
}


def install_trtexec(
    folder: Path,
    version: str = "8.5",
    faults: Sequence[str | None] = (),
    every: str | None = None,
    root: Path | None = None,
    milliseconds: float = 1.0,
) -> Path:
    """A fake trtexec of one TensorRT version; its path.

    Args:
        folder: made where it is missing; holds the program, its scenario and `calls.jsonl`, the options of each start.
        version: a key of `VERSIONS`.
        faults: one for each start that builds or runs an engine, None for a good one. build_failure, out_of_memory,
            killed, segfault, hang, skipped_tactics, truncated, control_characters, nan, no_graph, unstable; with `root`
            also reboot and throttle. `throttle` needs `throttle.json` in the tree, which `tree.write_board` makes.
        every: the fault of all starts after those.
        root: tree of the fake board.
        milliseconds: factor on all simulated times.
    """
    scenario = {"version": VERSIONS[version], "faults": list(faults), "every": every, "milliseconds": milliseconds}
    return _install(folder, "trtexec", scenario | {"root": None if root is None else str(root)})


def calls_of(program: Path) -> list[list[str]]:
    """Options of each start of a fake program so far."""
    path = program.parent / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _install(folder: Path, name: str, scenario: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = (HERE / f"fake_{name}.py").read_text()
    program = folder / name
    shebang, rest = source.split("\n", 1)
    program.write_text(shebang.replace("/usr/bin/env python3", sys.executable) + " -E\n" + rest)
    program.chmod(0o755)
    (folder / "scenario.json").write_text(json.dumps(scenario))
    return program
