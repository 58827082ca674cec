"""A folder comes to a host as a whole or not at all; here the program that runs there runs without a host."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from nas.devices.folders import _RECEIVE

MARK = "mark.json"
FAULT = """
import os
rename = os.rename
def failing(source, target):
    if source.endswith(".part"):
        raise OSError(28, "No space left on device")
    rename(source, target)
os.rename = failing
"""


def receive(target: Path, content: bytes, fault: str = "") -> subprocess.CompletedProcess[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(MARK)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    command = [sys.executable, "-W", "ignore", "-c", fault + _RECEIVE, str(target), MARK]
    return subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=False)


def test_a_folder_that_was_brought_before_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "package"
    assert receive(target, b"one").returncode == receive(target, b"two").returncode == 0
    assert (target / MARK).read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_the_folder_before_stays_where_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "package"
    receive(target, b"one")
    failed = receive(target, b"two", FAULT)
    assert failed.returncode == 1 and b"No space left on device" in failed.stderr
    assert (target / MARK).read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_nothing_stays_of_a_new_folder_that_cannot_take_its_place(tmp_path: Path) -> None:
    assert receive(tmp_path / "package", b"one", FAULT).returncode == 1
    assert list(tmp_path.iterdir()) == []
