"""JSON lines over file descriptors: what the agent, its worker and the host speak."""

import json
import os
import select
from typing import Any, Dict, Optional

from .errors import BoardError

MAX_LINE_BYTES = 64 * 1024 * 1024  # far above any request of ours; stops a wrong peer from filling the memory
_CHUNK = 65536


class LineWriter(object):
    """Writes one JSON object a line to a file descriptor, at once and whole."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, message: Dict[str, Any], data: bytes = b"") -> None:
        """A message, and the raw bytes that it announces.

        Raises:
            OSError: nobody reads any more.
        """
        left = memoryview(json.dumps(message, allow_nan=False).encode("ascii") + b"\n" + data)
        while left:
            left = left[os.write(self._fd, left) :]


class LineReader(object):
    """Reads JSON lines, and raw bytes between them, from a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()

    def message(self, timeout_s: Optional[float] = None) -> Optional[Dict[str, Any]]:
        """The next message; None at the end of the stream.

        Args:
            timeout_s: how long to wait for each piece of it; None: for ever.

        Raises:
            BoardError: `hung` after `timeout_s` without anything; `truncated` where a line is no JSON object.
        """
        line = self.line(timeout_s)
        return None if line is None else _parsed(line)

    def line(self, timeout_s: Optional[float] = None) -> Optional[bytes]:
        """The next line without its end, whatever it is; see `message`."""
        start = 0
        while True:
            end = self._buffer.find(b"\n", start)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return line
            start = len(self._buffer)
            if start > MAX_LINE_BYTES:
                raise BoardError("truncated", "a line of more than %d bytes" % MAX_LINE_BYTES)
            if timeout_s is not None and not select.select([self._fd], [], [], timeout_s)[0]:
                raise BoardError("hung", "nothing came for %g s" % timeout_s)
            more = os.read(self._fd, _CHUNK)
            if not more:
                return None
            self._buffer += more

    def data(self, most: int) -> bytes:
        """At most `most` raw bytes, empty at the end of the stream."""
        if self._buffer:
            found = bytes(self._buffer[:most])
            del self._buffer[:most]
            return found
        return os.read(self._fd, min(most, _CHUNK))


def _parsed(line: bytes) -> Dict[str, Any]:
    try:
        message = json.loads(line.decode("utf-8"))
    except ValueError as e:
        raise BoardError("truncated", "not a JSON line: %s" % (e,)) from e
    if not isinstance(message, dict):
        raise BoardError("truncated", "not a JSON object: %.80r" % (message,))
    return message
