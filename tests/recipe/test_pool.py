"""Worker processes: results, failures, deaths, stops, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # noqa: F401  a forked worker has it at once

from nas.core.errors import InterruptedRunError, StorageError, TrainingError
from nas.recipe.pool import JobFailure, JobResult, WorkerPool


def _job(text: str) -> str:
    """What a job does is told by its text, such as `die /some/file`; files count how often it was begun."""
    what, *files = text.split()
    if files:
        with Path(files[0]).open("a") as f:
            f.write(f"{os.getpid()}\n")
    if what == "die" or (what == "die-once" and Path(files[0]).read_text().count("\n") == 1):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "diverge":
        raise TrainingError("training diverged in epoch 2")
    if what == "bug":
        raise ZeroDivisionError("division by zero")
    if what == "full":
        raise StorageError("/data/x: cannot be written: no space")
    if what == "stopped":
        raise InterruptedRunError("stopped at the end of an epoch")
    if what == "slow":
        time.sleep(0.6)
    return f"{what} done"


def _values(results: list[JobResult[str, str]]) -> dict[str, str]:
    return {r.job: f"failed: {r.value.reason}" if isinstance(r.value, JobFailure) else r.value for r in results}


def test_results_come_once_for_every_job() -> None:
    with WorkerPool(2, "fork") as pool:
        results = list(pool.map(_job, ["a", "b", "c", "slow", "d"]))
        assert _values(results) == {k: f"{k} done" for k in ("a", "b", "c", "d", "slow")}
        assert len(results) == 5
        assert list(pool.map(_job, [])) == []


def test_a_result_can_lead_to_a_job_while_another_is_running() -> None:
    todo, order = ["slow", "a"], list[str]()

    def following() -> str | None:
        return todo.pop(0) if todo else None

    with WorkerPool(2, "fork") as pool:
        for result in pool.feed(_job, following):
            order.append(result.job)
            if result.job == "a":
                todo += ["b", "c"]
    assert order == ["a", "b", "c", "slow"]


def test_error_of_a_job_is_its_result() -> None:
    with WorkerPool(2, "fork") as pool:
        results = _values(list(pool.map(_job, ["diverge", "a", "bug"])))
    assert results["diverge"] == "failed: training diverged in epoch 2"
    assert results["bug"] == "failed: ZeroDivisionError: division by zero"
    assert results["a"] == "a done"


def test_worker_that_dies_costs_its_job_one_retry(tmp_path: Path) -> None:
    once = f"die-once {tmp_path / 'once'}"
    with WorkerPool(2, "fork") as pool:
        assert _values(list(pool.map(_job, [once, "a"])))[once] == "die-once done"
    assert (tmp_path / "once").read_text().count("\n") == 2


def test_job_whose_worker_dies_twice_fails_and_no_other_job_is_blamed(tmp_path: Path) -> None:
    deadly, slow = f"die {tmp_path / 'deadly'}", f"slow {tmp_path / 'slow'}"
    with WorkerPool(2, "fork") as pool:
        results = _values(list(pool.map(_job, [deadly, slow, "a", "b"])))
    assert results[deadly].startswith("failed: worker process died twice (SIGKILL: killed, perhaps for want of memory")
    assert (tmp_path / "deadly").read_text().count("\n") == 2
    assert results[slow] == "slow done"
    assert (results["a"], results["b"]) == ("a done", "b done")


def test_worker_that_dies_between_two_batches_is_replaced(tmp_path: Path) -> None:
    with WorkerPool(1, "fork") as pool:
        list(pool.map(_job, [f"a {tmp_path / 'pid'}"]))
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert _values(list(pool.map(_job, ["b"]))) == {"b": "b done"}


def test_files_that_cannot_be_written_end_the_run_instead_of_failing_every_candidate() -> None:
    with WorkerPool(2, "fork") as pool, pytest.raises(StorageError, match="no space"):
        list(pool.map(_job, ["full", "a", "b"]))


def test_stop_waits_for_running_jobs_and_starts_no_other(tmp_path: Path) -> None:
    begun = [tmp_path / str(i) for i in range(5)]
    results: list[JobResult[str, str]] = []
    with WorkerPool(2, "fork") as pool, pytest.raises(InterruptedRunError):
        for result in pool.map(_job, [f"slow {file}" for file in begun], lambda: begun[0].exists()):
            results.append(result)
    assert len(results) == sum(file.exists() for file in begun) <= 2
    assert len(results) >= 1


def test_job_that_was_told_to_stop_ends_the_loop() -> None:
    with WorkerPool(1, "fork") as pool, pytest.raises(InterruptedRunError):
        list(pool.map(_job, ["stopped", "a"]))


def test_workers_that_are_ended_with_the_run_are_no_failures(tmp_path: Path) -> None:
    """A SIGTERM to the whole process group ends the workers as well; that says nothing about their candidates."""
    file = tmp_path / "begun"
    results: list[JobResult[str, str]] = []
    with WorkerPool(1, "fork") as pool, pytest.raises(InterruptedRunError):
        for result in pool.map(_job, [f"die {file}"], lambda: file.exists() and len(file.read_text().split()) == 2):
            results.append(result)
    assert results == []


PARENT = """
import os, sys, time
from nas.recipe.pool import WorkerPool
def job(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)
if __name__ == "__main__":
    with WorkerPool(2, sys.argv[2]) as pool:
        list(pool.map(job, [sys.argv[1]] * 2))
"""


def _wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc; prctl is Linux only")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, start: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    folder = tmp_path / "pids"
    folder.mkdir()
    with subprocess.Popen([sys.executable, str(script), str(folder), start], start_new_session=True) as parent:
        try:
            assert _wait_for(lambda: len(list(folder.iterdir())) == 2)
            pids = [int(p.name) for p in folder.iterdir()]
            for pid in pids:
                os.kill(pid, signal.SIGINT)  # as a terminal does to the whole group: the parent decides
            time.sleep(0.1)
            assert all(_is_alive(pid) for pid in pids)
        finally:
            parent.kill()
    assert _wait_for(lambda: not any(_is_alive(pid) for pid in pids), 5)
