"""Programs that an agent starts."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from nas.devices.board import processes
from nas.devices.board.errors import BoardError
from nas.testing import requires_program

PROGRAM = "import os; from nas.devices.board import processes; print(os.getpid(), processes.run(['echo', 'hi'], 20))"


def test_the_first_process_of_a_container_starts_programs_too() -> None:
    alone = [requires_program("unshare", "a process with the id 1"), "--pid", "--fork"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a process with the id 1 (unshare --pid)")
    done = subprocess.run([*alone, sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1 (0, 'hi\\n', '')\n", "")


def test_no_memory_for_another_process_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("subprocess.Popen", refused)
    with pytest.raises(BoardError, match="no memory to start trtexec") as failed:
        processes.start(["trtexec"])
    assert failed.value.kind == "out_of_memory"
