"""Filling a table: only what is missing, every result kept, honest about what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import onnx
import pytest

from nas.core.records import (
    BlockConfig,
    Candidate,
    HeadConfig,
    LayerSpec,
    Measurement,
    StageConfig,
    StemConfig,
)
from nas.core.walk import expand
from nas.devices.base import REFERENCE_KEY, MeasureJob, OnProgress, OnResult
from nas.devices.graphs import gate_job, overhead_job, reference_job, streaming_job, streaming_model
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import ProtocolSettings
from nas.export.graph import layer_model
from nas.latency import lines
from nas.latency.lines import STREAMING_MB, streaming_key
from nas.latency.table import LatencyTable
from nas.measure.fill import (
    ROWS_AT_A_TIME,
    FillProgress,
    Pace,
    fill,
    measure_streaming,
    open_session,
    pace_of,
    seconds_each,
)
from nas.testing import SimulatedDevice


def small(width: int = 16) -> Candidate:
    block = BlockConfig(8, 16, width, stride=2)
    return Candidate(16, 4, StemConfig(8), (StageConfig((block,)),), HeadConfig())


LAYERS = expand(small())
LOOK = ["reference", "overhead", "gate"]


class Watched(SimulatedDevice):
    """Counts what it is asked, and changes results on the way."""

    def __init__(self, changes: dict[str, dict[str, object]] | None = None, stop_after: int | None = None) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.expected: list[float | None] = []
        self._changes = changes or {}
        self._stop_after = stop_after

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        results = []
        for i, job in enumerate(jobs):
            if self._stop_after is not None and job.kind == "row" and len(self.asked) >= self._stop_after:
                raise KeyboardInterrupt
            self.asked.append(job.key)
            m = replace(super().measure([job])[0], **self._changes.get(job.key, {}))  # type: ignore[arg-type]
            results.append(m)
            if progress is not None:
                progress((i + 1) / len(jobs))
            if on_result is not None:
                on_result(m)
        return results

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:  # noqa: ARG002
        self.expected.append(reference_ms)


def opened(folder: Path) -> LatencyTable:
    return LatencyTable.open(folder, SimulatedDevice().profile)


def test_keys_of_overhead_and_reference_are_those_of_the_table() -> None:
    assert tuple(job().key for job in (overhead_job, gate_job, reference_job)) == lines.FIXED_KEYS[:3]


def test_a_new_table_gets_reference_overhead_and_every_row_once(tmp_path: Path) -> None:
    device = Watched()
    report = fill(opened(tmp_path), device, [*LAYERS, *LAYERS])
    assert device.asked == [*LOOK, *(x.key for x in LAYERS)]
    assert (report.measured, report.failed, report.unstable, report.drift, report.warnings) == (3, (), (), None, ())
    table = opened(tmp_path)
    assert table.missing(x.key for x in LAYERS) == []
    assert table.has_overhead


def test_only_missing_rows_are_measured(tmp_path: Path) -> None:
    fill(opened(tmp_path), SimulatedDevice(), LAYERS)
    device = Watched()
    report = fill(opened(tmp_path), device, [*LAYERS, *expand(small(24))])
    assert device.asked == [*LOOK, *(x.key for x in expand(small(24))[1:])]  # the stem is there
    assert report.drift == pytest.approx(0.0)
    untouched = Watched()
    assert fill(opened(tmp_path), untouched, LAYERS).measured == 0
    assert untouched.asked == []


def test_the_reference_is_not_measured_for_every_few_rows(tmp_path: Path) -> None:
    table, device = opened(tmp_path), Watched()
    for layer in LAYERS:
        fill(table, device, [layer])
    assert device.asked == [*LOOK, *(x.key for x in LAYERS)]
    table.looked_at_s = -1e9
    fill(table, device, expand(small(24)))
    assert device.asked.count("reference") == 2


def test_what_another_process_measured_meanwhile_is_not_repeated(tmp_path: Path) -> None:
    waiting, device = opened(tmp_path), Watched()
    fill(opened(tmp_path), SimulatedDevice(), LAYERS[:2])
    assert fill(waiting, device, LAYERS).measured == 1
    assert device.asked == [*LOOK, LAYERS[2].key]


def test_after_an_interruption_the_same_call_goes_on(tmp_path: Path) -> None:
    stopped = Watched(stop_after=5)  # the look and two rows
    with pytest.raises(KeyboardInterrupt):
        fill(opened(tmp_path), stopped, LAYERS)
    again = Watched()
    assert fill(opened(tmp_path), again, LAYERS).measured == 1
    assert again.asked == [*LOOK, LAYERS[2].key]
    assert not (tmp_path / ".lock-holder.json").exists()


def test_a_row_that_fails_is_kept_with_its_reason_and_not_tried_for_ever(tmp_path: Path) -> None:
    def write(layer: LayerSpec) -> bytes:
        return b"\x00" if layer.kind == "head" else layer_model(layer)

    report = fill(opened(tmp_path), SimulatedDevice(), LAYERS, write=write)
    assert report.measured == 3
    (key, reason), *_ = report.failed
    assert key == LAYERS[-1].key and "not an ONNX model" in reason
    assert report.warnings == (f"1 rows could not be measured, the first: {key}: {reason}",)
    assert fill(opened(tmp_path), SimulatedDevice(), LAYERS).measured == 0
    assert fill(opened(tmp_path), SimulatedDevice(), LAYERS, again=True).failed == ()
    assert opened(tmp_path).row_ms(key) > 0


def test_how_long_an_engine_takes_is_known_once_a_few_were_built(tmp_path: Path) -> None:
    def made(second: int, minute: int = 0) -> Measurement:
        (found,) = SimulatedDevice().measure([overhead_job()])
        return replace(found, measured_at=f"2026-11-28T12:{minute:02}:{second:02}+00:00")

    assert seconds_each([]) is seconds_each([made(0), made(10), made(20)]) is None
    assert seconds_each([made(0), made(10), made(20), made(30)]) == 10
    assert seconds_each([made(0), made(16), made(16), made(32), made(32)]) == 8, "two at a time"
    assert seconds_each([made(0), made(10), made(20), made(30), made(0, 45)]) == 10, "with a pause before the last"
    assert pace_of("ort", None).row_s and pace_of("tensorrt", None) == Pace(None, None)
    table = opened(tmp_path)
    fill(table, SimulatedDevice(), LAYERS)
    assert pace_of("tensorrt", table) == Pace(None, None), "all of them in one second: nothing is known"


def test_for_runtimes_whose_exits_are_a_chain_the_gate_is_without_a_conditional(tmp_path: Path) -> None:
    class Board(Watched):
        profile = replace(SimulatedDevice().profile, runtime="tensorrt", runtime_version="8.2.1")
        gates: ClassVar[list[bytes]] = []

        def measure(self, jobs: Sequence[MeasureJob], *more: object) -> list[Measurement]:
            self.gates.extend(job.model for job in jobs if job.key == "gate")
            return super().measure(jobs, *more)  # type: ignore[arg-type]

    open_session(LatencyTable.open(tmp_path, Board.profile), Board())
    operators = {node.op_type for model in Board.gates for node in onnx.load_model_from_string(model).graph.node}
    assert operators == {"Softmax", "ReduceMax"}


def test_an_impossible_value_is_a_failed_row(tmp_path: Path) -> None:
    device = Watched({LAYERS[1].key: {"latency_ms": 1e6, "rounds_ms": ((1e6,),) * 3}})
    report = fill(opened(tmp_path), device, LAYERS)
    assert [key for key, _ in report.failed] == [LAYERS[1].key]
    assert "too long" in report.failed[0][1]


def test_disturbed_rows_are_named_and_measured_again_on_demand(tmp_path: Path) -> None:
    disturbed = Watched({LAYERS[1].key: {"accepted": (False,) * 3}})
    report = fill(opened(tmp_path), disturbed, LAYERS)
    assert disturbed.asked.count(LAYERS[1].key) == 2  # a second chance at the end: noise comes in bursts
    assert disturbed.asked.count(LAYERS[0].key) == 1
    assert report.unstable == (LAYERS[1].key,)
    assert report.measured == 3
    assert "1 of 3 rows had no calm round" in report.warnings[0] and opened(tmp_path).again in report.warnings[0]
    again = Watched()
    fill(opened(tmp_path), again, LAYERS, again=True)
    assert again.asked == [*LOOK, LAYERS[1].key]


def test_rows_of_a_board_that_was_slowed_down_are_not_blamed_on_other_programs(tmp_path: Path) -> None:
    why = "throttled in 3 of 3 rounds: oc3_event_cnt rose by 7"
    hot = {"accepted": (False,) * 3, "source": why}
    changes = {LAYERS[0].key: {"accepted": (False,) * 3}, LAYERS[1].key: hot}
    report = fill(opened(tmp_path), Watched(changes), LAYERS)
    slowed, disturbed = report.warnings
    assert slowed.startswith(
        f"1 of 3 rows had no calm round: the board was slowed down, the first: {LAYERS[1].key}: {why}"
    )
    assert disturbed.startswith("1 of 3 rows had no calm round: other programs were running")


def test_rows_of_engines_short_of_memory_are_told_and_not_measured_again(tmp_path: Path) -> None:
    why = "skipped_tactics: 2 tactics were passed over because memory was short"
    device = Watched({LAYERS[1].key: {"source": f"copies: no; {why}"}})
    report = fill(opened(tmp_path), device, LAYERS)
    assert device.asked.count(LAYERS[1].key) == 1 and report.unstable == ()
    (warning,) = report.warnings
    assert warning.startswith("1 of 3 rows are of engines that were built while memory was short")
    assert f"{LAYERS[1].key}: {why}. " in warning


def test_a_slower_machine_is_noticed_and_told_to_the_device(tmp_path: Path) -> None:
    first = Watched()
    fill(opened(tmp_path), first, LAYERS[:1])
    assert first.expected == [None, 0.303]
    slower = Watched({REFERENCE_KEY: {"latency_ms": 0.3636, "rounds_ms": ((0.3636,),) * 3, "accepted": (False,) * 3}})
    report = fill(opened(tmp_path), slower, LAYERS)
    assert slower.expected[0] == 0.303
    assert report.drift == pytest.approx(0.2)
    assert "the machine is 20% slower than in the good sessions of this table" in report.warnings[0]


def slow(times: float) -> dict[str, dict[str, object]]:
    value = 0.303 * times
    return {REFERENCE_KEY: {"latency_ms": value, "rounds_ms": ((value,),) * 3}}


def test_rows_of_a_busy_machine_are_measured_again_when_it_is_quiet(tmp_path: Path) -> None:
    fill(opened(tmp_path), Watched(slow(1.3)), LAYERS)
    still_busy = Watched(slow(1.3))
    fill(opened(tmp_path), still_busy, LAYERS)
    assert still_busy.asked == []  # nothing is known yet of a faster state
    quiet = Watched()
    fill(opened(tmp_path), quiet, expand(small(24)))
    assert quiet.asked == [*LOOK, *(x.key for x in expand(small(24))[1:]), LAYERS[0].key]
    busy_again = Watched(slow(1.3))
    fill(opened(tmp_path), busy_again, LAYERS)
    assert busy_again.asked == LOOK  # not now
    quiet = Watched()
    report = fill(opened(tmp_path), quiet, LAYERS)
    assert quiet.asked == [*LOOK, *(x.key for x in LAYERS[1:])]
    assert report.measured == 2


def test_a_machine_that_becomes_quiet_on_the_way_is_noticed(tmp_path: Path) -> None:
    class Calming(Watched):
        def measure(
            self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
        ) -> list[Measurement]:
            self._changes = slow(1.3) if "reference" not in self.asked else {}
            return super().measure(jobs, on_result, progress)

    layers = list(dict.fromkeys(x for w in range(8, 8 * 12, 8) for x in expand(small(w))))
    device = Calming()
    report = fill(opened(tmp_path), device, layers)
    assert device.asked == [*LOOK, *(x.key for x in layers), *LOOK, *(x.key for x in layers)]
    assert report.measured == len(layers)
    assert opened(tmp_path).outdated(x.key for x in layers) == []


def test_progress_counts_rows_and_estimates_the_rest(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(SimulatedDevice):
        def measure(
            self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
        ) -> list[Measurement]:
            """Interleaved as on a real device: all work first, all results at the end; one second for each row."""
            results = super().measure(jobs)
            for i in range(len(jobs)):
                now[0] += 1.0
                if progress is not None:
                    progress((i + 1) / len(jobs))
            for m in results:
                if on_result is not None:
                    on_result(m)
            return results

    layers = list(dict.fromkeys(x for w in range(8, 8 * 30, 8) for x in expand(small(w))))
    told: list[tuple[float, FillProgress]] = []
    fill(opened(tmp_path), Slow(), layers, progress=lambda p: told.append((now[0], p)), clock=lambda: now[0])
    total = len(layers)
    assert total > ROWS_AT_A_TIME
    assert [p.done for _, p in told if p.message] == list(range(1, total + 1))
    assert all(p.total == total for _, p in told)
    # One second a row: when it will be over is known from the first second on, and does not change.
    assert len({at + (p.remaining_s or 0.0) for at, p in told}) == 1
    assert told[-1][1].remaining_s == 0.0


def test_real_rows_in_both_precisions(tmp_path: Path) -> None:
    quick = ProtocolSettings(network_rounds=1, network_sessions=1, row_rounds=1, row_round_ms=0.2, retries=0, wait_ms=0)
    device = OnnxRuntimeCpu(quick)
    table = LatencyTable.open(tmp_path, device.profile)
    report = fill(table, device, [*LAYERS, *expand(small().with_precision("int8"))])
    assert report.failed == ()
    assert report.measured == 6
    for layer in LAYERS:
        assert 0 < table.net_ms(layer.key) < 5


@pytest.mark.parametrize(
    ("weight_mb", "sizes"), [(0.9, []), (1.1, [2]), (2.0, [2]), (9.0, [2, 4, 8, 16]), (99, STREAMING_MB)]
)
def test_streaming_of_weights_is_measured_once_and_as_far_as_needed(
    tmp_path: Path, weight_mb: float, sizes: Sequence[int]
) -> None:
    device = Watched()
    table = opened(tmp_path)
    measure_streaming(table, device, weight_mb)
    keys = [streaming_key(mb, cached=cached) for mb in sizes for cached in (False, True)]
    assert device.asked == ([*LOOK, *keys] if sizes else [])
    measure_streaming(opened(tmp_path), device, weight_mb)
    assert len(device.asked) == (len(LOOK) + len(keys) if sizes else 0)


def test_streaming_that_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    table, device = opened(tmp_path), Watched()
    measure_streaming(table, device, 3.0)
    device.asked.clear()
    measure_streaming(table, device, 5.0)
    assert device.asked == [streaming_key(8, cached=False), streaming_key(8, cached=True)]


def chain(ms: float) -> dict[str, dict[str, object]]:
    return {streaming_key(2, cached=False): {"latency_ms": ms, "rounds_ms": ((ms,),) * 3}}


@pytest.mark.parametrize(
    ("looks_ms", "asked", "counts_ms"),
    [
        ([0.163, 0.162, 0.1], 2, 0.162),  # two looks found the same
        ([0.19, 0.163, 0.18, 0.162, 0.1], 4, 0.162),  # crowded at first, and once more
        ([0.19, 0.18, 0.17, 0.16, 0.15, 0.14, 0.13], 6, 0.14),  # for ever: nobody waits longer than that
    ],
)
def test_streaming_is_looked_at_in_later_sessions_until_two_looks_agree(
    tmp_path: Path, looks_ms: list[float], asked: int, counts_ms: float
) -> None:
    key = streaming_key(2, cached=False)
    device = Watched(chain(looks_ms[0]))
    measure_streaming(opened(tmp_path), device, 2.0)
    for look_ms in looks_ms[1:]:
        device._changes = chain(look_ms)
        open_session(opened(tmp_path), device)
    assert device.asked.count(key) == asked
    assert device.asked.count(streaming_key(2, cached=True)) == 1  # they stay in the second-level cache
    assert opened(tmp_path).fixed_ms(key) == counts_ms


@pytest.mark.parametrize("cached", [True, False])
def test_the_two_chains_do_the_same_work_on_weights_that_stay_or_not(cached: bool) -> None:
    """Real ones through the runtime: as many convolutions as the megabytes say, one or all weights of their own."""
    graph = onnx.load_model_from_string(streaming_model(2, cached=cached)).graph
    assert len(graph.node) == 8
    megabytes = sum(len(w.raw_data) for w in graph.initializer) / 1e6
    assert megabytes == pytest.approx(0.262 if cached else 2.1, rel=0.01)
    quick = ProtocolSettings(network_rounds=1, network_sessions=1, network_round_ms=0.2, retries=0, wait_ms=0)
    (m,) = OnnxRuntimeCpu(quick).measure([streaming_job("weights", 2, cached=cached)])
    assert m.error is None
