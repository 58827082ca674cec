"""Puts the fake programs into a folder: each is a file of its own that another user can start, with its scenario."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nas.devices.board.errors import BoardError

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
        folder: made where it is missing; holds the program, its scenario and the options of each start.
        version: a key of `VERSIONS`.
        faults: one for each start that builds or runs an engine, None for a good one. build_failure, out_of_memory,
            killed, segfault, hang, skipped_tactics, truncated, control_characters, nan, no_graph, unstable; with `root`
            also reboot and throttle (before it runs).
        every: the fault of all starts after those.
        root: tree of the fake board.
        milliseconds: factor on all simulated times.
    """
    scenario = {"version": VERSIONS[version], "faults": list(faults), "every": every, "milliseconds": milliseconds}
    return _install(folder, "trtexec", scenario | {"root": None if root is None else str(root)})


def install_board_tools(
    folder: Path, root: Path, *, reboot: Sequence[int] = (), password: bool = False, **faults: Any
) -> None:
    """Fake nvpmodel, jetson_clocks, tegrastats and sudo that work on the tree of a fake board.

    Args:
        folder: made where it is missing.
        root: tree of the board, from `tree.write_board`.
        reboot: ids of power modes that want a reboot.
        password: whether sudo would ask for one.
        faults: `fail="garbage"`: nvpmodel answers nonsense; `ignored=True`: jetson_clocks has no effect.
    """
    _install(folder, "nvpmodel", {"root": str(root), "reboot": list(reboot), "fail": faults.get("fail")})
    _install(folder, "jetson_clocks", {"root": str(root), "ignored": faults.get("ignored", False)})
    _install(folder, "tegrastats", {"format": "jp6", "lines": 3})
    _install(folder, "sudo", {"password": password})


def runner_in(folder: Path) -> Callable[[list[str], float], tuple[int, str, str]]:
    """A `run` for `read_state` and its like that knows the programs of a folder only."""

    def run(argv: list[str], timeout_s: float) -> tuple[int, str, str]:
        if argv[0] == "timeout":  # of a program that ends by itself here
            argv = argv[2:]
        program = folder / Path(argv[0]).name
        if not program.exists():
            raise BoardError("not_found", f"{argv[0]} is not installed")
        done = subprocess.run(
            [program, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
        return done.returncode, done.stdout, done.stderr

    return run


def calls_of(program: Path) -> list[list[str]]:
    """Options of each start of a fake program so far."""
    path = program.with_name(f"{program.name}.calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _install(folder: Path, name: str, scenario: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = (HERE / f"fake_{name}.py").read_text()
    program = folder / name
    shebang, rest = source.split("\n", 1)
    program.write_text(shebang.replace("/usr/bin/env python3", sys.executable) + " -E\n" + rest)
    program.chmod(0o755)
    (folder / f"{name}.json").write_text(json.dumps(scenario))
    return program
