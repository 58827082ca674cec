"""Checks the expected latency of a network with exits against a measured stream of images.

The expected latency is a sum: the share of images of each exit times what leaving there takes when the network runs
alone. A stream is what a user has: one image after the other, each leaving where it is sure enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.core.run import STREAM_TOLERANCE, StreamLatency
from nas.core.units import format_ms
from nas.devices.base import NO_STREAMS, Device, OnProgress, StreamJob, StreamTimer
from nas.export.forms import Artefact
from nas.latency.exits import TAIL

STREAM_IMAGES = 1000  # enough that a share of the images is known to 1.6 points


def stream_timer(device: Device) -> StreamTimer | None:
    """The device as one that can time a stream; None where it cannot."""
    if no_stream(device):
        return None
    timer: StreamTimer = device  # type: ignore[assignment]
    return timer


def no_stream(device: Device) -> str:
    """Why the device cannot time a stream; empty where it can."""
    if not callable(getattr(device, "stream_times", None)):
        return NO_STREAMS
    timer: StreamTimer = device  # type: ignore[assignment]
    return timer.no_stream


def measured_stream(
    device: Device,
    key: str,
    artefact: Artefact,
    images: NDArray[np.uint8],
    exit_ms: Sequence[float],
    progress: OnProgress | None = None,
) -> StreamLatency | None:
    """Times images one by one through what is deployed; None on a device that cannot.

    Args:
        device: where it runs.
        key: of the stream, for errors.
        artefact: one model of form "if", or a chain.
        images: uint8 [N, H, W, 3].
        exit_ms: what leaving at each exit takes alone, ms; the head is the last.
        progress: told the share of the work done.

    Raises:
        DeviceError: it could not be run.
    """
    timer = stream_timer(device)
    if timer is None:
        return None
    pixels = np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)), dtype=np.float32)
    if isinstance(artefact, bytes):
        times = timer.stream_times(StreamJob(key, (artefact,), (), pixels), progress)
        taken = np.asarray(times.exits)
    else:
        thresholds = tuple(s.threshold for s in artefact if s.threshold is not None)
        times = timer.stream_times(StreamJob(key, tuple(s.model for s in artefact), thresholds, pixels), progress)
        taken = np.asarray([s.exit_index for s in artefact])[list(times.exits)]
    shares = np.bincount(taken, minlength=len(exit_ms)) / len(images)
    return StreamLatency(
        images=len(images),
        mean_ms=float(np.mean(times.latency_ms)),
        p99_ms=float(np.quantile(times.latency_ms, TAIL)),
        typical_ms=float(np.mean(times.typical_ms)),
        shares=tuple(shares.tolist()),
        sum_ms=float(shares @ np.asarray(exit_ms)),
        is_calm=times.is_calm,
    )


def stream_line(stream: StreamLatency, expected_ms: float) -> str:
    """What came of a stream, in a sentence."""
    return (
        f"a stream of {stream.images} test images: mean {format_ms(stream.mean_ms)} "
        f"({100 * stream.off(expected_ms):+.1f} % against {format_ms(expected_ms)} expected; "
        f"{100 * stream.error:+.1f} % against the sum over its own exits), 99 % within {format_ms(stream.p99_ms)}"
    )


def warn_if_off(name: str, stream: StreamLatency, expected_ms: float, warn: Callable[[str], None]) -> None:
    """Warns where the expected latency is more than `STREAM_TOLERANCE` off the stream, with the reason."""
    if abs(stream.off(expected_ms)) <= STREAM_TOLERANCE:
        return
    reason = (
        "leaving early costs more or less in a stream than alone"
        if abs(stream.error) > STREAM_TOLERANCE
        else "these images take other exits than those of the validation split"
    )
    busy = "" if stream.is_calm else ". The machine was not calm while it was measured"
    warn(f"{name}: {stream_line(stream, expected_ms)}: {reason}{busy}")
