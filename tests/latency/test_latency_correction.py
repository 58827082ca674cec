"""What measured networks teach about sums of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from latency_examples import candidate, filled, measured, network, profile, sum_ms

from nas.core.errors import RecordError
from nas.core.jsonio import read_record, write_record
from nas.core.walk import expand
from nas.latency.correction import (
    Correction,
    NetworkEvidence,
    PrecisionFit,
    borrowed_fit,
    corrected,
    fit_precision,
)
from nas.latency.estimate import fit_correction
from nas.latency.table import LatencyTable


def evidence(
    count: int,
    *,
    scale: float = 1.0,
    constant: float = 0.0,
    per_mb: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> list[NetworkEvidence]:
    """Networks of 0.4-4 ms with 1-20 MB of weights whose measured times follow the first three terms."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        p, w = float(rng.uniform(0.4, 4)), float(rng.uniform(1, 20))
        y = (scale * p + constant + per_mb * w) * (1 + float(rng.normal(0, noise)))
        result.append(NetworkEvidence(f"n{i}", p, w, 0, y, stable=True))
    return result


def predict(fit: PrecisionFit, networks: Sequence[NetworkEvidence]) -> tuple[np.ndarray, np.ndarray]:
    p = np.array([n.sum_ms for n in networks])
    w = np.array([n.weight_mb for n in networks])
    gates = np.array([n.gates for n in networks], dtype=np.float64)
    return corrected(fit, fit.precision, p, w, gates, np.zeros_like(p))


def mape(fit: PrecisionFit, networks: Sequence[NetworkEvidence]) -> float:
    mean, _ = predict(fit, networks)
    return float(np.abs(mean / np.array([n.measured_ms for n in networks]) - 1).mean())


def test_no_network_gives_no_fit_and_the_plain_sum(tmp_path: Path) -> None:
    correction = fit_correction(filled(tmp_path, [candidate()]))
    assert correction.fits == ()
    mean, std = corrected(None, "fp32", np.array([2.0]), np.array([1.0]), np.array([1.0]), np.array([0.03**2]))
    assert mean[0] == 2.0
    assert std[0] == pytest.approx(np.hypot(0.05 * 2.0, 0.03))


def test_one_or_two_networks_move_the_scale_only() -> None:
    for count in (1, 2):
        fit = fit_precision("fp32", evidence(count, scale=1.1))
        assert fit.method == "scale"
        assert (fit.constant_ms, fit.ms_per_mb) == (0.0, 0.0)
        assert 1.08 < fit.scale < 1.1  # drawn a little towards 1
        assert fit.label == f"scale from {count} networks"


def test_three_terms_are_found_from_ten_networks() -> None:
    fit = fit_precision("fp32", evidence(10, scale=0.95, constant=0.05, per_mb=0.014, noise=0.01))
    assert fit.method == "full"
    assert fit.ms_per_mb == pytest.approx(0.014, abs=0.004)
    assert mape(fit, evidence(50, scale=0.95, constant=0.05, per_mb=0.014, seed=1)) < 0.015


def test_the_ridge_is_the_published_formula() -> None:
    """Posterior mean written out: t0 + (X'X + diag((0.03 / std)^2))^-1 X'(1 - X t0)."""
    networks = evidence(7, scale=1.2, constant=0.03, per_mb=0.01, noise=0.02)
    y = np.array([n.measured_ms for n in networks])
    x = np.array([[n.sum_ms, 0.1, 0.1 * n.weight_mb] for n in networks]) / y[:, None]
    t0 = np.array([np.median(y / np.array([n.sum_ms for n in networks])), 0, 0])
    prior = np.diag((0.03 / np.array([0.1, 1.0, 0.2])) ** 2)
    theta = t0 + np.linalg.inv(x.T @ x + prior) @ x.T @ (1 - x @ t0)
    fit = fit_precision("fp32", networks)
    assert (fit.scale, fit.constant_ms / 0.1, fit.ms_per_mb / 0.1) == pytest.approx(tuple(theta), rel=1e-9)
    assert fit.ms_per_gate == 0.0  # no network here decides at an exit


def test_the_price_of_a_decision_is_found_from_networks_with_and_without_exits() -> None:
    rng = np.random.default_rng(0)
    small = []
    for i, n in enumerate(evidence(24)):
        y = 0.97 * n.sum_ms / 40 + 0.004 * (i % 3)
        small.append(
            dataclasses.replace(n, sum_ms=n.sum_ms / 40, gates=i % 3, measured_ms=y * (1 + float(rng.normal(0, 0.002))))
        )
    fit = fit_precision("fp32", small[:12])
    assert fit.ms_per_gate == pytest.approx(0.004, abs=0.0005)
    assert mape(fit, small[12:]) < 0.02
    assert mape(dataclasses.replace(fit, ms_per_gate=0.0), small[12:]) > 0.05


