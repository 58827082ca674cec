"""Measures whole networks: random ones as evidence that corrects the table, and any other model by its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import Candidate, Measurement
from nas.core.walk import total_macs
from nas.devices.base import Device, MeasureJob
from nas.export.dialect import ORT, Dialect, dialect_for
from nas.export.graph import forced_exit, network_model, nominal_quant, random_weights
from nas.latency.lines import NetworkForm, network_key
from nas.latency.table import LatencyTable
from nas.measure.fill import WAIT_S, open_session, state_check

# Latency does not depend on the values of weights and normalisation.
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
# Networks that are measured in turns and stored together, and their bytes: what disturbs a host for a minute is told
# from a slow network only where measuring takes longer than that.
NETWORKS_AT_A_TIME = 96
BYTES_AT_A_TIME = 10**9


@dataclass(frozen=True, slots=True)
class NetworkProgress:
    """Networks measured so far, of how many; several are measured in turns, so parts of one count. `message`: words."""

    done: float
    total: int
    message: str = ""


def network_bytes(
    candidate: Candidate, form: NetworkForm = "logits", *, seed: int = 0, dialect: Dialect = ORT
) -> bytes:
    """ONNX bytes of a candidate with random weights and made-up ranges: good for latency, useless for accuracy.

    Form `if` is written with thresholds that no image reaches, so that the whole network runs.
    """
    gray = (
        (MEAN * candidate.in_channels)[: candidate.in_channels],
        (STD * candidate.in_channels)[: candidate.in_channels],
    )
    shown = candidate.with_thresholds((0.5,) * len(candidate.exits))
    model = network_model(
        shown,
        random_weights(candidate, seed),
        *gray,
        quant=nominal_quant(candidate),
        form=form,
        batch=1,
        dialect=dialect,
    )
    return forced_exit(model, len(candidate.exits)) if form == "if" else model


def measure_networks(
    table: LatencyTable,
    device: Device,
    candidates: Sequence[Candidate],
    *,
    form: NetworkForm = "logits",
    write: Callable[[Candidate, NetworkForm], bytes] | None = None,
    again: bool = False,
    look: bool = True,
    progress: Callable[[NetworkProgress], None] | None = None,
    wait_s: float = WAIT_S,
) -> list[Measurement]:
    """Measures candidates as whole networks and stores them in the table; those that it has already are not repeated,
    unless the machine was slower then than it is now known to be.

    Args:
        table: opened for the device's state.
        device: measures.
        candidates: what to measure; candidates that differ in thresholds only are one network.
        form: `logits` (every exit computed), `if` (no image leaves early) or `plain` (head only); all worst cases.
        write: gives the ONNX bytes; by default with random weights, in the form that the device's runtime reads.
        again: measures what was measured before, and what failed, once more.
        look: looks at the reference network before; a caller that has done so saves building it.
        progress: told after each network.
        wait_s: how long to wait while another process writes the table, seconds.

    Returns:
        One measurement for each candidate, in order; failed ones have an `error`.

    Raises:
        StorageError: the table is read only, or another process keeps it.
    """
    write = write or partial(network_bytes, dialect=dialect_for(device.profile))
    unset = [c.with_thresholds((None,) * len(c.exits)) for c in candidates]
    keys = [network_key(c, form) for c in unset]
    by_key = dict(zip(keys, unset, strict=True))

    def todo(state_unknown: bool = False) -> list[str]:
        old = table.outdated(by_key) if state_unknown or not table.is_slow_now else []
        return [key for key in by_key if again or key not in table.networks or key in old]

    if todo(state_unknown=True):
        say = progress or (lambda _: None)
        with table.writing(wait_s, lambda message: say(NetworkProgress(0, len(by_key), message))):
            if look:
                open_session(table, device)
            keys_left = todo()  # another process may have measured some
            start = 0

            check_state = state_check(table, device)

            def take(m: Measurement) -> None:
                check_state()
                store_network(table, m, by_key[m.key], form)

            def tell(share: float) -> None:
                say(NetworkProgress(min(start + share * len(part), len(keys_left)), len(keys_left)))

            todo_now = keys_left
            for before in (0, len(keys_left)):
                disturbed: list[str] = []
                start = before
                while start < before + len(todo_now):
                    part = _jobs(todo_now[start - before :], by_key, form, write)
                    measured = device.measure(part, on_result=take, progress=tell)
                    disturbed += [m.key for m in measured if m.error is None and not m.is_stable]
                    start += len(part)
                todo_now = disturbed  # once more: noise comes in bursts
    return [table.networks[key].measurement for key in keys]


def _jobs(
    keys: Sequence[str],
    by_key: Mapping[str, Candidate],
    form: NetworkForm,
    write: Callable[[Candidate, NetworkForm], bytes],
) -> list[MeasureJob]:
    """Jobs of the first of these networks, as many as are measured at a time; one at least."""
    jobs: list[MeasureJob] = []
    size = 0
    for key in keys[:NETWORKS_AT_A_TIME]:
        jobs.append(network_job(by_key[key], form, write(by_key[key], form)))
        size += len(jobs[-1].model)
        if size >= BYTES_AT_A_TIME:
            break
    return jobs


def store_network(table: LatencyTable, m: Measurement, candidate: Candidate, form: NetworkForm) -> Measurement:
    """Adds a measured network; an impossible value is added as failed, with its reason."""
    try:
        return table.add(m, candidate, form)
    except RecordError as e:
        return table.add(replace(m, latency_ms=None, session_ms=(), error=str(e)), candidate, form)


def network_job(candidate: Candidate, form: NetworkForm, model: bytes) -> MeasureJob:
    """The job that measures a candidate's model; its key is the one that the table uses."""
    return MeasureJob(network_key(candidate, form), "network", candidate.precision_label, model, total_macs(candidate))


def measure_model(
    device: Device, key: str, model: bytes, feeds: Mapping[str, NDArray[np.generic]] | None = None
) -> Measurement:
    """Measures any ONNX file as a whole network, such as a teacher or an exported package; nothing is stored.

    Args:
        device: measures.
        key: a name for the result.
        model: ONNX bytes; a dynamic batch is measured at 1.
        feeds: values of inputs by name, where random ones would not do.
    """
    return device.measure([MeasureJob(key, "network", "none", model, 0, feeds or {})])[0]
