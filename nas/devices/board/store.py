"""What an agent keeps on its board: models by content, results of batches, and the lock that lets one host measure."""

import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

from .errors import BoardError

MOST_BYTES = 1 << 30  # of models and images together; beyond it the oldest go first
BUSY_S = 600.0  # what was used within is left alone: another agent may be about to read it
KEEP_S = 24 * 3600.0  # models and unacknowledged batches that nobody used for so long are removed
KEEP_LONG_S = 60 * KEEP_S  # agents and timing caches: small, and a cache saves minutes for each engine
_LONG = ("agent-", ".agent-", "timing-cache-")
WAIT_FOR_BOARD_S = 600.0  # another host may be measuring
TELL_WAITING_S = 5.0

# Errors of the board and not of a model: kept in a batch they would meet every later program that asks for the same.
_PASSING = ("state_changed", "disk_full")

_SHA256 = re.compile("[0-9a-f]{64}")
_BATCH = re.compile("[0-9a-f]{8,64}")


class Folder(object):
    """What the agent keeps on the board: models by content, batches, runtimes' caches; private, below one folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.blobs, self.batches = os.path.join(root, "blobs"), os.path.join(root, "batches")
        self.lock = os.path.join(root, "measuring.lock")
        for path in (root, self.blobs, self.batches):
            os.makedirs(path, 0o700, exist_ok=True)
        self.work = tempfile.mkdtemp(prefix="work-%d-" % os.getpid(), dir=root)

    def blob(self, sha256: Any) -> str:
        """Path of a file by its content.

        Raises:
            BoardError: not a hash.
        """
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BoardError("bad_request", "not a sha256: %.80r" % (sha256,))
        return os.path.join(self.blobs, sha256)

    def batch(self, name: Any) -> str:
        """Path of a batch's results.

        Raises:
            BoardError: not a name of a batch.
        """
        if not isinstance(name, str) or not _BATCH.fullmatch(name):
            raise BoardError("bad_request", "not a batch: %.80r" % (name,))
        return os.path.join(self.batches, "batch-%s.jsonl" % name)

    def has(self, sha256: Any) -> bool:
        """Whether a file is there; it then counts as used now."""
        path = self.blob(sha256)
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def used(self, name: str) -> str:
        """Path of a file in the folder itself; where it is there, it counts as used now."""
        path = os.path.join(self.root, name)
        try:
            os.utime(path)
        except OSError:
            pass
        return path

    def tidy(self, now_s: float) -> None:
        """Removes what nobody used for long, leftovers of agents that were killed, and what is too much."""
        for folder in (self.root, self.blobs, self.batches):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                keep_s = _kept_s(name) if folder == self.root else KEEP_S
                try:
                    if keep_s is None or now_s - os.stat(path).st_mtime < keep_s:
                        continue
                    if os.path.isdir(path):
                        shutil.rmtree(path)
                    else:
                        os.remove(path)
                except OSError:  # another agent removed it
                    continue
        self._shrink(now_s)

    def _shrink(self, now_s: float) -> None:
        """Keeps the models below `MOST_BYTES`: the board's disk is small, and what is missing is sent again."""
        found = []
        for name in os.listdir(self.blobs):
            try:
                told = os.stat(os.path.join(self.blobs, name))
            except OSError:  # as in `tidy`
                continue
            found.append((told.st_mtime, told.st_size, name))
        total = sum(size for _, size, _ in found)
        for used_s, size, name in sorted(found):
            if total <= MOST_BYTES or now_s - used_s < BUSY_S:
                return
            self.remove(name)
            total -= size

    def remove(self, sha256: str) -> None:
        """Removes a file that is not needed any more."""
        try:
            os.remove(self.blob(sha256))
        except (OSError, BoardError):  # as in `tidy`, or another program's file
            pass

    def close(self) -> None:
        """Removes the scratch folder of this agent."""
        shutil.rmtree(self.work, ignore_errors=True)


def _kept_s(name: str) -> Optional[float]:
    """How long something in the folder itself stays after its last use; None for ever."""
    if name.startswith("work-"):
        return None if _is_used(name) else KEEP_S
    return KEEP_LONG_S if name.startswith(_LONG) else None


