"""Interpolated rows: piecewise linear in log shape inside the hull, careful outside, with an error bar that widens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nas.core.errors import RecordError
from nas.core.records import LayerSpec
from nas.latency.interpolate import (
    GROWTH,
    LEAST_STD,
    OUTSIDE,
    UNKNOWN_STD,
    deviations,
    family_of,
    interpolate_log,
    interpolate_rows,
    left_out_errors,
    spread_rows,
)
from nas.latency.keys import layer_of_key

ONES = np.ones(2)


def block(c_in: int, c_out: int, wide: int, size: int, **changes: object) -> LayerSpec:
    layer = LayerSpec("inverted_residual", c_in, size, c_out, size, 3, 1, wide, 0, False, "relu", "fp32")
    return replace(layer, **changes)  # type: ignore[arg-type]


def power_law(layer: LayerSpec) -> float:
    """A latency whose logarithm is linear in log shape."""
    return 1e-5 * layer.expanded_channels**0.7 * layer.in_channels**0.2 * layer.in_size**1.5


def grid() -> list[LayerSpec]:
    channels, widths, sizes = (16, 32, 64), (96, 192, 384), (7, 14, 28)
    return [block(c, 40, w, s) for c in channels for w in widths for s in sizes]


def known(layers: list[LayerSpec]) -> dict[str, float]:
    return {x.key: power_law(x) for x in layers}


def test_a_power_law_is_met_exactly_inside_the_hull() -> None:
    wanted = block(24, 40, 130, 10)
    found = interpolate_rows(known(grid()), [wanted])[wanted.key]
    assert found.latency_ms == pytest.approx(power_law(wanted))
    assert found.is_inside
    assert found.known == 27
    assert found.std_ms == pytest.approx(LEAST_STD * found.latency_ms)


def test_a_known_row_is_given_as_it_is() -> None:
    rows = known(grid())
    key = grid()[5].key
    rows[key] *= 3  # an outlier is not smoothed away
    found = interpolate_rows(rows, [layer_of_key(key)])[key]
    assert (found.latency_ms, found.nearest) == (pytest.approx(rows[key]), key)
    assert found.std_ms == pytest.approx(LEAST_STD * found.latency_ms)


def test_outside_the_hull_the_nearest_row_grows_with_its_shape() -> None:
    edge = block(64, 40, 384, 28)
    far = block(64, 40, 768, 56)
    found = interpolate_rows(known(grid()), [far])[far.key]
    assert not found.is_inside
    assert found.nearest == edge.key
    # middle width doubles (counted once), the size doubles (counted twice)
    assert found.latency_ms == pytest.approx(power_law(edge) * math.exp(GROWTH * 3 * math.log(2)))


def test_the_error_bar_is_wider_outside_and_grows_with_the_distance() -> None:
    inside, near, far = block(24, 40, 130, 10), block(64, 40, 500, 28), block(64, 40, 2000, 28)
    found = interpolate_rows(known(grid()), [inside, near, far])
    relative = [found[x.key].std_ms / found[x.key].latency_ms for x in (inside, near, far)]
    assert relative[0] < OUTSIDE * relative[0] <= relative[1] < relative[2]


def test_the_error_bar_covers_noise_of_the_rows() -> None:
    rng = np.random.default_rng(3)
    rows = {k: v * math.exp(rng.normal(0, 0.1)) for k, v in known(grid()).items()}
    wanted = [block(c, 40, w, s) for c in (20, 24, 48) for w in (120, 250) for s in (9, 12, 20)]
    found = interpolate_rows(rows, wanted)
    errors = np.array([abs(math.log(found[x.key].latency_ms / power_law(x))) for x in wanted])
    bars = np.array([found[x.key].std_ms / found[x.key].latency_ms for x in wanted])
    assert 0.05 < bars.max() < 0.5
    assert (errors <= 2 * bars).mean() >= 0.9


@pytest.mark.parametrize(
    "other",
    [
        {"kernel_size": 5},
        {"stride": 2, "out_size": 4},
        {"use_se": True},
        {"activation": "hard_swish"},
        {"precision": "int8"},
        {"out_channels": 16},  # a skip
        {"expanded_channels": 16},  # no expansion
    ],
)
def test_a_row_of_another_family_says_nothing(other: dict[str, object]) -> None:
    layer = block(16, 40, 96, 7)
    stranger = block(16, 40, 96, 7, **other)
    assert family_of(layer) != family_of(stranger)
    assert interpolate_rows({layer.key: 0.1}, [stranger]) == {}


def test_one_known_row_gives_a_wide_guess_that_is_never_zero() -> None:
    near, tiny = block(16, 40, 96, 7), block(1, 1, 2, 1, out_channels=2)
    found = interpolate_rows({near.key: 0.1}, [tiny])[tiny.key]
    assert 0 < found.latency_ms < 0.1
    assert not found.is_inside
    assert found.std_ms > OUTSIDE * UNKNOWN_STD * found.latency_ms


def test_rows_that_differ_in_one_coordinate_only_are_a_line() -> None:
    rows = known([block(16, 40, w, 7) for w in (64, 128, 256)])
    on, off = block(16, 40, 100, 7), block(16, 40, 100, 9)
    found = interpolate_rows(rows, [on, off])
    assert found[on.key].latency_ms == pytest.approx(power_law(on))
    assert (found[on.key].is_inside, found[off.key].is_inside) == (True, False)


def test_rows_in_a_plane_are_interpolated_in_that_plane() -> None:
    rows = known([block(c, 40, 4 * c, s) for c in (16, 32, 64) for s in (7, 14)])  # the width follows the channels
    on, off = block(24, 40, 96, 10), block(24, 40, 100, 10)
    found = interpolate_rows(rows, [on, off])
    assert found[on.key].latency_ms == pytest.approx(power_law(on))
    assert (found[on.key].is_inside, found[off.key].is_inside) == (True, False)


def test_more_work_in_every_direction_is_never_faster_outside() -> None:
    shapes = np.log(np.array([[16.0, 8.0], [32.0, 8.0], [16.0, 16.0], [32.0, 16.0]]))
    log_ms = np.log(np.array([1.0, 1.5, 2.0, 3.0]))
    wanted = np.log(np.array([[64.0, 32.0], [128.0, 64.0], [8.0, 4.0]]))
    guess = interpolate_log(shapes, log_ms, wanted, ONES)
    assert not guess.is_inside.any()
    assert guess.log_ms[2] < log_ms[0] and log_ms[3] < guess.log_ms[0] < guess.log_ms[1]


def test_leaving_rows_out_tells_inside_from_outside() -> None:
    rng = np.random.default_rng(0)
    shapes = rng.uniform(0, 3, (30, 2))
    inside, outside = left_out_errors(shapes, shapes @ np.array([0.7, 1.5]), ONES, at_most=30)
    assert len(inside) + len(outside) == 30
    assert len(inside) > 10 and len(outside) > 3
    assert np.abs(inside).max() < 1e-9 < np.abs(outside).max()
    assert deviations(inside, outside)[0] == LEAST_STD
    assert len(left_out_errors(shapes[:1], np.zeros(1), ONES)[0]) == 0
    assert deviations(np.empty(0), np.empty(0)) == (UNKNOWN_STD, OUTSIDE * UNKNOWN_STD)


def test_of_a_large_family_rows_are_left_out_together() -> None:
    shapes = np.random.default_rng(0).uniform(0, 3, (60, 2))
    log_ms = shapes @ np.array([0.7, 1.5])
    inside, outside = left_out_errors(shapes, log_ms, ONES, at_most=4)
    assert len(inside) + len(outside) == 4
    assert np.abs(inside).max() < 1e-9


def test_latencies_that_cannot_be_are_refused_by_key() -> None:
    key = block(16, 40, 96, 7).key
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RecordError, match=r"ir\|in=16x7x7.*cannot interpolate from a latency of"):
            interpolate_rows({key: value}, [block(16, 40, 100, 7)])
    with pytest.raises(RecordError, match="cannot interpolate"):
        interpolate_log(np.empty((0, 2)), np.empty(0), np.zeros((1, 2)), ONES)
    assert interpolate_rows({}, [block(16, 40, 96, 7)]) == {}


def test_rows_to_measure_come_from_every_family_and_find_the_hull_first() -> None:
    others = [block(16, 16, w, 7, use_se=True) for w in (32, 64)]
    chosen = spread_rows([*grid(), *others], 12)
    assert len({x.key for x in chosen}) == len(chosen) == 12
    assert {family_of(x) for x in chosen} == {family_of(x) for x in [*grid(), *others]}
    corners = {x.key for x in grid() if {x.in_channels, x.expanded_channels, x.in_size} <= {16, 64, 96, 384, 7, 28}}
    assert corners <= {x.key for x in chosen}
    found = interpolate_rows(known(chosen), grid())
    assert all(found[x.key].is_inside for x in grid())
    assert max(abs(found[x.key].latency_ms / power_law(x) - 1) for x in grid()) < 1e-6


def test_every_family_has_a_row_even_beyond_the_number_asked_for() -> None:
    families = [block(16, 16, 64, 7, kernel_size=k, activation=a) for k in (3, 5, 7) for a in ("relu", "hard_swish")]
    assert len(spread_rows(families, 2)) == 6
    assert len(spread_rows(grid(), 1000)) == 27
