"""The correction of a table on simulated devices whose errors are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.latency.feedback import (
    ENTRY_STD,
    GROUP_STD,
    HYPER_PRIORS,
    KEPT_MASS,
    KEPT_POINTS,
    NOISE_STD,
    OVERHEAD_STD,
    RBF_STD,
    Feedback,
    Networks,
    add_up,
    coefficients,
    fit,
    look_up,
    predict,
    predict_sums,
    rest,
)

ENTRIES, GROUPS, USED = 30, 3, 8


@dataclass(frozen=True)
class Device:
    """A table, and what a device makes of it: a factor for all, per group and per entry, and a cost per layer."""

    entry_ms: NDArray[np.float64]
    group_of: NDArray[np.intp]
    factor: NDArray[np.float64]
    layer_ms: float = 0.0
    noise: float = 0.01


def made_device(seed: int = 0, *, scale: float = 1.5, group: float = 0.0, entry: float = 0.0, **more: float) -> Device:
    rng = np.random.default_rng(seed)
    group_of = np.arange(ENTRIES) % GROUPS
    factor = scale * (1 + group * np.array([-1.0, 0.0, 1.0])[group_of]) * (1 + entry * rng.normal(size=ENTRIES))
    return Device(rng.uniform(0.02, 0.2, ENTRIES), group_of, factor, **more)


def made_networks(device: Device, count: int, seed: int) -> tuple[Networks, NDArray[np.intp], NDArray[np.float64]]:
    """Networks, the entries of each [M, USED] (some twice), and their measured milliseconds."""
    rng = np.random.default_rng(seed)
    entries = rng.integers(0, ENTRIES, (count, USED))
    counts = np.zeros((count, ENTRIES))
    np.add.at(counts, (np.arange(count)[:, None], entries), 1.0)
    layers = rng.integers(3, 30, count).astype(np.float64)
    networks = Networks(
        counts * device.entry_ms, np.column_stack([np.ones(count), layers]), rng.normal(size=(count, 4))
    )
    true_ms = counts @ (device.entry_ms * device.factor) + device.layer_ms * layers
    return networks, entries, true_ms * (1 + device.noise * rng.normal(size=count))


def fitted_to(device: Device, count: int, seed: int = 1) -> Feedback:
    networks, _, measured = made_networks(device, count, seed)
    return fit(networks, measured, device.group_of)


def error_of(fitted: Feedback, device: Device, seed: int = 99) -> float:
    networks, _, measured = made_networks(device, 200, seed)
    return float(np.mean(np.abs(predict(fitted, networks).mean_ms / measured - 1)))


def test_a_common_factor_is_recovered():
    fitted = fitted_to(made_device(scale=2.5), 10)
    assert coefficients(fitted).factor * fitted.scale == pytest.approx(2.5, rel=0.03)


def test_factors_of_groups_are_recovered():
    device = made_device(group=0.3)
    found = coefficients(fitted_to(device, 25))
    shift = [float(found.factor[device.group_of == g].mean()) for g in range(GROUPS)]
    assert shift[0] / shift[1] == pytest.approx(0.7, abs=0.05)
    assert shift[2] / shift[1] == pytest.approx(1.3, abs=0.05)


def test_factors_of_entries_are_recovered_within_their_errors():
    device = made_device(entry=0.2)
    fitted = fitted_to(device, 60)
    found = coefficients(fitted)
    truth = device.factor / fitted.scale
    assert np.corrcoef(found.factor, truth)[0, 1] > 0.9
    assert (np.abs(found.factor - truth) <= 3 * found.factor_std).mean() > 0.9


def test_a_cost_per_layer_that_no_entry_contains_is_recovered():
    found = coefficients(fitted_to(made_device(layer_ms=0.02, scale=1.0), 40))
    assert found.overhead_ms[1] == pytest.approx(0.02, rel=0.15)
    assert abs(found.overhead_ms[1] - 0.02) <= 3 * found.overhead_std_ms[1]


def test_an_effect_that_no_sum_expresses_is_learned_from_the_descriptors():
    device = made_device()
    networks, _, measured = made_networks(device, 40, 1)
    others, _, later = made_networks(device, 200, 2)

    def bent(x: Networks, y: NDArray[np.float64]) -> NDArray[np.float64]:
        return y * (1 + 0.2 * np.tanh(x.descriptors[:, 0]))

    fitted = fit(networks, bent(networks, measured), device.group_of)
    wrong = np.abs(predict(fitted, others).mean_ms / bent(others, later) - 1)
    assert wrong.mean() < 0.05
    found = rest(fitted, others.descriptors, others.contributions_ms.sum(axis=1))
    assert np.corrcoef(found, np.tanh(others.descriptors[:, 0]))[0, 1] > 0.9


def test_more_networks_predict_better_than_the_scale():
    device = made_device(group=0.3, entry=0.1, layer_ms=0.01)
    assert error_of(fitted_to(device, 40), device) < 0.5 * error_of(fitted_to(device, 4), device)


def test_an_outlier_does_not_tilt_the_fit_and_is_named():
    device = made_device(group=0.2)
    networks, _, measured = made_networks(device, 20, 1)
    clean = fit(networks, measured, device.group_of)
    measured[3] *= 1.6
    fitted = fit(networks, measured, device.group_of)
    assert error_of(fitted, device) < error_of(clean, device) + 0.005
    assert fitted.outlier[3] > 2.5
    assert np.argmax(np.abs(fitted.left_out_z)) == 3
    assert f"{(fitted.outlier > 1).sum()} of them outliers" in fitted.reason


def test_intervals_cover_new_networks():
    inside = []
    for seed in range(8):
        device = made_device(seed, group=0.2, entry=0.1, layer_ms=0.01, noise=0.02)
        networks, _, measured = made_networks(device, 200, seed + 50)
        found = predict(fitted_to(device, 25, seed + 20), networks, level=0.9)
        inside.append(((found.low_ms <= measured) & (measured <= found.high_ms)).mean())
    assert 0.83 <= np.mean(inside) <= 0.97


def test_a_wider_interval_contains_the_narrower():
    device = made_device()
    networks, _, _ = made_networks(device, 5, 3)
    fitted = fitted_to(device, 12)
    narrow, wide = predict(fitted, networks, level=0.5), predict(fitted, networks, level=0.99)
    assert (wide.low_ms < narrow.low_ms).all()
    assert (wide.high_ms > narrow.high_ms).all()


def test_no_network_leaves_the_raw_table():
    device = made_device()
    fitted = fitted_to(device, 0)
    networks, _, _ = made_networks(device, 7, 3)
    found = predict(fitted, networks)
    assert fitted.method == "raw"
    assert fitted.reason == "no measured network: the raw table"
    assert found.mean_ms == pytest.approx(networks.contributions_ms.sum(axis=1), rel=1e-12)
    assert (found.std_ms > 0).all()
    assert coefficients(fitted).factor == pytest.approx(1.0)
    assert fitted.left_out_error is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_networks_give_a_scale_only(count):
    device = made_device(scale=2.0, group=0.3, noise=0.0)
    networks, _, measured = made_networks(device, count, 1)
    fitted = fit(networks, measured, device.group_of)
    ratio = float(np.exp(np.median(np.log(measured / networks.contributions_ms.sum(axis=1)))))
    assert fitted.method == "scale"
    assert fitted.reason == f"{count} measured networks of 5: scale only"
    assert predict(fitted, networks).mean_ms == pytest.approx(ratio * networks.contributions_ms.sum(axis=1))
    assert len(fitted.left_out_ms) == count


def test_a_good_table_of_the_same_device_is_kept_until_the_correction_shows_its_worth():
    device = made_device(noise=0.03)
    networks, _, measured = made_networks(device, 6, 4)
    assert fit(networks, measured, device.group_of, prior="other").method == "bayes"
    guarded = fit(networks, measured, device.group_of, prior="same device")
    assert guarded.method == "scale"
    assert "left-out error" in guarded.reason


def test_a_table_of_the_same_device_with_wrong_groups_is_corrected_from_few_networks():
    device = made_device(group=0.6, noise=0.005)
    networks, _, measured = made_networks(device, 9, 4)
    fitted = fit(networks, measured, device.group_of, prior="same device")
    assert fitted.method == "bayes"
    assert "of the scale alone" in fitted.reason


def test_left_out_predictions_do_not_see_their_own_measurement():
    device = made_device(group=0.2)
    networks, _, measured = made_networks(device, 20, 1)
    before = fit(networks, measured, device.group_of)
    measured = measured.copy()
    measured[5] *= 1.02
    after = fit(networks, measured, device.group_of)
    assert after.left_out_ms[5] == pytest.approx(before.left_out_ms[5], rel=0.01)
    assert after.left_out_z[5] > before.left_out_z[5]


def test_mean_and_deviation_are_those_of_the_model_written_out_point_by_point():
    device = made_device(group=0.2, entry=0.1, layer_ms=0.01)
    networks, _, measured = made_networks(device, 7, 1)
    others, _, _ = made_networks(device, 3, 2)
    found = predict(fit(networks, measured, device.group_of), others)
    mean, std = written_out(networks, measured, device.group_of, others)
    assert found.mean_ms == pytest.approx(mean, rel=1e-8)
    assert found.std_ms == pytest.approx(std, rel=1e-6)


def written_out(
    known: Networks, y: NDArray[np.float64], group_of: NDArray[np.intp], asked: Networks
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation by one plain Gaussian process per point of the grid; only without outliers (few networks)."""
    n = len(y)
    both = np.concatenate([known.contributions_ms, asked.contributions_ms])
    total = both.sum(axis=1)
    q = np.exp(np.median(np.log(y / total[:n]))) * total
    w = both / total[:, None]
    v = np.stack([w[:, group_of == g].sum(axis=1) for g in range(GROUPS)], axis=1)
    u = np.concatenate([known.overheads, asked.overheads]) / q[:, None]
    u = u / np.exp(np.log(u[:n]).mean(axis=0))
    z = np.concatenate([known.descriptors, asked.descriptors])
    apart = ((z[:, None] - z) ** 2).mean(axis=2) + (np.subtract.outer(np.log(total), np.log(total)) / 0.5) ** 2
    r = y / q[:n] - 1
    scores, means, variances = [], [], []
    for g, e, b, (short, long), noise in product(GROUP_STD, ENTRY_STD, OVERHEAD_STD, RBF_STD, NOISE_STD):
        cov = 0.09 + g**2 * v @ v.T + e**2 * w @ w.T + b**2 * u @ u.T
        cov = cov + short**2 * np.exp(-apart / 2) + long**2 * np.exp(-apart / 2 / 2.5**2)
        s = cov[:n, :n] + noise**2 * np.eye(n)
        weight = np.linalg.solve(s, cov[:n, n:])
        means.append(r @ weight)
        variances.append(np.diag(cov)[n:] - (cov[:n, n:] * weight).sum(axis=0) + noise**2)
        of_prior = np.maximum([g, e, b, max(short, long), noise], 0.01)
        median, width = np.array(HYPER_PRIORS).T
        likely = -0.5 * (r @ np.linalg.solve(s, r) + np.linalg.slogdet(s)[1])
        scores.append(likely - 0.5 * ((np.log(of_prior / median) / width) ** 2).sum())
    heaviest = np.argsort(scores)[::-1]
    share = np.exp(np.array(scores)[heaviest] - max(scores))
    kept = min(KEPT_POINTS, int(np.searchsorted(np.cumsum(share / share.sum()), KEPT_MASS)) + 1)
    share = share[:kept] / share[:kept].sum()
    mu, var = np.array(means)[heaviest[:kept]], np.array(variances)[heaviest[:kept]]
    mean = share @ mu
    return q[n:] * (1 + mean), q[n:] * np.sqrt(share @ (var + (mu - mean) ** 2))


