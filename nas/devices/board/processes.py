"""Programs that the agent starts on a board: they get a time limit, and end when the agent does, however that ends."""

import ctypes
import errno
import os
import signal
import subprocess
import time
from typing import Any, Callable, List, Optional, Tuple

from .errors import BoardError

BEAT_S = 5.0  # between two signs of life of a program that takes long
END_S = 5.0  # a program that was killed is gone at once, but for what it waits for in the kernel
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # opened here: between fork and exec of a process with threads it may not be


def end_with_parent(parent: int) -> None:
    """Called in a process that was just started: the kernel ends it when the thread that started it is gone.

    `parent`: id of the process that started it. It may well be 1, in a container.
    """
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except AttributeError:  # not Linux
        return
    if os.getppid() != parent:  # it was gone already
        os._exit(1)


def start(argv: List[str], **streams: Any) -> "subprocess.Popen[bytes]":
    """Starts a program in a process group of its own, so that `end` reaches what it starts in turn.

    Args:
        argv: program and arguments; no shell is involved.
        streams: `stdin`, `stdout`, `stderr`, `cwd` and `env` of `subprocess.Popen`.

    Raises:
        BoardError: there is no such program, it may not be run, or there is no memory for another process.
    """
    parent = os.getpid()
    try:
        return subprocess.Popen(argv, preexec_fn=lambda: end_with_parent(parent), start_new_session=True, **streams)
    except OSError as e:
        if e.errno == errno.ENOMEM:  # what is wrong is the board now, not the program
            raise BoardError("out_of_memory", "no memory to start %s" % argv[0]) from e
        raise BoardError("not_found", "%s cannot be started: %s" % (argv[0], e.strerror or e)) from e


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a program and everything in its process group at once; nothing happens where it has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:  # all of them have ended, or they belong to another user, as what sudo starts
        pass
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:  # it cannot be ended from here, and nobody waits for it
        pass


def run(argv: List[str], timeout_s: float, beat: Optional[Callable[[], None]] = None) -> Tuple[int, str, str]:
    """Runs a program to its end, with nothing to read.

    Args:
        argv: program and arguments.
        timeout_s: how long it may take.
        beat: called every few seconds meanwhile; what it raises ends the program.

    Returns:
        Exit status (negative: the signal that ended it), what it wrote to its output, and to its error output.

    Raises:
        BoardError: it cannot be started, or did not end within `timeout_s` and was ended.
    """
    pipe = subprocess.PIPE
    process = start(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    until_s = time.monotonic() + timeout_s
    try:
        while True:
            left_s = until_s - time.monotonic()
            try:
                out, err = process.communicate(timeout=left_s if beat is None else min(BEAT_S, left_s))
                break
            except subprocess.TimeoutExpired as e:
                if beat is None or left_s <= BEAT_S:
                    raise BoardError("hung", "%s did not return within %g s" % (argv[0], timeout_s)) from e
                beat()
    finally:
        if process.returncode is None:
            end(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    return process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
