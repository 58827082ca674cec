"""One connection to the agent on a board: it is copied there where it is missing, started, and spoken to in lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.core.errors import DeviceError
from nas.devices.agent import AgentFile
from nas.devices.board import loader
from nas.devices.board.errors import BoardError
from nas.devices.board.lines import LineReader, LineWriter
from nas.devices.ssh import (
    DiskFullError,
    LinkCutError,
    NoPythonError,
    RemoteError,
    Ssh,
    ssh_error,
)

SILENT_S = 90.0  # the agent gives a sign of life every 5 s while it works
START_S = 60.0
_NOISE_LINES = 200  # that a login shell may print before the agent speaks
# Read by python3 itself, byte by byte, so that nothing of what follows the line is lost. Nothing is ever put into this
# command but the interpreter's checked name: it is the only thing that the login shell on the host sees.
_COMMAND = "{python} -c 'import sys; exec(sys.stdin.buffer.raw.readline())'"

Message = dict[str, Any]


class RefusedRequestError(DeviceError):
    """The agent could not do what it was asked; `kind` is that of `nas.devices.board.errors`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class AgentLink:
    """A running agent. Requests are answered one after the other; when this is closed the agent ends."""

    def __init__(self, ssh: Ssh, agent: AgentFile) -> None:
        """Connects, copies the agent where the board does not have this version, and starts it.

        Raises:
            RemoteError: the host cannot be used; each reason has its own type.
        """
        self._ssh = ssh
        self._said: deque[str] = deque(maxlen=50)
        self._process = ssh.start(_COMMAND.format(python=ssh.address.python))
        process = self._process
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RemoteError("ssh has no pipes")
        self._writer = LineWriter(process.stdin.fileno())
        self._reader = LineReader(process.stdout.fileno())
        self._listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True, name="ssh stderr")
        self._listener.start()
        try:
            self._begin(agent)
        except BaseException:
            self.close()
            raise

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The ssh program of this connection."""
        return self._process

    def ask(
        self, request: Message, data: bytes = b"", on_message: Callable[[Message], None] = lambda _: None
    ) -> Message:
        """The answer to a request, and what comes before it through `on_message`.

        Raises:
            LinkCutError: the connection broke.
            RefusedRequestError: the agent says why it cannot.
        """
        self.send(request, data)
        return self.answer(on_message)

    def send(self, request: Message, data: bytes = b"") -> None:
        """Sends a request and does not wait.

        Raises:
            LinkCutError: the connection broke.
        """
        try:
            self._writer.send(request, data)
        except OSError as e:
            raise self._cut() from e

    def answer(self, on_message: Callable[[Message], None] = lambda _: None) -> Message:
        """The answer to the oldest request without one; see `ask`."""
        while True:
            message = self._message(SILENT_S)
            if message.get("ok") is True or "done" in message:
                return message
            if "ok" in message:
                kind, told = str(message.get("kind")), str(message.get("error"))
                if kind == "disk_full":
                    raise DiskFullError(_disk_full(self._ssh, told))
                raise RefusedRequestError(kind, f"{self._ssh.address.shown}: {told}")
            on_message(message)

    def data(self, count: int) -> bytes:
        """`count` raw bytes that an answer announced.

        Raises:
            LinkCutError: the connection broke.
        """
        parts = []
        while count > 0:
            try:
                part = self._reader.data(count)
            except OSError as e:
                raise self._cut() from e
            if not part:
                raise self._cut()
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def put(self, files: Mapping[str, bytes]) -> None:
        """Brings files to the board, by content hash, as far as it does not have them.

        Raises:
            LinkCutError: the connection broke.
            DiskFullError: no space there.
        """
        missing = self.ask({"op": "have", "sha256": sorted(files)})["missing"]
        for sha256 in missing:  # all of them, then all answers: a slow link is crossed once
            self.send({"op": "put", "sha256": sha256, "bytes": len(files[sha256])}, files[sha256])
        for _ in missing:
            self.answer()

    def close(self) -> None:
        """Ends the connection; the agent then ends by itself. Nothing happens the second time."""
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._listener.join(5)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    def _begin(self, agent: AgentFile) -> None:
        text = Path(loader.__file__).read_text(encoding="utf-8")
        program = f"{text}\nload({agent.sha256!r}, {len(agent.data)})\n"
        line = f"import sys; sys.path[:] = [p for p in sys.path if p]; exec({program!r}, {{}})\n"
        try:
            self._send_raw(line.encode())
            told = self._greeting()
            if told["nas_board"] == "send":
                self._send_raw(agent.data)
                told = self._greeting()
        except OSError as e:
            raise self._cut() from e
        if told["nas_board"] == "failed":
            self._refuse(str(told.get("kind")), str(told.get("message")))

    def _refuse(self, kind: str, message: str) -> None:
        where = self._ssh.address.shown
        if kind == "no_python":
            raise NoPythonError(f"{where}: {message}. Name another one with ?python=PATH behind the address")
        if kind == "disk_full":
            raise DiskFullError(_disk_full(self._ssh, message))
        raise RemoteError(
            f"{where}: ~/.cache/nas-board cannot be written there ({message}). Try: {self._by_hand('id')}"
        )

    def _greeting(self) -> Message:
        """What the loader says, behind whatever the login shell prints first."""
        for _ in range(_NOISE_LINES):
            try:
                line = self._reader.line(START_S)
            except BoardError as e:
                raise LinkCutError(f"{self._ssh.address.shown}: no answer within {START_S:g} s") from e
            if line is None:
                raise self._cut()
            if line.startswith(b'{"nas_board"'):
                told: Message = json.loads(line)
                return told
        raise RemoteError(
            f"{self._ssh.address.shown}: the login shell prints and does not run commands. Try: {self._by_hand('true')}"
        )

    def _message(self, timeout_s: float) -> Message:
        try:
            message = self._reader.message(timeout_s)
        except BoardError as e:
            raise LinkCutError(f"{self._ssh.address.shown}: the agent is silent ({e.message})") from e
        except OSError as e:
            raise self._cut() from e
        if message is None:
            raise self._cut()
        return message

    def _send_raw(self, data: bytes) -> None:
        left = memoryview(data)
        stdin = self._process.stdin
        while left and stdin is not None:
            left = left[os.write(stdin.fileno(), left) :]

    def _cut(self) -> RemoteError:
        """Why the stream ended: what ssh says, or what the shell on the host says about the interpreter."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self._listener.join(1)
        said = "\n".join(self._said)
        address = self._ssh.address
        if code == 255 or code is None or code < 0:
            return ssh_error(address, said)
        program = re.escape(address.python.rpartition("/")[2])
        if code in (126, 127) or re.search(f"{program}.*(not found|no such file)", said, re.IGNORECASE):
            return NoPythonError(
                f"{address.shown}: no program {address.python} there that can be run. Install Python 3.6 or newer on "
                "the board (JetPack has it), or name it with ?python=PATH; try: "
                + self._by_hand(address.python + " --version")
            )
        last = said.strip().splitlines()[-1] if said.strip() else f"status {code}"
        return LinkCutError(f"{address.shown}: the agent ended ({last[:300]})")

    def _by_hand(self, command: str) -> str:
        return f"{self._ssh.address.by_hand} {command}"

    def _listen(self, stream: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed under it
            for line in iter(stream.readline, b""):
                self._said.append(line.decode(errors="replace").rstrip())


def _disk_full(ssh: Ssh, told: str) -> str:
    return f"{ssh.address.shown}: no space left there ({told}). Look with: {ssh.address.by_hand} df -h"