def test_the_corrected_table_and_the_rest_are_the_whole_prediction():
    device = made_device(group=0.2, entry=0.1, layer_ms=0.01)
    fitted = fitted_to(device, 25)
    found = coefficients(fitted)
    networks, _, _ = made_networks(device, 50, 3)
    table = look_up(fitted, device.entry_ms).corrected_ms
    linear = (networks.contributions_ms / device.entry_ms) @ table + networks.overheads @ found.overhead_ms
    total = networks.contributions_ms.sum(axis=1)
    whole = linear + fitted.scale * total * rest(fitted, networks.descriptors, total)
    assert whole == pytest.approx(predict(fitted, networks).mean_ms, rel=1e-9)
    assert found.factor == pytest.approx(1 + found.constant + found.group[device.group_of] + found.entry, rel=1e-12)


def test_an_entry_without_data_moves_with_its_group():
    device = made_device(group=0.3)
    networks, _, measured = made_networks(device, 25, 1)
    keep = (networks.contributions_ms[:, 0] == 0).nonzero()[0]
    part = Networks(networks.contributions_ms[keep], networks.overheads[keep], networks.descriptors[keep])
    found = coefficients(fit(part, measured[keep], device.group_of))
    assert found.entry[0] == 0.0
    assert found.factor[0] == pytest.approx(1 + found.constant + found.group[0])
    assert found.factor_std[0] >= max(found.factor_std[device.group_of == 0]) * 0.9


