"""The worker seen from the agent: started when it is needed, and again after it crashed, hung or was killed."""

import subprocess
import time
from typing import Any, Callable, Dict, List, Optional

from . import processes
from .errors import BoardError
from .lines import LineReader, LineWriter
from .worker import START_S

BEAT_S = 5.0  # a sign of life for the host while a model takes long
GRACE_S = 5.0  # beyond the limit of a step, for a busy board


class WorkerProcess(object):
    """The worker, started when it is needed and again after it was ended."""

    def __init__(self, command: List[str]) -> None:
        self._command = command
        self._process = None  # type: Optional[subprocess.Popen[bytes]]
        self._reader = None  # type: Optional[LineReader]
        self._is_closed = False
        self.key = ""  # of the model with which something is being done

    def ask(self, request: Dict[str, Any], during: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
        """The answer to a request; a worker that dies or hangs is ended, and `key` says over which model.

        Args:
            request: see `worker.Worker.answer`.
            during: told what the worker says before its answer, and `{}` every few seconds.

        Raises:
            BoardError: what the worker answered; `hung` or `killed` where it did not.
            BrokenPipeError: `during` found nobody who listens, or `close` was called: nothing is wrong with the model.
        """
        self.key = ""
        process, reader = self._started()
        limit_s = START_S
        try:
            if process.stdin is not None:
                LineWriter(process.stdin.fileno()).send(request)
        except OSError as e:  # it ended before it took the request
            raise self._ended() from e
        try:
            while True:
                message = _next_message(reader, limit_s + GRACE_S, lambda: during({}))
                if message is None:
                    raise self._ended()
                if "at" in message:
                    self.key, limit_s = message["at"], message["limit_s"]
                    during(message)  # many short steps leave no pause in which `_next_message` would call it
                elif "step" in message:
                    during(message)
                elif "failed" in message:
                    raise BoardError(message["failed"]["kind"], message["failed"]["message"])
                else:
                    return message
        except BoardError as e:
            if e.kind in ("hung", "truncated") and self._process is not None:
                self.end()
            raise

    def end(self) -> None:
        """Ends the process, and what it started, at once."""
        process, self._process, self._reader = self._process, None, None
        if process is not None:
            processes.end(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:  # what was not written yet has no reader any more
                        pass

    def close(self) -> None:
        """Ends the process for good: whoever waits for its answer gets none, and takes no model for guilty."""
        self._is_closed = True
        self.end()

    def _started(self) -> Any:
        self._refuse_when_closed()
        if self._process is None or self._process.poll() is not None:
            self.end()
            pipe = subprocess.PIPE
            self._process = processes.start(self._command, stdin=pipe, stdout=pipe)
            self._reader = LineReader(self._process.stdout.fileno()) if self._process.stdout else None
        return self._process, self._reader

    def _refuse_when_closed(self) -> None:
        if self._is_closed:
            raise BrokenPipeError("the agent ends")

    def _ended(self) -> BoardError:
        self._refuse_when_closed()
        process = self._process
        if process is None:
            return BoardError("killed", "the process that runs models was ended")
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self.end()
        if code == -9:
            return BoardError("killed", "ended by signal 9 (SIGKILL), which the kernel sends when memory is short")
        if code < 0:
            return BoardError("killed", "ended by signal %d, a crash of the runtime" % -code)
        return BoardError("killed", "the process that runs models ended with status %d" % code)


def _next_message(reader: LineReader, limit_s: float, beat: Callable[[], None]) -> Optional[Dict[str, Any]]:
    """The next message of the worker within its limit; `beat` is called while it takes long."""
    until_s = time.monotonic() + limit_s
    while True:
        left_s = until_s - time.monotonic()
        try:
            return reader.message(max(0.0, min(BEAT_S, left_s)))
        except BoardError as e:
            if e.kind != "hung":
                raise
            if left_s <= BEAT_S:
                raise BoardError("hung", "did not return within %g s" % (limit_s - GRACE_S)) from e
        except OSError:  # `end` closed it from another thread
            return None
        beat()
