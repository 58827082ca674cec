"""What `quickstart` and `photographs` share: a whole search as a user starts it, timed from outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.core.run import Point, RunView
from nas.latency.pareto import hypervolume
from nas.search.view import load_view

SAMPLE_S = 0.5


@dataclass(frozen=True)
class WholeRun:
    """One search: its result, wall seconds, and the largest memory of all its processes together, MiB (PSS)."""

    view: RunView
    wall_s: float
    memory_mib: float


def search(experiment: Path, sets: Sequence[str], seed: int) -> WholeRun:
    """Runs `nas search` in folders of its own: no cached teacher, no latency table, no earlier run."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"run.dir": "run", "run.tables": "tables", "run.cache": "cache"}
        options = [f"{key}={Path(scratch) / name}" for key, name in folders.items()]
        command = [sys.executable, "-m", "nas", "search", str(experiment)]
        for text in [*options, f"search.seed={seed}", f"teacher.seed={seed}", *sets]:
            command += ["--set", text]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        watch = _Watch(process.pid)
        _, errors = process.communicate()
        wall_s = time.monotonic() - started
        memory = watch.stop()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-2000:]}")
        return WholeRun(load_view(Path(scratch) / "run"), wall_s, memory)


class _Watch:
    """Samples the memory of a process and its descendants; shared pages are divided among those that share them."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most_kib = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._end.set()
        self._thread.join()
        return self._most_kib / 1024

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self._most_kib = max(self._most_kib, sum(_pss_kib(pid) for pid in _tree(self._pid)))


def _tree(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for name in (entry.name for entry in Path("/proc").iterdir()):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def figures(run: WholeRun) -> dict[str, Any]:
    """The figures that a run is judged by; accuracies are of the test split, latencies measured."""
    view = run.view
    teacher = view.teacher
    if teacher is None or teacher.latency_ms is None:
        raise SystemExit("the run has no measured teacher")
    tenth = teacher.latency_ms / 10
    fast = [p for p in view.points if p.is_finished and p.test and p.latency.provenance == "measured"]
    best = max(
        (p for p in fast if p.latency.expected_ms <= tenth), key=lambda p: p.test.top1 if p.test else 0.0, default=None
    )
    best_worst = max((p.test.top1 for p in fast if p.test and p.latency.worst_ms <= tenth), default=float("nan"))
    front = [p for p in view.points if p.on_front]
    return {
        "wall_s": run.wall_s,
        "memory_mib": run.memory_mib,
        "teacher_top1": teacher.top1,
        "teacher_ms": teacher.latency_ms,
        "trials": len(view.trials),
        "front_points": len(front),
        "front_students": len({p.trial for p in front}),
        "finished_students": len({p.trial for p in fast}),
        "best_at_tenth_top1": best.test.top1 if best and best.test else float("nan"),
        "best_at_tenth_share": best.test.top1 / teacher.top1 if best and best.test else float("nan"),
        "best_at_tenth_expected_ms": best.latency.expected_ms if best else float("nan"),
        "best_at_tenth_worst_ms": best.latency.worst_ms if best else float("nan"),
        "best_worst_case_at_tenth_top1": best_worst,
        "test_hypervolume": _hypervolume(view, fast),
        "package_good": bool(view.package and view.package.is_good),
        "mape": _mape(view),
    }


def _hypervolume(view: RunView, points: Sequence[Point]) -> float:
    """Share (0-1) of the area between guessing and no error, and between no time and the budget, that points reach."""
    if view.budget_ms is None or view.dataset is None:
        return float("nan")
    chance = 1 / len(view.dataset.class_names)
    reached = [(p.test.top1, p.latency.expected_ms) for p in points if p.test]
    return hypervolume(reached, (chance, view.budget_ms), (True, False)) / ((1 - chance) * view.budget_ms)


def _mape(view: RunView) -> float:
    errors = [abs(p.error) for p in view.predictions if p.round > 0]
    return sum(errors) / len(errors) if errors else float("nan")