def test_sums_over_entries_predict_what_whole_networks_predict():
    device = made_device(group=0.2, entry=0.1, layer_ms=0.01)
    fitted = fitted_to(device, 25)
    networks, entries, _ = made_networks(device, 300, 3)
    direct = predict(fitted, networks)
    sums = add_up(look_up(fitted, device.entry_ms), entries)
    summed = predict_sums(fitted, sums, networks.overheads, networks.descriptors)
    for name in ("mean_ms", "std_ms", "low_ms", "high_ms"):
        assert getattr(summed, name) == pytest.approx(getattr(direct, name), rel=1e-9)


def test_a_repeated_entry_is_the_same_as_a_count():
    device = made_device(entry=0.1)
    look = look_up(fitted_to(device, 12), device.entry_ms)
    twice = add_up(look, [[3, 3, 7, -1]])
    counted = add_up(look, [[3, 7, -1, -1]], [[2.0, 1.0, 5.0, 0.0]])
    assert twice.columns == pytest.approx(counted.columns)
    assert twice.squares == pytest.approx([4 * device.entry_ms[3] ** 2 + device.entry_ms[7] ** 2])
    assert counted.squares == pytest.approx(twice.squares)


def test_the_same_measurements_give_the_same_correction_bit_for_bit():
    device = made_device(group=0.2, entry=0.1)
    first, second = fitted_to(device, 20), fitted_to(device, 20)
    assert (first.weights == second.weights).all()
    assert (first.left_out_ms == second.left_out_ms).all()
    assert (coefficients(first).factor_std == coefficients(second).factor_std).all()


