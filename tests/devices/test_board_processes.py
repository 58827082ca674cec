"""Programs that an agent starts."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nas.devices.board import processes
from nas.devices.board.errors import BoardError
from nas.testing import requires_program, skip

PROGRAM = "import os; from nas.devices.board import processes; print(os.getpid(), processes.run(['echo', 'hi'], 20))"


def test_the_first_process_of_a_container_starts_programs_too() -> None:
    alone = [requires_program("unshare", "a process with the id 1"), "--pid", "--fork"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        skip("this user may not make a process with the id 1 (unshare --pid)")
    done = subprocess.run([*alone, sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1 (0, 'hi\\n', '')\n", "")


def test_no_memory_for_another_process_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("subprocess.Popen", refused)
    with pytest.raises(BoardError, match="no memory to start trtexec") as failed:
        processes.start(["trtexec"])
    assert failed.value.kind == "out_of_memory"


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # that is what is tested
def test_a_program_of_another_user_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, number: int) -> None:  # noqa: ARG001
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what sudo starts belongs to root

    monkeypatch.setattr("os.killpg", forbidden)
    monkeypatch.setattr("nas.devices.board.processes.END_S", 0.1)
    began = time.monotonic()
    with pytest.raises(BoardError, match=r"sleep did not return within 0\.2 s"):
        processes.run(["sleep", "3"], 0.2)
    assert time.monotonic() - began < 2


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(BoardError, match="did not return") as failed:
        processes.run(["sh", "-c", f"sleep 60 & echo $! > {note}; wait"], 0.5)
    assert failed.value.kind == "hung"
    until = time.monotonic() + 5
    while (state := _state(int(note.read_text()))) not in ("", "Z", "X") and time.monotonic() < until:
        time.sleep(0.02)
    assert state in ("", "Z", "X")


def _state(pid: int) -> str:
    """Letter of a process's state; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