def test_left_out_errors_are_those_of_fits_without_the_network() -> None:
    networks = evidence(6, scale=1.1, constant=0.02, per_mb=0.01, noise=0.03)
    fit = fit_precision("fp32", networks)
    for i, network_ in enumerate(fit.networks):
        without = fit_precision("fp32", [*networks[:i], *networks[i + 1 :]])
        assert network_.left_out_ms == pytest.approx(predict(without, [networks[i]])[0][0])
    assert fit.left_out_mape is not None and 0.005 < fit.left_out_mape < 0.1
    assert fit_precision("fp32", networks[:1]).left_out_mape is None


def test_deviations_cover_most_new_networks() -> None:
    inside = []
    for seed in range(40):
        truth = {"scale": 1.1, "constant": 0.03, "per_mb": 0.014, "noise": 0.03}
        fit = fit_precision("fp32", evidence(10, **truth, seed=seed))
        new = evidence(20, **truth, seed=1000 + seed)
        mean, std = predict(fit, new)
        inside += list(np.abs(mean - [n.measured_ms for n in new]) <= 1.645 * std)
    assert 0.85 < np.mean(inside) < 0.97  # nominal: 0.90


def test_a_disturbed_network_pulls_less() -> None:
    good = evidence(5, scale=1.0)
    wrong = dataclasses.replace(evidence(1, scale=1.5, seed=9)[0], key="wrong")
    pulled = fit_precision("fp32", [*good, wrong])
    less = fit_precision("fp32", [*good, dataclasses.replace(wrong, stable=False)])
    new = evidence(20, seed=3)
    assert mape(less, new) < 0.6 * mape(pulled, new)


def test_a_correction_never_turns_an_estimate_upside_down() -> None:
    fit = dataclasses.replace(fit_precision("fp32", evidence(5)), constant_ms=-5.0)
    mean, std = corrected(fit, "fp32", np.array([1.0]), np.array([1.0]), np.array([0.0]), np.array([0.0]))
    assert mean[0] == pytest.approx(0.1)
    assert std[0] > 0


def test_mixed_precision_borrows_until_it_has_networks_of_its_own(tmp_path: Path) -> None:
    mixed = candidate(("fp32", "fp32", "int8", "int8"))
    candidates = [
        *(candidate(p, depth=d) for p in ("fp32", "int8") for d in (1, 2, 3)),
        *(candidate(("fp32", "fp32", "int8", "int8"), depth=d) for d in (1, 2, 3)),
    ]
    table = filled(tmp_path, candidates)
    for c in candidates[:6]:
        factor = 1.2 if c.precision_label == "fp32" else 1.0
        table.add(network(c, factor * sum_ms(c)), c, "if")
    fit = fit_correction(table).fit_for("mixed")
    assert fit is not None and fit.method == "borrowed"
    assert fit.scale == pytest.approx(1.1, abs=0.03)
    singles = [f for f in fit_correction(table).fits if f.precision != "mixed"]
    assert fit.covariance[0][0] > max(f.covariance[0][0] for f in singles)
    for c in candidates[6:]:
        table.add(network(c, 1.3 * sum_ms(c)), c, "if")
    own = fit_correction(table).fit_for("mixed")
    assert own is not None and own.method == "full"
    assert len(own.networks) == 3
    assert mixed.precision_label == "mixed"


def test_networks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    other = candidate(width=32)
    table.add(network(other, 1.0), other, "if")
    failed = candidate("int8")
    table.add(
        measured(f"{failed.with_thresholds((None,)).id}|logits", "network", "int8", None, error="Fail: x"), failed
    )
    skipped = fit_correction(table).skipped
    assert "no row for ir|in=16x16x16|out=32x8x8" in skipped[0] and "and 3 more" in skipped[0]
    assert skipped[1].endswith("Fail: x")


def test_each_form_counts_what_it_computes(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    for form in ("logits", "plain", "if"):
        table.add(network(candidate(), 1.0, form), candidate(), form)
    fit = fit_correction(table).fit_for("fp32")
    assert fit is not None
    exit_ms = sum(table.net_ms(x.key) for x in expand(candidate()) if x.kind == "exit_head")
    logits, plain, gated = fit.networks
    assert logits.sum_ms - plain.sum_ms == pytest.approx(exit_ms)
    assert gated.sum_ms - logits.sum_ms == pytest.approx(table.gate_ms)
    assert [n.gates for n in fit.networks] == [0, 0, 1]


def test_a_correction_survives_its_file(tmp_path: Path) -> None:
    fit = fit_precision("int8", evidence(5, noise=0.02))
    correction = Correction("abc", (fit, borrowed_fit("mixed", [fit, fit])), ("x: y",))
    write_record(tmp_path / "c.json", correction)
    assert read_record(Correction, tmp_path / "c.json") == correction


def test_impossible_evidence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="network x: times must be positive"):
        NetworkEvidence("x", 0.0, 1.0, 0, 1.0, True)
    with pytest.raises(RecordError, match="needs at least one measured network"):
        fit_precision("fp32", [])
    with pytest.raises(RecordError, match="cannot be borrowed from nothing"):
        borrowed_fit("mixed", [])
    with pytest.raises(RecordError, match="covariance must be 4 x 4"):
        PrecisionFit("fp32", "scale", 1.0, 0.0, 0.0, 0.0, ((1.0,),), 0.1)
    assert LatencyTable.open(tmp_path, profile()).correction() is None
