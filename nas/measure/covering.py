"""Rows from covering networks: few whole networks whose layers, together, are all the blocks of a space.

Where a runtime fuses across blocks, or a call costs much beside a block, a block alone is another thing than the block
in its network (TensorRT; nn-Meter, Zhang et al. 2021, builds on the same observation). So each network is measured as a
whole, and its time, less the overhead of a call, is shared among its blocks as their layers share the profile: layer
times alone do not add up to a latency, because profiling itself takes time. A block that stands in several networks
gets the median.

Networks are chosen greedily: each is the one that has the most blocks which are still missing, found exactly by
eliminating one gene after the other (`nas.space.slots`). Greedy covering needs at most ln(n) + 1 times as many networks
as the best choice, n being the blocks of one network (Chvatal 1979).

A network that cannot be measured says of its blocks only that one of them, or some together, are the reason. Those that
are still missing are tried again by halves, beside blocks that are known to work, until those that fail alone are left:
for one such block that takes about twice the binary logarithm of their number of networks.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, LayerSpec, Measurement
from nas.core.walk import expand, total_params
from nas.devices.base import Device, LayerTimer
from nas.devices.graphs import reference_model
from nas.devices.ssh import RemoteError
from nas.export.dialect import dialect_for
from nas.latency.lines import COVERING, NetworkForm, network_key
from nas.latency.table import LatencyTable
from nas.measure.attribution import Attribution, attribute
from nas.measure.fill import LOOK_AGAIN_ROWS, WAIT_S, FillProgress, FillReport, OnFill, open_session, store
from nas.measure.networks import measure_networks, network_bytes
from nas.space.layout import Genotype
from nas.space.slots import extreme_genotype
from nas.space.space import SearchSpace

FORM: NetworkForm = "logits"  # every exit is computed, so that every exit head has its time
# One block that fails makes at most as many networks fail in a row as its network can be halved. After more than that
# something else is wrong, and every further network would cost the time of an engine for nothing.
MOST_FAILURES = 8


@dataclass(frozen=True, slots=True)
class CoveringPlan:
    """Networks that cover rows. No choice of networks needs fewer than `least`.

    A network has one block at each place, so the rows that stand at one place only need as many networks as they are.
    """

    networks: tuple[Candidate, ...]
    rows: int
    least: int

    def hours(self, engine_s: float) -> float:
        """Hours that all of them take, at so many seconds for one: all its builds, measured and profiled."""
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


def _greedy(space: SearchSpace, missing: set[str], never: Collection[str] = ()) -> Iterator[Candidate]:
    """Networks without rows of `never` until nothing is missing that can be had; takes it out of `missing`."""
    # Some exits exclude each other, which is no property of a slot: each choice of exits is looked at by itself.
    choices = _choices_of_exits(space, min(space.exits.max_count, len(space.layout.exits)))
    idle = 0
    for turn in itertools.count():
        if not missing or idle == len(choices):
            return
        gain, genotype = _best(space, missing, _costs(space, never), choices[turn % len(choices)])
        idle = 0 if gain > 0 else idle + 1
        if gain > 0:
            candidate = space.decode(genotype)
            missing -= {layer.key for layer in expand(candidate)}
            yield candidate


def _choices_of_exits(space: SearchSpace, count: int) -> list[dict[int, int]]:
    """Genes of exits and thresholds for each way to have so many exits."""
    places = space.layout.exits
    thresholds = {place.threshold.gene: 0 for place in places if place.threshold.gene is not None}
    presents = [place.present for place in places]
    return [
        dict.fromkeys(presents, 0) | dict.fromkeys(chosen, 1) | thresholds
        for chosen in itertools.combinations(presents, count)
    ]


def _costs(space: SearchSpace, never: Collection[str], *rather_not: Collection[str]) -> dict[str, float]:
    """What a row costs beside one missing row, which is worth 1: `never` more than all, the others less, each set more
    than all of the next."""
    places = len(space.slots())
    costs: dict[str, float] = {}
    for i, keys in reversed(list(enumerate(rather_not, start=1))):
        costs |= dict.fromkeys(keys, 0.5 * (2 * places) ** -i)
    return costs | dict.fromkeys(never, places + 1.0)


def _best(
    space: SearchSpace, missing: set[str], costs: Mapping[str, float], fixed: Mapping[int, int]
) -> tuple[float, Genotype]:
    """The network with the most missing rows less the costs of others, and that number; above 0 only with such rows."""
    slots = space.slots()
    key_of = {id(layer): layer.key for slot in slots for layer in slot.layers if layer is not None}
    return extreme_genotype(slots, space.gene_sizes, partial(_worth, key_of, missing, costs), fixed, largest=True)


def _worth(key_of: Mapping[int, str], missing: set[str], costs: Mapping[str, float], layer: LayerSpec) -> float:
    key = key_of[id(layer)]
    return 1.0 if key in missing else -costs.get(key, 0.0)


class _Tries:
    """The networks that are tried one after the other, and what is known of the rows that they are tried for.

    `missing` rows are in no network that worked, `unproven` ones have no time in the table. `blamed` tells why a row
    cannot be had: a network that was tried for it alone failed, or it stands only beside such a row.
    """

    def __init__(self, space: SearchSpace, plan: CoveringPlan, wanted: set[str], unproven: set[str]) -> None:
        self.missing = set(wanted)
        self.blamed: dict[str, str] = {}
        self._unproven = set(unproven)
        self._space = space
        self._networks = iter(plan.networks)
        self._groups: list[set[str]] = []  # rows of networks that failed, in halves
        self._doubtful: dict[str, str] = {}  # the rows of all groups -> why their network failed
        self._failed: dict[str, str] = {}  # key of a network -> why

    @property
    def failed(self) -> dict[str, str]:
        """Rows that cannot be had, and those that are still in doubt, with the reason."""
        return self.blamed | self._doubtful

    @property
    def groups(self) -> int:
        """How many halves of networks that failed are to be tried at least."""
        return len(self._groups)

    def next(self) -> tuple[Candidate, set[str]] | None:
        """A network and the rows that it is tried for; None when nothing is left that could be tried."""
        while True:
            rows = self.missing - self._doubtful.keys() - self.blamed.keys()
            network = next(self._networks, None)
            if network is None and self._groups:
                rows = self._groups.pop() & self._doubtful.keys()
                network = self._network_for(rows) if rows else None
            elif network is None and rows:  # those that can only be had beside one that was in doubt
                network = self._network_for(rows)
            elif network is None:
                return None
            if network is None:
                for key in rows:
                    self._doubtful.pop(key, None)
                    self.blamed[key] = f"it stands only beside what cannot be measured: {next(iter(self.blamed))}"
                continue
            covered = rows & {layer.key for layer in expand(network)}
            if not covered:
                continue
            rest = (rows - covered) & self._doubtful.keys()
            if rest:
                self._groups.append(rest)
            reason = self._failed.get(network_key(network, FORM))
            if reason is None:
                return network, covered
            self.fail(network, covered, reason)

    def _network_for(self, rows: set[str]) -> Candidate | None:
        """The network with the most of these rows and the least of what is in doubt, or none; exits can be left out."""
        costs = _costs(self._space, self.blamed, self._doubtful.keys() - rows, self._unproven - rows)
        most = min(self._space.exits.max_count, len(self._space.layout.exits))
        choices = [fixed for count in range(most, -1, -1) for fixed in _choices_of_exits(self._space, count)]
        worth, genotype = max((_best(self._space, rows, costs, fixed) for fixed in choices), key=lambda found: found[0])
        return self._space.decode(genotype) if worth > 0 else None

    def work(self, network: Candidate) -> None:
        """Takes the rows of a network that was measured off the list."""
        for layer in expand(network):
            self.missing.discard(layer.key)
            self._unproven.discard(layer.key)
            self._doubtful.pop(layer.key, None)

    def fail(self, network: Candidate, rows: set[str], reason: str) -> None:
        """Plans anew without the rows of a network that failed; they are tried by halves when the others are done."""
        self._failed[network_key(network, FORM)] = reason
        ordered = [key for key in dict.fromkeys(layer.key for layer in expand(network)) if key in rows]
        if len(ordered) == 1:
            self._doubtful.pop(ordered[0], None)
            self.blamed[ordered[0]] = reason
        else:
            middle = len(ordered) // 2
            self._groups += [set(ordered[middle:]), set(ordered[:middle])]
            self._doubtful |= dict.fromkeys(ordered, reason)
        bad = self._doubtful.keys() | self.blamed.keys()
        self._networks = _greedy(self._space, self.missing - bad, never=bad)


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
    on with what is missing then. A network that failed before is measured again where it is needed.

    Args:
        table: opened for the device's state.
        device: measures, and tells the times of layers.
        space: the networks are from it.
        layers: whose rows are wanted; those of no network of the space are left out.
        again: also rows whose measuring failed, and those without a calm round; networks without one are not taken from
            the table then.
        progress: told after each network.
        write: gives the ONNX bytes of a network; by default in the form that the device's runtime reads.
        wait_s: how long to wait while another process writes the table, seconds.
        clock: seconds, monotonic.

    Raises:
        UsageError: the device cannot profile.
        StorageError: the table is read only, or another process keeps it.
        RemoteError: the board is lost.
        DeviceError: the device is in another state than the table.
    """
    started = clock()
    write_network = write or partial(network_bytes, dialect=dialect_for(device.profile))
    by_key = {layer.key: layer for layer in layers}
    of_space = {layer.key for layer in space.layers()}

    def todo(state_unknown: bool = False) -> set[str]:
        keys = table.missing(by_key, again=again, interpolated=True)
        if state_unknown or not table.is_slow_now:
            keys += table.outdated(by_key)
        return of_space & set(keys)

    if not todo(state_unknown=True) and table.has_overhead:
        return FillReport(0, (), (), None, 0.0, table.again)
    timer = layer_timer(device)

    def waiting(message: str) -> None:
        if progress is not None:
            progress(FillProgress(0, 0, 0, 0, None, message))

    def profiled(candidate: Candidate) -> tuple[Measurement, Attribution]:
        old = table.networks.get(network_key(candidate, FORM))
        is_bad = old is not None and (old.measurement.error is not None or (again and not old.measurement.is_stable))
        (network,) = measure_networks(
            table, device, [candidate], form=FORM, write=lambda c, _: write_network(c), again=is_bad, look=False
        )
        if network.latency_ms is None:
            raise _FailedError(network.error or "it failed")
        try:
            times = timer.layer_times(write_network(candidate), candidate.precision_label)
        except RemoteError:  # nothing is wrong with the network
            raise
        except DeviceError as e:
            raise _FailedError(str(e)) from e
        return network, attribute(times, expand(candidate))

    found, unstable, impossible = dict[str, list[float]](), set[str](), dict[str, str]()
    number = in_a_row = 0
    with table.writing(wait_s, waiting):
        drift = open_session(table, device)
        wanted = todo()
        plan = covering_plan(space, wanted)
        proven = {key for key in of_space if key in table.rows and table.rows[key].latency_ms is not None}
        tries = _Tries(space, plan, wanted, of_space - proven)
        while in_a_row < MOST_FAILURES and (now := tries.next()) is not None:
            candidate, rows = now
            number += 1
            try:
                network, profile = profiled(candidate)
            except _FailedError as e:
                in_a_row += 1
                tries.fail(candidate, rows, f"{network_key(candidate, FORM)}: {e}")
            else:
                in_a_row = 0
                tries.work(candidate)
                for row in _rows(table, candidate, network, profile, wanted, found):
                    stored = store(table, row)
                    unstable.discard(row.key)
                    if stored.error is not None:
                        impossible[row.key] = stored.error
                    elif not stored.is_stable:
                        unstable.add(row.key)
            if progress is not None:
                total = max(len(plan.networks), number + tries.groups)
                left = (clock() - started) / number * (total - number)
                bad = len(tries.failed) + len(impossible)
                progress(FillProgress(number, total, bad, len(unstable), left, network_key(candidate, FORM)))
        if number >= LOOK_AGAIN_ROWS:
            later = open_session(table, device, now=True)
            drift = later if drift is None else max(drift, later or 0.0)
    failed = tries.failed | impossible
    return FillReport(
        len(found.keys() | failed.keys()),
        tuple(failed.items()),
        tuple(sorted(unstable)),
        drift,
        clock() - started,
        table.again,
        tuple((key, table.rows[key].source) for key in found),
    )


class _FailedError(Exception):
    """A network could not be measured or profiled; the message says why."""


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
            f"{COVERING}: median of {len(values)} in networks, the last {network.key}; {reformat:.4g} ms of it changes"
            f" of layout, profile {profile.total_ms:.4g} ms for {net_ms:.4g} ms"
        )
        if network.source:  # why its rounds are marked
            source = f"{source}; {network.source}"
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
    return sum(row.source.startswith(COVERING) for row in rows)


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
