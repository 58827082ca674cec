"""Brings a folder to a host behind SSH."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

from nas.core.errors import DeviceError
from nas.devices.ssh import DiskFullError, Ssh

SEND_LIMIT_S = 600.0
# Runs on the host, in Python 3.6. A folder that is replaced must be one that was brought there before.
_RECEIVE = """
import os, shutil, sys, tarfile
target, mark = sys.argv[1:3]
part, old = (target + ".%d.%s" % (os.getpid(), name) for name in ("part", "old"))
if os.path.exists(target) and not os.path.isfile(os.path.join(target, mark)):
    sys.exit("%s is there and was not put there by this program; give another folder" % target)
try:
    os.makedirs(part, 0o700)
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for entry in archive:
            archive.extract(entry, part)
    if os.path.exists(target):
        os.rename(target, old)
    try:
        os.rename(part, target)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, target)
        raise
finally:
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
"""


def send_folder(ssh: Ssh, files: Mapping[str, bytes], target: str, mark: str) -> None:
    """Puts files into a folder on a host, all or none; replaces the folder where it was put there before.

    Args:
        ssh: the host.
        files: content by relative path.
        target: the folder, relative to the user's home or absolute.
        mark: the file that tells a folder of ours.

    Raises:
        RemoteError: the host cannot be used, or has no space.
        DeviceError: the folder cannot be written, with the host's reason.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    python = ssh.address.python.removeprefix("~/")  # programs start in the home folder
    code, _, said = ssh.run([python, "-c", _RECEIVE, target, mark], stdin=buffer.getvalue(), timeout_s=SEND_LIMIT_S)
    if code != 0:
        reason = last_line(said)
        kind = DiskFullError if "No space left" in said else DeviceError
        raise kind(f"{ssh.address.shown}: {target} cannot be written: {reason}")


def last_line(said: str) -> str:
    """The last line of an error output, where the reason stands."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason was given"
