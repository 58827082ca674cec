"""A stream of images through a network with exits: each image is timed by itself, in rounds of the measuring protocol.

`stream_times` does so in this process; what a board took of each image is put together by `stream_values`.

A network that is measured alone takes the same image again and again; in a stream the images before it took other
exits. What that costs (branches, caches) is in a measured stream and not in a sum over exits.

The value of an image is that of the protocol for a network: in each session a low percentile of its runs, then the
lower quartile of the sessions. Putting an image into the input is not timed: it belongs to what makes the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.devices.base import OnProgress, StreamTimes
from nas.devices.protocol import (
    SESSION_QUANTILE,
    Clock,
    Gate,
    ProtocolSettings,
    Run,
    Subject,
    is_accepted,
    measure_in_turn,
    timed_runs,
)

_NEARLY_ALL = 0.99


@dataclass(frozen=True, slots=True)
class Opened:
    """A fresh session: `place` puts an image into place by its number, `run` runs it, `left` tells where it left."""

    place: Callable[[int], object]
    run: Run
    left: Callable[[], int]


@dataclass(frozen=True, slots=True, eq=False)
class StreamSession:
    """What one session of the runtime took of each image.

    `samples_ms` and `calm` (whether the round counts) are [A, N]: a row for each time that the images passed, NaN where
    a part of the stream passed less often. `exits` [N]: where the images left.
    """

    samples_ms: NDArray[np.float64]
    calm: NDArray[np.bool_]
    exits: NDArray[np.int64]


def stream_values(sessions: Sequence[StreamSession], quantile: float) -> StreamTimes:
    """The times of a stream from all of its sessions; engines that differ may send an image to different exits.

    Args:
        sessions: at least one.
        quantile: of the samples of an image in a session, the lower quartile of which over the sessions is its value.
    """
    each = np.stack([np.nanquantile(s.samples_ms, quantile, axis=0) for s in sessions])
    best = each.argmin(axis=0)
    everything = np.concatenate([s.samples_ms for s in sessions])
    was_calm = np.concatenate([s.calm for s in sessions])
    typical = np.nanmedian(np.where(was_calm | ~was_calm.any(axis=0), everything, np.nan), axis=0)
    columns = np.arange(each.shape[1])
    exits = np.stack([s.exits for s in sessions])[best, columns]
    return StreamTimes(
        tuple(np.quantile(each, SESSION_QUANTILE, axis=0).tolist()),
        tuple(typical.tolist()),
        bool(was_calm.any(axis=0).all()),
        tuple(int(n) for n in exits),
    )


def stream_session(
    blocks: Sequence[tuple[Sequence[Sequence[float]], Sequence[bool], Sequence[int]]],
) -> StreamSession:
    """A session from its parts, in the order of the images: samples of each round, whether it counts, and exits."""
    rounds = max(len(samples) for samples, _, _ in blocks)
    times, calm = [], []
    for samples, accepted, _ in blocks:
        part = np.full((rounds, len(samples[0])), np.nan)
        part[: len(samples)] = samples
        times.append(part)
        counts = np.zeros(part.shape, bool)
        counts[: len(samples)] = np.asarray(accepted, bool)[:, None]
        calm.append(counts)
    exits = np.concatenate([np.asarray(left, np.int64) for _, _, left in blocks])
    return StreamSession(np.concatenate(times, axis=1), np.concatenate(calm, axis=1), exits)


def stream_times(
    key: str,
    count: int,
    open_session: Callable[[], Opened],
    gate: Gate,
    settings: ProtocolSettings,
    clock: Clock,
    *,
    streams: bool = False,
    begin: Callable[[str], None] = lambda _: None,
    progress: OnProgress | None = None,
) -> StreamTimes:
    """Times `count` images.

    Args:
        key: of the stream.
        count: number of images.
        open_session: makes a fresh session of the runtime.
        gate: references in front of every round.
        settings: numbers of the protocol.
        clock: time.
        streams: the network reads more weights than the second-level cache holds.
        begin: told the key before each step that might hang.
        progress: told the share of the work done.
    """
    sessions: list[StreamSession] = []
    exits: list[int] = []
    for number in range(settings.network_sessions):
        begin(key)
        opened = open_session()
        subjects = _blocks(key, count, opened, settings, clock, streams)
        measure_in_turn(subjects, gate, settings, clock, begin)
        exits = exits or _exits(key, count, opened, begin)  # every session of this runtime computes the same
        begin("")
        sessions.append(_session(subjects, exits, gate, settings))
        del opened, subjects  # closed before the next one is made: both in memory would slow it down
        if progress is not None:
            progress(min(_NEARLY_ALL, (number + 1) / settings.network_sessions))
    if progress is not None:
        progress(1.0)
    return stream_values(sessions, settings.quantile)


def _blocks(
    key: str,
    count: int,
    opened: Opened,
    settings: ProtocolSettings,
    clock: Clock,
    streams: bool,
) -> list[Subject]:
    """The stream in rounds of the usual length, warm."""
    order = itertools.cycle(range(count))
    warmup = max(settings.warmup_runs, settings.min_network_runs)
    warm, _ = timed_runs(opened.run, warmup, 1, clock, settings.clock, lambda: opened.place(next(order)))
    median_ms = max(float(np.median(warm)), 1e-6)
    most = max(settings.min_network_runs, settings.max_runs)
    size = int(min(most, max(settings.min_network_runs, settings.network_round_ms / median_ms)))
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [
        Subject(
            key, "network", opened.run, streams, runs=len(block), before=_placing(opened.place, itertools.cycle(block))
        )
        for block in blocks
    ]


def _placing(place: Callable[[int], object], turn: Iterator[int]) -> Run:
    """Puts the next image of a block into place; a repeated round begins with the first one again."""
    return lambda: place(next(turn))


def _exits(key: str, count: int, opened: Opened, begin: Callable[[str], None]) -> list[int]:
    """Where each image leaves, in a pass of its own: asking for it belongs to no image's time."""
    found = []
    for number in range(count):
        begin(key)
        opened.place(number)
        opened.run()
        found.append(opened.left())
    return found


def _session(
    subjects: Sequence[Subject], exits: Sequence[int], gate: Gate, settings: ProtocolSettings
) -> StreamSession:
    blocks = []
    start = 0
    for subject in subjects:
        samples = [attempt.samples_ms for attempt in subject.attempts]
        accepted = [is_accepted(attempt, gate, settings) for attempt in subject.attempts]
        blocks.append((samples, accepted, exits[start : start + subject.runs]))
        start += subject.runs
    return stream_session(blocks)
