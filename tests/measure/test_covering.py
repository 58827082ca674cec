"""Rows from covering networks: few networks, every row, and times that add up to those of the networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, DeviceProfile, Measurement
from nas.core.walk import expand
from nas.devices.base import JobPrecision, LayerTime
from nas.devices.graphs import reference_model
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import ProtocolSettings
from nas.devices.ssh import LinkCutError, RemoteError
from nas.latency.estimate import Estimator
from nas.latency.table import LatencyTable
from nas.measure.covering import covering_plan, fill_covering, layer_timer, mixed_ways
from nas.measure.fill import FillProgress, fill
from nas.measure.networks import network_bytes
from nas.space.space import SearchSpace, load_space
from nas.testing import SimulatedDevice

SPACES = Path(__file__).parents[2] / "search_spaces"
TINY = load_space(SPACES / "tiny-32.yaml", 4, ("fp32",))
SMALL_SPACE = """\
name: two-stages
source: made up
resolution: [16, 32]
stem: {channels: 8, kernel_size: 3, stride: 2, activation: relu}
stages:
  - {name: s1, width: [8, 16], depth: [1, 2], stride: 2, kernel_size: [3, 5], expansion: [2, 4], activation: relu}
  - {name: s2, width: 16, depth: 1, stride: 1, kernel_size: 3, expansion: 2, activation: relu}
head: {conv_channels: 0, hidden_channels: 0, activation: relu}
exits: {after: [s1], max_count: 1}
precision: {choices: [fp32], per: network}
"""


def small_space(folder: Path) -> SearchSpace:
    path = folder / "two-stages.yaml"
    path.write_text(SMALL_SPACE, encoding="utf-8")
    return load_space(path, 4)


class Profiled(SimulatedDevice):
    """Tells each layer's time as its multiply-adds, 10 % more than the network takes: profiling costs."""

    def __init__(self, network_ms: float = 1.0, *, fails: str = "", unstable: bool = False, can: bool = True) -> None:
        super().__init__()
        self.by_model: dict[bytes, Candidate] = {}
        self.profiled = 0
        self._network_ms = network_ms
        self._fails = fails
        self._unstable = unstable
        self._can_profile = can

    def write(self, candidate: Candidate) -> bytes:
        model = network_bytes(candidate)
        self.by_model[model] = candidate
        return model

    def measure(self, jobs, on_result=None, progress=None):  # type: ignore[no-untyped-def]
        def changed(m: Measurement) -> Measurement:
            if m.kind != "network":
                return m
            ms = self._network_ms
            calm = (not self._unstable,) * len(m.accepted)
            energy = {"energy_mj": 5.0, "energy_std_mj": 0.1}
            samples = ((ms,),) * len(m.accepted)
            return replace(m, latency_ms=ms, rounds_ms=samples, session_ms=(ms,), accepted=calm, **energy)

        found = [changed(m) for m in super().measure(jobs, None, progress)]
        for m in found:
            if on_result is not None:
                on_result(m)
        return found

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
        assert precision == "fp32"
        if model == reference_model():
            if self._can_profile:
                return [LayerTime("x", 1.0)]
            raise DeviceError("unsupported: no profile here")
        self.profiled += 1
        layers = expand(self.by_model[model])
        if self._fails:
            raise DeviceError(self._fails)
        whole = sum(layer.macs for layer in layers)
        return [
            LayerTime(f"{layer.name}.{layer.convolutions[0].name}/Conv", 1.1 * layer.macs / whole) for layer in layers
        ]


def opened(folder: Path) -> LatencyTable:
    return LatencyTable.open(folder / "table", SimulatedDevice().profile)


def prepared(folder: Path) -> LatencyTable:
    table = opened(folder)
    fill(table, SimulatedDevice(), [])
    return table


def test_networks_of_a_plan_cover_every_row_of_a_space() -> None:
    plan = covering_plan(TINY)
    keys = {layer.key for layer in TINY.layers()}
    covered = {layer.key for network in plan.networks for layer in expand(network)}
    assert covered >= keys
    assert plan.rows == len(keys)
    assert len(plan.networks) == plan.least == 96  # as few as can be
    assert all(TINY.contains(network.with_thresholds((0.5,) * len(network.exits))) for network in plan.networks[:3])


