"""What a whole classification costs beside its network: making the input out of a picture, reading the answer.

The steps are those of the `infer.py` of a package, on the processor of this machine; the network itself is measured by
the device. Wall time, because that is what a frame waits for; each picture counts with the median of its runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.data.decode import decode_bytes, refusing_bombs

RUNS = 5  # of each picture; the first ones fill the caches
TYPICAL = 0.9  # quantile over the pictures: a frame that is larger than most must be in time too


def preprocess_ms(pictures: Sequence[bytes | NDArray[np.uint8]], resolution: int) -> float:
    """Milliseconds from a picture to the input of a network, for 9 of 10 pictures at most.

    Args:
        pictures: files as bytes, which are decoded and resized; or pixels uint8 [H, W, 3] of the resolution.
        resolution: side of the network's input, pixels.

    Raises:
        DataError: a file that is not an image.
    """
    with refusing_bombs():
        times = [_median_ms(lambda p=p: _prepared(p, resolution)) for p in pictures]  # type: ignore[misc]
    return float(np.quantile(times, TYPICAL))


def postprocess_ms(num_classes: int) -> float:
    """Milliseconds from logits to a class and its probability."""
    logits = np.random.default_rng(0).normal(size=num_classes).astype(np.float32)
    return _median_ms(lambda: _answer(logits), runs=20 * RUNS)


def _prepared(picture: bytes | NDArray[np.uint8], resolution: int) -> NDArray[np.float32]:
    pixels = decode_bytes(picture, resolution, "picture").pixels if isinstance(picture, bytes) else picture
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)


def _answer(logits: NDArray[np.float32]) -> tuple[int, float]:
    e = np.exp(logits.astype(np.float64) - logits.max())
    shares = e / e.sum()
    best = int(shares.argmax())
    return best, float(shares[best])


def _median_ms(step: Callable[[], object], runs: int = RUNS) -> float:
    step()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))