def test_the_order_of_the_measurements_does_not_matter():
    device = made_device(group=0.2, entry=0.1)
    networks, _, measured = made_networks(device, 20, 1)
    turned = Networks(networks.contributions_ms[::-1], networks.overheads[::-1], networks.descriptors[::-1])
    one, two = fit(networks, measured, device.group_of), fit(turned, measured[::-1], device.group_of)
    assert coefficients(one).factor == pytest.approx(coefficients(two).factor, rel=1e-6)


def test_other_units_of_time_give_the_same_correction():
    device = made_device(group=0.2, layer_ms=0.01)
    networks, _, measured = made_networks(device, 20, 1)
    in_us = Networks(1e3 * networks.contributions_ms, networks.overheads, networks.descriptors)
    found = predict(fit(in_us, 1e3 * measured, device.group_of), in_us)
    assert found.mean_ms / 1e3 == pytest.approx(predict(fitted_to(device, 20), networks).mean_ms, rel=1e-9)


def test_an_overhead_that_no_measured_network_has_stays_zero():
    device = made_device()
    networks, _, measured = made_networks(device, 15, 1)
    gates = replace(networks, overheads=np.column_stack([networks.overheads, np.zeros(15)]))
    assert coefficients(fit(gates, measured, device.group_of)).overhead_ms[2] == 0.0


