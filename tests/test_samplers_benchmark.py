"""The benchmark of samplers: its problems, the searches it compares with, and going on from kept runs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks import linas, samplers
from benchmarks.chart import Panel, line_chart
from benchmarks.problems import Genotypes, Problem, load_problem
from nas.core.errors import DataError

SIZES = (3,) * 8
WEIGHTS = np.array([1.0, 0.3, 0.8, 0.5, 0.9, 0.2, 0.7, 0.4])


def small() -> Problem:
    """Additive accuracy and latency, 6,561 networks."""
    return Problem(
        "small",
        SIZES,
        (True,) * 8,
        np.copy,
        lambda genotypes: 1.0 + genotypes @ WEIGHTS[::-1],
        lambda genotypes: 60.0 + genotypes @ WEIGHTS,
        lambda genotypes, rng: 60.0 + genotypes @ WEIGHTS + 0.01 * rng.normal(size=len(genotypes)),
        6.0,
        59.0,
    )


@pytest.mark.parametrize("batch", [7, 20])
def test_linas_trains_distinct_networks_within_the_budget_and_beats_random_ones(batch: int) -> None:
    problem = small()
    first = samplers.random_in_budget(problem, 60, 0)
    found = linas.search(problem, 40, 0, batch, first)
    assert found.shape == (40, 8) and len(np.unique(found, axis=0)) == 40
    assert problem.latency_ms(found).max() <= problem.budget_ms
    assert problem.volumes(found)[-1] > problem.volumes(first[:40])[-1]


def test_linas_predictor_interpolates_what_it_was_shown() -> None:
    problem = small()
    rows = samplers.random_in_budget(problem, 60, 1)
    predictor = linas.Predictor(problem, rows[:40], problem.accuracy(rows[:40]))
    np.testing.assert_allclose(predictor(rows[40:]), problem.accuracy(rows[40:]), atol=0.1)


def test_ranks_follow_fronts_and_then_crowding() -> None:
    points = np.array([[1.0, 1.0], [4.0, 4.0], [2.0, 2.0], [0.5, 2.0], [2.2, 2.3]])  # accuracy, latency
    order, front = linas.ranked(points)
    assert front.tolist() == [0, 0, 0, 1, 0]
    assert order.tolist()[-1] == 3 and set(order.tolist()[:2]) == {0, 1}


def test_trainings_for_a_level_count_from_one() -> None:
    means = np.array([0.1, 0.4, 0.6])
    assert samplers.trainings_for(means, 0.4) == "2"
    assert samplers.trainings_for(means, 0.7) == ">3"


def kept_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1") -> tuple[dict, list[int]]:
    asked: list[int] = []

    def run(problem: Problem, count: int, seed: int) -> Genotypes:
        asked.append(seed)
        return samplers.random_in_budget(problem, count, seed)

    method = samplers.Method("a method", run, version)
    monkeypatch.setattr(samplers, "methods", lambda: (method,))
    monkeypatch.setattr(samplers, "load_problem", lambda *_: small())
    monkeypatch.setattr(samplers, "ProcessPoolExecutor", InProcess)
    return samplers.run_all([(method, "plain", seed, 12) for seed in (0, 1)], None, folder, 1), asked


class InProcess(ThreadPoolExecutor):
    """Threads see the changed functions; processes would not."""


def test_the_same_command_goes_on_from_kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, asked = kept_runs(tmp_path, monkeypatch)
    assert sorted(asked) == [0, 1]
    (tmp_path / "plain" / "a-method-1.json").unlink()
    again, asked = kept_runs(tmp_path, monkeypatch)
    assert asked == [1]
    assert {k: r.volumes for k, r in again.items()} == {k: r.volumes for k, r in first.items()}


def test_runs_of_another_version_are_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_runs(tmp_path, monkeypatch)
    _, asked = kept_runs(tmp_path, monkeypatch, "2")
    assert sorted(asked) == [0, 1]


def test_a_chart_is_well_formed_and_has_a_line_for_every_sampler() -> None:
    lines = {"ours": ([10, 100], [0.2, 0.9]), "a < b": ([10, 100], [0.1, 0.3])}
    text = line_chart([Panel("one", lines), Panel("two", lines)], "heading", "trainings", "share")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 4
    assert {"ours", "a < b"} <= {t.text for t in root.findall(f"{space}text")}


def test_a_chart_without_panels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        line_chart([], "heading", "x", "y")


def test_a_published_problem_says_which_option_names_its_folder() -> None:
    with pytest.raises(DataError, match="--data"):
        load_problem("ofa")


def write_ofa(folder: Path) -> None:
    """Four evaluated networks, one of them twice under two names of the same network, and a latency that adds up."""
    rng = np.random.default_rng(0)

    def row(depth: int, kernel: int, expansion: int) -> str:
        return ",".join(["-".join([str(v)] * n) for v, n in ((kernel, 20), (expansion, 20), (depth, 5))])

    shapes = [(2, 3, 3), (3, 5, 4), (4, 7, 6), (2, 7, 6)]
    (folder / "dynast_ofa").mkdir()
    (folder / "help").mkdir()
    beyond = "3-3-7-7-" * 4 + "3-3-7-7," + "-".join(["3"] * 20) + "," + "-".join(["2"] * 5)  # as the first network
    lines = [f"{row(*shape)},{70 + i}" for i, shape in enumerate(shapes)]
    (folder / "dynast_ofa" / "ofa_mbv3_w1.0_top1.csv").write_text("\n".join(["ks,e,d,top1", *lines, f"{beyond},72"]))
    measured = ["ks,e,d,r,v100_64"]
    for _ in range(120):
        depth, kernel, expansion = rng.choice((2, 3, 4)), rng.choice((3, 5, 7)), rng.choice((3, 4, 6))
        size = int(rng.choice((128, 176, 224)))
        ms = 2.0 + 5 * depth * kernel * expansion * (size / 224) ** 2 / 100
        measured.append(f"{row(depth, kernel, expansion)},{size},{ms}")
    (folder / "help" / "ofa_mbv3_latency.csv").write_text("\n".join(measured))


def test_the_ofa_problem_joins_repeated_networks_and_sums_a_fitted_table(tmp_path: Path) -> None:
    write_ofa(tmp_path)
    problem = load_problem("ofa", tmp_path)
    assert problem.everything is not None and len(problem.everything) == 4
    np.testing.assert_allclose(problem.accuracy(problem.everything), [71.0, 71.0, 72.0, 73.0])
    expected = [2 + 5 * d * k * e / 100 for d, k, e in ((2, 3, 3), (3, 5, 4), (4, 7, 6), (2, 7, 6))]
    np.testing.assert_allclose(problem.latency_ms(problem.everything), expected, rtol=0.02)


def test_a_network_that_nobody_evaluated_stands_for_the_one_most_alike(tmp_path: Path) -> None:
    write_ofa(tmp_path)
    problem = load_problem("ofa", tmp_path)
    assert problem.everything is not None
    near = problem.everything[2].copy()
    near[0] = 1
    np.testing.assert_array_equal(problem.canonical(near[None])[0], problem.everything[2])
