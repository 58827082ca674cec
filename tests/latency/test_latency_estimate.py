"""Estimates per exit, for one candidate and for many genotypes; figures under an exit distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from latency_examples import (
    GATE_MS,
    OVERHEAD_MS,
    add_streaming,
    candidate,
    filled,
    network,
    row,
    row_time_ms,
    sum_ms,
)

from nas.core.errors import MissingRowError, RecordError
from nas.core.records import Candidate, LatencyEstimate, LayerSpec, Precision
from nas.core.walk import expand
from nas.latency.estimate import Estimator, VectorEstimator, describe_errors, figures
from nas.latency.fitting import Fitted, fit_correction
from nas.latency.table import LatencyTable

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
WIDTHS = (16, 24)


@dataclass(frozen=True)
class TinySlot:
    kind: str
    genes: tuple[int, ...]
    shape: tuple[int, ...]
    layers: tuple[LayerSpec | None, ...]


class TinySpace:
    """Four genes: width of the first stage, its depth (1-2), an exit (no, yes), precision of the first stage."""

    sizes: tuple[int, ...] = (2, 2, 2, 2)

    def decode(self, g: Sequence[int]) -> Candidate:
        made = candidate(exits=bool(g[2]), width=WIDTHS[g[0]], depth=g[1] + 1)
        return made.with_precision(("fp32", PRECISIONS[g[3]], "int8", "int8"))

    def genotypes(self) -> np.ndarray:
        return np.array(list(itertools.product(*map(range, self.sizes))))

    def candidates(self) -> list[Candidate]:
        return [self.decode(g) for g in self.genotypes()]

    def slots(self) -> tuple[TinySlot, ...]:
        names = [x.name for x in max(map(expand, self.candidates()), key=len)]
        result = []
        for name in names:
            layers = []
            for g in self.genotypes():
                layers.append(next((x for x in expand(self.decode(g)) if x.name == name), None))
            kind = next(x.kind for x in layers if x is not None)
            result.append(TinySlot(kind, tuple(range(len(self.sizes))), self.sizes, tuple(layers)))
        return tuple(result)


class DeepSpace(TinySpace):
    """Depth of the first stage (1-4), an exit, precision of second stage and head, of stem and first stage.

    All blocks of the first stage but its first are the same row.
    """

    sizes = (4, 2, 2, 2)

    def decode(self, g: Sequence[int]) -> Candidate:
        first, second = PRECISIONS[g[3]], PRECISIONS[g[2]]
        return candidate((first, first, second, second), exits=bool(g[1]), depth=g[0] + 1)


class WideSpace(TinySpace):
    """Width of the first stage, its depth (1-4), an exit, precision of the stem and the first stage; the rest fp32."""

    sizes = (8, 4, 2, 2)

    def decode(self, g: Sequence[int]) -> Candidate:
        first = PRECISIONS[g[3]]
        return candidate(
            (first, first, "fp32", "fp32"), exits=bool(g[2]), width=int(16 + 4 * g[0]), depth=int(g[1] + 1)
        )


def test_an_estimate_is_overhead_plus_rows_without_theirs(tmp_path: Path) -> None:
    estimate = Estimator(filled(tmp_path, [candidate()])).estimate(candidate())
    assert estimate.worst_ms == pytest.approx(sum_ms(candidate()))
    assert estimate.rows_used == 6
    every = Estimator(filled(tmp_path / "other", [candidate()]), gated=False).estimate(candidate())
    assert every.worst_ms == pytest.approx(sum_ms(candidate(), gated=False))
    assert estimate.correction == "raw table"


def test_an_image_that_leaves_early_has_passed_its_exit_head(tmp_path: Path) -> None:
    estimate = Estimator(filled(tmp_path, [candidate()])).estimate(candidate())
    layers = expand(candidate())
    until = next(i for i, x in enumerate(layers) if x.kind == "exit_head") + 1
    assert len(estimate.exit_ms) == 2
    rows_ms = sum(row_time_ms(x) - OVERHEAD_MS for x in layers[:until])
    assert estimate.exit_ms[0] == pytest.approx(OVERHEAD_MS + rows_ms + GATE_MS)
    assert estimate.exit_ms[0] < estimate.exit_ms[1]
    assert estimate.exit_std_ms[0] < estimate.exit_std_ms[1]


def test_raw_deviation_holds_the_error_of_the_sum_and_of_the_rows(tmp_path: Path) -> None:
    table = filled(tmp_path, [candidate("int8")])
    estimate = Estimator(table).estimate(candidate("int8"))
    layers = expand(candidate("int8"))
    rows = sum((0.015 * row_time_ms(x)) ** 2 for x in layers)
    calls = (0.2 * OVERHEAD_MS * len(layers)) ** 2  # what a row that runs alone hides of its call
    assert estimate.worst_std_ms == pytest.approx(np.sqrt(rows + calls + (0.03 * estimate.worst_ms) ** 2), rel=1e-3)


def test_layers_can_be_given_instead_of_a_candidate(tmp_path: Path) -> None:
    estimator = Estimator(filled(tmp_path, [candidate()]))
    assert estimator.estimate(expand(candidate())) == estimator.estimate(candidate())
    with pytest.raises(RecordError, match="no layers were given"):
        estimator.estimate([])


def test_a_missing_row_is_an_error_with_the_command(tmp_path: Path) -> None:
    estimator = Estimator(filled(tmp_path, [candidate(exits=False)]))
    assert len(estimator.missing(expand(candidate()))) == 1
    with pytest.raises(MissingRowError, match="Run: nas measure --table"):
        estimator.estimate(candidate())


def test_a_corrected_estimate_follows_the_networks_and_says_so(tmp_path: Path) -> None:
    candidates = [candidate(depth=d) for d in (1, 2, 3, 4)]
    table = filled(tmp_path, candidates)
    for c in candidates[:3]:
        table.add(network(c, 1.2 * sum_ms(c)), c, "if")
    estimate = Estimator(table, fit_correction(table)).estimate(candidates[3])
    assert estimate.worst_ms == pytest.approx(1.2 * sum_ms(candidates[3]), rel=0.01)
    assert estimate.correction == "corrected table from 3 networks"
    assert 0 < estimate.worst_std_ms < 0.05 * estimate.worst_ms


def test_weights_on_the_way_to_an_exit_cost_what_streaming_them_costs(tmp_path: Path) -> None:
    c, table = candidate(), filled(tmp_path, [candidate()])
    before = Estimator(table).estimate(c).exit_ms
    add_streaming(table, 2, 1.0)
    layers = expand(c)
    first = sum(x.weight_bytes for x in layers if x.segment == 0) / 1e6
    whole = sum(x.weight_bytes for x in layers) / 1e6
    assert 0 < first < whole < 2
    after = Estimator(table).estimate(c).exit_ms
    assert np.subtract(after, before) == pytest.approx([first / 2, whole / 2])


@pytest.mark.parametrize("streaming_ms", [None, 1.0])
def test_both_paths_agree_on_every_genotype_raw_and_corrected(tmp_path: Path, streaming_ms: float | None) -> None:
    space = TinySpace()
    table = filled(tmp_path, space.candidates())
    if streaming_ms is not None:
        add_streaming(table, 2, streaming_ms)
    for c in [candidate(depth=d).with_precision("int8") for d in (1, 2)] + space.candidates()[:5]:
        for layer in expand(c):
            if table.missing([layer.key]):
                table.add(row(layer))
        table.add(network(c, 1.1 * sum_ms(c) + 0.01), c, "if")
    check_both_paths(space, table, fit_correction(table))


def check_both_paths(space: TinySpace, table: LatencyTable, fitted: Fitted) -> None:
    """Every genotype, raw and corrected. Many corrected ones are computed in single precision, with fewer kernels."""
    for correction, mean_rel, std_rel in ((None, 1e-9, 1e-9), (fitted, 1e-5, 1e-4)):
        vector = VectorEstimator(space, table, correction).estimate(space.genotypes())
        single = Estimator(table, correction)
        for i, c in enumerate(space.candidates()):
            one = single.estimate(c)
            present = ~np.isnan(vector.exit_ms[i])
            assert present.tolist() == [bool(c.exits), True]
            assert vector.exit_ms[i][present] == pytest.approx(one.exit_ms, rel=mean_rel)
            assert vector.exit_std_ms[i][present] == pytest.approx(one.exit_std_ms, rel=std_rel)
            assert vector.worst_ms[i] == pytest.approx(one.worst_ms, rel=mean_rel)
            assert vector.worst_std_ms[i] == pytest.approx(one.worst_std_ms, rel=std_rel)


def test_both_paths_agree_where_a_row_is_repeated_and_precision_mixed(tmp_path: Path) -> None:
    space = DeepSpace()
    table = filled(tmp_path, space.candidates())
    for c in space.candidates()[::3]:  # networks of all precisions, in which single rows are wrong
        ms = sum_ms(c) + sum((0.3 if "k=3" in x.key else -0.1) * row_time_ms(x) for x in expand(c))
        table.add(network(c, ms), c, "if")
    fitted = fit_correction(table)
    assert [(label, fit.record.method) for label, fit in fitted.fits.items()] == [
        ("fp32", "bayes"),
        ("int8", "bayes"),
        ("mixed", "bayes"),
    ]
    deepest = [x.key for x in expand(space.decode((3, 0, 0, 1)))]
    assert len(deepest) - len(set(deepest)) == 2
    check_both_paths(space, table, fitted)


@pytest.fixture(scope="module")
def measured_wide(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """A table of WideSpace that streams weights, with 69 networks in which groups and single rows are wrong."""
    space, rng = WideSpace(), np.random.default_rng(0)
    table = filled(tmp_path_factory.mktemp("wide"), space.candidates())
    add_streaming(table, 2, 0.05)
    wrong = {x.key: rng.normal(0.1, 0.1) for c in space.candidates() for x in expand(c)}
    fp32, mixed = space.candidates()[::2], space.candidates()[1::2]
    for c in (*fp32[:55], *mixed[:14]):
        ms = sum_ms(c) + sum(wrong[x.key] * row_time_ms(x) for x in expand(c))
        table.add(network(c, float(ms * rng.normal(1.0, 0.02))), c, "if")
    return table


def test_both_paths_agree_where_many_networks_were_measured(measured_wide: LatencyTable) -> None:
    fitted = fit_correction(measured_wide)
    assert {label: len(fit.record.networks) for label, fit in fitted.fits.items()} == {"fp32": 55, "mixed": 69}
    assert all(fit.feedback.prior[4] > 0 for fit in fitted.fits.values())  # a smooth rest is part of it
    check_both_paths(WideSpace(), measured_wide, fitted)


def test_corrected_estimates_do_not_depend_on_the_genotypes_beside_them(measured_wide: LatencyTable) -> None:
    genotypes = np.tile(WideSpace().genotypes(), (20, 1))  # more than are estimated at a time, labels in turn
    estimator = VectorEstimator(WideSpace(), measured_wide, fit_correction(measured_wide))
    many, once = estimator.estimate(genotypes), estimator.estimate(WideSpace().genotypes())
    assert np.tile(once.exit_ms, (20, 1)) == pytest.approx(many.exit_ms, rel=1e-6, nan_ok=True)
    assert np.tile(once.exit_std_ms, (20, 1)) == pytest.approx(many.exit_std_ms, rel=1e-5, nan_ok=True)
    assert estimator.estimate(genotypes[:0]).exit_ms.shape == (0, 2)


def test_a_missing_row_leaves_the_exits_before_it(tmp_path: Path) -> None:
    space = TinySpace()
    table = filled(tmp_path, [])
    for layer in dict.fromkeys(x for d in (1, 2) for x in expand(candidate(depth=d)) if x.kind != "head"):
        table.add(row(layer))
    add_streaming(table, 2, 0.05)
    found = VectorEstimator(space, table).estimate(space.genotypes(), allow_missing=True)
    assert np.isnan(found.worst_ms).all()
    known = [bool(g[0] == 1 and g[2] == 1 and g[3] == 0) for g in space.genotypes()]  # wide, an exit, begins in fp32
    assert (~np.isnan(found.exit_ms[:, 0])).tolist() == known


def test_corrected_estimates_with_missing_rows_are_nan(tmp_path: Path) -> None:
    space = TinySpace()
    known = space.genotypes()[:, 0] == 0
    table = filled(tmp_path, [space.decode(g) for g in space.genotypes()[known]])
    add_streaming(table, 2, 0.05)
    for c in [space.decode(g) for g in space.genotypes()[known]]:
        table.add(network(c, 1.1 * sum_ms(c)), c, "if")
    found = VectorEstimator(space, table, fit_correction(table)).estimate(space.genotypes(), allow_missing=True)
    assert (~np.isnan(found.worst_ms)).tolist() == known.tolist()
    assert (~np.isnan(found.worst_std_ms)).tolist() == known.tolist()


def test_missing_rows_in_many_genotypes_are_never_zero(tmp_path: Path) -> None:
    space = TinySpace()
    genotypes = space.genotypes()
    known = genotypes[genotypes[:, 3] == 0]
    table = filled(tmp_path, [space.decode(g) for g in known])
    estimator = VectorEstimator(space, table)
    assert np.isfinite(estimator.estimate(known).worst_ms).all()
    with pytest.raises(
        MissingRowError, match=r"\d+ rows are missing in .*, the first is ir\|.*int8\. Run: nas measure"
    ):
        estimator.estimate(genotypes)
    partial = estimator.estimate(genotypes, allow_missing=True)
    assert np.isnan(partial.worst_ms).tolist() == [bool(g[3]) for g in genotypes]


def test_layers_that_genotypes_need_are_listed(tmp_path: Path) -> None:
    space = TinySpace()
    estimator = VectorEstimator(space, filled(tmp_path, [candidate()]))
    chosen = space.genotypes()[[0, 7]]
    expected = {x.key for g in chosen for x in expand(space.decode(g))}
    assert {x.key for x in estimator.layers(chosen)} == expected
    assert len(estimator.layers(chosen)) == len(expected)


def test_genotypes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    estimator = VectorEstimator(TinySpace(), filled(tmp_path, TinySpace().candidates()))
    assert estimator.exits == 2
    for wrong, message in (
        ([[0, 0, 0, 1], [0, 0, 0, 2]], "do not fit the space: gene 3 is 2, allowed are 0 to 1"),
        ([[0, -1, 0, 0]], "do not fit the space: gene 1 is -1, allowed are 0 to 1"),
        ([[0, 0]], "do not fit the space: they have 2 genes, slots need 4"),
        ([0, 0, 0, 0], r"must be integers \[N, G\]"),
        ([[0.0, 0, 0, 0]], r"must be integers \[N, G\], got float64"),
    ):
        with pytest.raises(RecordError, match=message):
            estimator.estimate(wrong)


ESTIMATE = LatencyEstimate((1.0, 2.0, 4.0), (0.1, 0.2, 0.4), 10, "raw table")


def test_figures_weigh_exits_by_their_share() -> None:
    got = figures(ESTIMATE, (0.5, 0.3, 0.2))
    assert got.expected_ms == pytest.approx(0.5 + 0.6 + 0.8)
    assert got.std_ms == pytest.approx(0.05 + 0.06 + 0.08)
    assert got.worst_ms == 4.0
    assert got.provenance == "predicted"


@pytest.mark.parametrize(
    ("shares", "tail", "expected"),
    [
        ((0.5, 0.3, 0.2), 0.99, 4.0),
        ((0.5, 0.495, 0.005), 0.99, 2.0),
        ((0.7, 0.29, 0.01), 0.99, 2.0),
        ((1.0, 0.0, 0.0), 0.99, 1.0),
        ((0.5, 0.3, 0.2), 0.8, 2.0),
        ((0.5, 0.3, 0.2), 1.0, 4.0),
    ],
)
def test_tail_latency_is_what_that_share_of_images_keeps(
    shares: tuple[float, ...], tail: float, expected: float
) -> None:
    assert figures(ESTIMATE, shares, tail).p99_ms == expected


@pytest.mark.parametrize(
    ("shares", "tail", "message"),
    [
        ((0.5, 0.5), 0.99, "expected 3 exit shares"),
        ((0.5, 0.5, 0.5), 0.99, "sum to 1"),
        ((1.5, -0.5, 0.0), 0.99, "at least 0"),
        ((float("nan"), 0.5, 0.5), 0.99, "at least 0"),
        ((0.5, 0.3, 0.2), 0.0, "tail must be above 0"),
    ],
)
def test_impossible_shares_are_refused(shares: tuple[float, ...], tail: float, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        figures(ESTIMATE, shares, tail)


def test_errors_are_described() -> None:
    got = describe_errors([1.1, 2.0, 2.7], [1.0, 2.0, 3.0])
    assert got["mape"] == pytest.approx(0.2 / 3)
    assert got["bias"] == pytest.approx(0.0)
    assert got["spearman"] == pytest.approx(1.0)
    assert got["within_5"] == pytest.approx(1 / 3)
    assert got["n"] == 3
    assert describe_errors([1, 1, 2, 3], [1, 2, 2, 3])["spearman"] == pytest.approx(5 / 6)  # ties share their rank
    with pytest.raises(RecordError, match="two equal lists"):
        describe_errors([1.0], [1.0])
