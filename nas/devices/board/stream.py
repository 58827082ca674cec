"""A stream of images through a chain of models on a board, timed image by image in rounds; see `nas/devices/stream.py`.

Nothing here knows a runtime: a chain is anything with `input()`, `time(images)` and `close()`, as a runner's `chain`
gives it. Images travel as bytes where their values are whole numbers, and become what the first model takes here.
"""

import os
import struct
from typing import Any, Dict, Iterator, List, Tuple

from .errors import BoardError
from .rounds import Plan, Subject, median

MOST_BYTES = 32 << 20  # of images in one round: they are read beforehand, so that no slow card is waited for
WIDTHS = {"uint8": 1, "float16": 2, "float32": 4}
_FORMS = {"float16": "<e", "float32": "<f"}


class Widener(object):
    """Makes numbers of a wider type, little endian, of bytes: a table for each place, which is fast without NumPy."""

    def __init__(self, dtype: str) -> None:
        """`dtype`: float16 or float32; each of the 256 values is exact in both."""
        numbers = [struct.pack(_FORMS[dtype], float(n)) for n in range(256)]
        self._width = WIDTHS[dtype]
        self._tables = [bytes(number[place] for number in numbers) for place in range(self._width)]

    def __call__(self, data: bytes) -> bytes:
        wide = bytearray(self._width * len(data))
        for place, table in enumerate(self._tables):
            if any(table):
                wide[place :: self._width] = data.translate(table)
        return bytes(wide)


class Images(object):
    """The images of a stream in a file."""

    def __init__(self, path: str, kind: str, shape: List[int], entry: Dict[str, Any]) -> None:
        """Opens it: whatever becomes of its name, the images can be read until `close`.

        Args:
            path: of the raw values, C order, little endian.
            kind: their type; `uint8` or the one that the model takes.
            shape: [N, C, H, W].
            entry: name, dtype and shape of the input that takes them.

        Raises:
            BoardError: `bad_request`: they do not fit that input, or the file has another size.
        """
        is_known = entry["dtype"] in WIDTHS and kind in ("uint8", entry["dtype"])
        if not is_known or list(entry["shape"]) != [1] + shape[1:]:
            raise BoardError(
                "bad_request",
                "input %r takes %s %r, got images %s %r" % (entry["name"], entry["dtype"], entry["shape"], kind, shape),
            )
        self.count = shape[0]
        self.each = WIDTHS[kind] * shape[1] * shape[2] * shape[3]
        self._widen = (lambda image: image) if kind == entry["dtype"] else Widener(entry["dtype"])  # type: Any
        self._fd = os.open(path, os.O_RDONLY)
        size = os.fstat(self._fd).st_size
        if size != self.count * self.each:
            self.close()
            needed = self.count * self.each
            raise BoardError("bad_request", "%d images need %d bytes, got %d" % (self.count, needed, size))

    def read(self, first: int, count: int) -> Iterator[bytes]:
        """Images as the model takes them; read at once, made ready one by one."""
        data = os.pread(self._fd, count * self.each, first * self.each)
        for start in range(0, len(data), self.each):
            yield self._widen(data[start : start + self.each])

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


class Block(object):
    """Consecutive images as what a round times, in place of the session of a model."""

    def __init__(self, chain: Any, images: Images, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._chain = chain
        self._images = images

    def time(self, runs: int, warmup: int) -> Dict[str, Any]:
        """A sample for each of the images, whatever number is asked for."""
        del runs, warmup
        return dict(self._chain.time(self._images.read(self.first, self.count)))


def blocks(key: str, chain: Any, images: Images, plan: Plan) -> List[Subject]:
    """The stream in rounds of the usual length, after a warm-up by its first images."""
    warm = max(plan.warmup_runs, plan.min_runs)
    samples = []  # type: List[float]
    while len(samples) < warm:
        samples += chain.time(images.read(0, min(images.count, warm - len(samples))))["samples_ms"]
    size = _size(images, plan, median(samples))
    made = []
    for first in range(0, images.count, size):
        subject = Subject(key, Block(chain, images, first, min(size, images.count - first)))
        subject.runs = subject.session.count
        made.append(subject)
    return made


def _size(images: Images, plan: Plan, median_ms: float) -> int:
    wanted = min(plan.max_runs, max(plan.min_runs, plan.round_ms / median_ms if median_ms > 0 else plan.max_runs))
    return int(max(1, min(wanted, MOST_BYTES // images.each)))


def told_of(subjects: List[Subject]) -> Tuple[List[List[Dict[str, Any]]], List[int]]:
    """Rounds of each block, and where each image left in its first round."""
    rounds, exits = [], []  # type: List[List[Dict[str, Any]]], List[int]
    for subject in subjects:
        exits += subject.rounds[0]["exits"]
        rounds.append([{name: value for name, value in told.items() if name != "exits"} for told in subject.rounds])
    return rounds, exits