ONE = np.ones((1, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((np.zeros((2, 3)), np.ones((2, 1)), np.ones((2, 1))), "sum of contributions_ms must be positive"),
        ((-ONE, ONE, ONE), "contributions_ms must not be below 0, got -1"),
        ((np.array([[np.nan]]), ONE, ONE), "contributions_ms: 1 values are not finite"),
        ((np.ones(3), ONE, ONE), "contributions_ms must have 2 dimensions"),
        ((ONE, np.ones((2, 1)), ONE), "overheads is of 2 networks, their contributions of 1"),
        ((ONE, -ONE, ONE), "overheads must not be below 0"),
        ((ONE, ONE, np.ones((3, 1))), "descriptors is of 3 networks, their contributions of 1"),
        ((ONE, ONE, np.array([[np.inf]])), "descriptors: 1 values are not finite"),
    ],
)
def test_impossible_networks_are_refused(values, message):
    with pytest.raises(RecordError, match=message):
        Networks(*values)


@pytest.mark.parametrize(
    ("measured", "group_of", "prior", "message"),
    [
        ([1.0, 2.0], [0], "other", "measured_ms is of 2 networks, their contributions of 1"),
        ([0.0], [0], "other", "measured_ms must be positive in every network, got 0"),
        ([np.nan], [0], "other", "measured_ms: 1 values are not finite"),
        ([1.0], [0, 1], "other", "group_of has 2 entries, contributions_ms 1"),
        ([1.0], [0.5], "other", "group_of must be whole numbers"),
        ([1.0], [-1], "other", "group_of must not be below 0"),
        ([1.0], [0], "mine", "prior 'mine' is not one of: same device, other"),
    ],
)
def test_impossible_measurements_are_refused(measured, group_of, prior, message):
    with pytest.raises(RecordError, match=message):
        fit(Networks(ONE, ONE, ONE), measured, group_of, prior=prior)


def test_networks_of_another_table_are_refused():
    device = made_device()
    fitted = fitted_to(device, 6)
    networks, entries, _ = made_networks(device, 2, 1)
    sums = add_up(look_up(fitted, device.entry_ms), entries)
    with pytest.raises(RecordError, match="contributions_ms has 1 entries, the correction 30"):
        predict(fitted, Networks(ONE, ONE, ONE))
    with pytest.raises(RecordError, match="overheads has 1 columns, the correction 2"):
        predict_sums(fitted, sums, np.ones((2, 1)), networks.descriptors)
    with pytest.raises(RecordError, match="descriptors has 1 columns, the correction 4"):
        predict_sums(fitted, sums, networks.overheads, np.ones((2, 1)))
    with pytest.raises(RecordError, match="of another fit"):
        predict_sums(fitted_to(device, 7), sums, networks.overheads, networks.descriptors)
    with pytest.raises(RecordError, match="entry_ms has 2 entries, the correction 30"):
        look_up(fitted, [1.0, 1.0])
    with pytest.raises(RecordError, match="no entry 30, the correction has 30"):
        add_up(look_up(fitted, device.entry_ms), [[30]])
    with pytest.raises(RecordError, match="counts has shape"):
        add_up(look_up(fitted, device.entry_ms), [[3]], [[1.0, 2.0]])
    with pytest.raises(RecordError, match="level must be between 0 and 1, got 1"):
        predict(fitted, networks, level=1.0)
