"""Simulated devices: each effect of the board is seen in the numbers, and is gone when it is switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import RecordError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, Measurement, StageConfig, StemConfig
from nas.core.walk import expand
from nas.devices.base import Device, MeasureJob
from nas.devices.graphs import overhead_job, reference_job, streaming_job
from nas.latency.estimate import Estimator
from nas.latency.lines import NetworkForm, streaming_key
from nas.latency.table import LatencyTable
from nas.measure.fill import fill
from nas.measure.networks import measure_networks, network_job
from nas.testing import (
    DEVICE_CONTRACT,
    BoardEffects,
    SimulatedBoard,
    SimulatedDevice,
    described_layer,
    described_network,
    mean_model,
)

ALL = BoardEffects(
    fusion_gain=0.1,
    launch_ms=0.001,
    reformat_ms=0.01,
    cache_mb=0.01,
    streaming_ms=0.1,
    irregular=0.02,
    build_std=0.01,
    noise=0.02,
    drift=0.05,
    throttle_share=0.2,
)


def network(width: int = 16, *, use_se: bool = False, exits: tuple[ExitConfig, ...] = ()) -> Candidate:
    """Stem, two stages of one block each, head; fp32."""
    stages = (
        StageConfig((BlockConfig(8, 16, width, stride=2),)),
        StageConfig((BlockConfig(width, 2 * width, width, use_se=use_se),)),
    )
    return Candidate(16, 10, StemConfig(8), stages, HeadConfig(), exits)


def job(candidate: Candidate, form: NetworkForm = "plain") -> MeasureJob:
    return network_job(candidate, form, described_network(candidate, form))


def sum_of_rows(board: SimulatedBoard, candidate: Candidate) -> float:
    call_ms = board.latency_ms(overhead_job())
    return call_ms + sum(board.row_ms(x) - call_ms for x in expand(candidate))


def runs(m: Measurement) -> np.ndarray:
    return np.concatenate(m.rounds_ms)


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("effects", [BoardEffects(), replace(ALL, throttle_share=0.0)], ids=["none", "all"])
def test_board_keeps_the_contract_of_devices(check: Callable[[Device], None], effects: BoardEffects) -> None:
    check(SimulatedBoard(0, effects))


def test_profiles_say_that_their_numbers_are_simulated() -> None:
    assert SimulatedDevice().profile.kind == "simulated"
    assert SimulatedBoard(0, ALL).profile.kind == "simulated"


def test_network_without_effects_is_the_exact_sum_of_its_rows() -> None:
    board = SimulatedBoard(3)
    assert board.true_ms(network(), "plain") == pytest.approx(sum_of_rows(board, network()), rel=1e-12)
    [m] = board.measure([job(network())])
    assert set(runs(m)) == {m.latency_ms}
    assert m.latency_ms == pytest.approx(board.true_ms(network(), "plain"))
    assert m.accepted == (True,) * len(m.rounds_ms)


def test_form_says_whether_exits_are_computed_and_decide() -> None:
    board, exits = SimulatedBoard(), network(exits=(ExitConfig(0),))
    plain, logits, gated = (board.true_ms(exits, form) for form in ("plain", "logits", "if"))
    head = next(x for x in expand(exits) if x.kind == "exit_head")
    call_ms = board.latency_ms(overhead_job())
    assert plain == pytest.approx(board.true_ms(network(), "plain"))
    assert logits - plain == pytest.approx(board.row_ms(head) - call_ms)
    assert gated > logits


def test_fusion_makes_the_blocks_of_a_group_faster_by_one_factor() -> None:
    # Of the parts of a network only those of its group change when a block is exchanged.
    board, off = SimulatedBoard(1, BoardEffects(fusion_gain=0.2)), SimulatedBoard(1)

    def gain(a: Candidate, b: Candidate) -> float:
        fused = board.true_ms(a, "plain") - board.true_ms(b, "plain")
        alone = off.true_ms(a, "plain") - off.true_ms(b, "plain")
        return 1 - fused / alone

    deep = replace(network(), stages=(*network().stages, network().stages[1]))
    deeper = replace(deep, stages=(*deep.stages, network().stages[1]))
    with_se = replace(network(), stages=(*network().stages, network(use_se=True).stages[1]))
    assert board.true_ms(deep, "plain") < sum_of_rows(board, deep)
    assert 0 <= gain(deep, network()) <= 0.4
    assert gain(deep, network()) == pytest.approx(gain(deeper, deep))
    assert gain(with_se, network()) != pytest.approx(gain(deep, network()), abs=1e-3)


def test_each_change_of_precision_costs_a_reformat() -> None:
    on, off = SimulatedBoard(0, BoardEffects(reformat_ms=0.25)), SimulatedBoard(0)
    cost = [
        on.true_ms(c, "plain") - off.true_ms(c, "plain")
        for c in (
            network(),
            network().with_precision("int8"),
            network().with_precision(("fp32", "int8", "int8", "fp32")),
            network().with_precision(("int8", "fp32", "int8", "fp32")),
        )
    ]
    assert cost == pytest.approx([0.0, 0.0, 0.5, 0.75])


def test_each_kernel_of_a_network_costs_a_launch_that_rows_do_not_show() -> None:
    on, off = SimulatedBoard(0, BoardEffects(launch_ms=0.5)), SimulatedBoard(0)
    layers = expand(network())
    kernels = sum(len(x.convolutions) for x in layers)
    assert on.true_ms(network(), "plain") - off.true_ms(network(), "plain") == pytest.approx(0.5 * kernels)
    assert [on.row_ms(x) for x in layers] == [off.row_ms(x) for x in layers]


def test_weights_beyond_the_cache_are_streamed() -> None:
    megabytes = sum(x.weight_bytes for x in expand(network())) / 1e6
    off = SimulatedBoard(0).true_ms(network(), "plain")
    fits = SimulatedBoard(0, BoardEffects(cache_mb=megabytes, streaming_ms=10.0))
    half = SimulatedBoard(0, BoardEffects(cache_mb=megabytes / 2, streaming_ms=10.0))
    assert fits.true_ms(network(), "plain") == pytest.approx(off)
    assert half.true_ms(network(), "plain") - off == pytest.approx(5.0 * megabytes)
    there, cached = (half.latency_ms(streaming_job(streaming_key(2, cached=c), 2, cached=c)) for c in (False, True))
    assert there - cached == pytest.approx(10.0 * (2 - megabytes / 2))


def test_irregular_networks_deviate_each_by_its_own_share_that_stays() -> None:
    board, off = SimulatedBoard(0, BoardEffects(irregular=0.05)), SimulatedBoard(0)
    candidates = [network(8 * n) for n in range(1, 60)]
    off_by = [board.true_ms(c, "plain") / off.true_ms(c, "plain") for c in candidates]
    assert np.std(np.log(off_by)) == pytest.approx(0.05, rel=0.3)
    assert off_by[0] == SimulatedBoard(0, board.effects).true_ms(candidates[0], "plain") / off.true_ms(
        candidates[0], "plain"
    )


def test_builds_of_the_same_network_differ() -> None:
    board = SimulatedBoard(0, BoardEffects(build_std=0.01))
    sessions = [ms for m in board.measure([job(network())] * 60) for ms in m.session_ms]
    assert np.std(np.log(sessions)) == pytest.approx(0.01, rel=0.2)
    assert np.median(sessions) == pytest.approx(board.true_ms(network(), "plain"), rel=0.003)


def test_noise_of_runs_is_log_normal_around_the_true_value() -> None:
    board = SimulatedBoard(0, BoardEffects(noise=0.1))
    logs = np.log(np.concatenate([runs(m) for m in board.measure([job(network())] * 40)]))
    assert logs.std() == pytest.approx(0.1, rel=0.05)
    assert np.exp(np.median(logs)) == pytest.approx(board.true_ms(network(), "plain"), rel=0.01)
    assert ((logs - logs.mean()) ** 3).mean() / logs.std() ** 3 == pytest.approx(0, abs=0.2)


def test_board_drifts_slowly_towards_a_limit() -> None:
    board = SimulatedBoard(0, BoardEffects(drift=0.1, drift_after=50))
    found = [m.latency_ms for m in board.measure([reference_job()] * 400)]
    cold = SimulatedBoard(0).measure([reference_job()])[0].latency_ms
    assert found == sorted(found)
    assert found[0] == cold
    assert found[50] / cold == pytest.approx(1 + 0.1 * (1 - np.exp(-1)))
    assert found[-1] / cold == pytest.approx(1.1, rel=1e-3)
    assert board.calm(3).drift == pytest.approx(0.1, rel=0.01)


def test_throttling_comes_in_episodes_and_shows_in_everything() -> None:
    board = SimulatedBoard(0, BoardEffects(throttle_share=0.3, throttle_length=5))
    jobs = [reference_job() if n % 2 else job(network()) for n in range(500)]
    calm_ms = [SimulatedBoard(0).latency_ms(x) for x in jobs]
    found = board.measure(jobs)
    slow = np.array([(m.latency_ms or 0) / ms for m, ms in zip(found, calm_ms, strict=True)])
    throttled = slow > 1.001
    assert 0.15 < throttled.mean() < 0.45
    assert slow[throttled].min() >= 1.299
    assert slow[throttled].max() <= 1.601
    assert all(len(set(slow[n : n + 5].round(9))) == 1 for n in range(0, 500, 5))
    for m, is_throttled in zip(found, throttled, strict=True):
        assert m.is_stable is not bool(is_throttled)
        assert m.temperature_c is not None
        assert m.clock_mhz is not None
        assert (m.temperature_c > 80, m.clock_mhz < 900) == (is_throttled, is_throttled)


def test_board_is_not_calm_while_it_is_throttled() -> None:
    always, never = (SimulatedBoard(0, BoardEffects(throttle_share=share)) for share in (1.0, 0.0))
    assert always.calm(4).rejected == 4
    assert always.calm(4).drift >= 0.3
    assert (never.calm(4).rejected, never.calm(4).drift) == (0, 0.0)


def test_equal_seeds_give_equal_numbers_and_other_seeds_others() -> None:
    jobs = [overhead_job(), job(network()), reference_job(), job(network(24)), job(network())]
    assert SimulatedBoard(5, ALL).measure(jobs) == SimulatedBoard(5, ALL).measure(jobs)
    first, other = SimulatedBoard(5, ALL).measure(jobs), SimulatedBoard(6, ALL).measure(jobs)
    assert all(a.latency_ms != b.latency_ms for a, b in zip(first, other, strict=True))


def test_boards_that_share_rows_differ_in_networks_only() -> None:
    first, other = (SimulatedBoard(seed, ALL, rows_seed=0) for seed in (1, 2))
    assert [first.row_ms(x) for x in expand(network())] == [other.row_ms(x) for x in expand(network())]
    assert first.true_ms(network(), "plain") != other.true_ms(network(), "plain")
    assert first.profile.fingerprint != other.profile.fingerprint


def test_table_filled_on_a_board_without_effects_predicts_its_networks_exactly(tmp_path: Path) -> None:
    board, candidate = SimulatedBoard(2), network(exits=(ExitConfig(0),))
    table = LatencyTable.open(tmp_path / "table", board.profile)
    fill(table, board, expand(candidate), write=described_layer)
    [m] = measure_networks(table, board, [candidate], form="if", write=described_network)
    assert m.latency_ms == pytest.approx(board.true_ms(candidate, "if"))
    assert Estimator(table).estimate(candidate).worst_ms == pytest.approx(m.latency_ms)


def test_real_onnx_is_measured_by_its_multiply_adds() -> None:
    jobs = [MeasureJob("x", "network", "fp32", mean_model(), macs) for macs in (10**6, 10**7)]
    small, large = (m.latency_ms or 0 for m in SimulatedBoard().measure(jobs))
    assert 0 < 5 * small < large


@pytest.mark.parametrize("model", [b"{", b'{"row":"no such row"}', b'{"candidate":{},"form":"plain"}', b"\x00"])
def test_what_describes_nothing_is_a_result_with_a_reason(model: bytes) -> None:
    [m] = SimulatedBoard().measure([MeasureJob("x", "network", "fp32", model, 1)])
    assert m.latency_ms is None
    assert m.error is not None
    assert m.error.startswith("not a model of this board: ")


def test_impossible_effects_are_refused() -> None:
    with pytest.raises(RecordError, match=r"board: noise must not be negative, got -0\.1"):
        BoardEffects(noise=-0.1)
    with pytest.raises(RecordError, match=r"fusion_gain is at most 0\.45.*; got 0\.5, 0\.0, 8, 100\.0"):
        BoardEffects(fusion_gain=0.5)