def _is_used(name: str) -> bool:
    """Whether the agent lives whose scratch folder this is: it may wait for a day while a search trains."""
    owner = re.match(r"work-(\d+)-", name)
    return owner is not None and os.path.exists("/proc/" + owner.group(1))


class Batch(object):
    """The results of a batch on disk: appended one by one, a torn last line is left out when they are read again."""

    def __init__(self, path: str, jobs: List[Dict[str, Any]], state: Dict[str, Any]) -> None:
        """Reads what an earlier connection measured in the same power mode and with the same clocks.

        What failed for want of space or of a steady board is not among it: it is measured again.
        """
        self._path = path
        keys = {job["index"]: job["key"] for job in jobs}
        self.found = []  # type: List[Dict[str, Any]]
        self.indices: Set[int] = set()
        for result in _read_lines(path):
            index, told = result.get("index"), result.get("state") or {}
            same = all(told.get(name) == state[name] for name in state if name != "boot_id")
            if not isinstance(index, int) or index in self.indices or result.get("key") != keys.get(index):
                continue
            if same and (result.get("error") or {}).get("kind") not in _PASSING:
                self.indices.add(index)
                self.found.append(result)
        staged = path + ".new"
        with open(staged, "wb") as f:
            for result in self.found:
                f.write(_line(result))
        os.rename(staged, path)

    def add(self, result: Dict[str, Any]) -> None:
        with open(self._path, "ab") as f:
            f.write(_line(result))


class BoardLock(object):
    """One host measures at a time. An agent of the same host that a cut link left is ended, another one is waited for.

    An empty path is a lock that is held already: nothing happens.

    Raises:
        BoardError: `busy`, when another host keeps the board for too long.
    """

    def __init__(self, path: str, client: str, waiting: Callable[[str], None]) -> None:
        self._path = path
        self._client = client
        self._waiting = waiting
        self._fd = -1

    def __enter__(self) -> "BoardLock":
        if not self._path:
            return self
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        until_s = time.monotonic() + WAIT_FOR_BOARD_S
        told_s = 0.0
        while not self._taken():
            holder = self._holder()
            if self._client and holder.get("client") == self._client and holder.get("pid") != os.getpid():
                _end_agent(holder.get("pid"))
            now_s = time.monotonic()
            if now_s > until_s:
                os.close(self._fd)
                raise BoardError(
                    "busy",
                    "another program measures on this board since %s. If nobody misses it, end it on the board: kill %s"
                    % (holder.get("since"), holder.get("pid")),
                )
            if now_s - told_s > TELL_WAITING_S:
                told_s = now_s
                self._waiting("another program measures on this board since %s" % holder.get("since"))
            time.sleep(0.1)
        holder = {"pid": os.getpid(), "client": self._client, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(holder).encode("ascii"), 0)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _holder(self) -> Dict[str, Any]:
        try:
            told = json.loads(os.pread(self._fd, 4096, 0).decode("utf-8", "replace"))
        except ValueError:  # it is being written
            return {}
        return told if isinstance(told, dict) else {}


def _end_agent(pid: Any) -> None:
    """Ends an agent of ours by its process id, after a look that it still is one."""
    try:
        with open("/proc/%d/cmdline" % int(pid), "rb") as f:
            command = f.read()
        if b"agent-" in command or b"nas.devices.board" in command:
            os.kill(int(pid), signal.SIGKILL)
    except (OSError, TypeError, ValueError):  # it has ended
        pass


def _read_lines(path: str) -> Iterator[Dict[str, Any]]:
    try:
        with open(path, "rb") as f:
            for line in f:
                try:
                    told = json.loads(line.decode("utf-8"))
                except ValueError:  # torn when the agent was ended
                    continue
                if isinstance(told, dict):
                    yield told
    except FileNotFoundError:
        return


def _line(result: Dict[str, Any]) -> bytes:
    return json.dumps(result, allow_nan=False).encode("ascii") + b"\n"
