"""Builds an engine in a process of its own: a builder that hangs, runs out of memory or is killed is then a result.

It serves the agent and the scripts of a package, which have this folder as a zip file.
"""

import hashlib
import json
import os
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import processes
from .errors import BoardError
from .trtexec_output import failure_of

_PACKAGE = __name__.rpartition(".")[0]
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); import importlib; importlib.import_module(sys.argv[2]).main()"


def build_apart(
    request: Dict[str, Any], timeout_s: float, run: Callable[[List[str], float], Tuple[int, str, str]] = processes.run
) -> Dict[str, Any]:
    """Builds the engine that `trt_engine.build` is asked for.

    Args:
        request: as there, with absolute paths.
        timeout_s: how long it may take.
        run: starts the process; tests set it.

    Returns:
        `warnings`, `typing` and `precision`, as it tells them, and the `seconds` of the whole process.

    Raises:
        BoardError: `build_failed`, `out_of_memory`, `hung`, `killed`, `unsupported`, `bad_request`, `not_found`.
    """
    what = "building %s" % os.path.basename(request["model"])
    report = request["engine"] + ".report.json"
    asked = json.dumps(dict(request, report=report))
    began = time.monotonic()
    try:
        code, out, err = run(
            [sys.executable, "-c", _PROGRAM, _import_path(), _PACKAGE + ".trt_engine", asked], timeout_s
        )
    except BoardError as e:
        raise BoardError(e.kind, "%s: %s" % (what, e.message)) from e
    told = _taken(report)
    if told is not None and told.get("error"):
        raise BoardError(told["kind"], "%s: %s" % (what, told["error"]))
    if code != 0 or told is None:
        raise failure_of(out + "\n" + err, code, what)
    return dict(told, seconds=time.monotonic() - began)


def cache_name(*conditions: Any) -> str:
    """A name for the timing cache of these conditions: what another runtime, power mode or clock timed is not used.

    Kernels are chosen by their times, and a cache answers for a time without a look at the clocks.

    Args:
        conditions: what the times hold for, as JSON has it.
    """
    told = json.dumps(conditions, sort_keys=True)
    return "timing-cache-%s.bin" % hashlib.sha256(told.encode("utf-8")).hexdigest()[:16]


def _taken(report: str) -> Optional[Dict[str, Any]]:
    """The report of the process, which is removed; None where it was killed before it could tell."""
    try:
        with open(report, "r", encoding="utf-8") as file:
            told = json.load(file)
        os.remove(report)
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _import_path() -> str:
    """The folder or zip file from which a new process can import this package under its name."""
    path = os.path.abspath(__file__)
    for _ in __name__.split("."):
        path = os.path.dirname(path)
    return path
