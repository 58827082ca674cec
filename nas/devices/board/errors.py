"""The one error of everything that runs on a board; its kind travels to the host, which decides what to do."""

KINDS = (
    "build_failed",  # the runtime made no engine of the model
    "out_of_memory",
    "skipped_tactics",  # an engine was made, but the builder left out kernels for lack of memory
    "hung",  # did not return within its limit, and was ended
    "killed",  # ended by a signal, which the kernel also sends when memory is short
    "truncated",  # a file or an answer that is not whole
    "not_found",  # a program, a module or a file that is not on this board
    "unsupported",  # this runtime or board cannot do it
    "state_changed",  # power mode, clocks or boot changed while it was measured
    "bad_request",  # the request itself is wrong
    "disk_full",
    "busy",  # another program measures on this board
)


class BoardError(Exception):
    """Something that failed on the board, in one line for people and with a kind for programs.

    Raises:
        ValueError: a kind that is not one of `KINDS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        if kind not in KINDS:
            raise ValueError("unknown kind of board error: %r" % (kind,))
        super().__init__(message)
        self.kind = kind
        self.message = one_line(message)


def one_line(text: str, limit: int = 500) -> str:
    """A message without line breaks, control characters and lone surrogates, of bounded length."""
    told = text.encode("utf-8", "backslashreplace").decode("utf-8")  # first: a lone surrogate is not printable either
    joined = " ".join("".join(c if c.isprintable() else " " for c in told).split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."


def as_board_error(error: BaseException, kind: str) -> BoardError:
    """A foreign exception as an error of ours: its own kind where it is one, no memory and no space as such."""
    if isinstance(error, BoardError):
        return error
    if isinstance(error, MemoryError):
        return BoardError("out_of_memory", "out of memory: %s" % (error,))
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC, the same on every Linux
        return BoardError("disk_full", "no space left on this board: %s" % (error,))
    return BoardError(kind, "%s: %s" % (type(error).__name__, error))
