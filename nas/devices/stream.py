"""A stream of images through a network with exits: each image is timed by itself, in rounds of the measuring protocol.

A network that is measured alone takes the same image again and again; in a stream the images before it took other
exits. What that costs (branches, caches) is in a measured stream and not in a sum over exits.

The value of an image is that of the protocol for a network: in each session a low percentile of its runs, then the
least over the sessions. Putting an image into the input is not timed: it belongs to what makes the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.devices.base import OnProgress, StreamTimes
from nas.devices.protocol import Clock, Gate, ProtocolSettings, Run, Subject, is_accepted, measure_in_turn, timed_runs

Opened = tuple[Callable[[int], object], Run]  # what puts an image into place by its number, and what runs it
_NEARLY_ALL = 0.99


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
    sessions: list[NDArray[np.float64]] = []
    calm: list[NDArray[np.bool_]] = []
    for number in range(settings.network_sessions):
        begin(key)
        place, run = open_session()
        subjects = _blocks(key, count, place, run, settings, clock, streams)
        measure_in_turn(subjects, gate, settings, clock, begin)
        begin("")
        samples, accepted = _samples(subjects, gate, settings)
        sessions.append(samples)
        calm.append(accepted)
        if progress is not None:
            progress(min(_NEARLY_ALL, (number + 1) / settings.network_sessions))
    values = np.min([np.nanquantile(s, settings.quantile, axis=0) for s in sessions], axis=0)
    everything, was_calm = np.concatenate(sessions), np.concatenate(calm)
    typical = np.nanmedian(np.where(was_calm | ~was_calm.any(axis=0), everything, np.nan), axis=0)
    if progress is not None:
        progress(1.0)
    return StreamTimes(tuple(values.tolist()), tuple(typical.tolist()), bool(was_calm.any(axis=0).all()))


def _blocks(
    key: str,
    count: int,
    place: Callable[[int], object],
    run: Run,
    settings: ProtocolSettings,
    clock: Clock,
    streams: bool,
) -> list[Subject]:
    """The stream in rounds of the usual length, warm."""
    order = itertools.cycle(range(count))
    warmup = max(settings.warmup_runs, settings.min_network_runs)
    warm, _ = timed_runs(run, warmup, 1, clock, settings.clock, lambda: place(next(order)))
    median_ms = max(float(np.median(warm)), 1e-6)
    most = max(settings.min_network_runs, settings.max_runs)
    size = int(min(most, max(settings.min_network_runs, settings.network_round_ms / median_ms)))
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [
        Subject(key, "network", run, streams, runs=len(block), before=_placing(place, itertools.cycle(block)))
        for block in blocks
    ]


def _placing(place: Callable[[int], object], turn: Iterator[int]) -> Run:
    """Puts the next image of a block into place; a repeated round begins with the first one again."""
    return lambda: place(next(turn))


def _samples(
    subjects: Sequence[Subject], gate: Gate, settings: ProtocolSettings
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Times of a session [A, N], and whether each was in a calm round; NaN where a block had fewer rounds."""
    rounds = max(len(subject.attempts) for subject in subjects)
    times, calm = [], []
    for subject in subjects:
        part = np.full((rounds, subject.runs), np.nan)
        accepted = np.zeros(part.shape, bool)
        for i, attempt in enumerate(subject.attempts):
            part[i] = attempt.samples_ms
            accepted[i] = is_accepted(attempt, gate, settings)
        times.append(part)
        calm.append(accepted)
    return np.concatenate(times, axis=1), np.concatenate(calm, axis=1)