def test_only_rows_that_are_asked_for_are_covered(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    keys = [layer.key for layer in space.layers()]
    assert covering_plan(space, []).networks == ()
    one = covering_plan(space, [keys[-1], "no such row"])
    assert (len(one.networks), one.rows) == (1, 1)
    assert keys[-1] in {layer.key for layer in expand(one.networks[0])}
    assert covering_plan(space).hours(60) == pytest.approx(len(covering_plan(space).networks) / 60)


def test_each_network_of_a_plan_adds_at_least_as_much_as_the_next() -> None:
    missing = {layer.key for layer in TINY.layers()}
    gains = []
    for network in covering_plan(TINY).networks:
        new = {layer.key for layer in expand(network)} & missing
        missing -= new
        gains.append(len(new))
    assert not missing
    assert gains[0] == max(gains) and gains[-1] >= 1


def test_rows_add_up_to_the_time_of_their_network_and_say_where_they_are_from(tmp_path: Path) -> None:
    space, device = small_space(tmp_path), Profiled(1.0)
    table = prepared(tmp_path)
    told: list[FillProgress] = []
    report = fill_covering(table, device, space, space.layers(), progress=told.append, write=device.write)
    keys = [layer.key for layer in space.layers()]
    assert table.missing(keys) == []
    assert (report.measured, report.failed) == (len(keys), ())
    assert [p.done for p in told] == list(range(1, told[-1].total + 1))
    first = covering_plan(space).networks[0]
    row = table.rows[expand(first)[0].key]
    assert row.source.startswith("covering: median of ") and "networks, the last r" in row.source
    assert row.energy_mj is None  # that of the network is not its blocks'
    assert len(table.networks) == device.profiled == told[-1].total  # evidence for the correction, too
    # every network took 1 ms: each estimate of one whose rows are from it alone is 1 ms
    last = covering_plan(space).networks[-1]
    estimates = [Estimator(table, gated=False).estimate(n).worst_ms for n in (first, last)]
    assert estimates == pytest.approx([1.0, 1.0], rel=0.35)
    assert fill_covering(table, device, space, space.layers(), write=device.write).measured == 0


def test_the_overhead_of_a_call_is_in_every_row_and_once_in_a_network(tmp_path: Path) -> None:
    space, device = small_space(tmp_path), Profiled(1.0)
    table = prepared(tmp_path)
    network = covering_plan(space).networks[0]
    keys = [layer.key for layer in expand(network)]
    wanted = [layer for layer in space.layers() if layer.key in keys]
    fill_covering(table, device, space, wanted, write=device.write)
    net = [table.rows[key].latency_ms - table.overhead_ms for key in keys]  # type: ignore[operator]
    assert sum(net) == pytest.approx(1.0 - table.overhead_ms)


def test_networks_are_written_in_the_form_that_the_runtime_reads(tmp_path: Path) -> None:
    class OfTensorRt(Profiled):
        @property
        def profile(self) -> DeviceProfile:
            return replace(super().profile, runtime="tensorrt", runtime_version="8.2.1")

        def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
            assert precision == "fp32"
            if model != reference_model():
                opsets.add(onnx.load_model_from_string(model).opset_import[0].version)
            return [LayerTime("stem.conv/Conv", 1.0)]

    opsets: set[int] = set()
    space, device = small_space(tmp_path), OfTensorRt()
    table = LatencyTable.open(tmp_path / "table", device.profile)
    fill_covering(table, device, space, space.layers()[:1])
    assert opsets == {13}  # what the parser of 8.2 reads


def test_a_network_that_was_disturbed_gives_rows_that_are_not_calm(tmp_path: Path) -> None:
    space, device = small_space(tmp_path), Profiled(unstable=True)
    table = prepared(tmp_path)
    report = fill_covering(table, device, space, space.layers(), write=device.write)
    assert set(report.unstable) == {layer.key for layer in space.layers()}


def test_why_a_network_was_disturbed_is_told_of_its_rows(tmp_path: Path) -> None:
    class Throttled(Profiled):
        def measure(self, jobs, on_result=None, progress=None):  # type: ignore[no-untyped-def]
            def noted(m: Measurement) -> Measurement:
                return replace(m, source="throttled in 3 of 3 rounds: oc3_event_cnt rose")

            def take(m: Measurement) -> None:
                if on_result is not None:
                    on_result(noted(m))

            return [noted(m) for m in super().measure(jobs, take, progress)]

    space, device = small_space(tmp_path), Throttled(unstable=True)
    report = fill_covering(prepared(tmp_path), device, space, space.layers(), write=device.write)
    assert len(report.warnings) == 1 and "the board was slowed down" in report.warnings[0]
    assert "oc3_event_cnt rose" in report.warnings[0]


class Picky(Profiled):
    """Builds no network with one of these rows, and counts what it is asked for."""

    def __init__(self, *rows: str, calm: bool = True) -> None:
        super().__init__(unstable=not calm)
        self.refused = set(rows)
        self.asked: list[str] = []

    def measure(self, jobs, on_result=None, progress=None):  # type: ignore[no-untyped-def]
        self.asked += [job.key for job in jobs]

        def take(m: Measurement) -> None:
            if on_result is not None:
                on_result(self._judged(m, models[m.key]))

        models = {job.key: job.model for job in jobs}
        return [self._judged(m, models[m.key]) for m in super().measure(jobs, take, progress)]

    def _judged(self, m: Measurement, model: bytes) -> Measurement:
        candidate = self.by_model.get(model)
        if candidate is None or not self.refused & {layer.key for layer in expand(candidate)}:
            return m
        return replace(m, latency_ms=None, session_ms=(), rounds_ms=(), accepted=(), error="no kernel")

    def networks(self) -> list[str]:
        return [key for key in self.asked if key not in ("reference", "overhead", "gate")]


@pytest.mark.parametrize("index", range(0, 42, 5))
def test_a_block_that_is_never_built_leaves_only_rows_missing_that_no_network_has_without_it(
    tmp_path: Path, index: int
) -> None:
    space, table = small_space(tmp_path), prepared(tmp_path)
    keys = [layer.key for layer in space.layers()]
    guilty = keys[index]
    networks = [
        {layer.key for layer in expand(space.decode(genotype))}
        for genotype in itertools.product(*(range(size) for size in space.gene_sizes))
    ]
    without = {key for network in networks if guilty not in network for key in network}
    device = Picky(guilty)
    report = fill_covering(table, device, space, space.layers(), write=device.write)
    assert set(table.missing(keys)) == set(keys) - without == {key for key, _ in report.failed}
    assert report.failed[0][1].endswith(": no kernel") and report.measured == len(keys)
    assert len(set(device.networks())) == len(device.networks()), "no network is built twice"
    assert len(device.networks()) <= len(covering_plan(space).networks) + 8


def test_rows_that_stand_only_beside_a_block_that_fails_are_told_without_trying_each(tmp_path: Path) -> None:
    space, table = small_space(tmp_path), prepared(tmp_path)
    (stem,) = {x.key for x in space.slots()[0].layers if x is not None and "in=3x32x32" in x.key}
    device = Picky(stem)
    report = fill_covering(table, device, space, space.layers(), write=device.write)
    reasons = dict(report.failed)
    assert reasons.pop(stem).endswith(": no kernel")
    beside = {f"it stands only beside what cannot be measured: {stem}"}
    assert {reason for reason in reasons.values() if "no kernel" not in reason} == beside
    small = {layer.key for layer in space.layers()} - dict(report.failed).keys()
    assert small and table.missing(small) == [], "the rows of the other resolution are there"
    assert len(device.networks()) <= len(covering_plan(space).networks)


def test_where_every_network_fails_the_work_ends_before_all_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.measure.covering.MOST_FAILURES", 3)
    table, device = prepared(tmp_path), Profiled(fails="no such event")
    report = fill_covering(table, device, TINY, TINY.layers(), write=device.write)
    assert device.profiled == 3 < len(covering_plan(TINY).networks)
    assert report.measured == len(report.failed) > 0 and report.failed[0][1].endswith(": no such event")
    assert table.missing([layer.key for layer in TINY.layers()]) == [layer.key for layer in TINY.layers()]


def test_a_board_that_is_lost_while_it_profiles_is_no_fault_of_the_network(tmp_path: Path) -> None:
    class Lost(Profiled):
        def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
            if model == reference_model():
                return super().layer_times(model, precision)
            raise LinkCutError("no connection")

    space, table, device = small_space(tmp_path), prepared(tmp_path), Lost()
    with pytest.raises(RemoteError, match="no connection"):
        fill_covering(table, device, space, space.layers(), write=device.write)


def test_a_network_that_failed_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    space, table = small_space(tmp_path), prepared(tmp_path)
    wanted = [layer for layer in space.layers() if layer.key in {x.key for x in expand(space.decode(space.largest()))}]
    device = Picky(*(layer.key for layer in space.layers()))
    assert fill_covering(table, device, space, wanted, write=device.write).failed
    device.refused = set()
    assert fill_covering(table, device, space, wanted, write=device.write).failed == ()
    assert table.missing([layer.key for layer in wanted]) == []


def test_again_measures_disturbed_networks_and_only_those_once_more(tmp_path: Path) -> None:
    space, table, device = small_space(tmp_path), prepared(tmp_path), Picky(calm=False)
    first = fill_covering(table, device, space, space.layers(), write=device.write)
    assert len(first.unstable) == len(space.layers())
    calm = Picky()
    assert fill_covering(table, calm, space, space.layers(), write=calm.write).measured == 0 and calm.asked == []
    second = fill_covering(table, calm, space, space.layers(), again=True, write=calm.write)
    assert (second.measured, second.unstable) == (len(space.layers()), ())
    assert all(row.is_stable for row in table.rows.values())
    assert len(calm.networks()) == len(covering_plan(space).networks)
    calm.asked.clear()
    assert fill_covering(table, calm, space, space.layers(), again=True, write=calm.write).measured == 0
    assert calm.asked == []


def test_the_command_that_measures_again_names_the_board_and_the_way(tmp_path: Path) -> None:
    space, device = small_space(tmp_path), Profiled()
    profile = replace(device.profile, details={"address": "me@nano, port 22", "device_name": "ssh:me@nano:22"})
    table = LatencyTable.open(tmp_path / "table", profile)
    fill(table, device, space.layers()[:1])
    assert table.again == f"nas measure --again --device ssh:me@nano:22 --table {tmp_path}/table"
    other = LatencyTable.open(tmp_path / "other", profile)
    fill_covering(other, device, space, space.layers()[:1], write=device.write)
    assert other.again.endswith(f"--device ssh:me@nano:22 --table {tmp_path}/other --how covering --space NAME")


def test_the_reference_network_is_built_once_for_all_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.measure.fill.LOOK_EVERY_S", 0.0)  # every network takes longer than that on a board
    space, table, device = small_space(tmp_path), opened(tmp_path), Picky()
    fill_covering(table, device, space, space.layers(), write=device.write)
    assert device.asked.count("reference") == 1 < len(device.networks())


def test_a_device_that_cannot_profile_is_refused_with_the_other_way() -> None:
    with pytest.raises(UsageError, match=r"cannot tell how long each layer.*--how isolated"):
        layer_timer(SimulatedDevice())


def test_a_runtime_that_cannot_profile_is_found_out_before_anything_is_measured(tmp_path: Path) -> None:
    space, device, table = small_space(tmp_path), Profiled(can=False), prepared(tmp_path)
    with pytest.raises(UsageError, match=r"takes: unsupported: no profile here\. Measure its rows one by one"):
        fill_covering(table, device, space, space.layers(), write=device.write)
    assert table.networks == {}


def test_a_table_of_both_ways_is_warned_about(tmp_path: Path) -> None:
    space, device = small_space(tmp_path), Profiled()
    table = prepared(tmp_path)
    layers = space.layers()
    fill_covering(table, device, space, layers, write=device.write)
    assert mixed_ways(list(table.rows.values())) is None
    fill(table, SimulatedDevice(), layers[:1], anew=True)
    said = mixed_ways(list(table.rows.values()))
    assert said is not None and f"{len(layers) - 1} rows of this table are from covering networks and 1 were" in said


def test_rows_are_really_filled_on_this_processor(tmp_path: Path) -> None:
    quick = ProtocolSettings(
        network_rounds=1, network_sessions=1, most_network_sessions=1, network_round_ms=1, retries=0, wait_ms=0
    )
    space, device = small_space(tmp_path), OnnxRuntimeCpu(quick)
    table = LatencyTable.open(tmp_path / "table", device.profile)
    fill(table, device, [])
    network = covering_plan(space).networks[0]
    wanted: Sequence = [x for x in space.layers() if x.key in {y.key for y in expand(network)}]
    report = fill_covering(table, device, space, wanted)
    assert (report.measured, report.failed) == (len(wanted), ())
    measured = next(iter(table.networks.values())).measurement.latency_ms
    net = [(table.rows[layer.key].latency_ms or 0.0) - table.overhead_ms for layer in expand(network)]
    assert table.overhead_ms + sum(net) == pytest.approx(measured, rel=1e-6)
    assert all(row.clock == "thread_cpu" for row in table.rows.values())
