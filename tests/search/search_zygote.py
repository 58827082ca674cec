"""A process that has imported everything and forks one search after the other: lives of a second instead of ten.

Commands come as JSON lines on stdin, answers go as JSON lines to stdout:
    {"start": "search" | "worker" | "cli", "arguments": [...], "log": FILE}   -> {"pid": number}
    {"wait": pid}                                                  -> {"code": exit code, negative: signal}

It never trains itself: torch cannot differentiate in a copy of a process that has done so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from search_examples import simulated

import nas.cli.search
import nas.report.html
import nas.search.api
from nas.cli.main import run
from nas.core.errors import NasError
from nas.recipe.pool import WorkerPool
from nas.search.experiment import load_experiment
from nas.search.progress import StopFlag, stop_on_signals
from nas.search.shared_study import SharedSettings
from nas.search.worker import WorkerSettings, run_worker
from nas.testing import SimulatedDevice

SHARED_LEASE_S = 3.0


class PrintingReporter:
    """Tells everything on stdout, which is the log."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        print(f"{stage} {done:g}/{total:g} {note}", flush=True)


def search(arguments: Sequence[str]) -> int:
    """`EXPERIMENT [KEY=VALUE ...]` on a simulated device, workers forked; gives the exit code of the command line."""
    try:
        experiment = load_experiment(Path(arguments[0]), [a for a in arguments[1:] if not a.startswith("--")])
        nas.search.api.run_search(
            experiment,
            PrintingReporter(),
            fork="--fork" in arguments,
            device=SimulatedDevice(),
            others=[simulated(other.device) for other in experiment.also_on],
            start_workers="fork",
            shared=next((shared(a) for a in arguments if a.startswith("--storage=")), None),
        )
    except NasError as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        return e.exit_code
    return 0


def shared(argument: str) -> SharedSettings:
    """`--storage=URL`: silent workers are given up soon."""
    return SharedSettings(argument.partition("=")[2], lease_s=SHARED_LEASE_S)


def work(arguments: Sequence[str]) -> int:
    """`RUN URL CACHE`: a worker whose training process is forked."""
    run_name, url, cache = arguments
    stop, reporter = StopFlag(), PrintingReporter()
    with stop_on_signals(stop, reporter), WorkerPool(1, "fork") as pool:
        try:
            print(run_worker(WorkerSettings(run_name, url, Path(cache)), reporter, stop, pool), flush=True)
        except NasError as e:
            print(f"{type(e).__name__}: {e}", flush=True)
            return e.exit_code
    return 0


def live(command: dict[str, object]) -> int:
    """The forked process: a session of its own, output into the log; never returns to the caller's loop."""
    os.setsid()
    log = os.open(str(command["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    arguments = [str(a) for a in command["arguments"]]  # type: ignore[attr-defined]
    lives = {"search": search, "worker": work, "cli": run}
    return lives[str(command["start"])](arguments)


def main() -> None:
    """Serves commands until stdin closes."""
    # Making an optimizer imports what the first training step would wait seconds for.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    code = live(command)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
