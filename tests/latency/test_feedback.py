"""The correction of a table on simulated devices whose errors are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.latency.feedback import (
    _BELIEFS,
    KEPT_MASS,
    KEPT_POINTS,
    KERNEL_ERROR,
    NOISE_STD,
    RBF_LENGTHS,
    Feedback,
    Networks,
    Prior,
    Sums,
    _spanning,
    coefficients,
    compact,
    fit,
    predict,
    predict_compact,
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


def fitted_to(device: Device, count: int, seed: int = 1, prior: Prior = "other") -> Feedback:
    networks, _, measured = made_networks(device, count, seed)
    return fit(networks, measured, device.group_of, prior=prior)


def added_up(fitted: Feedback, device: Device, entries: NDArray[np.intp]) -> Sums:
    """Sums over the entries of each network, one use after the other; entries [M, K]."""
    columns, squares = np.zeros((len(entries), fitted.groups + len(fitted.shares))), np.zeros(len(entries))
    for i, of_network in enumerate(entries):
        for e in of_network:
            columns[i, fitted.group_of[e]] += device.entry_ms[e]
            columns[i, fitted.groups :] += device.entry_ms[e] * fitted.shares[:, e]
        for e in set(of_network.tolist()):
            squares[i] += ((of_network == e).sum() * device.entry_ms[e]) ** 2
    return Sums(columns, squares)


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


def coverage(prior: Prior, count: int) -> float:
    """Share of new networks inside their 90 % intervals, over 30 devices that are as wrong as such a table may be."""
    group, entry = {"other": (0.3, 0.1), "same device": (0.05, 0.05)}[prior]
    inside = []
    for seed in range(30):
        device = made_device(seed, group=group, entry=entry, layer_ms=0.002, noise=0.02)
        networks, _, measured = made_networks(device, 100, seed + 50)
        found = predict(fitted_to(device, count, seed + 20, prior), networks, level=0.9)
        inside.append(((found.low_ms <= measured) & (measured <= found.high_ms)).mean())
    return float(np.mean(inside))


@pytest.mark.parametrize(("prior", "count"), list(product(("same device", "other"), (15, 25))))
def test_intervals_cover_new_networks(prior, count):
    assert 0.83 <= coverage(prior, count) <= 0.97


@pytest.mark.parametrize(("prior", "count"), [("same device", 3), ("other", 5)])
def test_intervals_of_the_first_fits_are_rather_too_wide(prior, count):
    assert coverage(prior, count) >= 0.9


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


@pytest.mark.parametrize(("prior", "least"), [("same device", 3), ("other", 5)])
def test_a_table_of_the_same_device_is_corrected_from_fewer_networks_than_another(prior, least):
    device = made_device()
    before, after = (fitted_to(device, count, prior=prior) for count in (least - 1, least))
    assert (before.method, after.method) == ("scale", "bayes")
    assert before.reason == f"{least - 1} measured networks of {least}: scale only"
    assert after.reason == f"{least} measured networks, 0 of them outliers"


def test_few_disturbed_networks_do_not_spoil_a_good_table_of_the_same_device():
    found = []
    for seed in range(10):
        device = made_device(seed, noise=0.03)
        networks, _, measured = made_networks(device, 4, seed + 1)
        fitted = fit(networks, measured, device.group_of, prior="same device")
        found.append(error_of(fitted, replace(device, noise=0.0)))
    assert np.mean(found) < 0.03


def test_a_table_of_the_same_device_with_wrong_groups_is_corrected_from_few_networks():
    device = made_device(group=0.3, noise=0.005)
    nine = error_of(fitted_to(device, 9, 4, "same device"), device)
    assert nine < 0.3 * error_of(fitted_to(device, 2, 4, "same device"), device)


def test_a_table_of_the_same_device_is_believed_more():
    device = made_device(noise=0.01)
    networks, _, _ = made_networks(device, 20, 3)
    for count in (0, 1, 8):
        own, other = (predict(fitted_to(device, count, prior=p), networks) for p in ("same device", "other"))
        assert (own.std_ms < other.std_ms).all()


def test_left_out_predictions_do_not_see_their_own_measurement():
    device = made_device(group=0.2)
    networks, _, measured = made_networks(device, 20, 1)
    before = fit(networks, measured, device.group_of)
    measured = measured.copy()
    measured[5] *= 1.02
    after = fit(networks, measured, device.group_of)
    assert after.left_out_ms[5] == pytest.approx(before.left_out_ms[5], rel=0.01)
    assert after.left_out_z[5] > before.left_out_z[5]


UNEVEN = made_device(group=0.2, entry=0.1, layer_ms=0.01)
SCALED = made_device(noise=0.0)


@pytest.mark.parametrize(
    ("prior", "device", "wrong", "doubt"),
    [
        ("other", UNEVEN, {}, [1.0] * 7),
        ("same device", UNEVEN, {}, [1.0, 4.0, 1.0, 1.0, 2.0, 1.0, 1.0]),
        ("same device", UNEVEN, {2: 1.7, 5: 1.15}, [1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 2.0]),
        ("other", UNEVEN, {1: 0.5}, [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]),
        ("same device", SCALED, {2: 1.2}, [1.0] * 7),  # so quiet that an outlier is told from more than the noise
    ],
)
def test_mean_and_deviation_are_those_of_the_model_written_out_point_by_point(prior, device, wrong, doubt):
    networks, _, measured = made_networks(device, 7, 1)
    for i, factor in wrong.items():
        measured[i] *= factor
    others, _, _ = made_networks(device, 3, 2)
    fitted = fit(networks, measured, device.group_of, prior=prior, doubt=doubt)
    found = predict(fitted, others)
    mean, std, inflated, calibration = written_out(networks, measured, device.group_of, others, prior, np.array(doubt))
    assert found.mean_ms == pytest.approx(mean, rel=1e-5)
    assert found.std_ms == pytest.approx(std, rel=1e-4)
    assert fitted.outlier == pytest.approx(inflated, rel=1e-8)
    assert fitted.calibration == pytest.approx(calibration, rel=1e-8)
    assert (inflated > doubt).any() == bool(wrong)


Array = NDArray[np.float64]


def written_out(
    known: Networks, y: Array, group_of: NDArray[np.intp], asked: Networks, prior: Prior, doubt: Array
) -> tuple[Array, Array, Array, float]:
    """Mean and deviation by one plain Gaussian process per point of the grid, how much noise was inflated, and the
    calibration; each left-out value from a fit without its network."""
    n, belief = len(y), _BELIEFS[prior]
    both = np.concatenate([known.contributions_ms, asked.contributions_ms])
    total = both.sum(axis=1)
    q = np.exp(np.median(np.log(y / total[:n]))) * total
    w = both / total[:, None]
    v = np.stack([w[:, group_of == g].sum(axis=1) for g in range(GROUPS)], axis=1)
    u = np.concatenate([known.overheads, asked.overheads]) / q[:, None]
    u = u / np.exp(np.log(u[:n]).mean(axis=0))
    z = np.concatenate([known.descriptors, asked.descriptors])
    apart = ((z[:, None] - z) ** 2).mean(axis=2) + (np.subtract.outer(np.log(total), np.log(total)) / 0.5) ** 2
    near, far = np.exp(-apart / 2), np.exp(-apart / 2 / 2.5**2)
    r = y / q[:n] - 1
    points = list(product(belief.group, belief.entry, belief.overhead, belief.rbf, NOISE_STD))

    def covariance(point) -> Array:
        g, e, b, (short, long), _ = point
        linear = belief.constant**2 + g**2 * v @ v.T + e**2 * w @ w.T + b**2 * u @ u.T
        return linear + short**2 * near + long**2 * far

    def noise(point, inflated: Array) -> Array:
        """Variances; outliers are told from 1 % at least, so that is what is inflated."""
        return (np.where(inflated > doubt, max(point[-1], 0.01), point[-1]) * inflated) ** 2

    def from_others(point, inflated: Array, use: list[int], ask: list[int]) -> tuple[Array, Array]:
        """Mean and variance of new measurements of some networks from those of others."""
        cov = covariance(point)
        s = cov[np.ix_(use, use)] + np.diag(noise(point, inflated)[use])
        weight = np.linalg.solve(s, cov[np.ix_(use, ask)])
        explained = (cov[np.ix_(use, ask)] * weight).sum(axis=0)
        return r[use] @ weight, np.diag(cov)[ask] - explained + point[-1] ** 2

    def left_out(point, inflated: Array) -> tuple[Array, Array]:
        each = [from_others(point, inflated, [k for k in range(n) if k != i], [i]) for i in range(n)]
        return np.array([m[0] for m, _ in each]), np.array([var[0] for _, var in each])

    def scores(inflated: Array) -> Array:
        result = []
        for point in points:
            s = covariance(point)[:n, :n] + np.diag(noise(point, inflated))
            g, e, b, rbf, noise_std = point
            of_prior = np.append(np.maximum([g, e, b, max(rbf)], 0.01), noise_std)
            from_median = np.log(of_prior / np.array(belief.medians)) / np.array(belief.widths)
            result.append(-0.5 * (r @ np.linalg.solve(s, r) + np.linalg.slogdet(s)[1] + (from_median**2).sum()))
        return np.array(result)

    def inflation(residual: Array, limit: float) -> Array:
        robust = np.abs(residual) / max(1.4826 * np.median(np.abs(residual)), 0.01)
        return np.where(robust > limit, np.maximum(robust, doubt), doubt)

    inflated = inflation(r, 6.0)
    for _ in range(2):
        # Outliers are not told from less noise, and looked for in a part of the grid.
        rough = [g in belief.group[::2] and b in belief.overhead[::2] and noise >= 0.01 for g, _, b, _, noise in points]
        best = points[int(np.argmax(np.where(rough, scores(inflated), -np.inf)))]
        inflated = inflation(r - left_out(best, inflated)[0], 2.5)
    score = scores(inflated)
    heaviest = np.argsort(-score, kind="stable")
    share = np.exp(score[heaviest] - score.max())
    kept = min(KEPT_POINTS, int(np.searchsorted(np.cumsum(share / share.sum()), KEPT_MASS)) + 1)
    share = share[:kept] / share[:kept].sum()

    def averaged(each: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        means, variances = np.array([m for m, _ in each]), np.array([var for _, var in each])
        mean = share @ means
        return mean, np.sqrt(share @ (variances + (means - mean) ** 2))

    used = [points[i] for i in heaviest[:kept]]
    left, left_std = averaged([left_out(p, inflated) for p in used])
    deviations = np.minimum(np.abs(r - left) / left_std, 2.5)
    calibration = max(1.0, np.sqrt((5 + (deviations**2).sum()) / (5 + n)))
    mean, std = averaged([from_others(p, inflated, list(range(n)), list(range(n, len(q)))) for p in used])
    return q[n:] * (1 + mean), q[n:] * std * calibration, inflated, float(calibration)


def test_a_doubted_network_pulls_less():
    """Too little wrong to be an outlier by itself."""
    device = made_device(noise=0.0)
    errors = []
    for seed in range(20):
        networks, _, measured = made_networks(device, 4, seed)
        measured[1] *= 1.05
        for doubt in (None, [1.0, 5.0, 1.0, 1.0]):
            fitted = fit(networks, measured, device.group_of, prior="same device", doubt=doubt)
            errors.append(error_of(fitted, device))
    assert np.mean(errors[1::2]) < 0.6 * np.mean(errors[::2])


def test_doubt_of_one_is_no_doubt():
    device = made_device()
    networks, _, measured = made_networks(device, 6, 1)
    plain, one = (fit(networks, measured, device.group_of, doubt=doubt) for doubt in (None, np.ones(6)))
    assert (plain.weights == one.weights).all()
    assert (plain.outlier == 1).all()


@pytest.mark.parametrize("prior", ["same device", "other"])
@pytest.mark.parametrize("factor", [1.25, 0.75])
def test_two_networks_of_five_that_are_far_off_do_not_pull_those_that_agree(prior, factor):
    """They pulled by 8 to 10 % where the first fit began with all five."""
    device, errors = made_device(noise=0.005), []
    for seed in range(10):
        networks, _, measured = made_networks(device, 5, seed)
        measured[[1, 4]] *= factor
        fitted = fit(networks, measured, device.group_of, prior=prior)
        errors.append(error_of(fitted, device))
        assert (fitted.outlier > 1).tolist() == [False, True, False, False, True]
        assert fitted.reason == "5 measured networks, 2 of them outliers"
    assert np.median(errors) < 0.015
    assert np.mean(errors) < 0.04


def test_deviations_grow_where_the_networks_scatter_more_than_they_say():
    found = []
    for noise in (0.01, 0.1, 0.3):
        device = made_device(noise=noise)
        found.append([fitted_to(device, 15, seed, "same device").calibration for seed in range(6)])
    calm, _, wild = np.mean(found, axis=1)
    assert np.min(found) >= 1.0
    assert calm < 1.1
    assert (np.diff(np.mean(found, axis=1)) > 0).all()
    assert wild > 1.3


def test_deviations_are_calibrated_by_those_of_left_out_networks():
    fitted = fitted_to(made_device(noise=0.3), 15, 1, "same device")
    z = np.minimum(np.abs(fitted.left_out_z * fitted.calibration), 2.5)  # as they were before the calibration
    assert fitted.calibration == pytest.approx(np.sqrt((5 + (z**2).sum()) / (5 + 15)))
    assert fitted.calibration > 1.1
    before, after = coefficients(replace(fitted, calibration=1.0)), coefficients(fitted)
    for name in ("constant_std", "group_std", "entry_std", "factor_std", "overhead_std_ms"):
        assert getattr(after, name) == pytest.approx(fitted.calibration * getattr(before, name))


def test_a_normal_interval_is_widened_by_less_the_more_networks_there_are():
    device = made_device()
    networks, _, _ = made_networks(device, 5, 3)
    factors = []
    for count in (0, 2, 5, 20):
        fitted = fitted_to(device, count)
        found = predict(fitted, networks, level=0.9)
        assert found.high_ms - found.mean_ms == pytest.approx(1.6448536 * fitted.normal_factor * found.std_ms)
        factors.append(fitted.normal_factor)
    assert factors[1] < factors[0]  # a scale alone
    assert factors[3] < factors[2]
    assert 1.0 < factors[3] < 1.1 < min(factors[:3])


def test_the_corrected_table_and_the_rest_are_the_whole_prediction():
    device = made_device(group=0.2, entry=0.1, layer_ms=0.01)
    fitted = fitted_to(device, 25)
    found = coefficients(fitted)
    networks, _, _ = made_networks(device, 50, 3)
    table = fitted.scale * device.entry_ms * found.factor
    linear = (networks.contributions_ms / device.entry_ms) @ table + networks.overheads @ found.overhead_ms
    total = networks.contributions_ms.sum(axis=1)
    whole = linear + fitted.scale * total * rest(fitted, networks.descriptors, total)
    assert whole == pytest.approx(predict(fitted, networks).mean_ms, rel=1e-6)  # predicted in single precision
    assert found.factor == pytest.approx(1 + found.constant + found.group[device.group_of] + found.entry, rel=1e-6)


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
    sums = added_up(fitted, device, entries)
    summed = predict_sums(fitted, sums, networks.overheads, networks.descriptors)
    for name in ("mean_ms", "std_ms", "low_ms", "high_ms"):
        assert getattr(summed, name) == pytest.approx(getattr(direct, name), rel=1e-9)


def predict_multiplied_out(
    fitted: Feedback, device: Device, networks: Networks, entries: NDArray[np.intp]
) -> tuple[Array, Array]:
    fast, sums = compact(fitted), added_up(fitted, device, entries)
    total = networks.contributions_ms.sum(axis=1)
    linear = sums.columns @ fast.by_column + networks.overheads @ fast.by_overhead + np.outer(total, fast.by_total)
    return predict_compact(fast, total, linear.astype(np.float32), sums.squares, networks.descriptors)


def check_multiplied_out(fitted: Feedback, device: Device) -> None:
    """That a correction multiplied out predicts what it predicts itself."""
    networks, entries, _ = made_networks(device, 300, 3)
    direct = predict(fitted, networks)
    mean, std = predict_multiplied_out(fitted, device, networks, entries)
    assert mean == pytest.approx(direct.mean_ms, rel=1e-6)
    assert std == pytest.approx(direct.std_ms, rel=3e-4)


@pytest.mark.parametrize(("prior", "count"), list(product(("same device", "other"), (0, 1, 4, 5, 25, 60, 100))))
def test_a_correction_multiplied_out_predicts_the_same(prior, count):
    device = made_device(group=0.3, entry=0.1, layer_ms=0.01)
    check_multiplied_out(fitted_to(device, count, prior=prior), device)


def test_a_precise_device_on_which_the_table_is_very_wrong_is_predicted_the_same_when_multiplied_out():
    device = made_device(scale=3.0, group=0.6, entry=0.3, layer_ms=0.05, noise=0.002)
    fitted = fitted_to(device, 60)
    assert fitted.prior[:4].sum() > 1000 * fitted.prior[5]  # single precision must not take their difference
    check_multiplied_out(fitted, device)


def test_where_nothing_is_smooth_no_kernels_are_left():
    device = made_device(scale=3.0, group=0.6, entry=0.3, layer_ms=0.05, noise=0.002)
    fitted = fitted_to(device, 60)
    assert fitted.prior[4] == 0
    assert len(compact(fitted).kernels) == 0


def test_kernels_that_are_left_out_are_everywhere_the_sum_of_those_that_are_kept():
    rng = np.random.default_rng(0)
    places, matters, asked = rng.normal(size=(60, 2)), rng.uniform(0.1, 2, 60), 3 * rng.normal(size=(2000, 2))
    for length, most in zip(RBF_LENGTHS, (55, 40), strict=True):
        chosen, amounts = _spanning(_gaussian(places, places, length), matters)
        assert len(chosen) < most
        error = _gaussian(asked, places[chosen], length) @ amounts - _gaussian(asked, places, length)
        assert np.abs(error * matters).max() < KERNEL_ERROR


def _gaussian(near: Array, far: Array, length: float) -> Array:
    return np.exp(-0.5 * ((near[:, None] - far) ** 2).sum(axis=2) / length**2)


@pytest.mark.parametrize(("constant", "expected"), [(-5.0, 0.1), (30.0, 10.0)])
def test_a_correction_never_turns_a_prediction_upside_down(constant, expected):
    device = made_device(scale=1.0)
    fitted = fitted_to(device, 8)
    weights = np.zeros_like(fitted.weights)
    weights[0] = constant  # of everything, on top of the scale
    networks, entries, _ = made_networks(device, 3, 2)
    found = predict(replace(fitted, weights=weights), networks)
    assert found.mean_ms == pytest.approx(expected * fitted.scale * networks.contributions_ms.sum(axis=1))
    mean, _ = predict_multiplied_out(replace(fitted, weights=weights), device, networks, entries)
    assert mean == pytest.approx(found.mean_ms)
    assert (found.std_ms > 0).all()
    assert (found.low_ms >= 0).all()


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


@pytest.mark.parametrize(
    ("doubt", "message"),
    [
        ([1.0, 0.5], "doubt must not be below 1, got 0.5"),
        ([1.0], "doubt is of 1 networks, their contributions of 2"),
        ([1.0, np.nan], "doubt: 1 values are not finite"),
    ],
)
def test_impossible_doubt_is_refused(doubt, message):
    twice = np.ones((2, 1))
    with pytest.raises(RecordError, match=message):
        fit(Networks(twice, twice, twice), [1.0, 1.0], [0], doubt=doubt)


def test_networks_of_another_table_are_refused():
    device = made_device()
    fitted = fitted_to(device, 6)
    networks, entries, _ = made_networks(device, 2, 1)
    sums = added_up(fitted, device, entries)
    with pytest.raises(RecordError, match="contributions_ms has 1 entries, the correction 30"):
        predict(fitted, Networks(ONE, ONE, ONE))
    with pytest.raises(RecordError, match="overheads has 1 columns, the correction 2"):
        predict_sums(fitted, sums, np.ones((2, 1)), networks.descriptors)
    with pytest.raises(RecordError, match="descriptors has 1 columns, the correction 4"):
        predict_sums(fitted, sums, networks.overheads, np.ones((2, 1)))
    with pytest.raises(RecordError, match="of another fit"):
        predict_sums(fitted_to(device, 7), sums, networks.overheads, networks.descriptors)
    with pytest.raises(RecordError, match="squares is of 1 networks, their contributions of 2"):
        predict_sums(fitted, replace(sums, squares=sums.squares[:1]), networks.overheads, networks.descriptors)
    with pytest.raises(RecordError, match="sums: the total must be positive in every network, got 0"):
        predict_sums(fitted, replace(sums, columns=0 * sums.columns), networks.overheads, networks.descriptors)
    with pytest.raises(RecordError, match="level must be between 0 and 1, got 1"):
        predict(fitted, networks, level=1.0)


@pytest.mark.parametrize("unit", [1.0, 1e3, 1e-2])
def test_a_cost_that_no_measured_network_has_widens_no_prediction_whatever_the_unit_of_time(unit):
    device = made_device(layer_ms=0.01)
    known, _, measured = made_networks(device, 12, 1)
    asked, _, _ = made_networks(device, 5, 2)

    def scaled(networks: Networks, decisions: float) -> Networks:
        overheads = np.column_stack([networks.overheads, np.full(len(networks), decisions)])
        return Networks(unit * networks.contributions_ms, overheads, networks.descriptors)

    fitted = fit(scaled(known, 0.0), unit * measured, device.group_of, prior="same device")
    without, having = predict(fitted, scaled(asked, 0.0)), predict(fitted, scaled(asked, 1.0))
    assert having.std_ms == pytest.approx(without.std_ms, rel=1e-4)
    assert having.mean_ms == pytest.approx(without.mean_ms, rel=1e-6)
    plain = predict(fit(known, measured, device.group_of, prior="same device"), asked)
    assert having.std_ms == pytest.approx(unit * plain.std_ms, rel=1e-3)
