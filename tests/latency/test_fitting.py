"""What measured networks teach about sums of rows: which count, for what, and what becomes of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from latency_examples import add_streaming, candidate, filled, measured, network, profile, sum_ms

from nas.core.errors import MissingRowError, RecordError
from nas.core.jsonio import read_record, write_record
from nas.core.records import BlockConfig, Candidate, LayerSpec, Precision, StageConfig
from nas.core.walk import expand
from nas.latency import fitting
from nas.latency.correction import Correction, Finding, NetworkEvidence, PrecisionFit
from nas.latency.estimate import Estimator
from nas.latency.feedback import rest
from nas.latency.fitting import (
    COSTS,
    LAYER_GROUPS,
    Fitted,
    describe,
    fit_again,
    fit_correction,
    layers_of,
    table_changes,
    whole_path,
    written_back,
)
from nas.latency.keys import layer_of_key
from nas.latency.lines import MeasuredNetwork, NetworkForm
from nas.latency.table import LatencyTable

WIDTHS = (16, 24, 32, 40, 48)


def variants(
    count: int, precision: Precision | tuple[Precision, ...] = "fp32", *, exits: bool | None = None
) -> list[Candidate]:
    """Different networks of growing depth; with `exits` left open every other one has an exit."""
    sizes = list(product((1, 2, 3, 4, 5, 6), WIDTHS))[:count]
    return [
        candidate(precision, depth=depth, width=width, exits=i % 2 == 0 if exits is None else exits)
        for i, (depth, width) in enumerate(sizes)
    ]


def as_measured(
    c: Candidate, ms: float, form: NetworkForm = "if", *, stable: bool = True, sequence: int = 1
) -> MeasuredNetwork:
    """A network as a table gives it back."""
    unset = c.with_thresholds((None,) * len(c.exits))
    return MeasuredNetwork(unset, form, replace(network(c, ms, form, stable=stable), sequence=sequence))


def truth(c: Candidate, row_ms: Callable[[LayerSpec], float]) -> float:
    """What a network takes on a device that needs so long for each row."""
    return sum(row_ms(x) for x in expand(c))


def cost(fit: PrecisionFit, name: str) -> Finding:
    return next(f for f in fit.costs if f.name == name)


def errors(table: LatencyTable, fitted: Fitted, networks: Sequence[MeasuredNetwork]) -> list[float]:
    """Estimate / measured - 1 of each."""
    estimator = Estimator(table, fitted)
    return [estimator.estimate(n.candidate).worst_ms / (n.measurement.latency_ms or 0.0) - 1 for n in networks]


def test_no_network_gives_no_fit_and_the_plain_sum(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    fitted = fit_correction(table)
    assert (fitted.correction, fitted.fits) == (Correction(table.profile.fingerprint, ()), {})
    assert written_back(table, fitted.correction) == {}
    estimate = Estimator(table, fitted).estimate(candidate())
    assert estimate == Estimator(table).estimate(candidate())
    assert estimate.worst_ms == pytest.approx(sum_ms(candidate()))


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_networks_move_the_scale_only(tmp_path: Path, count: int) -> None:
    *known, new = variants(count + 1)
    table = filled(tmp_path, [*known, new])
    fitted = fit_correction(table, [as_measured(c, 1.2 * sum_ms(c)) for c in known])
    fit = fitted.correction.fits[0]
    assert (fit.method, fit.label) == ("scale", f"scale from {count} network{'s' * (count > 1)}")
    assert fit.scale == pytest.approx(1.2)
    assert {f.value for f in (fit.constant, *fit.groups, *fit.costs)} == {0.0}
    assert [f.value for f in fit.rows] == pytest.approx([1.2] * len(fit.rows))
    estimate = Estimator(table, fitted).estimate(new)
    assert estimate.worst_ms == pytest.approx(1.2 * sum_ms(new))
    assert estimate.correction == fit.label


def test_more_networks_teach_which_operators_are_slower(tmp_path: Path) -> None:
    *known, new = variants(13)
    table = filled(tmp_path, [*known, new])

    def slow_blocks(x: LayerSpec) -> float:
        return table.net_ms(x.key) * (1.3 if x.group == "inverted_residual" else 1.0)

    fitted = fit_correction(table, [as_measured(c, truth(c, slow_blocks)) for c in known])
    fit = fitted.correction.fits[0]
    assert (fit.method, fit.label) == ("bayes", "corrected table from 12 networks")
    assert [f.name for f in fit.costs] == list(COSTS)
    factors = {f.name: f.value for f in written_factors(table, fitted.correction)}
    blocks = [v for key, v in factors.items() if layer_of_key(key).group == "inverted_residual"]
    others = [v for key, v in factors.items() if layer_of_key(key).kind == "head"]
    assert np.mean(blocks) / np.mean(others) == pytest.approx(1.3, abs=0.2)
    assert max(map(abs, errors(table, fitted, [as_measured(new, truth(new, slow_blocks))]))) < 0.02


def test_a_kind_of_block_that_no_measured_network_has_moves_with_all_others(tmp_path: Path) -> None:
    *known, base = variants(13)
    block = BlockConfig(base.stages[0].blocks[-1].out_channels, 96, 40, stride=2, kind="fused_inverted_residual")
    new = replace(base, stages=(base.stages[0], StageConfig((block,))))
    table = filled(tmp_path, [*known, new])
    fitted = fit_correction(table, [as_measured(c, 1.2 * sum_ms(c)) for c in known])
    estimate = Estimator(table, fitted).estimate(new)
    assert estimate.worst_ms == pytest.approx(1.2 * sum_ms(new), rel=0.05)
    plain = Estimator(table, fitted).estimate(base)
    assert estimate.worst_std_ms / estimate.worst_ms > plain.worst_std_ms / plain.worst_ms, "less is known of it"


def written_factors(table: LatencyTable, correction: Correction) -> list[Finding]:
    """Corrected / raw time of each row."""
    return [
        Finding(key, f.value / table.net_ms(key), f.std / table.net_ms(key))
        for key, f in written_back(table, correction).items()
    ]


def test_left_out_figures_are_there_from_two_networks_on(tmp_path: Path) -> None:
    one, two, *_ = candidates = variants(8)
    table = filled(tmp_path, candidates)
    alone = fit_correction(table, [as_measured(one, sum_ms(one))]).correction.fits[0]
    assert alone.left_out_mape is None
    assert (alone.networks[0].left_out_ms, alone.networks[0].left_out_std_ms) == (None, None)

    both = fit_correction(table, [as_measured(one, 1.1 * sum_ms(one)), as_measured(two, 1.3 * sum_ms(two))])
    fit = both.correction.fits[0]
    assert fit.networks[0].left_out_ms == pytest.approx(1.3 * sum_ms(one))
    assert fit.networks[1].left_out_ms == pytest.approx(1.1 * sum_ms(two))
    assert fit.left_out_mape == pytest.approx((1.3 / 1.1 - 1 + 1 - 1.1 / 1.3) / 2)


def test_left_out_figures_are_close_to_fits_without_the_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    candidates = variants(8)
    table = filled(tmp_path, candidates)
    networks = [as_measured(c, sum_ms(c) * (1 + float(rng.normal(0, 0.05)))) for c in candidates]
    fit = fit_correction(table, networks).correction.fits[0]
    for i, n in enumerate(fit.networks):
        without = fit_correction(table, [*networks[:i], *networks[i + 1 :]])
        estimate = Estimator(table, without).estimate(candidates[i])
        assert n.left_out_ms == pytest.approx(estimate.worst_ms, rel=0.03)
        assert n.left_out_std_ms is not None
        assert n.left_out_std_ms > 0
    assert fit.left_out_mape is not None
    assert 0.01 < fit.left_out_mape < 0.1


def test_networks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    other = candidate(width=32)
    table.add(network(other, 1.0), other, "if")
    failed = candidate("int8")
    table.add(
        measured(f"{failed.with_thresholds((None,)).id}|logits", "network", "int8", None, error="Fail: x"), failed
    )
    skipped = fit_correction(table).correction.skipped
    assert len(skipped) == 2
    assert "no row for ir|in=16x16x16|out=32x8x8" in skipped[0] and "and 3 more" in skipped[0]
    assert skipped[1].endswith("Fail: x")


def test_a_row_that_failed_is_no_row(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate(exits=False)])
    exit_head = next(x for x in expand(candidate()) if x.kind == "exit_head")
    table.add(measured(exit_head.key, "row", "fp32", None, error="Fail: x"))
    network_ = as_measured(candidate(), 1.0)
    fitted = fit_correction(table, [network_])
    assert fitted.fits == {}
    assert fitted.correction.skipped == (f"{network_.measurement.key}: no row for {exit_head.key}",)


def test_without_the_overhead_of_a_call_nothing_is_fitted(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, profile())
    for x in expand(candidate()):
        table.add(measured(x.key, "row", x.precision, 0.1))
    with pytest.raises(MissingRowError, match="the overhead of a call has not been measured"):
        fit_correction(table, [as_measured(candidate(), 1.0)])


def test_each_form_counts_what_it_computes(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate()])
    forms: tuple[NetworkForm, ...] = ("logits", "plain", "if")
    networks = [as_measured(candidate(), 1.0, form) for form in forms]
    exit_ms = sum(table.net_ms(x.key) for x in expand(candidate()) if x.kind == "exit_head")
    logits, plain, gated = fit_correction(table, networks).correction.fits[0].networks
    assert logits.sum_ms - plain.sum_ms == pytest.approx(exit_ms)
    assert gated.sum_ms - logits.sum_ms == pytest.approx(table.gate_ms)
    assert gated.sum_ms == pytest.approx(sum_ms(candidate()))
    assert [len(layers_of(n)) for n in networks] == [6, 5, 6]
    paths = [whole_path(table, layers_of(n), gated=n.form == "if") for n in networks]
    assert [describe(p, p.rows_ms)[0][0, [1, 4]].tolist() for p in paths] == [[6, 0], [5, 0], [6, 1]]


def test_evidence_of_a_network_holds_its_streamed_weights(tmp_path: Path) -> None:
    c, table = candidate(), filled(tmp_path, [candidate()])
    networks = [as_measured(c, 2.0)]
    (before,) = fit_correction(table, networks).correction.fits[0].networks
    add_streaming(table, 2, 1.0)
    (after,) = fit_correction(table, networks).correction.fits[0].networks
    assert after.sum_ms - before.sum_ms == pytest.approx(sum(x.weight_bytes for x in expand(c)) / 1e6 / 2)


def test_the_price_of_a_decision_at_an_exit_is_found(tmp_path: Path) -> None:
    """From networks that decide, networks that compute the exit without deciding, and networks without it."""
    candidates = variants(10, exits=True)
    table = filled(tmp_path, candidates)
    networks = []
    for i, c in enumerate(candidates):
        if i < 8:
            networks.append(as_measured(c, sum_ms(c) + 0.01))
        networks.append(as_measured(c, sum_ms(c, gated=False), "logits"))
    fitted = fit_correction(table, networks)
    fit = fitted.correction.fits[0]
    decision = cost(fit, "decision at an exit")
    assert decision.value == pytest.approx(0.01, rel=0.3)
    assert abs(decision.value - 0.01) <= 3 * decision.std
    new = [as_measured(c, sum_ms(c) + 0.01) for c in candidates[8:]]
    assert max(map(abs, errors(table, fitted, new))) < 0.02


def test_the_price_of_a_change_of_precision_is_found(tmp_path: Path) -> None:
    orders: tuple[tuple[Precision, ...], ...] = (
        ("fp32", "fp32", "int8", "int8"),
        ("fp32", "int8", "fp32", "int8"),
        ("int8", "int8", "fp32", "fp32"),
        ("int8", "fp32", "int8", "fp32"),
    )
    candidates = [candidate(p, depth=d, exits=False) for d, p in product((1, 2, 3, 4), orders)]
    table = filled(tmp_path, candidates)
    changes = [1, 3, 1, 3] * 4

    def ms(i: int) -> float:
        return sum_ms(candidates[i]) + 0.005 * changes[i]

    fitted = fit_correction(table, [as_measured(candidates[i], ms(i), "plain") for i in range(12)])
    assert list(fitted.fits) == ["mixed"]
    change = cost(fitted.correction.fits[0], "change of precision")
    assert change.value == pytest.approx(0.005, rel=0.3)
    assert abs(change.value - 0.005) <= 3 * change.std
    new = [as_measured(candidates[i], ms(i), "plain") for i in range(12, 16)]
    assert max(map(abs, errors(table, fitted, new))) < 0.02


def test_mixed_precision_uses_all_networks_and_single_labels_their_own(tmp_path: Path) -> None:
    fp32, int8 = variants(3), variants(3, "int8")
    mixed = variants(2, ("fp32", "fp32", "int8", "int8"))
    table = filled(tmp_path, [*fp32, *int8, *mixed])
    networks = [as_measured(c, 1.2 * sum_ms(c)) for c in fp32]
    assert list(fit_correction(table, networks).fits) == ["fp32"]  # mixed networks have int8 layers too
    networks += [as_measured(c, 1.1 * sum_ms(c)) for c in int8]
    fitted = fit_correction(table, networks)
    assert list(fitted.fits) == ["fp32", "int8", "mixed"]
    keys = [n.measurement.key for n in networks]
    named = [[n.key for n in fit.networks] for fit in fitted.correction.fits]
    assert named == [keys[:3], keys[3:], keys]
    assert [fit.scale for fit in fitted.correction.fits] == pytest.approx([1.2, 1.1, np.sqrt(1.2 * 1.1)])
    estimate = Estimator(table, fitted).estimate(mixed[0])
    assert estimate.correction == "corrected table from 6 networks"
    assert 1.08 < estimate.worst_ms / sum_ms(mixed[0]) < 1.22

    with_mixed = fit_correction(table, [*networks, *(as_measured(c, 1.15 * sum_ms(c)) for c in mixed)])
    counts = {fit.precision: len(fit.networks) for fit in with_mixed.correction.fits}
    assert counts == {"fp32": 3, "int8": 3, "mixed": 8}


def test_a_precision_that_no_network_has_keeps_its_plain_sum(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate(), candidate("int8")])
    fitted = fit_correction(table, [as_measured(candidate(), 1.2 * sum_ms(candidate()))])
    estimate = Estimator(table, fitted).estimate(candidate("int8"))
    assert estimate == Estimator(table).estimate(candidate("int8"))
    keys = {x.key for x in expand(candidate())}
    assert set(written_back(table, fitted.correction)) == keys
    assert fitted.correction.fit_for("int8") is None


def test_the_newest_networks_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_NETWORKS", 4)
    candidates = variants(7)
    table = filled(tmp_path, candidates)
    order = (3, 1, 7, 5, 2, 6, 4)
    networks = [as_measured(c, sum_ms(c), sequence=s) for c, s in zip(candidates, order, strict=True)]
    (fit,) = fit_correction(table, networks).correction.fits
    by_age = sorted(networks, key=lambda n: n.measurement.sequence)
    assert [n.key for n in fit.networks] == [n.measurement.key for n in by_age[-4:]]


def test_a_disturbed_network_pulls_less(tmp_path: Path) -> None:
    *candidates, wrong = variants(6)
    new = variants(20)[6:]
    table = filled(tmp_path, [*candidates, wrong, *new])
    good = [as_measured(c, sum_ms(c)) for c in candidates]
    wrongs = []
    for stable in (True, False):
        fitted = fit_correction(table, [*good, as_measured(wrong, 1.02 * sum_ms(wrong), stable=stable)])
        evidence = fitted.correction.fits[0].networks[-1]
        assert (evidence.stable, evidence.outlier) == (stable, 1 if stable else 3)
        wrongs.append(np.abs(errors(table, fitted, [as_measured(c, sum_ms(c)) for c in new])).mean())
    assert wrongs[1] < 0.6 * wrongs[0]


def random_device(
    table: LatencyTable, candidates: Sequence[Candidate], rng: np.random.Generator
) -> Callable[[Candidate], float]:
    """A device on which groups and single rows are wrong, each layer costs something, and measuring is not exact."""
    group = {g: rng.normal(0, 0.1) for g in LAYER_GROUPS}
    rows = {
        x.key: table.net_ms(x.key) * (1.1 + group[x.group] + rng.normal(0, 0.1)) for c in candidates for x in expand(c)
    }

    def measure(c: Candidate) -> float:
        return truth(c, lambda x: rows[x.key] + 0.001) * (1 + float(rng.normal(0, 0.02)))

    return measure


def test_deviations_cover_most_new_networks(tmp_path: Path) -> None:
    candidates = variants(30)
    table = filled(tmp_path, candidates)
    inside = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ms = random_device(table, candidates, rng)
        order = rng.permutation(30)
        fitted = fit_correction(table, [as_measured(candidates[i], ms(candidates[i])) for i in order[:12]])
        estimator = Estimator(table, fitted)
        for i in order[12:]:
            estimate = estimator.estimate(candidates[i])
            inside.append(abs(estimate.worst_ms - ms(candidates[i])) <= 1.645 * estimate.worst_std_ms)
    assert 0.83 < np.mean(inside) < 0.97  # nominal: 0.90


def test_a_correction_survives_its_file(tmp_path: Path) -> None:
    candidates = [*variants(5), *variants(2, "int8")]
    table = filled(tmp_path, candidates)
    networks = [as_measured(c, 1.1 * sum_ms(c), stable=i != 1) for i, c in enumerate(candidates)]
    unknown = as_measured(candidate(width=64), 1.0)
    correction = fit_correction(table, [*networks, unknown]).correction
    assert len(correction.fits) == 3 and len(correction.skipped) == 1
    write_record(tmp_path / "c.json", correction)
    assert read_record(Correction, tmp_path / "c.json") == correction
    table.save_correction(correction)
    assert LatencyTable.read(tmp_path).correction() == correction


def test_a_stored_correction_is_fitted_again_to_the_networks_that_it_names(tmp_path: Path) -> None:
    candidates = [*variants(5), *variants(4, "int8")]
    table = filled(tmp_path, [*candidates, *variants(8)])
    rng = np.random.default_rng(0)
    for c in candidates:
        table.add(network(c, sum_ms(c) * (1.1 + float(rng.normal(0, 0.03)))), c, "if")
    fitted = fit_correction(table)
    table.save_correction(fitted.correction)
    later = variants(8)[5:]
    for c in later:
        table.add(network(c, 2 * sum_ms(c)), c, "if")

    reread = LatencyTable.open(tmp_path, profile())
    stored = reread.correction()
    assert stored is not None
    again = fit_again(reread, stored)
    assert again.correction == fitted.correction
    for c in (later[0], candidates[-1]):
        assert Estimator(reread, again).estimate(c) == Estimator(table, fitted).estimate(c)
    assert len(fit_correction(reread).correction.fits[0].networks) == 8


def test_a_correction_fitted_again_follows_the_rows_as_they_are_now(tmp_path: Path) -> None:
    candidates = variants(4)
    table = filled(tmp_path, candidates)
    for c in candidates:
        table.add(network(c, 1.1 * sum_ms(c)), c, "if")
    stored = fit_correction(table).correction
    add_streaming(table, 2, 0.1)
    again = fit_again(table, stored).correction.fits[0]
    assert [n.key for n in again.networks] == [n.key for n in stored.fits[0].networks]
    assert all(new.sum_ms > old.sum_ms for new, old in zip(again.networks, stored.fits[0].networks, strict=True))


def linear_part(table: LatencyTable, fitted: Fitted, c: Candidate) -> float:
    """A corrected estimate without its smooth rest."""
    layers = expand(c)
    label = c.precision_label
    path = whole_path(table, layers, gated=True)
    total = table.overhead_ms + path.rows_ms + table.streaming_ms(path.weight_mb)
    _, descriptors = describe(path, total)
    feedback = fitted.fits[label].feedback
    smooth = feedback.scale * total * rest(feedback, descriptors, total)
    return Estimator(table, fitted).estimate(c).worst_ms - float(smooth[0])


@pytest.mark.parametrize(
    ("precision", "streaming"),
    [("fp32", None), ("int8", 0.05), (("fp32", "int8", "fp32", "int8"), 0.05)],
)
def test_rows_written_back_add_up_to_the_linear_part_of_an_estimate(
    tmp_path: Path, precision: Precision | tuple[Precision, ...], streaming: float | None
) -> None:
    candidates = variants(12, precision)
    table = filled(tmp_path, candidates)
    if streaming is not None:
        add_streaming(table, 2, streaming)
    rng = np.random.default_rng(0)
    networks = [as_measured(c, sum_ms(c) * (1.1 + float(rng.normal(0, 0.05))) + 0.01) for c in candidates[:8]]
    fitted = fit_correction(table, networks)
    (fit,) = fitted.correction.fits
    rows = written_back(table, fitted.correction)
    factor = {f.name: f.value for f in fit.rows}
    moved = []
    for c in candidates:  # also networks that were not measured
        layers = expand(c)
        path = whole_path(table, layers, gated=True)
        counts, _ = describe(path, np.ones(1))
        total = sum(rows[x.key].value for x in layers)
        # The decision at an exit is charged with its head, whose row does not contain it.
        total += sum(table.gate_ms * rows[x.key].value / table.net_ms(x.key) for x in layers if x.kind == "exit_head")
        total += factor["call"] * table.overhead_ms
        total += factor.get("streaming", 1.0) * float(table.streaming_ms(path.weight_mb)[0])
        total += sum(f.value * n for f, n in zip(fit.costs, counts[0], strict=True))
        assert total == pytest.approx(linear_part(table, fitted, c), rel=1e-9)
        moved.append(Estimator(table, fitted).estimate(c).worst_ms / total - 1)
    assert np.abs(moved).max() > 1e-4  # the rest is not nothing here


def test_rows_that_no_network_contains_move_with_their_group(tmp_path: Path) -> None:
    *candidates, other = variants(9, exits=False)
    table = filled(tmp_path, [*candidates, other, candidate(exits=True)])
    networks = [
        as_measured(c, truth(c, lambda x: table.net_ms(x.key) * (1.3 if x.kind == "inverted_residual" else 1.0)))
        for c in candidates
    ]
    correction = fit_correction(table, networks).correction
    (fit,) = correction.fits
    group = {f.name: f for f in fit.groups}
    known = {f.name for f in fit.rows}
    found = {f.name: f for f in written_factors(table, correction)}
    assert set(found) == set(table.rows)
    unknown = [x for x in (*expand(other), *expand(candidate())) if x.key not in known]
    assert {x.kind for x in unknown} == {"inverted_residual", "exit_head"}
    for x in unknown:
        of_group = group[f"{x.group} fp32"]
        assert found[x.key].value == pytest.approx(fit.scale * (1 + fit.constant.value + of_group.value))
        assert found[x.key].std == pytest.approx(fit.scale * np.hypot(fit.constant.std, of_group.std))
    assert group["exit_head fp32"].value == pytest.approx(0.0, abs=1e-9)  # nothing is known of these
    assert group["inverted_residual fp32"].value > group["head fp32"].value + 0.01


def test_rows_of_a_precision_without_networks_of_its_own_are_corrected_by_the_mixed_ones(tmp_path: Path) -> None:
    candidates = variants(4, ("fp32", "fp32", "int8", "int8"))
    table = filled(tmp_path, candidates)
    mixed = [as_measured(c, 1.2 * sum_ms(c)) for c in candidates]
    assert set(written_back(table, fit_correction(table, mixed).correction)) == set(table.rows)

    own = candidate(exits=False)
    table = filled(tmp_path / "both", [*candidates, own])
    correction = fit_correction(table, [*mixed, as_measured(own, 1.5 * sum_ms(own))]).correction
    factors = {f.name: f.value for f in written_factors(table, correction)}
    for key, value in factors.items():
        if layer_of_key(key).precision == "fp32":
            assert value == pytest.approx(1.5)
        else:
            assert value < 1.4


def test_changes_of_a_table_are_told_by_group_and_by_cost(tmp_path: Path) -> None:
    candidates = variants(8, exits=False)
    table = filled(tmp_path, candidates)
    rng = np.random.default_rng(0)
    networks = [as_measured(c, sum_ms(c) * (1.1 + float(rng.normal(0, 0.03))), "plain") for c in candidates]
    correction = fit_correction(table, networks).correction
    (fit,) = correction.fits
    changes = table_changes(correction)
    rows = {c.name: c for c in changes if c.kind == "rows"}
    assert set(rows) == {
        *("call", "stem fp32", "inverted_residual fp32", "inverted_residual_se fp32", "head fp32"),
    }
    keys = [f.name for f in fit.rows if f.name not in ("call", "streaming")]
    blocks = [f.value for f in fit.rows if f.name in keys and layer_of_key(f.name).group == "inverted_residual"]
    found = rows["inverted_residual fp32"]
    assert (found.rows, found.networks, found.precision) == (len(blocks), 8, "fp32")
    assert (found.least, found.greatest) == (min(blocks), max(blocks))
    assert sum(c.rows for c in rows.values()) == len(fit.rows)
    costs = {c.name: c.value for c in changes if c.kind == "cost"}
    assert costs == {f"each {f.name}": f.value for f in fit.costs if f.name in COSTS[:4]}  # none decides or changes
    assert table_changes(Correction("abc", ())) == ()


@pytest.mark.parametrize("where", ["own", "imported", "borrowed"])
def test_rows_from_elsewhere_need_more_networks_before_more_than_the_scale_is_believed(
    tmp_path: Path, where: str
) -> None:
    candidates = variants(6)
    if where == "borrowed":
        filled(tmp_path / "theirs", candidates, runtime_version="0.9")
        table = filled(tmp_path / "mine", [])
        table.borrow(tmp_path / "theirs")
    else:
        table = filled(tmp_path, candidates, kind="imported" if where == "imported" else "measured")
    networks = [as_measured(c, 1.2 * sum_ms(c)) for c in candidates]
    fits = [fit_correction(table, networks[:n]).correction.fits[0] for n in (2, 3, 4, 5)]
    methods = ["scale", "bayes", "bayes", "bayes"] if where == "own" else ["scale", "scale", "scale", "bayes"]
    assert [fit.method for fit in fits] == methods
    assert [fit.scale for fit in fits] == pytest.approx([1.2] * 4)
    assert written_back(table, fit_correction(table, networks).correction).keys() == set(table.rows)


def evidence() -> NetworkEvidence:
    return NetworkEvidence("x", 1.0, 1.1, stable=True)


def test_impossible_evidence_is_refused() -> None:
    for sum_, ms in ((0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(RecordError, match="network x: times must be positive"):
            NetworkEvidence("x", sum_, ms, stable=True)
    fit = PrecisionFit("fp32", "scale", "", 1.0, Finding("all", 0.0, 0.0), (), (), (), 0.1, (evidence(),))
    for change, message in (
        ({"scale": 0.0}, "fit fp32: scale must be positive, got 0"),
        ({"scale": float("nan")}, "fit fp32: scale must be positive, got nan"),
        ({"error": -0.1}, "fit fp32: error must not be negative, got -0.1"),
        ({"networks": ()}, "fit fp32: no network is named as its evidence"),
    ):
        with pytest.raises(RecordError, match=message):
            replace(fit, **change)  # type: ignore[arg-type]
