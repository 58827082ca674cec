"""Rows from covering networks: few whole networks whose layers, together, are all the blocks of a space.

Where a runtime fuses across blocks, or a call costs much beside a block, a block alone is another thing than the block
in its network (TensorRT; nn-Meter, Zhang et al. 2021, builds on the same observation). So each network is measured as a
whole, and its time, less the overhead of a call, is shared among its blocks as their layers share the profile: layer
times alone do not add up to a latency, because profiling itself takes time. A block that stands in several networks
gets the median.

Networks are chosen greedily: each is the one that has the most blocks which are still missing, found exactly by
eliminating one gene after the other (`nas.space.slots`). Greedy covering needs at most ln(n) + 1 times as many networks
as the best choice, n being the blocks of one network (Chvatal 1979).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, LayerSpec, Measurement
from nas.core.walk import expand, total_params
from nas.devices.base import Device, LayerTimer
from nas.devices.graphs import reference_model
from nas.export.dialect import dialect_for
from nas.latency.lines import NetworkForm, network_key
from nas.latency.table import LatencyTable
from nas.measure.attribution import Attribution, attribute
from nas.measure.fill import WAIT_S, FillProgress, FillReport, OnFill, store
from nas.measure.networks import measure_networks, network_bytes
from nas.space.slots import extreme_genotype
from nas.space.space import SearchSpace

SOURCE = "covering"  # begins the source of such a row
FORM: NetworkForm = "logits"  # every exit is computed, so that every exit head has its time


@dataclass(frozen=True, slots=True)
class CoveringPlan:
    """Networks that cover rows. No choice of networks needs fewer than `least`.

    A network has one block at each place, so the rows that stand at one place only need as many networks as they are.
    """

    networks: tuple[Candidate, ...]
    rows: int
    least: int

    def hours(self, engine_s: float) -> float:
        """Hours that all of them take, at so many seconds for building, measuring and profiling one."""
        return len(self.networks) * engine_s / 3600


def covering_plan(space: SearchSpace, keys: Iterable[str] | None = None) -> CoveringPlan:
    """Few networks of a space whose blocks are all the rows that are asked for.

    Args:
        space: gives the networks.
        keys: the rows; those of no network of the space are left out. All of the space where not given.
    """
    wanted = {layer.key for layer in space.layers()}
    wanted &= wanted if keys is None else set(keys)
    networks = tuple(_greedy(space, set(wanted)))
    return CoveringPlan(networks, len(wanted), least_networks(space, wanted))


def least_networks(space: SearchSpace, wanted: set[str]) -> int:
    """A number of networks that no choice can go below to cover these rows."""
    at_slots: dict[str, set[str]] = {}
    for slot in space.slots():
        for layer in slot.layers:
            if layer is not None and layer.key in wanted:
                at_slots.setdefault(layer.key, set()).add(slot.name)
    alone = Counter(next(iter(slots)) for slots in at_slots.values() if len(slots) == 1)
    return max(max(alone.values(), default=0), math.ceil(len(wanted) / len(space.slots())))


def _greedy(space: SearchSpace, missing: set[str]) -> Iterator[Candidate]:
    """Networks until nothing is missing; takes what each covers out of `missing`."""
    slots, sizes = space.slots(), space.gene_sizes
    key_of = {id(layer): layer.key for slot in slots for layer in slot.layers if layer is not None}
    places = space.layout.exits
    thresholds = {place.threshold.gene: 0 for place in places if place.threshold.gene is not None}
    presents = [place.present for place in places]
    # Some exits exclude each other, which is no property of a slot: each choice of exits is looked at by itself.
    choices = list(itertools.combinations(presents, min(space.exits.max_count, len(presents))))
    idle = 0
    for turn in itertools.count():
        if not missing or idle == len(choices):
            return
        fixed = dict.fromkeys(presents, 0) | dict.fromkeys(choices[turn % len(choices)], 1) | thresholds
        gain, genotype = extreme_genotype(slots, sizes, partial(_counts, key_of, missing), fixed, largest=True)
        idle = 0 if gain > 0 else idle + 1
        if gain > 0:
            candidate = space.decode(genotype)
            missing -= {layer.key for layer in expand(candidate)}
            yield candidate


def _counts(key_of: Mapping[int, str], missing: set[str], layer: LayerSpec) -> float:
    return float(key_of[id(layer)] in missing)


def layer_timer(device: Device) -> LayerTimer:
    """The device as one that can profile; a small network shows that its runtime does.

    Raises:
        UsageError: it cannot.
    """
    reason = "it has no such measurement"
    if callable(getattr(device, "layer_times", None)):
        timer: LayerTimer = device  # type: ignore[assignment]
        try:
            timer.layer_times(reference_model(), "fp32")
            return timer
        except DeviceError as e:
            reason = str(e)
    raise UsageError(
        f"--how covering: device {device.profile.name} cannot tell how long each layer of a network takes: {reason}."
        " Measure its rows one by one: --how isolated"
    )


def fill_covering(
    table: LatencyTable,
    device: Device,
    space: SearchSpace,
    layers: Iterable[LayerSpec],
    *,
    again: bool = False,
    progress: OnFill | None = None,
    write: Callable[[Candidate], bytes] | None = None,
    wait_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> FillReport:
    """Fills the missing rows of a set of layers from covering networks; the networks are kept as evidence, too.

    Each network is stored with its rows before the next one is begun: when the program is stopped, the same call goes
    on with what is missing then.

    Args:
        table: opened for the device's state.
        device: measures, and tells the times of layers.
        space: the networks are from it.
        layers: whose rows are wanted; those of no network of the space are left out.
        again: also rows whose measuring failed, and those without a calm round.
        progress: told after each network.
        write: gives the ONNX bytes of a network; by default in the form that the device's runtime reads.
        wait_s: how long to wait while another process writes the table, seconds.
        clock: seconds, monotonic.

    Raises:
        UsageError: the device cannot profile.
        StorageError: the table is read only, or another process keeps it.
        DeviceError: the device is in another state than the table.
    """
    timer = layer_timer(device)
    write_network = write or partial(network_bytes, dialect=dialect_for(device.profile))
    started = clock()
    keys = table.missing([layer.key for layer in layers], again=again, interpolated=True)
    plan = covering_plan(space, keys)
    wanted, found = set(keys), dict[str, list[float]]()
    failed: list[tuple[str, str]] = []
    unstable: set[str] = set()
    for number, candidate in enumerate(plan.networks, start=1):
        network = measure_networks(
            table, device, [candidate], form=FORM, write=lambda c, _: write_network(c), wait_s=wait_s
        )[0]
        try:
            if network.latency_ms is None:
                raise DeviceError(network.error or "it failed")
            profile = attribute(
                timer.layer_times(write_network(candidate), candidate.precision_label), expand(candidate)
            )
        except DeviceError as e:
            failed.append((network_key(candidate, FORM), str(e)))
        else:
            with table.writing(wait_s):
                for row in _rows(table, candidate, network, profile, wanted, found):
                    stored = store(table, row)
                    if stored.error is not None:
                        failed.append((stored.key, stored.error))
                    elif not stored.is_stable:
                        unstable.add(stored.key)
        if progress is not None:
            spent = clock() - started
            left = spent / number * (len(plan.networks) - number)
            name = network_key(candidate, FORM)
            progress(FillProgress(number, len(plan.networks), len(failed), len(unstable), left, name))
    return FillReport(len(found), tuple(failed), tuple(sorted(unstable)), None, clock() - started, table.again)


def _rows(
    table: LatencyTable,
    candidate: Candidate,
    network: Measurement,
    profile: Attribution,
    wanted: set[str],
    found: dict[str, list[float]],
) -> list[Measurement]:
    """Rows of the blocks of one network that are wanted; `found` keeps the values of each over all networks."""
    megabytes = 4 * total_params(candidate) / 1e6
    beside = table.overhead_ms + float(table.streaming_ms(megabytes))
    net_ms = max((network.latency_ms or 0.0) - beside, 0.0)
    scale = net_ms / profile.total_ms if profile.total_ms > 0 else 0.0
    here: dict[str, list[tuple[float, float]]] = {}
    for block in profile.blocks:
        if block.layer.key in wanted:
            here.setdefault(block.layer.key, []).append((scale * block.total_ms, scale * block.reformat_ms))
    rows = []
    for key, times in here.items():
        values = found.setdefault(key, [])
        values += [table.overhead_ms + ms for ms, _ in times]
        reformat = statistics.fmean(ms for _, ms in times)
        source = (
            f"{SOURCE}: median of {len(values)} in networks, the last {network.key}; {reformat:.4g} ms of it changes of"
            f" layout, profile {profile.total_ms:.4g} ms for {net_ms:.4g} ms"
        )
        latency = statistics.median(values)
        rows.append(
            replace(
                network,
                key=key,
                kind="row",
                precision=key.rpartition("|")[2],  # type: ignore[arg-type]  # the key ends in its precision
                latency_ms=latency,
                rounds_ms=(tuple(values),),
                accepted=(network.is_stable,),
                session_ms=(latency,),
                source=source,
                energy_mj=None,  # that of the whole network: a profile tells times only
                energy_std_mj=None,
            )
        )
    return rows


def covering_rows(rows: Iterable[Measurement]) -> int:
    """How many of these rows are from covering networks."""
    return sum(row.source.startswith(SOURCE) for row in rows)


def mixed_ways(rows: Sequence[Measurement]) -> str | None:
    """What to know of a table with rows of both ways, or None: one correction cannot fit two systematic errors."""
    counted = [row for row in rows if row.latency_ms is not None]
    covering = covering_rows(counted)
    if covering in (0, len(counted)):
        return None
    return (
        f"{covering} rows of this table are from covering networks and {len(counted) - covering} were measured alone; "
        "the two differ systematically. Fill one table in one way: --table DIR"
    )
